"""Functions of minipic as text: cut out, put back, changed in one place, and run in place of the
original.

A function is named by its target, such as "minipic.layers.lora:LoRA.delta". Its file stays as it
is; all work is on the text of the file and on its syntax tree.
"""

import ast
import copy
import importlib
import inspect
import linecache
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FunctionType
from typing import NamedTuple

ROOT = Path(__file__).parents[1]  # of a student's folder
if not (ROOT / "minipic").is_dir():
    ROOT = Path(__file__).parents[2]  # of the repository


class Mutant(NamedTuple):
    """A function with one mistake."""

    change: (
        str  # what was changed, as code: "a + b -> a - b"; of its second place "a + b -> a - b #2"
    )
    hint: str  # what the mistake is, without the code
    text: str  # of the whole file


# ---- where a function is -------------------------------------------------------------------------


def path_of(target: str) -> str:
    """The file of a target: "minipic.layers.lora:LoRA.delta" -> "minipic/layers/lora.py"."""
    module, _ = target.split(":")
    return module.replace(".", "/") + ".py"


def name_of(target: str) -> str:
    """The name of a target in its file: "LoRA.delta"."""
    return target.split(":")[1]


VARIANT_TEXTS = (
    {}
)  # {path: text} of files that differ while a variant of an assignment is the reference


def text_of(target: str) -> str:
    """The text of the file of a target."""
    if path_of(target) in VARIANT_TEXTS:
        return VARIANT_TEXTS[path_of(target)]
    return (ROOT / path_of(target)).read_text(encoding="utf-8")


def find(text: str, name: str) -> ast.FunctionDef:
    """The syntax tree of a function or method. Raises ValueError where there is none, or
    several."""
    nodes = [ast.parse(text)]
    for part in name.split("."):
        nodes = [
            child
            for node in nodes
            for child in node.body
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and child.name == part
        ]
    if len(nodes) != 1:
        raise ValueError(f"{len(nodes)} functions are called {name!r}")
    return nodes[0]


def has_docstring(function: ast.FunctionDef) -> bool:
    return ast.get_docstring(function) is not None


def body_lines(text: str, name: str) -> slice:
    """Which lines are the body: all after the docstring, or after the signature if there is
    none."""
    function = find(text, name)
    statements = function.body[has_docstring(function) :]
    if not statements or statements[0].lineno == function.lineno:
        raise ValueError(f"{name} has no body of its own lines")
    lines = text.splitlines()
    first = statements[0].lineno - 1
    while lines[first - 1].strip() == "" or lines[first - 1].strip().startswith("#"):
        first -= 1  # a comment above the first statement tells what it does
    return slice(first, statements[-1].end_lineno)


def body_of(text: str, name: str) -> str:
    """The body of a function, as it stands in the file."""
    return "".join(text.splitlines(keepends=True)[body_lines(text, name)])


def fill(text: str, name: str, body: str) -> str:
    """The text with another body for a function."""
    lines = text.splitlines(keepends=True)
    lines[body_lines(text, name)] = [body]
    return "".join(lines)


def fill_in(text: str, name: str, body: str) -> str:
    """`fill` with a body that is indented in any way."""
    indent = " " * (find(text, name).col_offset + 4)
    return fill(text, name, textwrap.indent(textwrap.dedent(body).strip("\n"), indent) + "\n")


def blank(text: str, name: str, number: str) -> str:
    """The text with a body that only raises NotImplementedError. `fill` with the old one undoes
    it."""
    return fill_in(text, name, f'raise NotImplementedError("{number}: {name} is yours to write")')


def replace_once(text: str, name: str, old: str, new: str) -> str:
    """The text with `old` replaced in a function's body, where it must be exactly once."""
    body = body_of(text, name)
    if body.count(old) != 1:
        raise ValueError(f"{old!r} is {body.count(old)} times in {name}, and should be once")
    return fill(text, name, body.replace(old, new))


# ---- mistakes ------------------------------------------------------------------------------------

OTHER_OPERATOR = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
}
OTHER_COMPARISON = {
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ORDER_COUNTS = (ast.Sub, ast.Div, ast.MatMult, ast.Pow)
OPTIONAL_CALLS = ("sqrt", "exp", "log", "clamp", "float", "abs")
MODULES = ("torch", "math", "F", "tl")
NOT_CHANGED = (ast.JoinedStr, ast.Raise)  # messages


def mistakes(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """What can be put in the place of a node, and the hint that tells it."""
    if isinstance(node, (ast.BinOp, ast.AugAssign)):
        other = copy.copy(node)
        other.op = OTHER_OPERATOR[type(node.op)]()
        yield other, "an operator is the wrong one: look at every + - * / @ **"
    if isinstance(node, ast.BinOp):
        yield node.left, "a term or a factor is left out"
        if isinstance(node.op, ORDER_COUNTS):
            yield ast.BinOp(node.right, node.op, node.left), "two operands are in the wrong order"
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node.operand, "a minus sign is left out"
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value), "a True should be a False, or the other way round"
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield ast.Constant(node.value + 1), "a number is too large by 1"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in OPTIONAL_CALLS:
            of_module = ast.unparse(node.func.value) in MODULES
            inside = node.args[0] if of_module else node.func.value
            yield inside, f"a call of {node.func.attr} is left out"
    if isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body), "the two cases of an if are swapped"
    if isinstance(node, ast.If) and not isinstance(node.test, ast.Compare):
        other = copy.copy(node)
        other.test = ast.UnaryOp(ast.Not(), node.test)
        yield other, "the two cases of an if are swapped"
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield ast.Compare(node.left, [OTHER_COMPARISON[type(node.ops[0])]()], node.comparators), (
            "a comparison is the wrong way round"
        )
    if isinstance(node, ast.BoolOp):
        other_op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield ast.BoolOp(
            other_op, node.values
        ), "an `and` should be an `or`, or the other way round"


def places(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Every node below a node, and where it stands: (parent, field, index in a list, node)."""
    for field, value in ast.iter_fields(node):
        children = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, child in children:
            if isinstance(child, ast.AST) and not isinstance(child, NOT_CHANGED):
                yield node, field, index, child
                yield from places(child)


def put(parent: ast.AST, field: str, index: int | None, node: ast.AST):
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def mutants(text: str, name: str) -> list[Mutant]:
    """Every mistake in the body of a function, one at a time."""
    function = find(text, name)
    body = ast.Module(function.body[has_docstring(function) :], [])
    found = []
    for parent, field, index, node in list(places(body)):
        for other, hint in mistakes(node):
            put(parent, field, index, other)
            changed = fill_in(text, name, ast.unparse(body))
            put(parent, field, index, node)
            change = f"{first_line(node)} -> {first_line(other)}"
            times = sum(mutant.change.partition(" #")[0] == change for mutant in found)
            if times:
                change += f" #{times + 1}"  # the same, elsewhere in the body
            found.append(Mutant(change, hint, changed))
    return found


def first_line(node: ast.AST) -> str:
    return ast.unparse(ast.fix_missing_locations(node)).splitlines()[0]


# ---- running another body ------------------------------------------------------------------------


def resolve(target: str) -> object:
    """The function of a target, or the number if the target is one."""
    module, name = target.split(":")
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def plain(function: object) -> FunctionType:
    """The Python function inside a decorated one."""
    function = inspect.unwrap(function)
    return getattr(function, "fn", function)  # a kernel of Triton holds it as `fn`


def code_of(code: CodeType, names: list[str]) -> CodeType:
    """The code of a function inside that of a module or class."""
    for name in names:
        code = [
            part for part in code.co_consts if isinstance(part, CodeType) and part.co_name == name
        ][-1]
    return code


@contextmanager
def installed(target: str, text: str):
    """Inside, the function has the body that it has in `text`, whoever holds a reference to it.

    text: of the whole file.
    """
    function = plain(resolve(target))
    name = name_of(target)
    filename = f"<{target} {hash(text)}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    code = code_of(compile(text, filename, "exec"), name.split("."))
    before = function.__code__
    forget_rewritten(function)
    if code.co_freevars == before.co_freevars:
        function.__code__ = code
    else:  # only one of them calls super(): a method, which is looked up in its class
        owner = resolve(target.rpartition(".")[0])
        setattr(
            owner,
            code.co_name,
            FunctionType(code, function.__globals__, code.co_name, function.__defaults__),
        )
    try:
        yield
    finally:
        if function.__code__ is code:
            function.__code__ = before
        else:
            setattr(owner, code.co_name, function)
        forget_rewritten(function)
        linecache.cache.pop(filename, None)


def forget_rewritten(function: FunctionType):
    """Triton's interpreter keeps a rewritten copy of each kernel: let it make a new one."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is not None:
        interpreter.InterpretedFunction.rewritten_fn.pop(function, None)
