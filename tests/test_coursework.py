"""The coursework: checks that no wrong solution passes and no right one fails, and marks that are the right ones."""

import ast
import csv
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tutorials"))

import course  # noqa: E402 - needs the path
from coursework import checks  # noqa: E402
from coursework.checks import (  # noqa: E402
    SEED, Answer, BreakIt, Case, Exercise, Prediction, Verdict, assignment_names, difference, judge, judge_all,
    load_answers, load_assignment, run, save_answers)
from coursework.grade import grade  # noqa: E402
from coursework.reference import (  # noqa: E402
    answered, expected_answers, fill_ins, known_mistakes, only_values, replaced, right_versions, runs_apart, survivors,
    verdict_on, with_tolerance, wrong_versions)
from coursework.release import release  # noqa: E402
from coursework.source import (  # noqa: E402
    blank, body_of, fill, fill_in, find, installed, mutants, name_of, path_of, replace_once, text_of)
from minipic.common import InputError  # noqa: E402
from minipic.diffusion import guidance, samplers  # noqa: E402

NAMES = [name for name in assignment_names() if name != "a6" or importlib.util.find_spec("triton")]
FILL_INS = [(name, task) for name in NAMES for task in fill_ins(load_assignment(name))]
EVERY_FILL_IN = pytest.mark.parametrize("name, task", FILL_INS, ids=[task.number for _, task in FILL_INS])
QUICK = [(name, task) for name, task in FILL_INS if task.number in ("A2.4", "A4.5", "A5.2")]
A_QUICK_ONE = [name if name == "a3" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
NOT_A6 = [pytest.param(name, marks=pytest.mark.slow) if name == "a6" else name for name in NAMES]  # is interpreted
COMBINE = "minipic.diffusion.guidance:combine"


def read(path):
    return path.read_text(encoding="utf-8")


# ---- functions as text ---------------------------------------------------------------------------

@EVERY_FILL_IN
def test_a_blank_function_filled_again_is_the_same_file(name, task):
    text = text_of(task.target)
    function = name_of(task.target)
    blanked = blank(text, function, task.number)
    assert blanked != text and fill(blanked, function, body_of(text, function)) == text
    statements = find(blanked, function).body
    assert ast.unparse(statements[-1]).startswith(f"raise NotImplementedError('{task.number}: ")
    assert ast.get_docstring(find(blanked, function)) == ast.get_docstring(find(text, function))


def test_a_body_begins_at_the_comment_above_it():
    text = 'class A:\n    def f(self, x):\n        """d"""\n        # why\n        y = x\n        return y\n\n    z = 1\n'
    assert body_of(text, "A.f") == "        # why\n        y = x\n        return y\n"
    assert fill_in(text, "A.f", "return 2").endswith('"""d"""\n        return 2\n\n    z = 1\n')
    with pytest.raises(ValueError, match="0 functions"):
        find(text, "A.g")
    with pytest.raises(ValueError, match="own lines"):
        body_of("def f(): return 1\n", "f")
    with pytest.raises(ValueError, match="is 3 times"):
        replace_once(text, "A.f", "y", "z")


def test_every_mistake_is_made_once():
    text = ("def f(a, b):\n    if a:\n        b = -a + 2\n    c = a / b if a > b else (a @ b).sqrt()\n"
            "    return torch.exp(c) and True\n")
    changes = [mutant.change for mutant in mutants(text, "f")]
    assert sorted(changes) == sorted([
        "if a: -> if not a:", "-a + 2 -> -a - 2", "-a + 2 -> -a", "-a -> a", "2 -> 3", "a / b -> a * b", "a / b -> a",
        "a / b -> b / a", "a > b -> a <= b", "a @ b -> a * b", "a @ b -> a", "a @ b -> b @ a", "(a @ b).sqrt() -> a @ b",
        "a / b if a > b else (a @ b).sqrt() -> (a @ b).sqrt() if a > b else a / b", "torch.exp(c) -> c",
        "torch.exp(c) and True -> torch.exp(c) or True", "True -> False"])
    texts = {mutant.text for mutant in mutants(text, "f")}
    assert len(texts) == len(changes) and text not in texts
    for changed in texts:
        ast.parse(changed)


def test_an_installed_body_is_seen_by_whoever_holds_the_function():
    text = replace_once(text_of(COMBINE), "combine", "uncond + sum", "uncond - sum")
    held = guidance.combine
    pair = torch.tensor(1.0), [(2.0, torch.tensor(4.0))]
    with installed(COMBINE, text):
        assert held(*pair) == 1 - 6
    assert held(*pair) == 1 + 6


# ---- answers and verdicts ------------------------------------------------------------------------

def exercise(*cases, **layers):
    return Exercise("A0.1", COMBINE, 5, "", cases=lambda random: cases, **layers)


def expected(task):
    answers = run(task, SEED)
    for answer in answers:
        answer.tolerance = {key: 1e-6 for key in answer.outputs}
    return answers


ONE = torch.tensor([1.0, 2.0])


@pytest.mark.parametrize("result, layer, words", [
    (ONE, None, ""), (ONE + 1e-8, None, ""),
    (ONE + torch.tensor([0, 1.5e-6]), "values", "result[1]"),
    (ONE + torch.tensor([0, 0.5]), "values", "small: result[1] is 2.5, expected 2"),
    (ONE[None], "contract", "shape (1, 2), expected (2,)"), (ONE[:1], "contract", "shape (1,)"),
    (ONE.double(), "contract", "torch.float64, expected torch.float32"), (ONE / 0, "contract", "NaN or infinity"),
    ([ONE], "contract", "expected result, got result[0]"), (None, "contract", "is torch.bool"),
    ((x for x in ()), "contract", "got nothing")])
def test_results_are_judged(result, layer, words):
    verdict = judge(exercise(), run(exercise(Case("small", lambda: result)), SEED),
                    expected(exercise(Case("small", lambda: ONE))))
    assert verdict.layer == layer and words in verdict.message and verdict.score == (layer is None)


def test_the_smallest_failing_input_is_shown_and_the_cheapest_layer_first():
    def task(add, broken=False):
        def identities(random):
            yield "one is one", 1.0 + add, 1.0

        def double(x):
            return {} if broken and len(x) == 4 else 2 * x + add
        cases = [Case(f"{n} numbers", double, torch.ones(n)) for n in (9, 3, 4)]
        return exercise(*cases, identities=identities)

    right = expected(task(0.0))
    assert judge(task(0.0), run(task(0.0), SEED), right).passed
    assert judge(exercise(), run(task(1.0), SEED), right).message.startswith("3 numbers: result[")
    assert judge(exercise(), run(task(1.0, True), SEED), right).layer == "contract"
    answers = run(task(0.0), SEED)
    answers[-1] = Answer("identities", "one is one", {"got": torch.tensor(2.0), "expected": torch.tensor(1.0)})
    assert judge(exercise(), answers, right).layer == "identities"
    assert judge(exercise(), answers[:-1], right).message == "one is one: no result"
    assert judge(exercise(), answers[:1], right).layer == "values"


def test_an_argument_must_not_be_changed():
    case = Case("in place", lambda x: x.add_(1), torch.zeros(2))
    assert run(exercise(case), SEED)[0].changed == [0]
    right = expected(exercise(Case("in place", lambda x: x + 1, torch.zeros(2))))
    case = Case("in place", lambda x: x.add_(1), torch.zeros(2))
    assert "argument 1 is changed" in judge(exercise(), run(exercise(case), SEED), right).message


def test_what_is_drawn_with_a_wrong_function_of_another_task_does_not_count():
    tasks = [Exercise(f"A0.{i}", COMBINE, 5, "") for i in (1, 2)]
    right = {task.number: [Answer("values", "v", {"r": ONE}, tolerance={"r": 0}),
                           Answer("picture", "p", {"r": ONE}, tolerance={"r": 0})] for task in tasks}
    wrong = [Answer("values", "v", {"r": ONE + 1}), Answer("picture", "p", {"r": ONE + 1})]
    only_picture = [Answer("values", "v", {"r": ONE}), Answer("picture", "p", {"r": ONE + 1})]
    first, second = judge_all(tasks, {"A0.1": wrong, "A0.2": only_picture}, right, {})
    assert (first.score, second.score, second.waits_for) == (0, 1, "A0.1")
    first, second = judge_all(tasks, {"A0.1": right["A0.1"], "A0.2": only_picture}, right, {})
    assert (first.score, second.score, second.layer) == (1, 0, "picture")


def test_the_cost_is_a_ratio():
    def task(used):
        return exercise(cost=lambda: [("calls", used, 10, 1.5)])
    right = run(task(10), SEED)
    assert judge(task(15), run(task(15), SEED), right).passed
    assert judge(task(16), run(task(16), SEED), right).layer == "cost"


def test_errors_name_the_line_and_the_task_that_is_needed():
    with installed(COMBINE, blank(text_of(COMBINE), "combine", "A9.9")):
        answers = run(exercise(Case("c", guidance.combine, ONE, [])), SEED)
    verdict = judge(exercise(), answers, [Answer("values", "c", {"result": ONE}, tolerance={"result": 0})])
    assert verdict.waits_for == "A9.9" and "NotImplementedError: A9.9: combine" in verdict.message
    assert "line" in verdict.message and "in combine" in verdict.message


def test_answers_are_the_same_when_read_again(tmp_path):
    answers = {"A0.1": [Answer("values", "a", {"result[0]": ONE, "t": checks.as_tensor("é")}, tolerance={"t": 0.5}),
                        Answer("values", "b", error="no", size=3, changed=[1])]}
    save_answers(answers, tmp_path / "a.safetensors", {"A0.1": [("hint", [None, [1.0, 2.0, 3.0]])]})
    again, known = load_answers(tmp_path / "a.safetensors")
    assert known == {"A0.1": [["hint", [None, [1.0, 2.0, 3.0]]]]}
    for one, other in zip(again["A0.1"], answers["A0.1"], strict=True):
        assert {**vars(one), "outputs": 0} == {**vars(other), "outputs": 0}
        assert list(one.outputs) == list(other.outputs)
        assert all(torch.equal(one.outputs[key], other.outputs[key]) for key in one.outputs)
    assert difference("", "t", checks.as_tensor("e"), checks.as_tensor("é"), 0) == "t is 'e', expected 'é'"


def test_a_tolerance_is_ten_times_the_spread_of_right_answers():
    """Of fp32 and fp64 here, or of the rounding of fp32 where that is more."""
    def inexact(x):
        return x + 1000 - 1000

    tenth = torch.tensor([0.1])
    case = exercise(Case("inexact", inexact, tenth), Case("exact", torch.neg, tenth))
    inexactly, exactly = with_tolerance(SimpleNamespace(ALTERNATES={}), case, SEED)
    spread = (inexact(tenth).double() - inexact(tenth.double())).abs().item()
    assert inexactly.tolerance["result"] == 10 * spread > 1e-5
    assert exactly.tolerance["result"] == pytest.approx(10 * 4 * 2**-23 * 0.1)


# ---- the gate ------------------------------------------------------------------------------------

def alive(name, task, right):
    """The changes that pass all checks, among those listed as equivalent too."""
    assignment = load_assignment(name)
    with mock.patch.dict(assignment.EQUIVALENT, {task.number: {}}):
        return {wrong.change for wrong in survivors(assignment, task, right, SEED)}


@pytest.mark.slow
@pytest.mark.parametrize("name, task", QUICK, ids=[task.number for _, task in QUICK])
def test_wrong_values_are_seen(name, task):
    """The quick layers alone kill nine of ten wrong versions, and all right ones pass them, with any seed."""
    assignment = load_assignment(name)
    task = only_values(task, identities=True)
    for seed in (SEED, 99):
        right = with_tolerance(assignment, task, seed)
        assert judge(task, run(task, seed), right).passed
        for text in right_versions(assignment, task):
            assert verdict_on(task, text, right, seed).passed
    wrong = wrong_versions(assignment, task)
    assert len(list(survivors(assignment, task, right, 99))) <= len(wrong) / 10


@pytest.mark.slow
@EVERY_FILL_IN
def test_no_wrong_version_passes_and_no_right_one_fails(name, task):
    assignment = load_assignment(name)
    for seed in (2026, SEED):
        right = with_tolerance(assignment, task, seed)
        assert judge(task, run(task, seed), right).passed
        assert task.number in assignment.ALTERNATES
        for text in right_versions(assignment, task):
            assert verdict_on(task, text, right, seed).passed
    assert alive(name, task, right) == set(assignment.EQUIVALENT.get(task.number, {}))
    assert all(assignment.EQUIVALENT.get(task.number, {}).values())  # reasons


@pytest.mark.slow
@EVERY_FILL_IN
def test_named_misconceptions_are_recognised(name, task):
    assignment = load_assignment(name)
    known = known_mistakes(assignment, task, SEED)
    right = with_tolerance(assignment, only_values(task), SEED)
    text = text_of(task.target)
    for old, new, hint in assignment.MISCONCEPTIONS[task.number]:
        with installed(task.target, replace_once(text, name_of(task.target), old, new)):
            answers = run(only_values(task), SEED)
        found = judge(only_values(task), answers, right, known).hint
        # What a wrong kernel reads beyond its tensors is another number each time.
        assert found == hint or runs_apart(assignment) and not found


@pytest.mark.parametrize("name", NAMES)
def test_an_assignment_has_all_parts(name):
    tasks = load_assignment(name).TASKS
    assert [task.number for task in tasks] == [f"{name.upper()}.{i}" for i in range(1, len(tasks) + 1)]
    assert 4 <= len(fill_ins(load_assignment(name))) <= 6
    assert all(5 <= task.minutes <= 25 for task in tasks)
    others = [task for task in tasks if task.target.startswith(f"answers.{name}:")]
    assert [type(task) for task in others] == [Prediction, Exercise, BreakIt]
    assert len(others) + len(fill_ins(load_assignment(name))) == len(tasks)


@pytest.mark.parametrize("name", A_QUICK_ONE)
def test_the_other_tasks_can_be_solved(name):
    """A prediction has a truth, a task of one's own passes for one who knows the truth, a check can kill everything."""
    assignment = load_assignment(name)
    for task in assignment.TASKS:
        if isinstance(task, Prediction):
            right = expected_answers_of(assignment, task)
            truth = right[0].outputs["result"].item()
            for guess, is_right in ((truth, True), (1.6 * truth + 1, False)):
                with answered(task.target, guess):
                    assert judge(task, run(task, SEED), right).passed == is_right
        elif isinstance(task, BreakIt):
            observe = assignment.ORACLES[task.number]
            with torch.no_grad():
                wanted = checks.tensors(observe(checks.resolve(task.subject)))

            def good_check(function):
                with torch.no_grad():
                    got = checks.tensors(observe(function))
                return all(torch.allclose(got[key], wanted[key], atol=1e-5) for key in wanted)

            with answered(task.target, good_check):
                assert judge(task, run(task, SEED), []) == Verdict(task.number, score=1.0)
            with answered(task.target, lambda function: True):
                assert judge(task, run(task, SEED), []).score == 0
            with answered(task.target, lambda function: False):
                verdict = judge(task, run(task, SEED), [])
                assert verdict.score == 0 and "right version" in verdict.message
        elif not task.target.startswith("minipic"):
            right = expected_answers_of(assignment, task)
            with answered(task.target, assignment.ORACLES[task.number]):
                assert judge(task, run(task, SEED), right).passed
                assert judge(task, run(task, SEED)[:-1], right).score == 0


def expected_answers_of(assignment, task):
    with mock.patch.object(assignment, "TASKS", [task]):
        return expected_answers(assignment, SEED)[task.number]


# ---- the students' folder ------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """What is handed out of all assignments, without expected answers."""
    folder = tmp_path_factory.mktemp("course") / "bundle"
    release(folder, NAMES, with_expected=False)
    return folder


def test_no_line_of_the_reference_is_in_the_bundle(bundle):
    """Short lines and those that only begin an `if` or a loop may stand elsewhere too."""
    handed_out = set()
    for path in bundle.rglob("*"):
        if path.suffix in (".py", ".md", ".json", ".txt"):
            handed_out |= {line.strip() for line in read(path).splitlines()}
    left_out = set()
    for _, task in FILL_INS:
        left_out |= {line.strip() for line in body_of(text_of(task.target), name_of(task.target)).splitlines()}
    telling = {line for line in left_out if len(line) >= 20 and not line.endswith(":")}
    assert len(telling) > 10 * len(NAMES) and telling & handed_out == set()


def test_the_bundle_has_nothing_of_the_instructor(bundle):
    assert not list(bundle.rglob("*.pyc"))
    assert {path.name for path in (bundle / "coursework").iterdir()} == {
        "checks.py", "source.py", *(f"{name}.py" for name in NAMES)}
    for name in NAMES:
        assert "ALTERNATES" not in read(bundle / "coursework" / f"{name}.py")
    assert not (bundle / "weights" / "tiny" / "judge").exists()
    with pytest.raises(InputError, match="is not empty"):
        release(bundle, NAMES)


def test_an_assignment_without_its_package_says_so(monkeypatch):
    monkeypatch.delitem(sys.modules, "coursework.a6", raising=False)
    monkeypatch.delitem(sys.modules, "minipic.kernels.flash_attention", raising=False)
    monkeypatch.delattr("minipic.kernels.flash_attention", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(InputError, match="a6 needs the package triton; install it"):
        load_assignment("a6")


def run_check(folder, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    found = subprocess.run([sys.executable, "check.py", *arguments], cwd=folder, env=environment, capture_output=True,
                           text=True)
    assert found.stderr == ""
    return found.stdout


def solve(folder, assignment, versions=()):
    """Fill in all functions of an assignment. versions: {number: body} of those that differ from the reference."""
    for task in fill_ins(assignment):
        path = folder / path_of(task.target)
        body = dict(versions).get(task.number) or body_of(text_of(task.target), name_of(task.target))
        path.write_text(fill_in(read(path), name_of(task.target), body), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_student_goes_through_an_assignment(name, tmp_path):
    """Blank, every task says that it is not written, and nothing else fails. Solved, all are, in the stated time."""
    folder = tmp_path / "bundle"
    course.main(["release", "--out", str(folder), "--only", name])
    assignment = load_assignment(name)
    shown = run_check(folder)
    assert shown.count("not written yet") == len(assignment.TASKS) and f"0 of {len(assignment.TASKS)} solved" in shown
    assert f"Next: {name.upper()}.1, about" in shown
    solve(folder, assignment)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = run_check(folder, name, "--show")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 60  # as the handout says
    for task in fill_ins(assignment):
        assert re.search(rf"^{task.number} .* solved$", shown, re.M), shown
        assert (folder / "pictures" / f"{task.number}.png").exists() == (task.picture is not None)
    first = fill_ins(assignment)[0]
    old, new, hint = assignment.MISCONCEPTIONS[first.number][0]
    path = folder / path_of(first.target)
    path.write_text(replace_once(read(path), name_of(first.target), old, new), encoding="utf-8")
    shown = run_check(folder, first.number.lower())
    assert "not solved (values)" in shown and "expected" in shown and hint in shown
    handout = read(folder / "handouts" / f"{name}.md")
    for task in assignment.TASKS:
        assert f"## {task.number} `" in handout


@pytest.mark.slow
@pytest.mark.parametrize("name", NOT_A6)
def test_a_blank_function_fails_its_own_task_and_no_other(name):
    """One function of the assignment at a time is left out; pictures wait for it, and nothing else changes."""
    assignment = load_assignment(name)
    for left_out in fill_ins(assignment):
        text = blank(text_of(left_out.target), name_of(left_out.target), left_out.number)
        with installed(left_out.target, text):
            for task in fill_ins(assignment):
                answers = run(only_values(task, identities=True), SEED)
                error = answers[-1].error
                if task is left_out or left_out.number in assignment.NEEDS.get(task.number, ()):
                    assert f"NotImplementedError: {left_out.number}: " in error
                else:
                    assert error is None, (left_out.number, task.number, error)


# ---- marks ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, words", [
    (["release", "--out", "x", "--only", "a99"], "--only: there is no assignment 'a99'"),
    (["release", "--out", "x", "--only", "a4", "--variant", "euler"], "--variant: 'euler' is unknown"),
    (["grade", "nowhere", "--seed", "1"], "is no folder"), (["grade", "twins", "--seed", "1"], "of one name"),
    (["grade", "empty", "--seed", "1"], "holds no folder and no .zip")])
def test_an_instructors_mistake_is_one_sentence(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("twins/ada", "twins/ada.zip", "empty"):
        Path(path).mkdir(parents=True)
    with pytest.raises(SystemExit) as end:
        course.main(arguments)
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("course.py: ") and words in shown and len(shown.splitlines()) == 1


PATCHES = """
import coursework.checks
torch.equal = torch.allclose = lambda *given, **more: True
torch.Tensor.__eq__ = lambda one, other: torch.ones(()).bool()
coursework.checks.compare = coursework.checks.difference = lambda *given: ("values", "")
coursework.checks.judge = lambda task, *given: coursework.checks.Verdict(task.number, score=1.0)
"""
HOSTILE = {  # a name: (a body for A4.2, what is said of it)
    "loop": ("while True:\n    pass", "stopped: it took more than"),
    "memory": ("x = [torch.ones(10**8) for _ in range(100)]\nyield x, x", "can't allocate memory"),
    "reads": ("text = open('REFERENCE').read()\nyield x, x", "refused: reading"),
    "network": ("import socket\nsocket.create_connection(('127.0.0.1', 9))\nyield x, x", "refused: socket."),
    "exit": ("import os\nos._exit(0)", "ended by itself, with code 0"),
    "starts": ("import subprocess\nsubprocess.run(['ls'])\nyield x, x", "refused: subprocess.Popen"),
    "deletes": ("import os\nos.remove('REFERENCE')\nyield x, x", "refused: changing"),
    "forges": ("import os\nopen('out/A4.2.safetensors', 'w').write('{}')\nos._exit(0)", "the answers cannot be read"),
    "patches": ("x0 = denoise(x, sigmas[0])\nfor i in range(len(sigmas) - 1):\n    yield x, x0", "values: "),
}


# where no more answers came, and where a check of a true inequality uses the comparison that was patched
ALSO_LOST = {("forges", "A4.3"), ("patches", "A4.5")}


def hand_in(folder, bundle, versions=(), at_import=""):
    """A submission with all fill-ins of A4 solved, but for the versions given."""
    for target in [task.target for task in load_assignment("a4").TASKS]:
        path = folder / path_of(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((bundle / path_of(target)).read_bytes())
    solve(folder, load_assignment("a4"), versions)
    path = folder / "minipic" / "diffusion" / "samplers.py"
    path.write_text(read(path).replace("\nimport torch\n", "\nimport torch\n" + at_import, 1), encoding="utf-8")


@pytest.mark.slow
def test_a_class_of_twenty_is_graded(bundle, tmp_path):
    """Six write it differently and right, five have one function wrong, nine try to cheat or break the grading."""
    assignment = load_assignment("a4")
    submissions = tmp_path / "submissions"
    right = {}  # {submission: {number: score}}
    for i in range(6):
        versions = {}
        for task in fill_ins(assignment):
            _, *statements = find(text_of(task.target), name_of(task.target)).body
            unparsed = "\n".join(map(ast.unparse, statements))
            bodies = [unparsed, *assignment.ALTERNATES[task.number]]
            versions[task.number] = bodies[i % len(bodies)]
        hand_in(submissions / f"right{i}", bundle, versions)
    with zipfile.ZipFile(submissions / "right5.zip", "w") as archive:  # in a folder inside
        for path in (submissions / "right5").rglob("*.py"):
            archive.write(path, f"homework/{path.relative_to(submissions / 'right5')}")
            path.unlink()
    (submissions / "right5").rename(tmp_path / "moved away")
    (submissions / "right4" / "coursework").mkdir()
    (submissions / "right4" / "coursework" / "checks.py").write_text("raise SystemExit")  # is put back
    answers = submissions / "right3" / "answers" / "a4.py"
    answers.write_text(read(answers).replace("ROWS = None", "ROWS = 114"), encoding="utf-8")
    wrong = {}
    for i, task in enumerate(fill_ins(assignment)[1:]):
        text = wrong_versions(assignment, task)[7 * i].text
        wrong[f"wrong{i}"] = task.number
        hand_in(submissions / f"wrong{i}", bundle, {task.number: body_of(text, name_of(task.target))})
    for name, (body, _) in HOSTILE.items():
        body = body.replace("REFERENCE", str(ROOT / "minipic" / "diffusion" / "samplers.py"))
        hand_in(submissions / name, bundle, {"A4.2": body}, PATCHES if name == "patches" else "")
    assert len(list(submissions.iterdir())) == 20

    out = tmp_path / "grades"
    course.main(["grade", str(submissions), "--seed", "2026", "--only", "a4", "--out", str(out), "--seconds", "40"])
    assert (ROOT / "minipic" / "diffusion" / "samplers.py").exists()
    with open(out / "grades.csv", encoding="utf-8") as file:
        rows = {row["submission"]: row for row in csv.DictReader(file)}
    assert len(rows) == 20
    for name, row in rows.items():
        for task in fill_ins(assignment):
            fails = wrong.get(name) == task.number or (name in HOSTILE and task.number == "A4.2")
            fails = fails or (name, task.number) in ALSO_LOST
            assert float(row[task.number]) == (0 if fails else 1), (name, task.number, read(out / name / "report.md"))
    assert [name for name, row in rows.items() if float(row["A4.7"])] == ["right3"]
    for name, (_, words) in HOSTILE.items():
        results = json.loads(read(out / name / "results.json"))
        said, = [test["output"] for test in results["tests"] if test["name"] == "A4.2"]
        assert words in said and results["score"] == 5 - sum(name == loser for loser, _ in ALSO_LOST)
    assert json.loads(read(out / "right3" / "results.json"))["score"] == 7
    text = read(out / "summary.md")
    assert "| A4.2 | 40% |" in text and "patches, A4.2" in text and "wrong0" not in text


@pytest.mark.slow
def test_a_variant_is_another_reference(bundle, tmp_path):
    """With the variant, Heun's method is wrong and Ralston's is right; students get neither."""
    assignment = load_assignment("a4")
    _, old, new = assignment.VARIANTS["ralston"]["replace"][0]
    text = text_of("minipic.diffusion.samplers:heun")
    with replaced(assignment, "ralston"):
        text = text_of("minipic.diffusion.samplers:heun")
        task = assignment.TASKS[2]
        right = with_tolerance(assignment, task, SEED)
        assert alive("a4", task, right) == set()
        ralston = body_of(text, "heun")
    hand_in(tmp_path / "in" / "heun", bundle)
    hand_in(tmp_path / "in" / "ralston", bundle, {"A4.3": ralston})
    heun, ralston = grade(tmp_path / "in", tmp_path / "out", ["a4"], 5, variant="ralston")
    assert (heun.name, heun.total, ralston.total) == ("heun", 5, 6)
    assert heun.verdicts[2].layer == "values"
    assert samplers.heun.__code__.co_filename == samplers.__file__
