"""Safetensors in and out, checked: a file that is damaged or not what it should be is refused in one sentence.

The format (https://github.com/huggingface/safetensors): 8 bytes, the header's length N; N bytes of JSON, for each
tensor its dtype, shape and place; then the data. The safetensors library reads the data; it lets duplicate names, NaN
and oversized headers pass and its messages name no file, so the header is read here first.
"""

import hashlib
import json
import math
import os
import re
import tempfile
from collections import namedtuple
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minipic import keys
from minipic.common import InputError

Entry = namedtuple("Entry", "dtype shape start end")  # of one tensor in a header; start and end count from the data

BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
HEADER_LIMIT = 100_000_000  # bytes, the format's own; SDXL's single file, the largest here, has 0.4 MB
GROUP = 256 << 20  # bytes mapped at a time: what converting to another dtype may hold besides its result
OFFICIAL = Path(__file__).parent.parent / "weights" / "official.json"


def read_weights(path):
    """{name: tensor} of one safetensors file, memory-mapped (nothing is copied until it changes).

    Raises InputError naming the file, and the tensor at fault, when the file is damaged, is of another kind, or holds
    NaN or infinity. A flipped low bit of a weight cannot be seen without a hash: see `verify`.
    """
    return dict(stream(path, read_header(path)[0]))


def read_header(path):
    """({name: Entry} in the order of the data, {key: text} metadata) of a safetensors file, without its data."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size, start = os.fstat(file.fileno()).st_size, file.read(512)
            length = int.from_bytes(start[:8], "little")
            if size < 10 or start[8:9] != b"{" or length > HEADER_LIMIT:
                raise InputError(f"{path} is {diagnose(start, size)}; expected a .safetensors file")
            header = (start + file.read(max(0, 8 + length - len(start))))[8:8 + length]
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror}); give a .safetensors file") from None
    if len(header) < length:
        raise InputError(f"{path} is truncated: it has {size:,} bytes, its header alone {8 + length:,}; fetch it again")
    try:
        values = json.loads(header, object_pairs_hook=lambda pairs: unique(pairs, path))
    except (ValueError, RecursionError):
        raise InputError(f"{path}: the header is not valid JSON, the file is damaged; fetch it again") from None
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: the header's __metadata__ is not text, the file is damaged; fetch it again")
    entries = {name: check_entry(value, f"{path}: tensor {name!r}") for name, value in values.items()}
    return check_places(entries, size - 8 - length, path), metadata


def diagnose(start, size):
    """What a file is that cannot be safetensors, from its first bytes."""
    text = start.lstrip().lower()
    if size == 0:
        return "empty"
    if text.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the weights themselves (run `git lfs pull`)"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, not weights (the download went wrong, fetch it again)"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return ("a pickle (.ckpt, .pt, .bin), which can run code when opened and is never read here "
                "(get the .safetensors version)")
    if text.startswith((b"{", b"[")):
        return "text (JSON), not weights"
    return "damaged or not a safetensors file" if size >= 10 else f"truncated to {size} bytes"


def unique(pairs, path):
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{path}: {twice!r} is in the header twice, the file is damaged; fetch it again")
    return values


def check_entry(value, where):
    """One tensor's header value as an Entry; `where` names file and tensor."""
    def counts(x):
        return isinstance(x, list) and all(type(n) is int and n >= 0 for n in x)
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where}: its header entry is damaged; fetch the file again")
    dtype, shape, places = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise InputError(f"{where} is stored as {dtype}, which is not supported (supported: {', '.join(BITS)})")
    if not counts(shape) or math.prod(n or 1 for n in shape) >= 2**63 or not counts(places) or len(places) != 2:
        raise InputError(f"{where}: its shape or place in the header is damaged; fetch the file again")
    if places[1] - places[0] != math.prod(shape) * BITS[dtype] // 8:
        raise InputError(f"{where} has {places[1] - places[0]:,} bytes, but {dtype} {shape} takes "
                         f"{math.prod(shape) * BITS[dtype] // 8:,}: the file is damaged; fetch it again")
    return Entry(dtype, tuple(shape), *places)


def check_places(entries, size, path):
    """The entries in the order of their data, which must fill the `size` bytes after the header with no gap."""
    entries, position = dict(sorted(entries.items(), key=lambda item: item[1][2:])), 0
    for name, entry in entries.items():
        if entry.start != position:
            raise InputError(f"{path}: tensor {name!r} begins at byte {entry.start:,} of the data instead of "
                             f"{position:,}: the file is damaged; fetch it again")
        position = entry.end
        if position > size:
            raise InputError(f"{path} is truncated: tensor {name!r} ends at byte {position:,} of the data, and there "
                             f"are {size:,}; fetch it again")
    if position < size:
        raise InputError(f"{path} has {size - position:,} bytes after its last tensor: it is damaged; fetch it again")
    return entries


def stream(path, entries):
    """Yield (name, tensor) for `entries` of a file in the order of the data, each checked for NaN and infinity.

    Mapped in groups, so that tensors that are dropped or converted give their memory back while the rest is read.
    """
    for _, group in groupby(entries, lambda name: entries[name].start // GROUP):
        try:
            with safe_open(path, framework="pt") as file:
                for name in group:
                    tensor = file.get_tensor(name)
                    if not is_finite(tensor):
                        raise InputError(f"{path}: tensor {name!r} holds NaN or infinity: the file is damaged or its "
                                         "training diverged; fetch it again or use another")
                    yield name, tensor
                    del tensor
        except SafetensorError as error:
            raise InputError(f"{path}: the file is damaged ({error}); fetch it again") from None


def is_finite(tensor):
    """Whether no element is NaN or infinite. One pass over memory: NaN spreads to the least and the largest."""
    return not tensor.is_floating_point() or not tensor.numel() or all(end.isfinite() for end in tensor.aminmax())


def save_weights(tensors, path, metadata=None):
    """Write {name: tensor} to a safetensors file, which appears whole or not at all and is on disk on return."""
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path, sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"} | (metadata or {}))  # transformers asks for "pt"


def write_json(values, path):
    """Write a JSON object as the official files have it, whole or not at all."""
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    with replacing(path, len(text)) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path, size=0):
    """A temporary path beside `path`; what the block writes there is flushed to disk and renamed to `path`.

    An error, a full disk say, or a kill leaves the old `path` as it was. `size`: bytes needed, for the message.
    """
    path = Path(path)
    temporary = path.with_name(f"part-{os.getpid()}-{path.name}")  # the ending tells Pillow the format
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # the safetensors library makes files that only their owner can read
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot write {size or 'all'} bytes ({error}); make room or choose another "
                         "place") from None
    finally:
        if os.path.exists(temporary):
            temporary.unlink()


def writable(flag, folder):
    """Make a folder. InputError, naming the `flag` and its value, when files cannot be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{flag}: cannot write there ({error.strerror}); choose another place") from error


def flush(path):
    """Ask the disk to have this file's bytes, or this folder's names, before going on."""
    if os.name == "nt":  # Windows cannot open a folder for this
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path):
    """The object in a JSON file; InputError naming the file when it is missing or is no JSON object."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror}); expected a JSON file") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: is not valid JSON in UTF-8; fetch it again") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object, found a {type(values).__name__}; fetch it again")
    return values


# LoRA files -------------------------------------------------------------------------------------------------------

def load_lora(path, models, partial=False):
    """A LoRA file in any common spelling -> {part: {module: (A [R, ...], B [out, R, ...], alpha)}}.

    `models`: {part: network}, to which the names must belong; `partial`: leave out what fits none instead of refusing.
    alpha is the file's, tensor or metadata; R where it says nothing. Raises InputError with the names that do not fit
    (also those of DoRA, LoHa and the like, which are something else).
    """
    entries, metadata = read_header(path)
    known = {part: keys.lora_modules(part, [name for name, module in model.named_modules() if isinstance(
        module, (torch.nn.Linear, torch.nn.Conv2d))]) for part, model in models.items()}
    places = {name: keys.lora(name) for name in entries}
    whole = {place[:2] for place in places.values() if place and place[2] != "alpha"}  # a LoHa has alphas too
    fitting = {name for name, place in places.items() if place and place[1] in known.get(place[0], ())
               and place[:2] in whole}
    strangers = [name for name in entries if name not in fitting]
    if dora := [name for name in strangers if re.search("dora_scale|lora_magnitude_vector", name)]:
        raise InputError(f"{path} is a DoRA ({dora[0]}), which is not supported; use a LoRA")
    if not fitting or (strangers and not partial):
        kind = ", of a LoHa or LoKr," if any(re.search("hada_w|lokr_w", name) for name in strangers) else ""
        raise InputError(f"{path}: {len(strangers)} of {len(entries)} tensors{kind} fit no part of this model "
                         f"({', '.join(strangers[:9])}{', ...' * (len(strangers) > 9)}); use a LoRA made for it, "
                         "or --lora-allow-partial")
    damaged = InputError(f"{path}: an alpha or the header's lora_adapter_metadata is damaged; fetch the file again")
    try:
        noted, found = dict(json.loads(metadata.get("lora_adapter_metadata", "{}"))), {}
    except (ValueError, TypeError, RecursionError):
        raise damaged from None
    for name, tensor in stream(path, {name: entry for name, entry in entries.items() if name in fitting}):
        part, spelling, role = places[name]
        if found.setdefault((part, known[part][spelling]), {}).setdefault(role, tensor) is not tensor:
            raise InputError(f"{path}: {name!r} is there in two spellings; the file mixes two LoRAs, use another")
    loras = {}
    for (part, module), tensors in found.items():
        wanted = models[part].get_submodule(module).weight.shape
        a, b = (tensors.get(role, torch.empty(0)) for role in "AB")
        if not a.numel() or min(a.ndim, b.ndim) < 2 or (
                b.flatten(1).shape, a[0].numel()) != ((wanted[0], len(a)), math.prod(wanted[1:])):
            raise InputError(f"{path}: the LoRA of {part}.{module} does not fit its weight {list(wanted)}; "
                             "use a LoRA made for this model")
        if not a.is_floating_point() or not b.is_floating_point():
            raise InputError(f"{path}: the LoRA of {part}.{module} is stored in whole numbers, which is not supported; "
                             "use one in floating point")
        try:
            alpha = float(tensors["alpha"] if "alpha" in tensors else noted_alpha(noted, part, module, len(a)))
        except (ValueError, TypeError, AttributeError, OverflowError, re.error):
            raise damaged from None
        loras.setdefault(part, {})[module] = a, b, alpha
    return loras


def noted_alpha(noted, part, module, rank):
    """A module's alpha by PEFT's settings, which newer diffusers notes in the header; the rank where they say nothing.

    The names in alpha_pattern are regular expressions for the end of a module's name.
    """
    patterns = noted.get(f"{part}.alpha_pattern") or {}
    ends = (alpha for pattern, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", module))
    alpha = float(patterns[module] if module in patterns else next(ends, noted.get(f"{part}.lora_alpha") or rank))
    if not math.isfinite(alpha):
        raise ValueError
    return alpha * math.sqrt(rank) if noted.get(f"{part}.use_rslora") else alpha  # rsLoRA counts alpha / sqrt(rank)


def save_lora(states, path, metadata=None, kohya=False):
    """Write {part: lora.lora_state_dict(network)}: in PEFT's spelling, which diffusers reads, with alpha / R multiplied
    into B, for readers differ in where they look for an alpha; or as `kohya`'s SDXL scripts do, with an alpha each."""
    tensors, metadata = {}, dict(metadata or {})
    for part, state in states.items():
        for name in [name.removesuffix(".alpha") for name in state if name.endswith(".alpha")]:
            a, b, alpha = (state[f"{name}.{end}"] for end in ("lora_A.weight", "lora_B.weight", "alpha"))
            if kohya:
                module = keys.LORA_KOHYA[part] + (keys.sgm_name(name) if part == "unet" else name).replace(".", "_")
                tensors |= {f"{module}.lora_down.weight": a, f"{module}.lora_up.weight": b, f"{module}.alpha": alpha}
                metadata |= {"ss_network_module": "networks.lora", "ss_network_dim": str(len(a)),
                             "ss_network_alpha": str(alpha.item())}
            else:
                tensors |= {f"{part}.{name}.lora_A.weight": a, f"{part}.{name}.lora_B.weight": b * (alpha / len(a))}
    save_weights(tensors, path, metadata)


def sha256(path):
    """The hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify(path):
    """The official name of a file, known by its sha256; InputError when it is not one of the official files."""
    digest = sha256(path)
    same_size = []
    for repository, about in read_json(OFFICIAL)["repositories"].items():
        for name, (size, known) in about["files"].items():
            if known == digest:
                return f"{repository}/{name}"
            if size == os.path.getsize(path) and Path(name).name == Path(path).name:
                same_size.append(f"{repository}/{name}")
    almost = f"it has the size of {same_size[0]} but not its contents: damaged" if same_size else "it may be fine"
    raise InputError(f"{path}: its sha256 {digest} is none of the official files'; {almost}; "
                     "load it without --verify, or fetch it with weights/download.py")
