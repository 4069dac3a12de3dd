"""weights/make.py: the table of commands is right, and a whole toy run makes, skips, goes on and installs."""

import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "weights"))
import make  # noqa: E402

from minipic.pipeline import Pipeline  # noqa: E402


@pytest.mark.parametrize("size", make.SIZES)
@pytest.mark.parametrize("name", make.STAGES)
def test_every_command_is_one_of_train_py(name, size, tmp_path):
    """Flags and values are checked by the recipe's own settings."""
    for words in make.arguments(make.STAGES[name], size, tmp_path):
        config = make.settings_of(words)
        assert config.steps > 0 and Path(config.save).is_relative_to(tmp_path)


def test_the_plan_counts_samples(capsys, tmp_path):
    assert make.main(["--plan", "--size", "gpu", "t2i", "--work", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("t2i: 4,096,000 samples") and "python train.py t2i --from-nothing" in out
    assert not list(tmp_path.iterdir())


def test_an_unknown_stage_is_named(capsys):
    assert make.main(["unet"]) == 2
    assert capsys.readouterr().err == "make.py: stage 'unet' is unknown; choose of judge, clip, vae, t2i, adapters\n"


@pytest.mark.slow
def test_the_hash_follows_the_code_but_not_its_comments(monkeypatch, tmp_path):
    for name in ("train.py", "minipic"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, tmp_path / name)
    before = make.code_hash("vae")
    monkeypatch.setattr(make, "ROOT", tmp_path)
    assert make.code_hash("vae") == before
    blocks = tmp_path / "minipic" / "layers" / "blocks.py"  # vae.py imports models.vae, which imports this
    blocks.write_text(blocks.read_text() + "\n# a comment\n")
    assert make.code_hash("vae") == before
    blocks.write_text(blocks.read_text() + "\nvalue = 1\n")
    assert make.code_hash("vae") != before
    caption = tmp_path / "minipic" / "papers" / "onepic.py"
    before = make.code_hash("vae")
    caption.write_text("")
    assert make.code_hash("vae") == before  # no recipe imports a paper


@pytest.mark.slow
def test_a_toy_run_makes_everything_from_nothing(tmp_path, capsys, monkeypatch):
    flags = ["--size", "toy", "--work", str(tmp_path / "work")]
    with pytest.MonkeyPatch.context() as patch:  # stopped in the middle: nothing is lost
        patch.setattr(make, "vae_quality", None)
        run_program = make.run_program
        patch.setattr(make, "run_program", lambda words: run_program(
            [*words, "--steps", "1"] if "vae" in words else words))
        assert make.main(flags) == 2
    assert "vae-0: stopped after step 1; the same command goes on from there" in capsys.readouterr().err
    assert make.main(flags) == 0
    out = capsys.readouterr().out
    assert "judge: made already" in out and "adapters: " in out
    notes = {name: json.loads((tmp_path / "work" / f"{name}.json").read_text()) for name in make.STAGES}
    assert notes["vae"]["samples"] == 4 and notes["vae"]["quality"]["dB"] > 0
    assert notes["t2i"]["quality"].keys() == make.quality.SETS.keys()

    monkeypatch.setattr(make, "run", lambda *args: pytest.fail("made again"))
    weights = tmp_path / "weights"
    assert make.main([*flags, "--install", "--weights", str(weights)]) == 0
    pipeline = Pipeline.load(weights / "tiny")
    pipeline.add_lora(weights / "adapters" / "sks-torus.safetensors")
    pipeline.add_embedding(weights / "adapters" / "ring.safetensors")
    pipeline.add_controlnet(weights / "adapters" / "edges")
    assert json.loads((weights / "made.json").read_text()) == notes


def test_nothing_is_installed_before_all_is_made(tmp_path, capsys):
    with pytest.raises(make.InputError, match="judge is not made yet"):
        make.install(tmp_path, tmp_path / "weights")
    assert not (tmp_path / "weights").exists()
