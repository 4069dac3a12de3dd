"""Writes what was measured, and the maps of the code.

    python tests/benchmarks/report.py

RESULTS.md is made anew from the JSON files beside it. In README.md and minipic/README.md, what stands between two equal
marks such as `<!-- map -->` is made anew: the maps of the code, and the handful of numbers that README.md quotes.
"""

import argparse
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
    "papers": (CORE, "one file per paper, and what two of them set apart"),
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
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
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
            "`own memory` is the peak of what the process itself fills. `mapped files` is the peak of the files that are "
            "mapped into memory, which the system may drop and read again. On CPUs without bf16, weights stay in the 16 bits of "
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
        "holds the command, the seeds, the date, the hardware and the versions; the command makes it anew, of "
        "a table that grew in several runs the last part. The figures are drawn from the same files by `python tests/benchmarks/figures.py`.", ""]
    for section in (quality, loss_by_timestep, baselines, mtu, in_domain, specialist, onediffusion, networks, attention,
                    attention_sweep, casting, loading, damage, world):
        lines += section()
    return "\n".join(lines).rstrip() + "\n"


def read(name: str) -> dict | None:
    """What a benchmark has written, None if it has not run."""
    path = HERE / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def source(found: dict) -> str:
    """How, when and on what something was measured."""
    machine = found.get("gpu") or found.get("cpu") or found.get("machine")
    note = f" {found['note']}" if "note" in found else ""
    return f"`{found['command']}`, {found['date']}, {machine}, PyTorch {found['torch']}.{note}"


SEEDS = "Mean over the seeds of the table, thin bars from the lowest to the highest."  # of figures


def figure(name: str, sentence: str) -> list[str]:
    """The pictures of figures.py whose names begin so, over a sentence that says what they show."""
    paths = sorted((HERE / "figures").glob(f"{name}*.png"))
    links = [f"![{path.stem}](figures/{path.name})" for path in paths]
    return [*links, "", sentence, ""] if links else []


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
    counted = " \"counted\" ones count alike things: \"two red cubes\"." if "counted" in measured else ""
    return [
        "## What the tiny model draws", "",
        "Captions of scenes that no model was trained on; \"unseen\" ones name a colour and shape that never occur "
        f"together in training.{counted} The judge, a small network that reads pictures of the world, says which share of the "
        "facts of a caption hold in the picture. Of each object: `color` (both colours of a pattern), `shape`, `size`, "
        "`pattern` (plain, striped or checkered), `place` (left, middle or right). Of the picture: `relation` (one "
        "object left of, right of, in front of or behind another), `floor` and `sky` their colours, `count` the number of "
        "objects. `whole`: all that the caption says, and no object more. A cell is empty where no caption says such a "
        "thing. \"renders\" are exact pictures of the same captions, so they show the judge's own errors. Mean over the "
        "seeds, ± the largest value less the smallest.", "",
        *table(["captions", *facts], rows), "",
        "Other settings, on captions with two objects. `setting`: guidance with 30 steps, or steps with guidance 5; half as "
        "many pictures, of one seed. `whole caption` is `whole` of the table above. The Fréchet distance compares the judge's "
        "features of drawn pictures with those of renders; lower is nearer.", "",
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
        "Before and after the third training run of the tiny UNet (weights/README.md), on pictures of two objects that "
        "no model saw. `timestep`: the noise level, of 1000. `before`, `after`: the mean squared error of the "
        "prediction, weighed as by `--balanced`. `text before`, `text after`: how much that grows with the caption of "
        "another picture, that is, how much the text says.", "", *table(["timestep", "before", "after", "text before", "text after"], rows), "",
        f"{found['pictures']} pictures. {source(found)}", ""]


def baselines() -> list[str]:
    found = read("baselines")
    lines = ["## Fine-tuning the tiny model", ""]
    if found is None:
        return [*lines, "Not yet measured (`python tests/benchmarks/baselines.py`).", ""]
    lines += [
        "The recipes against the number of steps. `renders` are the truth (the ceiling), `untouched` is the model before "
        "training, `in words` the same when the prompt describes the subject. What each column counts is described at "
        "the top of `tests/benchmarks/cases.py`; in short:", "",
        "- subject: `identity` the subject is right, `setting` what the prompt says around it, `class` other members of "
        "its class are still drawn, `leak` they look like the subject, `others` everything else is still drawn;",
        "- control: `edge F1` of the map's edges (`shuffled`: of another picture's), `layout` all shapes, sizes, places and relations right, and `shape`, "
        "`size`, `place`, `relation` the share of each alone, `text` all that the prompt says;",
        "- edit: `changed` what the instruction changes is right, `kept` all else is, `edited` both, PSNR to the exact "
        "picture in dB;",
        "- all: `steps` of training, `seeds` how many runs, `trained weights` their number, `file` the size of what a "
        "user gets, `s/step` the processor time of one "
        "training step on one thread.", ""]
    for task in dict.fromkeys(row["task"] for row in found["results"]):
        lines += [*baseline_table(task, [row for row in found["results"] if row["task"] == task]), ""]
    machines = {}
    for row in found["results"]:
        if "cpu" in row:
            machines.setdefault(row.get("gpu") or row["cpu"], {})[row["task"]] = True
    where = "; ".join(f"{', '.join(tasks)} on {cpu}" for cpu, tasks in machines.items())
    return [*lines, f"{found['pictures']} pictures per cell and seed, mean and spread. "
            f"`python tests/benchmarks/baselines.py`, {found['date']}, {where}, PyTorch {found['torch']}.", "",
            *figure("onepic-edges", "How well the edges of a map are kept (edge F1) over the steps of training of ControlNet "
                    f"and of ONE-PIC, and ONE-PIC given another scene's map (shuffled); \"renders\" and \"untouched\" are drawn "
                    f"across. {SEEDS}"),
            *figure("onepic-edits", "Edits: the share in which what is asked changes, against the share in which all else is "
                    f"kept; the numbers beside the marks are steps of training. {SEEDS}")]


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


MTU_COLUMNS = {  # column: where its number is in the scores
    "one object": ("t2i", "one object"), "two objects": ("t2i", "two objects"),
    "changed": ("edit", "changed"), "kept": ("edit", "kept"), "edit PSNR": ("edit", "PSNR"),
    "sr PSNR": ("sr", "PSNR"), "inpaint PSNR": ("inpaint", "PSNR"), "hole PSNR": ("inpaint", "PSNR in the hole")}


def mtu() -> list[str]:
    found = read("mtu")
    if found is None:
        return []
    scored = [row for row in found["results"] if "scores" in row]
    _, pictures, steps = scored[0]["made"]["size"]
    rows = []
    for name in dict.fromkeys(row["name"] for row in scored):
        seeds = [row for row in scored if row["name"] == name]
        cells = []
        for task, fact in MTU_COLUMNS.values():
            cells.append(cell([row["scores"].get(task, {}).get(fact) for row in seeds]))
        trained = f"{seeds[0]['trained']:,}" if "trained" in seeds[0] else ""
        rows.append([name, len(seeds), *cells, trained])
    return [
        "## MTU", "",
        "One model for four tasks. `one object` and `two objects`: captions drawn wholly right; `changed` and `kept`: what "
        "an edit is asked to change, and all else, is right; `edit PSNR`, `sr PSNR`, `inpaint PSNR` and `hole PSNR` (in the "
        "hole alone): dB to the exact picture; `trained weights`: their number. \"untouched\" is the model before training, "
        "which hands back the given picture, enlarged or with its hole; N is the number of experts, \"scale 1\" the paper to "
        "the letter.", "",
        *table(["mtu", "seeds", *MTU_COLUMNS, "trained weights"], rows), "",
        f"{pictures} drawings of {steps} steps per cell and seed, mean and spread. {source(found)}", "",
        *figure("mtu-router", "The weights of the experts in each layer, for each task, at both scales, as the first seed "
                "learned them."),
        *figure("mtu-loss", f"The loss on unseen scenes for each task, mean over the noise levels; lower is better. {SEEDS}"),
        *figure("mtu-scores", f"The scores of the table above. {SEEDS}")]


def in_domain() -> list[str]:
    found = read("indomain")
    if found is None:
        return []
    facts = ("whole", "frechet", "style", "diversity", "drift", "forgotten")
    applied = ("style", "changed", "kept", "layout", "text", "edge F1", "whole")
    rows, uses = [], []
    for name in dict.fromkeys(row["entry"] for row in found["results"]):
        seeds = [row for row in found["results"] if row["entry"] == name]
        for steps, ways in seeds[0]["at"].items():
            for way in ways:
                scores = [row["at"][steps][way] for row in seeds]
                if way in ("edit", "translation", "object"):
                    uses.append([way, len(seeds), *(cell([score.get(fact) for score in scores]) for fact in applied)])
                    continue
                cells = [cell([score.get(fact) for score in scores]) for fact in facts]
                rows.append([name, "" if steps == "0" else steps, way, len(seeds), *cells])
    first = found["results"][0]
    return [
        "## In-domain generation", "",
        "A domain (mosaics) that no base model saw, learned from pictures without captions, against the ordinary ways. "
        "`steps`: of training; `weights`: of the predictions, or the guidance; `seeds`: runs. `application`: what the "
        "domain is used for; `changed`, `kept`, `layout`, `text` and `edge F1` as in the baselines. "
        "`whole`: everything that the caption says is read in the drawing; `frechet` and `style`: distances to true "
        "mosaics of other scenes; `diversity`: distance of two drawings of one caption; `drift`: how far the prediction "
        "for the null text has moved; `forgotten`: 1 - cosine of the guidance and the base model's. \"renders\" are true "
        "mosaics of the captions.", "", *table(["", "steps", "weights", "seeds", *facts], rows), "",
        "The applications of the trained domain: an edit of a mosaic, a picture from a map of edges, an object of voxels. "
        "Each column is explained at the top of `tests/benchmarks/indomain.py`.", "",
        *table(["application", "seeds", *applied], uses), "",
        f"{first['pictures']} drawings of {first['steps']} steps per cell and seed, mean and spread. {source(found)}", "",
        *figure("indomain-style", "Captions drawn wholly right against the distance to the domain's style; up and to the left "
                "is better. Decoupled: a line for each w_c, w_d beside the marks, after all steps. Of the other trained models, "
                f"the steps of training stand beside the marks. {SEEDS}"),
        *figure("indomain-frechet", f"The same against the Fréchet distance to true mosaics. {SEEDS}"),
        *figure("indomain-steps", "Captions drawn wholly right (control) and the distance to the domain's style (fidelity) over "
                "the steps of training, decoupled with w_d 2 and w_c 3, the others with guidance 5; at step 0 stands the base "
                f"model. {SEEDS}"),
        *figure("indomain-drift", "How far training moves the prediction for the null text, and how much of the guidance it "
                f"forgets, over the steps; decoupled leaves the base model as it is. {SEEDS}")]


def specialist() -> list[str]:
    lines, sources = [], []
    facts = ("style", "whole", "place", "nearest", "inverted")
    suffixes = ("inverted colors", "vertical flip")
    for file in ("specialist", "specialist-gpu"):
        found = read(file)
        if found is None:
            continue
        for style in dict.fromkeys(row["style"] for row in found["results"]):
            rows = []
            of_style = [row for row in found["results"] if row["style"] == style]
            for name in dict.fromkeys(row["name"] for row in of_style):
                seeds = [row for row in of_style if row["name"] == name]
                for steps in seeds[0]["at"]:
                    scores = [row["at"][steps] for row in seeds]
                    cells = [cell([score[fact] for score in scores]) for fact in facts]
                    obeyed = [cell([score.get(f"obeyed: {suffix}") for score in scores]) for suffix in suffixes]
                    rows.append([name, "" if steps == "0" else steps, len(seeds), *cells, *obeyed])
            lines += [*table([style, "steps", "seeds", *facts, *suffixes], rows), ""]
        drawings, steps, *_ = found["results"][0]["made"]["size"]
        sources.append(f"{drawings} drawings of {steps} steps per cell and seed, mean and spread. {source(found)}")
    if not lines:
        return []
    return [
        "## Specialist Diffusion", "",
        "A style (mosaic, poster, sketch or neon), learned from eight pictures with captions, other ones for each seed. "
        "`steps`: of training; `seeds`: runs. `style`: distance to true pictures in the style; `whole`: everything that the "
        "caption says is read in the drawing; `place`: the places alone, for styles in which the judge reads nothing else; "
        "`nearest`: PSNR in dB of the drawing that is nearest to one of the eight, high where it was memorised; `inverted`: "
        "drawings that look inverted or upside down though nobody asked; `inverted colors`, `vertical flip`: those that do so "
        "where the prompt asks for this transformation. \"renders\" are true pictures of the captions, \"rebuilt\" the same "
        "through the VAE, which no drawing can be better than; \"untouched\" is the model before training. The other rows are "
        "explained in `tests/benchmarks/specialist.py`.", "", *lines, *sources, "",
        *figure("specialist", "Captions drawn wholly right against the distance to the style, one figure for each style; up and "
                f"to the left is better. The numbers beside the marks are steps of training. {SEEDS}")]


def onediffusion() -> list[str]:
    lines, sources = [], []
    for file in ("onediffusion", "onediffusion-gpu"):
        found = read(file)
        if found is None:
            continue
        rows = []
        for name in dict.fromkeys(row["name"] for row in found["results"]):
            seeds = [row for row in found["results"] if row["name"] == name]
            steps = statistics.mean(row["steps of training"] for row in seeds)
            for task in seeds[0]["scores"]:
                for score, drawn, shuffled, reference in onediffusion_scores([row["scores"][task] for row in seeds]):
                    rows.append([name, f"{steps:.0f}", len(seeds), task, score, drawn, shuffled, reference])
        lines += [*table(["entry", "steps", "seeds", "task", "score", "drawn", "shuffled", "reference"], rows), ""]
        made = found["results"][0]["made"]
        sources.append(f"{made['pictures']} drawings of {made['steps']} steps per cell and seed, mean and spread. "
                       f"{source(found)}")
    if not lines:
        return []
    return [
        "## OneDiffusion", "",
        "One network for all tasks, trained from nothing, in both directions. `entry`: what is trained, see "
        "`tests/benchmarks/onediffusion.py`; `steps`: of training; `seeds`: runs; `task`: what is drawn from what. `score`: PSNR "
        "in dB (from so many given pictures), abs_rel and delta1 of depth, degrees between normals, mIoU of labels, F1 of edges, "
        "whole: the share of captions that the judge finds wholly right; of cameras, the share within a part of the distance. "
        "`drawn`: of the drawings; `shuffled`: the same with another sample's condition, which must be worse; `reference`: what "
        "the given picture itself scores, or for maps the exact map through the VAE.", "", *lines, *sources, "",
        *figure("onediffusion-tasks", "The first entry of the table on each task, beside the same with another sample's "
                f"condition and the reference. {SEEDS}"),
        *figure("onediffusion-entries", f"The entries of the table on the tasks that several of them have learned. {SEEDS}")]


def onediffusion_scores(seeds: list[dict]) -> list[list[str]]:
    """A task's scores of each seed -> [name, drawn, shuffled, reference] of each score."""
    rows = []
    for keys in onediffusion_keys(seeds[0]):
        rows.append([keys[0], *(cell([row.get(key) for row in seeds]) for key in keys)])
    return rows


def onediffusion_keys(scores: dict) -> list[tuple]:
    """A task's scores -> (its key, that of the same shuffled, that of its reference) of each score; None where absent."""
    names = [name for name in scores if not name.startswith(("shuffled", "copied", "through"))]
    if "whole" in names:
        names = ["whole"]  # of its facts, each of which the judge reads too
    found = []
    for name in names:
        shuffled = [f"shuffled {name}", "shuffled"]  # its own, or one for the whole task
        if name.startswith("from "):
            shuffled.insert(0, name.replace("from ", "shuffled, "))
        reference = (f"through the VAE {name}", "copied")
        keys = [name]
        for options in (shuffled, reference):
            keys.append(next((option for option in options if option in scores), None))
        found.append(tuple(keys))
    return found


def speed(row: dict) -> float:
    """How fast a work is, as a multiple of the first one of its comparison."""
    value, = [value for name, value in row.items() if name.startswith("speed over ")]
    return value


def networks() -> list[str]:
    lines = [
        "## Whole networks beside diffusers", "",
        "`network`: the program in this folder, the model (tiny or SDXL in full size), the side of the picture in pixels, "
        "the type of the numbers, and what computes. `ms`: milliseconds for one call, processor time of one thread on a "
        "CPU, time on a GPU. `speed`: diffusers' time over this row's (tiny step: over that as trained). `GEMM rate`: the share of the speed of one large "
        "matrix product, measured in the same run, that the network reaches. `peak memory`: the most that a training step "
        "held, of the whole process on a CPU; empty where it was not measured. \"minipic graph\" is what sample.py does on "
        "a GPU, \"plain norms\" has PyTorch's norms in place of minipic's kernels, \"PyTorch's attention\" its attention "
        "in place of minipic's.", ""]
    rows, sources = [], []
    programs = ("unet_step", "vae", "train_step", "tiny_step", "picture")
    for name in (*programs, *(f"{program}-gpu" for program in programs)):
        found = read(name)
        if found is None:
            continue
        program = name.replace("-gpu", " (GPU)").replace("_", " ")
        sources.append(source(found))
        for case, ways in found["results"].items():
            for way, row in ways.items():
                memory = f"{row['peak GB']:.1f} GB" if "peak GB" in row else ""
                rows.append([f"{program}: {case}, {way}", f"{row['ms']:.1f}", f"{speed(row):.2f}",
                             f"{row['share of GEMM rate']:.2f}", memory])
    return [*lines, *table(["network", "ms", "speed", "GEMM rate", "peak memory"], rows), "",
            "Not yet measured on a GPU: diffusers compiled, and the programs without a row. " + " ".join(sources), ""]


ATTENTION = {  # column: what it is
    "sdpa": "`sdpa`: PyTorch's `scaled_dot_product_attention`, with its own choice of kernel.",
    "sdpa flash": "`sdpa flash`, `sdpa cudnn`, `sdpa efficient`: its single kernels.",
    "flex": "`flex`: PyTorch's compiled `flex_attention`.",
    "minipic naive": "`minipic naive`: the formula.",
    "minipic chunked": "`minipic chunked`: the formula for a few heads and queries at a time.",
    "minipic flash": "`minipic flash`: flash attention in Triton.",
}


def attention() -> list[str]:
    lines = ["## Attention", ""]
    machines = {
        "attention": "a CPU without AMX", "attention-amx": "a CPU with AMX", "attention-gpu": "a GPU"}
    for name, machine in machines.items():
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
        unit = "Milliseconds" if found["gpu"] else "Milliseconds of processor time of one thread"
        explained = [ATTENTION[way] for way in ways if way in ATTENTION]
        if "minipic chunked" not in ways:
            explained.append("Not yet measured here: `minipic chunked`.")
        lines += [f"{unit} on {machine}, for attention of SDXL's shapes: in an image to itself or to the text. "
                  + " ".join(explained), "", *table(["attention", *ways], rows), "", calls + source(found), ""]
    return lines


def attention_sweep() -> list[str]:
    """Flash attention with the blocks that choose_blocks takes, and the best ones, beside PyTorch's kernels."""
    found = read("attention_sweep")
    if found is None:
        return []
    rows = []
    for shape, times in found["results"].items():
        for kernel in ("forward", "queries", "keys"):
            best = min(times[kernel], key=times[kernel].get)
            rows.append([f"{shape}, {kernel}", best, f"{times[kernel][best]:.1f}"])
        for what in ("forward", "forward and backward"):
            for peer, microseconds in times[f"PyTorch, {what}"].items():
                rows.append([f"{shape}, {what}", peer, f"{microseconds:.1f}"])
    return [
        "Flash attention's kernels one by one and PyTorch's kernels. `blocks or kernel`: the fastest blocks of ours (queries "
        "and keys of a block, warps, stages), or which of PyTorch's. `microseconds`: for one call. A pass forward is one "
        "kernel, \"forward\"; one backward is two, \"queries\" and \"keys\". Only PyTorch's \"sdpa flash\" and \"efficient\" "
        "can be trusted to train: the gradients of cuDNN's were NaN for the tiny UNet.", "",
        *table(["attention", "blocks or kernel", "microseconds"], rows), "", source(found), ""]


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
        "One row of text at 256x256, random weights, from a file in 16 bits. `way to compute`: whose network, and the "
        "type it computes in; \"layerwise casting\" and \"cast\" keep weights in 16 bits and widen them for each layer. "
        "`load and first step`, `a step`: processor time of one thread. `own memory`: the peak of what the process "
        "itself fills; `mapped file`: the peak of the file's pages in memory, which the system may drop. The two peaks "
        "need not come together. `error`: the largest difference to the first row over its largest number.", "",
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
        "`layout`: a diffusers folder or a single file, read as it is or converted to bf16. `time`: over safetensors' "
        "`load_file` and one copy, or one conversion, of each tensor; less than 1 is faster. `memory`: the peak of the "
        "process less the size of the weights; a mapped file counts as far as it was read. Random weights in the "
        "official layouts.", "",
        *table(["layout", "time", "memory"], rows), "", source(found), ""]


def damage() -> list[str]:
    found = read("fuzz")
    if found is None:
        return []
    outcomes = ("refused", "same values", "other values", "failed")
    rows = []
    for kind, counts in found["results"].items():
        rows.append([kind, *(counts.get(outcome, 0) for outcome in outcomes), f"{counts['slowest s']:.2f} s"])
    return [
        "## Damaged files", "",
        "Files of each kind of file, damaged at random: cut, bytes changed, added and taken out, hostile values in JSON, "
        "faults of structure in safetensors. `refused`: in one clear sentence that names the file. `same values`: the "
        "damage changes nothing. `other values`: what is left is a good file, and only a hash can tell; checkpoints have "
        "one, and weights/download.py compares those of official files. `failed`: any other error, a fault of structure "
        "accepted, or more than five seconds. `slowest`: processor time.", "",
        *table(["kind of file", *outcomes, "slowest"], rows), "",
        f"Memory grew by {found['memory grown MB']} MB over {found['n']} damaged files of each kind. {source(found)}", ""]


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
