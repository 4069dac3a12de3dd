"""Bring README.md up to date: the map of the code between its two `<!-- map -->` lines, and the tables of what was
measured, from the JSON files beside this one, between its two `<!-- results -->` lines.

    python tests/benchmarks/readme.py

A line is `path  lines  text`, in the order of the names. A text stays as it was written; a file that the map lacks joins
with the first sentence of its docstring, one that is gone leaves.
"""

import ast
import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[2]
MARK, RESULTS = "<!-- map -->\n", "<!-- results -->\n"
LINE = re.compile(r"(\S+)\s+\d+(?:\s+(.*))?$")


def package():
    """The Python files that a reader is asked to read, as paths relative to the root."""
    files = [*ROOT.glob("minipic/**/*.py"), ROOT / "train.py", ROOT / "sample.py"]
    return sorted(f.relative_to(ROOT).as_posix() for f in files if f.exists() and f.stat().st_size)


def count(path):
    return len((ROOT / path).read_text(encoding="utf-8").splitlines())


def sentence(path):
    docstring = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n\n")[0].replace("\n", " ").partition(". ")[0].rstrip(".")


def rewrite(text):
    """README's text with the map of this moment. Raises ValueError where the two markers are missing."""
    before, block, after = text.split(MARK)
    entries = dict(match.groups() for match in map(LINE.match, block.splitlines()) if match)
    entries = {path: entries.get(path) or sentence(path) for path in package()}
    width = max(map(len, entries))
    lines = [f"{path:{width}}  {count(path):5}  {words}".rstrip() for path, words in entries.items()]
    return MARK.join([before, "\n".join(["```", *lines, "```", ""]), after])


def results(text):
    """README's text with the tables of this moment's measurements."""
    before, _, after = text.split(RESULTS)
    quality, loading, world = (json.loads(Path(__file__).with_name(f"{name}.json").read_text())
                               for name in ("quality", "loading", "world"))
    lines = [*quality_table(quality), *loading_table(loading), *casting_table(), *world_lines(world), *speed_table(), *attention_table(), *program_lines(),
             *optimizer_lines(), *baseline_tables()]
    return RESULTS.join([before, "\n".join(lines), after])


def quality_table(quality):
    """A row a kind of caption: what the judge reads in the drawn pictures, and its own errors on renders."""
    found = quality["results"]
    facts = ("color", "shape", "size", "pattern", "place", "relation", "floor", "sky", "count", "whole")
    yield from ["| captions | " + " | ".join(facts) + " |", "|---" * (len(facts) + 1) + "|"]
    for name, rows in found.items():
        if isinstance(rows, list):
            yield f"| {name} | " + " | ".join(cell([row[fact] for row in rows]) for fact in facts) + " |"
    sweeps = [(f"{name} {value}", row) for name in ("guidance", "steps") for value, row in found[name].items()]
    yield from ["", "| setting | whole caption | Fréchet distance |", "|---|---|---|"]
    yield from (f"| {name} | {row['whole']:.3f} | {row['frechet']:.2f} |" for name, row in sweeps)
    drawn, floor = found["frechet"].values()
    yield from ["", f"Fréchet distance of judge features, two objects: drawn to rendered {drawn:.2f}, "
                f"rendered to other rendered {floor:.2f}. VAE: {found['vae psnr']:.1f} dB PSNR on renders it never saw.",
                "",
                f"`{quality['command']}`, {quality['pictures']} pictures a cell, {quality['seeds']} seed(s), "
                f"mean and spread; {quality['date']}, {quality['cpu']}, torch {quality['torch']}."]


def loading_table(loading):
    """Full-size SDXL from disk, beside the safetensors library."""
    yield from ["", "| loading SDXL base, 6.94 GB in 16 bits | time over safetensors | memory beyond the weights |",
                "|---|---|---|"]
    for layout, cases in loading["results"].items():
        for case in ("minipic", "minipic to bf16"):
            row = cases[case]
            yield f"| {layout}, {case} | {row['ratio']:.2f} | {row['beyond_weights'] / 1e9:.2f} GB |"
    yield from ["", "Over safetensors: `load_file` and one copy, or one conversion, of each tensor. Random weights in "
                f"the official layouts; `{loading['command']}`, {loading['date']}, {loading['machine']}."]


def casting_table(path=Path(__file__).with_name("casting.json")):
    """The ways to compute in fp32 with weights of 16 bits, where a CPU has no bf16."""
    if path.exists():
        found = json.loads(path.read_text())
        yield from ["", "| SDXL's UNet on a CPU without bf16, from a file in 16 bits | load and first step | a step | own "
                    "memory | mapped file | error |", "|---" * 6 + "|"]
        for way, row in found["results"].items():
            yield (f"| {way} | {row['load and first step s']:.0f} s | {row['a step s']:.1f} s | {row['own GB']:.1f} GB "
                   f"| {row['mapped GB']:.1f} GB | {row['error'] and format(row['error'], '.0e')} |")
        yield from ["", f"One row of text, random weights; processor time of one thread, the peaks of both kinds of memory "
                    f"(they need not come together); error: the largest difference to the first way over its largest "
                    f"number. `{found['command']}`, {found['date']}, {found['cpu']}, torch {found['torch']}."]


def world_lines(world):
    speed = world["results"]
    yield from ["", f"The world samples and renders {speed['sample and render']:.0f} scenes of 64x64 a second on one "
                f"core (`{world['command']}`, {world['date']}, {world['cpu']}).", ""]


def speed_table(folder=Path(__file__).parent):
    """Whole networks beside diffusers, a row a program, case and way to run it, from those that were measured."""
    measured = [json.loads(path.read_text()) for name in ("unet_step", "unet_step-gpu", "vae", "train_step", "picture")
                if (path := folder / f"{name}.json").exists()]
    if not measured:
        return
    yield from ["", "| whole networks | ms | speed over diffusers | share of GEMM rate | peak memory |", "|---" * 5 + "|"]
    for found in measured:
        program = found["command"].split()[1].split("/")[-1].removesuffix(".py").replace("_", " ") + " (GPU)" * bool(found["gpu"])
        for case, rows in found["results"].items():
            for name, row in rows.items():
                memory = f"{row['peak GB']:.1f} GB" if "peak GB" in row else ""
                yield (f"| {program}: {case}, {name} | {row['ms']:.1f} | {row['speed over diffusers']:.2f} "
                       f"| {row['share of GEMM rate']:.2f} | {memory} |")
    yield from ["", "Processor time of one thread on a CPU, time on a GPU. " + " ".join(
        f"`{found['command']}`, {found['date']}, {found['gpu'] or found['cpu']}, torch {found['torch']}."
        for found in measured)]
    yield ("On a GPU, diffusers compiled (`unet_step.py` without `--compile 0`) and the other programs: not yet measured. "
           "\"minipic graph\" is what sample.py does there; \"triton attention\" is ours instead of PyTorch's.")
    yield ""


def attention_table(path=Path(__file__).with_name("attention-gpu.json")):
    """The attention kernels on a GPU, in ms; the file is what attention.py wrote there."""
    if path.exists():
        found = json.loads(path.read_text())
        rows = {f"{shape}, {what}": row for shape, kinds in found["results"].items() for what, row in kinds.items()}
        names = list(next(iter(rows.values())))
        yield from ["", "| attention, ms | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        yield from (f"| {case} | " + " | ".join(f"{row[name]['ms']:.3f}" for name in names) + " |"
                    for case, row in rows.items())
        one = "" if "calls" in found else "Each call by itself, what Python takes to start it included. "
        yield from ["", f"{one}`{found['command']}`, {found['date']}, {found['gpu']}, torch {found['torch']}. PyTorch's kernels "
                    "are the faster ones at every shape, and so they are what is used.", ""]


def program_lines(path=Path(__file__).with_name("programs.json")):
    """The programs on the tiny model, before and after the last change for speed."""
    if path.exists():
        found = json.loads(path.read_text())
        yield from ["On the tiny model: " + "; ".join(
            f"a {what} takes {row['now']:.2f} s instead of {row['before']:.2f} s ({row['before'] / row['now']:.2f} times as "
            "fast)" for what, row in found["results"].items()) + f". Processor time of one thread, against commit "
            f"{found['before']}; `{found['command']}`, {found['date']}, {found['cpu']}, torch {found['torch']}.", ""]


def optimizer_lines(path=Path(__file__).with_name("optimizers.json")):
    """What another optimizer changes, on the same batches."""
    if path.exists():
        found = json.loads(path.read_text())
        adamw, muon = (found["results"][name] for name in ("adamw", "muon"))
        losses = ", ".join(f"{one:.3f} ({other:.3f})" for one, other in zip(muon["loss by quarter"], adamw["loss by quarter"]))
        yield from [f"`train.py t2i --from-nothing --optimizer muon` has a mean loss of {losses} in the four quarters of a "
                    f"short run (in brackets AdamW's, on the same batches) at {muon['samples a second']:.1f} "
                    f"({adamw['samples a second']:.1f}) samples a second of one core; `{found['command']}`, "
                    f"{found['date']}, {found['cpu']}, torch {found['torch']}.", ""]


def baseline_tables(path=Path(__file__).with_name("baselines.json")):
    """The recipes for fine-tuning, a table a task and a row a recipe and number of steps."""
    if not path.exists():
        yield from ["Fine-tuning, each recipe's quality against steps: not yet measured "
                    "(`python tests/benchmarks/baselines.py`).", ""]
        return
    found = json.loads(path.read_text())
    for task in dict.fromkeys(row["task"] for row in found["results"]):
        rows = [row for row in found["results"] if row["task"] == task]
        facts = list(dict.fromkeys(fact for row in rows for scores in row["at"].values() for fact in scores))
        heads = [task, "steps", "seeds", *facts, "trained weights", "file", "s/step"]
        yield from ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for name in dict.fromkeys(row["name"] for row in rows):
            seeds = [row for row in rows if row["name"] == name]
            cost = [""] * 3 if "bytes" not in seeds[0] else [
                f"{seeds[0]['trained']:,}", f"{seeds[0]['bytes'] / 1e6:.2f} MB",
                f"{statistics.mean(row['seconds a step'] for row in seeds):.2f}"]
            for steps in seeds[0]["at"]:
                cells = [cell([row["at"][steps].get(fact) for row in seeds]) for fact in facts]
                yield "| " + " | ".join([name, "" if steps == "0" else steps, str(len(seeds)), *cells, *cost]) + " |"
    trained = [row for row in found["results"] if "cpu" in row]
    cpus = "; ".join(f"{' and '.join(dict.fromkeys(row['task'] for row in trained if row['cpu'] == cpu))} on {cpu}"
                     for cpu in dict.fromkeys(row["cpu"] for row in trained))
    yield from ["", "What is counted is told at the top of `tests/benchmarks/cases.py`. `python tests/benchmarks/baselines.py`, "
                f"{found['pictures']} pictures a cell and seed, mean and spread; {found['date']}, torch {found['torch']}, "
                f"{found['threads']} thread: {cpus}.", ""]


def cell(values):
    """Mean and spread; empty where nothing was asked (None or nan)."""
    if values[0] is None or values[0] != values[0]:
        return ""
    spread = f" ±{max(values) - min(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(rewrite(results(readme.read_text(encoding="utf-8"))), encoding="utf-8")
