"""The everyday ways to fine-tune, measured on what they never saw: the baselines that a paper's method must beat.

    python tests/benchmarks/baselines.py [--seeds 3] [--only NAME ...] [--out FILE.json] [--quick]

Every recipe trains once a seed through train.py's command line, and its finished file is written at several step
counts, loaded as a user loads it and measured by the judge (world/probe.py). Earlier counts are the middle of that one
run, with the learning rate it had there. All drawings have 15 steps, guidance 5 and a seed of their own.

subject: five photos of a two-coloured object, another one for each seed, whose colour and shape never met in the
model's training; they show it on two of the floors under two of the skies. Prompts put it in three places on the other
floor or under the other sky.
    identity   share of drawings with its shape, both colours and pattern
    setting    share with one object, at the place, on the floor and under the sky asked for
    class      the same prompts with its class, "red torus", in place of its name: share in which everything is right
    leak       share of those that show the subject, which nobody asked for
    others     share of drawings of other shapes, wholly described, in which everything is right
"renders" are the truth (the ceiling); "untouched" is the model before training, "in words" the same when told the
subject's colours and pattern: what training on photos has to compete with.

control: maps of scenes that no model was trained on. The prompt says colours, patterns, floor and sky; shapes, sizes,
places and what is beside or behind what can only come from the map.
    edge F1    the world's exact edges against the drawing's: pixels whose right or lower neighbour differs by more than
               EDGE in a channel; one pixel off counts. Shadows and patterns have such edges too, so renders do not
               reach 1
    layout     share of drawings in which the judge reads every shape, size, place and relation of the scene, and no
               object more (shape, size, place and relation: share of the single facts)
    text       share in which everything holds that the prompt says
"renders" are the scenes themselves (the ceiling), "untouched" the model without the map (the floor).

Trained weights, bytes of the file that a user gets, and seconds a step (one thread's processor time) come from the same
runs. What is finished is kept in the JSON and skipped by the next run, unless the command, the number of
pictures or the model has changed; two runs with different --only can share the work.
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
from collections.abc import Callable
from dataclasses import replace
from itertools import count, product
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

from quality import WORLD, draw  # noqa: E402
from record import record  # noqa: E402

import train  # noqa: E402
from minipic.common import random  # noqa: E402
from minipic.image import to_pictures  # noqa: E402
from minipic.pipeline import Pipeline  # noqa: E402
from minipic.weights import sha256  # noqa: E402
from minipic.world import metrics, probe  # noqa: E402
from minipic.world.caption import PLACE_WORDS, SKY_WORDS, Description, Thing, compare, describe, say  # noqa: E402
from minipic.world.edits import name_of, put, valid  # noqa: E402
from minipic.world.scene import FLOORS, PLACES, SKIES, Object, render, sample_scene  # noqa: E402
from minipic.world.tasks import TASKS  # noqa: E402

STEPS, EDGE = 15, 0.15 * 2      # of drawing; EDGE was chosen on other renders, and pictures span [-1,1]
SUBJECTS = {Object("torus", "green", "large", "striped", "white"): "red",    # and the colour of its class: of things
            Object("cube", "blue", "large", "striped", "yellow"): "red",     # without one the model has seen too few
            Object("cylinder", "red", "large", "checkered", "cyan"): "blue"}
KNOWN_FLOORS, KNOWN_SKIES = list(FLOORS)[:2], list(SKIES)[:2]   # of the photos


class Entry(NamedTuple):
    """A recipe in the table: its task, train.py's flags with the Case's `words` in braces, the steps to measure at,
    the kind of file that it makes (see `load`), and the flags that make it quick."""
    task: str
    flags: str
    counts: tuple
    file: str
    quick: str


PHOTOS = " --data {photos} --warmup 20 "
DREAMBOOTH = "dreambooth" + PHOTOS + '--caption "a sks {shape}" --prior "a {color} {shape}" '
LORA = "--lora-rank 16 --lr 2e-3"
ENTRIES = {
    "DreamBooth, full": Entry("subject", DREAMBOOTH + "--lr 1e-4", (50, 100, 200), "model", "--prior-pictures 1"),
    "DreamBooth, LoRA": Entry("subject", DREAMBOOTH + LORA, (50, 100, 200), "lora", "--prior-pictures 1"),
    "LoRA": Entry("subject", "t2i" + PHOTOS + '--caption "a sks {shape}" --batch 4 --ema 0 --drop 0 ' + LORA,
                  (50, 100, 200), "lora", ""),
    "textual inversion": Entry("subject", "inversion" + PHOTOS + '--caption "a <new>" --like {shape} --vectors 4',
                               (100, 200, 400), "embedding", ""),
    **{f"ControlNet, {name}": Entry("control", f"controlnet --control {name} --balanced --scenes 1000 --warmup 30 "
                                    "--lr 1e-3", (100, 200, 400), "controlnet", "--scenes 4")
       for name in ("edges", "depth", "segmentation")},
}


class Case(NamedTuple):
    """A task with one seed: words for Entry.flags, scores of renders, score(pipeline, entry) -> {measure: number}."""
    words: dict
    renders: dict
    score: Callable


# ---- scores -----------------------------------------------------------------------------------------------------

def share(asked, seen, facts):
    """Share of pictures in which every asked one of these facts holds; Descriptions as in caption.compare."""
    scores = [compare(a, s) for a, s in zip(asked, seen, strict=True)]
    return statistics.mean(all(score[fact][0] == score[fact][1] for fact in facts) for score in scores)


def own_edges(images):
    """Pictures [B,3,H,W] -> bool [B,H,W]: where the right or lower neighbour differs by more than EDGE in a channel."""
    found = torch.zeros(len(images), *images.shape[2:], dtype=torch.bool, device=images.device)
    for dim in (2, 3):
        steep = images.diff(dim=dim).abs().amax(1) > EDGE
        found.narrow(dim - 1, 0, steep.shape[dim - 1]).logical_or_(steep)
    return found


def layout_of(full):
    """What of a full Description a map says."""
    return Description(tuple(Thing(shape=t.shape, size=t.size, place=t.place) for t in full.things), full.relations)


def looks_of(full):
    """What of a full Description the control task's prompts say."""
    things = tuple(Thing(t.color, t.color2, pattern=t.pattern) for t in full.things)
    return Description(things, (), full.floor, full.sky)


def control_scores(judge, images, edges, scenes):
    full, seen = [describe(scene) for scene in scenes], probe.read(judge, images)
    layouts, looks = [layout_of(d) for d in full], [looks_of(d) for d in full]
    facts = probe.accuracy(layouts, seen)
    return {"edge F1": metrics.edge_f1(own_edges(images), edges), "layout": facts["whole"],
            **{fact: facts[fact] for fact in ("shape", "size", "place", "relation")},
            "text": share(looks, seen, ("color", "pattern", "floor", "sky"))}


def subject_scores(judge, images, asked, classes, said):
    """`images` of the subject, its class and other things; Descriptions of what was asked of each, see the top."""
    (mine, plain, others), looks = (probe.read(judge, part) for part in images), ("shape", "color", "pattern")
    return {"identity": share(asked, mine, looks), "setting": share(asked, mine, ("count", "place", "floor", "sky")),
            "class": share(classes, plain, ("whole",)), "leak": share(asked, plain, looks),
            "others": share(said, others, ("whole",))}


# ---- tasks: (seed, pictures, judge, folder, steps of drawing) -> Case ---------------------------------------------

def control(seed, number, judge, folder, steps):
    pairs = {name: TASKS[name]((WORLD, seed), range(number)) for name in ("edges", "depth", "segmentation")}
    scenes, edges = pairs["edges"].scenes, pairs["edges"].truth["edges"]
    prompts = [say(looks_of(describe(scene)), random(WORLD, "say", seed, i)) for i, scene in enumerate(scenes)]

    def score(pipeline, name):
        pairs_of = pairs.get(name.removeprefix("ControlNet, "))
        hints = (pairs_of.source + 1) / 2 if pairs_of else None
        images = draw(pipeline, prompts, 10**6 * seed, steps, hints=hints)
        return control_scores(judge, images, edges, scenes)
    return Case({}, control_scores(judge, pairs["edges"].target, edges, scenes), score)


def placed(it, setting, key):
    """A scene that shows the object `it` alone in a setting: place, floor, sky."""
    for i in count():
        scene = sample_scene(key, i, objects=1)
        o = scene.objects[0]
        scene = put(scene, 0, replace(it, x=o.x, z=o.z, turn=o.turn))
        if valid(scene) and describe(scene).things[0].place == setting[0]:
            return replace(scene, floor=setting[1], sky=setting[2])


def prompt(name, setting):
    place, floor, sky = setting
    return f"a {name} {PLACE_WORDS[place]} on a {floor} floor {SKY_WORDS[sky][0]}"


def subject(seed, number, judge, folder, steps):
    it, color = list(SUBJECTS.items())[seed % len(SUBJECTS)]
    new = [s for s in product(PLACES, FLOORS, SKIES) if s[1] not in KNOWN_FLOORS or s[2] not in KNOWN_SKIES]
    known = [s for s in product(PLACES, FLOORS, SKIES) if s not in new]
    settings = [new[i % len(new)] for i in range(number)]
    photos, drawn = (render([placed(it, s, (WORLD, kind, seed, i)) for i, s in enumerate(wanted)], truth=False).rgb
                     for kind, wanted in (("photo", [known[7 * i % 12] for i in range(5)]), ("asked", settings)))
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(to_pictures(photos)):
        picture.save(folder / f"{i}.png")
    thing = Thing(it.color, it.color2, it.shape, pattern=it.pattern)
    asked, classes = ([Description((replace(t, place=s[0]),), (), *s[1:]) for s in settings]
                      for t in (thing, Thing(color, None, it.shape, pattern="plain")))
    singles = (sample_scene((WORLD, "others"), i, objects=1) for i in count())
    others = [next(s for s in singles if s.objects[0].shape != it.shape) for _ in settings]
    said = [describe(scene) for scene in others]
    prompts = [say(d, random(WORLD, "say", i)) for i, d in enumerate(said)]

    def score(pipeline, name):
        called = {"in words": name_of(thing), "textual inversion": "<new>"}.get(name, f"sks {it.shape}")
        texts = [prompt(words, s) for words in (called, f"{color} {it.shape}") for s in settings] + prompts
        return subject_scores(judge, draw(pipeline, texts, 10**6 * seed, steps).split(number), asked, classes, said)
    truth = subject_scores(judge, [drawn, drawn, render(others, truth=False).rgb], asked, asked, said)
    return Case({"photos": folder, "shape": it.shape, "color": color}, truth | {"class": None, "leak": None}, score)


CASES = {"subject": subject, "control": control}
REFERENCES = {"subject": ("renders", "untouched", "in words"), "control": ("renders", "untouched")}


# ---- training and measuring -------------------------------------------------------------------------------------

def load(model, kind, folder):
    """(the model with what a recipe wrote into `folder`, as a user loads it; the bytes of that)."""
    name = {"lora": "lora", "embedding": "new", "controlnet": "diffusion_pytorch_model", "model": "*/*"}[kind]
    paths = list(folder.glob(f"{name}.safetensors"))
    pipeline = Pipeline.load(folder if kind == "model" else model)
    if kind == "controlnet":
        pipeline.add_control(folder)
    elif kind != "model":
        {"lora": pipeline.add_lora, "embedding": pipeline.add_embedding}[kind](paths[0])
    return pipeline, sum(path.stat().st_size for path in paths)


def run(flags, counts, out):
    """Train with train.py's flags; its finished weights at every one of `counts` are in out/at-COUNT. Returns the
    number of trained weights and the seconds a step."""
    recipe, every, trained, clock = importlib.import_module(train.RECIPES[flags[0]]), math.gcd(*counts), [], []
    shutil.rmtree(out, ignore_errors=True)

    def export(network, config):  # in place of sample pictures, which show the same weights
        clock.append(time.process_time())
        trained.append(sum(p.numel() for p in network.parameters() if p.requires_grad))
        recipe.export(network, out / f"at-{every * len(trained)}", config)
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
        return {"at": {"0": case.renders if name == "renders" else case.score(Pipeline.load(options.model), name)}}
    entry, out = ENTRIES[name], options.runs / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    flags = shlex.split(entry.flags.format(**case.words)) + ["--model", str(options.model), "--seed", str(seed)]
    flags += shlex.split(entry.quick) + ["--batch", "2"] if options.quick else []
    counts = (1, 2) if options.quick else entry.counts
    trained, seconds = run(flags, counts, out)
    row = {"command": shlex.join(["python", "train.py", *flags]), "trained": trained, "seconds a step": seconds,
           "at": {}}
    for steps in counts:
        pipeline, row["bytes"] = load(options.model, entry.file, out / f"at-{steps}")
        row["at"][str(steps)] = case.score(pipeline, name)
    shutil.rmtree(out)
    return row


def kept(path, model):
    """The rows of a JSON that were made with this model."""
    rows = json.loads(path.read_text())["results"] if path.exists() else []
    return [row for row in rows if row["made"]["model"] == model]


def keep(options, model, row):
    """Put a row in its place in the JSON, which another run may have changed meanwhile."""
    order = [*REFERENCES, *sum(REFERENCES.values(), ()), *ENTRIES]
    key = lambda row: (order.index(row["task"]), order.index(row["name"]), row["seed"])
    rows = [old for old in kept(options.out, model) if key(old) != key(row)] + [row]
    record(options.out.with_suffix("").resolve(), sorted(rows, key=key), pictures=options.pictures, seeds=options.seeds)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default="weights/tiny")
    parser.add_argument("--seeds", type=int, default=3)
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
    for seed, task in product(range(options.seeds), dict.fromkeys(ENTRIES[name].task for name in chosen)):
        for name in (*REFERENCES[task], *(name for name in chosen if ENTRIES[name].task == task)):
            flags, counts = ENTRIES[name][1:3] if name in ENTRIES else ("", ())
            made = {"model": model, "pictures": options.pictures, "drawn in": steps, "flags": flags,
                    "counts": list(counts)}
            made = {"task": task, "name": name, "seed": seed, "made": made}
            if any(made.items() <= row.items() for row in kept(options.out, model)):
                continue
            start, row = time.time(), made | measure(make(task, seed), name, options, seed)
            keep(options, model, row)
            print(f"{task}, {name}, seed {seed}: {time.time() - start:.0f} s " + " ".join(
                f"[{step}] " + " ".join(f"{key} {value:.2f}" for key, value in scores.items() if value is not None)
                for step, scores in row["at"].items()), flush=True)


if __name__ == "__main__":
    main()
