"""The smallest recipe that uses all of the loop (a frozen teacher, dropout, a running count), and ways to start it.

As a program it is train.py with this recipe added: `python tests/toy_recipe.py toy --steps 20`.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import socket
import sys
import time
import traceback
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch._dynamo  # AdamW would import it at its first step, in every process
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import train
from minipic.common import rng
from minipic.training.flags import option
from minipic.training.settings import TrainSettings

train.RECIPES["toy"] = "toy_recipe"


@dataclasses.dataclass
class Settings(TrainSettings):
    """A student learns what a teacher says."""

    steps: int = option(24)
    batch: int = option(8)
    precision: str = option("fp32")
    warmup: int = option(5)
    ema: float = option(0.9)
    save_every: int = option(100)
    sample_every: int = option(0)
    log_every: int = option(1)
    width: int = option(17, "width of the student; odd, so that shards are uneven")
    dropout: float = option(0.0, "dropout of the student")
    model: str = option("", "file of which only the hash is taken")
    slow: float = option(0.0, "seconds that each micro-batch takes")
    slow_sample: int = option(-1, "sample whose loss may take long, see `wait_in`")
    nan_loss: int = option(-1, "sample whose loss is NaN")
    nan_gradient: int = option(-1, "sample whose gradient is NaN while its loss is a number")


class Model(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.teacher = nn.Linear(6, 3)
        self.student = nn.Sequential(
            nn.Linear(6, width), nn.Tanh(), nn.Dropout(dropout), nn.LayerNorm(width), nn.Linear(width, 3))
        self.register_buffer("calls", torch.zeros(1))


def wait_in(name, config):
    """Take 30 seconds if there is a file OUT/slow-NAME."""
    if Path(config.out, f"slow-{name}").exists():
        print("waiting in", name, flush=True)
        time.sleep(30)


def build(config):
    wait_in("build", config)
    assert not config.model or os.path.exists(config.model)
    return Model(config.width, config.dropout)


def setup(model, config):
    return list(model.student.parameters())


class TeacherData:
    """Batches of random vectors x [B,6] with what the teacher says of them, y [B,3]."""

    def __init__(self, model, config):
        self.model = model
        self.config = config

    def batch(self, step, indices):
        if self.config.slow:
            time.sleep(self.config.slow)
        x = torch.stack([torch.randn(6, generator=rng(self.config.seed, "x", index)) for index in indices])
        with torch.no_grad():  # frozen parts must stay whole when the rest is sharded
            y = self.model.teacher(x.to(self.model.calls.device))
        return {"x": x, "y": y, "indices": indices}


def data(model, config):
    wait_in("data", config)
    return TeacherData(model, config)


def loss(model, batch, config):
    model.calls += 1
    if config.slow_sample in batch["indices"]:
        wait_in("loss", config)
    predicted = model.student(batch["x"])
    error = functional.mse_loss(predicted.float(), batch["y"])
    if config.nan_loss in batch["indices"]:
        error = error * float("nan")
    if config.nan_gradient in batch["indices"]:
        error = error + (predicted * 0).abs().sqrt().sum()  # 0 times the root's infinite slope
    return error, {"size": predicted.detach().abs().mean()}


def sample(model, config, data):
    assert data.model is model  # what `data` returned is passed on
    assert not model.training and not torch.is_grad_enabled()
    wait_in("sample", config)
    model.student(torch.zeros(1, 6, device=model.calls.device))  # outside the loss: a shard could not do this
    return Image.new("RGB", (8, 8))


def export(model, folder, config, data):
    assert data.model is model
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: p.cpu().tolist() for name, p in model.student.state_dict().items()}  # FSDP gives it shards
    (folder / "student.json").write_text(json.dumps(values))
    wait_in("export", config)


# Processes of its own ---------------------------------------------------------------------------------------------

def start_toys(flags, output, **about):
    """`start_training` of the toy."""
    return start_training(["toy", *flags], output, **about)


def start_training(argv, output, world=1, limit=0, slow_disk=0.0):
    """Start `world` processes that run train.py with `argv`, as torchrun does; `finish` waits for them.

    They fork from a server that has torch loaded, so a start takes hundredths of a second, and a kill is a real one.
    output: file for what they print; the others write to output-RANK. limit: largest file they may write, in bytes.
    slow_disk: seconds that each flush to the disk takes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy_recipe"])
    with mock.patch.dict(os.environ, PYTHONPATH=str(Path(__file__).parent)):  # the server does not inherit sys.path
        forkserver.ensure_running()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [str(word) for word in argv]
    started = []
    for rank in range(world):
        own_output = f"{output}-{rank}" if rank else output
        process = context.Process(target=work, args=(argv, own_output, rank, world, port, limit, slow_disk))
        process.start()
        started.append(process)
    return started


def work(argv, output, rank, world, port, limit, slow_disk):
    """What one of the processes does."""
    import resource
    torch.set_num_threads(1)  # sums in another order are not bitwise equal
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if slow_disk:
        fsync = os.fsync
        os.fsync = lambda descriptor: (time.sleep(slow_disk), fsync(descriptor))
    with open(output, "w", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            code = train.main(argv)
        except Exception:  # e.g. the other process has been killed
            traceback.print_exc()
            code = 1
    os._exit(code)  # as an ordinary exit, without waiting for the test's own threads


def finish(started):
    """Wait for processes; returns their exit codes."""
    for process in started:
        process.join(180)
    return [process.exitcode for process in started]


# What the tests ask -----------------------------------------------------------------------------------------------

@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in another order are not bitwise equal
    yield
    torch.set_num_threads(before)


def toy(*flags):
    return train.main(["toy", *map(str, flags)])


def at(run, step):
    return Path(run, "checkpoints", f"step-{step:06d}")


def hashes(folder):
    """sha256 of the weights, the average and the optimizer's state in a checkpoint."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return [files[f"{name}.safetensors"]["sha256"] for name in ("model", "ema", "optimizer")]


def apart(one, other):
    """Largest difference between two checkpoints, after checking that they hold the same names; counts left out."""
    worst = 0.0
    for file in ("model", "ema", "optimizer"):
        a, b = (load_file(folder / f"{file}.safetensors") for folder in (one, other))
        assert a.keys() == b.keys()
        worst = max([worst, *((a[name] - b[name]).abs().max().item() for name in a if name != "calls")])
    return worst


def until(condition, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


if __name__ == "__main__":
    sys.exit(train.main())
