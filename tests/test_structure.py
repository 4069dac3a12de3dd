"""The house rules, read from the source: which room may import which, and what nobody may write."""

import argparse
import ast
import importlib
import json
import math
import re
import runpy
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
from minipic.papers import PAPERS, load_paper  # noqa: E402
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
SLOW_TO_IMPORT = {"torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo", "torch._inductor"}
PACKAGES = {"torch", "numpy", "PIL", "safetensors", "tokenizers", "tqdm", "minipic"}

PROGRAMS = [path for path in sorted((ROOT / "tests" / "benchmarks").glob("*.py"))
            if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")]

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
        if not path.startswith("minipic/"):
            own = {"train", "sample", "adapters", "quality", "record", "lesson", "coursework"}  # programs here, which others may run
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


def is_kernel(function):
    """Whether Triton compiles it: the types of its parameters are its own."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def gives_a_value(function):
    """Whether a function returns or yields something; what its closures return does not count."""
    nodes = list(function.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.Yield, ast.YieldFrom)) or (isinstance(node, ast.Return) and node.value is not None):
            return True
        if not isinstance(node, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
            nodes += ast.iter_child_nodes(node)
    return False


def untyped(path, nodes, of_class=False):
    """The public functions and methods of a file that lack the type of a parameter or of their result."""
    for node in nodes.body:
        if isinstance(node, ast.ClassDef):
            yield from untyped(path, node, of_class=True)
        if not isinstance(node, ast.FunctionDef) or is_kernel(node):
            continue
        if node.name.startswith("_") and node.name != "__init__":
            continue
        arguments = node.args
        parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        is_static = any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list)
        if of_class and not is_static:
            parameters = parameters[1:]  # self, or the class
        parameters += [parameter for parameter in (arguments.vararg, arguments.kwarg) if parameter]
        missing = [parameter.arg for parameter in parameters if parameter.annotation is None]
        if node.returns is None and node.name != "__init__" and gives_a_value(node):
            missing.append("its result")
        if missing:
            yield f"{path}:{node.lineno} {node.name} has no type for {', '.join(missing)}"


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


def test_recipes_do_not_import_each_other():
    recipes = set(train.RECIPES.values())
    for path in MODULES:
        assert not recipes & {name for name, _ in imports(path, tree(path))}, path


@pytest.mark.parametrize("path", PACKAGE)
def test_no_program_starts_late_for_what_few_runs_need(path):
    """These take half a second and more: only the functions that need them import them."""
    for node in tree(path).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert not SLOW_TO_IMPORT & {name for name, _ in imports(path, node)}, f"{path}:{node.lineno}"


def test_nothing_banned_is_written():
    assert [fault for path in SOURCES for fault in banned(path, tree(path))] == []


@pytest.mark.parametrize("path", PACKAGE)
def test_public_functions_have_type_hints(path):
    assert list(untyped(path, tree(path))) == []


def test_the_plumbing_of_training_does_not_speak_of_flags():
    """Its errors name parameters, which the script turns into flags; only settings and flags know those."""
    for path in MODULES:
        if room(path) == "training" and Path(path).stem not in ("settings", "flags", "photos"):
            for node in ast.walk(tree(path)):
                if isinstance(node, ast.Raise):
                    assert not [text for text, _ in texts(node) if re.search(r"(?<![\w-])--(?!standalone|nproc)[a-z]", text)]


@pytest.mark.parametrize("path", report.BLOCKS)
def test_the_maps_and_numbers_are_up_to_date(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    assert report.with_blocks(text, report.BLOCKS[path]) == text, "run python tests/benchmarks/report.py"


def test_the_results_are_up_to_date():
    text = (ROOT / "tests" / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    assert report.results() == text, "run python tests/benchmarks/report.py"


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_every_benchmark_explains_itself(path, monkeypatch, capsys):
    """--help shows how the file's docstring starts the program, and nothing is measured or written."""
    pytest.importorskip("diffusers")  # which the programs compare with
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: {path.name}") and f"tests/benchmarks/{path.name}" in shown


def test_every_column_of_the_results_is_explained():
    for section in report.results().split("\n## "):
        lines = section.splitlines()
        prose = " ".join(line for line in lines if not line.startswith("|"))
        for line, next_line in zip(lines, lines[1:]):
            if next_line.startswith("| ---"):
                for column in line.strip("| ").split(" | "):
                    assert re.search(rf"\b{re.escape(column)}\b", prose, re.I), f"{lines[0]}: {column}"


def test_counted_captions_are_explained_where_they_were_measured(monkeypatch):
    found = report.read("quality")
    results = found["results"]
    results.pop("counted", None)
    monkeypatch.setattr(report, "read", lambda name: found)
    assert "counted" not in "\n".join(report.quality())  # results from before this set was added
    row = {**results["two objects"][0], "count": 0.25, "place": math.nan, "relation": math.nan}
    results |= {"renders, counted": [row], "counted": [row, {**row, "count": 0.75}]}
    text = "\n".join(report.quality())
    assert '"counted" ones count alike things: "two red cubes".' in text
    line, = (line for line in text.splitlines() if line.startswith("| counted |"))
    cells = line.strip("| ").split("|")
    assert cells[5].strip() == cells[6].strip() == "" and cells[9].strip() == "0.500 ±0.500"


def test_scores_of_onediffusion_stand_beside_their_shuffled_and_reference_scores():
    seeds = [
        {"PSNR": 18, "shuffled": 12, "copied": 9}, {"PSNR": 20, "shuffled": 12, "copied": 9}]
    assert report.onediffusion_scores(seeds) == [["PSNR", "19.000 ±2.000", "12.000 ±0.000", "9.000 ±0.000"]]
    depth = {"abs_rel": .1, "delta1": .9, "shuffled abs_rel": .5, "shuffled delta1": .3, "through the VAE abs_rel": .05}
    assert report.onediffusion_scores([depth]) == [
        ["abs_rel", "0.100", "0.500", "0.050"], ["delta1", "0.900", "0.300", ""]]
    subject = {"from 1": 12, "shuffled, 1": 9, "from 2": 13, "shuffled, 2": 8}
    assert report.onediffusion_scores([subject]) == [
        ["from 1", "12.000", "9.000", ""], ["from 2", "13.000", "8.000", ""]]
    assert report.onediffusion_scores([{"count": .9, "whole": .5}]) == [["whole", "0.500", "", ""]]


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "benchmarks").glob("*.json")), ids=lambda path: path.stem)
def test_the_command_of_a_result_is_one_of_today(path, monkeypatch):
    """The program is there and takes the flags; it is stopped before it measures."""
    pytest.importorskip("diffusers")  # which the programs compare with
    command = shlex.split(json.loads(path.read_text())["command"])
    assert command[0] == "python"
    program = ROOT / command[1]

    class Understood(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, *given):
        parse(parser, *given)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", command[1:])
    monkeypatch.setattr(sys, "path", [str(program.parent), *sys.path])
    with pytest.raises(Understood):
        runpy.run_path(str(program), run_name="__main__")


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
            cls = sample.Settings
            paper = re.search(r"--adapter runs/(\w+)/model", command)
            if paper:  # an adapter has flags of its own
                cls = sample.settings_with(load_paper(paper[1]).DrawOptions, ())
            cls(**parse_argv(cls, flags, "sample.py", ("prompt",)))
        else:
            module = importlib.import_module({**train.RECIPES, **PAPERS}[flags[0]])
            module.Settings(**parse_argv(module.Settings, flags[1:], "train.py"))


@pytest.mark.parametrize("name", ["", *train.RECIPES, *PAPERS])
def test_the_help_of_train_fits_a_terminal(name, capsys):
    try:
        train.main([*filter(None, [name]), "--help"])
    except SystemExit:  # as argparse ends
        assert name
    text = capsys.readouterr().out
    assert "--help" in text and max(map(len, text.splitlines())) <= 80


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


@pytest.mark.parametrize("code, fault", [
    ("def f(x): pass", "x"), ("def f(x: int): return x", "its result"), ("def f() -> int: return 1", None),
    ("def f(*, x: int, **more): pass", "more"), ("def f(x: int):\n    def g(y): return y", None), ("def _f(x): pass", None),
    ("class A:\n    def f(self, x): pass", "x"), ("class A:\n    def __init__(self, x: int): pass", None),
    ("class A:\n    @staticmethod\n    def f(x): pass", "x"), ("@triton.jit\ndef f(x): pass", None),
    ("def f():\n    yield 1", "its result"), ("def f(x: int): return", None)])
def test_the_search_for_type_hints_catches(code, fault):
    found = list(untyped("file.py", ast.parse(code)))
    assert (fault is None and found == []) or (len(found) == 1 and found[0].endswith(f"has no type for {fault}"))


def test_a_papers_name_is_found_in_code_but_not_in_docstrings():
    assert "onepic" in list(names_in_code(ast.parse("if paper == 'onepic':\n    pass")))
    assert "onepic" not in list(names_in_code(ast.parse('"""onepic"""')))
