"""Pictures: tensor <-> PIL, files opened with care and written whole, the settings inside a PNG."""

import itertools
import json
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin

from minipic.common import InputError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # Pillow knows many more, some with holes in their readers
DAMAGE = (  # what Pillow raises for damaged files
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning)
SETTINGS_CHUNK = "minipic"  # the PNG text chunk that holds the settings as JSON


# ---- tensors and pictures ------------------------------------------------------------------------

def to_pictures(images: torch.Tensor) -> list[Image.Image]:
    """images [B,3,H,W] in [-1,1] (clamped) -> B PIL pictures."""
    levels = (images.detach().float() / 2 + 0.5).clamp(0, 1) * 255
    levels = levels.round().to("cpu", torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(level.numpy()) for level in levels]


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """A PIL picture -> [3,H,W] in [-1,1]; one with a single channel (mode L) -> [1,H,W]."""
    levels = torch.from_numpy(np.array(picture, dtype=np.float32))
    levels = levels.reshape(picture.height, picture.width, -1).permute(2, 0, 1)
    return 2 * (levels / 255) - 1  # in this order: diffusers' numbers to the last bit


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode -> RGB, with transparency on white."""
    if picture.mode.startswith("I"):  # 16 bits a channel, which convert() would cut off at 255
        levels = np.asarray(picture, dtype=np.uint32) // 257  # 65535 becomes 255
        picture = Image.fromarray(levels.astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        paper = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(paper, picture)
    return picture.convert("RGB")


def resize_and_crop(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale a picture to cover `size` (width, height) and cut out the middle, without squeezing."""
    if picture.size == tuple(size):
        return picture
    return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)


def mask_to_tensor(mask: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """A PIL mask -> [1,H,W] of `size` (width, height): 1 where it is white, 0 where it is black."""
    mask = resize_and_crop(mask.convert("L"), size)
    return (to_tensor(mask) >= 0).float()


# ---- files ---------------------------------------------------------------------------------------

def open_picture(path: str | Path) -> Image.Image:
    """A file as an upright RGB picture: its first frame, 16 bits cut to 8, transparency on white.

    Raises InputError naming the file when it is missing, damaged, cut off, too large, or not a PNG,
    JPEG, WebP or BMP.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of more than about 90 million pixels; a small file can claim as many.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as file:
                file.load()  # opening reads the header only
                return to_rgb(ImageOps.exif_transpose(file))
    except FileNotFoundError:
        raise InputError(f"{path}: no such picture; check the name") from None
    except DAMAGE as error:
        reason = f"cannot be read: {error}"
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "is not one"
        raise InputError(
            f"{path}: expected a PNG, JPEG, WebP or BMP picture, and it {reason}") from error


def save_new(picture: Image.Image, path: str | Path, settings: dict | None = None) -> Path:
    """Write a PNG to `path` or the next free name (cat.png, cat-0002.png, ...). Returns its path.

    The file appears whole or not at all, and no other picture is overwritten, even when several
    processes write at once. settings: what `read_settings` will give back, see sample.py.
    Raises InputError when the picture cannot be written.
    """
    path = Path(path)
    info = PngImagePlugin.PngInfo()
    if settings:
        info.add_text("parameters", parameters(settings, picture.size))
        info.add_text(SETTINGS_CHUNK, json.dumps(settings))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for name in numbered_names(path):
            if not name.exists() and write_if_free(picture, name, info):
                return name
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error}); make room or choose another place") from error


def numbered_names(path: Path) -> Iterator[Path]:
    """cat.png, cat-0002.png, cat-0003.png and so on without end."""
    yield path
    for number in itertools.count(2):
        yield path.with_stem(f"{path.stem}-{number:04d}")


def write_if_free(picture: Image.Image, path: Path, info: PngImagePlugin.PngInfo | None) -> bool:
    """Write a PNG unless `path` exists or another process is writing it. Returns whether it did.

    The unfinished file, which only one process can create, reserves the name in the meantime.
    """
    unfinished = path.with_name(path.name + ".part")
    try:
        file = open(unfinished, "xb")
    except FileExistsError:  # another process is writing this picture, or was killed while it did
        return False
    try:
        with file:
            if path.exists():  # another process finished it after our caller looked
                return False
            picture.save(file, "PNG", pnginfo=info)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        return True
    finally:
        unfinished.unlink(missing_ok=True)


# ---- the settings inside a PNG -------------------------------------------------------------------

def parameters(settings: dict, size: tuple[int, int]) -> str:
    """The text that AUTOMATIC1111's web UI writes into its PNGs, which most tools show.

    settings: see sample.py. size: (width, height) of the picture.
    """
    width, height = size
    values = {
        "Steps": settings["steps"],
        "Sampler": settings["sampler"],
        "CFG scale": settings["guidance"],
        "Seed": settings["seed"],
        "Size": f"{width}x{height}",
        "Model": settings["model"],
    }
    lines = [settings["prompt"]]
    if settings.get("negative"):
        lines.append(f"Negative prompt: {settings['negative']}")
    lines.append(", ".join(f"{key}: {value}" for key, value in values.items()))
    return "\n".join(lines)


def read_settings(path: str | Path) -> dict:
    """The settings inside a PNG that `save_new` wrote. Raises InputError when there are none."""
    open_picture(path)  # raises the errors for missing and damaged files
    with Image.open(path, formats=FORMATS) as file:
        text = file.info.get(SETTINGS_CHUNK)
    try:
        settings = json.loads(text or "null")
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise InputError(
            f"{path}: no minipic settings inside; give a PNG that sample.py wrote and no program "
            "re-saved")
    return settings
