"""Figures, drawn with Pillow: labelled grids of pictures, curves, heat maps, bars and tables."""

import math
import textwrap
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont

PAPER = "white"
INK = "#222222"
LINE_COLORS = ("navy", "crimson", "seagreen", "darkorange", "purple", "teal")


# ---- grids of pictures ---------------------------------------------------------------------------

def image_grid(
        pictures: list[Image.Image], labels: list[str] | None = None, columns: int | None = None,
        title: str | None = None, cell: int = 192) -> Image.Image:
    """Pictures in rows, each above its label, under a title.

    columns: pictures in a row. If left out, up to three make one row, and more make about a square.
    cell: pixels. Smaller pictures are enlarged by a whole factor to about this size, so that tiny
    ones can be seen. The first picture decides the factor for all.
    """
    if not columns:
        columns = len(pictures) if len(pictures) <= 3 else math.ceil(len(pictures) ** 0.5)
    rows = math.ceil(len(pictures) / columns)

    factor = max(1, round(cell / max(pictures[0].size)))
    width = factor * max(picture.width for picture in pictures)
    height = factor * max(picture.height for picture in pictures)
    gap = max(6, width // 24)  # in pixels; gaps and letters grow with the pictures
    font_size = max(12, width // 24)
    sheet_width = columns * width + (columns + 1) * gap
    label_font = ImageFont.load_default(font_size)
    title_font = ImageFont.load_default(1.25 * font_size)
    title_lines = wrap(title or "", title_font, sheet_width - 2 * gap)
    label_lines = []
    for label in labels or [""] * len(pictures):
        label_lines.append(wrap(label, label_font, width))

    top = gap + len(title_lines) * line_height(title_font)
    label_height = max(map(len, label_lines)) * line_height(label_font)
    row_height = height + label_height + gap
    sheet = Image.new("RGB", (sheet_width, top + rows * row_height), PAPER)
    write_lines(sheet, title_lines, title_font, sheet_width / 2, gap // 2)
    for i, (picture, lines) in enumerate(zip(pictures, label_lines)):
        row, column = divmod(i, columns)
        x = gap + column * (width + gap)
        y = top + row * row_height
        sheet.paste(enlarge(picture, factor), (x, y))
        write_lines(sheet, lines, label_font, x + width / 2, y + height + gap // 3)
    return sheet


def enlarge(picture: Image.Image, factor: int) -> Image.Image:
    """A picture with sides `factor` times as long."""
    size = (factor * picture.width, factor * picture.height)
    return picture.resize(size, Image.Resampling.BICUBIC)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break a text into lines of about `width` pixels, inside a long word too."""
    return textwrap.wrap(text, int(width / font.getlength("x")))


def line_height(font: ImageFont.FreeTypeFont) -> int:
    """Pixels from one line of text to the next."""
    return round(1.35 * font.size)


def write_lines(
        sheet: Image.Image, lines: list[str], font: ImageFont.FreeTypeFont,
        middle: float, top: float):
    """Write lines of text that are centred at x = `middle`, the first one's top at y = `top`."""
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        y = top + i * line_height(font)
        draw.text((middle, y), line, INK, font, anchor="ma")


# ---- curves --------------------------------------------------------------------------------------

@dataclass
class Plot:
    """The area of a picture that a curve is drawn in, and the steps and values at its edges."""

    left: int
    right: int
    top: int
    bottom: int
    steps: tuple[float, float]  # at the left and the right edge
    values: tuple[float, float]  # at the bottom and the top

    def point(self, step: float, value: float) -> tuple[float, float]:
        """Where a value at a step lies, as (x, y) in pixels."""
        first, last = self.steps
        low, high = self.values
        across = (step - first) / ((last - first) or 1)
        up = (value - low) / ((high - low) or 1)
        x = self.left + across * (self.right - self.left)
        y = self.bottom - up * (self.bottom - self.top)
        return x, y


def loss_curve(rows: list[dict]) -> Image.Image:
    """The loss over the steps: thin for every logged value, thick for their running average.

    rows: of a run's log.jsonl, each with "step" and "loss". The scale is logarithmic if all losses
    are positive.
    """
    width = 640
    height = 360
    margin = 24
    steps = [row["step"] for row in rows]
    values = [row["loss"] for row in rows]
    is_logarithmic = min(values) > 0
    if is_logarithmic:
        values = list(map(math.log, values))
    low = min(values)
    high = max(values)
    plot = Plot(left=70, right=width - margin, top=margin, bottom=height - margin,
                steps=(steps[0], steps[-1]), values=(low, high))

    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    for value in (low, (low + high) / 2, high):
        x, y = plot.point(steps[0], value)
        draw.line([(x, y), (plot.right, y)], fill="lightgray")
        loss = math.exp(value) if is_logarithmic else value
        draw.text((4, y - 6), f"{loss:.4g}", fill="black")
    averages = running_average(values)
    draw.line(list(map(plot.point, steps, values)), fill="lightsteelblue")
    draw.line(list(map(plot.point, steps, averages)), fill="navy", width=2)
    draw.text((plot.left, plot.bottom + 6), f"step {steps[0]}", fill="black")
    draw.text((plot.right - 70, plot.bottom + 6), f"step {steps[-1]}", fill="black")
    return picture


def curves(
        lines: dict[str, tuple[list[float], list[float]]], across: str, up: str,
        logarithmic: bool = False, logarithmic_across: bool = False) -> Image.Image:
    """Several curves in one plot, each in a colour of its own, named in a legend.

    lines: {name: (x values, y values)}. across, up: what the axes show.
    logarithmic, logarithmic_across: of the vertical and of the horizontal axis; all values along
        it must be positive.
    """
    width = 640
    height = 360
    all_x = [x for xs, _ in lines.values() for x in xs]
    all_y = [y for _, ys in lines.values() for y in ys]
    height_of = math.log if logarithmic else float
    width_of = math.log if logarithmic_across else float
    low = min(all_y)
    high = max(all_y)
    plot = Plot(left=80, right=width - 24, top=36, bottom=height - 48,
                steps=(width_of(min(all_x)), width_of(max(all_x))),
                values=(height_of(low), height_of(high)))

    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(14)
    middle = (low * high) ** 0.5 if logarithmic else (low + high) / 2
    for value in (low, middle, high):
        _, y = plot.point(0, height_of(value))
        draw.line([(plot.left, y), (plot.right, y)], fill="lightgray")
        draw.text((plot.left - 8, y), f"{value:.3g}", INK, font, anchor="rm")
    draw.text((8, 6), up, INK, font)
    draw.text((plot.left, plot.bottom + 6), f"{min(all_x):g}", INK, font, anchor="ma")
    draw.text((plot.right, plot.bottom + 6), f"{max(all_x):g}", INK, font, anchor="ma")
    draw.text((width / 2, plot.bottom + 22), across, INK, font, anchor="ma")
    x_legend = plot.right
    for (name, (xs, ys)), color in reversed(list(zip(lines.items(), LINE_COLORS))):
        points = [plot.point(width_of(x), height_of(y)) for x, y in zip(xs, ys)]
        draw.line(points, fill=color, width=3, joint="curve")
        draw.text((x_legend, 8), name, color, font, anchor="ra")
        x_legend -= font.getlength(name) + 16
    return picture


def running_average(values: list[float]) -> list[float]:
    """An exponential average that starts with the first value and remembers about ten."""
    averages = [values[0]]
    for value in values[1:]:
        averages.append(0.9 * averages[-1] + 0.1 * value)
    return averages


# ---- numbers -------------------------------------------------------------------------------------

def grey(numbers: torch.Tensor, side: int | None = None) -> Image.Image:
    """Numbers [H,W] as a picture: the lowest is black, the highest white.

    side: pixels; each number becomes a square, so that the longer side is about as long.
    """
    span = (numbers.max() - numbers.min()).clamp(min=1e-12)
    levels = (numbers - numbers.min()) / span * 255
    picture = Image.fromarray(levels.round().to(torch.uint8).numpy()).convert("RGB")
    factor = max(1, (side or 0) // max(picture.size))
    size = (factor * picture.width, factor * picture.height)
    return picture.resize(size, Image.Resampling.NEAREST)


def heat_map(
        rows: list[list[float]], row_names: list[str], column_names: list[str],
        title: str | None = None, cell: int = 44) -> Image.Image:
    """Numbers as a table of coloured cells, white for the lowest, dark blue for the highest."""
    numbers = [number for row in rows for number in row]
    low = min(numbers)
    high = max(numbers)
    font = ImageFont.load_default(13)
    left = 16 + round(max(map(font.getlength, row_names)))
    head = 16 + round(max(map(font.getlength, column_names)))
    is_long = head > cell + 16  # names too long for their column are written upwards
    top = (head if is_long else 24) + (26 if title else 0)
    sheet = Image.new("RGB", (left + cell * len(column_names) + 12, top + cell * len(rows) + 12),
                      PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((8, 6), title, INK, ImageFont.load_default(15))
    for j, name in enumerate(column_names):
        x = left + cell * j + cell // 2
        if is_long:
            label = Image.new("RGB", (head, 18), PAPER)
            ImageDraw.Draw(label).text((4, 1), name, INK, font)
            sheet.paste(label.rotate(90, expand=True), (x - 9, top - head))
        else:
            draw.text((x, top - 6), name, INK, font, anchor="ms")
    for i, (row, name) in enumerate(zip(rows, row_names)):
        y = top + cell * i
        draw.text((left - 8, y + cell / 2), name, INK, font, anchor="rm")
        for j, number in enumerate(row):
            share = (number - low) / ((high - low) or 1)
            fill = (round(255 - 235 * share), round(255 - 190 * share), round(255 - 115 * share))
            x = left + cell * j
            draw.rectangle([x, y, x + cell - 2, y + cell - 2], fill=fill)
            ink = "white" if share > 0.5 else INK
            draw.text((x + cell / 2 - 1, y + cell / 2 - 1), f"{number:.2f}", ink, font, anchor="mm")
    return sheet


def bars(values: dict[str, float], title: str | None = None, unit: str = "") -> Image.Image:
    """One bar from 0 for each value, beside its name; negative ones go to the left."""
    font = ImageFont.load_default(14)
    names = list(values)
    row = 26
    top = 34 if title else 10
    left = 20 + round(max(map(font.getlength, names)))
    longest = 320
    low = min(0, *values.values())
    scale = longest / ((max(0, *values.values()) - low) or 1)
    zero = left - low * scale
    sheet = Image.new("RGB", (left + longest + 110, top + row * len(names) + 6), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((10, 6), title, INK, ImageFont.load_default(16))
    for i, (name, value) in enumerate(values.items()):
        y = top + row * i
        ends = sorted([zero, zero + value * scale])
        draw.text((left - 10, y + row / 2), name, INK, font, anchor="rm")
        draw.rectangle([ends[0], y + 4, ends[1], y + row - 5], fill=LINE_COLORS[0])
        draw.text((ends[1] + 8, y + row / 2), f"{value:.3g}{unit}", INK, font, anchor="lm")
    return sheet


def table(rows: list[list[str]], title: str | None = None) -> Image.Image:
    """Rows of text in columns; the first row is the head."""
    font = ImageFont.load_default(14)
    row_height = 24
    widths = []
    for column in zip(*rows):
        widths.append(20 + round(max(map(font.getlength, column))))
    top = 34 if title else 8
    sheet = Image.new("RGB", (sum(widths) + 16, top + row_height * len(rows) + 8), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((10, 6), title, INK, ImageFont.load_default(16))
    for i, row in enumerate(rows):
        y = top + row_height * i
        x = 10
        for text, width in zip(row, widths):
            draw.text((x, y + row_height / 2), text, INK, font, anchor="lm")
            x += width
        line = INK if i == 0 else "lightgray"
        draw.line([(8, y + row_height), (sheet.width - 8, y + row_height)], fill=line)
    return sheet
