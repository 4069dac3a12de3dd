"""The queue of GPU work: complete, within nine minutes each, and tried on a CPU at toy size."""

import importlib
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "gpu"
SCRIPTS = sorted(FOLDER.glob("[0-9]_*.sh"))
sys.path.insert(0, str(FOLDER))
import collect  # noqa: E402
import papers  # noqa: E402


def test_the_readme_lists_every_script():
    text = (FOLDER / "README.md").read_text()
    assert re.findall(r"\| `(\d_\w+\.sh)` \|", text) == [script.name for script in SCRIPTS] and len(SCRIPTS) == 6


@pytest.mark.parametrize("script", [*SCRIPTS, FOLDER / "setup.sh", FOLDER / "wheels.sh"], ids=lambda path: path.name)
def test_a_script_is_valid_and_its_programs_exist(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    for program in re.findall(r"[\w/]+\.py", script.read_text()):
        assert (FOLDER.parents[1] / program).exists(), program


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_ends_in_nine_minutes(script):
    text = re.sub(r"\$\{\w+:-(\d+)\}", r"\1", script.read_text()).replace('"480"', "480")
    real = text.split("else", 1)[-1] if "TOY" in text and "else" in text else text
    loops = {body: len(values.split()) for values, body in re.findall(r"for \w+ in (.+?); do(.+?)done", real, re.S)}
    seconds = 0
    for line in re.findall(r"^ *step (\d+)", real, re.M):
        seconds += int(line)
    for body, count in loops.items():
        seconds += (count - 1) * sum(map(int, re.findall(r"^ *step (\d+)", body, re.M)))
    assert 0 < seconds <= 540


def test_a_folder_is_packed_in_parts_and_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "PART", 700)
    folder = tmp_path / "make" / "gpu"
    folder.mkdir(parents=True)
    numbers = random.Random(0).randbytes(4096)
    (folder / "weights.bin").write_bytes(numbers[::-1])
    collect.pack(tmp_path / "make", tmp_path / "out")
    parts = sorted((tmp_path / "out" / "parts").iterdir())
    assert len(parts) > 1 and all(part.stat().st_size <= 700 for part in parts)
    collect.unpack(tmp_path / "out", tmp_path / "again")
    assert (tmp_path / "again" / "gpu" / "weights.bin").read_bytes() == numbers[::-1]
    collect.unpack(tmp_path / "nothing", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_failed_test_is_named(tmp_path, capsys):
    (tmp_path / "check.xml").write_text(
        '<testsuites><testsuite tests="2" failures="1" errors="0" skipped="0">'
        '<testcase classname="tests.test_a" name="test_b"><failure/></testcase>'
        '<testcase classname="tests.test_a" name="test_c"/></testsuite></testsuites>')
    assert collect.check(tmp_path) == 1
    assert "tests.test_a::test_b" in capsys.readouterr().out and '"failures": 1' in (tmp_path / "check.json").read_text()


def test_the_jobs_have_entries_that_exist_and_come_by_importance():
    for group in papers.GROUPS:
        program = importlib.import_module(group.program)
        known = [*program.ENTRIES, "untouched", "renders"]
        for entry in group.entries:
            begins_so = group.program in ("mtu", "onediffusion")  # how these programs read --only
            assert entry in known or begins_so and any(name.startswith(entry) for name in known), entry
    options = SimpleNamespace(only=["mtu-n", "onediffusion"], out=Path("o"), runs=Path("r"), size="gpu", seconds=600)
    names = [job.name for job in papers.jobs(options)]
    assert names[:4] == ["onediffusion-all-0", "mtu-n4-0", "mtu-n4-1", "mtu-n4-2"] and len(names) == 16
    command = papers.jobs(options)[3].command
    assert command[command.index("--first-seed") + 1] == "2" and command[command.index("--seeds") + 1] == "1"
    assert command.count("--only") == 3


def test_rows_of_jobs_are_merged(tmp_path):
    def row(name, seed, model, gpu):
        return {"name": name, "seed": seed, "made": {"model": model}, "gpu": gpu}

    def place(row):
        return "ab".index(row["name"]), row["seed"]

    path = tmp_path / "table.json"
    first = [{"date": "1", "seeds": 1, "results": [row("b", 0, "m", "X")]},
             {"date": "1", "seeds": 1, "results": [row("a", 1, "m", "X")]}]
    assert papers.merge_into(path, first, place) == 2
    table = json.loads(path.read_text())
    assert table["results"] == [row("a", 1, "m", "X"), row("b", 0, "m", "X")] and table["seeds"] == 2

    again = [{"date": "2", "seeds": 1, "results": [row("b", 0, "m", "Y"), row("b", 1, "m", "Y")]}]
    assert papers.merge_into(path, again, place) == 3
    table = json.loads(path.read_text())
    assert [found["gpu"] for found in table["results"]] == ["X", "Y", "Y"] and table["date"] == "1"

    other = [{"date": "3", "seeds": 1, "results": [row("a", 0, "n", "Z")]}]
    assert papers.merge_into(path, other, place) == 1  # rows of another model go
    assert json.loads(path.read_text())["date"] == "3"


@pytest.mark.slow
def test_a_job_that_runs_too_long_is_stopped_and_one_that_fails_counts(tmp_path, monkeypatch):
    commands = {"long": "import time; time.sleep(60)", "wrong": "1 / 0", "late": "pass"}
    made = [papers.Job(name, [sys.executable, "-c", code]) for name, code in commands.items()]
    monkeypatch.setattr(papers, "jobs", lambda options: made)
    options = SimpleNamespace(out=tmp_path, runs=tmp_path / "runs", jobs=2, seconds=3)
    assert papers.run(options) == 1
    assert "ZeroDivisionError" in (tmp_path / "papers" / "wrong.log").read_text()
    assert (tmp_path / "papers" / "late.log").exists()  # began when another one had ended


@pytest.mark.slow
@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.name[0] in "12346"], ids=lambda path: path.name)
def test_a_toy_run_on_a_cpu(script, tmp_path):
    """In a copy of the checkout, for the benchmarks write their results beside themselves."""
    checkout = tmp_path / "checkout"
    for name in ("minipic", "tests", "tutorials"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("sample.py", "train.py"):
        shutil.copyfile(ROOT / name, checkout / name)
    (checkout / "weights").symlink_to(ROOT / "weights")
    environment = {"OUT": str(tmp_path / "out"), "TOY": "1", "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
                   "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(checkout / "tests" / "gpu" / script.name)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert not (tmp_path / "out" / "failed.txt").exists()
    if script.name == "6_papers.sh":
        rows = json.loads((tmp_path / "out" / "papers" / "baselines-edges-1.json").read_text())["results"]
        assert {row["seed"] for row in rows} == {1} and len(rows) == 4
