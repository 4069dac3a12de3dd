"""Checks your solutions.

    python check.py                 all tasks
    python check.py a4              those of one assignment
    python check.py a4.2 --show     one task; draws its picture beside the expected one

Every line says whether a task is solved. If not, you see the first check that fails, with its
smallest inputs.
"""

import argparse
import faulthandler
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")

from coursework.checks import (  # noqa: E402 - reads these
    LAYERS,
    SEED,
    Answer,
    Task,
    Verdict,
    assignment_names,
    judge,
    judge_all,
    load_answers,
    load_assignment,
    only_values,
    run,
)
from minipic.common import InputError  # noqa: E402
from minipic.figures import image_grid  # noqa: E402
from minipic.image import to_pictures  # noqa: E402

HERE = Path(__file__).resolve().parent


def check(name: str, number: str, show: bool) -> list[tuple[Task, Verdict]]:
    """Check an assignment, or one task of it; prints what is found."""
    assignment = load_assignment(name)
    expected, known = load_answers(HERE / "coursework" / "expected" / f"{name}.safetensors")
    tasks = [task for task in assignment.TASKS if number in ("", task.number.lower())]
    if not tasks:
        raise SystemExit(
            f"There is no task {number.upper()}; {name.upper()} has {len(assignment.TASKS)}."
        )
    answers = {}
    for task in tasks:
        right = expected.get(task.number, [])
        quick = only_values(task, identities=True)
        answers[task.number] = run(quick, SEED)
        is_right = judge(
            quick, answers[task.number], [answer for answer in right if answer.layer in LAYERS[:3]]
        ).passed
        if quick != task and is_right:  # a wrong kernel could end the program while it draws
            answers[task.number] = run(task, SEED)
    verdicts = judge_all(tasks, answers, expected, known)
    for task, verdict in zip(tasks, verdicts):
        print_verdict(task, verdict)
        if show:
            save_pictures(task, answers[task.number], expected.get(task.number, []))
    return list(zip(tasks, verdicts))


def print_verdict(task: Task, verdict: Verdict):
    name = task.target.split(":")[1]
    state = "solved" if verdict.passed else f"not solved ({verdict.layer})"
    if f"NotImplementedError: {task.number}" in verdict.message:
        print(f"{task.number}  {name:24} not written yet")
        return
    print(f"{task.number}  {name:24} {state}")
    if verdict.waits_for:
        print(f"    needs {verdict.waits_for} first")
    elif not verdict.passed:
        print(f"    {verdict.message}")
    if verdict.hint:
        print(f"    Your results are exactly those of a known mistake: {verdict.hint}")


def save_pictures(task: Task, answers: list[Answer], expected: list[Answer]):
    """The expected picture of a task beside yours, in pictures/."""
    pictures = []
    labels = []
    for label, found in (("expected", expected), ("yours", answers)):
        for answer in found:
            if answer.layer == "picture" and answer.error is None:
                pictures += to_pictures(2 * answer.outputs["picture"][None] - 1)
                labels.append(f"{label}: {answer.name}")
    if len(pictures) == 1:
        labels[0] += " (yours is drawn when its values are right)"
    if pictures:
        path = HERE / "pictures" / f"{task.number}.png"
        path.parent.mkdir(exist_ok=True)
        image_grid(pictures, labels).save(path)
        print(f"    see pictures/{path.name}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", nargs="?", default="", help="such as a4, or a4.2")
    parser.add_argument("--show", action="store_true", help="draw the pictures")
    options = parser.parse_args()
    faulthandler.enable()  # a kernel that writes beyond its memory ends the program: say where
    name, _, part = options.task.lower().partition(".")
    if name and name not in assignment_names():
        raise SystemExit(
            f"There is no {name!r} here; choose one of {', '.join(assignment_names())}."
        )
    results = []
    for each in [name] if name else assignment_names():
        try:
            results += check(each, options.task.lower() if part else "", options.show)
        except InputError as error:
            print(error)
    left = [task for task, verdict in results if not verdict.passed]
    print(f"{len(results) - len(left)} of {len(results)} solved.", end=" ")
    if left:
        print(f"Next: {left[0].number}, about {left[0].minutes} minutes.", end="")
    print()


if __name__ == "__main__":
    main()
