"""Mutate weights files and see that each is refused in a sentence naming it: python tests/fuzz_weights.py --n 10000

Structural faults (a tensor dropped, doubled, renamed, reshaped, of another dtype or place; NaN; cut or added bytes)
must all be refused, naming the file and, where one is at fault, the tensor. A random byte of the data may pass: only a
hash can see it, so each such file is also shown to `verify`'s sha256. Prints the counts.
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

from minipic import layouts  # noqa: E402
from minipic.common import InputError  # noqa: E402
from minipic.weights import read_header, read_weights, save_weights, sha256  # noqa: E402


def split(content):
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8:8 + length]), content[8 + length:]


def join(header, data):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def structural(content, chance):
    """(mutant, the tensor at fault or None, whether it takes the table of a network's names and shapes to see it)."""
    header, data = split(content)
    name = chance.choice([name for name in header if name != "__metadata__" and "model_ema" not in name
                          and name.rsplit(".", 1)[-1] not in ("position_ids", "logit_scale", "betas", "count")])
    entry, kind = header[name], chance.randrange(12)
    start, end = entry["data_offsets"]
    if kind == 0:
        return content[:chance.randrange(len(content))], None, False
    if kind == 1:
        return content + bytes(chance.randrange(1, 100)), None, False
    if kind == 2:
        text = json.dumps(header)
        return join((text[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}").encode(), data), name, False
    if kind == 3:
        header[name + "x"] = header.pop(name)
        return join(header, data), name, True
    if kind == 4:
        entry["shape"] = [n + (i == 0) for i, n in enumerate(entry["shape"])] or [2]
    elif kind == 5:
        entry["shape"] = [1, *entry["shape"]]
    elif kind == 6:
        entry["dtype"] = chance.choice(sorted({"F32", "F64", "I8", "BF16", "F8_E4M3", "Q", "I16"} - {entry["dtype"]}))
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
                other["data_offsets"] = [place - (end - start) for place in other["data_offsets"]]
    else:
        place = chance.randrange(start // 2, end // 2) * 2  # the files hold fp16: 7e00 is NaN
        data = data[:place] + b"\x00\x7e" + data[place + 2:]
    return join(header, data), name, kind in (5, 10) or entry["dtype"] in ("BF16", "I16")


def corpus(folder):
    """{kind: (good file, its reader)}: a single file, the UNet of a diffusers folder, and weights without a table."""
    parts, index, scheduler = tiny("sdxl")
    models = networks(parts)
    save_weights(single_file("sdxl", models), folder / "single.safetensors")
    layouts.save_folder(folder / "model", models, index, scheduler)
    save_weights({f"p{i}.weight": torch.randn(16, 16).half() for i in range(8)}, folder / "loose.safetensors")

    def single(path):
        source = layouts.from_single_file(path, parts, index, scheduler)
        return {f"{name}.{k}": x for name, part in source.parts.items()
                for k, x in layouts.load_part(part).state_dict().items()}

    return {"single": (folder / "single.safetensors", single),
            "folder": (folder / "model" / "unet" / "diffusion_pytorch_model.safetensors",
                       lambda path: layouts.load_part(layouts.open_part(path.parent, "unet")).state_dict()),
            "loose": (folder / "loose.safetensors", read_weights)}


def fuzz(folder, n, seed=0):
    """Counter of what became of n mutants, structural and random bytes in turn."""
    counts, chance = Counter(), random.Random(seed)
    good = {kind: (path, reader, path.read_bytes()) for kind, (path, reader) in corpus(folder).items()}
    hashes = {kind: sha256(path) for kind, (path, _, _) in good.items()}
    for i in range(n):
        kind = list(good)[i % len(good)]
        path, reader, content = good[kind]
        if i // len(good) % 2:
            mutant, tensor, by_table = structural(content, chance)
        else:
            place = chance.randrange(min(len(content), chance.choice([8, 10_000, len(content)])))
            mutant = content[:place] + bytes([content[place] ^ chance.randrange(1, 256)]) + content[place + 1:]
            tensor = None
        path.unlink()  # a new file: tensors read before may still be mapped to the old one
        path.write_bytes(mutant)
        try:
            reader(path)
            if i // len(good) % 2:
                fine = by_table and kind == "loose"
                counts["accepted, no table to see it by" if fine else "structural accepted"] += 1
                if not fine:
                    print(f"{kind} {i}: accepted a structural fault in {tensor}")
            else:
                counts["byte accepted, seen by hash" if sha256(path) != hashes[kind] else "crashed"] += 1
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
    part = next((part for part in layouts.SINGLE_FILES["sdxl"][0].values() if tensor.startswith(part.prefix)), None)
    ours = part.convert(tensor.removeprefix(part.prefix), torch.empty(3, 1)) if part else []
    return any(name in message for name in [tensor, *(name for name, _ in ours)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = fuzz(Path(temporary), arguments.n, arguments.seed)
    print(json.dumps(dict(result), indent=2))
    sys.exit(bool(result["crashed"] or result["unnamed"] or result["structural accepted"]))
