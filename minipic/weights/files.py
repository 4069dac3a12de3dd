"""Safetensors and JSON files in and out, checked.

A file that is damaged, or is not what it should be, is refused in one sentence.

The safetensors format (https://github.com/huggingface/safetensors):

    8 bytes    N, the length of the header
    N bytes    the header, JSON: {name: {"dtype": ..., "shape": [...], "data_offsets": [a, b]}, ...}
    the rest   the data; the offsets count from its first byte

The safetensors library reads the data. It lets duplicate names and NaN pass, and its messages name
no file. So the header is read and checked here first.
"""

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minipic.common import InputError, check_ordinary

BITS = {  # of one element of each dtype that is read
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}

# Bytes. SDXL's single file, the largest model here, has a header of 0.4 MB. The format allows
# 100 MB, but Python's JSON parser takes 22 seconds and 1.5 GB of memory for that many.
# A JSON file may have as many; the largest, a tokenizer.json, has 4 MB.
HEADER_LIMIT = 8 << 20

MAX_NAME_LENGTH = 1000  # characters of a tensor's name; patterns are looked for in it

MAX_DIMENSIONS = 64  # of a tensor, as in PyTorch

# The folder in which new files wait to be put in place, see `replacing_folder`.
READY = "part-ready"
# A folder without these is refused as incomplete, here and by diffusers.
DESCRIPTIONS = ("config.json", "model_index.json")
# Bytes of a file that are mapped at a time. Converting to another dtype holds no more than that
# beside its result.
GROUP_BYTES = 256 << 20


class Entry(NamedTuple):
    """What a header says of one tensor."""

    dtype: str  # a key of BITS
    shape: tuple[int, ...]
    start: int  # of its bytes, from the first byte of the data
    end: int


# Reading ----------------------------------------------------------------------------------------


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """{name: tensor} of one safetensors file, memory-mapped: nothing is copied until it changes.

    Only numbers of 8 bits are copied, and widened to 16 (`widened`).
    Raises InputError naming the file, and the tensor at fault, where the file is damaged, is of
    another kind, or holds NaN or infinity. Without a hash nobody can see a flipped low bit of a
    weight: weights/download.py compares hashes.
    """
    entries, _ = read_header(path)
    return dict(stream(path, entries))


def stream(path: str | Path, entries: dict[str, Entry]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) for these entries of a file, each checked for NaN and infinity.

    The file is mapped anew for each group of tensors. So tensors that the caller converts or drops
    give their memory back while the rest is read.
    """
    for names in group_by_place(entries):
        try:
            with safe_open(path, framework="pt") as file:
                for name in names:
                    tensor = widened(file.get_tensor(name))
                    if not is_finite(tensor):
                        raise InputError(
                            f"{path}: tensor {name!r} holds NaN or infinity: the file is damaged "
                            "or its training diverged; fetch it again or use another")
                    yield name, tensor
                    del tensor  # it would keep its whole group in memory while the next one is read
        except SafetensorError as error:
            problem = f"the file is damaged ({error}); fetch it again"
            raise InputError(f"{path}: {problem}") from None


def group_by_place(entries: dict[str, Entry]) -> list[list[str]]:
    """The names, in order, in lists of those that begin in the same GROUP_BYTES of the data."""
    groups = {}
    for name, entry in entries.items():
        groups.setdefault(entry.start // GROUP_BYTES, []).append(name)
    return list(groups.values())


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """Floats of 8 bits as float16, which has room for each of them; others as they are.

    PyTorch computes next to nothing in 8 bits. Such files save disk, not memory.
    """
    if tensor.is_floating_point() and tensor.itemsize == 1:
        return tensor.half()
    return tensor


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite. One pass over memory: NaN spreads to both extremes."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    smallest, largest = tensor.aminmax()
    return bool(smallest.isfinite() and largest.isfinite())


def read_header(path: str | Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """({name: Entry} in the order of the data, {key: text} metadata) of a safetensors file.

    Reads no data. Raises InputError naming the file, and the tensor at fault.
    """
    path = Path(path)
    header, data_size = read_header_bytes(path)
    try:
        values = json.loads(header, object_pairs_hook=partial(dict_without_duplicates, path))
    except (ValueError, RecursionError):  # the latter for lists within lists within lists...
        problem = "the header is not valid JSON, the file is damaged; fetch it again"
        raise InputError(f"{path}: {problem}") from None

    metadata = values.pop("__metadata__", {})
    if not is_text_by_name(metadata):
        problem = "the header's __metadata__ is not text, the file is damaged; fetch it again"
        raise InputError(f"{path}: {problem}")

    entries = {}
    for name, value in values.items():
        if len(name) > MAX_NAME_LENGTH:
            raise InputError(
                f"{path}: the name of tensor {name[:40]!r}... has {len(name):,} characters: the "
                "file is damaged; fetch it again")
        entries[name] = check_entry(value, where=f"{path}: tensor {name!r}")
    return sort_by_place(entries, data_size, path), metadata


def read_header_bytes(path: Path) -> tuple[bytes, int]:
    """(the header, how many bytes of data follow it). InputError for what cannot be safetensors."""
    check_ordinary(path)
    try:
        with open(path, "rb") as file:
            file_size = os.fstat(file.fileno()).st_size
            start = file.read(512)
            length = int.from_bytes(start[:8], "little")
            if file_size < 10 or start[8:9] != b"{":
                kind = describe_foreign_file(start, file_size)
                raise InputError(f"{path} is {kind}; expected a .safetensors file")
            if length > HEADER_LIMIT:
                raise InputError(
                    f"{path}: its header takes {length:,} bytes, more than the {HEADER_LIMIT:,} "
                    "that are read: it is damaged, not a safetensors file, or full of notes; fetch "
                    "it again or save it without them")
            file.seek(8)
            header = file.read(length)
    except OSError as error:
        problem = f"cannot read it ({error.strerror}); give a .safetensors file"
        raise InputError(f"{path}: {problem}") from None
    if len(header) < length:
        raise InputError(
            f"{path} is truncated: it has {file_size:,} bytes, its header alone {8 + length:,}; "
            "fetch it again")
    return header, file_size - 8 - length


def describe_foreign_file(start: bytes, file_size: int) -> str:
    """In words, what a file is that cannot be safetensors, from its first bytes."""
    text = start.lstrip().lower()
    if file_size == 0:
        return "empty"
    if text.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the weights themselves (run `git lfs pull`)"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, not weights (the download went wrong, fetch it again)"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return ("a pickle (.ckpt, .pt, .bin), which can run code when opened and is never read "
                "here (get the .safetensors version)")
    if text.startswith((b"{", b"[")):
        return "text (JSON), not weights"
    if start.startswith(b"GGUF"):
        return "a GGUF file, whose weights are quantised"
    if start.startswith(b"\x08") and b"torch" in start:  # a protobuf that names its producer
        return "an ONNX file"
    if file_size < 10:
        return f"truncated to {file_size} bytes"
    return "damaged or not a safetensors file"


def dict_without_duplicates(path: Path, pairs: list[tuple]) -> dict:
    """A JSON object from its (name, value) pairs. Of equal names, Python would keep the last."""
    values = {}
    for name, value in pairs:
        if name in values:
            raise InputError(
                f"{path}: {name!r} is in the header twice, the file is damaged; fetch it again")
        values[name] = value
    return values


def is_text_by_name(values: Any) -> bool:
    """Whether a JSON value is an object whose values are all texts."""
    return isinstance(values, dict) and all(isinstance(text, str) for text in values.values())


def check_entry(value: Any, where: str) -> Entry:
    """What the header says of one tensor, as an Entry. where: file and tensor, for messages."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where}: its header entry is damaged; fetch the file again")
    dtype = value["dtype"]
    shape = value["shape"]
    offsets = value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise InputError(
            f"{where} is stored as {dtype}, which is not supported (supported: {', '.join(BITS)})")
    if not is_shape(shape) or not are_counts(offsets) or len(offsets) != 2:
        raise InputError(
            f"{where}: its shape or place in the header is damaged; fetch the file again")

    start, end = offsets
    expected_size = math.prod(shape) * BITS[dtype] // 8
    if end - start != expected_size:
        raise InputError(
            f"{where} has {end - start:,} bytes, but {dtype} {shape} takes {expected_size:,}: the "
            "file is damaged; fetch it again")
    return Entry(dtype, tuple(shape), start, end)


def are_counts(values: Any) -> bool:
    """Whether a JSON value is a list of whole numbers from 0. True, an int in Python, is none."""
    if not isinstance(values, list):
        return False
    return all(type(number) is int and number >= 0 for number in values)


def is_shape(values: Any) -> bool:
    """Whether a JSON value is a shape that PyTorch can take: it counts elements in 64 bits."""
    if not are_counts(values) or len(values) > MAX_DIMENSIONS:
        return False
    return math.prod(size for size in values if size > 0) < 2**63


def sort_by_place(entries: dict[str, Entry], data_size: int, path: Path) -> dict[str, Entry]:
    """The entries in the order of their data. InputError unless they fill it without a gap."""
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    position = 0
    for name, entry in entries.items():
        if entry.start != position:
            raise InputError(
                f"{path}: tensor {name!r} begins at byte {entry.start:,} of the data instead of "
                f"{position:,}: the file is damaged; fetch it again")
        position = entry.end
        if position > data_size:
            raise InputError(
                f"{path} is truncated: tensor {name!r} ends at byte {position:,} of the data, and "
                f"there are {data_size:,}; fetch it again")
    if position < data_size:
        raise InputError(
            f"{path} has {data_size - position:,} bytes after its last tensor: it is damaged; "
            "fetch it again")
    return entries


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8. InputError where it cannot be read or is too long."""
    check_ordinary(path)
    try:
        with open(path, "rb") as file:
            content = file.read(HEADER_LIMIT + 1)
        if len(content) > HEADER_LIMIT:
            raise InputError(
                f"{path}: has more than {HEADER_LIMIT:,} bytes; expected a small text file")
        return content.decode("utf-8-sig")
    except OSError as error:
        check_finished(Path(path).parent, Path(path).parent.parent)
        problem = f"cannot read it ({error.strerror}); expected a text file"
        raise InputError(f"{path}: {problem}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not text in UTF-8; fetch it again") from None


def read_json(path: str | Path) -> dict:
    """The object in a JSON file. InputError where the file is missing or holds no JSON object."""
    try:
        values = json.loads(read_text(path))
    except (ValueError, RecursionError):
        raise InputError(f"{path}: is not valid JSON; fetch it again") from None
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise InputError(f"{path}: expected a JSON object, found a {kind}; fetch it again")
    return values


def check_finished(*folders: Path):
    """InputError for a folder whose files a `replacing_folder` has not all put in place."""
    for folder in folders:
        if (folder / READY).is_dir():
            raise InputError(
                f"{folder} is unfinished: its writing was interrupted; save the model again, or "
                "resume the training that wrote it")


def sha256(path: str | Path) -> str:
    """The hexadecimal sha256 of a file."""
    check_ordinary(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# Writing ----------------------------------------------------------------------------------------


def save_weights(
        tensors: dict[str, torch.Tensor], path: str | Path, metadata: dict[str, str] | None = None):
    """Write {name: tensor} to a safetensors file.

    It appears whole or not at all, and is on disk on return.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    metadata = {"format": "pt"} | (metadata or {})  # transformers asks for "pt"
    with replacing(path, size) as temporary:
        save_file(tensors, temporary, metadata)


def write_json(values: dict, path: str | Path):
    """Write a JSON object in the form of the official files, whole or not at all."""
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    with replacing(path, len(text)) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: str | Path, size: int | None = None) -> Iterator[Path]:
    """Write a file so that it appears whole or not at all.

    Gives a temporary path in the same folder. What the block writes there is flushed to disk and
    then renamed to `path`. After an error, such as a full disk, or a kill, `path` is as it was.
    size: how many bytes will be written, for the message.

        with replacing("log.json") as temporary:
            temporary.write_text("{}")
    """
    path = Path(path)
    # The old ending stays at the end: Pillow chooses a picture's format by it.
    temporary = path.with_name(f"part-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except (OSError, SafetensorError) as error:
        what = "it" if size is None else f"its {size:,} bytes"
        problem = f"cannot write {what} ({error}); make room or choose another place"
        raise InputError(f"{path}: {problem}") from None
    finally:
        if os.path.exists(temporary):
            temporary.unlink()


@contextmanager
def replacing_folder(folder: str | Path, owner: str = "") -> Iterator[Path]:
    """Write files into a folder so that they replace older ones all together or not at all.

    Gives a temporary folder in it. What the block writes there is flushed to disk and made final by
    one rename. Then `finish_replacing` puts every file in its place. After an error or a kill the
    folder is as it was, or it is refused as unfinished until `finish_replacing` is called again.
    Other files in the folder stay.
    owner: a word in the temporary folder's name, by which the writer knows what a kill has left.
    """
    folder = Path(folder)
    temporary = folder / f"part-{owner or os.getpid()}"
    try:
        finish_replacing(folder)
        remove_folder(temporary)
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            flush(path)
        os.replace(temporary, folder / READY)
        flush(folder)
        finish_replacing(folder)
    except OSError as error:
        problem = f"cannot write there ({error}); make room or choose another place"
        raise InputError(f"{folder}: {problem}") from error
    finally:
        remove_folder(temporary)


def finish_replacing(folder: Path):
    """Put every file in its place that a `replacing_folder` has made final, if there are any.

    No mix of old and new files can be opened meanwhile: the DESCRIPTIONS go first and come last.
    """
    ready = folder / READY
    if not ready.is_dir():
        return
    files = [path for path in ready.rglob("*") if path.is_file()]
    descriptions = [path for path in files if path.name in DESCRIPTIONS]
    for path in descriptions:
        (folder / path.relative_to(ready)).unlink(missing_ok=True)
    # model_index.json, in the folder itself, is the last of all.
    descriptions.sort(key=lambda path: len(path.parts), reverse=True)
    for path in [*(path for path in files if path not in descriptions), *descriptions]:
        target = folder / path.relative_to(ready)
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_variants(target)
        os.replace(path, target)
        flush(target.parent)
    remove_folder(ready)


def remove_variants(weights: Path):
    """Remove an older model's files in 16 bits or in shards, which would be read in its place."""
    if weights.name not in ("model.safetensors", "diffusion_pytorch_model.safetensors"):
        return
    for old in weights.parent.glob(f"{weights.stem}*safetensors*"):
        if re.search("fp16|bf16|index|-of-", old.name):
            old.unlink()


def remove_folder(folder: Path):
    """Delete a folder and all in it, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)


def flush(path: Path):
    """Wait until the disk has this file's bytes, or this folder's names."""
    if os.name == "nt":  # Windows cannot open a folder for this
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(what: str, folder: str | Path):
    """Make a folder. InputError, which begins with `what`, where no file can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        problem = f"cannot write there ({error.strerror}); choose another place"
        raise InputError(f"{what}: {problem}") from error
