"""Makes all weights that ship, from nothing: a table of train.py commands, run in order.

    python weights/make.py --plan              the commands, their samples and minutes
    python weights/make.py --size gpu          all stages on one GPU
    python weights/make.py vae t2i             two stages, into runs/make/cpu/model
    python weights/make.py panels              one that is made only if it is named
    python weights/make.py mosaic --install    one adapter, for the model that ships

A stage is skipped when its weights are there and neither its commands, nor the code that they run,
nor the weights that it builds on have changed since. One that was stopped goes on where it was.
--minutes 9 ends each stage after so many minutes, with what it has learnt by then. Adapters are
trained on the model that ships, unless another is made in the same work folder. What ships stays as
it is until --install copies the named stages over it, or all, and writes what they are good for
into README.md.
"""

import argparse
import ast
import functools
import hashlib
import importlib
import json
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

import adapters  # noqa: E402
import quality  # noqa: E402
import torch  # noqa: E402
from record import machine  # noqa: E402

import train  # noqa: E402
from minipic.common import InputError  # noqa: E402
from minipic.papers import PAPERS  # noqa: E402
from minipic.pipeline import Pipeline  # noqa: E402
from minipic.text import Tokenizer  # noqa: E402
from minipic.training.flags import from_argv  # noqa: E402
from minipic.weights.files import replacing, replacing_folder, sha256  # noqa: E402
from minipic.weights.layouts import load_part, open_part  # noqa: E402
from minipic.world import metrics, probe  # noqa: E402
from minipic.world.caption import describe  # noqa: E402
from minipic.world.scene import render, sample_scene  # noqa: E402

# Panels are kept if the mean of drawing_quality's shares falls by no more than this: about the
# standard error of the difference of two shares of 1024 drawings each.
TOLERANCE = 0.02

UNET = "unet/diffusion_pytorch_model.safetensors"  # in a model's folder

# How much to train: on a CPU in a night, on one data-centre GPU, or as a trial in a minute.
SIZES = {"cpu": 256, "gpu": 256, "toy": 2}  # {size: pictures for each number of a stage's quality}


@dataclass(frozen=True)
class Stage:
    """Some of the weights: the commands that make them, and what they are good for.

    makes: the last file that the commands write, in the work folder.
    commands: for each of SIZES, train.py's arguments, one command after the other. {model} is the
        folder of the model that is being made, {panels} that of the same with panels, {base} that
        of the model that ships, {adapters} that of its adapters.
    measure: the work folder, a number of pictures -> {what: number}.
    needs: the stages whose weights it builds on. With {base} it builds on the model that ships.
    ships: {file or folder in the work folder: in weights/}.
    optional: made only if it is named.
    """

    makes: str
    commands: dict[str, tuple[str, ...]]
    measure: Callable[[Path, int], dict[str, float]]
    needs: tuple[str, ...] = ()
    ships: dict[str, str] = field(default_factory=dict)
    optional: bool = False


# What the weights are good for --------------------------------------------------------------------

@torch.no_grad()
def judge_quality(work: Path, pictures: int) -> dict[str, float]:
    """Shares of unseen renders, and of their shapes, that the judge reads right."""
    scenes = [sample_scene(quality.WORLD, i) for i in range(pictures)]
    images = render(scenes, truth=False).rgb
    read = probe.read(probe.load_judge(work / "model" / "judge"), images)
    shares = probe.accuracy([describe(scene) for scene in scenes], read)
    return {"pictures": shares["whole"], "shapes": shares["shape"]}


def text_quality(work: Path, pictures: int) -> dict[str, float]:
    """Shares of unseen captions whose facts a linear reading finds in the text encoders' states."""
    encoders = []
    for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        network = load_part(open_part(work / "model" / encoder, encoder), torch.float32)
        encoders.append((Tokenizer(work / "model" / tokenizer), network))
    return {**quality.linear_reading(encoders), "count": quality.count_reading(encoders)}


@torch.no_grad()
def vae_quality(work: Path, pictures: int) -> dict[str, float]:
    """The PSNR of unseen renders that go through the VAE."""
    vae = load_part(open_part(work / "model" / "vae", "vae"), torch.float32)
    images = render([sample_scene(quality.WORLD, i) for i in range(pictures)], truth=False).rgb
    decoded = [vae.decode(vae.encode(part)[0]) for part in images.split(64)]
    return {"dB": metrics.psnr(torch.cat(decoded), images)}


def drawing_quality(work: Path, pictures: int) -> dict[str, float]:
    """Shares of captions drawn wholly right, as tests/benchmarks/quality.py counts them."""
    judge = probe.load_judge(work / "model" / "judge")
    return shares_drawn(Pipeline.load(work / "model"), judge, pictures)


def panels_quality(work: Path, pictures: int) -> dict[str, float]:
    """The same of the model with panels; and `gain`, by how much their mean rose with them."""
    judge = probe.load_judge(work / "model" / "judge")
    before = shares_drawn(Pipeline.load(work / "model"), judge, pictures)
    shares = shares_drawn(Pipeline.load(work / "panels"), judge, pictures)
    gain = statistics.mean(shares.values()) - statistics.mean(before.values())
    return {**shares, "gain": gain}


def shares_drawn(pipeline: Pipeline, judge: torch.nn.Module, pictures: int) -> dict[str, float]:
    """See drawing_quality."""
    shares = {}
    for name, (objects, held_out) in quality.SETS.items():
        _, asked, prompts = quality.requests(objects, held_out, pictures)
        images = quality.draw(pipeline, prompts, seed=0)
        shares[name] = probe.accuracy(asked, probe.read(judge, images))["whole"]
    return shares


def not_measured(work: Path, pictures: int) -> dict[str, float]:
    """These are measured by tests/benchmarks/baselines.py, beside other ways to train."""
    return {}


def adapter_quality(name: str, work: Path, pictures: int) -> dict[str, float]:
    """What a paper's adapter does, as tests/benchmarks/adapters.py measures it."""
    judge = work / "model" / "judge"
    if not judge.exists():
        judge = ROOT / "weights" / "tiny" / "judge"
    folder = work / "adapters" / name
    return adapters.measure(name, base_of(work), folder, judge, max(1, pictures // 4))


# The stages, in order -----------------------------------------------------------------------------

def paper_stage(name: str, last_file: str, commands: dict[str, tuple[str, ...]]) -> Stage:
    """What a paper's training makes of the model that ships, in a folder of its name."""
    folder = f"adapters/{name}"
    return Stage(
        makes=f"{folder}/{last_file}", commands=commands,
        measure=functools.partial(adapter_quality, name), ships={folder: folder})


NEW_BASE = "t2i --from-nothing --model {model} --save {model} --max-grad-norm 0.5 --ema 0.999 "
MORE_BASE = "t2i --balanced --model {model} --save {model} --batch 64 --warmup 100 --ema 0.999 "
MORE_BASE += "--max-grad-norm 0.5 --scenes 32000 "
WITH_PANELS = "t2i --balanced --panels 0.5 --seed 5 --model {model} --save {panels} --ema 0.999 "
WITH_PANELS += "--max-grad-norm 0.5 "
PHOTOS = "--model {base} --data tutorials/photos "
DREAMBOOTH = "dreambooth " + PHOTOS + '--caption "a sks torus" --class-prompt "a red torus" '
DREAMBOOTH += "--lora-rank 16 --lr 2e-3 --save {adapters}/sks-torus "
INVERSION = "inversion " + PHOTOS + '--caption "a <ring>" --word "<ring>" --num-vectors 4 '
INVERSION += "--initializer-token torus --save {adapters}/ring "
EDGES = "controlnet --model {base} --small --control edges --balanced --warmup 30 --lr 1e-3 "
EDGES += "--save {adapters}/edges "
ONEPIC = "onepic --model {base} --task edges,edit --balanced --lora-rank 16 --lr 1e-3 "
ONEPIC += "--save {adapters}/onepic "
MTU = "mtu --model {base} --save {adapters}/mtu "
MOSAIC = "indomain --model {base} --domain mosaic --lora-rank 16 --lr 1e-3 --warmup 20 "
MOSAIC += "--lr-schedule constant --ema 0.99 --save {adapters}/mosaic "
POSTER = "specialist --model {base} --data tutorials/poster --style poster --retrieval world "
POSTER += "--similar 0.95 --doubled 0 --lora-rank 8 --lr 1e-3 --save {adapters}/poster "
FRAMES = "onediffusion --model {base} --save {adapters}/onediffusion "
STAGES = {
    "judge": Stage(
        makes="model/judge/model.safetensors",
        commands={
            "cpu": ("judge --save {model} --steps 2000 --batch 64",),
            "gpu": ("judge --save {model} --steps 6000 --batch 256 --pool 64000",),
            "toy": ("judge --save {model} --steps 2 --batch 2 --pool 4",)},
        measure=judge_quality),
    "clip": Stage(
        makes="model/text_encoder_2/model.safetensors",
        commands={
            "cpu": ("clip --save {model} --steps 2500 --batch 64",),
            "gpu": (
                "clip --save {model} --steps 20000 --batch 256 --scenes 64000 --counts 0.15",),
            "toy": ("clip --save {model} --steps 2 --batch 4 --scenes 8",)},
        measure=text_quality),
    "vae": Stage(
        makes="model/vae/diffusion_pytorch_model.safetensors",
        commands={
            "cpu": ("vae --save {model} --steps 1500 --batch 16",),
            "gpu": ("vae --save {model} --steps 20000 --batch 64",),
            "toy": ("vae --save {model} --steps 2 --batch 2",)},
        measure=vae_quality),
    "t2i": Stage(
        makes=f"model/{UNET}",
        commands={
            "cpu": (
                NEW_BASE + "--batch 64 --lr 1e-3 --warmup 300 --scenes 16000 --steps 7411",
                MORE_BASE + "--seed 1 --lr 8e-4 --steps 5000",
                MORE_BASE + "--seed 2 --lr 8e-4 --steps 6000 --logit-normal 1.2",
                MORE_BASE + "--seed 3 --lr 8e-4 --steps 6000 --logit-normal 1.2",
                MORE_BASE + "--seed 4 --lr 6e-4 --steps 4000 --logit-normal 1.2"),
            "gpu": (
                NEW_BASE + "--balanced --logit-normal 1.2 --batch 512 --lr 2e-3 --warmup 500 "
                "--scenes 128000 --steps 8000 --counts 0.15",),
            "toy": (NEW_BASE + "--batch 2 --scenes 4 --steps 2",)},
        measure=drawing_quality, needs=("judge", "clip", "vae"), ships={"model": "tiny"}),
    "panels": Stage(
        makes=f"panels/{UNET}",
        commands={
            "cpu": (WITH_PANELS + "--batch 64 --lr 8e-4 --warmup 100 --scenes 32000 --steps 5000",),
            "gpu": (
                WITH_PANELS + "--batch 512 --lr 1e-3 --warmup 200 --scenes 32000 --steps 2000",),
            "toy": (WITH_PANELS + "--batch 2 --scenes 4 --steps 2",)},
        measure=panels_quality, needs=("t2i",), optional=True),
    "adapters": Stage(
        makes="adapters/edges/diffusion_pytorch_model.safetensors",
        commands={
            "cpu": (
                DREAMBOOTH + "--steps 200", INVERSION + "--steps 300",
                EDGES + "--scenes 4000 --steps 1000"),
            "gpu": (
                DREAMBOOTH + "--steps 200", INVERSION + "--steps 300",
                EDGES + "--scenes 16000 --batch 128 --steps 4000"),
            "toy": (
                DREAMBOOTH + "--steps 1 --batch 2 --num-class-images 1",
                INVERSION + "--steps 1 --batch 2", EDGES + "--scenes 2 --batch 2 --steps 1")},
        measure=not_measured,
        ships={
            "adapters/sks-torus/lora.safetensors": "adapters/sks-torus.safetensors",
            "adapters/ring/ring.safetensors": "adapters/ring.safetensors",
            "adapters/edges": "adapters/edges"}),
    "onepic": paper_stage("onepic", "lora.safetensors", {
        "cpu": (ONEPIC + "--scenes 4000 --steps 1500",),
        "gpu": (ONEPIC + "--scenes 16000 --batch 64 --steps 3000",),
        "toy": (ONEPIC + "--scenes 4 --batch 2 --steps 1",)}),
    "mtu": paper_stage("mtu", "mtu.safetensors", {
        "cpu": (MTU + "--scenes 3000 --batch 8 --steps 1000 --ema 0.99",),
        "gpu": (MTU + "--scenes 16000 --batch 64 --steps 3000 --ema 0.99",),
        "toy": (MTU + "--scenes 4 --batch 2 --steps 1",)}),
    "mosaic": paper_stage("mosaic", "domain.safetensors", {
        "cpu": (MOSAIC + "--scenes 2000 --steps 600",),
        "gpu": (MOSAIC + "--scenes 4000 --batch 64 --steps 1000",),
        "toy": (MOSAIC + "--scenes 2 --batch 2 --steps 1",)}),
    "poster": paper_stage("poster", "lora.safetensors", {
        "cpu": (POSTER + "--batch 8 --steps 200",),
        "gpu": (POSTER + "--batch 8 --steps 200",),
        "toy": (POSTER + "--batch 2 --steps 1",)}),
    "onediffusion": paper_stage("onediffusion", "config.json", {
        "cpu": (
            FRAMES + "--batch 16 --ema 0.995 --scenes 6000 --steps 8000",
            FRAMES + "--start {adapters}/onediffusion --shift 3 --seed 1 --batch 16 --lr 1e-3 "
            "--ema 0.995 --scenes 6000 --steps 4000"),
        "gpu": (
            FRAMES + "--shift 3 --batch 64 --lr 1e-3 --ema 0.995 --scenes 24000 --steps 20000",),
        "toy": (FRAMES + "--batch 2 --scenes 24 --steps 1 --depth 1 --hidden-size 96",)}),
}


# Making them --------------------------------------------------------------------------------------

def arguments(stage: Stage, size: str, work: Path, base: Path) -> list[list[str]]:
    """The commands of a stage, each split into train.py's arguments."""
    folders = {"base": base}
    for name in ("model", "panels", "adapters"):
        folders[name] = work / name
    commands = []
    for command in stage.commands[size]:
        commands.append([word.format(**folders) for word in shlex.split(command)])
    return commands


def base_of(work: Path) -> Path:
    """The folder of the model that ships, or will: with panels, if ordinary prompts did not suffer.

    Where the work folder has no model, it is the one in weights/.
    """
    note = work / "panels.json"
    if note.exists() and json.loads(note.read_text())["quality"]["gain"] >= -TOLERANCE:
        return work / "panels"
    if (work / "model" / UNET).exists():
        return work / "model"
    return ROOT / "weights" / "tiny"


def builds_on(name: str, size: str, work: Path) -> dict[str, str]:
    """{weights: their sha256} of what a stage builds on. InputError where they are not made."""
    stage = STAGES[name]
    files = {need: work / STAGES[need].makes for need in stage.needs}
    if any("{base}" in command for command in stage.commands[size]):
        files["base"] = base_of(work) / UNET
    for need, file in files.items():
        if not file.exists():
            raise InputError(f"{name} needs {need}, which is not made yet; make it first")
    return {need: sha256(file) for need, file in files.items()}


def settings_of(words: list[str]):
    """The training settings of a command."""
    recipe = importlib.import_module((train.RECIPES | PAPERS)[words[0]])
    return from_argv(recipe.Settings, words[1:], f"train.py {words[0]}")


def samples(commands: list[list[str]]) -> int:
    """How many samples the commands train on, over all steps."""
    return sum(config.steps * config.batch for config in map(settings_of, commands))


def code_hash(recipe: str) -> str:
    """A hash of the code that a recipe runs: its module and all that this imports of minipic.

    Comments and spaces do not count.
    """
    waiting = ["train", (train.RECIPES | PAPERS)[recipe]]
    seen = {}
    while waiting:
        module = waiting.pop()
        path = ROOT / Path(*module.split("."))
        path = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        if module in seen or not path.exists():
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        seen[module] = ast.unparse(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minipic"):
                waiting.append(node.module)
                waiting += [f"{node.module}.{alias.name}" for alias in node.names]
    text = "".join(f"{module}\n{code}\n" for module, code in sorted(seen.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def make(name: str, size: str, work: Path, processes: int, minutes: float):
    """Run a stage, unless it is made already. InputError where a command fails or is stopped.

    minutes: when to end it, 0: never. Its commands get shares of them by their samples.
    """
    stage = STAGES[name]
    commands = arguments(stage, size, work, base_of(work))
    origin = {"code": code_hash(commands[0][0]), "builds_on": builds_on(name, size, work)}
    made = {"commands": list(stage.commands[size]), "minutes_limit": minutes, **origin}
    note = work / f"{name}.json"
    if (work / stage.makes).exists() and is_noted(note, made):
        print(f"{name}: made already")
        return
    trained = []
    for number, words in enumerate(commands):
        limit = minutes * samples([words]) / samples(commands)
        folder = work / "runs" / f"{name}-{number}"
        trained.append(run(words, folder, origin, processes, limit))
    row = {
        **made, "samples": sum(noted["samples"] for noted in trained),
        "minutes": round(sum(noted["minutes"] for noted in trained), 1),
        "quality": stage.measure(work, SIZES[size])}
    write_note(note, {**row, **machine()})
    for number in range(len(commands)):
        shutil.rmtree(work / "runs" / f"{name}-{number}")
    print(f"{name}: {row['minutes']} minutes, {row['quality']}")


def is_noted(note: Path, made: dict) -> bool:
    """Whether a note was written for these commands and this code."""
    if not note.exists():
        return False
    noted = json.loads(note.read_text())
    return all(noted.get(key) == value for key, value in made.items())


def write_note(note: Path, values: dict):
    note.parent.mkdir(parents=True, exist_ok=True)
    with replacing(note) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def run(words: list[str], folder: Path, origin: dict, processes: int, limit: float) -> dict:
    """Train in a run folder, going on where it was stopped, for `limit` minutes in all (0: no end).

    A run that was begun with another command, limit or origin (code and weights) begins anew.
    Returns its note, with the minutes that it took and its samples.
    """
    note = folder / "run.json"
    made = {"words": words, "limit": limit, **origin}
    if not is_noted(note, made):
        shutil.rmtree(folder, ignore_errors=True)
        write_note(note, {**made, "minutes": 0.0, "samples": 0, "finished": False})
    noted = json.loads(note.read_text())
    if noted["finished"]:
        return noted

    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(ROOT / "train.py"), *words, "--out", str(folder), "--sample-every", "0"]
    command += ["--overwrite"]  # the stages fill one folder, one after the other
    if limit:
        command += ["--minutes", str(limit)]
    if (folder / "checkpoints").exists():
        command += ["--resume", "latest"]
    start = time.monotonic()
    exit_code = run_program(command)
    noted["minutes"] += (time.monotonic() - start) / 60
    steps_done, time_share = progress(folder / "log.jsonl")
    config = settings_of(words)
    noted["samples"] = steps_done * config.batch
    noted["finished"] = exit_code == 0 and (steps_done == config.steps or time_share == 1)
    write_note(note, noted)
    if not noted["finished"]:
        raise InputError(
            f"{folder}: stopped after step {steps_done}; the same command goes on from there")
    return noted


def progress(log: Path) -> tuple[int, float]:
    """(steps done, share of the time that was over) by the last line of a run's log."""
    if not log.exists():
        return 0, 0.0
    row = json.loads(log.read_text().splitlines()[-1])
    return row["step"], row.get("time_share", 0.0)


def run_program(command: list[str]) -> int:
    """The exit code of a program. SIGINT and SIGTERM are passed on: train.py saves, then stops."""
    program = subprocess.Popen(command, cwd=ROOT)

    def pass_on(number, frame):
        program.send_signal(number)

    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.signal(number, pass_on)
    try:
        return program.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# From the work folder to what ships ---------------------------------------------------------------

def install(work: Path, weights: Path, names: list[str]):
    """Copy what these stages made over what ships. InputError where one is missing.

    With t2i the whole model is copied, and what panels made if it is better.
    """
    for name in names:
        if not STAGES[name].ships:
            raise InputError(f"{name} ships with the whole model only; install t2i, or all stages")
        for needed in (name, *STAGES[name].needs):
            if not (work / f"{needed}.json").exists() or not (work / STAGES[needed].makes).exists():
                raise InputError(f"{work}: {needed} is not made yet; make it first")
    rows_file = weights / "made.json"
    rows = json.loads(rows_file.read_text()) if rows_file.exists() else {}
    for name in names:
        for made, shipped in STAGES[name].ships.items():
            copy_over(work / made, weights / shipped)
        for noted in (name, *STAGES[name].needs):
            rows[noted] = json.loads((work / f"{noted}.json").read_text())
    if "t2i" in names and base_of(work) == work / "panels":
        copy_over(work / "panels" / "unet", weights / "tiny" / "unet")
        rows["panels"] = json.loads((work / "panels.json").read_text())
    elif "t2i" in names:
        rows.pop("panels", None)
    rows = {name: rows[name] for name in STAGES if name in rows}
    write_note(rows_file, rows)
    write_table(rows, weights / "README.md")


def copy_over(source: Path, target: Path):
    """A file or a whole folder, in the place of the one that is there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        with replacing_folder(target) as temporary:
            shutil.copytree(source, temporary, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, target)


MARK = "<!-- written by weights/make.py -->\n"


def write_table(rows: dict[str, dict], readme: Path):
    """Write what was made, and what it is good for, between the two marks of a README."""
    lines = ["| stage | commands | samples | minutes | quality | on |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        commands = "<br>".join(f"`train.py {command}`" for command in row["commands"])
        if row.get("minutes_limit"):
            commands += f"<br>ended after {row['minutes_limit']:g} minutes"
        quality = ", ".join(f"{what} {value:.3g}" for what, value in row["quality"].items())
        where = f"{row['gpu'] or row['cpu']}, torch {row['torch']}, {row['date']}"
        lines.append(
            f"| {name} | {commands} | {row['samples']:,} | {row['minutes']} | {quality} "
            f"| {where} |")
    text = readme.read_text(encoding="utf-8") if readme.exists() else MARK + MARK
    with replacing(readme) as temporary:
        temporary.write_text(with_table(text, lines), encoding="utf-8")


def with_table(text: str, lines: list[str]) -> str:
    """A text with these lines between its two MARKs, in the place of those that are there."""
    if text.count(MARK) != 2:
        raise InputError(f"README.md needs two lines {MARK.strip()} for the table between them")
    before, _, after = text.split(MARK)
    return MARK.join([before, "".join(f"{line}\n" for line in lines), after])


def print_plan(names: list[str], size: str, work: Path):
    """The commands of the stages, their samples, and the minutes that they took last."""
    base = work / "model" if "t2i" in names else base_of(work)
    for name in names:
        stage = STAGES[name]
        commands = arguments(stage, size, work, base)
        note = work / f"{name}.json"
        minutes = f"{json.loads(note.read_text())['minutes']} minutes" if note.exists() else "?"
        print(f"{name}: {samples(commands):,} samples, last took {minutes}")
        for words in commands:
            print(f"    python train.py {shlex.join(words)}")


def main(argv: list[str] | None = None) -> int:
    """Read the command line and make the stages. Returns the exit code, 2 if one cannot be made."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--size", choices=SIZES, default="cpu", help="how much to train")
    parser.add_argument("--processes", type=int, default=1, help="for each training, by torchrun")
    parser.add_argument("--work", type=Path, help="work folder; runs/make/SIZE if left out")
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="for each stage, then it ends; 0: no limit")
    parser.add_argument("--plan", action="store_true", help="print what would be run, and stop")
    parser.add_argument("--install", action="store_true", help="then replace what ships of them")
    parser.add_argument("--weights", type=Path, default=ROOT / "weights", help="where those are")
    options = parser.parse_args(argv)
    work = (options.work or Path("runs", "make", options.size)).resolve()
    try:
        if not options.minutes >= 0:
            raise InputError(f"--minutes: must be at least 0, not {options.minutes:g}")
        unknown = [name for name in options.stages if name not in STAGES]
        if unknown:
            raise InputError(f"stage {unknown[0]!r} is unknown; choose of {', '.join(STAGES)}")
        default = [name for name, stage in STAGES.items() if not stage.optional]
        names = [name for name in STAGES if name in (options.stages or default)]
        if options.plan:
            print_plan(names, options.size, work)
            return 0
        for name in names:
            make(name, options.size, work, options.processes, options.minutes)
        if options.install:
            shipping = [name for name in names if STAGES[name].ships]
            install(work, options.weights, shipping or names)
        return 0
    except InputError as error:
        print(f"make.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
