"""Pictures: tensor <-> PIL, files opened with care and written whole, grids, loss curves, the settings inside a PNG."""

import itertools
import json
import math
import os
import struct
import textwrap
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from minipic.common import InputError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # Pillow knows many more, some with holes in their readers
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error,  # what Pillow raises on damaged files
          Image.DecompressionBombError, Image.DecompressionBombWarning)
CHUNK = "minipic"  # the PNG text chunk with the settings as JSON
INK, PAPER = "#222222", "white"


def to_pictures(images):
    """images [B,3,H,W] in [-1,1] (clamped) -> B PIL pictures."""
    levels = ((images.detach().float() / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in levels]


def to_tensor(picture):
    """A PIL picture -> [3,H,W] in [-1,1]; one in a single channel (mode L) -> [1,H,W]."""
    levels = torch.from_numpy(np.array(picture, dtype=np.float32)).reshape(picture.height, picture.width, -1)
    return 2 * (levels.permute(2, 0, 1) / 255) - 1  # in this order: diffusers' numbers to the last bit


def open_picture(path):
    """A file as an upright RGB picture: first frame, 16 bits cut to 8, transparency on white.

    Raises InputError naming the file when it is missing, damaged, cut off, too large, or no PNG, JPEG, WebP or BMP.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # about 90 million pixels
            with Image.open(path, formats=FORMATS) as file:
                file.load()  # opening reads the header only
                return flatten(ImageOps.exif_transpose(file))
    except FileNotFoundError:
        raise InputError(f"{path}: no such picture; check the name") from None
    except DAMAGE as error:
        reason = "is not one" if isinstance(error, Image.UnidentifiedImageError) else f"cannot be read: {error}"
        raise InputError(f"{path}: expected a PNG, JPEG, WebP or BMP picture, and it {reason}") from error


def flatten(picture):
    """Any mode -> RGB."""
    if picture.mode.startswith("I"):  # 16 bits a pixel, which convert() would cut off at 255
        picture = Image.fromarray((np.asarray(picture, dtype=np.uint32) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, PAPER), picture)
    return picture.convert("RGB")


def cover(picture, size):
    """Scale and crop the middle to `size` (width, height); nothing is squeezed."""
    return picture if picture.size == tuple(size) else ImageOps.fit(picture, size, Image.Resampling.LANCZOS)


def white(mask, size):
    """A PIL mask -> [1,H,W] of `size` (width, height): 1 where it is white, 0 where it is black."""
    return (to_tensor(cover(mask.convert("L"), size)) >= 0).float()


def wrap(text, font, width):
    """Break a text into lines of about `width` pixels, also inside a long word."""
    return textwrap.wrap(text, int(width / font.getlength("x")))


def write_lines(sheet, lines, font, middle, y):
    """Centred lines of text, the first one's top at y."""
    for i, line in enumerate(lines):
        ImageDraw.Draw(sheet).text((middle, y + i * spacing(font)), line, INK, font, anchor="ma")


def spacing(font):
    return round(1.35 * font.size)


def labelled_grid(pictures, labels=None, columns=None, title=None, cell=192):
    """Pictures in rows, each above its label, under a title -> one picture.

    `columns`: unless given one row of up to three, else about a square; `cell`: pictures smaller than this are enlarged
    by a whole factor, so that tiny ones can be seen.
    """
    columns = columns or (len(pictures) if len(pictures) <= 3 else math.ceil(len(pictures) ** 0.5))
    rows, factor = math.ceil(len(pictures) / columns), max(1, round(cell / max(pictures[0].size)))
    width, height = (factor * max(sides) for sides in zip(*(picture.size for picture in pictures)))
    gap, sheet_width = max(6, width // 24), columns * width + (columns + 1) * max(6, width // 24)
    small, large = (ImageFont.load_default(max(12, width // 24) * scale) for scale in (1, 1.25))
    below = [wrap(label, small, width) for label in labels or [""] * len(pictures)]
    above = wrap(title or "", large, sheet_width - 2 * gap)
    top = gap + spacing(large) * len(above)
    step = height + spacing(small) * max(map(len, below)) + gap
    sheet = Image.new("RGB", (sheet_width, top + rows * step), PAPER)
    write_lines(sheet, above, large, sheet_width / 2, gap // 2)
    for i, (picture, lines) in enumerate(zip(pictures, below)):
        x, y = gap + i % columns * (width + gap), top + i // columns * step
        sheet.paste(picture.resize([factor * side for side in picture.size], Image.Resampling.BICUBIC), (x, y))
        write_lines(sheet, lines, small, x + width / 2, y + height + gap // 3)
    return sheet


def parameters(settings, size):
    """The text that AUTOMATIC1111's web UI writes into its PNGs, which most tools show; `settings`: see sample.py."""
    negative = f"\nNegative prompt: {settings['negative']}" if settings.get("negative") else ""
    values = {"Steps": settings["steps"], "Sampler": settings["sampler"], "CFG scale": settings["guidance"],
              "Seed": settings["seed"], "Size": "{}x{}".format(*size), "Model": settings["model"]}
    return f"{settings['prompt']}{negative}\n" + ", ".join(f"{key}: {value}" for key, value in values.items())


def save_new(picture, path, settings=None):
    """Write a PNG to `path`, or to a numbered name beside it when that is taken (cat.png, cat-0002.png); returns where.

    The file appears whole or not at all, and no other picture is overwritten, also by several processes at once.
    `settings`: a dict that `read_settings` gives back.
    """
    path, info = Path(path), PngImagePlugin.PngInfo()
    if settings:
        info.add_text("parameters", parameters(settings, picture.size))
        info.add_text(CHUNK, json.dumps(settings))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for name in itertools.chain([path], (path.with_stem(f"{path.stem}-{i:04d}") for i in itertools.count(2))):
            if not name.exists() and write_if_free(picture, name, info):
                return name
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error}); free space or choose another --out") from error


def write_if_free(picture, path, info):
    """Whether the name was free; then the picture is there. The unfinished file's name holds the place meanwhile."""
    part = path.with_name(path.name + ".part")
    try:
        file = open(part, "xb")
    except FileExistsError:  # another process is writing this picture, or was killed
        return False
    try:
        with file:
            if path.exists():  # finished between our look and our claim
                return False
            picture.save(file, "PNG", pnginfo=info)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        return True
    finally:
        part.unlink(missing_ok=True)


def read_settings(path):
    """The settings inside a PNG that `save_new` wrote. Raises InputError naming the file when there are none."""
    open_picture(path)  # its messages for missing and damaged files
    with Image.open(path, formats=FORMATS) as file:
        text = file.info.get(CHUNK)
    try:
        settings = json.loads(text) if text else None
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise InputError(f"{path}: no minipic settings inside; give a PNG that sample.py wrote and no program re-saved")
    return settings


def loss_curve(rows, width=640, height=360):
    """Picture of the loss over the steps (logarithmic if all are positive): each logged value, and their average."""
    picture = Image.new("RGB", (width, height), "white")
    draw, steps = ImageDraw.Draw(picture), [row["step"] for row in rows]
    logarithmic = all(row["loss"] > 0 for row in rows)
    height_of = math.log if logarithmic else float
    values, smooth = [height_of(row["loss"]) for row in rows], []
    for value in values:
        smooth.append(value if not smooth else 0.9 * smooth[-1] + 0.1 * value)
    low, high, left, margin = min(values), max(values), 70, 24

    def place(step, value):
        across, up = (step - steps[0]) / max(1, steps[-1] - steps[0]), (value - low) / ((high - low) or 1)
        return left + across * (width - left - margin), height - margin - up * (height - 2 * margin)

    for mark in (low, (low + high) / 2, high):
        x, y = place(steps[0], mark)
        draw.line([(x, y), (width - margin, y)], fill="lightgray")
        draw.text((4, y - 6), f"{math.exp(mark) if logarithmic else mark:.4g}", fill="black")
    draw.line([place(*point) for point in zip(steps, values)], fill="lightsteelblue")
    draw.line([place(*point) for point in zip(steps, smooth)], fill="navy", width=2)
    draw.text((left, height - margin + 6), f"step {steps[0]}", fill="black")
    draw.text((width - margin - 70, height - margin + 6), f"step {steps[-1]}", fill="black")
    return picture
