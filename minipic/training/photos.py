"""Training pictures from one's own folder, found and checked before training starts.

The caption of a picture is the first of these that is there: what a metadata file says of it, a
.txt or .caption file of its name (training/captions.py), the caption for all, and the words of its
folder's name where that is one of kohya's: in "10_sks dog" and its sub-folders each picture counts
10 times, in "0_sks dog" not at all.

Each picture goes into the bucket that is nearest to its shape; buckets are sizes of about equal
area. The picture is scaled to cover its bucket, and the middle is cut out. SDXL is given the
original size and the cut as size_ids (arXiv 2307.01952 section 2.2).
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from minipic.common import InputError, ParameterError, printable
from minipic.image import FORMATS, open_picture, resize_and_crop, to_tensor
from minipic.training.captions import (
    caption_files, is_metadata, place_of, read_caption, read_metadata)
from minipic.weights.files import sha256

READABLE = {".mpo", ".tga"}  # the first is a JPEG of several pictures
READABLE |= {
    ending for ending, format in Image.registered_extensions().items() if format in FORMATS}
# Photos that `open_picture` does not read are problems. Other files are only reported.
SUFFIXES = READABLE | {".avif", ".heic", ".heif", ".hif", ".jxl"}
# Folders and files of systems and programs, in lower case. Those whose names begin with a dot are
# left out too (.ipynb_checkpoints, .Trash, .thumbnails, macOS' ._cat.jpg).
SYSTEM_NAMES = {
    "__macosx", "@eadir", "@__thumb", "@recycle", "#recycle", "#snapshot", "$recycle.bin",
    "recycler", "system volume information", "lost+found", "_vti_cnf", "thumbs.db", "ehthumbs.db",
    "desktop.ini"}
KOHYA_FOLDER = re.compile(r"(\d+)_(.*)")
MOST_REPEATS = 999  # a larger number is rather a year

WIDEST = 2.0  # the largest ratio of a bucket's sides
MAX_CUT = 0.3  # a picture that loses a larger share of itself is reported
MAX_SCALE = 2.0  # and one that is enlarged more
MAX_LINES = 20  # of the report, about things of one kind


@dataclass(frozen=True)
class Photo:
    """One picture of a folder, with the members of a `Picture` of the world (world/pictures.py)."""

    path: Path
    text: str
    original: tuple[int, int]  # (H, W) of the file
    size: tuple[int, int]  # (H, W) of its bucket
    repeats: int = 1

    encoded_at_once = 1  # photos may be large, and must not depend on their neighbours in a batch

    @property
    def scale(self) -> float:
        """How many times as large the picture becomes, to cover its bucket."""
        original_height, original_width = self.original
        height, width = self.size
        return max(height / original_height, width / original_width)

    @property
    def share_cut(self) -> float:
        """The share of the picture that is cut away, 0 to 1."""
        return 1 - math.prod(self.size) / (math.prod(self.original) * self.scale**2)

    @property
    def size_ids(self) -> torch.Tensor:
        """Original height and width, crop top and left, target height and width [6].

        The crop is measured in the picture as scaled to cover the bucket.
        """
        original_height, original_width = self.original
        height, width = self.size
        top = max(0, round(original_height * self.scale) - height) // 2
        left = max(0, round(original_width * self.scale) - width) // 2
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
        caption: str | None = "", report: Callable[[str], None] = print) -> list[Photo]:
    """All pictures of a folder and its sub-folders as Photos, sorted by path, each opened once.

    resolution: the side of a square, in pixels, whose area the buckets have.
    multiple: the sides of the buckets are multiples of this.
    caption: for pictures that have none; None: captions are not read, and all are empty.
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

    files = find_files(root)
    pictures = [path for path in files if is_picture(path)]
    captions, problems = {}, []
    if caption is not None:
        captions, problems = read_metadata(files, pictures)
    wanted = [path for path in pictures if kohya_folder(path, root)[0] > 0]
    photos = []
    for path in tqdm(wanted, "pictures", disable=None, leave=False, mininterval=2):
        photo, faults = read_photo(path, root, captions, caption, sizes)
        problems += faults
        if photo is not None:
            photos.append(photo)

    summary = printable(f"{folder}: {len(pictures)} pictures, {len(photos)} usable")
    report("\n".join([summary, *first_lines(problems)]))
    notes = describe_folders(pictures, root) + describe(photos, root)
    for line in notes + first_lines(unused_files(files, root)):
        report(line)
    if problems and not skip_bad:
        raise ParameterError(
            "bad_images", f"{folder}: {len(problems)} problems, listed above; mend them, or "
            "choose skip")
    if not photos:
        with_captions = "" if caption is None else "with .txt captions "
        raise ParameterError("data", f"{folder}: no usable picture; "
                             f"put .png or .jpg files {with_captions}there")
    return photos


def find_files(root: Path) -> list[Path]:
    """All files of a folder and its sub-folders, sorted, but for the hidden ones.

    Links to folders are followed, and each folder is read once. InputError for one that cannot be.
    """
    files = []
    known = set()
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            info = folder.stat()
            members = sorted(folder.iterdir())
        except OSError as error:
            raise InputError(
                f"{folder}: cannot be read ({error.strerror}); change its permissions") from None
        if (info.st_dev, info.st_ino) in known:  # links may form a circle
            continue
        known.add((info.st_dev, info.st_ino))
        for path in members:
            if is_hidden(path):
                continue
            if not os.path.isdir(path):
                files.append(path)
            elif path.is_symlink():
                folders.insert(0, path)  # comes last: a folder goes by its own name where it can
            else:
                folders.append(path)
    return sorted(files)


def is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name.lower() in SYSTEM_NAMES


def is_picture(path: Path) -> bool:
    """Whether a file is a picture by the ending of its name."""
    return path.suffix.lower() in SUFFIXES


def read_photo(
        path: Path, root: Path, captions: dict[str, str], default: str | None,
        sizes: list[tuple[int, int]]) -> tuple[Photo | None, list[str]]:
    """(one picture as a Photo or None, all that is wrong with it).

    captions: from `read_metadata`. default: the caption of pictures that have none.
    """
    faults = []
    repeats, words = kohya_folder(path, root)
    try:
        text = "" if default is None else captions.get(place_of(path))
        if text is None:
            text = read_caption(path, default or words)
        text = " ".join(text.split())
        if not text and default is not None:
            raise InputError(f"{path}: its caption is empty; write one")
    except InputError as error:
        faults.append(str(error))
    try:
        if path.suffix.lower() not in READABLE:
            raise InputError(f"{path}: {path.suffix} cannot be read; convert it to PNG or JPEG")
        width, height = open_picture(path).size
    except InputError as error:
        faults.append(str(error))
    if faults:
        return None, faults
    size = nearest_bucket((height, width), sizes)
    return Photo(path, text, (height, width), size, repeats), []


def kohya_folder(path: Path, root: Path) -> tuple[int, str]:
    """(repeats, caption) of a picture, by the nearest of its folders in `root` that names them.

    (1, "") where none does.
    """
    for folder in path.relative_to(root).parents:
        match = KOHYA_FOLDER.fullmatch(folder.name)
        if match and int(match[1]) <= MOST_REPEATS:
            return int(match[1]), match[2]
    return 1, ""


def match_by_stem(folder: str | Path, photos: list[Photo]) -> list[Path]:
    """For each photo the picture in `folder` whose name is the same but for the ending.

    The folder's sub-folders are left out. Of several pictures of one name the last one counts.
    Raises InputError that says how many are missing, and which is the first.
    """
    by_stem = {}
    for path in sorted(Path(folder).glob("*")):
        if is_picture(path) and not is_hidden(path):
            by_stem[path.stem] = path
    missing = [photo.path.stem for photo in photos if photo.path.stem not in by_stem]
    if missing:
        raise InputError(
            f"{folder}/ lacks {len(missing)} of {len(photos)} pictures, the first is "
            f"{printable(missing[0])}")
    return [by_stem[photo.path.stem] for photo in photos]


def read_sources(folder: Path, photos: list[Photo], most: int = 4) -> list[list[Photo]]:
    """For each photo of folder/target those that are given with it, of the same name.

    They lie in folder/source, source2 and so on, up to `most`; where there is none, [].
    """
    sources = [[] for _ in photos]
    for name in ("source", "source2", "source3", "source4")[:most]:
        if (folder / name).is_dir():
            for i, path in enumerate(match_by_stem(folder / name, photos)):
                width, height = open_picture(path).size
                source = replace(photos[i], path=path, original=(height, width))
                sources[i].append(source)
    return sources


# ---- the report ----------------------------------------------------------------------------------

def first_lines(lines: list[str]) -> list[str]:
    """The first MAX_LINES of some lines, indented, and how many more there are."""
    shown = [f"  {printable(line)}" for line in lines[:MAX_LINES]]
    if len(lines) > MAX_LINES:
        shown.append(f"  and {len(lines) - MAX_LINES} more")
    return shown


def describe_folders(pictures: list[Path], root: Path) -> list[str]:
    """Lines that say how often the pictures of a folder count whose name may have a number."""
    lines = []
    for folder, path in sorted({path.parent: path for path in pictures}.items()):
        name = folder.relative_to(root)
        repeats, words = kohya_folder(path, root)
        has_number = any(KOHYA_FOLDER.fullmatch(part) for part in name.parts)
        if not has_number:
            continue
        line = f"{name}: each picture counts {repeats} times"
        if repeats == 0:
            line = f"{name}: is left out, since its name asks for 0 repeats"
        elif words:
            line += f"; its caption is {words!r} where it has no other"
        lines.append(line)
    return first_lines(lines)


def describe(photos: list[Photo], root: Path) -> list[str]:
    """Lines that say what is in each bucket, and which pictures may be bad."""
    lines = []
    buckets = Counter(photo.size for photo in photos)
    for (height, width), members in sorted(buckets.items()):
        lines.append(f"  bucket {width}x{height}: {members}")

    notes = {"cut": [], "enlarged": [], "copies": []}
    lengths = Counter(photo.path.stat().st_size for photo in photos)
    first = {}  # {sha256: picture}
    for photo in photos:
        name = photo.path.relative_to(root)
        if photo.share_cut > MAX_CUT:
            share = f"{photo.share_cut:.0%}"
            notes["cut"].append(f"{name}: {share} of it is cut away, to fit its bucket")
        if photo.scale > MAX_SCALE:
            scale = f"{photo.scale:.1f}"
            notes["enlarged"].append(f"{name}: is enlarged {scale} times, so it is not sharp")
        if lengths[photo.path.stat().st_size] > 1:  # others cannot have a copy
            original = first.setdefault(sha256(photo.path), photo)
            if original is not photo:
                other = original.path.relative_to(root)
                notes["copies"].append(f"{name}: has the same bytes as {other}")
    for of_one_kind in notes.values():
        lines += first_lines(of_one_kind)
    return lines


def unused_files(files: list[Path], root: Path) -> list[str]:
    """A line for each file that is neither a picture nor describes one."""
    captions = set()
    for path in files:
        if is_picture(path):
            captions.update(caption_files(path))
    lines = []
    for path in files:
        if not is_picture(path) and path not in captions and not is_metadata(path):
            name = path.relative_to(root)
            lines.append(f"{name}: is not used; by its name it is no picture and no caption of one")
    return lines


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
