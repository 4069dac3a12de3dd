"""The loop in processes of its own: signals, a full disk, and two processes that train what one does."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import toy_recipe
from toy_recipe import apart, at, finish, hashes, one_thread, processes, toy, until

import train
from minipic import checkpoint, training
from minipic.pipeline import Pipeline

ROOT = Path(__file__).parents[1]
FSDP = ["--fsdp"] if hasattr(training.FSDPModule, "set_force_sum_reduction_for_comms") else []  # PyTorch 2.8
pytestmark = pytest.mark.usefixtures("one_thread")


def test_full_disk_keeps_the_old_checkpoint(tmp_path):
    flags = ["--out", tmp_path / "run", "--width", 801, "--save-every", 10, "--log-every", 100]
    assert toy(*flags, "--steps", 10, "--schedule", "constant") == 0
    before = hashes(at(tmp_path / "run", 10))
    run = processes([*flags, "--schedule", "constant", "--resume", "latest"], tmp_path / "said", limit=30_000)
    assert finish(run) == [2]
    said = (tmp_path / "said").read_text().splitlines()[-1]
    assert re.search(r"cannot write .*step-000020 \([\d,]+ bytes\): .*File too large.*--resume latest", said)
    assert "Traceback" not in (tmp_path / "said").read_text()
    assert checkpoint.damage(at(tmp_path / "run", 10)) == "" and hashes(at(tmp_path / "run", 10)) == before
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000010"]


def test_full_disk_in_the_log_is_one_sentence(tmp_path):
    run = processes(["--out", tmp_path / "run", "--steps", 99], tmp_path / "said", limit=3000)
    assert finish(run) == [2]
    assert "train.py: [Errno 27] File too large; make room" in (tmp_path / "said").read_text()
    assert "Traceback" not in (tmp_path / "said").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_step_saves_and_exits_0(tmp_path, number):
    flags = ["--steps", 10 ** 6, "--schedule", "constant", "--slow", 0.01]
    run = processes(["--out", tmp_path / "run", *flags], tmp_path / "said")
    until(lambda: (tmp_path / "run/log.jsonl").exists() and (tmp_path / "run/log.jsonl").stat().st_size > 500)
    os.kill(run[0].pid, number)
    assert finish(run) == [0]
    (step, folder), = checkpoint.finished(tmp_path / "run/checkpoints").items()
    assert f"stopped by {number.name} after step {step}, saved" in (tmp_path / "said").read_text()
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == step
    assert toy("--out", tmp_path / "whole", "--schedule", "constant", "--slow", 0.01, "--steps", step) == 0
    assert hashes(folder) == hashes(at(tmp_path / "whole", step))


def test_second_signal_stops_at_once(tmp_path):
    run = processes(["--out", tmp_path / "run", "--slow", 30], tmp_path / "said")
    until(lambda: (tmp_path / "run/log.jsonl").exists())
    os.kill(run[0].pid, signal.SIGINT)
    time.sleep(1.2)  # a repeat within a second counts as the first
    os.kill(run[0].pid, signal.SIGINT)
    run[0].join(10)
    assert run[0].exitcode == 128 + signal.SIGINT


@pytest.mark.parametrize("flags", [[], ["--accumulate", 2], FSDP, [*FSDP, "--accumulate", 2]], ids=str)
def test_two_processes_train_what_one_does(tmp_path, flags):
    common = ["--save-every", 12, "--sample-every", 12]
    assert toy("--out", tmp_path / "one", *common) == 0
    run = processes(["--out", tmp_path / "two", *common, *flags], tmp_path / "said", world=2)
    assert finish(run) == [0, 0], (tmp_path / "said").read_text()
    assert apart(at(tmp_path / "one", 24), at(tmp_path / "two", 24)) < 1e-6
    assert json.loads((tmp_path / "two/model/student.json").read_text()).keys() == {
        "0.weight", "0.bias", "3.weight", "3.bias", "4.weight", "4.bias"}
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("one", "two")]
    for one, two in zip(*logs, strict=True):
        for key in ("loss", "size", "gradient_norm"):
            assert one[key] == pytest.approx(two[key], abs=1e-5), (key, one["step"])

    # A checkpoint of two processes resumes on one, and of one on two.
    assert toy("--out", tmp_path / "two-one", "--resume", at(tmp_path / "two", 12)) == 0
    assert apart(at(tmp_path / "one", 24), at(tmp_path / "two-one", 24)) < 1e-6
    run = processes(["--out", tmp_path / "one-two", "--resume", at(tmp_path / "one", 12), *flags], tmp_path / "s", 2)
    assert finish(run) == [0, 0], (tmp_path / "s").read_text()
    assert apart(at(tmp_path / "one", 24), at(tmp_path / "one-two", 24)) < 1e-6


def test_torchrun_shards_a_real_model_and_it_is_drawn_from_and_saved_whole(tmp_path):
    """What other tests leave to the toy: a pipeline of several networks, some frozen, written in the official layout."""
    flags = ["t2i", "--model", str(tiny.folder()), "--steps", "1", "--batch", "2", "--scenes", "4", "--warmup", "1",
             "--precision", "fp32", "--sample-every"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    done = subprocess.run([*command, *flags, "1", *FSDP, "--out", tmp_path / "two"], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert train.main([*flags, "0", "--out", str(tmp_path / "one")]) == 0
    one, two, before = (Pipeline.load(path).state_dict() for path in (
        tmp_path / "one/model", tmp_path / "two/model", tiny.folder()))
    difference, learnt = (sum((x - state[name]).abs().sum() for name, x in one.items()) for state in (two, before))
    assert difference < 0.01 * learnt  # not for every weight: by the sign of a gradient of nearly 0 AdamW's first step goes
    assert all(torch.equal(x, two[name]) and torch.equal(x, before[name].half().float())
               for name, x in one.items() if not name.startswith("unet"))
    assert (tmp_path / "two/samples/step-000001.png").exists()


@pytest.mark.skipif(not FSDP, reason="needs PyTorch 2.8")
def test_blocks_are_sharded_one_by_one_and_whole_while_gathered(monkeypatch):
    """In one process, which holds all shards: which modules FSDP gathers by themselves, and the same numbers after."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    model, x = tiny.build().requires_grad_(False), torch.ones(1, 4, 16, 16)
    model.unet.requires_grad_(True)
    given = 500, torch.ones(1, 77, 40), torch.ones(1, 20), torch.ones(1, 6)
    before, names = model.unet(x, *given), set(model.state_dict())
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        loss = training.distribute(training.Loss(model, None, None), toy_recipe.Recipe(fsdp=True))
        assert {module for module in loss.modules() if isinstance(module, training.FSDPModule)} == {
            loss, *(module for module in model.unet.modules() if isinstance(module, training.BLOCKS))}
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with checkpoint.gathered(model, params, True), torch.no_grad():
            torch.testing.assert_close(model.unet(x, *given), before, rtol=1e-5, atol=1e-5)
            assert {type(value) for value in model.state_dict().values()} == {torch.Tensor}
        assert all(p is params[name] for name, p in model.named_parameters() if name in params)
        loss.loss = lambda model, batch, config: model.unet(x, *given).square().mean()
        assert loss(None)[0].item() == pytest.approx(before.square().mean().item(), rel=1e-5)
        assert set(model.state_dict()) == names
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_resume_bitwise_and_stop_together(tmp_path):
    flags = ["--steps", 10 ** 6, "--schedule", "constant", "--slow", 0.01, *FSDP]
    run = processes(["--out", tmp_path / "run", *flags], tmp_path / "said", world=2)
    until(lambda: (tmp_path / "run/log.jsonl").exists() and (tmp_path / "run/log.jsonl").stat().st_size > 500)
    os.kill(run[1].pid, signal.SIGTERM)  # only one of them hears it
    assert finish(run) == [0, 0]
    (step, _), = checkpoint.finished(tmp_path / "run/checkpoints").items()
    assert f"stopped by a signal after step {step}" in (tmp_path / "said").read_text()
    flags[1] = step + 5
    run = processes(["--out", tmp_path / "run", *flags, "--resume", "latest"], tmp_path / "said", world=2)
    assert finish(run) == [0, 0], (tmp_path / "said").read_text()
    run = processes(["--out", tmp_path / "whole", *flags], tmp_path / "said", world=2)
    assert finish(run) == [0, 0]
    assert hashes(at(tmp_path / "run", step + 5)) == hashes(at(tmp_path / "whole", step + 5))


def test_nan_in_another_process_names_its_samples(tmp_path):
    run = processes(["--out", tmp_path / "run", "--nan-loss", 5 * 8 + 6], tmp_path / "said", world=2)
    assert finish(run) == [2, 2]
    assert "the loss of step 6 is NaN or infinite, in samples 44 to 47" in (tmp_path / "said").read_text()
