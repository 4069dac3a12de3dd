"""What an exercise is, how its checks run, and how their results are judged.

The checks of an exercise are layers, the cheapest first:
    contract    it runs, and its results have the right number, shape and type; inputs stay as they
    are values      results on random inputs are those of the reference
    identities  what must hold whatever the inputs are
    picture     the tiny model draws the expected picture with it
    cost        what it takes, as a ratio to a plain version on the same computer

`run` makes answers: tensors, without any judgement. `judge` compares them with the answers of the
reference. So a submission can be run in one process and judged in another, which it cannot reach.
"""

import functools
import importlib
import json
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType

import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from coursework.source import ROOT, fill_in, installed, mutants, resolve, text_of
from minipic.common import InputError
from minipic.image import to_tensor

LAYERS = ("contract", "values", "identities", "picture", "cost")
SEED = 1  # of the inputs that students see; grading takes another


# ---- what an assignment consists of --------------------------------------------------------------


class Random:
    """Random inputs of an exercise, which depend on the seed alone."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Whole numbers from 0 to high - 1."""
        return torch.randint(high, shape, generator=self.generator)

    def fill(self, module: nn.Module) -> nn.Module:
        """Give every parameter of a module random numbers, small enough for its outputs to be about
        1."""
        for parameter in module.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.data = scale * self.normal(*parameter.shape)
        return module.eval()


class Case:
    """One call whose results are compared with those of the reference."""

    def __init__(self, name: str, call: Callable, *arguments: object):
        self.name = name
        self.call = call
        self.arguments = arguments


@dataclass(frozen=True)
class Exercise:
    """A function to write.

    number: such as "A4.1".
    target: the function, see source.py; of minipic, or of answers/a4.py where its answer is not in
    the
        repository.
    minutes: how long it should take.
    text: what to do, in Markdown.
    cases(random): yields Cases.
    identities(random): yields (sentence, got, expected), or the same with an allowed difference.
    picture(): returns a picture [3,H,W] in [0,1]; its caption is the function's docstring.
    cost(): yields (what is counted, used by this function, used by a plain one, largest ratio).
    hints: shown on demand in the handout.
    stub: signature and docstring of a function of answers/a4.py.
    """

    number: str
    target: str
    minutes: int
    text: str
    cases: Callable = lambda random: ()
    identities: Callable = lambda random: ()
    picture: Callable | None = None
    cost: Callable = lambda: ()
    hints: tuple[str, ...] = ()
    stub: str = ""

    def answers(self, seed: int) -> Iterator["Answer"]:
        resolve(self.target)
        for case in self.cases(Random(seed)):
            yield answer_case(case)
        for sentence, got, expected, *allowed in self.identities(Random(seed)):
            outputs = {"got": as_tensor(got), "expected": as_tensor(expected)}
            tolerance = {"got": float(allowed[0])} if allowed else {}
            yield Answer("identities", sentence, outputs, tolerance=tolerance)
        if self.picture is not None:
            yield Answer("picture", self.picture.__doc__, {"picture": self.picture()})
        for sentence, used, plain, limit in self.cost():
            outputs = {
                "used": as_tensor(used),
                "plain": as_tensor(plain),
                "limit": as_tensor(limit),
            }
            yield Answer("cost", sentence, outputs)


@dataclass(frozen=True)
class Prediction:
    """A number to predict before it is computed: `name` in answers/a4.py.

    truth(): computes it. within: how far off it may be, as a share of it.
    """

    number: str
    target: str
    minutes: int
    text: str
    truth: Callable
    within: float

    def answers(self, seed: int) -> Iterator["Answer"]:
        value = resolve(self.target)
        if not isinstance(value, (int, float)):
            raise NotImplementedError(f"{self.number}: write your prediction, a number")
        yield Answer("values", "the prediction", {"result": as_tensor(float(value))})


@dataclass(frozen=True)
class BreakIt:
    """A check to write that accepts right versions of a function and fails for wrong ones.

    target: the check in answers/a4.py; it takes the function, and fails by returning False or by
    any error.
    subject: the function, whose source students have.
    alternates: other right bodies of it.
    equivalent: {change: why it is no mistake}.
    """

    number: str
    target: str
    minutes: int
    text: str
    subject: str
    stub: str
    alternates: tuple[str, ...] = ()
    equivalent: dict[str, str] = field(default_factory=dict)

    def wrong_versions(self) -> list:
        _, name = self.subject.split(":")
        found = mutants(text_of(self.subject), name)
        return [mutant for mutant in found if mutant.change not in self.equivalent]

    def answers(self, seed: int) -> Iterator["Answer"]:
        check = resolve(self.target)
        subject = resolve(self.subject)
        text = text_of(self.subject)
        _, name = self.subject.split(":")
        check(subject)  # an error here is shown as it is
        accepts = [accepted(check, subject)]
        for body in self.alternates:
            with installed(self.subject, fill_in(text, name, body)):
                accepts.append(accepted(check, subject))
        kills = []
        for mutant in self.wrong_versions():
            with installed(self.subject, mutant.text):
                kills.append(not accepted(check, subject))
        yield Answer(
            "values", "the check", {"accepts": torch.tensor(accepts), "kills": torch.tensor(kills)}
        )


def accepted(check: Callable, function: Callable) -> bool:
    try:
        return check(function) is not False
    except Exception as error:  # a wrong function may fail in any way
        return isinstance(error, NotImplementedError)


Task = Exercise | Prediction | BreakIt


def only_values(task: Task, identities: bool = False) -> Task:
    """The exercise without the layers after its values, or after its identities; other tasks as
    they are."""
    if not isinstance(task, Exercise):
        return task
    if identities:
        return replace(task, picture=None, cost=no_checks)
    return replace(task, identities=no_checks, picture=None, cost=no_checks)


def no_checks(*given: object) -> tuple:
    return ()


def load_assignment(name: str) -> ModuleType:
    """The file of an assignment, such as "a4". Raises InputError for a package that it needs and
    that is missing."""
    try:
        return importlib.import_module(f"coursework.{name}")
    except ModuleNotFoundError as error:
        if error.name != "triton":  # which not everybody has
            raise
        raise InputError(
            f"{name} needs the package {error.name}; install it, or leave {name} out"
        ) from None


def assignment_names() -> list[str]:
    """The assignments whose files are here."""
    return sorted(path.stem for path in Path(__file__).parent.glob("a[0-9]*.py"))


@functools.cache
def tiny() -> object:
    """The tiny model."""
    from minipic.pipeline import Pipeline

    return Pipeline.load("weights/tiny")


def draw(prompt: str, **settings: object) -> Tensor:
    """What the tiny model draws, [3,H,W] in [0,1]. settings: of Pipeline.generate."""
    (picture,) = tiny().generate(prompt, progress=False, **settings)
    return (to_tensor(picture) + 1) / 2


# ---- answers -------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What one check of an exercise gave.

    outputs: its results, by names such as "result[0]".
    error: what was raised instead.
    changed: which arguments were changed by the call.
    size: how many numbers its inputs have.
    tolerance: {output: allowed difference}; the reference's answers have it.
    """

    layer: str
    name: str
    outputs: dict[str, Tensor] = field(default_factory=dict)
    error: str | None = None
    changed: list[int] = field(default_factory=list)
    size: int = 0
    tolerance: dict[str, float] = field(default_factory=dict)


def run(task: Task, seed: int) -> list[Answer]:
    """All answers of a task, up to the first error."""
    torch.manual_seed(seed)
    found = []
    try:
        with torch.no_grad() if isinstance(task, Exercise) else nullcontext():
            for answer in task.answers(seed):
                found.append(answer)
                if answer.error is not None:
                    break
    except (Exception, SystemExit) as error:
        layer = found[-1].layer if found else "contract"
        found.append(Answer(layer, "", error=describe(error)))
    return found


def answer_case(case: Case) -> Answer:
    """Call a function, and see whether it leaves its arguments alone."""
    before = [tensors(argument) for argument in case.arguments]
    before = [{name: tensor.clone() for name, tensor in found.items()} for found in before]
    answer = Answer(
        "values", case.name, size=sum(t.numel() for found in before for t in found.values())
    )
    try:
        answer.outputs = tensors(case.call(*case.arguments), "result")
    except (Exception, SystemExit) as error:
        answer.error = describe(error)
        return answer
    for i, argument in enumerate(case.arguments):
        after = tensors(argument)
        if any(not torch.equal(after[name], tensor) for name, tensor in before[i].items()):
            answer.changed.append(i)
    return answer


def describe(error: BaseException) -> str:
    """An error and the lines of the student's files that it went through."""
    while error.__cause__ is not None:  # Triton's interpreter wraps what is raised in a kernel
        error = error.__cause__
    frames = []
    for frame in traceback.extract_tb(error.__traceback__):
        if "minipic" in frame.filename or "answers" in frame.filename:
            name = frame.filename.removeprefix(str(ROOT)).lstrip("/\\")
            frames.append(f"\n    {name}, line {frame.lineno}, in {frame.name}: {frame.line}")
    return f"{type(error).__name__}: {error}" + "".join(frames[-3:])


def tensors(value: object, name: str = "") -> dict[str, Tensor]:
    """Everything in a result, as tensors by name. A generator is read to its end.

    A text becomes its bytes. What has no numbers, such as a function, is left out.
    """
    if isinstance(value, (Tensor, str, bool, int, float)) or value is None:
        return {name: as_tensor(value)}
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (tuple, list, Iterator)):
        items = enumerate(value)
    else:
        return {}
    found = {}
    for key, part in items:
        found |= tensors(part, f"{name}[{key!r}]")
    return found


def as_tensor(value: object) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().clone()  # the caller may go on to change it
    if isinstance(value, str):
        return torch.tensor(list(value.encode()), dtype=torch.uint8)
    if value is None:
        return torch.zeros(0, dtype=torch.bool)
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)


def save_answers(answers: dict[str, list[Answer]], path: Path, known: dict | None = None):
    """Write {number of a task: its answers} and the known mistakes to one safetensors file."""
    outputs = {}
    about = {}
    for number, found in answers.items():
        about[number] = []
        for i, answer in enumerate(found):
            for name, tensor in answer.outputs.items():
                outputs[f"{number}/{i}/{name}"] = tensor.contiguous()
            about[number].append(asdict(answer) | {"outputs": list(answer.outputs)})
    save_file(outputs, path, {"answers": json.dumps(about), "known": json.dumps(known or {})})


def load_answers(path: Path) -> tuple[dict[str, list[Answer]], dict]:
    """What `save_answers` wrote."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["answers"])
        known = json.loads(file.metadata()["known"])
        answers = {}
        for number, found in about.items():
            answers[number] = []
            for i, fields in enumerate(found):
                names = fields.pop("outputs")
                outputs = {name: file.get_tensor(f"{number}/{i}/{name}") for name in names}
                answers[number].append(Answer(outputs=outputs, **fields))
    return answers, known


# ---- judging -------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """Whether a task is solved, and if not, which layer says so and why."""

    number: str
    layer: str | None = None  # that failed; None: solved
    message: str = ""
    hint: str = ""  # of the known mistake that gives the same results
    score: float = 0.0  # 0 to 1
    waits_for: str = ""  # the task whose function is needed first

    @property
    def passed(self) -> bool:
        return self.layer is None


def judge(task: Task, answers: list[Answer], expected: list[Answer], known: list = ()) -> Verdict:
    """Compare answers with those of the reference, layer by layer."""
    if isinstance(task, BreakIt):
        return judge_break_it(task, answers)
    faults = []  # (layer, how large the inputs are, message)
    for i, right in enumerate(expected):
        if i >= len(answers):
            faults.append((right.layer, 0, f"{right.name}: no result"))
            break
        layer, message = compare(answers[i], right)
        if message:
            faults.append((layer, answers[i].size, message))
    faults.sort(key=lambda fault: (LAYERS.index(fault[0]), fault[1]))
    if not faults:
        return Verdict(task.number, score=1.0)
    layer, _, message = faults[0]
    verdict = Verdict(task.number, layer, message)
    if layer in ("contract", "values"):
        verdict.hint = diagnose(answers, known)
    verdict.waits_for = needed_task(task, message)
    return verdict


def needed_task(task: Task, message: str) -> str:
    """The other task whose function an error asks for, or nothing."""
    number = message.partition("NotImplementedError: ")[2].partition(":")[0]
    return "" if number == task.number else number


def judge_all(
    tasks: list[Task],
    answers: dict[str, list[Answer]],
    expected: dict[str, list[Answer]],
    known: dict[str, list],
) -> list[Verdict]:
    """The verdicts on the tasks of an assignment.

    A picture needs all functions of an assignment. It does not count while another of them is
    wrong.
    """
    verdicts = []
    for task in tasks:
        right = expected.get(task.number, [])
        verdicts.append(judge(task, answers[task.number], right, known.get(task.number, ())))
    wrong = []
    for task, verdict in zip(tasks, verdicts):
        if task.target.startswith("minipic") and verdict.layer in LAYERS[:3]:
            wrong.append(verdict.number)
    for verdict in verdicts:
        if verdict.layer == "picture" and wrong:
            verdict.waits_for = wrong[0]
            verdict.score = 1.0
    return verdicts


def judge_break_it(task: BreakIt, answers: list[Answer]) -> Verdict:
    answer = answers[0]
    wrong = task.wrong_versions()
    if answer.error is not None:
        return Verdict(
            task.number, "contract", answer.error, waits_for=needed_task(task, answer.error)
        )
    if answer.outputs["kills"].shape != (len(wrong),) or not answer.outputs["accepts"].all():
        return Verdict(task.number, "values", "the check fails for a right version of the function")
    kills = answer.outputs["kills"].tolist()
    missed = [mutant.change for mutant, killed in zip(wrong, kills) if not killed]
    score = 1 - len(missed) / len(wrong)
    if not missed:
        return Verdict(task.number, score=score)
    message = (
        f"{len(wrong) - len(missed)} of {len(wrong)} wrong versions fail; not this one: {missed[0]}"
    )
    return Verdict(task.number, "values", message, score=score)


def compare(answer: Answer, right: Answer) -> tuple[str, str]:
    """(the layer that fails, why); the message is empty if none does."""
    name = f"{right.name}: " if right.name else ""
    if answer.error is not None:
        return "contract" if right.layer == "values" else right.layer, name + answer.error
    if (answer.layer, answer.name) != (right.layer, right.name):
        return "contract", f"{name}no result"
    if right.layer == "identities":
        got = answer.outputs["got"]
        wanted = answer.outputs["expected"]
        if got.shape != wanted.shape:
            return "identities", f"{name}shapes {tuple(got.shape)} and {tuple(wanted.shape)}"
        return "identities", difference(name, "the result", got, wanted, right.tolerance["got"])
    if right.layer == "cost":
        used, plain, limit = (answer.outputs[key].item() for key in ("used", "plain", "limit"))
        if used <= limit * plain:
            return "cost", ""
        return "cost", f"{name}{used:.4g} are used, {limit:g} times {plain:.4g} are allowed"
    message = contract(answer, right)
    if message:
        return "contract", name + message
    for key, wanted in right.outputs.items():
        message = difference(name, key, answer.outputs[key], wanted, right.tolerance[key])
        if message:
            return right.layer, message
    return right.layer, ""


def contract(answer: Answer, right: Answer) -> str:
    """Why the form of the results is wrong, or nothing."""
    if answer.changed and not right.changed:
        return f"argument {answer.changed[0] + 1} is changed by the call; work on a copy"
    if list(answer.outputs) != list(right.outputs):
        return f"expected {list_names(right.outputs)}, got {list_names(answer.outputs)}"
    for key, wanted in right.outputs.items():
        got = answer.outputs[key]
        if got.dtype != wanted.dtype:
            return f"{key} is {got.dtype}, expected {wanted.dtype}"
        if got.dtype != torch.uint8 and got.shape != wanted.shape:
            return f"{key} has shape {tuple(got.shape)}, expected {tuple(wanted.shape)}"
        if got.is_floating_point() and not got.isfinite().all() and wanted.isfinite().all():
            return f"{key} has NaN or infinity in it"
    return ""


def list_names(outputs: Iterable[str]) -> str:
    names = list(outputs)
    return (
        ", ".join(names[:4]) + (f", ... ({len(names)} results)" if len(names) > 4 else "")
        or "nothing"
    )


def difference(name: str, key: str, got: Tensor, wanted: Tensor, tolerance: float) -> str:
    """Where two tensors of one shape differ most, if by more than the tolerance."""
    if got.dtype == torch.uint8:  # a text
        if torch.equal(got, wanted):
            return ""
        text = bytes(got.tolist()).decode(errors="replace")
        return f"{name}{key} is {text!r}, expected {bytes(wanted.tolist()).decode()!r}"
    if got.numel() == 0:
        return ""
    off = (got.double() - wanted.double()).abs()
    off = off.masked_fill((got == wanted) | (got.isnan() & wanted.isnan()), 0).nan_to_num(torch.inf)
    if off.max() <= tolerance:
        return ""
    index = torch.unravel_index(off.argmax(), off.shape)
    place = f"[{', '.join(str(int(i)) for i in index)}]" if off.ndim else ""
    return (
        f"{name}{key}{place} is {got[index].item():.6g}, expected {wanted[index].item():.6g} "
        f"(allowed difference {tolerance:.2g})"
    )


# ---- known mistakes ------------------------------------------------------------------------------


def fingerprint(answers: list[Answer]) -> list[list[float] | None]:
    """Two numbers and a size for each case, which tell results apart; None for an error."""
    prints = []
    for answer in answers:
        if answer.layer != "values":
            continue
        if answer.error is not None:
            prints.append(None)
            break
        numbers = torch.cat(
            [torch.zeros(1), *(t.double().flatten() for t in answer.outputs.values())]
        )
        numbers = numbers.nan_to_num(nan=17.0, posinf=19.0, neginf=-23.0)
        waves = torch.arange(len(numbers)).double()
        first = (numbers * waves.cos()).sum().item()
        second = (numbers * (waves * 1.7).sin()).sum().item()
        prints.append([first, second, numbers.norm().item()])
    return prints


def diagnose(answers: list[Answer], known: list[tuple[str, list]]) -> str:
    """The hint of the known mistake whose results are the same in every case, or nothing."""
    mine = fingerprint(answers)
    if mine[:1] == [None]:  # there is nothing to tell mistakes apart
        return ""
    for hint, prints in known:
        if len(prints) == len(mine) and all(map(same_print, mine, prints)):
            return hint
    return ""


def same_print(a: list[float] | None, b: list[float] | None) -> bool:
    if a is None or b is None:
        return a is b
    allowed = 1e-5 * (1 + b[2])
    return all(abs(x - y) <= allowed for x, y in zip(a, b))
