"""weights/make.py: the table of commands is right, and a whole toy run makes, skips, goes on and installs."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "weights"))
import make  # noqa: E402

from minipic.papers import find_adapter  # noqa: E402
from minipic.pipeline import Pipeline  # noqa: E402
from minipic.weights import read_weights  # noqa: E402


@pytest.mark.parametrize("size", make.SIZES)
@pytest.mark.parametrize("name", make.STAGES)
def test_every_command_is_one_of_train_py(name, size, tmp_path):
    """Flags and values are checked by the recipe's own settings."""
    for words in make.arguments(make.STAGES[name], size, tmp_path, tmp_path / "model"):
        config = make.settings_of(words)
        assert config.steps > 0 and Path(config.save).is_relative_to(tmp_path)


def test_the_plan_counts_samples(capsys, tmp_path):
    assert make.main(["--plan", "--size", "gpu", "t2i", "--work", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("t2i: 4,096,000 samples") and "python train.py t2i --from-nothing" in out
    for name in ("clip", "t2i"):
        gpu, cpu = (make.settings_of(make.arguments(make.STAGES[name], size, tmp_path, tmp_path)[-1])
                    for size in ("gpu", "cpu"))
        assert gpu.counts == 0.15 and cpu.counts == 0  # what the CPU's made is history
    assert not list(tmp_path.iterdir())


def test_an_unknown_stage_is_named(capsys):
    assert make.main(["unet"]) == 2
    stages = "judge, clip, vae, t2i, panels, adapters, onepic, mtu, mosaic, poster, onediffusion"
    assert capsys.readouterr().err == f"make.py: stage 'unet' is unknown; choose of {stages}\n"


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
    assert "judge: made already" in out and "adapters: " in out and "onediffusion: " in out
    assert not (tmp_path / "work" / "panels.json").exists()
    assert make.main([*flags, "panels"]) == 0
    note = json.loads((tmp_path / "work" / "panels.json").read_text())
    note["quality"]["gain"] = 0.0  # so that they are kept
    (tmp_path / "work" / "panels.json").write_text(json.dumps(note))
    capsys.readouterr()
    assert make.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    kept = [line.removesuffix(": made already") for line in lines if line.endswith(": made already")]
    assert kept == ["judge", "clip", "vae", "t2i"]  # the others build on another base now
    notes = {name: json.loads((tmp_path / "work" / f"{name}.json").read_text()) for name in make.STAGES}
    unets = {name: tmp_path / "work" / name / "unet" / "diffusion_pytorch_model.safetensors"
             for name in ("model", "panels")}
    assert notes["adapters"]["builds_on"] == {"base": make.sha256(unets["panels"])}
    assert notes["onepic"]["builds_on"] == notes["adapters"]["builds_on"]
    assert notes["panels"]["builds_on"] == {"t2i": make.sha256(unets["model"])} and notes["panels"]["samples"] == 4
    assert notes["vae"]["samples"] == 4 and notes["vae"]["quality"]["dB"] > 0
    assert notes["t2i"]["quality"].keys() == make.quality.SETS.keys()

    monkeypatch.setattr(make, "run", lambda *args: pytest.fail("made again"))
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "README.md").write_text(f"Before.\n{make.MARK}old\n{make.MARK}After.\n")
    assert make.main([*flags, "--install", "--weights", str(weights)]) == 0
    pipeline = Pipeline.load(weights / "tiny")
    pipeline.add_lora(weights / "adapters" / "sks-torus.safetensors")
    pipeline.add_embedding(weights / "adapters" / "ring.safetensors")
    pipeline.add_controlnet(weights / "adapters" / "edges")
    papers = [find_adapter(weights / "adapters" / name)[0] for name in make.adapters.SCORES]
    assert papers == ["onepic", "mtu", "indomain", "specialist", "onediffusion"]
    assert json.loads((weights / "made.json").read_text()) == notes
    lines = (weights / "README.md").read_text().splitlines()
    assert lines[0] == "Before." and lines[-1] == "After." and "old" not in lines
    assert [line.split(" | ")[0] for line in lines[4:-2]] == [f"| {name}" for name in make.STAGES]
    dB = f"dB {notes['vae']['quality']['dB']:.3g}"
    assert f"| vae | `train.py vae --save {{model}} --steps 2 --batch 2` | 4 | {notes['vae']['minutes']} | {dB} |" in lines[6]
    unets = [read_weights(folder / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"]
             for folder in (weights / "tiny", tmp_path / "work" / "panels", tmp_path / "work" / "model")]
    assert torch.equal(unets[0], unets[1]) and not torch.equal(unets[0], unets[2])


def test_panels_ship_only_if_ordinary_prompts_do_not_suffer(tmp_path):
    assert make.base_of(tmp_path) == ROOT / "weights" / "tiny"  # which ships, while none is made here
    made = tmp_path / "model" / make.UNET
    made.parent.mkdir(parents=True)
    made.write_bytes(b"first")
    assert make.base_of(tmp_path) == tmp_path / "model"
    before = make.builds_on("adapters", "toy", tmp_path)
    made.write_bytes(b"second")
    assert make.builds_on("adapters", "toy", tmp_path) != before  # adapters of the first are made again
    for gain, name in ((0.1, "panels"), (-0.02, "panels"), (-0.021, "model")):
        (tmp_path / "panels.json").write_text(json.dumps({"quality": {"gain": gain}}))
        assert make.base_of(tmp_path) == tmp_path / name
        words, *_ = make.arguments(make.STAGES["adapters"], "toy", tmp_path, make.base_of(tmp_path))
        assert words[words.index("--model") + 1] == str(tmp_path / name)


@pytest.mark.slow
def test_minutes_end_a_stage_with_what_it_has(tmp_path, monkeypatch, capsys):
    """Of two commands each has its share of the time; the samples noted are those that were trained on."""
    long = "judge --save {model} --batch 2 --pool 4 --steps "
    stage = make.Stage("model/judge/model.safetensors", {"toy": (long + "3000", long + "6000 --lr 1e-4")},
                       make.not_measured)
    monkeypatch.setattr(make, "STAGES", {"judge": stage})
    flags = ["--size", "toy", "--work", str(tmp_path)]
    assert make.main([*flags, "--minutes", "0.15"]) == 0
    row = json.loads((tmp_path / "judge.json").read_text())
    assert 0 < row["samples"] < 18000 and row["minutes_limit"] == 0.15 and 0.15 <= row["minutes"] < 5
    assert (tmp_path / stage.makes).exists()
    monkeypatch.setattr(make, "run", lambda words, folder, origin, processes, limit: pytest.fail(f"{limit}"))
    assert make.main([*flags, "--minutes", "0.15"]) == 0
    assert "judge: made already" in capsys.readouterr().out
    with pytest.raises(pytest.fail.Exception, match="0.0"):  # without the limit it is another thing
        make.main(flags)
    assert make.main([*flags, "--minutes", "-1"]) == 2
    assert capsys.readouterr().err == "make.py: --minutes: must be at least 0, not -1\n"


def test_a_readme_without_marks_is_left_alone(tmp_path):
    with pytest.raises(make.InputError, match="README.md needs two lines <!-- written by weights/make.py -->"):
        make.with_table("no marks", [])


def test_nothing_is_installed_before_it_is_made(tmp_path):
    with pytest.raises(make.InputError, match="t2i is not made yet"):
        make.install(tmp_path, tmp_path / "weights", ["t2i"])
    assert not (tmp_path / "weights").exists()
    with pytest.raises(make.InputError, match="panels needs t2i, which is not made yet"):
        make.builds_on("panels", "toy", tmp_path)


@pytest.mark.parametrize("name", ["vae", "panels"])
def test_parts_of_the_model_are_not_installed_alone(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make, "make", lambda *args: None)
    assert make.main([name, "--install", "--work", str(tmp_path), "--weights", str(tmp_path / "weights")]) == 2
    assert capsys.readouterr().err == (
        f"make.py: {name} ships with the whole model only; install t2i, or all stages\n")
    assert not (tmp_path / "weights").exists()


def test_one_adapter_is_installed_alone(tmp_path):
    """It takes its place beside what ships already, and its row among theirs."""
    work, weights = tmp_path / "work", tmp_path / "weights"
    (work / "adapters" / "poster").mkdir(parents=True)
    (work / "adapters" / "poster" / "lora.safetensors").write_bytes(b"new")
    row = {"commands": ["specialist"], "samples": 8, "minutes": 1.5, "quality": {"captions": 0.5}, "gpu": None,
           "cpu": "a CPU", "torch": "2", "date": "today"}
    make.write_note(work / "poster.json", row)
    make.write_note(weights / "made.json", {"mtu": row, "onediffusion": row})
    (weights / "README.md").write_text(make.MARK + make.MARK)
    make.install(work, weights, ["poster"])
    assert (weights / "adapters" / "poster" / "lora.safetensors").read_bytes() == b"new"
    assert list(json.loads((weights / "made.json").read_text())) == ["mtu", "poster", "onediffusion"]
    table = (weights / "README.md").read_text()
    assert "| poster | `train.py specialist` | 8 | 1.5 | captions 0.5 | a CPU, torch 2, today |" in table
