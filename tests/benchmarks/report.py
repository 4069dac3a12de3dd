"""Writes what was measured, and the maps of the code.

    python tests/benchmarks/report.py

RESULTS.md is made anew from the JSON files beside it. In README.md and minipic/README.md, what stands between two equal
marks such as `<!-- map -->` is made anew: the maps of the code, and the handful of numbers that README.md quotes.
"""

import ast
import json
import statistics
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

CORE, PLUMBING, LAB, SCRIPTS = "the core", "the plumbing", "the lab", "the scripts"
ROOMS = {  # in the order of README's map: (zone, what it holds)
    "models": (CORE, "the networks; attribute paths are the official checkpoint keys"),
    "layers": (CORE, "what goes inside a network, or replaces a part of it"),
    "diffusion": (CORE, "noise schedule, objectives, samplers, guidance; knows no network"),
    "text.py": (CORE, "prompts -> what a UNet reads of them"),
    "pipeline.py": (CORE, "the whole way from a prompt to a picture"),
    "latents.py": (CORE, "pictures and captions -> batches of latents, and the loss on them"),
    "papers": (CORE, "one file per paper"),
    "draw_settings.py": (PLUMBING, "what to draw, checked by itself and against the model"),
    "recipes": (PLUMBING, "the ordinary ways to train, and the three that make the tiny model"),
    "weights": (PLUMBING, "files in and out: checks, names, layouts; LoRAs, embeddings, ControlNets"),
    "training": (PLUMBING, "settings and flags, optimizer, processes, checkpoints, own photos"),
    "kernels": (PLUMBING, "the fast path: flash attention, fused norms, CUDA graphs, casting"),
    "image.py": (PLUMBING, "pictures in and out"),
    "figures.py": (PLUMBING, "labelled grids and curves"),
    "common.py": (PLUMBING, "errors, checked configs, counter-based randomness"),
    "world": (LAB, "a procedural 3-D world with exact truth, its captions, tasks, styles and judge"),
}


def main():
    (HERE / "RESULTS.md").write_text(results(), encoding="utf-8")
    for path, blocks in BLOCKS.items():
        file = ROOT / path
        text = file.read_text(encoding="utf-8")
        file.write_text(with_blocks(text, blocks), encoding="utf-8")


# Maps ---------------------------------------------------------------------------------------------------------

def package() -> list[Path]:
    """The Python files that a reader is asked to read."""
    files = [*sorted((ROOT / "minipic").rglob("*.py")), ROOT / "train.py", ROOT / "sample.py"]
    return [file for file in files if file.read_text(encoding="utf-8").strip()]


def count_lines(path: Path) -> int:
    """The lines of a file, or of all Python files in a folder."""
    files = path.rglob("*.py") if path.is_dir() else [path]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def room_map() -> list[str]:
    """One line per room, under its zone with the zone's total."""
    lines = []
    for zone in (CORE, PLUMBING, LAB):
        rooms = [name for name, (of_zone, _) in ROOMS.items() if of_zone == zone]
        total = sum(count_lines(ROOT / "minipic" / name) for name in rooms)
        lines.append(f"{zone}, {total:,} lines")
        for name in rooms:
            path = ROOT / "minipic" / name
            label = f"minipic/{name}" + "/" * path.is_dir()
            lines.append(f"  {label:22} {count_lines(path):5}  {ROOMS[name][1]}")
    scripts = [ROOT / "sample.py", ROOT / "train.py"]
    lines.append(f"{SCRIPTS}, {sum(map(count_lines, scripts)):,} lines, each read from top to bottom")
    for path in scripts:
        lines.append(f"  {path.name:22} {count_lines(path):5}")
    return lines


def file_map() -> list[str]:
    """One line per file, with the first sentence of its docstring."""
    lines = []
    for path in package():
        name = path.relative_to(ROOT).as_posix()
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        sentence = docstring.partition("\n\n")[0].replace("\n", " ").partition(". ")[0].rstrip(".")
        lines.append(f"{name:36} {count_lines(path):5}  {sentence}")
    return lines


def code_block(lines: list[str]) -> list[str]:
    return ["```", *lines, "```"]


def with_blocks(text: str, blocks: dict) -> str:
    """A README whose blocks are made anew: {name of the mark: a function that gives the lines}."""
    for name, lines in blocks.items():
        mark = f"<!-- {name} -->\n"
        before, _, after = text.split(mark)  # ValueError where the two marks are missing
        text = mark.join([before, "\n".join([*lines(), ""]), after])
    return text


# What README.md quotes ----------------------------------------------------------------------------------------

def first_run() -> list[str]:
    """How long a newcomer's two commands take, and how much disk."""
    found = read("first_run")
    if found is None:
        return [""]
    measured = found["results"]
    return [f"Measured on two cores of a CPU ({found['cpu']}): installing takes {measured['install s']:.0f} seconds and "
            f"{measured['disk GB']:.1f} GB of disk, the pictures {measured['draw s']:.0f} seconds, the tests "
            f"{measured['tests s'] / 60:.0f} minutes."]


def memory() -> list[str]:
    """What SDXL takes at full size."""
    found = read("memory")
    if found is None:
        return [""]
    rows = []
    for case, row in found["results"].items():
        rows.append([case, f"{row['own GB']:.1f} GB", f"{row['mapped GB']:.1f} GB"])
    return [*table(["SDXL base on a CPU", "own memory", "mapped files"], rows), "",
            "Mapped files may be dropped and read again by the system. On CPUs without bf16, weights stay in the 16 bits of "
            f"their file and are widened while their layer computes. Random weights; {source(found)}"]


def headline() -> list[str]:
    """What the shipped tiny model draws right."""
    found = read("quality")
    one, two = (statistics.mean(row["whole"] for row in found["results"][name]) for name in ("one object", "two objects"))
    return [f"The shipped tiny model draws {one:.2f} of the captions with one object and {two:.2f} of those with two wholly "
            "right, as its judge reads them, on scenes that it never saw."]


# Results ------------------------------------------------------------------------------------------------------

def results() -> str:
    """The text of RESULTS.md."""
    lines = [
        "# Results", "",
        "Everything here is written by `python tests/benchmarks/report.py` from the JSON files in this folder. Each "
        "holds the command, the seeds, the date, the hardware and the versions; the command makes it anew.", ""]
    for section in (quality, loss_by_timestep, baselines, networks, attention, casting, loading, world):
        lines += section()
    return "\n".join(lines).rstrip() + "\n"


def read(name: str) -> dict | None:
    """What a benchmark has written, None if it has not run."""
    path = HERE / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def source(found: dict) -> str:
    """How, when and on what something was measured."""
    machine = found.get("gpu") or found.get("cpu") or found.get("machine")
    return f"`{found['command']}`, {found['date']}, {machine}, PyTorch {found['torch']}."


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def cell(values: list) -> str:
    """Mean and spread over the seeds; empty where nothing was asked (None or NaN)."""
    first = values[0]
    if first is None or first != first:
        return ""
    spread = f" ±{max(values) - min(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def quality() -> list[str]:
    found = read("quality")
    measured = found["results"]
    facts = ("color", "shape", "size", "pattern", "place", "relation", "floor", "sky", "count", "whole")
    rows = []
    for name, seeds in measured.items():
        if isinstance(seeds, list):
            rows.append([name, *(cell([seed[fact] for seed in seeds]) for fact in facts)])
    sweeps = []
    for name in ("guidance", "steps"):
        for value, row in measured[name].items():
            sweeps.append([f"{name} {value}", f"{row['whole']:.3f}", f"{row['frechet']:.2f}"])
    drawn, floor = measured["frechet"].values()
    return [
        "## What the tiny model draws", "",
        "Captions of scenes that no model was trained on; \"unseen\" ones name a colour and shape that never occur "
        "together in training. The judge, a small network that reads pictures of the world, says which share of the "
        "facts of a caption hold in the picture. `whole`: all of them, and no object more. \"renders\" are exact "
        "pictures of the same captions, so they show the judge's own errors. Mean and spread over the seeds.", "",
        *table(["captions", *facts], rows), "",
        "Other settings, on captions with two objects. The Fréchet distance compares the judge's features of drawn "
        "pictures with those of renders; lower is nearer.", "",
        *table(["setting", "whole caption", "Fréchet distance"], sweeps), "",
        f"Fréchet distance of drawn pictures to renders {drawn:.2f}, of renders to other renders {floor:.2f}. The VAE "
        f"gives renders that it never saw back with {measured['vae psnr']:.1f} dB PSNR. {found['pictures']} pictures "
        f"per cell, {found['seeds']} seeds. {source(found)}", ""]


def loss_by_timestep() -> list[str]:
    found = read("loss_by_timestep")
    if found is None:
        return []
    rows = []
    for t, row in found["results"].items():
        rows.append([t, f"{row['before']:.4f}", f"{row['now']:.4f}", f"{row['text before']:.4f}", f"{row['text now']:.4f}"])
    return [
        "## The loss at each noise level", "",
        "Of the third and the fourth training run of the tiny UNet (weights/README.md), on pictures of two objects that "
        "no model saw. `text`: how much the loss grows when the caption is left out, that is, how much the text says.",
        "", *table(["timestep", "before", "after", "text before", "text after"], rows), "",
        f"{found['pictures']} pictures. {source(found)}", ""]


def baselines() -> list[str]:
    found = read("baselines")
    lines = ["## Fine-tuning the tiny model", ""]
    if found is None:
        return [*lines, "Not yet measured (`python tests/benchmarks/baselines.py`).", ""]
    lines += [
        "The recipes against the number of steps. `renders` are the truth (the ceiling), `untouched` is the model before "
        "training. What each column counts is described at the top of `tests/benchmarks/cases.py`; in short:", "",
        "- subject: `identity` the subject is right, `setting` what the prompt says around it, `class` other members of "
        "its class are still drawn, `leak` they look like the subject, `others` everything else is still drawn;",
        "- control: `edge F1` of the map's edges, `layout` all shapes, sizes and places right, `text` all that the "
        "prompt says;",
        "- edit: `changed` what the instruction changes is right, `kept` all else is, `edited` both, PSNR to the exact "
        "picture in dB.", ""]
    for task in dict.fromkeys(row["task"] for row in found["results"]):
        lines += [*baseline_table(task, [row for row in found["results"] if row["task"] == task]), ""]
    machines = {}
    for row in found["results"]:
        if "cpu" in row:
            machines.setdefault(row["cpu"], {})[row["task"]] = True
    where = "; ".join(f"{', '.join(tasks)} on {cpu}" for cpu, tasks in machines.items())
    return [*lines, f"{found['pictures']} pictures per cell and seed, mean and spread. "
            f"`python tests/benchmarks/baselines.py`, {found['date']}, {where}, PyTorch {found['torch']}.", ""]


def baseline_table(task: str, rows: list[dict]) -> list[str]:
    """One task: a row for each recipe and number of steps."""
    facts = list(dict.fromkeys(fact for row in rows for scores in row["at"].values() for fact in scores))
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        seeds = [row for row in rows if row["name"] == name]
        cost = ["", "", ""]
        if "bytes" in seeds[0]:
            seconds = statistics.mean(row["seconds a step"] for row in seeds)
            cost = [f"{seeds[0]['trained']:,}", f"{seeds[0]['bytes'] / 1e6:.2f} MB", f"{seconds:.2f}"]
        for steps in seeds[0]["at"]:
            cells = [cell([row["at"][steps].get(fact) for row in seeds]) for fact in facts]
            lines.append([name, "" if steps == "0" else steps, len(seeds), *cells, *cost])
    return table([task, "steps", "seeds", *facts, "trained weights", "file", "s/step"], lines)


def networks() -> list[str]:
    lines = [
        "## Whole networks beside diffusers", "",
        "Processor time of one thread on a CPU, time on a GPU. `speed`: diffusers' time over this row's. `GEMM rate`: "
        "the share of the speed of one large matrix product, measured in the same run, that the network reaches. "
        "\"minipic graph\" is what sample.py does on a GPU, \"triton attention\" has minipic's flash attention in place "
        "of PyTorch's.", ""]
    rows, sources = [], []
    for name in ("unet_step", "unet_step-gpu", "vae", "train_step", "picture"):
        found = read(name)
        if found is None:
            continue
        program = name.replace("-gpu", " (GPU)").replace("_", " ")
        sources.append(source(found))
        for case, ways in found["results"].items():
            for way, row in ways.items():
                memory = f"{row['peak GB']:.1f} GB" if "peak GB" in row else ""
                rows.append([f"{program}: {case}, {way}", f"{row['ms']:.1f}", f"{row['speed over diffusers']:.2f}",
                             f"{row['share of GEMM rate']:.2f}", memory])
    return [*lines, *table(["network", "ms", "speed", "GEMM rate", "peak memory"], rows), "",
            "Not yet measured on a GPU: diffusers compiled, and the programs without a row. " + " ".join(sources), ""]


def attention() -> list[str]:
    lines = ["## Attention", ""]
    for name, unit in (("attention", "a CPU"), ("attention-gpu", "a GPU")):
        found = read(name)
        if found is None:
            continue
        cases = {}
        for shape, passes in found["results"].items():
            for which, ways in passes.items():
                cases[f"{shape}, {which}"] = ways
        ways = list(dict.fromkeys(way for row in cases.values() for way in row))
        rows = []
        for case, row in cases.items():
            rows.append([case, *(f"{row[way]['ms']:.3f}" if way in row else "" for way in ways)])
        calls = "" if "calls" in found or not found["gpu"] else (
            "Each call by itself, with the time that Python takes to start it. ")
        lines += [f"Milliseconds on {unit}; `sdpa` is PyTorch's choice of kernel, the others are its single kernels and "
                  "minipic's.", "", *table(["attention", *ways], rows), "", calls + source(found), ""]
    return lines


def casting() -> list[str]:
    found = read("casting")
    if found is None:
        return []
    rows = []
    for way, row in found["results"].items():
        error = format(row["error"], ".0e") if row["error"] else "0"
        rows.append([way, f"{row['load and first step s']:.0f} s", f"{row['a step s']:.1f} s",
                     f"{row['own GB']:.1f} GB", f"{row['mapped GB']:.1f} GB", error])
    return [
        "## SDXL's UNet on a CPU without bf16", "",
        "One row of text at 256x256, random weights, from a file in 16 bits. Processor time of one thread; the peaks of "
        "the memory of its own and of the mapped file, which need not come together. `error`: the largest difference to "
        "the first row over its largest number.", "",
        *table(["way to compute", "load and first step", "a step", "own memory", "mapped file", "error"], rows), "",
        source(found), ""]


def loading() -> list[str]:
    found = read("loading")
    rows = []
    for layout, cases in found["results"].items():
        for case in ("minipic", "minipic to bf16"):
            row = cases[case]
            rows.append([f"{layout}, {case}", f"{row['ratio']:.2f}", f"{row['beyond_weights'] / 1e9:.2f} GB"])
    return [
        "## Loading SDXL base, 6.94 GB in 16 bits", "",
        "`time`: over safetensors' `load_file` and one copy, or one conversion, of each tensor. `memory`: beyond the "
        "weights. Random weights in the official layouts.", "",
        *table(["layout", "time", "memory"], rows), "", source(found), ""]


def world() -> list[str]:
    found = read("world")
    speed = found["results"]["sample and render"]
    return ["## The world", "", f"{speed:.0f} scenes of 64x64 pixels per second are composed and rendered on one core. "
            + source(found), ""]


BLOCKS = {
    "README.md": {
        "map": lambda: code_block(room_map()), "first run": first_run, "memory": memory, "quality": headline},
    "minipic/README.md": {"map": lambda: code_block(file_map())},
}


if __name__ == "__main__":
    main()
