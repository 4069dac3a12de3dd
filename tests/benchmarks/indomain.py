"""In-domain generation against its rivals: is the caption still drawn, and is it drawn in the domain?

    python tests/benchmarks/indomain.py [--size toy|cpu|gpu] [--seeds 3] [--only NAME ...] [--out FILE.json]

The domain is mosaic, which no base model has seen and the judge reads. Every entry trains once a seed through train.py's
command line on the same pictures, and is measured at several step counts (the middle of that one run) and weights:

    whole      share of drawings in which the judge reads everything that the caption says
    frechet    distance of the judge's features to those of true mosaics of other scenes
    style      distance of early features' Gram matrix to the mean one of true mosaics of other scenes, mean
    diversity  distance of the features of two drawings of one caption, mean: small where a model has collapsed

and, of a model that was trained, the paper's two causes, on noised pictures of the world, mean over noise levels:

    drift      its prediction for the null text against the base model's, relative to that one's norm
    forgotten  1 - cosine of its guidance (with the caption - without) and the base model's

and the applications, by the trained domain, each through the paper's own `draw`, all with `style`:

    edit         true mosaics before an edit, redrawn at strength 0.6 with the caption of after it: what should change, did
                 (`changed`), and what should not, did not (`kept`; see cases.py)
    translation  the shipped ControlNet's edges and a prompt of colours: `layout` and `text` as in cases.py
    object       turntables of "a large COLOR SHAPE": share of views of which the judge reads both (`whole`)

"renders" are true mosaics (the ceiling). What is finished is kept in the JSON and skipped by the next run, unless size,
command or model have changed; two runs with different --only can share the work.
"""

import argparse
import hashlib
import json
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

from baselines import load, run  # noqa: E402
from cases import control_scores, edit_scores, looks_of  # noqa: E402
from quality import WORLD, requests  # noqa: E402
from record import device, hardware, record  # noqa: E402

from minipic.common import computes_bf16, rng  # noqa: E402
from minipic.diffusion.samplers import SAMPLERS  # noqa: E402
from minipic.draw_settings import DrawSettings  # noqa: E402
from minipic.image import to_pictures, to_tensor  # noqa: E402
from minipic.latents import encode_pictures  # noqa: E402
from minipic.layers.nulltext import NullTextUNet  # noqa: E402
from minipic.papers.indomain import (  # noqa: E402
    Adapter, Term, build_domain, load_adapter, multi_guidance)
from minipic.papers.indomain import draw as draw_paper  # noqa: E402
from minipic.pipeline import Pipeline, SeededNoise  # noqa: E402
from minipic.text import Conditioning, encode_prompts  # noqa: E402
from minipic.weights.files import sha256  # noqa: E402
from minipic.world import probe  # noqa: E402
from minipic.world.caption import caption, describe, say  # noqa: E402
from minipic.world.pictures import Picture  # noqa: E402
from minipic.world.scene import render, sample_scene  # noqa: E402
from minipic.world.styles import STYLES  # noqa: E402
from minipic.world.tasks import TASKS  # noqa: E402

DOMAIN = "mosaic"
SHADE, WORDS = STYLES[DOMAIN]
CONSTANT = "a picture"  # the caption of all pictures, where they share one
WITH_WORDS = "{}, " + WORDS
LEVELS = (100, 300, 500, 700, 900)  # timesteps at which drift is measured


class Size(NamedTuple):
    """How much is spent."""
    scenes: int    # pictures of the domain
    pictures: int  # drawn for each number, two of each caption
    steps: int     # of drawing
    counts: tuple  # steps of training, at which is measured
    ways: int      # of drawing, of each entry: its first ones
    applied: tuple[int, int, int]  # pictures of each application, objects, and steps / 10 for each object


SIZES = {"toy": Size(8, 8, 2, (1, 2), 2, (2, 1, 1)), "cpu": Size(1000, 160, 12, (50, 150, 400), 4, (32, 2, 20)),
         "gpu": Size(1000, 256, 20, (50, 150, 500), 6, (16, 1, 20))}


class Made(NamedTuple):
    """The base model, and what an entry has trained: a model (the base if none), or a null-text UNet."""
    base: Pipeline
    own: Pipeline
    domain: NullTextUNet | None


# ---- ways to draw: (Made, text) -> Terms; text(template) reads captions, text(None) the null text -----------------

def ordinary(guidance, template="{}"):
    """Classifier-free guidance by the entry's own model."""
    def terms(made, text):
        return [Term(made.own.unet, text(None)), Term(made.own.unet, text(template), guidance)]
    return terms


def from_base(guidance, template="{}"):
    """The same, measured from the base model's prediction for the null text."""
    def terms(made, text):
        return [Term(made.base.unet, text(None)), Term(made.own.unet, text(template), guidance)]
    return terms


def decoupled(w_d, w_c):
    """The paper's three predictions."""
    def terms(made, text):
        return [Term(made.base.unet, text(None)), Term(made.domain, Conditioning(None), w_d),
                Term(made.base.unet, text("{}"), w_c)]
    return terms


def unrectified(w_c):
    """The domain's prediction in the place of the base model's for the null text."""
    def terms(made, text):
        return [Term(made.domain, Conditioning(None)), Term(made.base.unet, text("{}"), w_c)]
    return terms


class Entry(NamedTuple):
    """A row of the table: train.py's flags ("" for none) with {photos} and {captioned}, the kind of file that it makes
    (baselines.load), and its ways to draw by name; `early` of them are measured at every count, the first Size.ways, or
    `every_way`, at the last."""
    flags: str
    file: str
    ways: dict[str, Callable]
    early: tuple[str, ...] = ()
    every_way: bool = False


HOW = "--batch 16 --warmup 20 --lr-schedule constant --ema 0.99 "
FULL, LORA = HOW + "--lr 2e-4", HOW + "--lr 1e-3 --lora-rank 16"
TUNE = f't2i --data {{photos}} --caption "{CONSTANT}" '
TUNED = {"guidance 3": ordinary(3), "guidance 5": ordinary(5), "base as unconditional, 5": from_base(5)}
FIRST = {"w_d 2, w_c 3": decoupled(2, 3), "w_d 2.5, w_c 2.5": decoupled(2.5, 2.5)}
DECOUPLED = {**FIRST, "unrectified, w_c 3": unrectified(3), "w_d 1, w_c 3": decoupled(1, 3), "w_d 2, w_c 5": decoupled(2, 5),
             "unrectified, w_c 5": unrectified(5), "w_d 2, no text": decoupled(2, 0)}
GRID = {f"w_d {w_d}, w_c {w_c}": decoupled(w_d, w_c) for w_d in (1, 1.5, 2, 2.5) for w_c in (1.5, 3, 5)}
DECOUPLED |= {name: way for name, way in GRID.items() if name not in DECOUPLED}
ENTRIES = {  # in the order of their importance
    "base": Entry("", "", {"guidance 5": ordinary(5), "style words, 5": ordinary(5, WITH_WORDS),
                           "style words, 3": ordinary(3, WITH_WORDS)}),
    "decoupled": Entry(f"indomain --data {{photos}} {FULL}", "indomain", DECOUPLED, ("w_d 2, w_c 3",)),
    "decoupled, grid": Entry(f"indomain --data {{photos}} {FULL}", "indomain", GRID, every_way=True),
    "fine-tuned, one caption": Entry(TUNE + FULL, "model", TUNED, ("guidance 5",)),
    "fine-tuned, captions": Entry(f"t2i --data {{captioned}} {FULL}", "model", {"guidance 3": ordinary(3, WITH_WORDS),
                                  "guidance 5": ordinary(5, WITH_WORDS)}),
    "fine-tuned, no caption": Entry(f't2i --data {{photos}} --caption x --caption-dropout 1 {FULL}', "model", TUNED),
    "LoRA, one caption": Entry(TUNE + LORA, "lora", TUNED),
    "decoupled, LoRA": Entry(f"indomain --data {{photos}} {LORA}", "indomain", FIRST),
}


# ---- drawing and measuring ----------------------------------------------------------------------------------------

class Judged(NamedTuple):
    """What is asked of all entries of a seed, and the truth."""
    judge: probe.Judge
    asked: list        # Descriptions, two rows of each
    prompts: list
    scenes: list       # of the captions, for true pictures of them
    truth: torch.Tensor  # pictures of other scenes in the domain [N,3,64,64]


def prepare(judge, size: Size, seed: int) -> Judged:
    """Captions of one and of two objects, each wanted twice; true pictures of other scenes."""
    half = size.pictures // 4
    scenes, asked, prompts = [], [], []
    for objects in (1, 2):
        found = requests(objects, "never", half * (seed + 1))  # other captions for each seed
        for rows, more in zip((scenes, asked, prompts), found):
            rows += [row for row in more[half * seed:] for _ in range(2)]
    others = [sample_scene(WORLD + 1 + seed, i, 1 + i % 2) for i in range(size.pictures)]
    truth = render(others, truth=False, shade=SHADE).rgb
    return Judged(judge, asked, prompts, scenes, truth)


@torch.no_grad()
def draw(made: Made, way: Callable, prompts: list[str], seed: int, steps: int, batch: int = 64) -> torch.Tensor:
    """One picture for each prompt -> [B,3,64,64]; picture i has seed + i."""
    base, images = made.base, []
    width, height = base.size
    grid = base.schedule.grid(steps)
    for start in range(0, len(prompts), batch):
        part = prompts[start:start + batch]
        network = multi_guidance(way(made, reader(base, part)), 1)
        denoise = base.schedule.objective.denoiser(lambda x, t: network(x, t, None, None, None, None), grid)
        noise = SeededNoise(seed + start, len(part), (4, height // base.vae.config.factor, width // base.vae.config.factor),
                            base.device)
        with torch.autocast(base.device.type, torch.bfloat16, enabled=computes_bf16(base.device)):
            for x, _ in SAMPLERS["euler"](denoise, grid.start * noise(), grid.sigmas):
                pass
            images.append(base.vae.decode(base.vae.unscale(x)).float().clamp(-1, 1).cpu())
    return torch.cat(images)


def reader(base: Pipeline, prompts: list[str]) -> Callable:
    """text(template) of these prompts: a Conditioning with a row for each; text(None): the null text."""
    _, ids = base.negative_and_positive_size_ids(base.size, (0, 0), base.size)
    ids = ids.to(base.device).expand(len(prompts), -1)

    def text(template):
        context, pooled = encode_prompts([(template or "{}").format(prompt) for prompt in prompts],
                                         base.tokenizers_and_encoders)
        if template is None:
            context, pooled = torch.zeros_like(context), torch.zeros_like(pooled)
        return Conditioning(context, pooled, ids)
    return text


def scores(judged: Judged, images: torch.Tensor) -> dict:
    judge, truth = judged.judge, judged.truth
    features = probe.embed(judge, images)
    style = probe.embed_style(judge, truth).mean(0, keepdim=True)
    styles = probe.distance(probe.embed_style(judge, images), style)
    return {"whole": probe.accuracy(judged.asked, probe.read(judge, images))["whole"],
            "frechet": probe.frechet(features, probe.embed(judge, truth)), "style": styles.mean().item(),
            "diversity": probe.distance(features[::2], features[1::2]).mean().item()}


@torch.no_grad()
def drift(made: Made, count: int) -> dict:
    """How far the own model's prediction for the null text is from the base's, and its guidance from the base's."""
    base, own = made.base, made.own
    pictures = [Picture("plain", (sample_scene(WORLD, i, 2),), (64, 64), (64, 64)) for i in range(count)]
    text = reader(base, [picture.caption(rng(WORLD, "caption", i)) for i, picture in enumerate(pictures)])
    x0 = torch.stack(encode_pictures(base.vae, pictures)).float()[:, 0].to(base.device)
    noise = torch.randn(x0.shape, generator=rng(WORLD, "noise")).to(base.device)
    objective, drifts, forgotten = base.schedule.objective, [], []
    for level in LEVELS:
        t = torch.tensor(level)
        sigma = base.schedule.sigma(t).to(x0)
        x = objective.network_input(objective.add_noise(x0, noise, sigma), sigma)
        with torch.autocast(base.device.type, torch.bfloat16, enabled=computes_bf16(base.device)):
            null, cond = ([model.unet(x, t, *words).float().flatten(1) for model in (base, own)]
                          for words in (text(None), text("{}")))
        drifts.append(((null[1] - null[0]).norm(dim=1) / null[0].norm(dim=1)).mean().item())
        directions = [c - n for c, n in zip(cond, null)]
        forgotten.append(1 - torch.cosine_similarity(*directions, dim=1).mean().item())
    return {"drift": statistics.mean(drifts), "forgotten": statistics.mean(forgotten)}


def applications(made: Made, judged: Judged, size: Size, seed: int, model: Path) -> dict:
    """{application: scores}. Each picture has a prompt and a picture of its own."""
    judge, base = judged.judge, made.base
    count, objects, steps = size.applied
    style = probe.embed_style(judge, judged.truth).mean(0, keepdim=True)

    def drawn(pipeline, prompts, task=None, **settings):
        pictures = []
        for i, prompt in enumerate(prompts):
            one = {name: given[i] for name, given in settings.items()}
            settings_of_one = DrawSettings(
                prompt, steps=steps if task else size.steps, seed=10**6 * seed + i, graph=False, **one)
            pictures += draw_paper(pipeline, Adapter(domain=made.domain), settings_of_one, task=task)
        return torch.stack([to_tensor(picture) for picture in pictures])

    def with_style(images, found):
        distances = probe.distance(probe.embed_style(judge, images), style)
        return {**found, "style": distances.mean().item()}

    pairs = TASKS["edit"]((WORLD, seed), range(count))
    before, after = (render(scenes, truth=False, shade=SHADE).rgb for scenes in (pairs.truth["before"], pairs.scenes))
    prompts = [caption(scene, rng(WORLD, "after", i)) for i, scene in enumerate(pairs.scenes)]
    images = drawn(base, prompts, image=to_pictures(before), strength=[0.6] * count)
    found = {"edit": with_style(images, edit_scores(judge, images, pairs.scenes, pairs.truth["kinds"], after))}

    pairs = TASKS["edges"]((WORLD, seed), range(count))
    prompts = [say(looks_of(describe(scene)), rng(WORLD, "say", seed, i)) for i, scene in enumerate(pairs.scenes)]
    follower = Pipeline.load(model, device=base.device)
    follower.add_controlnet("weights/adapters/edges")
    images = drawn(follower, prompts, control=[[(picture, 1.0)] for picture in to_pictures(pairs.source)])
    found["translation"] = with_style(images, control_scores(judge, images, pairs.truth["edges"], pairs.scenes))

    asked = [(color, shape) for color, shape in zip(("red", "blue", "green", "yellow", "purple", "white"),
                                                    ("cube", "sphere", "cone", "cylinder", "torus", "diamond"))][:objects]
    strips = drawn(base, [f"a large {color} {shape}" for color, shape in asked], task="3d")
    images = torch.cat([torch.cat(strip.split(base.size[0], dim=2)).unflatten(0, (-1, 3)) for strip in strips])
    views = len(images) // objects
    right = [len(seen.things) == 1 and (seen.things[0].color, seen.things[0].shape) == asked[i // views]
             for i, seen in enumerate(probe.read(judge, images))]
    found["object"] = with_style(images, {"whole": statistics.mean(right)})
    return found


# ---- the table ----------------------------------------------------------------------------------------------------

def write_pictures(folder: Path, size: Size, seed: int) -> dict:
    """The training pictures: in photos/ without captions, in captioned/ with whole ones and the style's words."""
    folders = {name: folder / name for name in ("photos", "captioned")}
    shutil.rmtree(folder, ignore_errors=True)
    for path in folders.values():
        path.mkdir(parents=True)
    for start in range(0, size.scenes, 64):
        scenes = [sample_scene(seed, i) for i in range(start, min(start + 64, size.scenes))]
        for i, picture in enumerate(to_pictures(render(scenes, truth=False, shade=SHADE).rgb), start):
            text = f"{caption(scenes[i - start], rng(seed, 'captioned', i))}, {WORDS}"
            for path in folders.values():
                picture.save(path / f"{i:05d}.png")
            (folders["captioned"] / f"{i:05d}.txt").write_text(text)
    return folders


def load_made(options, entry: Entry, folder: Path | None) -> Made:
    """What an entry wrote into `folder`, beside the base model."""
    base, domain = Pipeline.load(options.model, device=device()), None
    own = base
    if entry.file == "indomain":
        domain = build_domain(base, load_adapter(base, folder / "domain.safetensors"))
    elif entry.file:
        own = load(options.model, entry.file, folder).pipeline
    for network in (base, own, domain):
        if network is not None:
            network.to(memory_format=torch.channels_last)  # the fast order for 16 bits
    return Made(base, own, domain)


def measure(name: str, options, judged: Judged, folders: dict, seed: int) -> dict:
    """A row: {"at": {count: {way: scores}}}, and what training took."""
    size = SIZES[options.size]
    if name == "renders":
        return {"at": {"0": {"renders": scores(judged, render(judged.scenes, truth=False, shade=SHADE).rgb)}}}
    entry, row, counts = ENTRIES[name], {"at": {}}, (0,)
    last_ways = entry.ways if entry.every_way else dict(list(entry.ways.items())[:size.ways])
    out = options.runs / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    if entry.flags:
        flags = shlex.split(entry.flags.format(**folders)) + ["--model", str(options.model), "--seed", str(seed)]
        trained, seconds = run(flags, size.counts, out)
        counts = size.counts if entry.early else size.counts[-1:]
        row |= {"command": shlex.join(["python", "train.py", *flags]), "trained": trained, "seconds a step": seconds}
    for count in counts:
        made = load_made(options, entry, out / f"at-{count}")
        ways = last_ways if count == counts[-1] else {way: entry.ways[way] for way in entry.early}
        at = row["at"][str(count)] = {}
        for way, terms in ways.items():
            at[way] = scores(judged, draw(made, terms, judged.prompts, 10**6 * (seed + 1), size.steps))
            show(f"{name}, seed {seed}, {count} steps, {way}", at[way])
        if made.own is not made.base:
            at["predictions"] = drift(made, min(64, size.pictures))
            show(f"{name}, seed {seed}, {count} steps", at["predictions"])
        if name == "decoupled" and count == counts[-1]:
            for what, values in applications(made, judged, size, seed, options.model).items():
                at[what] = values
                show(f"{name}, seed {seed}, {what}", values)
    shutil.rmtree(out, ignore_errors=True)
    return row


def show(label: str, values: dict):
    print(f"{label}: " + "  ".join(f"{key} {value:.3f}" for key, value in values.items()), flush=True)


def kept(path: Path) -> list[dict]:
    return json.loads(path.read_text())["results"] if path.exists() else []


def place(row: dict) -> tuple:
    """Where a row stands in the table. No other row has the same."""
    return ["renders", *ENTRIES].index(row["entry"]), row["seed"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default="weights/tiny")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=("renders", *ENTRIES), metavar="NAME",
                        help="an entry, repeatable: " + "; ".join(ENTRIES))
    parser.add_argument("--out", type=Path, help="the JSON: indomain.json beside this file, with -gpu for that size, "
                        "or RUNS/toy.json")
    parser.add_argument("--runs", type=Path, default="runs/indomain-benchmark", help="folder for pictures and training runs")
    options = parser.parse_args(argv)
    names = {"toy": options.runs / "toy.json", "cpu": Path(__file__).with_suffix(".json"),
             "gpu": Path(__file__).with_name("indomain-gpu.json")}
    options.out = options.out or names[options.size]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    judge = probe.load_judge(options.model / "judge")
    model = hashlib.sha256("".join(map(sha256, sorted(options.model.rglob("*.safetensors")))).encode()).hexdigest()
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        judged = folders = None
        for name in options.only or ["renders", *ENTRIES]:
            entry = ENTRIES.get(name)
            made = {"entry": name, "seed": seed, "size": options.size, "model": model, "domain": DOMAIN,
                    **SIZES[options.size]._asdict(), "flags": entry.flags if entry else "",
                    "drawn": list(entry.ways) if entry else []}
            made = json.loads(json.dumps(made))
            if any(made.items() <= row.items() for row in kept(options.out)):
                continue
            judged = judged or prepare(judge, SIZES[options.size], seed)
            folders = folders or write_pictures(options.runs / f"pictures-{seed}", SIZES[options.size], seed)
            start = time.process_time()
            row = made | measure(name, options, judged, folders, seed)
            row |= {**hardware(), "processor seconds": round(time.process_time() - start)}
            rows = [old for old in kept(options.out) if place(old) != place(row)] + [row]
            rows.sort(key=place)
            record(options.out.with_suffix("").resolve(), rows, seeds=options.seeds)
        if folders:
            shutil.rmtree(options.runs / f"pictures-{seed}")


if __name__ == "__main__":
    main()
