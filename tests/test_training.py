"""The training loop by value: its parts, one run, resuming bitwise, damaged checkpoints, NaN, wrong flags."""

import dataclasses
import importlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import peers
import pytest
import torch
import toy_recipe
from safetensors.torch import load_file
from toy_recipe import at, hashes, one_thread, toy

import train
from minipic import checkpoint, training
from minipic.common import InputError, computes_bf16
from minipic.image import loss_curve

pytestmark = pytest.mark.usefixtures("one_thread")


# Parts ------------------------------------------------------------------------------------------------------------

def test_learning_rate():
    config = toy_recipe.Recipe(steps=110, warmup=10, lr=2.0)
    def rate(step, schedule):
        return training.learning_rate(dataclasses.replace(config, schedule=schedule), step)
    for schedule in ("constant", "cosine", "linear"):
        assert [rate(step, schedule) for step in (0, 4, 9, 10)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert [rate(60, name) for name in ("constant", "cosine", "linear")] == pytest.approx([2.0, 1.0, 1.0])
    assert rate(35, "cosine") == pytest.approx(1 + math.cos(math.pi / 4))
    assert rate(35, "linear") == pytest.approx(1.5)
    assert rate(109, "linear") == pytest.approx(0.02)


def test_average_is_the_weighted_sum_of_the_past_and_is_fp32():
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    ema, expected = training.EMA({"p": p}, 0.5), 0.0
    for step in range(20):
        p.data.fill_(step)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert ema.values["p"].dtype == torch.float32
    assert ema.values["p"].tolist() == pytest.approx([expected] * 2, rel=1e-6)
    with ema.swapped_in():
        assert p.tolist() == pytest.approx([expected] * 2, rel=4e-3)  # bf16 keeps 8 bits
    assert p.tolist() == [19.0, 19.0]


def test_only_matrices_decay():
    params = {"matrix": torch.nn.Parameter(torch.ones(2, 2)), "bias": torch.nn.Parameter(torch.ones(2))}
    optimizer = training.optimizer_of(params, toy_recipe.Recipe(lr=0.1, weight_decay=0.5), {})
    for p in params.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert params["matrix"].flatten().tolist() == pytest.approx([0.95] * 4)
    assert params["bias"].tolist() == [1.0, 1.0]


def test_muon_is_pytorchs(monkeypatch):
    """Which computes in bf16 everywhere. What begins or ends a network, and what is no matrix, is AdamW's."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("PyTorch has it from 2.9 on")
    monkeypatch.setattr(training, "computes_bf16", lambda device: True)
    shapes = {"wide": (12, 40), "tall": (40, 12), "kernel": (8, 4, 3, 3), "conv_in.weight": (8, 4), "bias": (7,)}
    ours, theirs = ({name: torch.nn.Parameter(peers.numbers(shape, 1).float()) for name, shape in shapes.items()}
                    for _ in range(2))
    optimizer = training.optimizer_of(ours, toy_recipe.Recipe(lr=0.02, weight_decay=0.1, optimizer="muon"), {})
    flat = {name: torch.nn.Parameter(p.detach().flatten(1)) for name, p in list(theirs.items())[:3]}
    peer = [torch.optim.Muon(flat.values(), lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([theirs["conv_in.weight"]], lr=0.02, weight_decay=0.1),
            torch.optim.AdamW([theirs["bias"]], lr=0.02, weight_decay=0)]
    for step in range(5):
        for name, p in ours.items():
            p.grad = peers.numbers(p.shape, 10 + step).float()
            other = flat.get(name, theirs[name])
            other.grad = p.grad.view_as(other).clone()
        for one in (optimizer, *peer):
            one.step()
    for name, p in ours.items():
        assert peers.distance(p.view_as(flat.get(name, p)), flat.get(name, theirs[name])) < 2e-3, name


@pytest.mark.parametrize("shape", [(6, 6), (5, 30), (30, 5)])
def test_muon_steps_along_an_orthogonal_matrix(shape, monkeypatch):
    """The same singular vectors, and values that five steps bring near 1."""
    monkeypatch.setattr(training, "computes_bf16", lambda device: False)
    matrix = peers.numbers(shape, 3)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = left.mT @ training.orthogonal(matrix) @ right.mT
    assert (found - found.diag().diag()).abs().max() < 1e-9
    assert 0.6 < found.diag().min() and found.diag().max() < 1.3


@pytest.mark.parametrize("world, accumulate", [(1, 1), (2, 1), (1, 4), (2, 3)])
def test_processes_share_each_batch_out(world, accumulate):
    config = toy_recipe.Recipe(batch=24, accumulate=accumulate)
    parts = [micro for rank in range(world) for micro in training.share(config, 5, rank, world)]
    assert sorted(sum(parts, [])) == list(range(120, 144))
    assert len(parts) == world * accumulate and {len(part) for part in parts} == {24 // world // accumulate}


def test_clipping(tmp_path):
    for most in (0, 0.01):
        toy("--out", tmp_path / f"{most}", "--steps", 1, "--warmup", 0, "--clip", most, "--lr", 0)
    state = {most: load_file(at(tmp_path / f"{most}", 1) / "optimizer.safetensors") for most in (0, 0.01)}
    moments = {most: [v for name, v in values.items() if name.endswith("exp_avg")] for most, values in state.items()}
    norm = {most: math.sqrt(sum((v / 0.1).square().sum().item() for v in values))  # after a step, 0.1 x the gradient
            for most, values in moments.items()}
    assert norm[0] == pytest.approx(json.loads((tmp_path / "0/log.jsonl").read_text())["gradient_norm"], rel=1e-5)
    assert norm[0] > 0.1 and norm[0.01] == pytest.approx(0.01, rel=1e-4)


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(tmp_path):
    for precision in ("fp32", "bf16"):
        toy("--out", tmp_path / precision, "--steps", 1, "--precision", precision)
    one, other = (json.loads((tmp_path / name / "log.jsonl").read_text())["loss"] for name in ("fp32", "bf16"))
    assert one != other and one == pytest.approx(other, rel=0.02)
    assert {t.dtype for t in load_file(at(tmp_path / "bf16", 1) / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("fast", [True, False])
def test_left_out_the_precision_is_what_the_device_is_fast_in(tmp_path, monkeypatch, fast):
    monkeypatch.setattr(train, "computes_bf16", lambda device: fast)
    left_out = dataclasses.field(default=training.Recipe.precision, metadata={"help": "", "choices": ("fp32", "bf16")})
    recipe = dataclasses.make_dataclass("Recipe", [("precision", str, left_out)], bases=(toy_recipe.Recipe,))
    monkeypatch.setattr(toy_recipe, "Recipe", recipe)
    toy("--out", tmp_path, "--steps", 1)
    assert json.loads((at(tmp_path, 1) / "config.json").read_text())["precision"] == ("bf16" if fast else "fp32")


def test_a_cpu_computes_in_bf16_only_with_instructions_for_it(monkeypatch):
    for tile, avx in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tile)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
        assert computes_bf16(torch.device("cpu")) == (tile or avx)
    assert not computes_bf16(torch.device("mps"))


def test_curve_falls_with_the_loss():
    picture = loss_curve([{"step": step, "loss": 2.0 ** -step} for step in range(1, 50)])
    heights = [min(y for y in range(picture.height) if picture.getpixel((x, y)) == (0, 0, 128)) for x in (80, 300, 600)]
    assert heights[0] < heights[1] < heights[2]


# One run ----------------------------------------------------------------------------------------------------------

def test_training_learns_averages_draws_and_exports(tmp_path, capsys):
    assert toy("--out", tmp_path, "--steps", 300, "--lr", 0.02, "--sample-every", 100, "--save-every", 50) == 0
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 301))
    assert sum(row["loss"] for row in rows[-50:]) < 0.1 * sum(row["loss"] for row in rows[:50])
    assert {"size", "lr", "gradient_norm", "samples_per_s"} < rows[0].keys()
    assert [p.name for p in sorted((tmp_path / "samples").iterdir())] == [f"step-{s:06d}.png" for s in (100, 200, 300)]
    assert (tmp_path / "loss.png").exists()
    assert list(checkpoint.finished(tmp_path / "checkpoints")) == [250, 300]
    average, last = (load_file(at(tmp_path, 300) / f"{name}.safetensors") for name in ("ema", "model"))
    exported = json.loads((tmp_path / "model/student.json").read_text())
    assert torch.tensor(exported["0.weight"]).equal(average["student.0.weight"])
    assert not average["student.0.weight"].equal(last["student.0.weight"])
    assert "teacher.weight" not in last
    assert json.loads((at(tmp_path, 300) / "config.json").read_text())["lr"] == 0.02
    assert re.search(r"^lr +0.02$", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("accumulate, optimizer", [(1, "adamw"), (2, "adamw"), (1, "muon")])
def test_resumed_at_every_step_is_bitwise_the_uninterrupted_run(tmp_path, accumulate, optimizer):
    flags = ["--accumulate", accumulate, "--dropout", 0.3, "--optimizer", optimizer]
    assert toy("--out", tmp_path / "whole", "--save-every", 1, "--keep", 100, *flags) == 0
    for cut in range(1, 24):
        out = tmp_path / f"cut{cut}"
        assert toy("--out", out, "--resume", at(tmp_path / "whole", cut), *flags) == 0
        assert hashes(at(out, 24)) == hashes(at(tmp_path / "whole", 24)), cut
    assert len({*hashes(at(tmp_path / "whole", 24)), *hashes(at(tmp_path / "whole", 23))}) == 6  # they do differ
    assert load_file(at(out, 24) / "model.safetensors")["calls"].item() == 24 * accumulate


def test_log_continues_without_gap_or_repetition(tmp_path):
    toy("--out", tmp_path, "--steps", 20, "--save-every", 8)
    before = (tmp_path / "log.jsonl").read_text()
    shutil.rmtree(at(tmp_path, 20))
    (tmp_path / "log.jsonl").write_text(before + '{"step": 21, "lo')  # cut by a kill
    toy("--out", tmp_path, "--steps", 20, "--resume", "latest")
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["loss"] for row in rows] == [json.loads(line)["loss"] for line in before.splitlines()]


# Checkpoints ------------------------------------------------------------------------------------------------------

def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "model.safetensors does not match its sha256": lambda folder: flip(folder / "model.safetensors"),
    "ema.safetensors has 100 bytes instead of": lambda folder: os.truncate(folder / "ema.safetensors", 100),
    "optimizer.safetensors is missing": lambda folder: (folder / "optimizer.safetensors").unlink(),
    "manifest.json is missing": lambda folder: (folder / "manifest.json").unlink(),
    "manifest.json cannot be read": lambda folder: (folder / "manifest.json").write_text("{"),
}


@pytest.mark.parametrize("why", DAMAGE)
def test_latest_skips_what_is_damaged_and_says_why(tmp_path, capsys, why):
    toy("--out", tmp_path, "--save-every", 10, "--keep", 9)
    good = hashes(at(tmp_path, 24))
    DAMAGE[why](at(tmp_path, 24))
    at(tmp_path, 20).rename(at(tmp_path, 20).with_suffix(".tmp"))
    capsys.readouterr()
    assert toy("--out", tmp_path, "--resume", "latest") == 0
    lines = capsys.readouterr().out
    assert re.search(f"skipping .*step-000024: .*{why}", lines)
    assert re.search("skipping .*step-000020.tmp: unfinished", lines)
    assert re.search("going on from .*step-000010", lines)
    assert hashes(at(tmp_path, 24)) == good
    assert not list(tmp_path.glob("checkpoints/*.tmp"))


def test_never_starts_afresh_when_asked_to_go_on(tmp_path, capsys):
    assert toy("--out", tmp_path, "--resume", "latest") == 2
    assert "no usable checkpoint" in capsys.readouterr().err
    toy("--out", tmp_path)
    (at(tmp_path, 24) / "manifest.json").unlink()
    assert toy("--out", tmp_path, "--resume", "latest") == 2
    assert "no usable checkpoint" in capsys.readouterr().err
    assert toy("--out", tmp_path, "--resume", tmp_path / "nowhere") == 2
    assert "nowhere" in capsys.readouterr().err
    assert toy("--out", tmp_path, "--resume", at(tmp_path, 24)) == 2
    assert "manifest.json is missing" in capsys.readouterr().err
    assert at(tmp_path, 24).exists()


def test_two_runs_do_not_mix_and_that_is_known_before_data_is_prepared(tmp_path, capsys, monkeypatch):
    toy("--out", tmp_path / "a", "--save-every", 10, "--keep", 9)
    toy("--out", tmp_path / "b", "--steps", 5, "--schedule", "constant")
    prepared, data = [], toy_recipe.data
    monkeypatch.setattr(toy_recipe, "data", lambda *given: prepared.append(given) or data(*given))
    for flags, words in [
        (["--out", tmp_path / "a"], "already holds checkpoints"),
        (["--out", tmp_path / "a", "--resume", at(tmp_path / "a", 10)], "went on to"),
        (["--out", tmp_path / "b", "--resume", at(tmp_path / "a", 10)], "another run's checkpoints"),
        (["--out", tmp_path / "a", "--resume", "latest", "--lr", 0.5], "lr=0.001, not 0.5"),
        (["--out", tmp_path / "a", "--resume", "latest", "--ema", 0], "ema=0.9, not 0.0"),
        (["--out", tmp_path / "a", "--resume", "latest", "--steps", 7], "--steps 7 is less than"),
    ]:
        assert toy(*flags) == 2
        assert words in capsys.readouterr().err and not prepared
    assert toy("--out", tmp_path / "b", "--steps", 9, "--schedule", "constant", "--resume", "latest") == 0
    assert len(prepared) == 1


@pytest.mark.parametrize("flag", ["save", "out"])
def test_where_weights_cannot_go_is_known_before_anything_is_prepared(tmp_path, capsys, monkeypatch, flag):
    monkeypatch.setattr(toy_recipe, "build", None)
    (tmp_path / "file").touch()
    assert toy("--out", tmp_path / "run", f"--{flag}", tmp_path / "file") == 2
    assert f"--{flag} {tmp_path / 'file'}: cannot write there" in capsys.readouterr().err


def test_other_model_is_refused_by_name(tmp_path, capsys):
    toy("--out", tmp_path)
    at(tmp_path, 24).joinpath("model.safetensors").write_bytes((at(tmp_path, 24) / "ema.safetensors").read_bytes())
    config = toy_recipe.Recipe(out=str(tmp_path))
    run, _ = train.build(toy_recipe, config, torch.device("cpu"))
    with pytest.raises(InputError, match="model.safetensors does not fit .* 'calls'"):
        checkpoint.load(at(tmp_path, 24), run)


def test_all_of_a_resumed_optimizer_lies_beside_its_weights(tmp_path):
    """Fused AdamW on a GPU refuses a step count on the CPU; the meta device stands for the GPU."""
    toy("--out", tmp_path)
    run, _ = train.build(toy_recipe, toy_recipe.Recipe(out=str(tmp_path)), torch.device("meta"))
    checkpoint.load(at(tmp_path, 24), run)
    assert {value.device.type for state in run.optimizer.state.values() for value in state.values()} == {"meta"}


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path, capsys, kind):
    assert toy("--out", tmp_path, "--save-every", 5, "--accumulate", 2, f"--nan-{kind}", 13 * 8 + 6) == 2
    where = "samples 108 to 111" if kind == "loss" else "samples 104 to 111"
    assert re.search(f"the {kind} of step 14 is NaN or infinite, in {where}.* step 10 ", capsys.readouterr().err)
    assert list(checkpoint.finished(tmp_path / "checkpoints")) == [5, 10]
    assert all(t.isfinite().all() for t in load_file(at(tmp_path, 10) / "model.safetensors").values())


@pytest.mark.parametrize("precision, fsdp", [("bf16", False), ("bf16", True), ("fp32", False)])
def test_convolutions_train_channels_last_in_bf16_unless_they_are_sharded(monkeypatch, precision, fsdp):
    def build(config, plain=toy_recipe.build):
        model = plain(config)
        model.conv = torch.nn.Conv2d(2, 2, 3)
        return model
    monkeypatch.setattr(toy_recipe, "build", build)
    run, _ = train.build(toy_recipe, toy_recipe.Recipe(fsdp=fsdp, precision=precision), torch.device("cpu"))
    plain = fsdp or precision == "fp32"
    assert run.model.conv.weight.is_contiguous() == plain
    assert run.model.conv.weight.is_contiguous(memory_format=torch.channels_last) != plain


# Command line -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    (["toy", "--lr", "fast"], "--lr"), (["toy", "--steps", "1.5"], "--steps"), (["toy", "--step", "1"], "--step 1"),
    (["toy", "--schedule", "zigzag"], "zigzag"), (["toys"], "unknown recipe 'toys'"), (["toy", "--ema", "1"], "--ema"),
    (["toy", "--lr", "-1"], "--lr must be at least 0"), (["toy", "--lr", "nan"], "--lr: invalid float value: 'nan'"),
    (["toy", "--weight-decay", "-0.1"], "--weight-decay must be at least 0"),
    (["toy", "--seed", str(2**64)], f"--seed: invalid int value: '{2**64}'"),
    (["judge", "--pool", "0"], "--pool must be at least 1"), (["clip", "--scenes", "2"], "--scenes must be at least 4"),
    (["vae", "--kl-weight", "-1"], "--kl-weight must be at least 0"),
    (["dreambooth", "--data", "x", "--prior", "y", "--prior-pictures", "0"], "--prior-pictures must be at least 1"),
    (["inversion", "--data", "x", "--vectors", "0"], "--vectors must be at least 1"),
    (["toy", "--batch", "0"], "--batch must be at least 1"), (["toy", "--accumulate", "3"], "--accumulate 3"),
    (["toy", "--fsdp"], "--fsdp needs"), (["toy", "--checkpointing"], "recompute"),
    (["toy", "--fsdp", "--optimizer", "muon"], "--optimizer muon: needs whole matrices"), (["toy", "--clip", "nan"], "--clip"),
], ids=str)
def test_mistakes_get_one_sentence_and_exit_2(tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    assert train.main(flags) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_sharding_needs_a_pytorch_that_can_leave_parameters_out(tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(training.FSDPModule, "set_force_sum_reduction_for_comms")
    assert toy("--out", tmp_path, "--fsdp") == 2
    assert f"--fsdp needs PyTorch 2.8 or newer, and this is {torch.__version__}" in capsys.readouterr().err


def test_processes_are_those_that_torchrun_started(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as some clusters set it for every job
    assert toy("--out", tmp_path, "--steps", 1, "--schedule", "constant") == 0
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert toy("--out", tmp_path / "more") == 2
    assert "torchrun: --nproc_per_node must be at most 1, the GPUs here" in capsys.readouterr().err


@pytest.mark.parametrize("name", train.RECIPES)
def test_every_recipe_has_the_names_and_reads_its_settings(name):
    module = importlib.import_module(train.RECIPES[name])
    for function in ("build", "setup", "data", "loss", "sample", "export"):
        assert callable(getattr(module, function))
    loop = "".join(Path(m.__file__).read_text() for m in (train, training, checkpoint))
    used = [m for m in vars(module).values() if getattr(m, "__name__", "").startswith("minipic.methods.")]
    own = "".join(Path(m.__file__).read_text() for m in (module, *used) if hasattr(m, "__file__"))
    for field in dataclasses.fields(module.Recipe):
        assert field.metadata["help"], field.name
        inherited = field.name in training.Recipe.__dataclass_fields__
        read = re.search(rf"config\.{field.name}\b|settings\[.{field.name}.\]", own + loop * inherited)
        assert read, f"--{field.name} is parsed but never read"


def test_help_lists_recipes_and_flags(capsys):
    assert train.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in train.RECIPES:
        assert re.search(rf"^    {name} +\w.+", shown, re.M)
    with pytest.raises(SystemExit) as stop:
        train.main(["toy", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(toy_recipe.Recipe):
        assert "--" + field.name.replace("_", "-") in shown
