"""The benchmark of recipes: its scores on renders, which are the truth, and on other pictures; a whole trial run."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import baselines  # noqa: E402
import cases  # noqa: E402
import report  # noqa: E402
import tiny  # noqa: E402
from quality import draw  # noqa: E402

from minipic.image import to_pictures, to_tensor  # noqa: E402
from minipic.models.controlnet import ControlNet  # noqa: E402
from minipic.papers import onepic  # noqa: E402
from minipic.pipeline import DrawSettings  # noqa: E402
from minipic.recipes import edit  # noqa: E402
from minipic.world import probe  # noqa: E402
from minipic.world.caption import Description, Thing, describe, parse  # noqa: E402
from minipic.world.scene import render, sample_scene  # noqa: E402
from minipic.world.tasks import TASKS  # noqa: E402

TINY = Path(__file__).parents[1] / "weights" / "tiny"

pytestmark = pytest.mark.slow  # of the programs that measure, not of the package


@pytest.fixture(scope="module")
def judge():
    if not (TINY / "judge").exists():
        pytest.skip("weights/tiny has no judge")
    return probe.load_judge(TINY / "judge")


def test_renders_follow_their_map_and_shuffled_ones_do_not(judge):
    pairs = TASKS["edges"](5, range(32))
    truth, shuffled = (cases.control_scores(judge, images, pairs.truth["edges"], pairs.scenes)
                       for images in (pairs.target, pairs.target.roll(1, 0)))
    assert truth["layout"] > 0.9 and truth["text"] > 0.9 and truth["edge F1"] > 0.7
    assert shuffled["layout"] < 0.1 and shuffled["text"] < 0.1 and shuffled["edge F1"] < 0.4
    assert shuffled["shape"] < 0.4 < 0.9 < truth["shape"]


def test_what_a_prompt_says_and_what_a_map_says_is_all_of_a_scene():
    full = describe(sample_scene(5, 3, objects=2))
    layout, looks = cases.layout_of(full), cases.looks_of(full)
    assert parse("a small red cube on the left").things[0] == Thing("red", None, "cube", "small", "plain", "left")
    both = [replace(b, shape=a.shape, size=a.size, place=a.place) for a, b in zip(layout.things, looks.things)]
    assert Description(tuple(both), layout.relations, looks.floor, looks.sky) == full


def test_edges_of_a_picture_are_its_steps():
    picture = torch.zeros(1, 3, 8, 8)
    picture[0, 1, :, 4:] = 0.31
    expected = torch.zeros(1, 8, 8, dtype=torch.bool)
    expected[0, :, 3] = True
    assert torch.equal(cases.own_edges(picture), expected)
    assert not cases.own_edges(picture * 0.9).any()


@pytest.mark.parametrize("seed", range(3))
def test_a_subject_is_told_from_its_class(judge, tmp_path, seed):
    case = cases.subject(seed, 15, judge, tmp_path, 1)
    assert len(list(tmp_path.glob("*.png"))) == 5
    assert case.renders["identity"] > 0.8 and case.renders["setting"] == 1 and case.renders["others"] > 0.8
    it, color = list(cases.SUBJECTS.items())[seed]
    settings = [("left", "grey", "blue"), ("right", "pink", "night")]
    plain = replace(it, color=color, color2=None, pattern="plain")
    mine, other = (render([cases.placed(x, s, (1, s[0])) for s in settings], truth=False).rgb for x in (it, plain))
    asked, classes = ([Description((Thing(x.color, x.color2, x.shape, pattern=x.pattern, place=s[0]),), (), *s[1:])
                       for s in settings] for x in (it, plain))
    assert cases.subject_scores(judge, [mine, other, mine], asked, classes, asked) == {
        "identity": 1, "setting": 1, "class": 1, "leak": 0, "others": 1}
    swapped = cases.subject_scores(judge, [other.flip(0), mine, other], asked, classes, asked)
    assert swapped == {"identity": 0, "setting": 0, "class": 0, "leak": 1, "others": 0}


def test_an_edit_is_right_and_what_was_there_before_is_not(judge):
    pairs = TASKS["edit"](5, range(48))
    kinds, before = pairs.truth["kinds"], pairs.truth["before"]
    truth, same, shuffled = (cases.edit_scores(judge, images, pairs.scenes, kinds, pairs.target)
                             for images in (pairs.target, pairs.source, pairs.target.roll(1, 0)))
    assert set(kinds) == set(cases.CHANGES)
    assert truth["changed"] > 0.95 and truth["kept"] > 0.95 and truth["edited"] > 0.95 and truth["PSNR"] > 100
    assert same["changed"] < 0.1 and same["kept"] > 0.95 and same["edited"] < 0.05 and 15 < same["PSNR"] < 40
    assert shuffled["kept"] < 0.1 and shuffled["edited"] < 0.1 and shuffled["PSNR"] < same["PSNR"]
    back = cases.edit_scores(judge, pairs.source, before, kinds, pairs.source)  # a picture is its own scene's
    assert back["edited"] > 0.95


def test_drawings_follow_their_own_picture_as_generate_does():
    """quality.draw's hints and edits are those of `generate`, a row each, in every part of guidance."""
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).mul(255).round() / 255
    given = to_pictures(2 * pictures - 1)
    for what, settings in (("hints", {}), ("edits", {"guidance": 3.0, "image_guidance": 1.5})):
        pipeline = tiny.build()
        if what == "hints":
            changed = pipeline.controlnet = ControlNet.from_unet(pipeline.unet, pipeline.vae.config.factor)
        else:
            edit.double_input_channels(pipeline.unet)
            changed = pipeline.unet.conv_in
        for p in changed.parameters():
            p.data.normal_(std=0.2, generator=torch.Generator().manual_seed(p.numel()))
        drawn = draw(pipeline, ["a red sphere"] * 2, 5, steps=2, **settings,
                     **{what: pictures if what == "hints" else 2 * pictures - 1})
        for i in range(2):
            follow, other = (to_tensor(pipeline.generate(
                "a red sphere", steps=2, sampler="euler", seed=5 + i, **settings,
                **({"control": [(given[k], 1.0)]} if what == "hints" else {"edit": given[k]}))[0]) for k in (i, 1 - i))
            assert (drawn[i] - follow).abs().mean() < 0.2 * (drawn[i] - other).abs().mean(), what


@pytest.mark.parametrize("layout, source_dropout", [("side", False), ("interlaced", False), ("interlaced", True)])
@pytest.mark.parametrize("visible", ["clean", "noised"])
def test_drawings_beside_a_picture_are_those_of_onepic(visible, layout, source_dropout):
    pipeline, trained_as = tiny.build(), onepic.TrainedAs(
        visible, "a sketch | {text}", (64, 64), layout, source_dropout=source_dropout)
    sources = 2 * torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)).mul(255).round() / 255 - 1
    drawn = draw(pipeline, ["a red sphere"] * 3, 5, steps=2, batch=2, sources=sources, trained_as=trained_as)
    for i, given in enumerate(to_pictures(sources)):
        settings = DrawSettings("a red sphere", seed=5 + i, steps=2, sampler="euler")
        one, = onepic.draw(pipeline, trained_as, settings, [given])
        assert (drawn[i] - to_tensor(one)).abs().mean() < 0.02 < (drawn[i] - drawn[i - 1]).abs().mean()


def test_a_share_counts_pictures_in_which_all_the_facts_hold():
    asked, seen = parse("a red cube on the left"), parse("a red sphere on the left")
    assert cases.share([asked, asked], [asked, seen], ("shape", "color")) == 0.5
    assert cases.share([asked, asked], [asked, seen], ("color", "place")) == 1


ONE_PIC = "ONE-PIC, interlaced, edit"
QUICK = ["LoRA", ONE_PIC]


@pytest.mark.slow
@pytest.mark.parametrize("names", [
    QUICK, [*QUICK, "ControlNet, depth", "InstructPix2Pix", "ONE-PIC, side, depth"]], ids=len)
def test_a_trial_run_is_kept_and_not_repeated(judge, tmp_path, monkeypatch, capsys, names):
    flags = ["--quick", "--seeds", "1", "--model", str(TINY), "--out", str(tmp_path / "baselines.json"),
             "--runs", str(tmp_path / "runs"), "--only"]
    for name in names:
        baselines.main([*flags, name])
    results = json.loads((tmp_path / "baselines.json").read_text())["results"]
    rows = {}
    for row in results:
        rows.setdefault(row["task"], {})[row["name"]] = row
    assert len(results) == sum(map(len, rows.values()))  # nothing is measured twice
    assert list(rows["subject"]) == ["renders", "untouched", "in words", "LoRA"]
    lora, one_pic = rows["subject"]["LoRA"], rows["edit"][ONE_PIC]
    assert lora["at"].keys() == {"1", "2"} and lora["trained"] == 315392 and 0.6e6 < lora["bytes"] < 1.4e6
    assert one_pic["trained"] == 2541568 and one_pic["at"]["2"].keys() == {"changed", "kept", "edited", "PSNR"}
    if names == QUICK:
        assert list(rows) == ["subject", "edit"] and list(rows["edit"]) == ["renders", "untouched", ONE_PIC]
    else:
        assert list(rows) == ["subject", "control", "edit"]
        assert list(rows["control"]) == ["renders", "untouched", "ControlNet, depth", "ONE-PIC, side, depth"]
        assert rows["control"]["ONE-PIC, side, depth"]["at"]["2"]["shuffled"] >= 0
        assert list(rows["edit"]) == ["renders", "untouched", "InstructPix2Pix", ONE_PIC]
        controlnet, pix2pix = rows["control"]["ControlNet, depth"], rows["edit"]["InstructPix2Pix"]
        assert controlnet["trained"] > 10**6 and controlnet["seconds a step"] > 0
        assert pix2pix["trained"] == 7373700 and pix2pix["at"]["2"].keys() == one_pic["at"]["2"].keys()

    monkeypatch.setattr(report, "HERE", tmp_path)
    for name in names:
        assert any(line.startswith(f"| {name} | 2 | 1 |") for line in report.baselines())
    capsys.readouterr()
    monkeypatch.setattr(baselines, "measure", lambda *args: pytest.fail("measured again"))
    baselines.main([*flags, "LoRA"])
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(report, "HERE", tmp_path / "absent")
    assert "Not yet measured" in "".join(report.baselines())
