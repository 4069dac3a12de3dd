"""Runs lessons and writes what they print and draw: the pages, the notebooks, the bands, the table.

    python tutorials/render.py 05_unet             run the lesson, write 05_unet.md and its figures
    python tutorials/render.py --bands 05_unet     measure its bands: 5 seeds, 1 and 2 threads
    python tutorials/render.py --notebook 05_unet  write 05_unet.ipynb, without running it
    python tutorials/render.py --check             which pages are older than their lessons

Without names: all lessons. Every run is a process of its own. README.md's table of lessons is
written with the pages.

Bands stand in bands.json, not in the lessons: so a tool can write them, each beside how it was
measured, a lesson does not give its results away before it is run, and measuring again changes no
line of a lesson.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median

FOLDER = Path(__file__).resolve().parent
BANDS = FOLDER / "bands.json"
README = FOLDER / "README.md"
TABLE = "<!-- lessons -->"
OUTPUT = ("<!-- output -->", "<!-- end of output -->")
CELL = re.compile(r"^# %%.*$", re.M)
FIGURE = re.compile(r"^figure (\S+)\n((?:    .*\n)+)", re.M)
SOURCE = re.compile(r"^source (\S+), line (\d+)\n((?:(?:    .*)?\n)+)", re.M)
SEEDS = 5
ROUNDING = 1e-3  # smaller values are taken for rounding errors, which differ between computers


# ---- lessons as files ----------------------------------------------------------------------------

@dataclass
class Cell:
    """A piece of a lesson: prose in Markdown, or code. line: the number of its first line."""

    is_prose: bool
    text: str
    line: int


def lessons() -> list[Path]:
    """The files of all lessons, in the order in which they are read: 00, 01, ..., P1, ..."""
    return sorted(FOLDER.glob("[0-9P][0-9]_*.py"))


def read_cells(path: Path) -> list[Cell]:
    """The cells of a lesson."""
    source = path.read_text(encoding="utf-8")
    marks = list(CELL.finditer(source))
    cells = []
    for i, mark in enumerate(marks):
        end = marks[i + 1].start() if i + 1 < len(marks) else len(source)
        text = source[mark.end():end].strip("\n")
        line = source[:mark.end()].count("\n") + 2
        is_prose = "[markdown]" in mark[0]
        if is_prose:
            text = re.sub(r"^# ?", "", text, flags=re.M)
        cells.append(Cell(is_prose, text, line))
    return cells


def read_header(path: Path) -> dict[str, str]:
    """"Title", "Goal", "Time", "Needs" and "Figures" of a lesson."""
    first = read_cells(path)[0].text
    header = dict(re.findall(r"^- \*\*(\w+):\*\* (.*(?:\n  .*)*)", first, re.M))
    header = {key: " ".join(value.split()) for key, value in header.items()}
    header["Title"] = first.splitlines()[0].removeprefix("# ")
    return header


# ---- pages ---------------------------------------------------------------------------------------

def page(path: Path, outputs: list[str] | None = None) -> str:
    """A lesson as Markdown.

    outputs: what each cell has printed; None: the page without outputs.
    """
    parts = []
    for i, cell in enumerate(read_cells(path)):
        parts.append(cell.text if cell.is_prose else f"```python\n{cell.text}\n```")
        if outputs and outputs[i]:
            parts.append(f"{OUTPUT[0]}\n{output_as_markdown(outputs[i])}\n{OUTPUT[1]}")
    name = path.stem
    start = f"<!-- made from {name}.py by `python tutorials/render.py {name}` -->"
    return "\n\n".join([start, *parts]) + "\n"


def without_outputs(text: str) -> str:
    """A page as `page` writes it without outputs."""
    return re.sub(f"{OUTPUT[0]}\n.*?\n{OUTPUT[1]}\n\n?", "", text, flags=re.S).rstrip("\n") + "\n"


def output_as_markdown(printed: str) -> str:
    """What a cell has printed: text, with figures and source in their places."""
    parts = []
    end = 0
    marks = [*FIGURE.finditer(printed), *SOURCE.finditer(printed)]
    for mark in sorted(marks, key=lambda mark: mark.start()):
        parts.append(as_text(printed[end:mark.start()]))
        end = mark.end()
        if mark.re is FIGURE:
            caption = " ".join(mark[2].split())
            picture = mark[1].removeprefix("tutorials/")
            parts.append(f"![{Path(picture).stem}]({picture})\n\n*{caption}*")
        else:
            code = re.sub("^    ", "", mark[3], flags=re.M).rstrip()
            link = f"[{mark[1]}](../{mark[1]}), line {mark[2]}:"
            parts.append(f"{link}\n\n```python\n{code}\n```")
    parts.append(as_text(printed[end:]))
    return "\n\n".join(part for part in parts if part)


def as_text(printed: str) -> str:
    printed = printed.strip("\n")
    return f"```text\n{printed}\n```" if printed else ""


def run_cells(path: Path) -> list[str]:
    """Run a lesson here and return what each of its cells prints."""
    sys.path.insert(0, str(FOLDER))
    names = {"__name__": "__main__", "__file__": str(path)}
    outputs = []
    for cell in read_cells(path):
        printed = io.StringIO()
        if not cell.is_prose:
            code = compile("\n" * (cell.line - 1) + cell.text, str(path), "exec")
            with contextlib.redirect_stdout(printed):
                exec(code, names)
        outputs.append(printed.getvalue())
    return outputs


def write_page(path: Path):
    """Run a lesson and write its page and its figures."""
    folder = FOLDER / "figures" / path.stem
    os.environ["LESSON_FIGURES"] = str(folder)
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    for old in folder.glob("*.png"):
        old.unlink()
    text = page(path, run_cells(path))
    path.with_suffix(".md").write_text(text, encoding="utf-8")


def outdated(path: Path) -> str:
    """What is wrong with the page of a lesson, or nothing."""
    target = path.with_suffix(".md")
    if not target.exists():
        return "has no page"
    text = target.read_text(encoding="utf-8")
    if without_outputs(text) != page(path):
        return "has changed since its page was made"
    for name in read_header(path)["Figures"].split(", "):
        picture = f"figures/{path.stem}/{name}.png"
        if f"]({picture})" not in text or not (FOLDER / picture).exists():
            return f"lacks the figure {name} of its header"
    return ""


# ---- notebooks, bands and the table --------------------------------------------------------------

def write_notebook(path: Path):
    """A lesson as a notebook, which runs in this folder, where lesson.py is."""
    cells = []
    for cell in read_cells(path):
        written = {"metadata": {}, "source": cell.text.splitlines(keepends=True)}
        if cell.is_prose:
            written["cell_type"] = "markdown"
        else:
            written |= {"cell_type": "code", "execution_count": None, "outputs": []}
        cells.append(written)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = {
        "cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    path.with_suffix(".ipynb").write_text(text, encoding="utf-8")


def measure_bands(path: Path, seeds: int):
    """Run a lesson with several seeds and numbers of threads, and write the bands of its values.

    Every seed runs with one thread, the first one with two again: threads only change the order of
    sums, and so much less than seeds do.
    """
    values = {}
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "values.jsonl"
        for seed, threads in [*((seed, 1) for seed in range(seeds)), (0, 2)]:
            own = {"LESSON_SEED": str(seed), "LESSON_FIGURES": folder,
                   "LESSON_VALUES": str(record), "OMP_NUM_THREADS": str(threads)}
            start = time.monotonic()
            command = [sys.executable, str(path)]
            subprocess.run(command, env=os.environ | own, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.monotonic() - start)
        for line in record.read_text(encoding="utf-8").splitlines():
            name, value = json.loads(line)
            values.setdefault(name, []).append(value)
    bands = json.loads(BANDS.read_text(encoding="utf-8")) if BANDS.exists() else {}
    bands[path.stem] = {
        "checkpoints": {name: band(numbers) for name, numbers in values.items()},
        "measured": {
            "command": f"python tutorials/render.py --bands {path.stem} --seeds {seeds}",
            "seeds": seeds, "threads": [1, 2], "seconds of a run": round(median(seconds), 1),
            "date": str(date.today()), "processor": processor(),
            "torch": version("torch")}}
    text = json.dumps(dict(sorted(bands.items())), indent=1)
    text = re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    BANDS.write_text(text + "\n", encoding="utf-8")


def processor() -> str:
    """The kind of this processor and its instructions for bf16: what rounding depends on."""
    sys.path.insert(0, str(FOLDER.parent))
    from minipic.common import cpu_has  # here, because PyTorch takes seconds to be imported
    has = [name for name in ("avx512_bf16", "amx_tile") if cpu_has(name)]
    return ", ".join([platform.machine(), *has])


def band(values: list[float]) -> list[float]:
    """The band (low, high) of a checkpoint, from its values over seeds and threads.

    Whole numbers that never differ: exactly these. Rounding errors: from 0 to ten times the
    largest, at least to 0.0001. All others: their range, widened at both ends by its width and by
    1 % of the largest.
    """
    low = min(values)
    high = max(values)
    largest = max(abs(low), abs(high))
    if low == high and low == round(low) and low != 0:
        return [low, high]
    if largest < ROUNDING:
        return [0.0, float(f"{max(10 * largest, 1e-4):.1g}")]
    margin = (high - low) + 0.01 * largest
    return [float(f"{low - margin:.3g}"), float(f"{high + margin:.3g}")]


def table() -> str:
    """The table of lessons, from their headers."""
    rows = ["| lesson | afterwards you can | time | needs | figures |", "|---|---|---|---|---|"]
    for path in lessons():
        header = read_header(path)
        figures = len(header["Figures"].split(", "))
        rows.append(f"| [{header['Title']}]({path.stem}.md) | {header['Goal']} | {header['Time']} "
                    f"| {header['Needs']} | {figures} |")
    return "\n".join(rows)


def with_table(text: str) -> str:
    """The text of README.md with the table of today."""
    before, _, after = text.split(TABLE)
    return f"{before}{TABLE}\n{table()}\n{TABLE}{after}"


# ---- the command line ----------------------------------------------------------------------------

def chosen(names: list[str]) -> list[Path]:
    """The lessons of these names; all if there are none."""
    known = {path.stem: path for path in lessons()}
    for name in names:
        if name not in known:
            sys.exit(f"no lesson is called {name!r}; choose from {', '.join(known)}")
    return [known[name] for name in names] or list(known.values())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NN_name")
    job = parser.add_mutually_exclusive_group()
    job.add_argument("--bands", action="store_true", help="measure the bands of checkpoints")
    job.add_argument("--notebook", action="store_true", help="write notebooks")
    job.add_argument("--check", action="store_true", help="say which pages are out of date")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of --bands")
    args = parser.parse_args()
    paths = chosen(args.names)

    if args.check:
        faults = [f"{path.stem} {outdated(path)}" for path in paths if outdated(path)]
        text = README.read_text(encoding="utf-8")
        if with_table(text) != text:
            faults.append("README.md has an old table of lessons")
        if faults:
            sys.exit("\n".join([*faults, "run python tutorials/render.py"]))
        return
    for path in paths:
        if args.notebook:
            write_notebook(path)
        elif args.bands:
            measure_bands(path, args.seeds)
        elif len(paths) == 1:
            write_page(path)
        else:
            subprocess.run([sys.executable, __file__, path.stem], check=True)
    if not args.bands and not args.notebook:
        README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
