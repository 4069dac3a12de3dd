"""The training loop by value: its parts, one run, resuming bitwise, damaged checkpoints, NaN, wrong flags."""

import dataclasses
import importlib
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import toy_recipe
from PIL import Image
from safetensors.torch import load_file
from test_papers import CONTRACT, RECIPE_CONTRACT
from torch.distributed.fsdp import FSDPModule
from toy_recipe import at, hashes, one_thread, toy  # noqa: F401 - a fixture

import train
from minipic.common import InputError, computes_bf16
from minipic.figures import loss_curve
from minipic.papers import PAPERS
from minipic.training import checkpoint
from minipic.training.checkpoint import complete_checkpoints
from minipic.training.export import check_overwriting, clear_leftovers, exporting, owner_word
from minipic.training.flags import describe_field, from_argv, option
from minipic.training.lock import locked
from minipic.training.optimizer import EMA, build_optimizer, learning_rate, set_learning_rate
from minipic.training.processes import sample_indices
from minipic.training.run import Clock
from minipic.training.settings import DenoisingSettings, PairSettings, PhotoSettings, TrainSettings
from minipic.weights import save_weights

pytestmark = pytest.mark.usefixtures("one_thread")
MODULES = train.RECIPES | PAPERS


# Parts ------------------------------------------------------------------------------------------------------------

def test_learning_rate():
    config = toy_recipe.Settings(steps=110, warmup=10, lr=2.0)

    def rate(step, schedule):
        return learning_rate(dataclasses.replace(config, lr_schedule=schedule), step)

    for schedule in ("constant", "cosine", "linear"):
        assert [rate(step, schedule) for step in (0, 4, 9, 10)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert [rate(60, name) for name in ("constant", "cosine", "linear")] == pytest.approx([2.0, 1.0, 1.0])
    assert rate(35, "cosine") == pytest.approx(1 + math.cos(math.pi / 4))
    assert rate(35, "linear") == pytest.approx(1.5)
    assert rate(109, "linear") == pytest.approx(0.02)
    # With --minutes, what is nearer to its end counts; the warm-up goes by steps.
    linear = dataclasses.replace(config, lr_schedule="linear")
    assert [learning_rate(linear, 60, share) for share in (0.2, 0.75, 1.0)] == pytest.approx([1.0, 0.5, 0.0])
    assert learning_rate(linear, 4, 0.75) == pytest.approx(1.0)


def test_average_is_the_weighted_sum_of_the_past_and_is_fp32():
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    ema, expected = EMA({"p": p}, 0.5), 0.0
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


def test_all_averages_at_once_are_each_parameters_own():
    torch.manual_seed(0)
    params = {name: torch.nn.Parameter(torch.randn(shape).to(dtype)) for name, shape, dtype in (
        ("matrix", (7, 5), torch.float32), ("half", (3,), torch.bfloat16), ("number", (), torch.float32))}
    ema = EMA(params, 0.9)
    expected = {name: p.detach().float().clone() for name, p in params.items()}
    for step in range(30):
        for name, p in params.items():
            p.data.normal_()
            decay = min(0.9, (1 + step) / (10 + step))
            expected[name].lerp_(p.detach().float(), 1 - decay)
        ema.update(step)
    assert all(value.equal(expected[name]) for name, value in ema.values.items())


def test_nothing_waits_for_a_gpu_between_lines_of_the_log(tmp_path, monkeypatch):
    """A GPU is waited for where Python reads a number; here each time is noted with its step."""
    steps_read = []
    step_now = [-1]  # before the loop
    rate = train.learning_rate

    def rate_of_step(config, step, time_share):
        step_now[0] = step
        return rate(config, step, time_share)
    monkeypatch.setattr(train, "learning_rate", rate_of_step)
    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__"):
        def read(self, *given, plain=getattr(torch.Tensor, name)):
            steps_read.append(step_now[0])
            return plain(self, *given)
        monkeypatch.setattr(torch.Tensor, name, read)
    assert toy("--out", tmp_path, "--steps", 13, "--log-every", 4) == 0
    assert set(steps_read) - {-1} == {3, 7, 11, 12}


def test_only_matrices_decay():
    params = {"matrix": torch.nn.Parameter(torch.ones(2, 2)), "bias": torch.nn.Parameter(torch.ones(2))}
    adamw = build_optimizer(params, toy_recipe.Settings(lr=0.1, weight_decay=0.5), {})
    for p in params.values():
        p.grad = torch.zeros_like(p)
    adamw.step()
    assert params["matrix"].flatten().tolist() == pytest.approx([0.95] * 4)
    assert params["bias"].tolist() == [1.0, 1.0]


def test_a_weight_may_learn_at_a_multiple_of_the_rate():
    params = {name: torch.nn.Parameter(torch.ones(2, 2)) for name in ("slow", "fast")}
    adamw = build_optimizer(params, toy_recipe.Settings(lr=0.1, weight_decay=0.0), {"fast": 3.0})
    set_learning_rate(adamw, 0.01)
    for p in params.values():
        p.grad = torch.ones_like(p)
    adamw.step()  # AdamW's first step is the rate times the gradient's sign
    assert params["slow"].flatten().tolist() == pytest.approx([0.99] * 4)
    assert params["fast"].flatten().tolist() == pytest.approx([0.97] * 4)


@pytest.mark.parametrize("world, accumulate", [(1, 1), (2, 1), (1, 4), (2, 3)])
def test_processes_share_each_batch_out(world, accumulate):
    config = toy_recipe.Settings(batch=24, gradient_accumulation=accumulate)
    parts = [micro for rank in range(world) for micro in sample_indices(config, 5, rank, world)]
    assert sorted(sum(parts, [])) == list(range(120, 144))
    assert len(parts) == world * accumulate and {len(part) for part in parts} == {24 // world // accumulate}


def test_clipping(tmp_path):
    for most in (0, 0.01):
        toy("--out", tmp_path / f"{most}", "--steps", 1, "--warmup", 0, "--max-grad-norm", most, "--lr", 0)
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
    @dataclasses.dataclass
    class Settings(toy_recipe.Settings):
        precision: str = option(TrainSettings.precision)

    monkeypatch.setattr(train, "computes_bf16", lambda device: fast)
    monkeypatch.setattr(toy_recipe, "Settings", Settings)
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
    assert list(complete_checkpoints(tmp_path / "checkpoints")) == [250, 300]
    average, last = (load_file(at(tmp_path, 300) / f"{name}.safetensors") for name in ("ema", "model"))
    exported = json.loads((tmp_path / "model/student.json").read_text())
    assert torch.tensor(exported["0.weight"]).equal(average["student.0.weight"])
    assert not average["student.0.weight"].equal(last["student.0.weight"])
    assert "teacher.weight" not in last
    assert json.loads((at(tmp_path, 300) / "config.json").read_text())["lr"] == 0.02
    assert re.search(r"^lr +0.02$", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_at_every_step_is_bitwise_the_uninterrupted_run(tmp_path, accumulation):
    steps = 12
    flags = ["--steps", steps, "--gradient-accumulation", accumulation, "--dropout", 0.3]
    assert toy("--out", tmp_path / "whole", "--save-every", 1, "--keep", 100, *flags) == 0
    whole = hashes(at(tmp_path / "whole", steps))
    for cut in range(1, steps):
        out = tmp_path / f"cut{cut}"
        assert toy("--out", out, "--resume", at(tmp_path / "whole", cut), *flags) == 0
        assert hashes(at(out, steps)) == whole, cut
    assert len({*whole, *hashes(at(tmp_path / "whole", steps - 1))}) == 6  # they do differ
    assert load_file(at(out, steps) / "model.safetensors")["calls"].item() == steps * accumulation


def test_log_continues_without_gap_or_repetition(tmp_path):
    toy("--out", tmp_path, "--steps", 20, "--save-every", 8)
    before = (tmp_path / "log.jsonl").read_text()
    shutil.rmtree(at(tmp_path, 20))
    (tmp_path / "log.jsonl").write_text(before + '{"step": 21, "lo')  # cut by a kill
    toy("--out", tmp_path, "--steps", 20, "--resume", "latest")
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["loss"] for row in rows] == [json.loads(line)["loss"] for line in before.splitlines()]


def test_minutes_end_a_run_with_what_it_has(tmp_path, capsys):
    flags = ["--out", tmp_path, "--steps", 10 ** 6, "--slow", 0.01, "--lr-schedule", "linear", "--warmup", 1]
    assert toy(*flags, "--minutes", 0.02) == 0
    out = capsys.readouterr().out
    assert "--minutes 0.02: the learning rate follows the time, 0.00 have passed\n" in out
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = len(rows)
    assert 10 < steps < 120
    assert f"--minutes 0.02: the time is over after step {steps} of 1000000" in out
    shares = [row["time_share"] for row in rows]
    assert shares == sorted(shares) and shares[-1] == 1 and shares[-2] < 1
    # A step's rate is by the time at the end of the one before it.
    assert [row["lr"] for row in rows[1:]] == pytest.approx([1e-3 * (1 - share) for share in shares[:-1]])
    assert (tmp_path / "model/student.json").exists() and list(complete_checkpoints(tmp_path / "checkpoints")) == [steps]

    assert toy(*flags, "--minutes", 0.03, "--resume", "latest") == 0
    assert "--minutes 0.03: the learning rate follows the time, 0.02 have passed\n" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[steps]["lr"] == pytest.approx(1e-3 / 3, rel=0.1)  # two thirds of the time are over
    assert rows[-1]["time_share"] == 1 and steps + 5 < len(rows) < steps + 70

    assert toy(*flags, "--minutes", 0.03, "--resume", "latest") == 0  # only exports
    assert f"the time is over after step {len(rows)} of 1000000" in capsys.readouterr().out
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == len(rows)


def test_the_time_for_training_begins_when_the_data_are_ready(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def clock_after(preparing, source=None):
        clock = Clock(10.0, now[0])
        now[0] += 60 * preparing
        clock.start_training(source)
        return clock

    clock = clock_after(2)
    shares = []
    for _ in range(4):
        shares.append(clock.share())
        now[0] += 2 * 60
    assert shares == pytest.approx([0, 0.25, 0.5, 0.75])
    assert clock.share() == 1
    assert clock.times() == pytest.approx({"minutes_spent": 10, "minutes_trained": 8})
    now[0] -= 4 * 60
    (tmp_path / "config.json").write_text(json.dumps(clock.times()))  # stopped after 6 minutes, 4 of training
    clock = clock_after(1, tmp_path)
    assert clock.share() == pytest.approx(4 / 7)  # 3 minutes went for preparing
    now[0] += 3 * 60
    assert clock.share() == 1


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
    "manifest.json is of step 20": lambda folder: copy_manifest(at(folder.parents[1], 20), folder),
    "config.json is not in manifest.json": lambda folder: unlist(folder, "config.json"),
    "more.json is not in manifest.json": lambda folder: (folder / "more.json").touch(),
}


def copy_manifest(source, target):
    shutil.copy(source / "manifest.json", target / "manifest.json")


def unlist(folder, name):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"][name]
    (folder / "manifest.json").write_text(json.dumps(manifest))


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


def test_a_flipped_bit_of_a_manifest_is_seen(tmp_path):
    toy("--out", tmp_path, "--steps", 1, "--width", 1)
    manifest = at(tmp_path, 1) / "manifest.json"
    content = manifest.read_bytes()
    for bit in range(0, 8 * len(content), 7):  # every bit of a byte in turn
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(damaged)
        assert checkpoint.find_damage(at(tmp_path, 1)), bit
    manifest.write_bytes(content)
    assert checkpoint.find_damage(at(tmp_path, 1)) == ""


def test_what_a_kill_leaves_is_cleared_and_nothing_else(tmp_path):
    """Half-written files of this run go, with names that only it gives; what the user has put there stays."""
    flags = ["--out", tmp_path, "--save", tmp_path / "weights", "--sample-every", 12, "--save-every", 12]
    toy(*flags)
    word = owner_word(toy_recipe.Settings(out=str(tmp_path)))
    own = [f"weights/part-{word}/unet/part-7-x.safetensors", "part-12-log.jsonl", "part-3-loss.png",
           "samples/part-12-step-000012.png", "checkpoints/step-000012.tmp/part-9-model.safetensors",
           "checkpoints/step-000003.old.tmp/config.json"]
    others = ["part-time.txt", "part-1-holiday.png", "weights/part-one.txt", "weights/part-0123abcd/x.json",
              "checkpoints/step-by-step.tmp/notes.txt", "samples/part-5-mine.png"]
    for name in own + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    shutil.rmtree(at(tmp_path, 24))
    assert toy(*flags, "--resume", "latest") == 0
    assert not [name for name in own if (tmp_path / name).parent.exists() and (tmp_path / name).exists()]
    assert not (tmp_path / f"weights/part-{word}").exists() and not list(tmp_path.glob("checkpoints/step-0*.tmp"))
    assert all((tmp_path / name).exists() for name in others)


@pytest.mark.skipif(os.name == "nt", reason="needs named pipes")
def test_what_is_no_log_and_no_manifest_is_passed_over_and_not_waited_for(tmp_path, capsys):
    flags = ["--out", tmp_path, "--lr-schedule", "constant", "--save-every", 2]
    assert toy(*flags, "--steps", 4) == 0
    log = tmp_path / "log.jsonl"
    rows = log.read_bytes()
    log.write_bytes(b'\xff\xfe\0\n[1]\n3\n{"no": 1}\n{"step": "x", "loss": 1}\n{"step": 1}\nnull\n' + rows + b'{"step": 4, "lo')
    manifest = at(tmp_path, 4) / "manifest.json"
    manifest.unlink()
    os.mkfifo(manifest)
    assert toy(*flags, "--steps", 6, "--resume", "latest", "--sample-every", 6) == 0
    assert "step-000004: manifest.json cannot be read" in capsys.readouterr().out
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    log.unlink()
    os.mkfifo(log)
    assert toy(*flags, "--steps", 7, "--resume", "latest") == 2
    assert "log.jsonl is a named pipe; give an ordinary file" in capsys.readouterr().err


def test_a_second_run_in_a_folder_is_refused_and_changes_nothing(tmp_path, capsys):
    toy("--out", tmp_path, "--steps", 5, "--lr-schedule", "constant")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with locked(tmp_path):  # as a run does that is going on
        (tmp_path / "checkpoints/step-000009.tmp").mkdir()  # its checkpoint, half written
        assert toy("--out", tmp_path, "--steps", 9, "--lr-schedule", "constant", "--resume", "latest") == 2
        error = capsys.readouterr().err
        assert error.endswith(f"train.py: --out: {tmp_path}: another run is training there; wait for its end, or choose "
                         "another folder\n")
        assert (tmp_path / "checkpoints/step-000009.tmp").exists()
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert toy("--out", tmp_path, "--steps", 9, "--lr-schedule", "constant", "--resume", "latest") == 0
    assert not (tmp_path / "checkpoints/step-000009.tmp").exists()


def test_weights_of_others_are_replaced_only_when_asked(tmp_path, capsys, monkeypatch):
    weights = tmp_path / "weights/part/model.safetensors"
    weights.parent.mkdir(parents=True)

    def export(model, folder, config, data, plain=toy_recipe.export):
        plain(model, folder, config, data)
        save_weights(model.student.state_dict(), folder / "part/model.safetensors")

    monkeypatch.setattr(toy_recipe, "export", export)
    save_weights({"x": torch.zeros(1)}, weights)
    somebodys = weights.read_bytes()
    flags = ["--save", tmp_path / "weights", "--lr-schedule", "constant"]
    assert toy("--out", tmp_path / "one", *flags) == 2
    assert re.fullmatch(rf"train.py: --overwrite: needed to replace .*{weights}; add it, or .*\n", capsys.readouterr().err)
    assert weights.read_bytes() == somebodys and not list((tmp_path / "one").glob("checkpoints/*"))

    assert toy("--out", tmp_path / "one", *flags, "--overwrite") == 0
    first = weights.read_bytes()
    assert first != somebodys
    # Its own weights a run may replace, but not what has been put in their place.
    assert toy("--out", tmp_path / "one", *flags, "--steps", 30, "--resume", "latest") == 0
    assert weights.read_bytes() not in (first, somebodys)
    weights.write_bytes(somebodys)
    assert toy("--out", tmp_path / "one", *flags, "--steps", 40, "--resume", "latest") == 2
    assert toy("--out", tmp_path / "two", *flags) == 2
    assert weights.read_bytes() == somebodys


def config_of(folder, out):
    return toy_recipe.Settings(out=str(folder / out), save=str(folder / "weights"))


def test_of_two_runs_with_one_folder_of_weights_the_later_one_is_refused(tmp_path, capsys, monkeypatch):
    """Though there was nothing yet when it began. It has its checkpoint, and can save elsewhere."""
    def export(model, folder, config, data):
        save_weights(model.student.state_dict(), folder / "lora.safetensors")

    def sample(model, config, data):
        with exporting(config_of(tmp_path, "one")) as folder:  # another run ends meanwhile
            save_weights({"x": torch.zeros(1)}, folder / "lora.safetensors")
        return Image.new("L", (8, 8))

    monkeypatch.setattr(toy_recipe, "export", export)
    monkeypatch.setattr(toy_recipe, "sample", sample)
    flags = ["--out", tmp_path / "two", "--lr-schedule", "constant", "--sample-every", 24]
    (tmp_path / "one").mkdir()
    (tmp_path / "weights").mkdir()
    assert toy(*flags, "--save", tmp_path / "weights") == 2
    assert "--overwrite: needed to replace what this run has not made" in capsys.readouterr().err
    assert load_file(tmp_path / "weights/lora.safetensors").keys() == {"x"}
    assert toy(*flags, "--save", tmp_path / "elsewhere", "--resume", "latest") == 0
    assert (tmp_path / "elsewhere/lora.safetensors").exists()


def test_while_one_run_saves_its_weights_another_waits(tmp_path):
    for name in ("one", "two", "weights"):
        (tmp_path / name).mkdir()
    events = []

    def other():
        clear_leftovers(config_of(tmp_path, "two"))
        events.append("other")

    with exporting(config_of(tmp_path, "one")) as folder:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        save_weights({"x": torch.zeros(1)}, folder / "lora.safetensors")
        events.append("one")
    thread.join()
    assert events == ["one", "other"]


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_weights_that_git_tracks_are_replaced_only_when_asked(tmp_path, capsys):
    config = toy_recipe.Settings(out=str(tmp_path / "run"), save=str(tmp_path / "weights"))
    with exporting(config) as folder:
        save_weights({"x": torch.zeros(1)}, folder / "lora.safetensors")
    check_overwriting(config)  # its own
    for words in (["init", "-q"], ["add", "weights"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    with pytest.raises(InputError, match="overwrite: needed to replace what git tracks, such as .*lora.safetensors"):
        check_overwriting(config)
    check_overwriting(dataclasses.replace(config, overwrite=True))


@pytest.mark.parametrize("variable, threads", [(None, [1]), ("4", [])])
def test_a_small_model_is_trained_by_one_thread(tmp_path, monkeypatch, variable, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    assert toy("--out", tmp_path / "a", "--steps", 1, "--lr-schedule", "constant") == 0
    assert chosen == threads
    monkeypatch.setattr("minipic.common.SMALL_MODEL", 10)  # bytes
    assert toy("--out", tmp_path / "b", "--steps", 1, "--lr-schedule", "constant") == 0
    assert chosen == threads


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
    toy("--out", tmp_path / "b", "--steps", 5, "--lr-schedule", "constant")
    prepared, data = [], toy_recipe.data
    monkeypatch.setattr(toy_recipe, "data", lambda *given: prepared.append(given) or data(*given))
    for flags, words in [
        (["--out", tmp_path / "a"], "already holds checkpoints"),
        (["--out", tmp_path / "a", "--resume", at(tmp_path / "a", 10)], "went on to"),
        (["--out", tmp_path / "b", "--resume", at(tmp_path / "a", 10)], "another run's checkpoints"),
        (["--out", tmp_path / "a", "--resume", "latest", "--lr", 0.5], "lr=0.001, not 0.5"),
        (["--out", tmp_path / "a", "--resume", "latest", "--ema", 0], "ema=0.9, not 0.0"),
        (["--out", tmp_path / "a", "--resume", "latest", "--steps", 7], "--steps: 7 is less than"),
    ]:
        assert toy(*flags) == 2
        assert words in capsys.readouterr().err and not prepared
    assert toy("--out", tmp_path / "b", "--steps", 9, "--lr-schedule", "constant", "--resume", "latest") == 0
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
    config = toy_recipe.Settings(out=str(tmp_path))
    run, _ = train.build(toy_recipe, config, torch.device("cpu"))
    with pytest.raises(InputError, match="model.safetensors does not fit .* 'calls'"):
        checkpoint.load_checkpoint(at(tmp_path, 24), run)


def test_all_of_a_resumed_optimizer_lies_beside_its_weights(tmp_path):
    """Fused AdamW on a GPU refuses a step count on the CPU; the meta device stands for the GPU."""
    toy("--out", tmp_path)
    run, _ = train.build(toy_recipe, toy_recipe.Settings(out=str(tmp_path)), torch.device("meta"))
    checkpoint.load_checkpoint(at(tmp_path, 24), run)
    assert {value.device.type for state in run.optimizer.state.values() for value in state.values()} == {"meta"}


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path, capsys, kind):
    assert toy("--out", tmp_path, "--save-every", 5, "--gradient-accumulation", 2, f"--nan-{kind}", 13 * 8 + 6) == 2
    where = "samples 108 to 111" if kind == "loss" else "samples 104 to 111"
    assert re.search(f"the {kind} of step 14 is NaN or infinite, in {where}.* step 10 ", capsys.readouterr().err)
    assert list(complete_checkpoints(tmp_path / "checkpoints")) == [5, 10]
    assert all(t.isfinite().all() for t in load_file(at(tmp_path, 10) / "model.safetensors").values())


@pytest.mark.parametrize("precision, fsdp", [("bf16", False), ("bf16", True), ("fp32", False)])
def test_convolutions_train_channels_last_in_bf16_unless_they_are_sharded(monkeypatch, precision, fsdp):
    def build(config, plain=toy_recipe.build):
        model = plain(config)
        model.conv = torch.nn.Conv2d(2, 2, 3)
        return model
    monkeypatch.setattr(toy_recipe, "build", build)
    run, _ = train.build(toy_recipe, toy_recipe.Settings(fsdp=fsdp, precision=precision), torch.device("cpu"))
    plain = fsdp or precision == "fp32"
    assert run.model.conv.weight.is_contiguous() == plain
    assert run.model.conv.weight.is_contiguous(memory_format=torch.channels_last) != plain


# Command line -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    ("toys", "unknown recipe 'toys'"),
    ("toy --lr fast", "--lr: invalid float value: 'fast'"),
    ("toy --lr nan", "--lr: invalid float value: 'nan'"),
    ("toy --lr -1", "--lr: must be at least 0, not -1.0"),
    ("toy --steps 1.5", "--steps: invalid int value: '1.5'"),
    ("toy --step 1", "--step: no such flag; did you mean --steps?"),
    (f"toy --seed {2**64}", f"--seed: {2**64} is too large; choose below {2**63}"),
    ("toy --out=", "--out: is empty; name a value or leave it out"),
    ("t2i --data=", "--data: is empty; name a value or leave it out"),
    ("toy --out \udce9", "--out: \\udce9 is not UTF-8; choose another name or text"),
    ("inversion --data x --word \udce9", "--word: \\udce9 is not UTF-8"),
    ("toy --seed -1", "--seed: must be at least 0, not -1"),
    ("toy --lr-schedule zigzag", "--lr-schedule: invalid choice: 'zigzag'"),
    ("toy --ema 1", "--ema: must be below 1, not 1.0"),
    ("toy --weight-decay -0.1", "--weight-decay: must be at least 0"),
    ("toy --max-grad-norm nan", "--max-grad-norm: invalid float value: 'nan'"),
    ("toy --batch 0", "--batch: must be at least 1"),
    ("toy --gradient-accumulation 3",
     "--batch: 8 does not divide into 3 parts (gradient_accumulation) on 1 process(es); choose a multiple of 3"),
    ("toy --gradient-checkpointing", "--gradient-checkpointing: this recipe's model cannot recompute"),
    ("toy --fsdp", "--fsdp: needs processes; start with torchrun"),
    ("judge --pool 0", "--pool: must be at least 1"),
    ("clip --scenes 2", "--scenes: must be at least 4"),
    ("vae --kl-weight -1", "--kl-weight: must be at least 0"),
    ("dreambooth --data x --class-prompt y --num-class-images 0", "--num-class-images: must be at least 1"),
    ("inversion --data x --num-vectors 0", "--num-vectors: must be at least 1"),
])
def test_mistakes_get_one_sentence_and_exit_2(tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    assert train.main(flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: ") and words in error and error.count("\n") == 1
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {".lock", ".saving"}


@pytest.mark.parametrize("flag, right", [
    ("--learning_rate", "--lr"), ("--learning-rate", "--lr"), ("--train_batch_size", "--batch"),
    ("--output_dir", "--out"), ("--drop", "--caption-dropout"), ("--side", "--resolution"),
    ("--accumulate", "--gradient-accumulation"), ("--clip", "--max-grad-norm"), ("--rank", "--lora-rank"),
    ("--batchs", "--batch"), ("--lora_rank", "--lora-rank"),
    ("--unet_lr", "--lr"), ("--checkpoints_total_limit", "--keep"), ("--train_text_encoder", "--train-text"),
])
@pytest.mark.parametrize("form", ["{} 4", "{}=4"])
def test_a_wrong_flag_suggests_the_right_one(tmp_path, capsys, monkeypatch, flag, right, form):
    monkeypatch.chdir(tmp_path)
    assert train.main(["t2i", "--steps", "1", *form.format(flag).split()]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"train.py: {flag}(=4)?: no such flag; did you mean {right}\? .*\n", error)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("flag, answer", [
    ("--no-fsdp", None), ("--no-overwrite", None), ("--fsdp", "--fsdp: needs processes"),
    ("--no-overwrit", "did you mean --no-overwrite?"), ("--no-checkpointing", "did you mean --no-gradient-checkpointing?"),
    ("--no-seed", "--no-seed: no such flag; --help"), ("--no-warmup", "--no-warmup: no such flag; --help"),
    ("--no_half_vae", "--no_half_vae: no such flag; --help"), ("--fsdq", "did you mean --fsdp?")])
def test_a_switch_has_its_negative_and_no_flag_is_answered_with_its_opposite(tmp_path, capsys, flag, answer):
    assert toy("--out", tmp_path, "--steps", 1, "--lr-schedule", "constant", flag) == (2 if answer else 0)
    if answer:
        assert answer in capsys.readouterr().err


def test_the_last_of_a_switch_and_its_negative_counts():
    for words, value in (([], False), (["--fsdp"], True), (["--no-fsdp"], False), (["--fsdp", "--no-fsdp"], False)):
        assert from_argv(toy_recipe.Settings, words, "program").fsdp is value


def test_sharding_needs_a_pytorch_that_can_leave_parameters_out(tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(FSDPModule, "set_force_sum_reduction_for_comms")
    assert toy("--out", tmp_path, "--fsdp") == 2
    assert f"--fsdp: needs PyTorch 2.8 or newer, and this is {torch.__version__}" in capsys.readouterr().err


def test_processes_are_those_that_torchrun_started(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as some clusters set it for every job
    assert toy("--out", tmp_path, "--steps", 1, "--lr-schedule", "constant") == 0
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert toy("--out", tmp_path / "more") == 2
    assert "torchrun: --nproc_per_node must be at most 1, the GPUs here" in capsys.readouterr().err


# What holds for every recipe and every paper ----------------------------------------------------------------------

@pytest.mark.parametrize("name", MODULES)
def test_every_recipe_has_the_names_of_the_contract(name):
    module = importlib.import_module(MODULES[name])
    parameters = CONTRACT if name in PAPERS else RECIPE_CONTRACT
    if name in PAPERS:
        assert dataclasses.is_dataclass(module.DrawOptions)
    if hasattr(module, "lr_scale"):
        parameters = parameters | {"lr_scale": ["config"]}
    for function, names in parameters.items():
        inspect.signature(getattr(module, function)).bind(*names)  # TypeError if it takes fewer or more
    assert issubclass(module.Settings, TrainSettings)


@pytest.mark.parametrize("name", MODULES)
def test_every_setting_is_described_and_read(name):
    """A setting is read by the recipe, by what it shares with others, or by the loop where all recipes have it."""
    module = importlib.import_module(MODULES[name])
    own = {module}
    for value in vars(module).values():
        owner = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None) or ""
        if owner.startswith("minipic.recipes.") or owner == "minipic.latents":
            own.add(sys.modules[owner])
    own_text = "".join(Path(file.__file__).read_text() for file in own)
    loop_files = [Path(train.__file__), *Path(checkpoint.__file__).parent.glob("*.py")]
    loop_text = "".join(path.read_text() for path in loop_files)
    for field in dataclasses.fields(module.Settings):
        about = describe_field(module.Settings, field.name)
        assert about["help"] and not about["help"].endswith("."), field.name
        is_everyones = field.name in TrainSettings.__dataclass_fields__
        text = own_text + loop_text if is_everyones else own_text
        read = re.search(rf"config\.{field.name}\b|settings\[.{field.name}.\]", text)
        assert read, f"--{field.name} is parsed but never read"


@pytest.mark.parametrize("name", MODULES)
def test_help_fits_a_terminal_and_lists_every_flag(capsys, name):
    with pytest.raises(SystemExit) as stop:
        train.main([name, "--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    flags = {match[1] for match in map(re.compile(r"  (--[a-z0-9-]+)").match, lines) if match}
    fields = dataclasses.fields(importlib.import_module(MODULES[name]).Settings)
    assert flags == {"--" + field.name.replace("_", "-") for field in fields}
    words = " ".join(" ".join(lines).split())
    for field in fields:
        assert describe_field(importlib.import_module(MODULES[name]).Settings, field.name)["help"] in words


def test_help_lists_recipes_and_papers(capsys):
    assert train.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in MODULES:
        assert re.search(rf"^    {name} +\w.+", text, re.M)
    assert train.main([]) == 0 and capsys.readouterr().out == text


# Settings and flags -----------------------------------------------------------------------------------------------

def test_a_field_that_changes_only_its_default_keeps_the_rest():
    @dataclasses.dataclass
    class Base:
        kind: str = option("round", "its form", ("round", "square"), group="form")
        count: int = option(1, "how many", group="form")

    @dataclasses.dataclass
    class Changed(Base):
        kind: str = option("square")
        count: int = option(2, "how many at once")

    assert describe_field(Changed, "kind") == {"help": "its form", "choices": ("round", "square"), "group": "form",
                                              "limit": None}
    assert describe_field(Changed, "count") == {"help": "how many at once", "choices": None, "group": "form",
                                               "limit": None}
    assert from_argv(Changed, [], "program") == Changed("square", 2)
    assert from_argv(Changed, ["--kind", "round", "--count=3"], "program") == Changed("round", 3)
    with pytest.raises(InputError, match="--kind: invalid choice: 'flat'"):
        from_argv(Changed, ["--kind", "flat"], "program")


@pytest.mark.parametrize("name", MODULES)
def test_inherited_settings_keep_their_choices_and_their_group(name):
    cls = importlib.import_module(MODULES[name]).Settings
    for base in (TrainSettings, DenoisingSettings, PhotoSettings, PairSettings):
        if not issubclass(cls, base):
            continue
        for field in dataclasses.fields(base):
            inherited, about = describe_field(base, field.name), describe_field(cls, field.name)
            assert inherited["group"] and about["group"] == inherited["group"]
            assert about["choices"] == inherited["choices"]


def test_a_checkpoint_with_the_earlier_names_of_settings_goes_on(tmp_path):
    saved = {"recipe": "t2i", "clip": 0.5, "drop": 0.1, "side": 64, "accumulate": 2, "lr": 1e-3, "cache": ""}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    (tmp_path / "manifest.json").write_text(json.dumps({"step": 3, "files": {}}))
    settings = {"recipe": "t2i", "max_grad_norm": 0.5, "caption_dropout": 0.1, "resolution": 64, "lr": 1e-3, "steps": 9}
    checkpoint.check_settings(tmp_path, settings)
    with pytest.raises(InputError, match="max_grad_norm=0.5, not 1.0"):
        checkpoint.check_settings(tmp_path, settings | {"max_grad_norm": 1.0})
