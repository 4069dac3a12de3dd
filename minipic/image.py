"""Pictures: tensor <-> PIL, files opened with care and written whole, the settings inside them.

What is given is a picture, a mask or a control map. Files of all three are opened upright, as a
phone's EXIF data says, with 16 bits cut to 8, and an animated one's first frame. They differ in
what transparency means:

    picture        white paper shines through (diffusers only drops the alpha channel)
    mask           nothing was painted there: black, to be kept. Alpha multiplies the brightness
    control map    nothing was found there: black, as between edges or in the distance
"""

import itertools
import json
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from minipic.common import InputError, check_ordinary, find_file

# Of photos. Pillow knows many more, some with holes in their readers.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM")
DAMAGE = (  # what Pillow raises for damaged files
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning)
WRITTEN = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # by ending
QUALITY = 95  # of 100, of JPEG and WebP
EXIF_LIMIT = 65_000  # bytes; a JPEG has 16 bits for the length, a WebP here the same limit
SETTINGS_KEY = "minipic"  # what the settings stand under: a PNG's text chunk, or in EXIF data


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


def to_rgb(picture: Image.Image, background: str = "white") -> Image.Image:
    """A picture of any mode -> RGB, with transparency on the background colour."""
    if picture.mode.startswith("I"):  # 16 bits a channel, which convert() would cut off at 255
        levels = np.asarray(picture).clip(0, 65535) // 257  # 65535 becomes 255
        picture = Image.fromarray(levels.astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        paper = Image.new("RGBA", picture.size, background)
        picture = Image.alpha_composite(paper, picture)
    return picture.convert("RGB")


def to_control(picture: Image.Image) -> Image.Image:
    """A control map of any mode -> RGB, with transparency on black."""
    return to_rgb(picture, "black")


def to_mask(picture: Image.Image) -> Image.Image:
    """A mask of any mode -> grey levels (L): its brightness times its alpha."""
    return to_control(picture).convert("L")


def resize_and_crop(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale a picture to cover `size` (width, height) and cut out the middle, without squeezing."""
    if picture.size == tuple(size):
        return picture
    return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)


def mask_to_tensor(mask: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """A PIL mask -> [1,H,W] of `size` (width, height): 1 where it is white, 0 where it is black."""
    mask = resize_and_crop(to_mask(mask), size)
    return (to_tensor(mask) >= 0).float()


# ---- files ---------------------------------------------------------------------------------------

def open_picture(path: str | Path) -> Image.Image:
    """A file as an upright RGB picture, with transparency on white. Errors: see `open_file`."""
    return open_file(path, to_rgb)


def open_mask(path: str | Path) -> Image.Image:
    """A file as an upright mask (mode L), black where it is transparent. Errors: see `open_file`"""
    return open_file(path, to_mask)


def open_control(path: str | Path) -> Image.Image:
    """A file as an upright RGB map, black where it is transparent. Errors: see `open_file`."""
    return open_file(path, to_control)


def open_file(path: str | Path, convert: Callable) -> Image.Image:
    """What `convert` makes of the first frame of a picture file, turned upright.

    The file is looked for as `find_file` does. Raises InputError naming it when it is missing,
    damaged, cut off, too large, or of none of FORMATS.
    """
    # A TGA begins with no mark of its own, so the ending must say it.
    formats = ("TGA",) if Path(path).suffix.lower() == ".tga" else FORMATS
    try:
        check_ordinary(find_file(path))
        with warnings.catch_warnings():
            # Pillow warns of more than about 90 million pixels; a small file can claim as many.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(find_file(path), formats=formats) as file:
                file.load()  # opening reads the header only
                if file.mode == "F":  # numbers of any range
                    raise ValueError("it holds 32-bit floats; convert it to 8 or 16 bits")
                return convert(ImageOps.exif_transpose(file))
    except FileNotFoundError:
        raise InputError(f"{path}: no such picture; check the name") from None
    except DAMAGE as error:
        reason = f"cannot be read: {error}"
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "is not one"
        raise InputError(
            f"{path}: expected a PNG, JPEG, WebP or similar picture, and it {reason}") from error


def save_new(picture: Image.Image, path: str | Path, settings: dict | None = None) -> Path:
    """Write a picture to `path` or the next free name (cat.png, cat-0002.png, ...).

    Returns its path. The ending, one of WRITTEN, decides the format. The file appears whole or not
    at all, and no other picture is overwritten, even when several processes write at once.
    settings: what `read_saved_settings` will give back, see sample.py.
    Raises InputError when the picture cannot be written.
    """
    path = Path(path)
    options = {"format": WRITTEN[path.suffix.lower()]}
    if options["format"] != "PNG":
        options["quality"] = QUALITY
    if settings:
        options |= metadata_options(settings, picture.size, options["format"])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for name in numbered_names(path):
            if not name.exists() and write_if_free(picture, name, options):
                return name
    except (OSError, ValueError) as error:  # the latter for more pixels than the format allows
        raise InputError(
            f"{path}: cannot be written ({error}); make room or choose another place") from error


def numbered_names(path: Path) -> Iterator[Path]:
    """cat.png, cat-0002.png, cat-0003.png and so on without end."""
    yield path
    for number in itertools.count(2):
        yield path.with_stem(f"{path.stem}-{number:04d}")


def write_if_free(picture: Image.Image, path: Path, options: dict) -> bool:
    """Write a picture unless `path` exists or another process is writing it.

    options: of Pillow's `save`. Returns whether it was written. The unfinished file, which only one
    process can create, reserves the name in the meantime.
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
            picture.save(file, **options)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        return True
    finally:
        unfinished.unlink(missing_ok=True)


# ---- the settings inside a picture ---------------------------------------------------------------

def metadata_options(settings: dict, size: tuple[int, int], file_format: str) -> dict:
    """What Pillow's `save` needs to write the settings into a PNG, JPEG or WebP.

    A PNG gets two text chunks; the others EXIF data, which has no names of one's own. There the
    comment holds the `parameters`, as AUTOMATIC1111's web UI has it, and the description ours.
    """
    own = json.dumps(settings)
    if file_format == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", parameters(settings, size))
        info.add_text(SETTINGS_KEY, own)
        return {"pnginfo": info}
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = f"{SETTINGS_KEY}: {own}"
    comment = b"UNICODE\0" + parameters(settings, size).encode("utf-16-be")
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    if len(exif.tobytes()) > EXIF_LIMIT:
        warnings.warn(f"the settings are too long for a {file_format} and left out", stacklevel=2)
        return {}
    return {"exif": exif}


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


def read_saved_settings(path: str | Path) -> dict:
    """The settings inside a picture that `save_new` wrote. InputError when there are none."""
    try:
        settings = json.loads(open_file(path, settings_text) or "null")
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise InputError(
            f"{path}: no minipic settings inside; give a picture that sample.py wrote and no "
            "program re-saved")
    return settings


def settings_text(picture: Image.Image) -> str | None:
    """The settings inside a picture as JSON, or None."""
    mark = f"{SETTINGS_KEY}: "
    description = picture.getexif().get(ExifTags.Base.ImageDescription, "")
    if str(description).startswith(mark):
        return description.removeprefix(mark)
    return picture.info.get(SETTINGS_KEY)
