"""Training pictures from one's own folder, found and checked before training starts.

A picture's caption is in a .txt file of the same name (or .caption, as kohya's scripts have it), or
in a metadata.jsonl (`file_name` and `text`, as Hugging Face's imagefolder has it). Each picture
goes into the bucket that is nearest to its shape; buckets are sizes of about equal area. The
picture is scaled to cover its bucket, and the middle is cut out. SDXL is given the original size
and the cut as size_ids (arXiv 2307.01952 section 2.2).
"""

import codecs
import json
import math
import os
import posixpath
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from minipic.common import InputError, ParameterError
from minipic.image import open_picture, resize_and_crop, to_tensor

READABLE = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
UNREADABLE = (".avif", ".gif", ".heic", ".jxl", ".tif", ".tiff")  # reported, not silently left out
SUFFIXES = READABLE + UNREADABLE
WIDEST = 2.0  # the largest ratio of a bucket's sides


@dataclass(frozen=True)
class Photo:
    """One picture of a folder, with the methods of a `Picture` of the world (world/pictures.py)."""

    path: Path
    text: str
    original: tuple[int, int]  # (H, W) of the file
    size: tuple[int, int]  # (H, W) of its bucket

    @property
    def size_ids(self) -> torch.Tensor:
        """Original height and width, crop top and left, target height and width [6].

        The crop is measured in the picture as scaled to cover the bucket.
        """
        original_height, original_width = self.original
        height, width = self.size
        scale = max(height / original_height, width / original_width)
        top = max(0, round(original_height * scale) - height) // 2
        left = max(0, round(original_width * scale) - width) // 2
        return torch.tensor([*self.original, top, left, *self.size], dtype=torch.float32)

    def caption(self, generator: torch.Generator) -> str:
        """The caption; nothing of it is drawn from the generator."""
        return self.text

    @staticmethod
    def draw(photos: list["Photo"]) -> list[torch.Tensor]:
        """The pictures, each [3,H,W] in [-1,1] of its bucket's size."""
        images = []
        for photo in photos:
            height, width = photo.size
            picture = resize_and_crop(open_picture(photo.path), (width, height))
            images.append(to_tensor(picture))
        return images


# ---- a folder of pictures ------------------------------------------------------------------------

def read_folder(
        folder: str | Path, resolution: int, multiple: int, skip_bad: bool = False,
        caption: str = "", report: Callable[[str], None] = print) -> list[Photo]:
    """All pictures of a folder and its sub-folders as Photos, sorted by path, each opened once.

    resolution: the side of a square, in pixels, whose area the buckets have.
    multiple: the sides of the buckets are multiples of this.
    caption: for pictures that have none.
    report: prints a line.
    What cannot be used is reported with its path and the reason. Then InputError is raised, unless
    `skip_bad` is true, which leaves those pictures out.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ParameterError("data", f"{folder}: no such folder")
    sizes = bucket_sizes(resolution, multiple)
    if not sizes:
        raise ParameterError("resolution", f"must be at least {multiple}, not {resolution}")

    paths = find_pictures(root)
    captions, problems = read_metadata(root)
    photos = []
    for path in paths:
        name = path.relative_to(root).as_posix()
        try:
            photos.append(read_photo(path, captions.get(name), caption, sizes))
        except InputError as error:
            problems.append(str(error))
    report_photos(folder, len(paths), photos, problems, report)

    if problems and not skip_bad:
        raise ParameterError("data", f"{folder}: {len(problems)} problems, listed above; "
                             "mend them or add --bad-images skip")
    if not photos:
        raise ParameterError("data", f"{folder}: no usable picture; "
                             "put .png or .jpg files with .txt captions there")
    return photos


def find_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder and its sub-folders, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def read_photo(
        path: Path, metadata_caption: str | None, default_caption: str,
        sizes: list[tuple[int, int]]) -> Photo:
    """One picture as a Photo. Raises InputError for a caption or a picture that cannot be used."""
    text = metadata_caption
    if text is None:
        text = read_caption(path, default_caption)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{path}: its caption is empty")
    width, height = open_picture(path).size
    size = nearest_bucket((height, width), sizes)
    return Photo(path, " ".join(text.split()), (height, width), size)


def report_photos(
        folder: str | Path, count: int, photos: list[Photo], problems: list[str],
        report: Callable[[str], None]):
    """Report how many of `count` pictures are usable, what is wrong, and what is in each bucket."""
    lines = [f"{folder}: {count} pictures, {len(photos)} usable"]
    lines += [f"  {problem}" for problem in problems]
    text = "\n".join(lines)
    report(text.encode(errors="replace").decode())  # the name of a file need not be UTF-8
    buckets = Counter(photo.size for photo in photos)
    for (height, width), members in sorted(buckets.items()):
        report(f"  bucket {width}x{height}: {members}")


def match_by_stem(folder: str | Path, photos: list[Photo]) -> list[Path]:
    """For each photo the picture in `folder` whose name is the same but for the ending.

    The folder's sub-folders are left out. Of several pictures of one name the last one counts.
    Raises InputError that says how many are missing, and which is the first.
    """
    by_stem = {}
    for path in sorted(Path(folder).glob("*")):
        if path.suffix.lower() in SUFFIXES:
            by_stem[path.stem] = path
    missing = [photo.path.stem for photo in photos if photo.path.stem not in by_stem]
    if missing:
        raise InputError(
            f"{folder}/ lacks {len(missing)} of {len(photos)} pictures, the first is {missing[0]}")
    return [by_stem[photo.path.stem] for photo in photos]


# ---- captions ------------------------------------------------------------------------------------

def read_caption(path: Path, default: str) -> str:
    """The text in the .txt or .caption file beside a picture, or `default` where there is no file.

    Raises InputError where there is neither, and for a file that is not UTF-8.
    """
    file = path.with_suffix(".txt")
    kohya_file = path.with_suffix(".caption")
    # Not Path.exists, which raises an error for a name that is too long.
    if os.path.exists(kohya_file) and not os.path.exists(file):
        file = kohya_file
    if default and not os.path.exists(file):
        return default
    try:
        return file.read_text(encoding="utf-8-sig")  # Windows writes a byte order mark
    except OSError:
        raise InputError(f"{path}: has no caption; write {file.name}, a line in metadata.jsonl "
                         "or --caption") from None
    except UnicodeDecodeError:
        raise InputError(f"{file}: is not UTF-8") from None


def read_metadata(folder: Path) -> tuple[dict[str, object], list[str]]:
    """({name: caption}, [what is wrong]) of every metadata.jsonl in a folder and its sub-folders.

    A name in the result is relative to `folder`. In a metadata.jsonl it is relative to that file's
    own folder. A caption may still be of any type.
    """
    captions = {}
    problems = []
    for path in sorted(folder.rglob("metadata.jsonl")):
        inside = path.parent.relative_to(folder).as_posix()
        # Not by splitlines() of the text, which would cut a caption at U+2028.
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                name, caption = parse_metadata_line(line)
            except (ValueError, KeyError, TypeError, RecursionError):
                problems.append(f"{path}, line {number}: expected a JSON object in UTF-8 "
                                "with file_name and text")
                continue
            name = posixpath.normpath(posixpath.join(inside, name))
            captions[name] = caption
    for name in captions:
        if not os.path.exists(folder / name):
            problems.append(f"{folder / name}: named in metadata.jsonl, but not there")
    return captions, problems


def parse_metadata_line(line: bytes) -> tuple[str, object]:
    """(file name, caption) of one line.

    Raises ValueError, KeyError, TypeError or RecursionError for a line that holds anything else.
    """
    row = json.loads(line.decode())
    name = row["file_name"]
    caption = row["text"]
    # TypeError for a name that is no text; ValueError for half a surrogate pair, as JSON can hold.
    (name + str(caption)).encode()
    return name, caption


# ---- buckets -------------------------------------------------------------------------------------

def bucket_sizes(resolution: int, multiple: int) -> list[tuple[int, int]]:
    """Sizes (H, W) for pictures of all shapes up to WIDEST.

    Both sides are multiples of `multiple`. The width is the largest with an area of at most
    resolution x resolution pixels.
    """
    sizes = []
    tallest = int(resolution * math.sqrt(WIDEST))
    for height in range(multiple, tallest + multiple, multiple):
        width = resolution * resolution // height // multiple * multiple
        if width and max(width / height, height / width) <= WIDEST:
            sizes.append((height, width))
    return sizes


def nearest_bucket(original: tuple[int, int], sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The size whose shape is nearest to that of `original` (H, W), by the ratio of aspects."""
    original_height, original_width = original

    def distance(size):
        height, width = size
        return abs(math.log(original_height * width / (original_width * height)))

    return min(sizes, key=distance)
