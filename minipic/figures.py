"""Figures, drawn with Pillow: labelled grids of pictures, and the loss curve of a training run."""

import math
import textwrap
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

PAPER = "white"
INK = "#222222"


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
    steps: tuple[int, int]  # at the left and the right edge
    values: tuple[float, float]  # at the bottom and the top

    def point(self, step: int, value: float) -> tuple[float, float]:
        """Where a value at a step lies, as (x, y) in pixels."""
        first, last = self.steps
        low, high = self.values
        across = (step - first) / max(1, last - first)
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


def running_average(values: list[float]) -> list[float]:
    """An exponential average that starts with the first value and remembers about ten."""
    averages = [values[0]]
    for value in values[1:]:
        averages.append(0.9 * averages[-1] + 0.1 * value)
    return averages
