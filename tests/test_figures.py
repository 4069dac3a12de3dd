"""Figures of the experiments: what is drawn is what the JSON files say, and it stands where it should."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import figures  # noqa: E402
import report  # noqa: E402

from minipic.figures import Measured, bars, error_bars, overlap, round_ticks  # noqa: E402
from minipic.weights.files import sha256  # noqa: E402

NAVY, CRIMSON, ORANGE = (0, 0, 128), (220, 20, 60), (255, 140, 0)


def scores(whole, style, frechet=50.0):
    return {"whole": whole, "style": style, "frechet": frechet, "diversity": 0.05}


def in_domain_rows():
    """Two seeds; the second was drawn at a weight more, and both were measured at other step counts."""
    decoupled = [
        {"entry": "decoupled", "seed": 0, "at": {
            "50": {"w_d 2, w_c 3": scores(0.7, 0.40)},
            "400": {"w_d 2, w_c 3": scores(0.8, 0.38), "w_d 1, w_c 3": scores(0.9, 0.41),
                    "edit": {"changed": 0.4, "kept": 0.9, "style": 0.36}}}},
        {"entry": "decoupled", "seed": 1, "at": {
            "400": {"w_d 2, w_c 3": scores(0.6, 0.36), "w_d 2.5, w_c 5": scores(0.5, 0.35),
                    "w_d 2, no text": scores(0.0, 0.3)}}}]
    tuned = {"entry": "fine-tuned, one caption", "seed": 0, "at": {
        "50": {"guidance 5": scores(0.75, 0.42), "predictions": {"drift": 0.25, "forgotten": 0.125}},
        "400": {"guidance 5": scores(0.65, 0.40), "predictions": {"drift": 0.5, "forgotten": 0.25}}}}
    renders = {"entry": "renders", "seed": 0, "at": {"0": {"renders": scores(1.0, 0.25)}}}
    return [renders, *decoupled, tuned]


# Drawing ------------------------------------------------------------------------------------------

def test_error_bars_go_through_means_and_from_the_lowest_seed_to_the_highest():
    picture = error_bars({"one": [Measured([0.0], [0.0, 2.0]), Measured([8.0, 12.0], [3.0])],
                          "two": [Measured([5.0], [5.0])]}, "x", "y")
    # The plot is x from 110 to 840 for 0..15 and y from 600 to 60 for 0..5.
    assert round_ticks([0.0, 12.0]) == [0, 5, 10, 15] and round_ticks([0.0, 5.0]) == [0, 1, 2, 3, 4, 5]

    def color(x, y):
        return picture.getpixel((round(110 + x / 15 * 730), round(600 - y / 5 * 540)))

    assert color(0, 1) == color(10, 3) == NAVY and color(5, 5) == CRIMSON  # the means
    assert color(5, 2) == NAVY and color(5, 1) != NAVY and color(5, 3) != NAVY  # the line
    assert color(0, 0.1) == color(0, 1.9) == NAVY and color(0, 2.2) != NAVY
    assert color(8.2, 3) == color(11.8, 3) == NAVY and color(12.3, 3) != NAVY


def test_every_line_has_a_mark_of_its_own_in_the_legend():
    lines = {f"line {i}": [Measured([i], [i])] for i in range(24)}
    picture = np.array(error_bars(lines, "x", "y"))
    marks = {picture[60 + 36 * i - 14:60 + 36 * i + 15, 876:905].tobytes() for i in range(24)}
    assert len(marks) == 24


@pytest.mark.parametrize("values, ticks", [
    ([0.37, 0.81], [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]), ([9.6, 98.4], [0, 20, 40, 60, 80, 100]), ([2.0], [2, 2.5]),
    ([0.0], [0, 0.2])])
def test_ticks_are_round_and_hold_all_values(values, ticks):
    assert round_ticks(values) == pytest.approx(ticks)


def test_notes_do_not_cover_each_other(monkeypatch):
    boxes = []
    write = ImageDraw.ImageDraw.text

    def text(draw, at, words, ink, font, anchor=None, **more):
        if words in ("100", "300"):
            boxes.append(draw.textbbox(at, words, font, anchor=anchor))
        write(draw, at, words, ink, font, anchor=anchor, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    same_place = [Measured([1.0], [1.0], "100"), Measured([1.0], [1.0], "300")]
    error_bars({"one": same_place, "far": [Measured([0.0, 2.0], [0.0, 2.0])]}, "x", "y")
    assert len(boxes) == 2 and overlap(*boxes) == 0
    assert overlap((0, 0, 2, 2), (1, 1, 3, 4)) == 1


def test_spans_of_bars_reach_from_the_lowest_seed_to_the_highest():
    picture = np.array(bars({"a": 2.0, "b": -1.0}, spans={"a": (1.0, 4.0), "b": (-2.0, -0.5)}))
    navy, orange = ((picture == color).all(2) for color in (NAVY, ORANGE))
    zero = navy[10 + 5].nonzero()[0][0]  # where the bar of a begins; its line is lower
    unit = 320 / 6
    for y, bar, span in ((10, (0, 2), (1, 4)), (36, (-1, 0), (-2, -0.5))):
        for ink, (first, last) in ((navy[y + 5], bar), (orange[y + 13], span)):
            x = ink.nonzero()[0]
            assert abs(x[0] - zero - first * unit) <= 1.5 and abs(x[-1] - zero - last * unit) <= 1.5


# The numbers --------------------------------------------------------------------------------------

def test_in_domain_lines_hold_the_scores_of_the_seeds_that_have_them():
    assert figures.against_distance(in_domain_rows(), "style") == {
        "renders": [Measured([0.25], [1.0], "")],
        "decoupled, w_c 3": [Measured([0.41], [0.9], "1"), Measured([0.38, 0.36], [0.8, 0.6], "2")],
        "decoupled, w_c 5": [Measured([0.35], [0.5], "2.5")],
        "fine-tuned, one caption, guidance 5": [Measured([0.42], [0.75], "50"), Measured([0.40], [0.65], "400")]}
    assert figures.against_distance(in_domain_rows(), "frechet")["renders"] == [Measured([50.0], [1.0], "")]


def test_in_domain_scores_over_the_steps():
    lines = figures.in_domain_over_steps(in_domain_rows(), "whole")
    assert lines["decoupled"] == [Measured([50], [0.7]), Measured([400], [0.8, 0.6])]
    assert lines["fine-tuned, one caption"] == [Measured([50], [0.75]), Measured([400], [0.65])]
    assert figures.drift_over_steps(in_domain_rows(), "drift") == {
        "base": [Measured([0], [0])], "fine-tuned, one caption": [Measured([50], [0.25]), Measured([400], [0.5])]}
    assert figures.drift_over_steps(in_domain_rows()[:1], "drift") == {}


def test_the_grid_of_weights_joins_the_same_training():
    grid = [{"entry": "decoupled, grid", "seed": seed, "at": {"400": {
        "w_d 1, w_c 3": scores(0.95, 0.5), "w_d 1.5, w_c 3": scores(0.5 + seed / 8, 0.375)}}} for seed in (0, 2)]
    rows = in_domain_rows() + grid
    lines = figures.against_distance(rows, "style")
    assert lines["decoupled, w_c 3"] == [
        Measured([0.41, 0.5], [0.9, 0.95], "1"), Measured([0.375, 0.375], [0.5, 0.75], "1.5"),
        Measured([0.38, 0.36], [0.8, 0.6], "2")]
    assert not [name for name in lines if "grid" in name]
    assert figures.in_domain_over_steps(rows, "whole") == figures.in_domain_over_steps(in_domain_rows(), "whole")
    assert rows == in_domain_rows() + grid  # as they were


def test_mtu_shows_each_scale_beside_the_other():
    one = {"t2i": [[0.9, 0.1], [0.5, 0.5]], "sr": [[0.2, 0.8], [0.3, 0.7]]}
    rows = [{"name": "cost", "seed": 0},
            {"name": "MTU, N=1", "seed": 0, "router": {"t2i": [[1.0], [1.0]], "sr": [[1.0], [1.0]]}},
            {"name": "MTU, N=2, scale N", "seed": 0, "router": one, "held-out loss": {"t2i": {"200": 0.1, "800": 0.3}},
             "scores": {"sr": {"PSNR": 20.0}}},
            {"name": "MTU, N=2, scale N", "seed": 1, "router": {}, "held-out loss": {"t2i": {"200": 0.2, "800": 0.4}}},
            {"name": "MTU, N=2, scale 1", "seed": 0, "router": {task: layers[:1] for task, layers in one.items()}}]
    table, row_names, column_names = figures.router_table(rows, 2)
    assert row_names == ["expert 1, t2i", "expert 1, sr", "expert 2, t2i", "expert 2, sr"]
    assert column_names == ["scale N, layer 1", "scale N, layer 2", "scale 1, layer 1"]
    assert table == [[0.9, 0.5, 0.9], [0.2, 0.3, 0.2], [0.1, 0.5, 0.1], [0.8, 0.7, 0.8]]
    assert list(figures.draw_router(rows)) == ["-2"]
    assert figures.held_out_losses(rows, "t2i") == {"MTU, N=2, scale N": pytest.approx([0.2, 0.3])}
    assert figures.scores_of_entries(rows, "sr", "PSNR") == {"MTU, N=2, scale N": [20.0]}


def test_edges_stand_beside_the_shuffled_ones_and_the_references():
    rows = [{"task": "control", "name": "renders", "at": {"0": {"edge F1": 0.8, "shuffled": None}}},
            {"task": "control", "name": "ControlNet, edges", "at": {"100": {"edge F1": 0.3}, "20": {"edge F1": 0.2}}},
            {"task": "control", "name": "ControlNet, depth", "at": {"100": {"edge F1": 0.1}}},
            {"task": "control", "name": "ONE-PIC, side, edges", "at": {"50": {"edge F1": 0.4, "shuffled": 0.1}}},
            {"task": "edit", "name": "InstructPix2Pix", "at": {"600": {"changed": 0.5, "kept": 0.25}}}]
    assert figures.edges_over_steps(rows) == {
        "ControlNet": [Measured([20], [0.2]), Measured([100], [0.3])], "ControlNet, shuffled": [],
        "ONE-PIC, side": [Measured([50], [0.4])], "ONE-PIC, side, shuffled": [Measured([50], [0.1])],
        "renders": [Measured([0], [0.8]), Measured([100], [0.8])]}
    assert figures.edits(rows) == {"InstructPix2Pix": [Measured([0.25], [0.5], "600")]}


def test_specialist_has_a_point_for_each_step_count():
    rows = [{"style": "neon", "name": "LoRA", "at": {"100": {"style": 0.3, "whole": 0.5}, "300": {"style": 0.2, "whole": 0.4}}},
            {"style": "neon", "name": "full", "at": {"100": {"style": 0.3, "whole": float("nan")}}},
            {"style": "poster", "name": "LoRA", "at": {"100": {"style": 0.9, "whole": 0.9}}}]
    assert figures.of_style(rows, "neon") == {
        "LoRA": [Measured([0.3], [0.5], "100"), Measured([0.2], [0.4], "300")], "full": []}
    assert list(figures.draw_styles(rows)) == ["-neon", "-poster"]


def test_onediffusion_stands_beside_its_controls():
    depth = {"abs_rel": 0.1, "delta1": 0.9, "shuffled abs_rel": 0.5, "shuffled delta1": 0.2, "through the VAE abs_rel": 0.05}
    rows = [{"name": "all tasks", "scores": {"image2depth": depth, "composed": {"both": 18}}},
            {"name": "all tasks", "scores": {"image2depth": {**depth, "abs_rel": 0.3}}},
            {"name": "single", "scores": {"image2depth": {"abs_rel": 0.4, "shuffled abs_rel": 0.6}}}]
    title, values = figures.with_controls(rows[:2], "image2depth")
    assert title == "image2depth: abs_rel, lower is better"
    assert values == {"drawn": [0.1, 0.3], "shuffled": [0.5, 0.5], "reference": [0.05, 0.05]}
    assert figures.with_controls(rows[:2], "composed") == ("", {})
    assert list(figures.draw_tasks(rows)) == list(figures.draw_entries(rows)) == [""]
    assert figures.draw_entries(rows[:2]) == {}  # nothing to compare with


# The files ----------------------------------------------------------------------------------------

def test_figures_are_written_from_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "HERE", tmp_path)
    figures.main([])
    assert list((tmp_path / "figures").iterdir()) == []
    (tmp_path / "indomain.json").write_text(json.dumps({"results": in_domain_rows()}))
    (tmp_path / "figures" / "mtu-loss.png").write_bytes(b"of a JSON that is gone")
    figures.main([])
    names = ["indomain-drift", "indomain-frechet", "indomain-steps", "indomain-style"]
    assert sorted(path.stem for path in (tmp_path / "figures").iterdir()) == names
    assert report.figure("indomain-style", "A sentence.") == [
        "![indomain-style](figures/indomain-style.png)", "", "A sentence.", ""]
    assert report.figure("mtu-loss", "A sentence.") == []


def test_the_figures_are_of_todays_numbers(tmp_path, monkeypatch):
    """Each is there, small and made from the JSON of today, and RESULTS.md links it with a sentence."""
    shown = report.results()
    folder = report.HERE / "figures"
    for path in report.HERE.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(report, "HERE", tmp_path)
    figures.main([])
    wanted = sorted((tmp_path / "figures").iterdir())
    again = "run python tests/benchmarks/figures.py, then report.py"
    assert [path.name for path in wanted] == [path.name for path in sorted(folder.iterdir())], again
    for path in wanted:
        kept = folder / path.name
        assert f"]({folder.name}/{path.name})" in shown
        assert Image.open(kept).text["source"] == Image.open(path).text["source"], again
        assert kept.stat().st_size < 100_000


def test_a_figure_knows_its_json(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "HERE", tmp_path)
    (tmp_path / "indomain.json").write_text(json.dumps({"results": in_domain_rows()}))
    figures.main([])
    picture = Image.open(tmp_path / "figures" / "indomain-style.png")
    assert picture.text["source"] == sha256(tmp_path / "indomain.json")
    assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
