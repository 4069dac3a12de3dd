"""What the reference gives for every task: its answers, how far they may be off, and the known
mistakes.

Only the instructor has this file. It also holds the gate that an assignment must pass before
students see it: no wrong version of a function may pass its checks, and no right version may fail
them.
"""

import copy
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn as nn

from coursework import checks
from coursework.checks import (
    Answer,
    Case,
    Exercise,
    Prediction,
    Task,
    Verdict,
    fingerprint,
    judge,
    only_values,
    run,
)
from coursework.source import (
    VARIANT_TEXTS,
    Mutant,
    fill_in,
    installed,
    mutants,
    name_of,
    path_of,
    replace_once,
    text_of,
)

MARGIN = 10  # the tolerance is this many times the spread of right answers
ROUNDING = 4 * 2**-23  # of fp32, as a share of the largest number: the least spread
PICTURE_ROUNDING = 0.2 / 255  # a picture has 256 levels


class Wrong(NamedTuple):
    """A wrong version that passes all checks."""

    number: str
    change: str


# ---- the parts of an assignment that students do not get -----------------------------------------


def fill_ins(assignment: ModuleType) -> list[Exercise]:
    """The exercises whose answer is in the repository."""
    return [task for task in assignment.TASKS if is_fill_in(task)]


def is_fill_in(task: Task) -> bool:
    return isinstance(task, Exercise) and task.target.startswith("minipic")


def right_versions(assignment: ModuleType, task: Exercise) -> list[str]:
    """The texts of the file with each alternate right body."""
    name = name_of(task.target)
    bodies = assignment.ALTERNATES.get(task.number, ())
    return [fill_in(text_of(task.target), name, body) for body in bodies]


def wrong_versions(assignment: ModuleType, task: Exercise) -> list[Mutant]:
    """The named misconceptions of a task, and then every mutant that is not listed as
    equivalent."""
    text = text_of(task.target)
    name = name_of(task.target)
    found = []
    for old, new, hint in assignment.MISCONCEPTIONS.get(task.number, ()):
        found.append(Mutant(f"{old} -> {new}", hint, replace_once(text, name, old, new)))
    equivalent = assignment.EQUIVALENT.get(task.number, {})
    for mutant in mutants(text, name):
        if mutant.change not in equivalent:
            found.append(mutant)
    return found


@contextmanager
def replaced(assignment: ModuleType, variant: str | None):
    """Inside, the reference is that of a variant of the assignment, if it has one by this name.

    VARIANTS = {name: {"text": what is different, "replace": [(number, old, new), ...]}}
    The alternates and misconceptions of a task that differs do not apply.
    """
    chosen = assignment.VARIANTS.get(variant, {"replace": ()})
    targets = {task.number: task.target for task in assignment.TASKS}
    changed = [number for number, _, _ in chosen["replace"]]
    with ExitStack() as stack:
        for table in (assignment.ALTERNATES, assignment.MISCONCEPTIONS):
            stack.enter_context(mock.patch.dict(table, {number: () for number in changed}))
        stack.enter_context(mock.patch.dict(VARIANT_TEXTS))
        for number, old, new in chosen["replace"]:
            target = targets[number]
            VARIANT_TEXTS[path_of(target)] = replace_once(
                text_of(target), name_of(target), old, new
            )
            stack.enter_context(installed(target, text_of(target)))
        yield


# ---- expected answers ----------------------------------------------------------------------------


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@contextmanager
def in_double():
    """Inside, every case computes with twice the digits."""
    call = checks.answer_case

    def answer_in_double(case):
        arguments = [doubled(argument) for argument in case.arguments]
        return call(Case(case.name, doubled(case.call), *arguments))

    with mock.patch.object(checks, "answer_case", answer_in_double):
        yield


def doubled(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(map(doubled, value))
    return value


def expected_answers(assignment: ModuleType, seed: int) -> dict[str, list[Answer]]:
    """{number: answers of the reference, with their tolerances} of every task that has some.

    The tolerance of an output is MARGIN times the largest difference between right answers: in fp32
    and fp64, with one thread and two, and by every alternate solution.
    Pictures are drawn in fp32 with one thread.
    """
    expected = {}
    for task in assignment.TASKS:
        if isinstance(task, Prediction):
            truth = float(task.truth())
            answer = Answer("values", "the prediction", {"result": torch.tensor(truth).double()})
            answer.tolerance = {"result": task.within * abs(truth)}
            expected[task.number] = [answer]
        elif isinstance(task, Exercise) and is_fill_in(task):
            expected[task.number] = with_tolerance(assignment, task, seed)
        elif isinstance(task, Exercise):
            with answered(task.target, assignment.ORACLES[task.number]):
                expected[task.number] = with_tolerance(assignment, task, seed)
    return expected


@contextmanager
def answered(target: str, value: object):
    """Inside, a student's file of answers has this value."""
    module, name = target.split(":")
    package = ModuleType("answers")
    file = ModuleType(module)
    setattr(file, name, value)
    with mock.patch.dict(sys.modules, {"answers": package, module: file}):
        yield


def with_tolerance(assignment: ModuleType, task: Exercise, seed: int) -> list[Answer]:
    answers = run(task, seed)
    if answers[-1].error is not None:
        raise RuntimeError(
            f"{task.number}: the reference fails its own checks: {answers[-1].error}"
        )
    others = []
    for context in (in_double(), threads(2)):
        with context:
            others.append(run(only_values(task, identities=True), seed))
    for text in right_versions(assignment, task):
        with installed(task.target, text):
            others.append(run(task, seed))
    for other in others:
        if other[-1].error is not None:
            raise RuntimeError(f"{task.number}: a right version, or fp64, fails: {other[-1].error}")
    for i, answer in enumerate(answers):
        for name, tensor in answer.outputs.items():
            if name in answer.tolerance:
                continue
            if tensor.dtype == torch.uint8:  # a text
                answer.tolerance[name] = 0.0
                continue
            spread = rounding(answer, tensor)
            for other in others:
                if i < len(other):  # only alternates are drawn with
                    spread = max(spread, furthest(answer, other[i], name))
            answer.tolerance[name] = MARGIN * spread
    return answers


def rounding(answer: Answer, tensor: torch.Tensor) -> float:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return 0.0
    if answer.layer == "picture":
        return PICTURE_ROUNDING
    return ROUNDING * tensor.abs().nan_to_num(0, 0, 0).max().item()


def furthest(answer: Answer, other: Answer, name: str) -> float:
    """How far apart two right answers are; of an identity, how far the other is from what it should
    be."""
    mine = answer.outputs["expected" if answer.layer == "identities" else name]
    if answer.layer == "identities":
        mine = other.outputs["expected"]
    theirs = other.outputs[name]
    if mine.numel() == 0:
        return 0.0
    off = (mine.double() - theirs.double()).abs()
    return off.nan_to_num(0, 0, 0).max().item()


# ---- known mistakes and the gate -----------------------------------------------------------------


def known_mistakes(assignment: ModuleType, task: Exercise, seed: int) -> list[tuple[str, list]]:
    """[(hint, fingerprint of its results), ...] of every wrong version; of slow assignments, of
    those with a name."""
    right = fingerprint(run(only_values(task), seed))
    wrong = wrong_versions(assignment, task)
    if runs_apart(assignment):
        wrong = wrong[: len(assignment.MISCONCEPTIONS.get(task.number, ()))]
    found = []
    for mutant in wrong:
        with installed(task.target, mutant.text):
            prints = separately(assignment, lambda: fingerprint(run(only_values(task), seed)))
        is_right = (
            prints is None
            or len(prints) == len(right)
            and all(map(checks.same_print, prints, right))
        )
        if not is_right:
            found.append((mutant.hint, prints))
    return found


def survivors(
    assignment: ModuleType, task: Exercise, expected: list[Answer], seed: int
) -> Iterator[Wrong]:
    """The wrong versions of a function that pass all of its checks."""
    for mutant in wrong_versions(assignment, task):
        if separately(assignment, lambda: verdict_on(task, mutant.text, expected, seed).passed):
            yield Wrong(task.number, mutant.change)


def verdict_on(task: Exercise, text: str, expected: list[Answer], seed: int) -> Verdict:
    """The verdict on another version of a function; the first layers are tried alone, because they
    are quick."""
    with installed(task.target, text):
        quick = only_values(task)
        verdict = judge(
            quick, run(quick, seed), [answer for answer in expected if answer.layer == "values"]
        )
        if not verdict.passed:
            return verdict
        return judge(task, run(task, seed), expected)


def runs_apart(assignment: ModuleType) -> bool:
    """Whether wrong versions may write anywhere in memory, as kernels in Triton's interpreter
    do."""
    return getattr(assignment, "RUNS_APART", False)


def separately(assignment: ModuleType, function: Callable) -> object:
    """What a function returns, JSON. Where `runs_apart`, it runs in a copy of the process; None if
    that dies."""
    if not runs_apart(assignment):
        return function()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with open(writing, "w", encoding="utf-8") as pipe:
                json.dump(function(), pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if status == 0 else None
