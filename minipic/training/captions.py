"""Captions of pictures from files: one beside each picture, or one that describes many."""

import codecs
import csv
import io
import json
import os
import re
import unicodedata
from pathlib import Path

from minipic.common import InputError, check_ordinary

# Files that describe many pictures. Hugging Face's imagefolder has a line for each; kohya's scripts
# have {file name: {"caption": ...}}. Of several keys for one thing the first counts.
METADATA = ("metadata.jsonl", "metadata.csv", "meta_cap.json", "meta_clean.json", "meta_lat.json")
NAME_KEYS = ("file_name", "image", "file", "filename", "image_path", "path")
CAPTION_KEYS = ("text", "caption", "prompt", "description", "tags")
CAPTION_ENDINGS = (".txt", ".caption", ".TXT", ".CAPTION")  # of a file beside a picture
MAX_CAPTION = 100_000  # bytes of such a file; a text encoder reads about 300 letters
MAX_METADATA = 2**30  # bytes of a file that describes many


def read_text(path: Path, limit: int) -> str:
    """A text file in UTF-8, or in UTF-16 with its mark, as Windows writes it.

    limit: the most bytes that it may have. Raises InputError where it cannot be used.
    """
    check_ordinary(path)
    try:
        if path.stat().st_size > limit:
            raise InputError(f"{path}: has more than {limit:,} bytes; shorten it")
        data = path.read_bytes()
        is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: is not UTF-8; save it as UTF-8") from None
    if "\0" in text:
        raise InputError(f"{path}: is no text, or not in UTF-8; save it as UTF-8")
    return text


def caption_files(picture: Path) -> list[Path]:
    """The files that may hold a picture's caption: for cat.png cat.txt first, then cat.png.txt."""
    files = []
    for name in (picture.stem, picture.name):
        files += [picture.with_name(name + ending) for ending in CAPTION_ENDINGS]
    return files


def read_caption(path: Path, default: str) -> str:
    """The text in the first of a picture's `caption_files`, or `default` where there is none.

    Raises InputError where there is neither, and for a file that cannot be used.
    """
    for file in caption_files(path):
        # Not Path.exists, which raises an error for a name that is too long.
        if os.path.lexists(file):
            return read_text(file, MAX_CAPTION)
    if not default:
        raise InputError(
            f"{path}: has no caption; write {path.stem}.txt or a line in metadata.jsonl, or give "
            "a caption for all")
    return default


def is_metadata(path: Path) -> bool:
    """Whether a file describes many pictures, by its name."""
    return path.name.lower() in METADATA


def read_metadata(
        files: list[Path], pictures: list[Path]) -> tuple[dict[str, str], list[str]]:
    """({`place_of` a picture: caption}, [what is wrong]) of those of the files that are METADATA.

    A name in such a file is relative to its own folder, or absolute; kohya's lacks the ending.
    """
    places = {}
    for picture in pictures:
        places[place_of(picture)] = place_of(picture)
        places.setdefault(place_of(picture.with_suffix("")), place_of(picture))
    captions = {}
    problems = []
    for file in filter(is_metadata, files):
        try:
            rows = metadata_rows(read_text(file, MAX_METADATA), file.suffix.lower())
        except InputError as error:
            problems.append(str(error))
            continue
        except (ValueError, TypeError, AttributeError, RecursionError, csv.Error) as error:
            problems.append(f"{file}: cannot be read as {file.suffix[1:].upper()} ({error})")
            continue
        for where, row in rows:
            try:
                name, caption = name_and_caption(row)
                # Windows' programs write sub\\cat.png.
                spellings = [file.parent / name, file.parent / name.replace("\\", "/")]
                found = [places[place_of(path)] for path in spellings if place_of(path) in places]
                if not found:
                    raise InputError(f"names {name}, which is no picture of this folder")
                if captions.setdefault(found[0], caption) != caption:
                    raise InputError(f"{name} has another caption already; keep one")
            except InputError as error:
                problems.append(f"{file}, {where}: {error}")
    return captions, problems


def metadata_rows(text: str, ending: str) -> list[tuple[str, object]]:
    """[("line 3", what is there), ...]; None is there where a line of .jsonl is no JSON."""
    rows = []
    if ending == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
        for row in reader:
            rows.append((f"line {reader.line_num}", row))
    elif ending == ".json":
        for name, row in json.loads(text).items():
            rows.append((name, {"file_name": name} | row))
    else:
        # Not by splitlines(), which would cut a caption at U+2028.
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            rows.append((f"line {number}", row))
    return rows


def name_and_caption(row: object) -> tuple[str, str]:
    """(file name, caption) of a row of metadata. InputError for one that holds anything else."""
    if not isinstance(row, dict):
        raise InputError("expected a JSON object with file_name and text")
    values = []
    for keys in (NAME_KEYS, CAPTION_KEYS):
        present = [key for key in keys if key in row]
        if not present:
            raise InputError(
                f"has the keys {', '.join(map(str, row))}; rename one to {keys[0]} "
                f"({', '.join(keys[1:])} will do too)")
        value = row[present[0]]
        # JSON can hold half of a surrogate pair, which is no character, and a zero byte.
        if not isinstance(value, str) or re.search("[\0\ud800-\udfff]", value):
            raise InputError(f"{present[0]} is {json.dumps(value)[:80]}; expected a text")
        values.append(value)
    return values[0], values[1]


def place_of(path: Path) -> str:
    """A file's path for comparing: absolute, without linked folders.

    Letters with accents are one character each; macOS writes names with two.
    """
    folder, name = os.path.split(os.path.abspath(path))
    return unicodedata.normalize("NFC", os.path.join(os.path.realpath(folder), name))
