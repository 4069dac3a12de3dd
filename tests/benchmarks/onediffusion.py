"""OneDiffusion on the world: what one set of weights does, both ways round, with controls and ablations.

    python tests/benchmarks/onediffusion.py --size cpu [--seeds 1] [--only NAME ...] [--out FILE.json]

Every entry is a training run through train.py's command line, with the VAE and the text encoders of the tiny model.
Then each task is measured on scenes that were never trained on, by world/metrics.py:

    X2image, deblurring, super_resolution, image_inpainting, image_editing, subject_driven: PSNR to the truth in dB
    image2depth     AbsRel and delta1         image2normals   mean angle in degrees
    image2semanticmap, image2boundingbox      mean IoU of the colours that the prompt names
    image2canny     F1 of edges               text2image      share of captions that the judge finds whole
    multiview       PSNR of the last of three views, from one or two, with cameras known or not
    camera_pose     shares of camera centres within 10% and 30% of the distance to the scene
    joint           depth drawn with its picture from words alone: AbsRel to the depth read from that picture
    composed        depth and edges given together, which never were in training: PSNR

"shuffled" is the same with another sample's condition, "copied" what the given picture itself scores. Labels: what
given frames are said to be at, 0 or the last timestep. What is finished is kept in the JSON and skipped by the next
run, unless flags or sizes have changed. Entries come in the order of their importance, all with seed 0 first.
"""

import argparse
import functools
import hashlib
import json
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

from quality import WORLD, requests  # noqa: E402
from record import device, hardware, record  # noqa: E402

import train  # noqa: E402
from minipic.common import computes_bf16  # noqa: E402
from minipic.diffusion.frames import flow_grid, guided, sample_frames  # noqa: E402
from minipic.figures import image_grid  # noqa: E402
from minipic.image import to_pictures  # noqa: E402
from minipic.papers import find_adapter, onediffusion  # noqa: E402
from minipic.papers.sequences import WORLD_TASKS, is_map  # noqa: E402
from minipic.pipeline import Pipeline  # noqa: E402
from minipic.training.checkpoint import find_checkpoint, steps_done  # noqa: E402
from minipic.weights.files import sha256  # noqa: E402
from minipic.world import maps, metrics, probe  # noqa: E402
from minipic.world.camera import eyes  # noqa: E402
from minipic.world.rays import (  # noqa: E402
    DISTANCE, at_distance, cameras_of_frames, frames_of_cameras)
from minipic.world.tasks import TASKS  # noqa: E402

VIEWS = 3
TOGETHER = 32  # drawings
FAR = 50.0  # world units; beyond, a map's grey says little of the depth


class Size(NamedTuple):
    """How much is trained, of all tasks and of few, and how much is measured."""

    flags: str
    all_steps: int
    few_steps: int
    pictures: int
    steps: int


SIZES = {
    "toy": Size("--batch 2 --scenes 24 --warmup 0 --ema 0 --depth 1 --hidden-size 96", 2, 2, 2, 2),
    "cpu": Size("--batch 16 --ema 0.995", 8000, 800, 48, 20),
    "gpu": Size("--batch 64 --lr 1e-3 --lr-schedule constant --ema 0.995", 20000, 800, 96, 20),
}
FEW = "depth2image,normals2image,deblurring"


class Entry(NamedTuple):
    """A training run: train.py's flags, and whether it is as long as the one of all tasks.

    then: flags of a second run, which goes on from the weights of the first.
    """

    flags: str = ""
    long: bool = False
    label: str = "zero"  # in drawing
    then: str = ""


ENTRIES = {
    "all tasks": Entry("--scenes 6000", long=True),
    "all tasks, then shift 3": Entry("--scenes 6000", long=True, then="--shift 3 --lr 1e-3"),
    "three tasks": Entry(f"--tasks {FEW} --scenes 3000"),
    "three tasks, label last": Entry(f"--tasks {FEW} --scenes 3000", label="last"),
    "three tasks, no clean frames": Entry(f"--tasks {FEW} --scenes 3000 --clean 0"),
    "three tasks, no clean frames, label last": Entry(f"--tasks {FEW} --scenes 3000 --clean 0", label="last"),
    "three tasks, one shared t": Entry(f"--tasks {FEW} --scenes 3000 --shared-t"),
    "three tasks, one shared t, no clean frames": Entry(f"--tasks {FEW} --scenes 3000 --shared-t --clean 0"),
    "three tasks, no task token": Entry(f"--tasks {FEW} --scenes 3000 --no-task-token"),
    **{f"single, {task}": Entry(f"--tasks {task} --scenes 2000")
       for task in ("depth2image", "multiview", "normals2image", "deblurring", "semanticmap2image", "canny2image",
                    "subject_driven")},
}


# ---- drawing -------------------------------------------------------------------------------------

class Model(NamedTuple):
    """What draws: a pipeline, a network in it, and how both draw."""

    pipeline: Pipeline
    adapter: onediffusion.Adapter
    steps: int
    label: str
    seed: int

    @torch.no_grad()
    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures [B,3,H,W] -> the means of their latents [B,C,h,w]."""
        mean, _ = self.pipeline.vae.encode(images.to(self.pipeline.device))
        return self.pipeline.vae.scale(mean).float()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.pipeline.vae.decode(self.pipeline.vae.unscale(latents)).float().clamp(-1, 1).cpu()

    @torch.no_grad()
    def draw(self, frames: torch.Tensor, given: list[bool], task: str, texts: list[str], guidance=1.0) -> torch.Tensor:
        """Frames [B,F,C,h,w], some of them given -> all of them, drawn. Row i has the noise of seed + i."""
        is_drawn = ~torch.tensor(given)
        rows = []
        for start in range(0, len(frames), TOGETHER):
            part = frames[start:start + TOGETHER]
            prompts = [onediffusion.full_text(task, text, self.adapter.trained_as.task_token)
                       for text in texts[start:start + TOGETHER]]
            text, mask = onediffusion.encode(self.pipeline, ["", *prompts])
            predict = guided(self.adapter.network, text[1:], mask[1:], text[:1], mask[:1], guidance)
            noise = []
            for i in range(len(part)):
                generator = torch.Generator().manual_seed(10**6 * self.seed + start + i)
                noise.append(torch.randn(part.shape[1:], generator=generator))
            noise = torch.stack(noise).to(part)
            x = torch.where(is_drawn.to(part.device)[:, None, None, None], noise, part)
            on = self.pipeline.device
            with torch.autocast(on.type, torch.bfloat16, enabled=computes_bf16(on)):
                grid = flow_grid(self.steps)
                for x, _ in sample_frames(predict, x, is_drawn, grid, self.label):
                    pass
            rows.append(x)
        return torch.cat(rows)


# ---- scores --------------------------------------------------------------------------------------

class Exam:
    """The questions for one seed, of scenes that nobody has trained on."""

    def __init__(self, seed: int, size: Size, judge):
        self.seed = (WORLD, seed)
        self.count = size.pictures
        self.judge = judge

    @functools.cache
    def pairs(self, task: str, **options):
        return TASKS[WORLD_TASKS[task]](self.seed, range(self.count), **options)

    def scores(self, model: Model) -> dict[str, dict]:
        """{task: scores} of everything that the model was trained for."""
        scores = {}
        for task in model.adapter.trained_as.tasks:
            if task == "text2image":
                scores[task] = self.text(model)
            elif task == "multiview":
                scores |= self.views(model)
            elif task == "subject_driven":
                scores[task] = self.subject(model)
            else:
                scores |= self.pair(model, task)
        tasks = model.adapter.trained_as.tasks
        if "depth2image" in tasks:
            scores["joint"] = self.joint(model)
        if "depth2image" in tasks and "canny2image" in tasks:
            scores["composed"] = self.composed(model)
        return scores

    def pair(self, model: Model, task: str) -> dict:
        """A task of two frames: the wanted picture from the other one and, of maps, the other way."""
        pairs = self.pairs(task)
        both = torch.stack([model.latents(pairs.target), model.latents(pairs.source)], dim=1)
        scores = {task: {"copied": metrics.psnr(pairs.source, pairs.target)}}
        for name, shift in (("PSNR", 0), ("shuffled", 1)):
            frames = both.clone()
            frames[:, 1] = both[:, 1].roll(shift, 0)
            x = model.draw(frames, [False, True], task, pairs.prompts)
            scores[task][name] = metrics.psnr(model.decode(x[:, 0]), pairs.target)
        if is_map(task):
            inverse = {}
            for name, shift in (("", 0), ("shuffled ", 1)):
                frames = both.clone()
                frames[:, 0] = both[:, 0].roll(shift, 0)
                x = model.draw(frames, [True, False], task, pairs.prompts)
                for key, value in map_scores(task, model.decode(x[:, 1]), pairs).items():
                    inverse[name + key] = value
            decoded = map_scores(task, model.decode(both[:, 1]), pairs)  # the best that the VAE allows
            inverse |= {f"through the VAE {key}": value for key, value in decoded.items()}
            scores["image2" + task.removesuffix("2image")] = inverse
        return scores

    def text(self, model: Model) -> dict:
        """The judge's share of captions of one object that are drawn wholly right."""
        _, asked, prompts = requests(1, "any", self.count)
        frames = torch.zeros(self.count, 1, *model.latents(torch.zeros(1, 3, 64, 64)).shape[1:])
        x = model.draw(frames.to(model.pipeline.device), [False], "text2image", prompts, guidance=5.0)
        read = probe.read(self.judge, model.decode(x[:, 0]))
        return {name: value for name, value in probe.accuracy(asked, read).items() if value == value}

    def views(self, model: Model) -> dict:
        """New views from one or two, with cameras known or not, and cameras from views."""
        pairs = self.pairs("multiview", views=VIEWS)
        pictures = pairs.truth["pictures"]
        cameras = torch.stack([at_distance(views) for views in pairs.truth["extrinsics"]])
        latents = model.latents(pictures.flatten(0, 1)).unflatten(0, (-1, VIEWS))
        focal = model.adapter.trained_as.focal
        rays = torch.stack([
            frames_of_cameras(views, focal, *latents.shape[2:4]) for views in cameras]).to(latents)
        both = torch.stack([latents, rays], dim=2).flatten(1, 2)
        texts = [""] * self.count
        wanted = pictures[:, -1]
        scores = {"copied": metrics.psnr(pictures[:, 0], wanted)}
        for known, cameras_known in product((1, 2), (True, False)):
            given = [given for view in range(VIEWS) for given in (view < known, view == 0 or cameras_known)]
            x = model.draw(both, given, "multiview", texts)
            name = f"from {known}, cameras {'known' if cameras_known else 'unknown'}"
            scores[name] = metrics.psnr(model.decode(x[:, 2 * VIEWS - 2]), wanted)
        x = model.draw(both.roll(1, 0), [True, True, False, True, False, True], "multiview", texts)
        scores["shuffled"] = metrics.psnr(model.decode(x[:, 2 * VIEWS - 2]), wanted)

        pose = {}
        given = [True, True] + [True, False] * (VIEWS - 1)
        for name, shift in (("", 0), ("shuffled ", 1)):
            x = model.draw(both.roll(shift, 0), given, "multiview", texts)
            found, truth = [], []
            for frames, views in zip(x[:, 1::2], cameras):
                found.append(eyes(cameras_of_frames(frames, focal))[1:])
                truth.append(eyes(views)[1:])  # the first camera is the frame of all
            accuracy = metrics.camera_accuracy(torch.cat(found), torch.cat(truth), DISTANCE)
            pose |= {name + key: value for key, value in accuracy.items()}
        return {"multiview": scores, "camera_pose": pose}

    def subject(self, model: Model) -> dict:
        """PSNR where the subject is, from one to three pictures of it."""
        scores = {}
        for references in (1, 2, 3):
            pairs = self.pairs("subject_driven", references=references)
            pictures = torch.cat([pairs.target[:, None], pairs.truth["references"]], dim=1)
            latents = model.latents(pictures.flatten(0, 1)).unflatten(0, (-1, references + 1))
            for name, shift in ((f"from {references}", 0), (f"shuffled, {references}", 1)):
                frames = latents.clone()
                frames[:, 1:] = latents[:, 1:].roll(shift, 0)
                x = model.draw(frames, [False] + [True] * references, "subject_driven", pairs.prompts)
                drawn = model.decode(x[:, 0])
                error = (drawn - pairs.target).square().mean(1, keepdim=True)
                inside = pairs.truth["mask"]
                mean = (error * inside).flatten(1).sum(1) / inside.flatten(1).sum(1).clamp_min(1)
                scores[name] = (10 * (4 / mean.clamp_min(1e-12)).log10()).mean().item()
        return scores

    def joint(self, model: Model) -> dict:
        """Picture and depth together from words: does the depth fit the picture, or another one?"""
        pairs = self.pairs("depth2image")
        frames = torch.zeros(self.count, 2, *model.latents(pairs.target[:1]).shape[1:]).to(model.pipeline.device)
        x = model.draw(frames, [False, False], "depth2image", pairs.prompts, guidance=3.0)
        again = model.draw(x, [True, False], "depth2image", pairs.prompts)
        read = maps.picture_to_depth(model.decode(again[:, 1]))
        read = read.where(read < FAR, torch.inf)  # the sky is nearly black, not quite
        drawn = maps.picture_to_depth(model.decode(x[:, 1])).clamp(max=FAR)
        return {"abs_rel": metrics.depth_errors(drawn, read)["abs_rel"],
                "shuffled abs_rel": metrics.depth_errors(drawn.roll(1, 0), read)["abs_rel"]}

    def composed(self, model: Model) -> dict:
        """Two conditions that were never trained together, beside each alone."""
        depth = self.pairs("depth2image")
        edges = self.pairs("canny2image")  # of the same scenes
        latents = [model.latents(images) for images in (depth.target, depth.source, edges.source)]
        scores = {}
        for name, task, kept in (("both", "depth2image]] [[canny2image", (0, 1, 2)),
                                 ("depth", "depth2image", (0, 1)), ("edges", "canny2image", (0, 2))):
            frames = torch.stack([latents[i] for i in kept], dim=1)
            x = model.draw(frames, [False] + [True] * (len(kept) - 1), task, depth.prompts)
            scores[name] = metrics.psnr(model.decode(x[:, 0]), depth.target)
        return scores


def map_scores(task: str, pictures: torch.Tensor, pairs) -> dict[str, float]:
    """Scores of drawn maps [B,3,H,W] against the exact truth."""
    truth = pairs.truth
    if task == "depth2image":
        depth = truth["depth"].where(truth["depth"] < FAR, torch.inf)  # which does not count
        return metrics.depth_errors(maps.picture_to_depth(pictures).clamp(max=FAR), depth)
    if task == "normals2image":
        return {"degrees": metrics.normal_angle(maps.picture_to_normals(pictures), truth["normals"])}
    if task == "canny2image":
        return {"F1": metrics.edge_f1(maps.picture_to_edges(pictures), truth["edges"])}
    colors = truth["colors"]
    labels = truth.get("labels")
    if task == "boundingbox2image":
        colors = [["black", *names] for names in colors]
        labels = maps.picture_to_labels(pairs.source, colors)
    found = maps.picture_to_labels(pictures, colors)
    shares = [metrics.mean_iou(own, right) for own, right in zip(found, labels)]
    return {"mIoU": sum(shares) / len(shares)}


# ---- one entry -----------------------------------------------------------------------------------

def train_flags(entry: Entry, seed: int, options) -> list[list[str]]:
    """train.py's flags of the one or two runs of an entry."""
    size = SIZES[options.size]
    steps = size.all_steps if entry.long else size.few_steps
    own = entry.flags
    if options.size == "toy":  # all pictures are drawn in seconds
        own = own.replace("--scenes 6000", "").replace("--scenes 3000", "").replace("--scenes 2000", "")
    where = f"--model {options.model} --sample-every 0"
    runs = [shlex.split(f"{size.flags} {own} --steps {steps} --seed {seed} {where}")]
    if entry.then:  # half as long, on other scenes
        first = f"--start {folder_of(runs[0], options)}/model"
        runs.append(shlex.split(
            f"{size.flags} {own} {entry.then} {first} --steps {steps // 2} --seed {seed + 1} {where}"))
    return runs


def folder_of(flags: list[str], options) -> Path:
    return options.runs / hashlib.sha256(" ".join(flags).encode()).hexdigest()[:12]


def measure(name: str, seed: int, options, exam: Exam) -> dict:
    """Train an entry, or take the weights of one that has the same flags; then draw and score."""
    entry = ENTRIES[name]
    seconds, steps = None, 0
    for flags in train_flags(entry, seed, options):
        out = folder_of(flags, options)
        start = time.process_time()
        if not (out / "model" / "config.json").exists():
            train_for(options.minutes, flags, out)
            shutil.rmtree(out / "checkpoints")
            seconds = time.process_time() - start  # of the last run; None if it was there
        log = (out / "log.jsonl").read_text().splitlines()
        steps += json.loads(log[-1])["step"]  # the last that was logged
    pipeline = Pipeline.load(options.model, torch.float32, device())
    _, file = find_adapter(out / "model")
    adapter = onediffusion.load_adapter(pipeline, file)
    model = Model(pipeline, adapter, SIZES[options.size].steps, entry.label, seed)
    figure = options.runs / "figures" / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.png"
    save_figure(figure, model, exam)
    return {"training seconds": seconds, "steps of training": steps, "parameters": sum(p.numel() for p in adapter.network.parameters()),
            "trained as": asdict(adapter.trained_as), "scores": exam.scores(model)}


def train_for(minutes: float | None, flags: list[str], out: Path):
    """Train with train.py's flags, or go on; after so many minutes stop, and write the weights of then.

    Before the end of the data's preparation nothing is there to write: then the program ends.
    """
    finished = out / "model" / "config.json"
    command = ["onediffusion", *flags, "--out", str(out)]
    resume = ["--resume", "latest"] if (out / "checkpoints").exists() else []
    stop = threading.Timer(60 * (minutes or 0), os.kill, (os.getpid(), signal.SIGINT))
    stop.daemon = True
    if minutes:
        stop.start()
    code = train.main([*command, *resume])
    stop.cancel()
    if not code and minutes and not finished.exists() and (out / "checkpoints").exists():
        last = find_checkpoint("latest", out / "checkpoints", print)
        code = train.main([*command, "--resume", "latest", "--steps", str(steps_done(last))])
    if code or not finished.exists():
        raise SystemExit(code)


def save_figure(path: Path, model: Model, exam: Exam, rows: int = 2):
    """Of every task of two frames, two samples: what is given, drawn and wanted."""
    pictures, labels = [], []
    for task in model.adapter.trained_as.tasks:
        if task in ("text2image", "multiview", "subject_driven"):
            continue
        pairs = exam.pairs(task)
        both = torch.stack([model.latents(pairs.target[:rows]), model.latents(pairs.source[:rows])], dim=1)
        for given in ([False, True], [True, False])[:2 if is_map(task) else 1]:
            x = model.draw(both, given, task, pairs.prompts[:rows])
            drawn = model.decode(x[:, given.index(False)])
            own, wanted = (pairs.source, pairs.target) if given[1] else (pairs.target, pairs.source)
            for i in range(min(rows, len(drawn))):
                pictures += to_pictures(torch.stack([own[i], drawn[i], wanted[i]]))
                labels += [task, pairs.prompts[i], "wanted"]
    if pictures:
        path.parent.mkdir(parents=True, exist_ok=True)
        image_grid(pictures, labels, columns=6).save(path)


# ---- the table -----------------------------------------------------------------------------------

def kept(path: Path) -> list[dict]:
    return json.loads(path.read_text())["results"] if path.exists() else []


def place(row: dict) -> tuple:
    """Where a row stands in the table. No other row has the same."""
    return list(ENTRIES).index(row["name"]), row["seed"]


def keep(options, row: dict):
    """Put a row in its place in the JSON, which another run may have changed meanwhile."""
    rows = [old for old in kept(options.out) if old["name"] in ENTRIES and place(old) != place(row)] + [row]
    rows.sort(key=place)
    record(options.out.with_suffix("").resolve(), rows, size=options.size, seeds=options.seeds)


def main(argv: list[str] | None = None, after: Callable = print):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--model", type=Path, default=Path("weights/tiny"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop the training of an entry so long after its start, and "
                        "measure what it has learned")
    parser.add_argument("--only", action="append", metavar="NAME",
                        help="entries whose name begins so, repeatable: " + "; ".join(ENTRIES))
    parser.add_argument("--out", type=Path, help="the JSON: onediffusion.json beside this file, with -gpu for that "
                        "size, or RUNS/toy.json")
    parser.add_argument("--runs", type=Path, default=Path("runs/onediffusion-benchmark"))
    options = parser.parse_args(argv)
    names = {"toy": options.runs / "toy.json", "cpu": Path(__file__).with_suffix(".json"),
             "gpu": Path(__file__).with_name("onediffusion-gpu.json")}
    options.out = options.out or names[options.size]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    size = SIZES[options.size]
    hashes = map(sha256, sorted(options.model.rglob("*.safetensors")))
    model = hashlib.sha256("".join(hashes).encode()).hexdigest()
    chosen = [name for name in ENTRIES if not options.only or name.startswith(tuple(options.only))]
    judge_folder = options.model / "judge"
    judge = probe.load_judge(judge_folder if judge_folder.exists() else ROOT / "weights" / "tiny" / "judge")
    make_exam = functools.cache(lambda seed: Exam(seed, size, judge))

    seeds = range(options.first_seed, options.first_seed + options.seeds)
    for seed, name in product(seeds, chosen):
        first, *second = train_flags(ENTRIES[name], seed, options)
        made = {"model": model, "flags": first, "label": ENTRIES[name].label,
                "pictures": size.pictures, "steps": size.steps}
        if second:
            made["then"] = second[0]
        row = {"name": name, "seed": seed, "made": made}
        if any(row.items() <= old.items() for old in kept(options.out)):
            continue
        start = time.process_time()
        row |= measure(name, seed, options, make_exam(seed))
        row |= {**hardware(), "processor seconds": time.process_time() - start}
        keep(options, row)
        after(f"{name}, seed {seed}: {row['processor seconds']:.0f} s {json.dumps(row['scores'])}")


if __name__ == "__main__":
    main()
