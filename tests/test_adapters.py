"""The papers' adapters that ship: small, known as what they are, and better than nothing."""

import sys
from pathlib import Path

import pytest

import sample
from minipic.image import open_picture
from minipic.papers import find_adapter

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import adapters  # noqa: E402

TINY = ROOT / "weights" / "tiny"
SHIPPED = ROOT / "weights" / "adapters"
MEGABYTES = {"onepic": 3, "mtu": 6, "mosaic": 4, "poster": 2, "onediffusion": 10}


@pytest.mark.parametrize("name, paper", [
    ("onepic", "onepic"), ("mtu", "mtu"), ("mosaic", "indomain"), ("poster", "specialist"),
    ("onediffusion", "onediffusion")])
def test_each_is_small_and_says_which_paper_made_it(name, paper):
    found, file = find_adapter(SHIPPED / name)
    assert found == paper and file.stat().st_size < MEGABYTES[name] * 1e6


@pytest.mark.parametrize("flags", [
    "--adapter ADAPTERS/onepic --task edges --source ADAPTERS/edges/example.png",
    "--adapter ADAPTERS/mtu --task edit --source ADAPTERS/mtu/edit.png",
    "--adapter ADAPTERS/mosaic",
    "--adapter ADAPTERS/poster",
    "--adapter ADAPTERS/onediffusion --task canny2image --source ADAPTERS/edges/example.png"])
def test_sample_draws_with_each(flags, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = flags.replace("ADAPTERS", str(SHIPPED)).split()
    words += ["--model", str(TINY), "--n", "1", "--steps", "2", "--device", "cpu"]
    assert sample.main(["make the torus green", *words, "--out", "drawn.png"]) == 0
    assert open_picture("drawn.png").size == (64, 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", adapters.SCORES)
def test_each_does_what_it_was_trained_for(name):
    """Beside the model without it, or another's condition, on scenes that it has not seen."""
    found = adapters.measure(name, TINY, SHIPPED / name, TINY / "judge", 16)
    if name == "onepic":
        assert found["edge F1"] > 1.5 * found["edge F1 with another's"]
        assert found["changed"] > 0.2
    elif name == "mtu":
        assert found["hole dB"] > found["hole dB before"] + 5
        assert found["sr dB"] > found["sr dB before"] - 2
        assert found["two objects"] > 0.4 and found["changed"] > 0.1
    elif name == "onediffusion":
        assert found["AbsRel"] < 0.8 * found["AbsRel with another's"]
        assert found["depth2image dB"] > found["depth2image dB with another's"] + 1
    else:
        assert found["style distance"] < found["style distance before"] - 0.02
        assert found["captions"] > 0.4
