"""Damage files of every kind and see that each gives the same values as before, or one clear error.

    python tests/fuzz_weights.py --n 10000

A fault of structure in a safetensors file (a tensor dropped, doubled, renamed, reshaped, of another
dtype or place; NaN; cut or added bytes) must be refused in a sentence that names the file and, of a
network, the tensor. JSON files get hostile values; all files are cut, and bytes in them changed, added and taken
out. Such damage can leave a good file with other values, as a flipped bit of a weight does. Only a
hash can see that, so these are counted apart; checkpoints have hashes, and give none.

Prints the counts and writes them to tests/benchmarks/fuzz.json.
"""

import argparse
import dataclasses
import json
import random
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent / "benchmarks")]

from record import record  # noqa: E402
from single_files import ldm_controlnet, networks, single_file, tiny  # noqa: E402

from minipic.common import InputError  # noqa: E402
from minipic.diffusion.schedule import Schedule  # noqa: E402
from minipic.models.controlnet import ControlNet  # noqa: E402
from minipic.recipes.clip import train_tokenizer  # noqa: E402
from minipic.text import Tokenizer  # noqa: E402
from minipic.training.checkpoint import find_checkpoint, write_checkpoint  # noqa: E402
from minipic.weights import keys, layouts, load_lora, read_weights, save_weights  # noqa: E402
from minipic.weights.configs import read_config  # noqa: E402
from minipic.weights.controlnet import open_controlnet  # noqa: E402
from minipic.weights.embedding import load_embedding  # noqa: E402
from minipic.weights.single_file import SINGLE_FILES, from_single_file  # noqa: E402
from minipic.weights.tokenizer import open_bpe  # noqa: E402

INTEGERS_AND_MARKS = ("position_ids", "logit_scale", "betas", "count")  # which no network has
DTYPES = {"F32", "F64", "I8", "BF16", "F8_E4M3", "Q", "I16"}
CAPTIONS = ["a small red sphere left of a large blue cube", "a cyan torus on a grey floor"] * 3
HOSTILE = [  # values for JSON files
    None, True, -1, 0, 1.5, 1e300, float("nan"), float("inf"), 10**9, 10**400, "", "x" * 100_000,
    "\x1b[2J\r\n", "../../secret", "a\0b", "\ud800", [], {}, [[]], [0] * 10_000, [10**9] * 3, {"content": 5}]
SLOW = 5.0  # seconds of processor time


class Target(NamedTuple):
    """Files of one kind."""

    files: list[Path]  # one at a time is damaged
    read: Callable[[], object]  # reads them all and gives what they hold
    has_table: bool = False  # whether names, shapes and dtypes of the tensors are known beforehand
    names_tensors: bool = True  # whether a refusal must name the tensor, not only the file


def corpus(folder: Path) -> dict[str, Target]:
    """{kind: its good files}, all small and written here."""
    parts, index, scheduler = tiny("sdxl")
    models = networks(parts)
    unet = models["unet"]

    def path(name):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        return folder / name

    single = path("single/model.safetensors")
    save_weights(single_file("sdxl", models), single)
    model = folder / "model"
    layouts.save_folder(model, models, index, scheduler)
    loose = path("loose/loose.safetensors")
    save_weights({f"p{i}.weight": torch.randn(16, 16).half() for i in range(8)}, loose)

    lora = path("lora/lora.safetensors")
    module = "unet.mid_block.attentions.0.proj_in"
    width = unet.mid_block.attentions[0].proj_in.in_features
    matrices = {f"{module}.lora_A.weight": (2, width), f"{module}.lora_B.weight": (width, 2)}
    settings = {"unet.r": 2, "unet.lora_alpha": 4}
    save_weights({name: torch.randn(shape).half() for name, shape in matrices.items()}, lora,
                 {"lora_adapter_metadata": json.dumps(settings)})
    embedding = path("embedding/word.safetensors")
    widths = {"clip_l": 16, "clip_g": 24}
    save_weights({name: torch.randn(2, width).half() for name, width in widths.items()}, embedding)
    controlnet = path("controlnet/control.safetensors")
    steered = ControlNet.from_unet(unet).half()
    save_weights(ldm_controlnet(steered.state_dict(), unet.config), controlnet)

    pair, tokenizer = folder / "pair", path("single-tokenizer/tokenizer.json")
    train_tokenizer(CAPTIONS, pair, 600)
    open_bpe(pair).save(str(tokenizer))
    checkpoint = folder / "checkpoints" / "step-000007"
    state = {name: {"p": torch.randn(8, 8), "q.step": torch.tensor(7.0)}
             for name in ("model", "ema", "optimizer")}
    write_checkpoint(checkpoint.parent, 7, state, {"steps": 9, "lr": 0.1}, {"model": "9f86d081"})

    def read_single():
        source = from_single_file(single, parts, index, scheduler)
        return load_all(source.parts), read_config(Schedule, source.scheduler, single)

    def read_configs():
        source = layouts.open_model(model)
        where = model / "scheduler" / "scheduler_config.json"
        configs = {name: part.config for name, part in source.parts.items()}
        return configs, source.index, read_config(Schedule, source.scheduler, where)

    def read_checkpoint():
        found = find_checkpoint(str(checkpoint), checkpoint.parent, print)
        return {name: read_weights(found / f"{name}.safetensors") for name in state}

    return {
        "single file": Target([single], read_single, has_table=True),
        "folder": Target(
            [model / "unet" / "diffusion_pytorch_model.safetensors"],
            lambda: load_all({"unet": layouts.open_part(model / "unet", "unet")}), has_table=True),
        "loose weights": Target([loose], lambda: read_weights(loose)),
        "LoRA": Target(
            [lora], lambda: load_lora(lora, {"unet": unet}), names_tensors=False),
        "embedding": Target(
            [embedding], lambda: load_embedding(embedding), names_tensors=False),
        "ControlNet": Target(
            [controlnet],
            lambda: load_all({"c": open_controlnet(controlnet, unet.config, 8)}), has_table=True,
            names_tensors=False),
        "configs": Target(sorted(model.rglob("*.json")), read_configs),
        "vocab.json and merges.txt": Target(
            sorted(pair.iterdir()), lambda: Tokenizer(pair)(CAPTIONS)),
        "tokenizer.json": Target([tokenizer], lambda: Tokenizer(tokenizer.parent)(CAPTIONS)),
        "checkpoint": Target(
            sorted(checkpoint.iterdir()), read_checkpoint, names_tensors=False),
    }


def load_all(parts):
    return {name: layouts.load_part(part).state_dict() for name, part in parts.items()}


def same(a, b) -> bool:
    """Whether two readers' values are equal, to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a):
        return same(vars(a), vars(b))
    return a == b


# Damage -------------------------------------------------------------------------------------------

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


def hostile_json(content, chance):
    """A JSON file with one value replaced, one key renamed or dropped, or nested very deep."""
    values = json.loads(content)
    here = values
    while True:  # walk to a random place
        key = chance.choice(list(here) if isinstance(here, dict) else range(len(here)))
        inside = here[key]
        if not isinstance(inside, (dict, list)) or not inside or chance.random() < 0.3:
            break
        here = inside
    kind = chance.randrange(8)
    if kind == 0:
        return b"[" * chance.choice([100, 100_000, 1_000_000]) + content
    if kind == 1:
        del here[key]
    elif kind == 2 and isinstance(here, dict):
        here[chance.choice(["x", "\x1b[31m", key + "x"])] = here.pop(key)
    else:
        here[key] = chance.choice(HOSTILE)
    return json.dumps(values).encode()


def change_bytes(content, chance):
    """Cut, or one byte changed, or some added, taken out or doubled; often near the start."""
    place = chance.randrange(min(len(content), chance.choice([8, 10_000, len(content)])))
    length = chance.randrange(1, 9)
    some = content[place:place + length]
    return chance.choice([
        content[:place],
        content[:place] + bytes([content[place] ^ chance.randrange(1, 256)]) + content[place + 1:],
        content[:place] + chance.randbytes(length) + content[place:],
        content[:place] + content[place + length:],
        content[:place] + some + content[place:]])


def fuzz(folder: Path, n: int, seed: int = 0) -> dict[str, Counter]:
    """{kind: Counter of what became of n damaged files}, with the slowest in seconds."""
    warnings.simplefilter("ignore")
    chance = random.Random(seed)
    targets = corpus(folder)
    good = {kind: target.read() for kind, target in targets.items()}
    counts = {kind: Counter() for kind in targets}
    for kind, target in targets.items():
        for i in range(n):
            path = target.files[i % len(target.files)]
            content = path.read_bytes()
            tensor, by_table, is_structural = None, False, False
            if path.suffix == ".safetensors" and chance.random() < 0.5:
                mutant, tensor, by_table = structural(content, chance)
                is_structural = target.has_table or not by_table
            elif path.suffix == ".json" and chance.random() < 0.5:
                mutant = hostile_json(content, chance)
            else:
                mutant = change_bytes(content, chance)
            path.unlink()  # a new file: tensors read before may still be mapped to the old one
            path.write_bytes(mutant)
            start = time.process_time()
            outcome, said = judge(target, good[kind], path, tensor)
            seconds = time.process_time() - start
            path.unlink()
            path.write_bytes(content)
            if outcome == "other values" and (is_structural or kind == "checkpoint"):
                outcome = "failed"
                said = f"accepted a fault in {tensor}"
            if seconds > SLOW:
                outcome, said = "failed", f"{seconds:.0f} seconds"
            if outcome == "failed":
                print(f"{kind}, {path.name}, number {i}: {said}")
            counts[kind][outcome] += 1
            counts[kind]["slowest s"] = max(counts[kind]["slowest s"], round(seconds, 2))
    return counts


def judge(target: Target, good, path: Path, tensor: str | None) -> tuple[str, str]:
    """(what became of a damaged file, what was said)."""
    try:
        values = target.read()
    except InputError as error:
        said = str(error)
        is_named = path.name in said or str(path.parent) in said
        is_named = is_named and (
            tensor is None or not target.names_tensors or named_in(tensor, said))
        is_one_line = said.isprintable() and len(said) < 5000
        return "refused" if is_named and is_one_line else "failed", f"{tensor}: {said}"
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}"
    return "same values" if same(values, good) else "other values", ""


def named_in(tensor, message):
    """Whether the message names the tensor, as the file does or as this library does."""
    names = [tensor, keys.controlnet_name(tensor.removeprefix("control_model."))]
    for part in SINGLE_FILES["sdxl"].parts.values():
        if tensor.startswith(part.prefix):
            renamed = part.convert(tensor.removeprefix(part.prefix), torch.empty(3, 1))
            names += [name for name, _ in renamed]
    return any(name in message for name in names)


def memory() -> int:
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=1000, help="damaged files of each kind")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        fuzz(Path(temporary, "first"), 5)  # from here on memory should not grow
        before = memory()
        result = fuzz(Path(temporary, "all"), arguments.n, arguments.seed)
    grown = memory() - before
    print(json.dumps(result, indent=2), f"memory grown by {grown} MB")
    command = f"python tests/fuzz_weights.py --n {arguments.n} --seed {arguments.seed}"
    record("fuzz", result, command=command, n=arguments.n, seed=arguments.seed,
           **{"memory grown MB": grown})
    sys.exit(any(counts["failed"] for counts in result.values()))
