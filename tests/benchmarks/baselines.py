"""The everyday ways to fine-tune, measured on what they never saw: the baselines that a paper's method must beat.

    python tests/benchmarks/baselines.py [--seeds 3] [--only NAME ...] [--out FILE.json] [--quick]

Every recipe trains once a seed through train.py's command line, and its finished file is written at several step
counts, loaded as a user loads it and measured on the tasks of cases.py, which says what the numbers are. Earlier counts
are the middle of that one run, with the learning rate it had there. All drawings have 15 steps, guidance 5 (edits 3,
and 1.5 by the picture) and a seed of their own.

Trained weights, bytes of the file that a user gets, and seconds a step (one thread's processor time) come from the same
runs. What is finished is kept in the JSON and skipped by the next run, unless the command, the number of pictures or
the model has changed; two runs with different --only can share the work.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib
import io
import json
import math
import shlex
import shutil
import statistics
import sys
import time
from itertools import product
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

from cases import CASES, REFERENCES  # noqa: E402
from record import device, hardware, record  # noqa: E402

import train  # noqa: E402
from minipic.papers import PAPERS, onepic  # noqa: E402
from minipic.pipeline import Pipeline  # noqa: E402
from minipic.weights.files import sha256  # noqa: E402
from minipic.world import probe  # noqa: E402

STEPS = 15  # of drawing


class Entry(NamedTuple):
    """A recipe in the table: its task, train.py's flags with the Case's `words` in braces, the steps to measure at,
    the kind of file that it makes (see `load`), and the flags that make it quick."""
    task: str
    flags: str
    counts: tuple
    file: str
    quick: str


PHOTOS = " --data {photos} --warmup 20 "
DREAMBOOTH = "dreambooth" + PHOTOS + '--caption "a sks {shape}" --class-prompt "a {color} {shape}" '
LORA = "--lora-rank 16 --lr 1e-3"
ONEPIC = "onepic --balanced --scenes 1000 --lr 3e-3"
FOUR = "onepic --balanced --scenes 4000 --lr 1e-3 --task edges,edit,depth,segmentation"
LAYOUTS = ("interlaced", "side")
WAYS = ("clean", "masked"), ("noised", "masked"), ("noised", "all")  # how it sees, and where its loss counts
ENTRIES = {
    "DreamBooth, full": Entry("subject", DREAMBOOTH + "--lr 1e-4", (50, 100, 200), "model", "--num-class-images 1"),
    "DreamBooth, LoRA": Entry("subject", DREAMBOOTH + LORA, (50, 100, 200), "lora", "--num-class-images 1"),
    "LoRA": Entry("subject", "t2i" + PHOTOS + '--caption "a sks {shape}" --batch 4 --ema 0 --caption-dropout 0 ' + LORA,
                  (50, 100, 200), "lora", ""),
    "textual inversion": Entry(
        "subject", "inversion" + PHOTOS + '--caption "a <new>" --initializer-token {shape} --num-vectors 4',
        (100, 200, 400), "embedding", ""),
    **{f"ControlNet, {name}": Entry("control", f"controlnet --control {name} --balanced --scenes 1000 --batch 16 "
                                    "--warmup 30 --lr 1e-3", (100, 200, 400), "controlnet", "--scenes 4")
       for name in ("edges", "depth", "segmentation")},
    "InstructPix2Pix": Entry("edit", "edit --batch 16 --scenes 5000", (600, 1200, 2400), "model", "--scenes 4"),
    **{f"ONE-PIC, {layout}, edit": Entry(
        "edit", f"{ONEPIC} --task edit --layout {layout}", (100, 300), "onepic", "--scenes 4") for layout in LAYOUTS},
    **{f"ONE-PIC, {visible}, {counted}, edit": Entry(
        "edit", f"{ONEPIC} --task edit --visible {visible} --loss-on {counted}", (100, 300), "onepic", "--scenes 4")
       for visible, counted in WAYS[1:]},
    **{f"ONE-PIC, {layout}, {task}": Entry(
        "control", f"{ONEPIC} --task {task} --layout {layout}", (100, 300), "onepic", "--scenes 4")
       for task in ("edges", "depth", "segmentation") for layout in LAYOUTS},
    **{f"ONE-PIC, four tasks, {task}": Entry(case, FOUR, (300, 600), "onepic", "--scenes 4")
       for task, case in (("edit", "edit"), ("edges", "control"))},
}


# ---- training and measuring -------------------------------------------------------------------------------------

class Trained(NamedTuple):
    """What a recipe made, loaded as a user loads it."""
    pipeline: Pipeline
    bytes: int                                  # of the file that a user gets
    trained_as: onepic.TrainedAs | None = None  # of ONE-PIC's LoRA


def load(model, kind, folder):
    """What a recipe wrote into `folder`, added to the model that it started from."""
    name = {"lora": "lora", "onepic": "lora", "embedding": "new", "controlnet": "diffusion_pytorch_model",
            "model": "*/*"}[kind]
    paths = list(folder.glob(f"{name}.safetensors"))
    size = sum(path.stat().st_size for path in paths)
    pipeline = Pipeline.load(folder if kind == "model" else model, device=device())
    trained_as = None
    if kind == "lora":
        pipeline.add_lora(paths[0])
    elif kind == "onepic":
        trained_as = onepic.load_adapter(pipeline, paths[0])
    elif kind == "embedding":
        pipeline.add_embedding(paths[0])
    elif kind == "controlnet":
        pipeline.add_controlnet(folder)
    return Trained(pipeline, size, trained_as)


def run(flags, counts, out):
    """Train with train.py's flags; its finished weights at every one of `counts` are in out/at-COUNT. Returns the
    number of trained weights and the seconds a step."""
    recipe = importlib.import_module((train.RECIPES | PAPERS)[flags[0]])
    every, trained, clock = math.gcd(*counts), [], []
    shutil.rmtree(out, ignore_errors=True)

    def export(network, config, data):  # in place of sample pictures, which show the same weights
        clock.append(time.process_time())
        trained.append(sum(p.numel() for p in network.parameters() if p.requires_grad))
        recipe.export(network, out / f"at-{every * len(trained)}", config, data)
        clock.append(time.process_time())
        return Image.new("RGB", (1, 1))

    with mock.patch.object(recipe, "sample", export), contextlib.redirect_stdout(io.StringIO()):
        code = train.main([*flags, "--steps", str(counts[-1]), "--save-every", str(counts[-1]), "--sample-every",
                           str(every), "--out", str(out)])
    if code or len(trained) < counts[-1] // every:
        sys.exit(code or "stopped; the same command goes on with this recipe's training from its start")
    times = [start - end for end, start in zip(clock[1::2], clock[2::2])]
    return trained[0], statistics.median(times) / every


def measure(case, name, options, seed):
    """One row of the table: {"at": {steps: scores}}, and of a recipe what it took."""
    if name not in ENTRIES:
        if name == "renders":
            return {"at": {"0": case.renders}}
        return {"at": {"0": case.score(Pipeline.load(options.model, device=device()), name)}}
    entry, out = ENTRIES[name], options.runs / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    flags = shlex.split(entry.flags.format(**case.words)) + ["--model", str(options.model), "--seed", str(seed)]
    flags += shlex.split(entry.quick) + ["--batch", "2"] if options.quick else []
    counts = (1, 2) if options.quick else entry.counts
    trained, seconds = run(flags, counts, out)
    row = {"command": shlex.join(["python", "train.py", *flags]), "trained": trained, "seconds a step": seconds,
           "at": {}}
    for steps in counts:
        made = load(options.model, entry.file, out / f"at-{steps}")
        row["bytes"] = made.bytes
        row["at"][str(steps)] = case.score(made.pipeline, name, made.trained_as)
    shutil.rmtree(out)
    return row


def kept(path, model):
    """The rows of a JSON that were made with this model."""
    rows = json.loads(path.read_text())["results"] if path.exists() else []
    return [row for row in rows if row["made"]["model"] == model]


def place(row):
    """Where a row stands in the table. No other row has the same."""
    order = [*REFERENCES, *sum(REFERENCES.values(), ()), *ENTRIES]
    return order.index(row["task"]), order.index(row["name"]), row["seed"]


def keep(options, model, row):
    """Put a row in its place in the JSON, which another run may have changed meanwhile."""
    rows = [old for old in kept(options.out, model) if place(old) != place(row)] + [row]
    rows.sort(key=place)
    record(options.out.with_suffix("").resolve(), rows, pictures=options.pictures, seeds=options.seeds)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default="weights/tiny")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=(*ENTRIES, *REFERENCES), metavar="NAME",
                        help="a recipe or a task, repeatable: " + "; ".join((*ENTRIES, *REFERENCES)))
    parser.add_argument("--pictures", type=int, default=60, help="drawings of a kind for each number")
    parser.add_argument("--quick", action="store_true", help="a trial: a few pictures, two steps of each")
    parser.add_argument("--out", type=Path, help="the JSON: baselines.json beside this file, or RUNS/quick.json")
    parser.add_argument("--runs", type=Path, default="runs/baselines", help="folder for photos and training runs")
    options = parser.parse_args(argv)
    options.out = options.out or (options.runs / "quick.json" if options.quick else Path(__file__).with_suffix(".json"))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    options.pictures, steps = (4, 2) if options.quick else (options.pictures, STEPS)
    judge = probe.load_judge(options.model / "judge")
    model = hashlib.sha256("".join(map(sha256, sorted(options.model.rglob("*.safetensors")))).encode()).hexdigest()
    make = functools.cache(lambda task, seed: CASES[task](
        seed, options.pictures, judge, options.runs / f"{task}-{seed}", steps))
    chosen = [name for name, entry in ENTRIES.items() if not options.only or {name, entry.task} & {*options.only}]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    for seed, task in product(seeds, dict.fromkeys(ENTRIES[name].task for name in chosen)):
        for name in (*REFERENCES[task], *(name for name in chosen if ENTRIES[name].task == task)):
            flags, counts = ENTRIES[name][1:3] if name in ENTRIES else ("", ())
            made = {"model": model, "pictures": options.pictures, "drawn in": steps, "flags": flags,
                    "counts": list(counts)}
            made = {"task": task, "name": name, "seed": seed, "made": made}
            if any(made.items() <= row.items() for row in kept(options.out, model)):
                continue
            start = time.time()
            row = made | hardware() | measure(make(task, seed), name, options, seed)
            keep(options, model, row)
            print(f"{task}, {name}, seed {seed}: {time.time() - start:.0f} s " + " ".join(
                f"[{step}] " + " ".join(f"{key} {value:.2f}" for key, value in scores.items() if value is not None)
                for step, scores in row["at"].items()), flush=True)


if __name__ == "__main__":
    main()
