"""The house rules, read from the source: which room may import which, and what nobody may write."""

import ast
import importlib
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import report  # noqa: E402

import sample  # noqa: E402
import train  # noqa: E402
from minipic.image import open_picture  # noqa: E402
from minipic.papers import PAPERS  # noqa: E402
from minipic.training.flags import parse_argv  # noqa: E402

FLOORS = [  # a room imports only from floors below its own, and from itself
    ["common"],
    ["kernels", "diffusion", "image", "figures"],
    ["layers"],
    ["models"],
    ["weights"],
    ["text", "training", "world", "draw_settings"],
    ["pipeline"],
    ["latents"],
    ["recipes", "papers"],
]
TRITON = ["minipic/kernels/flash_attention.py", "minipic/kernels/norms.py"]
PACKAGES = {"torch", "numpy", "PIL", "safetensors", "tokenizers", "tqdm", "minipic"}

PACKAGE = [path.relative_to(ROOT).as_posix() for path in report.package()]
MODULES = [path for path in PACKAGE if path.startswith("minipic/")]
SOURCES = PACKAGE + sorted(path.relative_to(ROOT).as_posix() for folder in ("weights", "tutorials")
                           for path in (ROOT / folder).glob("**/*.py"))


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


def names_in_code(nodes):
    """Every name, attribute and string of a file, but for docstrings."""
    docstrings = set()
    for node in ast.walk(nodes):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            docstrings.add(id(node.body[0].value))
    for node in ast.walk(nodes):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name


def test_every_room_has_one_floor():
    rooms = {room(path) for path in MODULES} - {"__init__"}
    names = sum(FLOORS, [])
    assert rooms == set(names) and len(names) == len(set(names))


def test_rooms_import_from_floors_below():
    assert [fault for path in MODULES for fault in upward(path, tree(path))] == []


def test_a_paper_is_one_file():
    """No paper imports another, and nothing but the table in papers/__init__.py knows a paper's name."""
    files = {module.replace(".", "/") + ".py" for module in PAPERS.values()}
    for path in PACKAGE:
        for name, line in imports(path, tree(path)):
            assert name not in PAPERS.values(), f"{path}:{line} imports {name}"
        if path in files or path == "minipic/papers/__init__.py":
            continue
        for word in names_in_code(tree(path)):
            assert not any(paper in word.split(".") for paper in PAPERS), f"{path} names a paper: {word!r}"


def test_nothing_banned_is_written():
    assert [fault for path in SOURCES for fault in banned(path, tree(path))] == []


@pytest.mark.parametrize("path", report.BLOCKS)
def test_the_maps_and_numbers_are_up_to_date(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    assert report.with_blocks(text, report.BLOCKS[path]) == text, "run python tests/benchmarks/report.py"


def test_the_results_are_up_to_date():
    text = (ROOT / "tests" / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    assert report.results() == text, "run python tests/benchmarks/report.py"


def test_every_room_is_on_the_map():
    assert {Path(name).stem for name in report.ROOMS} == {name for names in FLOORS for name in names}


def test_the_readme_is_one_sitting():
    """At most 150 lines, and every file and folder that it names is there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target


def commands(path):
    """Every command of a text that starts sample.py or train.py, without what follows three spaces (a comment)."""
    text = (ROOT / path).read_text(encoding="utf-8")
    for line in re.findall(r"(?:^ {4}|`|&& )((?:torchrun \S+ \S+ |python )?(?:sample|train)\.py [^`\n]*)", text, re.M):
        yield re.split(r"\s{3,}", line)[0]


@pytest.mark.parametrize("path", ["README.md", "minipic/README.md", "weights/README.md"])
def test_the_commands_in_the_texts_have_right_flags(path):
    found = list(commands(path))
    assert len(found) > 3
    for command in found:
        words = shlex.split(command)
        start = next(i for i, word in enumerate(words) if word.endswith(".py"))
        script, flags = words[start], words[start + 1:]
        if "--help" in flags or "NAME" in flags:
            continue
        if script == "sample.py":
            settings = parse_argv(sample.Settings, flags, "sample.py", ("prompt",))
            sample.Settings(**settings)
        else:
            module = importlib.import_module({**train.RECIPES, **PAPERS}[flags[0]])
            module.Settings(**parse_argv(module.Settings, flags[1:], "train.py"))


def test_the_python_in_the_readme_runs(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    program = re.search(r"```python\n(.*?)```", text, re.S)[1]
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    assert open_picture("cone.png").size == open_picture("red cone.png").size == (64, 64)
    assert open_picture("cone.png").tobytes() != open_picture("red cone.png").tobytes()


@pytest.mark.parametrize("code, fault", [
    ("from minipic.recipes.vae import build", "floor below"), ("from minipic import pipeline", "floor below"),
    ("def f():\n    import minipic.weights.layouts", "floor below"), ("import minipic.text", "floor below"),
    ("from .. import text", "floor below"), ("from ..text import encode", "floor below"),
    ("from .vae import VAE", None), ("import minipic.layers.blocks\nfrom minipic.common import rng", None)])
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


def test_a_papers_name_is_found_in_code_but_not_in_docstrings():
    assert "onepic" in list(names_in_code(ast.parse("if paper == 'onepic':\n    pass")))
    assert "onepic" not in list(names_in_code(ast.parse('"""onepic"""')))
