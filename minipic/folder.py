"""Training pictures from one's own folder: found and checked before training, each in the bucket of its shape.

A picture's caption is in a .txt file of the same name (.caption, as kohya's scripts have it), or in a folder's
metadata.jsonl (`file_name` and `text`, as Hugging Face's imagefolder has it). Buckets are sizes of about equal area; a
picture is scaled to cover its bucket and cut in the middle, and SDXL is told where (size_ids, 2307.01952 section 2.2).
"""

import codecs
import json
import math
import os
import posixpath
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from minipic.common import InputError
from minipic.image import cover, open_picture, to_tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp",
            ".avif", ".gif", ".heic", ".jxl", ".tif", ".tiff")  # these are not read, and so are listed as unusable
WIDEST = 2.0  # the largest ratio of a bucket's sides


@dataclass(frozen=True)
class Photo:
    """One picture of a folder, with all that a data.Picture can: `size` (H, W) the bucket's, `original` the file's."""

    path: Path
    text: str
    original: tuple[int, int]
    size: tuple[int, int]

    @property
    def size_ids(self):
        """Original height and width, crop top and left, target height and width [6]. The crop is in the picture as
        scaled to cover the bucket."""
        scale = max(new / old for new, old in zip(self.size, self.original))
        crop = [max(0, round(old * scale) - new) // 2 for new, old in zip(self.size, self.original)]
        return torch.tensor([*self.original, *crop, *self.size], dtype=torch.float32)

    def caption(self, generator):
        return self.text

    @staticmethod
    def draw(photos):
        return [to_tensor(cover(open_picture(photo.path), photo.size[::-1])) for photo in photos]


def buckets(side, step):
    """Sizes (H, W), multiples of `step`, of at most side x side pixels and at least one step less, no wider than
    WIDEST."""
    heights = range(step, int(side * math.sqrt(WIDEST)) + step, step)
    sizes = [(height, side * side // height // step * step) for height in heights]
    return [(height, width) for height, width in sizes if width and max(width / height, height / width) <= WIDEST]


def fit(original, sizes):
    """The bucket whose shape is nearest to that of `original` (H, W), by the ratio of ratios."""
    return min(sizes, key=lambda size: abs(math.log(original[0] * size[1] / (original[1] * size[0]))))


def captions_in(folder):
    """({file name: text} of every metadata.jsonl, whose names are as seen from there, [what is wrong with them])."""
    found, wrong = {}, []
    for path in sorted(folder.rglob("metadata.jsonl")):
        inside = path.parent.relative_to(folder).as_posix()
        for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
            try:
                row = json.loads(line.decode()) if line.strip() else {"file_name": "", "text": ""}
                (row["file_name"] + str(row["text"])).encode()  # refuses half a surrogate pair, which JSON can hold
                found[posixpath.normpath(posixpath.join(inside, row["file_name"]))] = row["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                wrong.append(f"{path}, line {number}: expected a JSON object in UTF-8 with file_name and text")
    return found, wrong


def read_folder(folder, side, step, skip=False, caption="", say=print):
    """All pictures of a folder and its sub-folders as Photos, by name, after every one was opened.

    side: buckets have the area side x side; step: their sides are its multiples. What cannot be used is listed by path
    and reason; then InputError, unless `skip`, which goes on without it. caption: of pictures that have none. `say`
    prints a line of the report.
    """
    root, photos = Path(folder), []
    if not root.is_dir():
        raise InputError(f"--data {folder}: no such folder")
    sizes, (texts, wrong) = buckets(side, step), captions_in(root)
    if not sizes:
        raise InputError(f"--side {side}: must be at least {step}")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
    wrong += [f"{root / name}: named in metadata.jsonl, but not there" for name in texts
              if not os.path.exists(root / name)]
    for path in paths:
        try:
            text = texts.get(path.relative_to(root).as_posix())
            file = min(map(path.with_suffix, (".txt", ".caption")), key=lambda file: not file.exists())
            if text is None:
                text = caption if caption and not file.exists() else file.read_text(encoding="utf-8-sig")
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{path}: its caption is empty")
            width, height = open_picture(path).size
            size = fit((height, width), sizes)
            photos.append(Photo(path, " ".join(text.split()), (height, width), size))
        except OSError:
            wrong.append(f"{path}: has no caption; write {file.name}, a line in metadata.jsonl or --caption")
        except UnicodeDecodeError:
            wrong.append(f"{file}: is not UTF-8")
        except InputError as error:
            wrong.append(str(error))
    report = f"{folder}: {len(paths)} pictures, {len(photos)} usable" + "".join(f"\n  {line}" for line in wrong)
    say(report.encode(errors="replace").decode())  # names of files may be no UTF-8
    for size, count in sorted(Counter(photo.size for photo in photos).items()):
        say(f"  bucket {size[1]}x{size[0]}: {count}")
    if wrong and not skip:
        raise InputError(f"--data {folder}: {len(wrong)} problems, listed above; mend them or add --bad-images skip")
    if not photos:
        raise InputError(f"--data {folder}: no usable picture; put .png or .jpg files with .txt captions there")
    return photos
