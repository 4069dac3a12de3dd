"""The house rules, read from the source: which room may import which, what nobody may write, and how long it may be."""

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import readme  # noqa: E402

FLOORS = [  # a room imports only from floors below its own, and from itself
    ["common", "keys"],
    ["layers", "diffusion", "image", "weights"],
    ["models", "world", "text", "embedding", "checkpoint", "cache"],
    ["layouts"],
    ["adapters"],
    ["pipeline", "training", "data", "folder"],
    ["methods"],
]
TRITON = ["minipic/layers/kernels.py", "minipic/layers/fused.py"]
PACKAGES = {"torch", "numpy", "PIL", "safetensors", "tokenizers", "tqdm", "minipic"}
WIDTH, FILE_LINES, FUNCTION_LINES, PACKAGE_LINES = 120, 350, 60, 8455

PACKAGE = readme.package()
SOURCES = PACKAGE + sorted(f.relative_to(ROOT).as_posix() for folder in ("weights", "tutorials")
                           for f in (ROOT / folder).glob("**/*.py"))


@cache
def tree(path):
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), path)


def imports(path, nodes):
    """Every module that is imported, at the top or inside a function, by its full name, with the line."""
    for node in ast.walk(nodes):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = Path(path).parts[:-node.level] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "minipic" else [module]
            yield from ((name, node.lineno) for name in names)


def room(path):
    return Path(path).relative_to("minipic").parts[0].removesuffix(".py")


def upward(path, nodes):
    """The imports of a file of the package that the floors forbid."""
    floor = {name: height for height, names in enumerate(FLOORS) for name in names}
    for name, line in imports(path, nodes):
        if name.startswith("minipic."):
            other = name.split(".")[1]
            if other != room(path) and floor[other] >= floor[room(path)]:
                yield f"{path}:{line} imports {name}, which is not on a floor below"


def passes_over(handler):
    """Whether an `except` catches everything and does nothing."""
    broad = handler.type is None or ast.unparse(handler.type) in ("Exception", "BaseException")
    return broad and all(isinstance(node, (ast.Pass, ast.Continue)) for node in handler.body)


def texts(nodes):
    """(text, line) of every string; of an f-string only what it starts with, for the rest follows a value."""
    inner = {id(part) for node in ast.walk(nodes) if isinstance(node, ast.JoinedStr) for part in node.values[1:]}
    for node in ast.walk(nodes):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield node.value, node.lineno


def banned(path, nodes):
    """What no file of the project may hold."""
    for name, line in imports(path, nodes):
        top = name.split(".")[0]
        own = {"triton"} if path in TRITON else set()  # comes with PyTorch for CUDA
        if top == "pickle" or top not in PACKAGES | own | sys.stdlib_module_names:
            yield f"{path}:{line} imports {name}"
    for node in ast.walk(nodes):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
            yield f"{where} uses {ast.unparse(node)}: files are safetensors and JSON"
        elif isinstance(node, ast.keyword) and node.arg == "strict" and not getattr(node.value, "value", True):
            yield f"{where} loads with strict=False, which hides missing weights"
        elif isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            yield f"{where} imports *"
        elif isinstance(node, ast.ExceptHandler) and (node.type is None or passes_over(node)):
            yield f"{where} catches every error"
    for text, line in texts(nodes):
        if re.search(r"(?:^|[\s'\"(])/(?!dev/|proc/|sys/|etc/)[a-z]+/", text):
            yield f"{path}:{line} holds an absolute path"


def too_long(path, nodes):
    if readme.count(path) > FILE_LINES:
        yield f"{path}: {readme.count(path)} lines"
    for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1):
        if len(line) > WIDTH:
            yield f"{path}:{number} has {len(line)} characters"
    for node in ast.walk(nodes):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if node.end_lineno - node.lineno + 1 > FUNCTION_LINES:
                yield f"{path}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"


def test_every_room_has_one_floor():
    rooms = {room(path) for path in PACKAGE if path.startswith("minipic/")} - {"__init__"}
    names = sum(FLOORS, [])
    assert rooms <= set(names) and len(names) == len(set(names))


def test_rooms_import_from_floors_below():
    assert [fault for path in PACKAGE if path.startswith("minipic/") for fault in upward(path, tree(path))] == []


def test_nothing_banned_is_written():
    assert [fault for path in SOURCES for fault in banned(path, tree(path))] == []


def test_files_and_functions_are_short():
    assert [fault for path in SOURCES for fault in too_long(path, tree(path))] == []


def test_package_is_short():
    assert sum(map(readme.count, PACKAGE)) <= PACKAGE_LINES


def test_readme_map_is_up_to_date():
    path = ROOT / "README.md"
    if not path.exists():
        pytest.skip("there is no README.md yet")
    text = path.read_text(encoding="utf-8")
    assert readme.rewrite(text) == text, "run python tests/benchmarks/readme.py"


@pytest.mark.parametrize("code, fault", [
    ("from minipic.methods.vae import build", "floor below"), ("from minipic import pipeline", "floor below"),
    ("def f():\n    import minipic.layouts", "floor below"), ("import minipic.text", "floor below"),
    ("from .. import text", "floor below"), ("from ..text import encode", "floor below"),
    ("from .vae import VAE", None), ("import minipic.layers.blocks\nfrom minipic.common import random", None)])
def test_the_floors_catch(code, fault):
    found = list(upward("minipic/models/unet.py", ast.parse(code)))
    assert (fault is None and found == []) or (len(found) == 1 and fault in found[0])


@pytest.mark.parametrize("code, fault", [
    ("m.load_state_dict(w, strict=False)", "strict"), ("m.load_state_dict(w, strict=True)", None),
    ("zip(a, b, strict=True)", None), ("w = torch.load(p)", "torch.load"), ("torch.save(w, p)", "torch.save"),
    ("import pickle", "pickle"), ("from torch import *", "imports *"), ("import diffusers", "diffusers"),
    ("from scipy.stats import norm", "scipy"), ("try:\n    f()\nexcept:\n    raise", "every error"),
    ("try:\n    f()\nexcept Exception:\n    pass", "every error"), ("try:\n    f()\nexcept OSError:\n    pass", None),
    ("p = '/home/me/weights'", "absolute"), ("p = f'/data/{x}'", "absolute"),
    ("p = f'{folder}/unet/config.json'", None), ("u = 'https://example.org/a/b'", None),
    ("c = 'red and/or blue, w/h'", None)])
def test_the_ban_catches(code, fault):
    found = list(banned("file.py", ast.parse(code)))
    assert (fault is None and found == []) or (len(found) == 1 and fault in found[0])


def test_the_readme_map_is_counted_anew():
    old = "a\n<!-- map -->\n```\nminipic/common.py  1  what all use\ngone.py  3  x\n```\n<!-- map -->\nb\n"
    lines = readme.rewrite(old).splitlines()
    assert lines[:3] == ["a", "<!-- map -->", "```"] and lines[-3:] == ["```", "<!-- map -->", "b"]
    assert [line.split()[0] for line in lines[3:-3]] == PACKAGE
    common = lines[3 + PACKAGE.index("minipic/common.py")].split()
    assert common == ["minipic/common.py", str(readme.count("minipic/common.py")), "what", "all", "use"]
    assert readme.rewrite(readme.rewrite(old)) == readme.rewrite(old)
