"""A training run: its state, how it is stopped, and its log."""

import contextlib
import json
import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from minipic.common import InputError
from minipic.training.fsdp import whole_parameters
from minipic.training.optimizer import EMA
from minipic.training.processes import is_main_process, sample_indices, wait_for_everyone
from minipic.training.settings import TrainSettings
from minipic.weights.files import replacing


@dataclass
class Run:
    """What a training run changes: a checkpoint holds exactly this.

    loss: the `Loss` of the model, distributed.
    """

    model: nn.Module
    loss: nn.Module
    params: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: EMA


@contextlib.contextmanager
def whole_and_averaged(run: Run):
    """Inside, the model is whole, averaged and in eval mode: ready to draw and to be saved.

    Every process must enter. All leave together, after the first one has done its work.
    """
    run.model.eval()
    whole = whole_parameters(run.model, run.params, is_main_process())
    with torch.no_grad(), run.ema.swapped_in(), whole:
        yield
        wait_for_everyone()
    run.model.train()


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a request to stop after the step.

    `name` says which signal it was. The second kills; but a repeat within a second counts as the
    first: torchrun passes on the Ctrl-C that the terminal sent to everyone.
    """

    def __enter__(self):
        self.name = ""
        self.time = math.inf
        self.handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def receive(self, number, frame):
        now = time.monotonic()
        if now > self.time + 1:
            os._exit(128 + number)
        self.name = signal.Signals(number).name
        self.time = min(self.time, now)


def check_finite(
        config: TrainSettings, step: int, losses: torch.Tensor, gradient_norm: float, saved: int):
    """InputError, naming the samples, for a loss or gradient that is not a finite number.

    losses: of every process and micro-batch [world_size, M].
    saved: the step of the last checkpoint.
    """
    if losses.isfinite().all() and math.isfinite(gradient_norm):
        return
    world_size, _ = losses.shape
    culprit = "gradient"
    samples = list(range(step * config.batch, (step + 1) * config.batch))
    if not losses.isfinite().all():
        culprit, samples = "loss", []
        for micro, column in enumerate(losses.T):
            for rank, loss in enumerate(column):
                if not loss.isfinite():
                    samples += sample_indices(config, step, rank, world_size)[micro]
    kept = "there is no checkpoint yet"
    if saved:
        kept = f"the checkpoint of step {saved} is the last good one"
    raise InputError(
        f"the {culprit} of step {step + 1} is NaN or infinite, in samples {samples[0]} to "
        f"{samples[-1]}; {kept}. Try a lower --lr, a longer --warmup or --precision fp32")


def start_log(out: str, last_step: int) -> list[dict]:
    """The rows of OUT/log.jsonl up to a step.

    Later lines, and one cut by a kill, are removed from the file.
    """
    path = Path(out, "log.jsonl")
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    rows = [row for row in rows if row["step"] <= last_step]
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def append_log(out: str, rows: list[dict], row: dict):
    """Append a row to the list and to OUT/log.jsonl."""
    rows.append(row)
    with open(Path(out, "log.jsonl"), "a") as file:
        file.write(json.dumps(row) + "\n")
