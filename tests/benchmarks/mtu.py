"""MTU on four tasks of the world: does cutting feed-forwards into experts help, and at which scale?

    python tests/benchmarks/mtu.py --size cpu [--seeds 3] [--only NAME ...] [--out FILE.json]

Every entry is a training run through train.py's command line, from the tiny model. Then each task
is folded into an ordinary UNet and measured on scenes that were never trained on:

    t2i      share of captions, of one and of two objects, whose drawing the judge finds right
    edit     changed, kept, edited, PSNR: see cases.py
    sr       PSNR to the truth in dB, of the drawing and of the given picture itself ("copied")
    inpaint  PSNR to the truth in dB inside the hole and of the whole, of drawing and given picture
    loss     of all: the denoising loss at three timesteps, with the same noise in every entry

The guidances are 5 for t2i, 3 and 1.5 by the picture for edit and inpaint, none for sr. What is
finished is kept in the JSON and skipped by the next run, unless flags or sizes have changed. The
entries come in the order of their importance, all with seed 0 first: stop whenever there is no time
left. `cost` measures latency, parameters and operations side by side. RUNS/ gets figures: what is
given, drawn and wanted; the weights of the experts; the losses of both scales over the steps.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import io
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

from cases import edit_scores  # noqa: E402
from quality import WORLD, draw, requests  # noqa: E402
from record import device, hardware, record  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import train  # noqa: E402
from minipic.figures import image_grid, running_average  # noqa: E402
from minipic.image import to_pictures  # noqa: E402
from minipic.layers import lora  # noqa: E402
from minipic.layers.moe import MoE, select, upcycle  # noqa: E402
from minipic.models.unet import SD15, SDXL_BASE, UNet  # noqa: E402
from minipic.papers import mtu  # noqa: E402
from minipic.pipeline import Pipeline  # noqa: E402
from minipic.weights.files import sha256  # noqa: E402
from minipic.weights.layouts import build_empty  # noqa: E402
from minipic.world import metrics, probe  # noqa: E402
from minipic.world.tasks import TASKS  # noqa: E402

TIMESTEPS = (200, 600, 800)  # of the losses that are compared
LORA_RANK = 16
GUIDANCE = {"t2i": (5.0, 1.0), "edit": (3.0, 1.5), "sr": (1.0, 1.0), "inpaint": (3.0, 1.5)}
ALL = "t2i,edit,sr,inpaint"


class Size(NamedTuple):
    """How much is trained and measured."""

    flags: str      # of train.py
    pictures: int   # drawings of each task
    steps: int      # of a drawing


SIZES = {
    "toy": Size("--steps 2 --batch 2 --scenes 4 --warmup 0 --ema 0", 4, 2),
    "cpu": Size("--steps 200 --batch 8 --scenes 800 --ema 0.98", 40, 10),
    "gpu": Size("--steps 200 --batch 32 --scenes 1000 --ema 0.98", 200, 20),
}


class Entry(NamedTuple):
    """A training run: train.py's flags, and which of the upcycled parameters train (see PARTS)."""

    flags: str
    part: str = "all"


ENTRIES = {
    "MTU, N=1": Entry("--experts 1"),
    "MTU, N=4, scale N": Entry("--experts 4"),
    "MTU, N=4, scale 1": Entry("--experts 4 --scale 1"),
    **{f"single, {task}": Entry(f"--experts 1 --tasks {task}") for task in ALL.split(",")},
    "MTU, N=2, scale N": Entry("--experts 2"),
    "MTU, N=2, scale 1": Entry("--experts 2 --scale 1"),
    "MTU, N=8, scale N": Entry("--experts 8"),
    "MTU, N=8, scale 1": Entry("--experts 8 --scale 1"),
    "shared": Entry("--experts 1", "shared"),
    "norms alone": Entry("--experts 1", "norms"),
    **{f"LoRA, {task}": Entry(f"--experts 1 --tasks {task} --lr 2e-3", "lora")
       for task in ALL.split(",")},
    **{f"pair, {pair}": Entry(f"--experts 1 --tasks {pair}")
       for pair in ("edit,inpaint", "t2i,edit", "edit,sr", "sr,inpaint")},
}


# ---- what trains ---------------------------------------------------------------------------------

def every_part(pipeline, params):
    return params


def shared_part(pipeline, params):
    """One model for all tasks: no task has norms of its own. Only conv_in knows the task."""
    return named(pipeline.unet, lambda name: ".ff.net." in name or name.startswith("conv_in."))


def norms_part(pipeline, params):
    """The feed-forwards stay as they are, as in the run that the paper reports to fail."""
    return named(pipeline.unet, lambda name: ".norm3." in name or name.startswith("conv_in."))


def lora_part(pipeline, params):
    """LoRAs on the feed-forwards, in place of the feed-forwards themselves."""
    others = norms_part(pipeline, params)
    layers = r".*\.ff\.net\.(0\.proj|2)"
    return lora.inject(pipeline.unet, LORA_RANK, match=layers) + others


def named(unet, is_chosen: Callable) -> list:
    return [param for name, param in unet.named_parameters() if is_chosen(name)]


PARTS = {"all": every_part, "shared": shared_part, "norms": norms_part, "lora": lora_part}


# ---- scores --------------------------------------------------------------------------------------

class Exam:
    """The questions for one seed: what is given and asked, and what is right."""

    def __init__(self, seed: int, size: Size, judge):
        self.seed = seed
        self.size = size
        self.judge = judge
        number = range(size.pictures)
        self.requests = {}
        for name, objects in (("one object", 1), ("two objects", 2)):
            _, asked, prompts = requests(objects, "any", max(1, size.pictures // 2))
            self.requests[name] = asked, prompts
        self.pairs = {}
        for task, world in mtu.WORLD_TASKS.items():
            if world:
                self.pairs[task] = TASKS[world]((WORLD, seed), number)

    def prompts(self, task: str) -> list[str]:
        if task == "t2i":
            return [prompt for _, prompts in self.requests.values() for prompt in prompts]
        return [""] * self.size.pictures if task == "sr" else self.pairs[task].prompts

    def answer(self, pipeline: Pipeline, task: str) -> torch.Tensor:
        """What a pipeline draws, whose UNet is that of the task: [B,3,H,W]."""
        guidance, image_guidance = GUIDANCE[task]
        source = self.pairs[task].source if task in self.pairs else None
        return draw(
            pipeline, self.prompts(task), 10**6 * self.seed, self.size.steps, guidance,
            image_guidance, edits=source)

    def scores(self, task: str, images: torch.Tensor) -> dict[str, float]:
        if task == "t2i":
            parts = images.split(len(images) // 2)
            scores = {}
            for (name, (asked, _)), part in zip(self.requests.items(), parts):
                scores[name] = probe.accuracy(asked, probe.read(self.judge, part))["whole"]
            return scores
        pairs = self.pairs[task]
        if task == "edit":
            return edit_scores(
                self.judge, images, pairs.scenes, pairs.truth["kinds"], pairs.target)
        scores = {"PSNR": metrics.psnr(images, pairs.target)}
        if task == "inpaint":
            scores["PSNR in the hole"] = masked_psnr(images, pairs.target, pairs.truth["mask"])
        return scores

    def copied(self) -> dict:
        """The scores of the given pictures as they are."""
        scores = {}
        for task, pairs in self.pairs.items():
            scores[task] = self.scores(task, pairs.source)
        return scores


def masked_psnr(images: torch.Tensor, truth: torch.Tensor, mask: torch.Tensor) -> float:
    """`metrics.psnr` of the pixels where mask [B,1,H,W] is true: the mean over the pictures."""
    values = []
    for image, right, inside in zip(images, truth, mask):
        inside = inside.expand_as(image)
        values.append(metrics.psnr(image[inside][None, None], right[inside][None, None]))
    return sum(values) / len(values)


@torch.no_grad()
def held_out_losses(pipeline: Pipeline, config, task: str, batch: dict) -> dict[str, float]:
    """{timestep: loss} of an upcycled UNet, on pictures and noise that all entries share."""
    device = pipeline.device
    batch = train.to_device(batch, device)
    losses = {}
    for t in TIMESTEPS:
        own = batch | {"t": torch.full_like(batch["t"], t)}
        network = functools.partial(mtu.predict, pipeline.unet, task, own.get("source"))
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            losses[str(t)] = mtu.denoising_loss(pipeline, own, config, network).item()
    return losses


def router_weights(unet, tasks) -> dict[str, list]:
    """{task: the weights of the experts in each layer}."""
    weights = {}
    for task in tasks:
        select(unet, task)
        layers = [layer for layer in unet.modules() if isinstance(layer, MoE)]
        weights[task] = [layer.expert_weights().tolist() for layer in layers]
    return weights


# ---- one entry -----------------------------------------------------------------------------------

@functools.cache
def all_data(model: str, seed: int, scenes: int, precision: str):
    """The data of all four tasks, which every entry of a seed shares; and a batch to compare on."""
    config = mtu.Settings(model=model, seed=seed, scenes=scenes, precision=precision)
    pipeline = mtu.build(config).to(device())
    unseen = replace(config, seed=WORLD, scenes=min(scenes, 64), caption_dropout=0.0)
    batch = mtu.TasksData(pipeline, unseen).batch(0, range(unseen.scenes))
    return mtu.TasksData(pipeline, config), batch


def data_of(pipeline: Pipeline, config):
    """mtu.data, from what is there already: what a task gets does not depend on the others."""
    whole, _ = all_data(config.model, config.seed, config.scenes, config.precision)
    data = copy.copy(whole)
    data.trained_as = mtu.trained_as(config)
    data.tasks = {task: whole.tasks[task] for task in mtu.task_names(config)}
    data.examples = {task: whole.examples[task] for task in mtu.task_names(config)}
    return data


def measure(name: str, seed: int, options, exam: Exam) -> dict:
    """Train and measure one entry."""
    entry, size = ENTRIES[name], SIZES[options.size]
    out = options.runs / f"{name.replace(', ', '-').replace(' ', '-').replace(',', '+')}-{seed}"
    shutil.rmtree(out, ignore_errors=True)
    flags = shlex.split(f"{size.flags} {entry.flags}")
    flags = ["mtu", "--model", str(options.model), "--seed", str(seed), *flags]
    row = {"command": shlex.join(["python", "train.py", *flags]), "part": entry.part}
    own_setup = mtu.setup
    clock = []

    def setup(pipeline, config):
        params = PARTS[entry.part](pipeline, own_setup(pipeline, config))
        row["trained"] = sum(param.numel() for param in params)
        return params

    def export(pipeline, folder, config, data):
        """In place of the file: the exam. The weights are the averaged ones."""
        clock.append(time.process_time())
        lora.merge(pipeline.unet)
        _, batch = all_data(config.model, seed, config.scenes, config.precision)
        tasks = mtu.task_names(config)
        row["held-out loss"] = {}
        row["scores"] = {}
        row["router"] = router_weights(pipeline.unet, tasks)
        for task in tasks:
            losses = held_out_losses(pipeline, config, task, batch[task])
            row["held-out loss"][task] = losses
            with mtu.drawing_with(pipeline, mtu.fold(pipeline.unet, task)):
                images = exam.answer(pipeline, task)
            row["scores"][task] = exam.scores(task, images)
            save_pictures(options.runs / "figures" / f"{out.name}-{task}.png", exam, task, images)

    def first_data(pipeline, config):
        data = data_of(pipeline, config)
        clock.append(time.process_time())
        return data

    with (mock.patch.object(mtu, "setup", setup), mock.patch.object(mtu, "export", export),
          mock.patch.object(mtu, "data", first_data),
          contextlib.redirect_stdout(io.StringIO())):
        code = train.main([*flags, "--sample-every", "0", "--save-every", "1000000", "--out",
                           str(out)])
    if code or len(clock) < 2:
        sys.exit(code or "stopped; the same command starts this entry's training anew")
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    row["seconds a step"] = (clock[1] - clock[0]) / rows[-1]["step"]
    row["loss"] = [[log["step"], *(log[task] for task in row["scores"])] for log in rows]
    shutil.rmtree(out)
    return row


def untouched(options, exam: Exam) -> dict:
    """The model before training, and the given pictures as they are."""
    pipeline = Pipeline.load(options.model, device=device())
    scores = {"t2i": exam.scores("t2i", exam.answer(pipeline, "t2i"))}
    return {"scores": scores | exam.copied()}


# ---- cost ----------------------------------------------------------------------------------------

def cost(options) -> dict:
    """Latency, parameters and operations of a UNet step, as it was, upcycled and folded."""
    from side_by_side import measure as seconds_of

    base = Pipeline.load(options.model).unet
    unet = Pipeline.load(options.model).unet
    tasks = ALL.split(",")
    upcycle(unet, tasks, 4)
    for layer in unet.modules():
        if isinstance(layer, MoE):
            torch.nn.init.normal_(layer.router[2].weight)
    folded = mtu.fold(unet, "edit")
    select(unet, "edit")
    given = step_inputs(base.config, "cpu", batch=2)
    source = torch.randn_like(given[0])

    @torch.no_grad()
    def call(network, x):
        network(x, *given[1:])

    both = torch.cat([given[0], source], dim=1)
    works = {"before": lambda: call(base, given[0]), "folded": lambda: call(folded, both),
             "upcycled": lambda: call(unet, both)}
    result = {"seconds a step": seconds_of(works, 3 if options.size == "toy" else 30)}
    count = {"before": base, "folded": folded, "upcycled": unet}
    result["parameters"] = {name: sum(param.numel() for param in network.parameters())
                            for name, network in count.items()}
    result["parameters of four models"] = 4 * result["parameters"]["folded"]
    configs = {"tiny": base.config}
    if options.size != "toy":
        configs |= {"SD 1.5": SD15, "SDXL": SDXL_BASE}
    result["operations"] = {name: operations(config) for name, config in configs.items()}
    return result


def step_inputs(config, device, batch=1) -> list:
    """x, t, context, pooled and size_ids of a step on a picture of 512x512, or the tiny model's."""
    side = min(config.sample_size, 64)
    shapes = [(4, side, side), None, (77, config.cross_attention_dim)]
    if config.addition_embed_type:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        shapes += [(pooled,), (6,)]
    made = [torch.zeros(batch, *(shape or ()), device=device) for shape in shapes]
    return made


def operations(config) -> dict[str, float]:
    """Tera-operations of a step, before and after: all, and those of layers with weights.

    The paper's TFLOPs (SD 1.5: 0.67 and 0.68, SDXL: 1.53 and 1.54) are the latter.
    """
    x, *others = step_inputs(config, "meta")
    unet = build_empty(UNet, config)

    def count(x):
        with FlopCounterMode(display=False) as counter:
            unet(x, *others)
        products = counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)
        total = counter.get_total_flops()
        return {"all": total / 1e12, "with weights": (total - products) / 1e12}

    before = count(x)
    build_empty(lambda unet: upcycle(unet, ALL.split(","), 4), unet)
    unet.requires_grad_(True)  # or PyTorch takes other products for the layers that are frozen
    select(unet, "edit")
    return {"before": before, "after": count(torch.cat([x, x], dim=1))}


# ---- figures -------------------------------------------------------------------------------------

def save_pictures(path: Path, exam: Exam, task: str, images: torch.Tensor, rows: int = 4):
    """What is given, drawn and wanted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prompts = exam.prompts(task)
    drawn = to_pictures(images[:rows])
    pictures, labels = [], []
    for i, picture in enumerate(drawn):
        if task == "t2i":
            pictures.append(picture)
            labels.append(prompts[i])
            continue
        given, wanted = to_pictures(torch.stack([exam.pairs[task].source[i],
                                                 exam.pairs[task].target[i]]))
        pictures += [given, picture, wanted]
        labels += ["given", prompts[i], "wanted"]
    image_grid(pictures, labels, columns=2 if task == "t2i" else 3).save(path)


def router_figure(weights: dict[str, list], cell: int = 28) -> Image.Image:
    """A row for each task, in it a block for each layer, a column for each expert; 1 is blue."""
    tasks = list(weights)
    layers = len(weights[tasks[0]])
    experts = len(weights[tasks[0]][0])
    left, top = 80, 24
    width = left + layers * (experts * cell // 2 + 8)
    sheet = Image.new("RGB", (width, top + len(tasks) * cell + 8), "white")
    pen = ImageDraw.Draw(sheet)
    for row, task in enumerate(tasks):
        y = top + row * cell
        pen.text((8, y + cell // 4), task, fill="black")
        for layer in range(layers):
            x = left + layer * (experts * cell // 2 + 8)
            pen.text((x, 6), f"{layer + 1}", fill="black")
            for expert, weight in enumerate(weights[task][layer]):
                level = round(255 * (1 - weight))
                corner = x + expert * cell // 2
                box = [corner, y, corner + cell // 2 - 2, y + cell - 2]
                pen.rectangle(box, fill=(level, level, 255), outline="lightgrey")
    return sheet


def loss_figure(curves: dict[str, list]) -> Image.Image:
    """Running averages of the summed losses over the steps. curves: {name: rows of "loss"}."""
    colors = ("navy", "crimson", "seagreen", "darkorange", "purple", "grey", "teal")
    width, height, margin = 720, 400, 60
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    lines = {}
    for name, rows in curves.items():
        steps = [row[0] for row in rows]
        lines[name] = steps, running_average([sum(row[1:]) for row in rows])
    high = max(max(values) for _, values in lines.values())
    low = min(min(values) for _, values in lines.values())
    last = max(steps[-1] for steps, _ in lines.values())
    for number, (name, (steps, values)) in enumerate(lines.items()):
        points = []
        for step, value in zip(steps, values):
            x = margin + step / last * (width - 2 * margin)
            y = height - margin - (value - low) / ((high - low) or 1) * (height - 2 * margin)
            points.append((x, y))
        color = colors[number % len(colors)]
        pen.line(points, fill=color, width=2)
        pen.text((width - 220, 20 + 16 * number), name, fill=color)
    pen.text((8, margin - 6), f"{high:.3f}", fill="black")
    pen.text((8, height - margin - 6), f"{low:.3f}", fill="black")
    pen.text((width - margin - 40, height - margin + 8), f"step {last}", fill="black")
    return sheet


def save_figures(options, rows: list[dict]):
    """The figures of what is in the JSON, with seed 0."""
    folder = options.runs / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    curves = {}
    for row in rows:
        if row["seed"] or not row["name"].startswith("MTU"):
            continue
        curves[row["name"]] = row["loss"]
        if len(row["router"]["t2i"][0]) > 1:
            name = row["name"].replace(", ", "-").replace(" ", "-")
            router_figure(row["router"]).save(folder / f"router-{name}.png")
    if curves:
        loss_figure(curves).save(folder / "loss-of-scales.png")


# ---- the table -----------------------------------------------------------------------------------

def kept(path: Path, model: str) -> list[dict]:
    """The rows of a JSON that were made with this model."""
    rows = json.loads(path.read_text())["results"] if path.exists() else []
    return [row for row in rows if row["made"]["model"] == model]


def place(row: dict) -> tuple:
    """Where a row stands in the table. No other row has the same."""
    return ["untouched", "cost", *ENTRIES].index(row["name"]), row["seed"]


def keep(options, model: str, row: dict) -> list[dict]:
    """Put a row in its place in the JSON, which another run may have changed meanwhile."""
    rows = [old for old in kept(options.out, model) if place(old) != place(row)] + [row]
    rows.sort(key=place)
    record(options.out.with_suffix("").resolve(), rows, size=options.size, seeds=options.seeds)
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--model", type=Path, default="weights/tiny")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", action="append", metavar="NAME", help="entries whose name begins "
                        "so, repeatable: " + "; ".join(("untouched", "cost", *ENTRIES)))
    parser.add_argument("--out", type=Path, help="the JSON: mtu.json beside this file, with -gpu "
                        "for that size, or RUNS/toy.json")
    parser.add_argument("--runs", type=Path, default="runs/mtu-benchmark")
    options = parser.parse_args(argv)
    names = {"toy": options.runs / "toy.json", "cpu": Path(__file__).with_suffix(".json"),
             "gpu": Path(__file__).with_name("mtu-gpu.json")}
    options.out = options.out or names[options.size]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    size = SIZES[options.size]
    hashes = map(sha256, sorted(options.model.rglob("*.safetensors")))
    model = hashlib.sha256("".join(hashes).encode()).hexdigest()
    chosen = []
    for name in ("untouched", "cost", *ENTRIES):
        if not options.only or name.startswith(tuple(options.only)):
            chosen.append(name)
    make_exam = functools.cache(
        lambda seed: Exam(seed, size, probe.load_judge(options.model / "judge")))

    seeds = range(options.first_seed, options.first_seed + options.seeds)
    for seed, name in product(seeds, chosen):
        if name == "cost" and seed:
            continue
        flags = ENTRIES[name].flags if name in ENTRIES else ""
        made = {"model": model, "size": list(size), "flags": flags}
        row = {"name": name, "seed": seed, "made": made}
        if any(row.items() <= old.items() for old in kept(options.out, model)):
            continue
        start = time.process_time()
        if name == "cost":
            row |= cost(options)
        elif name == "untouched":
            row |= untouched(options, make_exam(seed))
        else:
            row |= measure(name, seed, options, make_exam(seed))
        row |= {**hardware(), "processor seconds": time.process_time() - start}
        save_figures(options, keep(options, model, row))
        print(f"{name}, seed {seed}: {row['processor seconds']:.0f} s "
              f"{json.dumps(row.get('scores', row.get('seconds a step')))}", flush=True)


if __name__ == "__main__":
    main()
