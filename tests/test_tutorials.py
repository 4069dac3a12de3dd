"""Lessons: each runs offline and stays within its bands, and its page shows what it says today."""

import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tutorials"))
import lesson as lesson_file  # noqa: E402
import render  # noqa: E402
from lesson import Lesson  # noqa: E402

from minipic import figures  # noqa: E402
from minipic.figures import image_grid  # noqa: E402

LESSONS = render.lessons()
HEADINGS = ["Predict", "Change one thing", "Exercises"]
OFFLINE = """
import runpy, sys
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise OSError(f"a lesson asks the network: {event} {args}")
sys.addaudithook(refuse)
path = sys.argv[1]
sys.path[0] = path.rpartition("/")[0]
runpy.run_path(path, run_name="__main__")
"""


def seconds_of(path):
    """The Time of a lesson's header, in seconds."""
    return int(re.fullmatch(r"(\d+) s", render.read_header(path)["Time"])[1])


SHORTEST = sorted(LESSONS, key=seconds_of)[:1]


def marked(path):
    marks = [] if path in SHORTEST else [pytest.mark.slow]
    return pytest.param(path, marks=marks, id=path.stem)


def used_by_children():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


# Running ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", [marked(path) for path in LESSONS])
def test_a_lesson_runs(path, tmp_path):
    """Offline, from another folder, with two threads: it ends well, within twice its time, and draws its figures.

    On another kind of CPU than the bands', which rounds otherwise, checkpoints may miss them by their width.
    """
    values = tmp_path / "values"
    own = {"OMP_NUM_THREADS": "2", "LESSON_FIGURES": str(tmp_path / "figures"), "LESSON_VALUES": str(values)}
    start, used = time.monotonic(), used_by_children()
    run = subprocess.run([sys.executable, "-c", OFFLINE, str(path)], cwd=tmp_path, env=os.environ | own,
                         capture_output=True, text=True)
    # Where other programs run too, the processor's time is nearer to what the lesson takes.
    seconds = min(time.monotonic() - start, used_by_children() - used)
    assert run.returncode == 0, run.stderr[-2000:]
    assert seconds <= 2 * seconds_of(path)
    header = render.read_header(path)
    assert sorted(file.stem for file in (tmp_path / "figures").iterdir()) == sorted(header["Figures"].split(", "))
    for file in (tmp_path / "figures").iterdir():
        not_blank(file)
    checkpoints = [json.loads(line) for line in values.read_text().splitlines()]
    recorded = json.loads(render.BANDS.read_text())[path.stem]
    bands = recorded["checkpoints"]
    room = 0 if recorded["measured"]["processor"] == render.processor() else 1
    assert [name for name, _ in checkpoints] == list(bands) and len(bands) >= 2
    for name, value in checkpoints:
        low, high = bands[name]
        assert low - room * (high - low) <= value <= high + room * (high - low), name


def not_blank(file):
    with Image.open(file) as picture:
        levels = picture.convert("L").getextrema()
        assert min(picture.size) >= 60 and levels[1] - levels[0] >= 100, file
    assert file.stat().st_size <= lesson_file.MOST_BYTES


# Form ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_has_the_common_form(path):
    header = render.read_header(path)
    assert list(header) == ["Goal", "Time", "Needs", "Figures", "Title"]
    assert header["Title"].startswith(f"{path.stem.partition('_')[0]} · ") and 0 < seconds_of(path) <= 90
    cells = render.read_cells(path)
    assert cells[0].is_prose and cells[1].text.startswith("from lesson import Lesson\n")
    assert f'Lesson("{path.stem}")' in cells[1].text
    prose = "\n".join(cell.text for cell in cells if cell.is_prose)
    headings = re.findall(r"^## (.*)", prose, re.M)
    assert headings[-2:] == HEADINGS[1:] and "Predict" in headings[:-2]
    exercises = prose.partition("## Exercises")[2]
    assert len(re.findall(r"^\d\. ", exercises, re.M)) in (2, 3)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_page_is_up_to_date(path):
    assert render.outdated(path) == "", "run python tutorials/render.py"
    for file in (ROOT / "tutorials" / "figures" / path.stem).iterdir():
        not_blank(file)


@pytest.mark.parametrize("path", sorted((ROOT / "tutorials").glob("*.md")), ids=lambda path: path.stem)
def test_the_links_of_a_page_are_there(path):
    prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#:]+)\)", prose):
        assert (path.parent / target).exists(), target


def test_no_page_shows_a_path_of_the_computer_that_made_it():
    absolute = re.compile(r"""(?:^|[\s"'`=(:])(?:/[\w.-]+){2,}|\b[A-Z]:\\|~/""", re.M)
    assert absolute.search("/tmp/tmpqdd4doix: 8 pictures") and absolute.search("in '/home/me/minipic'")
    for path in sorted((ROOT / "tutorials").rglob("*.md")):
        found = absolute.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path.name} shows {found[0].strip()!r}"


def test_the_table_of_lessons_and_the_glossary():
    text = render.README.read_text(encoding="utf-8")
    assert render.with_table(text) == text, "run python tutorials/render.py"
    terms = re.findall(r"^\| ([^|]+) \|[^|]+\| \[[\w/.]+\]\(\.\./minipic/", text, re.M)
    assert len(set(terms)) == len(terms) >= 60
    assert set(json.loads(render.BANDS.read_text())) == {path.stem for path in LESSONS}


# The tools ----------------------------------------------------------------------------------------

TOY = '''# %% [markdown]
# # 99 · Toy
#
# - **Goal:** see
#   more
# - **Time:** 1 s
# - **Needs:** nothing
# - **Figures:** half

# %%
print("two words")
print("figure tutorials/figures/99_toy/half.png\\n    A caption.")
print("source minipic/text.py, line 7\\n    def f():\\n\\n        return 1")
print("the end")
'''


def test_a_page_has_prose_code_and_output_and_loses_the_output_again(tmp_path, capsys):
    path = tmp_path / "99_toy.py"
    path.write_text(TOY, encoding="utf-8")
    assert render.read_header(path) == {
        "Goal": "see more", "Time": "1 s", "Needs": "nothing", "Figures": "half", "Title": "99 · Toy"}
    outputs = render.run_cells(path)
    assert outputs[0] == "" and outputs[1].startswith("two words\n")
    text = render.page(path, outputs)
    assert "# 99 · Toy\n" in text and '```python\nprint("two words")' in text
    assert ("```text\ntwo words\n```\n\n![half](figures/99_toy/half.png)\n\n*A caption.*\n\n"
            "[minipic/text.py](../minipic/text.py), line 7:\n\n```python\ndef f():\n\n    return 1\n```\n\n"
            "```text\nthe end\n```\n") in text
    assert render.without_outputs(text) == render.page(path)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    assert render.outdated(path) == "lacks the figure half of its header"
    path.write_text(TOY.replace("two", "three"), encoding="utf-8")
    assert render.outdated(path) == "has changed since its page was made"


def test_a_notebook_has_the_cells_of_its_lesson(tmp_path):
    path = tmp_path / "99_toy.py"
    path.write_text(TOY, encoding="utf-8")
    render.write_notebook(path)
    cells = json.loads(path.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]
    assert [cell["cell_type"] for cell in cells] == ["markdown", "code"]
    assert ["".join(cell["source"]) for cell in cells] == [cell.text for cell in render.read_cells(path)]


@pytest.mark.parametrize("values, expected", [
    ([77, 77, 77], [77, 77]),            # a fact: exactly this
    ([0.5, 0.6, 0.55], [0.394, 0.706]),  # 0.1 wide and 1 % of 0.6, at both ends
    ([-2.0, -1.0], [-3.02, 0.02]),
    ([0.0, 3e-5], [0.0, 3e-4]),          # rounding errors
    ([0.0, 0.0], [0.0, 1e-4])])
def test_a_band_holds_its_values_and_a_margin(values, expected):
    assert render.band(values) == expected


def test_a_checkpoint_outside_its_band_ends_the_lesson(tmp_path, monkeypatch, capsys):
    bands = tmp_path / "bands.json"
    bands.write_text('{"99_toy": {"checkpoints": {"share": [0.4, 0.5]}}}', encoding="utf-8")
    monkeypatch.setattr(lesson_file, "BANDS", bands)
    lesson = Lesson("99_toy")
    lesson.expect("share", 0.45)
    assert capsys.readouterr().out == "checkpoint: share is 0.45, expected 0.4 to 0.5\n"
    for value in (0.39, 0.51, float("nan")):
        with pytest.raises(SystemExit, match="^checkpoint 'share': got .*, expected 0.4 to 0.5; undo"):
            lesson.expect("share", value)
    with pytest.raises(SystemExit, match="^checkpoint 'other' has no band yet; run `python tutorials/render.py --bands"):
        lesson.expect("other", 1)
    monkeypatch.setenv("LESSON_VALUES", str(tmp_path / "values.jsonl"))
    lesson.expect("other", 2)
    assert (tmp_path / "values.jsonl").read_text() == '["other", 2.0]\n'


def test_a_figure_is_kept_small(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LESSON_FIGURES", str(tmp_path))
    noise = Image.effect_noise((240, 240), 90)
    noise = Image.merge("RGB", [noise, noise.rotate(90), noise.rotate(180)])  # 170 kB as it is
    lesson = Lesson("99_toy")
    lesson.show(image_grid([noise], cell=240), "noise", "Noise.")
    assert (tmp_path / "noise.png").stat().st_size <= lesson_file.MOST_BYTES
    assert capsys.readouterr().out.endswith("noise.png\n    Noise.\n")
    with pytest.raises(ValueError, match="noise.png has .* bytes; draw it smaller"):
        lesson.show(noise.resize((480, 480)), "noise", "Noise.")


def test_source_is_shown_as_it_stands(capsys):
    Lesson("99_toy").show_source(image_grid)
    first, *others = capsys.readouterr().out.splitlines()
    number = int(re.fullmatch(r"source minipic/figures\.py, line (\d+)", first)[1])
    lines = (ROOT / "minipic" / "figures.py").read_text(encoding="utf-8").splitlines()
    assert [line[4:] for line in others] == lines[number - 1:number - 1 + len(others)]


# Figures ------------------------------------------------------------------------------------------

def test_grey_has_black_for_the_lowest_and_white_for_the_highest():
    picture = figures.grey(torch.tensor([[-1.0, 0.0, 3.0]]), side=12)
    assert picture.size == (12, 4)
    assert [picture.getpixel((x, 0))[0] for x in (0, 3, 4, 7, 8, 11)] == [0, 0, 64, 64, 255, 255]


def test_heat_map_is_darkest_where_the_number_is_highest():
    picture = figures.heat_map([[0.0, 1.0], [0.5, 0.25]], ["a", "b"], ["c", "d"], cell=40)
    left, top = picture.width - 12 - 80, picture.height - 12 - 80
    corners = [picture.getpixel((left + 40 * j + 2, top + 40 * i + 2)) for i in (0, 1) for j in (0, 1)]
    assert corners == [(255, 255, 255), (20, 65, 140), (138, 160, 198), (196, 208, 226)]


def test_bars_are_as_long_as_their_values():
    picture = figures.bars({"a": 1.0, "b": 4.0, "c": -1.0})
    ink = (np.array(picture) == (0, 0, 128)).all(2)  # navy
    a, b, c = [ink[10 + 26 * i + 13].nonzero()[0] for i in range(3)]
    assert abs(len(b) - 4 * len(a)) <= 4 and abs(len(a) - len(c)) <= 2
    assert a[0] == b[0] == c[-1]  # all begin at zero


def test_curves_reach_the_edges_where_their_values_do():
    picture = figures.curves({"up": ([0, 1, 2], [1.0, 10.0, 100.0])}, "x", "y", logarithmic=True)
    ink = (np.array(picture) == (0, 0, 128)).all(2)[36:313]  # the plot without its legend
    y, x = ink.nonzero()
    assert x.min() - 80 in range(-2, 3) and x.max() - 616 in range(-2, 3)
    middle = y[abs(x - 348) <= 1].mean()  # ten is half way from 1 to 100
    assert abs(middle - 138) <= 3 and y[x <= 82].mean() > 270 and y[x >= 614].mean() < 6


def test_a_power_is_a_straight_line_on_two_logarithmic_axes():
    square = {"square": ([1, 2, 4, 64], [1.0, 4.0, 16.0, 4096.0])}
    picture = figures.curves(square, "x", "y", logarithmic=True, logarithmic_across=True)
    y, x = (np.array(picture) == (0, 0, 128)).all(2)[36:313].nonzero()
    on_the_line = 276 - (x - 80) * 276 / 536
    assert x.min() <= 82 and x.max() >= 614 and abs(y - on_the_line).max() <= 4


def test_a_table_has_room_for_its_longest_words():
    rows = [["a", "b"], ["a much longer word", "c"]]
    assert figures.table(rows).width > figures.table(rows[:1]).width + 80
    assert figures.table(rows).height == figures.table(rows[:1]).height + 24
