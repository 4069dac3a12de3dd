"""Figures, drawn with Pillow: labelled grids of pictures, curves, heat maps, bars and tables."""

import math
import statistics
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


@dataclass
class Measured:
    """A point of a plot, as every seed measured it."""

    x: list[float]
    y: list[float]
    note: str = ""  # is written beside it


MARKS = ((30, 0, 9), (4, 0, 11), (3, 0, 12), (4, 45, 11))  # (corners, turn in degrees, radius)
LARGE = 24  # pixels of a letter; such figures are drawn large, so that they can be printed


def error_bars(lines: dict[str, list[Measured]], across: str, up: str) -> Image.Image:
    """Lines through the means over seeds, and thin bars from the lowest seed to the highest.

    lines: {name: points}. A line of one point is its mark alone, and the first line lies on top.
    across, up: what the axes show.
    """
    font = ImageFont.load_default(LARGE)
    points = [point for line in lines.values() for point in line]
    x_ticks = round_ticks([x for point in points for x in point.x])
    y_ticks = round_ticks([y for point in points for y in point.y])
    plot = Plot(left=110, right=840, top=60, bottom=max(600, 50 + 36 * len(lines)),
                steps=(x_ticks[0], x_ticks[-1]), values=(y_ticks[0], y_ticks[-1]))
    legend = plot.right + 50
    width = legend + 40 + round(max(map(font.getlength, lines)))
    picture = Image.new("RGB", (width, plot.bottom + 90), PAPER)
    draw = ImageDraw.Draw(picture)
    draw_axes(draw, plot, x_ticks, y_ticks, across, up)

    notes = []  # (mean, note, color)
    taken = []  # boxes (left, top, right, bottom) that no note should cover
    for i, (name, line) in reversed(list(enumerate(lines.items()))):
        color = LINE_COLORS[i % len(LINE_COLORS)]
        corners, turn, radius = MARKS[(i + i // 12) % len(MARKS)]  # 24 pairs of color and mark
        means = []
        for point in line:
            x, y = plot.point(statistics.mean(point.x), statistics.mean(point.y))
            left, bottom = plot.point(min(point.x), min(point.y))
            right, top = plot.point(max(point.x), max(point.y))
            draw.line([(left, y), (right, y)], fill=color)
            draw.line([(x, top), (x, bottom)], fill=color)
            means.append((x, y))
            notes.append(((x, y), point.note, color))
            taken += [(left, y - 1, right, y + 1), (x - 1, top, x + 1, bottom)]
            taken.append((x - radius, y - radius, x + radius, y + radius))
        draw.line(means, fill=color, width=3)
        taken += boxes_along(means)
        y_legend = plot.top + 36 * i
        for x, y in [*means, (legend, y_legend)]:
            draw.regular_polygon((x, y, radius), corners, turn, fill=color)
        draw.text((legend + 24, y_legend), name, INK, font, anchor="lm")
    for mean, note, color in notes:
        write_note(draw, mean, note, color, taken)
    return picture


def round_ticks(values: list[float]) -> list[float]:
    """About five round numbers in equal steps that enclose all values."""
    low = min(values)
    high = max(values)
    rough = ((high - low) or abs(high) or 1) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [step * i for i in range(first, last + 1)]


def draw_axes(
        draw: ImageDraw.ImageDraw, plot: Plot, x_ticks: list[float], y_ticks: list[float],
        across: str, up: str):
    """A grid at the ticks, with their numbers and the names of the axes."""
    font = ImageFont.load_default(LARGE)
    for tick in x_ticks:
        x, _ = plot.point(tick, plot.values[0])
        draw.line([(x, plot.top), (x, plot.bottom)], fill="lightgray")
        draw.text((x, plot.bottom + 10), f"{tick:g}", INK, font, anchor="ma")
    for tick in y_ticks:
        _, y = plot.point(plot.steps[0], tick)
        draw.line([(plot.left, y), (plot.right, y)], fill="lightgray")
        draw.text((plot.left - 12, y), f"{tick:g}", INK, font, anchor="rm")
    draw.text((10, 10), up, INK, font)
    draw.text(((plot.left + plot.right) / 2, plot.bottom + 46), across, INK, font, anchor="ma")


def boxes_along(points: list[tuple[float, float]]) -> list[tuple]:
    """Small boxes on the lines from each point to the next."""
    boxes = []
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        for i in range(50):
            x = x0 + i / 50 * (x1 - x0)
            y = y0 + i / 50 * (y1 - y0)
            boxes.append((x - 2, y - 2, x + 2, y + 2))
    return boxes


def write_note(
        draw: ImageDraw.ImageDraw, mean: tuple[float, float], note: str, color: str,
        taken: list[tuple]):
    """Write a note beside a mark where it covers least of what is taken, and add its own box."""
    font = ImageFont.load_default(0.8 * LARGE)
    x, y = mean
    corners = (9, -7, "lb"), (9, 7, "lt"), (-9, -7, "rb"), (-9, 7, "rt")
    sides = (14, 0, "lm"), (-14, 0, "rm"), (0, -14, "mb"), (0, 14, "mt")
    places = []
    for right, down, anchor in (*corners, *sides):
        at = (x + right, y + down)
        box = draw.textbbox(at, note, font, anchor=anchor)
        covered = sum(overlap(box, other) for other in taken)
        places.append((covered, at, anchor, box))
    _, at, anchor, box = min(places, key=lambda place: place[0])  # the first of the best
    draw.text(at, note, color, font, anchor=anchor, stroke_width=2, stroke_fill=PAPER)
    taken.append(box)


def overlap(one: tuple, other: tuple) -> float:
    """The area that two boxes (left, top, right, bottom) share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0)


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


def bars(
        values: dict[str, float], title: str | None = None, unit: str = "",
        spans: dict[str, tuple[float, float]] | None = None, font_size: int = 14) -> Image.Image:
    """One bar from 0 for each value, beside its name; negative ones go to the left.

    spans: the lowest and the highest seed of each value, drawn as a thin line.
    """
    font = ImageFont.load_default(font_size)
    title_font = ImageFont.load_default(font_size + 2)
    names = list(values)
    row = round(1.86 * font_size)
    top = 10 + line_height(title_font) if title else 10
    left = 20 + round(max(map(font.getlength, names)))
    longest = 320
    spans = spans or {name: (value, value) for name, value in values.items()}
    low = min(0, *(lowest for lowest, _ in spans.values()))
    scale = longest / ((max(0, *(highest for _, highest in spans.values())) - low) or 1)
    zero = left - low * scale
    sheet = Image.new("RGB", (left + longest + 110, top + row * len(names) + 6), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((10, 6), title, INK, title_font)
    for i, (name, value) in enumerate(values.items()):
        y = top + row * i
        ends = sorted([zero, zero + value * scale])
        draw.text((left - 10, y + row / 2), name, INK, font, anchor="rm")
        draw.rectangle([ends[0], y + 4, ends[1], y + row - 5], fill=LINE_COLORS[0])
        lowest, highest = [zero + end * scale for end in spans[name]]
        if lowest < highest:
            draw.line([(lowest, y + row // 2), (highest, y + row // 2)], LINE_COLORS[3], width=3)
        x = max(ends[1], highest) + 8
        draw.text((x, y + row / 2), f"{value:.3g}{unit}", INK, font, anchor="lm")
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
