"""A training run: its state, how it is stopped, what it prints, and its log."""

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch import nn

from minipic.common import InputError, check_ordinary
from minipic.training.fsdp import whole_parameters
from minipic.training.optimizer import EMA
from minipic.training.processes import (
    is_main_process, of_main_process, sample_indices, wait_for_everyone)
from minipic.training.settings import TrainSettings
from minipic.weights.files import read_json, replacing


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
def whole_and_averaged(run: Run) -> Iterator[None]:
    """Inside, the model is whole, averaged and in eval mode: ready to draw and to be saved.

    Every process must enter. All leave together, after the first one has done its work.
    """
    run.model.eval()
    whole = whole_parameters(run.model, run.params, is_main_process())
    try:
        with torch.no_grad(), run.ema.swapped_in(), whole:
            yield
            wait_for_everyone()
    finally:
        run.model.train()


class Stopped(BaseException):
    """Ends what a `StopSignal` may interrupt. No `except Exception` holds it up."""


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a request to stop.

    name: which signal it was, "" before. interrupted: whether it has ended a block of `at_once`.
    The second signal kills; but a repeat within a second counts as the first: torchrun passes on
    the Ctrl-C that the terminal sent to everyone.
    """

    def __enter__(self) -> "StopSignal":
        self.name = ""
        self.time = math.inf
        self.may_interrupt = False
        self.interrupted = False
        self.handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *error: object):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: object):
        now = time.monotonic()
        if now > self.time + 1:
            os._exit(128 + number)
        self.name = signal.Signals(number).name
        self.time = min(self.time, now)
        if self.may_interrupt:
            self.may_interrupt = False  # once is enough
            self.interrupted = True
            raise Stopped

    @contextlib.contextmanager
    def at_once(self, in_group: bool = False) -> Iterator[None]:
        """The first signal ends this block. What it leaves half done must not matter.

        in_group: also in one process of several, which leaves the others alone.
        """
        self.may_interrupt = in_group or not dist.is_initialized()
        try:
            with contextlib.suppress(Stopped):
                yield
        finally:
            self.may_interrupt = False


class Output:
    """A stream for sys.stdout or sys.stderr; once it cannot be written any more, it is silent.

    A training must not end because the terminal or the pipe has that it prints to.
    """

    def __init__(self, stream: TextIO | None):
        self.stream = stream or open(os.devnull, "w")  # Python has None for what was closed before

    def write(self, text: str) -> int:
        # A character that the terminal cannot show is escaped.
        encoding = self.stream.encoding or "utf-8"
        shown = text.encode(encoding, "backslashreplace").decode(encoding)
        self.try_to(self.stream.write, shown)
        return len(text)

    def flush(self):
        self.try_to(self.stream.flush)

    def isatty(self) -> bool:
        return not self.stream.closed and self.stream.isatty()

    def try_to(self, function: Callable, *arguments: str):
        try:
            function(*arguments)
        except (OSError, ValueError):  # a broken pipe, a vanished terminal; a closed file
            self.stream = open(os.devnull, "w")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Inside, sys.stdout and sys.stderr are an `Output`."""
    before = sys.stdout, sys.stderr
    sys.stdout = Output(sys.stdout)
    sys.stderr = Output(sys.stderr)
    try:
        yield
    finally:
        for output in (sys.stdout, sys.stderr):
            output.flush()
        sys.stdout, sys.stderr = before


class Clock:
    """How much of config.minutes is over, in all processes that have worked on a run.

    Preparing the data takes a part of the minutes. The rest is for training: `share` is 0 at its
    first step and 1 when the time is over.
    started: time.monotonic() when this process began.
    """

    def __init__(self, minutes: float, started: float):
        self.minutes = minutes
        self.started = started
        self.training_started = started
        self.spent_before = 0.0
        self.trained_before = 0.0

    def start_training(self, source: Path | None):
        """From now on the time is training's. source: the checkpoint that is gone on from."""
        self.training_started = time.monotonic()
        if source:
            settings = read_json(source / "config.json")
            self.spent_before = settings.get("minutes_spent", 0.0)
            self.trained_before = settings.get("minutes_trained", 0.0)

    def times(self) -> dict[str, float]:
        """What a checkpoint keeps: minutes in all, and those of training."""
        now = time.monotonic()
        return {
            "minutes_spent": self.spent_before + (now - self.started) / 60,
            "minutes_trained": self.trained_before + (now - self.training_started) / 60}

    def share(self) -> float:
        """The share of the time for training that is over, the same in all processes; 0: no limit.

        Every process must ask.
        """
        if not self.minutes:
            return 0.0
        times = self.times()
        for_training = self.minutes - times["minutes_spent"] + times["minutes_trained"]
        share = times["minutes_trained"] / for_training if for_training > 0 else 1.0
        return min(1.0, of_main_process(share))


@dataclass
class Numbers:
    """What a step gave, perhaps still on its way from the GPU: nobody has waited for it.

    table: losses and values to log [world_size, M, K] of M micro-batches.
    """

    step: int
    table: torch.Tensor
    gradient_norm: torch.Tensor


def check_finite(config: TrainSettings, unchecked: list[Numbers], saved: int):
    """InputError, naming the samples, for a loss or gradient that is not a finite number.

    saved: the step of the last checkpoint.
    """
    for numbers in unchecked:
        losses = numbers.table[:, :, 0].cpu()
        if losses.isfinite().all() and math.isfinite(numbers.gradient_norm):
            continue
        culprit = "gradient"
        step = numbers.step
        samples = list(range(step * config.batch, (step + 1) * config.batch))
        if not losses.isfinite().all():
            culprit = "loss"
            samples = samples_without_loss(config, step, losses)
        kept = "there is no checkpoint yet"
        if saved:
            kept = f"the checkpoint of step {saved} is the last good one"
        raise InputError(
            f"the {culprit} of step {step + 1} is NaN or infinite, in samples {samples[0]} to "
            f"{samples[-1]}; {kept}. Try a lower lr, a longer warmup or fp32 as precision")


def samples_without_loss(config: TrainSettings, step: int, losses: torch.Tensor) -> list[int]:
    """The samples of all micro-batches whose loss is not finite. losses: [world_size, M]."""
    world_size, _ = losses.shape
    samples = []
    for micro, column in enumerate(losses.T):
        for rank, loss in enumerate(column):
            if not loss.isfinite():
                samples += sample_indices(config, step, rank, world_size)[micro]
    return samples


def start_log(out: str, last_step: int) -> list[dict]:
    """The rows of OUT/log.jsonl up to a step.

    Later lines, and what a kill or anyone else has left there, are removed from the file.
    """
    path = Path(out, "log.jsonl")
    check_ordinary(path)
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        row = None
        with contextlib.suppress(ValueError):
            row = json.loads(line)
        is_row = isinstance(row, dict) and isinstance(row.get("step"), int) and "loss" in row
        if is_row and row["step"] <= last_step:
            rows.append(row)
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def append_log(out: str, rows: list[dict], row: dict):
    """Append a row to the list and to OUT/log.jsonl."""
    rows.append(row)
    with open(Path(out, "log.jsonl"), "a") as file:
        file.write(json.dumps(row) + "\n")
