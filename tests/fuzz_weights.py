"""Mutate weights files and see that each is refused in a sentence that names it.

    python tests/fuzz_weights.py --n 10000

Structural faults (a tensor dropped, doubled, renamed, reshaped, of another dtype or place; NaN;
cut or added bytes) must all be refused, naming the file and, where one is at fault, the tensor. A
random byte of the data may pass: only a hash can see it, so the sha256 of each such file must
differ. Prints the counts.
"""

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from single_files import networks, single_file, tiny  # noqa: E402

from minipic.common import InputError  # noqa: E402
from minipic.weights import layouts, read_weights, save_weights  # noqa: E402
from minipic.weights.files import sha256  # noqa: E402
from minipic.weights.single_file import SINGLE_FILES, from_single_file  # noqa: E402

INTEGERS_AND_MARKS = ("position_ids", "logit_scale", "betas", "count")  # which no network has
DTYPES = {"F32", "F64", "I8", "BF16", "F8_E4M3", "Q", "I16"}


def split(content):
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8:8 + length]), content[8 + length:]


def join(header, data):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def structural(content, chance):
    """(mutant, the tensor at fault or None, whether it takes a network's table of names to see)."""
    header, data = split(content)
    name = chance.choice([
        name for name in header if name != "__metadata__" and "model_ema" not in name
        and name.rsplit(".", 1)[-1] not in INTEGERS_AND_MARKS])
    entry, kind = header[name], chance.randrange(12)
    start, end = entry["data_offsets"]
    if kind == 0:
        return content[:chance.randrange(len(content))], None, False
    if kind == 1:
        return content + bytes(chance.randrange(1, 100)), None, False
    if kind == 2:
        text = json.dumps(header)
        twice = text[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
        return join(twice.encode(), data), name, False
    if kind == 3:
        header[name + "x"] = header.pop(name)
        return join(header, data), name, True
    if kind == 4:
        entry["shape"] = [n + (i == 0) for i, n in enumerate(entry["shape"])] or [2]
    elif kind == 5:
        entry["shape"] = [1, *entry["shape"]]
    elif kind == 6:
        entry["dtype"] = chance.choice(sorted(DTYPES - {entry["dtype"]}))
    elif kind == 7:
        entry["data_offsets"] = [start + 2, end + 2]
    elif kind == 8:
        entry["data_offsets"] = [start, end - 2]
    elif kind == 9:
        field = chance.choice(["dtype", "shape", "data_offsets"])
        entry[field] = chance.choice([None, -1, "x", [], [-1, 2], {}, 1e300])
    elif kind == 10:
        del header[name]
        data = data[:start] + data[end:]
        for other in header.values():
            if "data_offsets" in other and other["data_offsets"][0] >= end:
                other["data_offsets"] = [x - (end - start) for x in other["data_offsets"]]
    else:
        place = chance.randrange(start // 2, end // 2) * 2  # the files hold fp16, 7e00 is NaN
        data = data[:place] + b"\x00\x7e" + data[place + 2:]
    return join(header, data), name, kind in (5, 10) or entry["dtype"] in ("BF16", "I16")


def corpus(folder):
    """{kind: (good file, reader)}: a single file, a folder's UNet, and weights of no network."""
    parts, index, scheduler = tiny("sdxl")
    models = networks(parts)
    save_weights(single_file("sdxl", models), folder / "single.safetensors")
    layouts.save_folder(folder / "model", models, index, scheduler)
    loose = {f"p{i}.weight": torch.randn(16, 16).half() for i in range(8)}
    save_weights(loose, folder / "loose.safetensors")

    def read_single(path):
        for part in from_single_file(path, parts, index, scheduler).parts.values():
            layouts.load_part(part)

    def read_unet(path):
        layouts.load_part(layouts.open_part(path.parent, "unet"))

    return {
        "single": (folder / "single.safetensors", read_single),
        "folder": (folder / "model/unet/diffusion_pytorch_model.safetensors", read_unet),
        "loose": (folder / "loose.safetensors", read_weights)}


def fuzz(folder, n, seed=0):
    """Counter of what became of n mutants, structural and random bytes in turn."""
    counts, chance = Counter(), random.Random(seed)
    good = {}
    for kind, (path, reader) in corpus(folder).items():
        good[kind] = path, reader, path.read_bytes(), sha256(path)
    for i in range(n):
        kind = list(good)[i % len(good)]
        path, reader, content, good_hash = good[kind]
        is_structural = i // len(good) % 2
        if is_structural:
            mutant, tensor, by_table = structural(content, chance)
        else:
            place = chance.randrange(min(len(content), chance.choice([8, 10_000, len(content)])))
            byte = bytes([content[place] ^ chance.randrange(1, 256)])
            mutant = content[:place] + byte + content[place + 1:]
            tensor = None
        path.unlink()  # a new file: tensors read before may still be mapped to the old one
        path.write_bytes(mutant)
        try:
            reader(path)
            if not is_structural:
                same = sha256(path) == good_hash
                counts["crashed" if same else "byte accepted, seen by hash"] += 1
            elif by_table and kind == "loose":
                counts["accepted, no table to see it by"] += 1
            else:
                counts["structural accepted"] += 1
                print(f"{kind} {i}: accepted a structural fault in {tensor}")
        except InputError as error:
            named = path.name in str(error) and (tensor is None or named_in(tensor, str(error)))
            counts["refused" if named else "unnamed"] += 1
            if not named:
                print(f"{kind} {i}: {tensor} is not named in: {error}")
        except Exception as error:
            counts["crashed"] += 1
            print(f"{kind} {i}: {type(error).__name__}: {error}")
        path.unlink()
        path.write_bytes(content)
    return counts


def named_in(tensor, message):
    """Whether the message names the tensor, as the file does or as this library does."""
    names = [tensor]
    for part in SINGLE_FILES["sdxl"].parts.values():
        if tensor.startswith(part.prefix):
            renamed = part.convert(tensor.removeprefix(part.prefix), torch.empty(3, 1))
            names += [name for name, _ in renamed]
    return any(name in message for name in names)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = fuzz(Path(temporary), arguments.n, arguments.seed)
    print(json.dumps(dict(result), indent=2))
    sys.exit(bool(result["crashed"] or result["unnamed"] or result["structural accepted"]))
