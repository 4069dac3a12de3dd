"""Specialist Diffusion against its rivals, and without each of its parts: a style from eight pictures.

    python tests/benchmarks/specialist.py [--size toy|cpu|gpu] [--seeds 3] [--styles poster ...]
        [--only NAME ...] [--out FILE.json]

Every seed has another set of eight pictures of the world in a style that no base model has seen.
Each entry trains once a seed through train.py's command line, on the same pictures and by the same
number of pictures a step, and is measured at several step counts, the middle of that one run, on
captions that no model was trained on:

    style      distance of early features' Gram matrix to the mean one of true pictures in the style
    whole      share of drawings in which the judge reads everything that the caption says
    place      the same for places alone: of styles whose objects the judge cannot read
    nearest    PSNR in dB of a drawing to the nearest of the eight pictures, the largest of all
               drawings: high where a picture was memorised
    inverted   share of drawings that look inverted or upside down, which nobody asked for
    obeyed     the same of prompts that end with these two transformations: what the suffix does

A reader of thumbnails decides what looks inverted; "reader" is its accuracy on true pictures. The
floor is "untouched", the base model that is told the style's name. "renders" are true pictures of
the captions; the ceiling is "rebuilt", what the model's VAE leaves of them. A style must survive
that: the tiny model's VAE blurs the joints of mosaics away, so that their style distance is .38 when
rebuilt and .41 in the base style, and nothing can be learned. Of posters it is .26 and .34, of
pencil sketches .04 and .68, of neon light .14 and .68. What is finished is kept in the JSON and skipped by the next run, unless
size, flags or model have changed; two runs with different --only can share the work. RUNS/figures
gets the eight pictures and the same three prompts by each entry.
"""

import argparse
import functools
import hashlib
import json
import shlex
import shutil
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

from baselines import run  # noqa: E402
from quality import WORLD, draw, requests  # noqa: E402
from record import device, hardware, record  # noqa: E402

from minipic.common import rng  # noqa: E402
from minipic.figures import image_grid  # noqa: E402
from minipic.image import open_picture, to_pictures, to_tensor  # noqa: E402
from minipic.papers import specialist  # noqa: E402
from minipic.pipeline import Pipeline  # noqa: E402
from minipic.weights.files import sha256  # noqa: E402
from minipic.world import metrics, probe  # noqa: E402
from minipic.world.caption import OPENINGS, Description, ask, say  # noqa: E402
from minipic.world.scene import render, sample_scene  # noqa: E402
from minipic.world.styles import STYLES  # noqa: E402

PICTURES = 8  # to learn from
REFERENCES = ("renders", "rebuilt")  # true pictures, and what the VAE makes of them
SUFFIXES = ("inverted colors", "vertical flip")  # the transformations that are read in drawings


class Size(NamedTuple):
    """How much is spent."""

    drawings: int   # for each number
    steps: int      # of a drawing
    counts: tuple   # steps of training, at which is measured
    prior: int      # pictures of DreamBooth's class
    reader: int     # pictures that the reader of transformations learns from


SIZES = {
    "toy": Size(4, 2, (1, 2), 1, 24),
    "cpu": Size(96, 12, (100, 300), 24, 300),
    "gpu": Size(192, 20, (100, 300), 24, 600),
}


class Entry(NamedTuple):
    """A row: train.py's flags, with {photos}, {bare} (no captions), {named} and {style} in braces.

    prompt: how a caption becomes a prompt; {} is the caption.
    first: flags of a training before it, whose folder is {first}.
    """

    flags: str
    prompt: str = "{} in the style of {style}"
    first: str = ""


HOW = "--batch 8 --lr-schedule constant --ema 0 --warmup 0 --caption-dropout 0 "
FULL = HOW + "--lr 1e-4 "
FAST = HOW + "--lr 3e-4 "  # so fast that the content suffers
LORA = HOW + "--lora-rank 16 --lr 1e-3 "
SHOWN = 'a picture in the style of {}'
DREAMBOOTH = (
    f'dreambooth --data {{bare}} --caption "{SHOWN.format("sks")}" --class-prompt "a picture" ')
INVERSION = (
    f'inversion --data {{bare}} --caption "{SHOWN.format("<new>")}" --initializer-token picture '
    f'--num-vectors 4 {HOW} --lr 5e-3 ')
STYLE = "specialist --data {photos} --style {style} "
PAPER = STYLE + "--retrieval world "  # half of the pictures changed, similar from 0.65
ALL = PAPER + "--similar 0.95 --doubled 0.2 "
BARE = STYLE + "--no-templates --no-synonyms --doubled 0 "
WEIGHTS = (0.03, 0.1, 0.3)
ENTRIES = {  # in the order of their importance
    "untouched": Entry(""),
    "Specialist": Entry(ALL + FULL),
    "full": Entry("t2i --data {named} " + FULL),
    "DreamBooth": Entry(DREAMBOOTH + FULL, "{} in the style of sks"),
    "textual inversion": Entry(INVERSION, "{} in the style of <new>"),
    "LoRA": Entry("t2i --data {named} " + LORA),
    "Specialist, LoRA": Entry(ALL + LORA),
    "as in the paper": Entry(PAPER + FULL),
    "without doubled": Entry(ALL + FULL + "--doubled 0"),
    "without retrieval": Entry(STYLE + FULL + "--doubled 0.2"),
    "without synonyms": Entry(ALL + FULL + "--no-synonyms"),
    "without templates": Entry(ALL + FULL + "--no-templates"),
    "without sparse updating": Entry(ALL + FULL + "--sparse-steps 0"),
    "the drawing's timesteps alone": Entry(ALL + FULL + "--sparse-steps {steps}"),
    "plain, 3e-4": Entry(BARE + FAST),
    **{f"content {weight}, 3e-4": Entry(f"{BARE}{FAST}--content grad --content-weight {weight}")
       for weight in WEIGHTS},
    "content 0.1 to text, 3e-4": Entry(BARE + FAST + "--content grad --content-target text"),
    "content released, 3e-4": Entry(BARE + FAST + "--content released"),
    "plain, LoRA": Entry(BARE + LORA),
    **{f"content {weight}, LoRA": Entry(f"{BARE}{LORA}--content grad --content-weight {weight}")
       for weight in WEIGHTS},
    "with a word": Entry(ALL + FULL + '--word "<style>"', "{} in the style of <style>"),
    "on textual inversion": Entry(
        ALL + FULL + "--embedding {first}/new.safetensors", "{} in the style of <new>", INVERSION),
    "Specialist, content 0.1": Entry(ALL + FULL + "--content grad"),
    "Specialist, 3e-4": Entry(ALL + FAST),
}


# ---- what is asked, and what is right ------------------------------------------------------------

class Exam:
    """The eight pictures of a seed in a style, the captions to draw, and the truth."""

    def __init__(self, judge, size: Size, style: str, seed: int, folder: Path):
        self.judge = judge
        self.size = size
        self.style = style
        self.seed = seed
        self.shade, _ = STYLES[style]
        self.folders = self.write_pictures(folder)
        self.examples = torch.stack([
            to_tensor(open_picture(path)) for path in sorted(self.folders["photos"].glob("*.png"))])

        half = size.drawings // 2
        self.scenes, self.asked, self.captions = [], [], []
        for objects in (1, 2):
            scenes, asked, _ = requests(objects, "never", half * (seed + 1))
            for i in range(half * seed, half * (seed + 1)):  # other captions for each seed
                self.scenes.append(scenes[i])
                self.asked.append(replace(asked[i], sky=None))
                self.captions.append(words_for(asked[i], rng(WORLD, "say", i)))

        others = [sample_scene((WORLD, "others", seed), i, 1 + i % 2) for i in range(size.reader)]
        truth = render(others, truth=False, shade=self.shade).rgb
        self.gram = probe.embed_style(judge, truth).mean(0, keepdim=True)
        self.reader = Reader(truth)

    def write_pictures(self, folder: Path) -> dict[str, Path]:
        """photos/ has captions, bare/ none, in named/ they name the style."""
        shutil.rmtree(folder, ignore_errors=True)
        folders = {name: folder / name for name in ("photos", "bare", "named")}
        scenes = []
        for i in range(PICTURES):
            scenes.append(sample_scene((WORLD, "pictures", self.seed), i, 1 + i % 2))
        for path in folders.values():
            path.mkdir(parents=True)
        pictures = to_pictures(render(scenes, truth=False, shade=self.shade).rgb)
        for i, (scene, picture) in enumerate(zip(scenes, pictures)):
            generator = rng(WORLD, "captions", self.seed, i)
            text = words_for(ask(scene, generator), generator)
            for path in folders.values():
                picture.save(path / f"{i}.png")
            (folders["photos"] / f"{i}.txt").write_text(text)
            (folders["named"] / f"{i}.txt").write_text(f"{text} in the style of {self.style}")
        return folders

    def scores(self, images: torch.Tensor) -> dict[str, float]:
        """Of drawings of the captions, in their order."""
        facts = probe.accuracy(self.asked, probe.read(self.judge, images))
        styles = probe.distance(probe.embed_style(self.judge, images), self.gram)
        nearest = []
        for image in images:
            pairs = [metrics.psnr(image[None], example[None]) for example in self.examples]
            nearest.append(max(pairs))
        return {
            "style": styles.mean().item(), "whole": facts["whole"], "place": facts["place"],
            "nearest": max(nearest), "inverted": (self.reader(images) > 0).double().mean().item()}

    def renders(self) -> dict[str, float]:
        """The scores of true pictures of the captions."""
        images = render(self.scenes, truth=False, shade=self.shade).rgb
        return self.scores(images) | {"reader": self.reader.accuracy}

    @torch.no_grad()
    def rebuilt(self, pipeline: Pipeline) -> dict[str, float]:
        """The scores of the same, encoded and decoded: no drawing can be more like them."""
        images = render(self.scenes, truth=False, shade=self.shade).rgb
        mean, _ = pipeline.vae.encode(images.to(pipeline.device))
        return self.scores(pipeline.vae.decode(mean).float().clamp(-1, 1).cpu())

    def measure(self, pipeline: Pipeline, template: str) -> tuple[dict[str, float], torch.Tensor]:
        """The scores of a pipeline, and its drawings of the captions."""
        prompts = [template.replace("{}", text) for text in self.captions]
        images = draw(pipeline, prompts, 10**6 * (self.seed + 1), self.size.steps)
        scores = self.scores(images)
        quarter = max(1, len(prompts) // 4)
        for number, operation in enumerate(SUFFIXES, 1):
            suffix = specialist.SUFFIX.format(operation=operation)
            changed = [prompt + suffix for prompt in prompts[::len(prompts) // quarter]]
            drawings = draw(pipeline, changed, 10**6 * (self.seed + 1), self.size.steps)
            found = self.reader(drawings) == number
            scores[f"obeyed: {operation}"] = found.double().mean().item()
        return scores, images


def words_for(asked: Description, generator: torch.Generator) -> str:
    """A caption that fits into a template, without "a picture of" and the like.

    It says nothing of the sky, which two of the styles leave out.
    """
    text = say(replace(asked, sky=None), generator)
    for opening in OPENINGS:
        text = text.removeprefix(opening)
    return text


class Reader:
    """Reads in a picture which of SUFFIXES was done to it: 0 none, 1 the first, 2 the second.

    Least squares from thumbnails of true pictures, as they are and changed, and from their squares.
    """

    def __init__(self, truth: torch.Tensor):
        kinds = [truth]
        for operation in SUFFIXES:
            changed = [specialist.OPERATIONS[operation](picture) for picture in to_pictures(truth)]
            kinds.append(torch.stack([to_tensor(picture) for picture in changed]))
        trained = len(truth) * 2 // 3
        x = torch.cat([self.features(kind[:trained]) for kind in kinds])
        wanted = torch.eye(len(kinds), dtype=x.dtype).repeat_interleave(trained, dim=0)
        ridge = 1.0 * torch.eye(x.shape[1], dtype=x.dtype)
        self.weights = torch.linalg.solve(x.T @ x + ridge, x.T @ wanted)
        right = [self(kind[trained:]) == number for number, kind in enumerate(kinds)]
        self.accuracy = torch.cat(right).double().mean().item()

    @staticmethod
    def features(images: torch.Tensor) -> torch.Tensor:
        small = F.adaptive_avg_pool2d(images.cpu().double(), 6).flatten(1)
        return torch.cat([small, small.square(), torch.ones(len(small), 1)], dim=1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return (self.features(images) @ self.weights).argmax(1)


# ---- one row -------------------------------------------------------------------------------------

def load(model: Path, folder: Path) -> Pipeline:
    """What a recipe wrote into `folder`, loaded as a user loads it."""
    is_model = (folder / "model_index.json").exists()
    pipeline = Pipeline.load(folder if is_model else model, device=device())
    if (folder / "lora.safetensors").exists():
        pipeline.add_lora(folder / "lora.safetensors")
    for name in ("new.safetensors", "embedding.safetensors"):
        if (folder / name).exists():
            pipeline.add_embedding(folder / name)
    return pipeline


def train_entry(name: str, flags: str, options, exam: Exam, counts: tuple, first: Path | None):
    """(folder with at-COUNT in it, what it took)."""
    size = SIZES[options.size]
    out = options.runs / f"{exam.style}-{name.replace(', ', '-').replace(' ', '-')}-{exam.seed}"
    words = exam.folders | {"style": exam.style, "steps": size.steps, "first": first}
    argv = [word.format(**words) for word in shlex.split(flags)]
    argv += ["--model", str(options.model), "--seed", str(exam.seed)]
    if argv[0] == "dreambooth":
        argv += ["--num-class-images", str(size.prior)]
    trained, seconds = run(argv, counts, out)
    command = shlex.join(["python", "train.py", *argv])
    return out, {"command": command, "trained": trained, "seconds a step": seconds}


def measure(name: str, options, exam: Exam) -> dict:
    """A row of the table: {"at": {count: scores}}, and what training took."""
    if name == "renders":
        return {"at": {"0": exam.renders()}}
    if name == "rebuilt":
        return {"at": {"0": exam.rebuilt(Pipeline.load(options.model, device=device()))}}
    entry, counts = ENTRIES[name], SIZES[options.size].counts
    template = entry.prompt.replace("{style}", exam.style)
    if not entry.flags:
        scores, images = exam.measure(Pipeline.load(options.model, device=device()), template)
        save_figure(name, options, exam, images)
        return {"at": {"0": scores}}
    first = None
    if entry.first:
        before, _ = train_entry(f"{name}, first", entry.first, options, exam, counts, None)
        first = before / f"at-{counts[-1]}"
    out, row = train_entry(name, entry.flags, options, exam, counts, first)
    row["at"] = {}
    for count in counts:
        scores, images = exam.measure(load(options.model, out / f"at-{count}"), template)
        row["at"][str(count)] = scores
    save_figure(name, options, exam, images)
    for folder in {out, first.parent if first else out}:
        shutil.rmtree(folder)
    return row


def save_figure(name: str, options, exam: Exam, images: torch.Tensor):
    """The eight pictures, and below them three prompts by each entry that is there so far."""
    if exam.seed:
        return
    folder = options.runs / "figures" / exam.style
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(to_pictures(images[[0, -2, -1]])):
        picture.save(folder / f"{name}, {i}.png")
    pictures = to_pictures(exam.examples)[:6]
    labels = ["learned from"] * 6
    for other in ENTRIES:
        for i in range(3):
            path = folder / f"{other}, {i}.png"
            if path.exists():
                pictures.append(open_picture(path))
                labels.append(other if i else f"{other}: {exam.captions[0]}")
    image_grid(pictures, labels, columns=6).save(folder.with_suffix(".png"))


# ---- the table -----------------------------------------------------------------------------------

def kept(path: Path) -> list[dict]:
    return json.loads(path.read_text())["results"] if path.exists() else []


def place(row: dict) -> tuple:
    """Where a row stands in the table. No other row has the same."""
    order = [*REFERENCES, *ENTRIES]
    return list(STYLES).index(row["style"]), order.index(row["name"]), row["seed"]


def keep(options, row: dict):
    """Put a row in its place in the JSON, which another run may have changed meanwhile."""
    rows = [old for old in kept(options.out) if place(old) != place(row)] + [row]
    rows.sort(key=place)
    record(options.out.with_suffix("").resolve(), rows, seeds=options.seeds)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--model", type=Path, default="weights/tiny")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--styles", nargs="+", choices=STYLES, default=["poster"], metavar="STYLE")
    parser.add_argument("--only", action="append", choices=(*REFERENCES, *ENTRIES), metavar="NAME",
                        help="an entry, repeatable: " + "; ".join((*REFERENCES, *ENTRIES)))
    parser.add_argument("--out", type=Path, help="the JSON: specialist.json beside this file, with "
                        "-gpu for that size, or RUNS/toy.json")
    parser.add_argument("--runs", type=Path, default="runs/specialist-benchmark")
    options = parser.parse_args(argv)
    names = {"toy": options.runs / "toy.json", "cpu": Path(__file__).with_suffix(".json"),
             "gpu": Path(__file__).with_name("specialist-gpu.json")}
    options.out = options.out or names[options.size]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    size = SIZES[options.size]
    hashes = map(sha256, sorted(options.model.rglob("*.safetensors")))
    model = hashlib.sha256("".join(hashes).encode()).hexdigest()

    @functools.cache
    def exam_of(style: str, seed: int) -> Exam:
        judge = probe.load_judge(options.model / "judge")
        return Exam(judge, size, style, seed, options.runs / f"pictures-{style}-{seed}")

    chosen = options.only or [*REFERENCES, *ENTRIES]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    for seed, style, name in product(seeds, options.styles, chosen):
        entry = list(ENTRIES[name]) if name in ENTRIES else []
        made = {"model": model, "size": json.loads(json.dumps(size)), "entry": entry}
        row = {"style": style, "name": name, "seed": seed, "made": made}
        if any(row.items() <= old.items() for old in kept(options.out)):
            continue
        start = time.process_time()
        row |= measure(name, options, exam_of(style, seed))
        row |= {**hardware(), "processor seconds": round(time.process_time() - start)}
        keep(options, row)
        for count, scores in row["at"].items():
            numbers = "  ".join(f"{key} {value:.3f}" for key, value in scores.items())
            print(f"{style}, {name}, seed {seed}, {count} steps: {numbers}", flush=True)
        print(f"    {row['processor seconds']} s", flush=True)


if __name__ == "__main__":
    main()
