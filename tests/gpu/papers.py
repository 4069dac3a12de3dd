"""The papers' experiments on one GPU: many small trainings beside each other, the most important first.

    python tests/gpu/papers.py --out OUT [--size gpu] [--jobs 6] [--seconds 380] [--only NAME ...]
    python tests/gpu/papers.py --merge OUT [--size gpu] [--into FOLDER]

A job is a group of entries of one program of tests/benchmarks with one seed, in a process of its own. It writes
OUT/papers/JOB.json, a row after each entry, and OUT/papers/JOB.log. When the time is over the jobs that still run are
stopped; their finished rows stay. The same command goes on from there. OUT/papers/figures gets their pictures.

Processes take turns on a GPU, and the tiny model's training is bound by the start of kernels: with 22 jobs at once a
step of MTU (8,700 kernels) took 1.05 s on an H100, no less than on one core of a CPU. Few jobs at once finish more.

--merge puts the rows beside the benchmarks: into mtu-gpu.json and so on, and into baselines.json, whose rows have no
sizes. A row takes the place of an older one of the same entry and seed; rows of another model go. Every row says which
CPU and GPU it was made on. What the head of a file says is of the rows that were there first.
"""

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "tests" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

PROGRAMS = ("onediffusion", "mtu", "indomain", "baselines", "specialist")
SHARE_OF_TRAINING = 0.7  # of the time: OneDiffusion's longest training is measured in the rest
LAST_SECONDS = 15  # to end in, after a signal


class Group(NamedTuple):
    """Entries of a program that share their data. With each of the seeds they are a job."""

    program: str
    name: str
    entries: tuple[str, ...]
    seeds: int = 3


GROUPS = (  # in the order of their importance
    Group("onediffusion", "all", ("all tasks",), seeds=1),
    Group("mtu", "n4", ("untouched", "MTU, N=4, scale N", "shared")),
    Group("indomain", "all", ("renders", "base", "decoupled", "fine-tuned, one caption", "decoupled, LoRA",
                              "fine-tuned, captions", "LoRA, one caption", "fine-tuned, no caption")),
    Group("baselines", "edges", ("ONE-PIC, interlaced, edges", "ONE-PIC, side, edges")),
    Group("mtu", "n1", ("MTU, N=1", "single")),
    Group("specialist", "rivals", ("renders", "untouched", "Specialist", "full", "DreamBooth", "LoRA",
                                   "textual inversion", "Specialist, LoRA")),
    Group("mtu", "n4-scale-1", ("MTU, N=4, scale 1", "norms alone")),
    Group("baselines", "edit", ("ONE-PIC, interlaced, edit", "ONE-PIC, side, edit")),
    Group("specialist", "parts", ("without retrieval", "without doubled", "without synonyms", "without templates")),
    Group("mtu", "lora", ("LoRA",)),
    Group("mtu", "n2", ("MTU, N=2",)),
    Group("mtu", "n8", ("MTU, N=8",)),
)


class Job(NamedTuple):
    name: str
    command: list[str]


def jobs(options) -> list[Job]:
    """Every group with every seed, the most important first."""
    found = []
    for group in GROUPS:
        for seed in range(group.seeds):
            name = f"{group.program}-{group.name}-{seed}"
            if options.only and not name.startswith(tuple(options.only)):
                continue
            command = [sys.executable, str(BENCHMARKS / f"{group.program}.py"), "--first-seed", str(seed),
                       "--seeds", "1", "--out", str(options.out / "papers" / f"{name}.json"),
                       "--runs", str(options.runs / name)]
            for entry in group.entries:
                command += ["--only", entry]
            if group.program != "baselines":
                command += ["--size", options.size]
            elif options.size == "toy":
                command += ["--quick"]
            if group.program == "onediffusion":
                command += ["--minutes", str(SHARE_OF_TRAINING * options.seconds / 60)]
            found.append(Job(name, command))
    return found


# ---- running -------------------------------------------------------------------------------------

def run(options) -> int:
    """Run the jobs, `options.jobs` at once, until all have ended or the time is over. Returns how many failed."""
    folder = options.out / "papers"
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    waiting = jobs(options)
    running = {}  # {job's name: (process, when it started)}
    failed = 0
    while (waiting or running) and time.monotonic() - start < options.seconds:
        while waiting and len(running) < options.jobs:
            job = waiting.pop(0)
            running[job.name] = start_job(job, folder / f"{job.name}.log"), time.monotonic()
        for name, (process, since) in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            running.pop(name)
            failed += code != 0
            print(f"{name}: exit code {code} after {time.monotonic() - since:.0f} s", flush=True)
        time.sleep(0.2)
    stop([process for process, _ in running.values()])
    for name in running:
        print(f"{name}: stopped, the time is over")
    for job in waiting:
        print(f"{job.name}: not begun")
    for job in jobs(options):
        figures = options.runs / job.name / "figures"
        if figures.exists():
            shutil.copytree(figures, folder / "figures" / job.name, dirs_exist_ok=True)
    return failed


def start_job(job: Job, log: Path) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "a") as output:
        return subprocess.Popen(
            job.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)


def stop(processes: list[subprocess.Popen]):
    """Ask all to end, and kill those that do not in time."""
    for process in processes:
        process.terminate()
    end = time.monotonic() + LAST_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# ---- merging -------------------------------------------------------------------------------------

def merge(options):
    for program in PROGRAMS:
        paths = sorted((options.merge / "papers").glob(f"{program}-*.json"))
        partial = [json.loads(path.read_text()) for path in paths]
        if partial:
            name = program if (program, options.size) == ("baselines", "gpu") else f"{program}-{options.size}"
            rows = merge_into(options.into / f"{name}.json", partial, importlib.import_module(program).place)
            print(f"{name}.json: {rows} rows")


def merge_into(path: Path, partial: list[dict], place) -> int:
    """Put the rows of JSON files into the table in `path`. Returns how many it then has.

    place: a program's function, which tells rows apart and puts them in order.
    """
    new = {}
    for values in partial:
        for row in values["results"]:
            new[place(row)] = row
    models = {model_of(row) for row in new.values()}
    head = partial[0] | {"command": "python tests/gpu/papers.py"}
    kept = {}
    if path.exists():
        before = json.loads(path.read_text())
        for row in before["results"]:
            if model_of(row) in models and place(row) not in new:
                kept[place(row)] = row
        if kept:
            head = before
    together = kept | new
    rows = [together[key] for key in sorted(together)]
    head |= {"seeds": len({row["seed"] for row in rows}), "results": rows}
    path.write_text(json.dumps(head, indent=2) + "\n")
    return len(rows)


def model_of(row: dict) -> str:
    """The hash of the model that a row was made with."""
    return row.get("made", row)["model"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-out"))
    parser.add_argument("--size", choices=("toy", "gpu"), default="gpu")
    parser.add_argument("--jobs", type=int, default=6, help="processes at once")
    parser.add_argument("--seconds", type=float, default=380, help="when to stop what still runs")
    parser.add_argument("--only", action="append", metavar="NAME",
                        help="jobs whose name begins so, repeatable, such as mtu-n4 or baselines-edges-0")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "papers", help="folder for the trainings")
    parser.add_argument("--merge", type=Path, metavar="OUT", help="put the rows that are in OUT into the tables")
    parser.add_argument("--into", type=Path, default=BENCHMARKS, help="folder of the tables")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.runs = options.runs.resolve()
    if options.merge:
        merge(options)
        return 0
    return int(run(options) > 0)


if __name__ == "__main__":
    sys.exit(main())
