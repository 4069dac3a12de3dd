"""Grades submissions: each runs in processes of its own, and is judged here, by answers that it
cannot reach."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError

from coursework.checks import (
    LAYERS,
    Answer,
    BreakIt,
    Task,
    Verdict,
    judge_all,
    load_answers,
    load_assignment,
)
from coursework.reference import expected_answers, fill_ins, known_mistakes, replaced
from coursework.release import release
from coursework.source import body_of, fill, name_of, path_of
from minipic.common import InputError

HERE = Path(__file__).parent
LARGEST_FILE = 1 << 20  # bytes of a file that is handed in


@dataclass
class Grading:
    """What all submissions are graded with."""

    bundle: Path  # the students' folder, as it was handed out
    tasks: list[Task]
    expected: dict[str, list[Answer]]
    known: dict[str, list]
    seed: int
    seconds: int
    megabytes: int


@dataclass
class Marks:
    """What one submission gets."""

    name: str
    verdicts: list[Verdict]
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def total(self) -> float:
        return sum(verdict.score for verdict in self.verdicts)


def grade(
    submissions: Path,
    out: Path,
    names: list[str],
    seed: int,
    variant: str | None = None,
    seconds: int = 60,
    megabytes: int = 2000,
    jobs: int = 2,
) -> list[Marks]:
    """Grade every folder and .zip in `submissions`, and write reports to `out`.

    seconds, megabytes: limits of a task. Raises InputError where nothing was handed in, or `out` is
    not empty.
    """
    if not submissions.is_dir():
        raise InputError(
            f"{submissions} is no folder; give one that holds a folder or .zip for each student"
        )
    found = sorted(path for path in submissions.iterdir() if path.is_dir() or path.suffix == ".zip")
    if not found:
        raise InputError(f"{submissions} holds no folder and no .zip")
    names_of_students = [student(path) for path in found]
    if len(set(names_of_students)) < len(found):
        raise InputError(f"{submissions} holds a folder and a .zip of one name; keep one of them")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; choose a new folder")
    with tempfile.TemporaryDirectory() as temporary:
        bundle = Path(temporary) / "bundle"
        release(bundle, names, variant, with_expected=False)
        shutil.copyfile(HERE / "sandbox.py", Path(temporary) / "sandbox.py")
        grading = Grading(bundle, [], {}, {}, seed, seconds, megabytes)
        for name in names:
            assignment = load_assignment(name)
            grading.tasks += assignment.TASKS
            with replaced(assignment, variant):
                grading.expected |= expected_answers(assignment, seed)
                for task in fill_ins(assignment):
                    grading.known[task.number] = known_mistakes(assignment, task, seed)
        with ThreadPoolExecutor(jobs) as pool:
            marks = list(pool.map(lambda path: grade_one(path, grading), found))
    for each in marks:
        write_report(out / each.name, each)
    write_table(out / "grades.csv", marks)
    (out / "summary.md").write_text(summary(marks), encoding="utf-8")
    return marks


# ---- one submission ------------------------------------------------------------------------------


def grade_one(path: Path, grading: Grading) -> Marks:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=grading.bundle.parent) as temporary:
        folder = Path(temporary)
        notes = unpack(path, folder, grading)
        answers = run_all(folder, grading)
    verdicts = []
    for name in {task.number.split(".")[0]: None for task in grading.tasks}:
        tasks = [task for task in grading.tasks if task.number.startswith(f"{name}.")]
        verdicts += judge_all(tasks, answers, grading.expected, grading.known)
    return Marks(student(path), verdicts, notes, time.monotonic() - began)


def student(path: Path) -> str:
    """The name under which a submission is graded."""
    return path.stem if path.suffix == ".zip" else path.name


def unpack(path: Path, folder: Path, grading: Grading) -> list[str]:
    """Make a folder to run: what was handed out, with the files that students were asked to change
    from theirs.

    Returns what is odd about the submission.
    """
    for name in ("minipic", "coursework", "answers"):
        shutil.copytree(grading.bundle / name, folder / name)
    (folder / "weights").symlink_to(grading.bundle / "weights")
    (folder / "out").mkdir()
    notes = []
    for name in sorted({path_of(task.target) for task in grading.tasks}):
        content = read_submitted(path, name)
        if content is None:
            notes.append(
                f"{name} is missing, or no ordinary file below 1 MB; the one handed out is used"
            )
        else:
            (folder / name).write_bytes(content)
    for task in grading.tasks:
        if isinstance(task, BreakIt):
            put_back(folder, task.subject, grading)
    return notes


def put_back(folder: Path, target: str, grading: Grading):
    """Give a function that students write a check of its own body again."""
    path = folder / path_of(target)
    handed_out = (grading.bundle / path_of(target)).read_text(encoding="utf-8")
    try:
        text = path.read_text(encoding="utf-8")
        path.write_text(
            fill(text, name_of(target), body_of(handed_out, name_of(target))), encoding="utf-8"
        )
    except (SyntaxError, ValueError):  # the file cannot be read, and its import will say so
        return


def read_submitted(path: Path, name: str) -> bytes | None:
    """A file of a submission, in whatever folder inside it; None where there is none that can be
    used."""
    if path.suffix == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                found = [entry for entry in archive.infolist() if ends_with(entry.filename, name)]
                found = [entry for entry in found if entry.file_size <= LARGEST_FILE]
                return (
                    archive.read(min(found, key=lambda entry: len(entry.filename)))
                    if found
                    else None
                )
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError, EOFError):
            return None  # damaged, or with a password
    files = [
        file for file in path.rglob(PurePosixPath(name).name) if ends_with(file.as_posix(), name)
    ]
    for file in sorted(files, key=lambda file: len(file.parts)):
        inside = file.resolve().is_relative_to(path.resolve())
        if (
            file.is_file()
            and not file.is_symlink()
            and inside
            and file.stat().st_size <= LARGEST_FILE
        ):
            return file.read_bytes()
    return None


def ends_with(path: str, name: str) -> bool:
    return ("/" + path).endswith("/" + name)


def run_all(folder: Path, grading: Grading) -> dict[str, list[Answer]]:
    """{number: answers} of all tasks. A process that ends early is replaced by a new one for the
    tasks after."""
    answers = {}
    waiting = [task.number for task in grading.tasks]
    while waiting:
        reason = run_process(folder, waiting, grading)
        while waiting:
            number = waiting.pop(0)
            answers[number] = read_answers(folder / "out", number, reason)
            if not (folder / "out" / f"{number}.safetensors").exists():
                break  # here the process ended
    return answers


def run_process(folder: Path, numbers: list[str], grading: Grading) -> str:
    """Run tasks until all are done, or one takes too long, or the process ends; returns why it
    ended."""
    command = [
        sys.executable,
        "-B",
        str(grading.bundle.parent / "sandbox.py"),
        str(folder),
        str(grading.seed),
        str(grading.megabytes),
        *numbers,
    ]
    environment = {
        key: os.environ[key] for key in ("PATH", "LANG", "LD_LIBRARY_PATH") if key in os.environ
    }
    environment |= {
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
        "HOME": str(folder),
        "TMPDIR": str(folder),
    }
    log = folder / "out" / "log.txt"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    done = 0
    deadline = time.monotonic() + grading.seconds + 60  # to start takes a while
    try:
        while process.poll() is None:
            time.sleep(0.05)
            now_done = sum(
                (folder / "out" / f"{number}.safetensors").exists() for number in numbers
            )
            if now_done > done:
                done = now_done
                deadline = time.monotonic() + grading.seconds
            if time.monotonic() > deadline:
                return f"stopped: it took more than {grading.seconds} seconds"
    finally:
        stop(process)
    if process.returncode < 0:
        number = -process.returncode
        return f"the process was ended by signal {number}, as when memory or disk are used up"
    return f"the process ended by itself, with code {process.returncode}, before the task was done"


def stop(process: subprocess.Popen):
    """End a process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def read_answers(out: Path, number: str, reason: str) -> list[Answer]:
    """The answers to a task, which the submission may have written, or why there are none."""
    refused = out / f"{number}.refused"
    if refused.is_file() and refused.stat().st_size:
        what = refused.read_text(encoding="utf-8", errors="replace").splitlines()[0]
        return [Answer("contract", "", error=f"refused: {what}")]
    path = out / f"{number}.safetensors"
    quick = out / f"{number}.quick"
    try:
        if path.is_file():
            return load_answers(path)[0][number]
        if quick.is_file():  # the process ended later
            return [*load_answers(quick)[0][number], Answer("picture", "", error=reason)]
        return [Answer("contract", "", error=reason)]
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        return [
            Answer("contract", "", error=f"the answers cannot be read ({type(error).__name__})")
        ]


# ---- reports -------------------------------------------------------------------------------------


def explain(verdict: Verdict) -> str:
    """A verdict as a sentence or two."""
    if verdict.passed:
        return "solved"
    if verdict.waits_for and verdict.score:
        return f"solved, but for the picture, which also needs {verdict.waits_for}"
    if verdict.waits_for:
        return f"needs {verdict.waits_for} first"
    text = f"{verdict.layer}: {verdict.message}"
    if verdict.hint:
        text += f"\nThese are exactly the results of a known mistake: {verdict.hint}"
    return text


def write_report(folder: Path, marks: Marks):
    """report.md for the student, and Gradescope's results.json."""
    folder.mkdir(parents=True)
    lines = [f"# {marks.name}: {marks.total:.2f} of {len(marks.verdicts)}", ""]
    lines += [f"- {note}" for note in marks.notes]
    tests = []
    for verdict in marks.verdicts:
        text = explain(verdict)
        lines += ["", f"## {verdict.number}: {verdict.score:.2f}", "", "```", text, "```"]
        tests.append(
            {
                "name": verdict.number,
                "score": round(verdict.score, 4),
                "max_score": 1,
                "output": text,
                "status": "passed" if verdict.score == 1 else "failed",
                "visibility": "visible",
            }
        )
    (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    results = {
        "score": round(marks.total, 4),
        "execution_time": round(marks.seconds),
        "output": "\n".join(marks.notes),
        "tests": tests,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


def write_table(path: Path, marks: list[Marks]):
    """grades.csv: a row for each submission."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        numbers = [verdict.number for verdict in marks[0].verdicts]
        table.writerow(["submission", *numbers, "total", "of", "notes"])
        for each in marks:
            scores = [f"{verdict.score:.2f}" for verdict in each.verdicts]
            table.writerow(
                [each.name, *scores, f"{each.total:.2f}", len(numbers), "; ".join(each.notes)]
            )


def summary(marks: list[Marks]) -> str:
    """Which checks fail how often, and which wrong results no known mistake explains."""
    failures = Counter()
    unexplained = []
    for each in marks:
        for verdict in each.verdicts:
            if verdict.score == 1:
                continue
            failures[verdict.number, verdict.layer] += 1
            if verdict.layer == "values" and not verdict.hint and not verdict.waits_for:
                unexplained.append(f"- {each.name}, {verdict.number}: {verdict.message}")
    lines = [
        f"# {len(marks)} submissions",
        "",
        "Share of submissions that each check stops:",
        "",
        "| task | " + " | ".join(LAYERS) + " |",
        "| --- |" + " --- |" * len(LAYERS),
    ]
    for number in [verdict.number for verdict in marks[0].verdicts]:
        shares = [f"{failures[number, layer] / len(marks):.0%}" for layer in LAYERS]
        lines.append(f"| {number} | " + " | ".join(shares) + " |")
    lines += [
        "",
        "Wrong values that are those of no known mistake. What several students write belongs into "
        "the "
        "misconceptions of the assignment:",
        "",
        *(unexplained or ["none"]),
    ]
    return "\n".join(lines) + "\n"
