"""Makes the folder that students get: minipic with the functions to write left out, checks and
handouts."""

import ast
import inspect
import shutil
from pathlib import Path
from types import ModuleType

from coursework.checks import SEED, BreakIt, Exercise, Task, load_assignment, save_answers
from coursework.reference import expected_answers, fill_ins, is_fill_in, known_mistakes, replaced
from coursework.source import ROOT, blank, find, name_of, path_of
from minipic.common import InputError, ParameterError
from minipic.figures import image_grid
from minipic.image import to_pictures

HERE = Path(__file__).parent
NOT_FOR_STUDENTS = "# ==== the instructor's part"
TOOLS = ("source.py", "checks.py")  # of the coursework that students need
STUDENT_README = """\
# minipic: assignments

Functions of this copy of minipic are left out, and yours to write. `handouts/` says what each
should do.

    python -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt
    python check.py
    python check.py a4.2 --show

The functions to write raise NotImplementedError; fill them in where they are. What is not a
function of minipic goes to `answers/`. Hand in this folder, or a zip file of it. Only the files
that you are asked to change are read, and all checks are run again, with other random inputs.
"""


def release(
    out: Path,
    names: list[str],
    variant: str | None = None,
    seed: int = SEED,
    with_expected: bool = True,
):
    """Write a student's folder with these assignments, such as ["a4"].

    variant: of the assignments that have one by this name.
    with_expected: the expected answers and the handouts too, which grading does not need.
    Raises InputError for a folder that holds something already, and for a variant that no
    assignment has.
    """
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; choose a new folder")
    assignments = {name: load_assignment(name) for name in names}
    variants = [variant for assignment in assignments.values() for variant in assignment.VARIANTS]
    if variant is not None and variant not in variants:
        raise ParameterError(
            "variant", f"{variant!r} is unknown; these assignments have {variants or 'none'}"
        )
    for path in needed_files(names):
        copy(ROOT / path, out / path)
    for path in (ROOT / "weights" / "tiny").rglob("*"):
        if path.is_file() and "judge" not in path.parts:
            copy(path, out / path.relative_to(ROOT))
    for name in ("requirements.txt", "LICENSE"):
        copy(ROOT / name, out / name)
    with (out / "requirements.txt").open("a", encoding="utf-8") as file:
        for assignment in assignments.values():
            file.writelines(f"{package}\n" for package in getattr(assignment, "PACKAGES", ()))
    copy(HERE / "check.py", out / "check.py")
    for name in TOOLS:
        copy(HERE / name, out / "coursework" / name)
    (out / "README.md").write_text(STUDENT_README, encoding="utf-8")
    for name, assignment in assignments.items():
        text = (HERE / f"{name}.py").read_text(encoding="utf-8")
        (out / "coursework" / f"{name}.py").write_text(
            text.partition(NOT_FOR_STUDENTS)[0], encoding="utf-8"
        )
        for task in fill_ins(assignment):
            path = out / path_of(task.target)
            text = path.read_text(encoding="utf-8")
            path.write_text(blank(text, name_of(task.target), task.number), encoding="utf-8")
        write_answers_file(out / "answers" / f"{name}.py", name, assignment)
        if with_expected:
            with replaced(assignment, variant):
                write_expected(out, name, assignment, variant, seed)


def copy(source: Path, target: Path):
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def needed_files(names: list[str]) -> list[str]:
    """The files of minipic that the assignments import, and what those import."""
    waiting = [HERE / name for name in (*TOOLS, "check.py")] + [
        HERE / f"{name}.py" for name in names
    ]
    found = {"minipic/__init__.py"}
    while waiting:
        for node in ast.walk(ast.parse(waiting.pop().read_text(encoding="utf-8"))):
            for path in imported_files(node):
                if path not in found:
                    found.add(path)
                    waiting.append(ROOT / path)
    return sorted(found)


def imported_files(node: ast.AST) -> list[str]:
    """The files of minipic that an import statement may read."""
    modules = []
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        modules = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
    found = []
    for module in modules:
        parts = module.split(".")
        if parts[0] != "minipic":
            continue
        for i in range(1, len(parts) + 1):
            folder = "/".join(parts[:i])
            found += [
                path
                for path in (f"{folder}.py", f"{folder}/__init__.py")
                if (ROOT / path).is_file()
            ]
    return found


def write_answers_file(path: Path, name: str, assignment: ModuleType):
    """The file for answers that are not functions of minipic."""
    parts = [f'"""{name.upper()}: your answers."""\n\nimport torch\n']
    for task in assignment.TASKS:
        if is_fill_in(task):
            continue
        answer = name_of(task.target)
        if isinstance(task, (Exercise, BreakIt)):
            stub = task.stub.strip("\n")
            message = f"{task.number}: {answer} is yours to write"
            parts.append(f'\n\n{stub}\n    raise NotImplementedError("{message}")\n')
        else:
            parts.append(f"\n{answer} = None  # {task.number}: your prediction, a number\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(parts), encoding="utf-8")


def write_expected(out: Path, name: str, assignment: ModuleType, variant: str | None, seed: int):
    expected = expected_answers(assignment, seed)
    known = {task.number: known_mistakes(assignment, task, seed) for task in fill_ins(assignment)}
    folder = out / "coursework" / "expected"
    folder.mkdir(parents=True, exist_ok=True)
    save_answers(expected, folder / f"{name}.safetensors", known)
    handouts = out / "handouts"
    handouts.mkdir(exist_ok=True)
    pictures = [
        answer for answers in expected.values() for answer in answers if answer.layer == "picture"
    ]
    if pictures:
        figure = image_grid(
            [
                picture
                for answer in pictures
                for picture in to_pictures(2 * answer.outputs["picture"][None] - 1)
            ],
            [answer.name for answer in pictures],
        )
        figure.save(handouts / f"{name}.png")
    text = handout(name, assignment, variant, bool(pictures))
    (handouts / f"{name}.md").write_text(text, encoding="utf-8")


def handout(name: str, assignment: ModuleType, variant: str | None, has_figure: bool) -> str:
    """The assignment as Markdown: its introduction, and each task with what its docstring says."""
    minutes = sum(task.minutes for task in assignment.TASKS)
    parts = [
        inspect.cleandoc(assignment.__doc__),
        f"About {minutes} minutes. Check with `python check.py {name}`, "
        "which takes less than a minute.",
    ]
    if variant and variant in assignment.VARIANTS:
        parts.append(f"**This time**: {assignment.VARIANTS[variant]['text']}")
    if has_figure:
        parts.append(
            f"![What the tiny model draws when all is right]({name}.png)\n\n"
            "What the tiny model draws with the functions of this assignment, when all is right."
        )
    for task in assignment.TASKS:
        parts.append(
            f"## {task.number} `{name_of(task.target)}` · {task.minutes} minutes\n\n{task.text}"
        )
        parts.append(f"```python\n# {path_of(task.target)}\n{signature(task)}\n```")
        for hint in getattr(task, "hints", ()):
            parts.append(f"<details><summary>A hint</summary>\n\n{hint}\n\n</details>")
    return "\n\n".join(parts) + "\n"


def signature(task: Task) -> str:
    """The first lines and the docstring of the function to write."""
    if isinstance(task, (Exercise, BreakIt)) and task.stub:
        return task.stub.strip("\n")
    if not isinstance(task, Exercise):
        return f"{name_of(task.target)} = None"
    text = (ROOT / path_of(task.target)).read_text(encoding="utf-8")
    function = find(text, name_of(task.target))
    last = function.body[0]
    end = last.end_lineno if ast.get_docstring(function) is not None else last.lineno - 1
    return inspect.cleandoc("\n" + "\n".join(text.splitlines()[function.lineno - 1 : end]))
