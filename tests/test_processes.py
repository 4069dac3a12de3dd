"""The loop in processes of its own: signals, a full disk, and two processes that train what one does."""

import io
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
from torch.distributed.fsdp import FSDPModule
from toy_recipe import (  # noqa: F401 - a fixture
    apart, at, finish, hashes, one_thread, start_toys, start_training, toy, until)

import train
from minipic.layers.blocks import ResnetBlock
from minipic.models.unet import SD15, SDXL_BASE, TransformerBlock, UNet, UNetConfig
from minipic.pipeline import Pipeline
from minipic.training.checkpoint import complete_checkpoints, find_damage
from minipic.training.fsdp import blocks_to_shard, whole_parameters
from minipic.training.processes import Loss, distribute
from minipic.training.run import lasting_output
from minipic.weights.layouts import build_empty

ROOT = Path(__file__).parents[1]
FSDP = ["--fsdp"] if hasattr(FSDPModule, "set_force_sum_reduction_for_comms") else []  # PyTorch 2.8
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_full_disk_keeps_the_old_checkpoint(tmp_path):
    flags = ["--out", tmp_path / "run", "--width", 801, "--save-every", 10, "--log-every", 100]
    assert toy(*flags, "--steps", 10, "--lr-schedule", "constant") == 0
    before = hashes(at(tmp_path / "run", 10))
    run = start_toys([*flags, "--lr-schedule", "constant", "--resume", "latest"], tmp_path / "said", limit=30_000)
    assert finish(run) == [2]
    said = (tmp_path / "said").read_text().splitlines()[-1]
    assert re.search(r"cannot write .*step-000020 \([\d,]+ bytes\): .*File too large.*resume the latest", said)
    assert "Traceback" not in (tmp_path / "said").read_text()
    assert find_damage(at(tmp_path / "run", 10)) == "" and hashes(at(tmp_path / "run", 10)) == before
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000010"]


def test_full_disk_in_the_log_is_one_sentence(tmp_path):
    run = start_toys(["--out", tmp_path / "run", "--steps", 99], tmp_path / "said", limit=3000)
    assert finish(run) == [2]
    assert "train.py: [Errno 27] File too large; make room" in (tmp_path / "said").read_text()
    assert "Traceback" not in (tmp_path / "said").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_step_saves_and_exits_0(tmp_path, number):
    flags = ["--steps", 10 ** 6, "--lr-schedule", "constant", "--slow", 0.01]
    run = start_toys(["--out", tmp_path / "run", *flags], tmp_path / "said")
    until(lambda: (tmp_path / "run/log.jsonl").exists() and (tmp_path / "run/log.jsonl").stat().st_size > 500)
    os.kill(run[0].pid, number)
    assert finish(run) == [0]
    (step, folder), = complete_checkpoints(tmp_path / "run/checkpoints").items()
    assert f"stopped by {number.name} after step {step}, saved" in (tmp_path / "said").read_text()
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == step
    assert toy("--out", tmp_path / "whole", "--lr-schedule", "constant", "--slow", 0.01, "--steps", step) == 0
    assert hashes(folder) == hashes(at(tmp_path / "whole", step))


def start_slow_toys(flags, folder, where):
    """A process that has come to this place, where it stays for 30 seconds: sample 29 is in step 4."""
    (folder / "run").mkdir()
    (folder / f"run/slow-{where}").touch()
    run = start_toys(flags, folder / "said")
    until(lambda: (folder / "said").exists() and f"waiting in {where}" in (folder / "said").read_text())
    return run


def test_a_long_step_is_given_up_and_leaves_no_trace(tmp_path):
    """Its half done work must not be in the checkpoint: hooks, gradients, running counts."""
    flags = ["--lr-schedule", "constant", "--gradient-accumulation", 2, "--slow-sample", 29]
    run = start_slow_toys(["--out", tmp_path / "run", *flags, "--steps", 9], tmp_path, "loss")
    asked = time.monotonic()
    os.kill(run[0].pid, signal.SIGINT)
    assert finish(run) == [0] and time.monotonic() - asked < 5
    said = (tmp_path / "said").read_text()
    assert said.endswith("stopped by SIGINT after step 3, saved; go on with --resume latest\n")
    assert toy("--out", tmp_path / "whole", *flags, "--steps", 3) == 0
    assert hashes(at(tmp_path / "run", 3)) == hashes(at(tmp_path / "whole", 3))


@pytest.mark.parametrize("where", ["build", "data", "sample", "export"])
def test_what_takes_long_between_steps_is_given_up_too(tmp_path, where):
    flags = ["--out", tmp_path / "run", "--steps", 2, "--sample-every", 2]
    run = start_slow_toys(flags, tmp_path, where)
    asked = time.monotonic()
    os.kill(run[0].pid, signal.SIGTERM)
    assert finish(run) == [0] and time.monotonic() - asked < 5
    said = (tmp_path / "said").read_text()
    assert "Traceback" not in said
    if where in ("build", "data"):
        assert said.endswith("stopped by SIGTERM before training began; nothing is lost\n")
        return
    assert said.endswith("stopped by SIGTERM after step 2, saved; go on with --resume latest\n")
    assert not list(tmp_path.glob("run/model/*")) and not list(tmp_path.rglob("part-*"))
    (tmp_path / f"run/slow-{where}").unlink()
    assert toy(*flags, "--resume", "latest") == 0
    assert (tmp_path / "run/model/student.json").exists()


def test_two_runs_at_once_do_not_share_a_folder(tmp_path):
    """Nor when the second is a group of processes: each of them is refused."""
    first = start_slow_toys(["--out", tmp_path / "run"], tmp_path, "data")
    for world in (1, 2):
        second = start_toys(["--out", tmp_path / "run"], tmp_path / f"said{world}", world=world)
        assert finish(second) == [2] * world
        assert "another run is training there" in (tmp_path / f"said{world}").read_text()
        assert "Traceback" not in (tmp_path / f"said{world}").read_text()
    first[0].kill()  # which releases the lock
    assert finish(first) == [-9]
    (tmp_path / "run/slow-data").unlink()
    assert toy("--out", tmp_path / "run", "--steps", 2) == 0


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", buffering=1)


def closed_file():
    file = open(os.devnull, "w")
    file.close()
    return file


@pytest.mark.parametrize("output", [broken_pipe, closed_file, lambda: None])
@pytest.mark.parametrize("names", [["stdout"], ["stderr"], ["stdout", "stderr"]])
def test_a_closed_output_does_not_end_a_training(tmp_path, monkeypatch, names, output):
    """A pipe whose reader is gone, as after `| head -1`, or no stream at all, as after `>&-`."""
    for name in names:
        monkeypatch.setattr(sys, name, output())
    assert toy("--out", tmp_path, "--steps", 5, "--sample-every", 5, "--lr-schedule", "constant") == 0
    assert list(complete_checkpoints(tmp_path / "checkpoints")) == [5]
    assert (tmp_path / "model/student.json").exists()


@pytest.mark.parametrize("encoding, text, shown", [
    ("ascii", "caf\u00e9", "caf\\xe9"), ("utf-8", "caf\u00e9", "caf\u00e9"), ("utf-8", "\udce9", "\\udce9"),
    ("cp1252", "\u732b", "\\u732b")])
def test_what_a_terminal_cannot_spell_is_escaped(monkeypatch, encoding, text, shown):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    with lasting_output():
        print(text)
        print("more")
    assert written.getvalue().decode(encoding).split() == [shown, "more"]


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["stdout=pipe", "both=nothing"])
def test_a_program_whose_output_is_closed_ends_well(tmp_path, closed):
    flags = ["toy", "--out", str(tmp_path / "run"), "--steps", "5", "--lr-schedule", "constant"]
    run = [sys.executable, "-c", CLOSED_OUTPUT, *closed.split("="), *flags]
    done = subprocess.run(run, cwd=ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
    assert (tmp_path / "run/model/student.json").exists()


CLOSED_OUTPUT = """
import os, sys
stream, kind, *flags = sys.argv[1:]
for name, descriptor in (("stdout", 1), ("stderr", 2)):
    if stream in (name, "both") and kind == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, descriptor)
    elif stream in (name, "both"):
        os.close(descriptor)
        setattr(sys, name, None)
import toy_recipe, train
sys.exit(train.main(flags))
"""


@pytest.mark.slow
def test_second_signal_stops_at_once(tmp_path):
    run = start_toys(["--out", tmp_path / "run", "--save-every", 1], tmp_path / "said", slow_disk=3)
    until(lambda: list(tmp_path.glob("run/checkpoints/*.tmp")))  # a checkpoint is finished before the first one counts
    os.kill(run[0].pid, signal.SIGINT)
    time.sleep(1.2)  # a repeat within a second counts as the first
    os.kill(run[0].pid, signal.SIGINT)
    run[0].join(10)
    assert run[0].exitcode == 128 + signal.SIGINT


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("sharding", [[], FSDP], ids=["DDP", "FSDP"])
def test_two_processes_train_what_one_does(tmp_path, sharding, accumulation):
    flags = [*sharding, "--gradient-accumulation", accumulation]
    common = ["--save-every", 12, "--sample-every", 12]
    assert toy("--out", tmp_path / "one", *common) == 0
    run = start_toys(["--out", tmp_path / "two", *common, *flags], tmp_path / "said", world=2)
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
    flags += ["--out", tmp_path / "one-two", "--resume", at(tmp_path / "one", 12)]
    assert finish(start_toys(flags, tmp_path / "said", world=2)) == [0, 0], (tmp_path / "said").read_text()
    assert apart(at(tmp_path / "one", 24), at(tmp_path / "one-two", 24)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind, launcher", [
    ("sd15", "forkserver"), ("sdxl", "torchrun")])
def test_a_real_model_is_sharded_and_it_is_drawn_from_and_saved_whole(tmp_path, kind, launcher):
    """What other tests leave to the toy: several networks, some of them frozen, written in the official layout."""
    flags = ["t2i", "--model", str(tiny.folder(kind)), "--steps", "1", "--batch", "2", "--scenes", "4", "--warmup", "1",
             "--precision", "fp32", "--sample-every"]
    sharded = [*flags, "1", *FSDP, "--out", str(tmp_path / "two")]
    if launcher == "forkserver":
        run = start_training(sharded, tmp_path / "said", world=2)
        assert finish(run) == [0, 0], (tmp_path / "said").read_text()
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        done = subprocess.run([*torchrun, ROOT / "train.py", *sharded], capture_output=True, text=True, cwd=tmp_path,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    assert train.main([*flags, "0", "--out", str(tmp_path / "one")]) == 0

    one, two, before = (Pipeline.load(path).state_dict() for path in (
        tmp_path / "one/model", tmp_path / "two/model", tiny.folder(kind)))
    learnt = sum((x - before[name]).abs().sum() for name, x in one.items())
    difference = sum((x - two[name]).abs().sum() for name, x in one.items())
    # Not for every weight: by the sign of a gradient of nearly 0 AdamW's first step goes.
    assert difference < 0.01 * learnt
    for name, x in one.items():
        if not name.startswith("unet"):
            assert torch.equal(x, two[name]) and torch.equal(x, before[name].half().float())
    assert (tmp_path / "two/samples/step-000001.png").exists()


@pytest.mark.parametrize("config, share", [
    (UNetConfig(sample_size=16, norm_num_groups=8, **tiny.UNETS["sdxl"]), 0.9), (SDXL_BASE, 0.95), (SD15, 0.95),
], ids=["tiny", "SDXL", "SD 1.5"])
def test_what_is_sharded_by_itself_is_every_resnet_and_every_transformer_block(config, share):
    """In small networks the time embedding and what lies between the blocks is a larger part of the weights."""
    unet = build_empty(UNet, config)
    blocks = blocks_to_shard(unet, frozen=set())
    assert len(set(blocks)) == len(blocks)
    for module in unet.modules():
        if isinstance(module, (ResnetBlock, TransformerBlock)):
            assert module in blocks
    for block in blocks:
        inside = set(block.modules()) - {block}
        assert inside.isdisjoint(blocks)
    weights = sum(param.numel() for block in blocks for param in block.parameters())
    assert weights > share * sum(param.numel() for param in unet.parameters())

    trained = set(unet.down_blocks.parameters())
    frozen = set(unet.parameters()) - trained
    assert set(blocks_to_shard(unet, frozen)) == set(blocks) & set(unet.down_blocks.modules())


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
        blocks = blocks_to_shard(model, {param for param in model.parameters() if not param.requires_grad})
        assert set(blocks) < set(model.unet.modules())
        loss = distribute(Loss(model, None, None), toy_recipe.Settings(fsdp=True))
        assert {module for module in loss.modules() if isinstance(module, FSDPModule)} == {loss, *blocks}
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with whole_parameters(model, params, True), torch.no_grad():
            torch.testing.assert_close(model.unet(x, *given), before, rtol=1e-5, atol=1e-5)
            assert {type(value) for value in model.state_dict().values()} == {torch.Tensor}
        assert all(p is params[name] for name, p in model.named_parameters() if name in params)
        loss.loss = lambda model, batch, config: model.unet(x, *given).square().mean()
        assert loss(None)[0].item() == pytest.approx(before.square().mean().item(), rel=1e-5)
        assert set(model.state_dict()) == names
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_resume_bitwise_and_stop_together(tmp_path):
    flags = ["--steps", 10 ** 6, "--lr-schedule", "constant", "--slow", 0.01, *FSDP]
    run = start_toys(["--out", tmp_path / "run", *flags], tmp_path / "said", world=2)
    until(lambda: (tmp_path / "run/log.jsonl").exists() and (tmp_path / "run/log.jsonl").stat().st_size > 500)
    os.kill(run[1].pid, signal.SIGTERM)  # only one of them hears it
    assert finish(run) == [0, 0]
    (step, _), = complete_checkpoints(tmp_path / "run/checkpoints").items()
    assert f"stopped by a signal after step {step}" in (tmp_path / "said").read_text()
    flags[1] = step + 5
    run = start_toys(["--out", tmp_path / "run", *flags, "--resume", "latest"], tmp_path / "said", world=2)
    assert finish(run) == [0, 0], (tmp_path / "said").read_text()
    run = start_toys(["--out", tmp_path / "whole", *flags], tmp_path / "said", world=2)
    assert finish(run) == [0, 0]
    assert hashes(at(tmp_path / "run", step + 5)) == hashes(at(tmp_path / "whole", step + 5))


def test_two_processes_are_stopped_together_before_training(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/slow-data").touch()
    run = start_toys(["--out", tmp_path / "run"], tmp_path / "said", world=2)
    outputs = tmp_path / "said", tmp_path / "said-1"
    until(lambda: all(path.exists() and "waiting in data" in path.read_text() for path in outputs))
    asked = time.monotonic()
    for process in run:  # as torchrun does
        os.kill(process.pid, signal.SIGTERM)
    assert finish(run) == [0, 0] and time.monotonic() - asked < 5
    assert "stopped by SIGTERM before training began" in outputs[0].read_text()
    assert not any("Traceback" in path.read_text() for path in outputs)


def test_the_first_process_alone_reads_the_inputs_and_all_end_where_they_have_changed(tmp_path):
    model = tmp_path / "model.json"
    model.write_text("{}")
    flags = ["--out", tmp_path / "run", "--lr-schedule", "constant", "--model", model]
    assert finish(start_toys([*flags, "--steps", 2], tmp_path / "said", world=2)) == [0, 0]
    assert "model" in (at(tmp_path / "run", 2) / "inputs.json").read_text()
    model.write_text("[]")
    run = start_toys([*flags, "--steps", 3, "--resume", "latest"], tmp_path / "said", world=2)
    assert finish(run) == [2, 2]
    assert "--allow-data-change: " in (tmp_path / "said").read_text()
    assert "for the reason that the first process gives" in (tmp_path / "said-1").read_text()


def test_nan_in_another_process_names_its_samples(tmp_path):
    run = start_toys(["--out", tmp_path / "run", "--nan-loss", 5 * 8 + 6], tmp_path / "said", world=2)
    assert finish(run) == [2, 2]
    assert "the loss of step 6 is NaN or infinite, in samples 44 to 47" in (tmp_path / "said").read_text()
