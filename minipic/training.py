"""What the training loop stands on: settings, learning rate, weight average, processes, signals and log.

`train.py` is the loop; checkpoint.py keeps its state. AdamW: Loshchilov and Hutter 2017; weight average: Polyak and
Juditsky 1992; several processes: PyTorch's own DDP, and FSDP2 (`fully_shard`).
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from minipic.checkpoint import gathered, whole
from minipic.common import InputError, computes_bf16, option
from minipic.layers.blocks import ResnetBlock
from minipic.models.clip import Layer
from minipic.models.unet import TransformerBlock
from minipic.weights import replacing

BLOCKS = ResnetBlock, TransformerBlock, Layer  # what FSDP gathers at a time


@dataclasses.dataclass
class Recipe:
    """The settings that every recipe has; a recipe adds its own fields and may give these other defaults."""
    steps: int = option(1000, "optimizer steps in all")
    batch: int = option(32, "samples a step, over all processes and micro-batches together")
    accumulate: int = option(1, "micro-batches that a step's samples are cut into, to save memory")
    lr: float = option(1e-3, "peak learning rate")
    warmup: int = option(100, "steps over which the learning rate rises linearly to its peak")
    schedule: str = option("cosine", "learning rate after the warm-up", ("constant", "cosine", "linear"))
    optimizer: str = option("adamw", "adamw, or muon between a network's first and last layers", ("adamw", "muon"))
    weight_decay: float = option(0.01, "decay of matrices and kernels (never of biases and norms)")
    clip: float = option(1.0, "largest gradient norm; 0 leaves gradients as they are")
    ema: float = option(0.999, "decay of the weight average that is drawn from and exported; 0 turns it off")
    precision: str = option(None, "arithmetic of the forward pass, fp32 or bf16; bf16 if left out, where the device "
                                  "has it. Weights stay as they are", ("fp32", "bf16"))
    checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    fsdp: bool = option(False, "shard weights, optimizer and average over the processes of torchrun")
    seed: int = option(0, "seed of the first weights, the data and the noise")
    out: str = option("", "run folder (empty: runs/RECIPE)")
    save: str = option("", "folder for the finished weights (empty: OUT/model)")
    resume: str = option("", "go on from a checkpoint folder, or from the newest good one: latest")
    save_every: int = option(500, "steps between checkpoints")
    keep: int = option(2, "checkpoints kept")
    sample_every: int = option(500, "steps between sample pictures; 0 draws none")
    log_every: int = option(10, "steps between lines of log.jsonl")

    LEAST = {"steps": 1, "batch": 1, "accumulate": 1, "lr": 0, "warmup": 0, "weight_decay": 0, "clip": 0, "ema": 0,
             "save_every": 1, "keep": 1, "sample_every": 0, "log_every": 1}

    def __post_init__(self):
        for name, low in self.LEAST.items():
            if not getattr(self, name) >= low:
                raise InputError(f"--{name.replace('_', '-')} must be at least {low}, not {getattr(self, name)}")
        if self.ema >= 1:
            raise InputError(f"--ema must be below 1, not {self.ema}; try 0.999")
        if self.optimizer == "muon" and self.fsdp:
            raise InputError("--optimizer muon: needs whole matrices, which --fsdp takes apart; leave one of them out")


# Optimization -----------------------------------------------------------------------------------------------------

def learning_rate(config, step):
    """Linear warm-up to config.lr, then constant, half a cosine to 0, or a line to 0 at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    fall = {"constant": 1.0, "cosine": 0.5 + 0.5 * math.cos(math.pi * done), "linear": 1 - done}
    return config.lr * fall[config.schedule]


class Muon(torch.optim.AdamW):
    """AdamW, but matrices and kernels in groups marked `muon` step along the orthogonal matrix nearest to their
    momentum (K. Jordan 2024), scaled so that AdamW's learning rate and decay suit them (arXiv 2502.16982 section 2)."""

    @torch.no_grad()
    def step(self):
        every = self.param_groups
        for group in every:
            for p in (p for p in group["params"] if group["muon"] and p.grad is not None):
                momentum = self.state[p].setdefault("exp_avg", torch.zeros_like(p)).lerp_(p.grad, 0.05)
                turn = orthogonal(p.grad.lerp(momentum, 0.95).flatten(1))  # Nesterov's
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(turn.view_as(p), alpha=-group["lr"] * 0.2 * max(turn.shape) ** 0.5)
        self.param_groups = [group for group in every if not group["muon"]]
        super().step()
        self.param_groups = every


def orthogonal(matrix):
    """A matrix [n,m] with the singular vectors of this one and singular values of about 1, by Newton and Schulz."""
    tall, x = len(matrix) > matrix.shape[1], matrix.bfloat16() if computes_bf16(matrix.device) else matrix
    x = (x.mT if tall else x) / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.mT if tall else x).to(matrix)


def optimizer_of(params, config, rates):
    """AdamW or Muon over {name: parameter}; biases, norms and scales (one dimension or none) do not decay. `rates`:
    {name: its learning rate over that of the rest}, which the loop reads from its group's "times"."""
    groups, kind = {}, Muon if config.optimizer == "muon" else torch.optim.AdamW
    for name, p in params.items():
        muon = kind is Muon and p.ndim > 1 and not re.search("conv_in|conv_out|embedding", name)
        groups.setdefault((p.ndim > 1, rates.get(name, 1.0), muon), []).append(p)
    return kind([{"params": ps, "weight_decay": config.weight_decay * matrices, "times": times, "muon": muon}
                 for (matrices, times, muon), ps in groups.items()], lr=config.lr, fused=True)


class EMA:
    """A moving average of parameters, in fp32 whatever theirs; `values` is {name: tensor}, empty when decay is 0."""

    def __init__(self, params, decay):
        self.params, self.decay = params, decay
        self.values = {name: p.detach().float().clone() for name, p in params.items()} if decay else {}

    @torch.no_grad()
    def update(self, step):
        """After step `step` (from 0). Early on a smaller decay, or the random start would stay in for 1/(1-decay)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in self.values.items():
            value.lerp_(self.params[name].detach().float(), 1 - decay)

    @contextlib.contextmanager
    def swapped_in(self):
        """Inside, the parameters hold the average."""
        with torch.no_grad():
            kept = {name: self.params[name].detach().clone() for name in self.values}
            for name, value in self.values.items():
                self.params[name].copy_(value)
            try:
                yield
            finally:
                for name, value in kept.items():
                    self.params[name].copy_(value)


@dataclasses.dataclass
class Run:
    """What a training run changes: a checkpoint holds exactly this. `loss` is the `Loss` of the model, wrapped."""
    model: nn.Module
    loss: nn.Module
    params: dict
    optimizer: torch.optim.Optimizer
    ema: EMA


def clip(run, most):
    """Scale gradients down to the norm `most` (0: leave them); returns the norm they had, over all processes."""
    return whole(torch.nn.utils.clip_grad_norm_(run.params.values(), most or math.inf)).item()


@contextlib.contextmanager
def finished(run):
    """Inside, the model is whole, averaged and in eval mode. Every process must enter; all leave together."""
    run.model.eval()
    with torch.no_grad(), run.ema.swapped_in(), gathered(run.model, run.params, first()):
        yield
        wait()
    run.model.train()


# Processes --------------------------------------------------------------------------------------------------------

class Loss(nn.Module):
    """A recipe's loss as a module, so that DDP and FSDP see one forward: batch -> (scalar, {name: value to log})."""

    def __init__(self, model, loss, config):
        super().__init__()
        self.model, self.loss, self.config = model, loss, config

    def forward(self, batch):
        result = self.loss(self.model, batch, self.config)
        return result if isinstance(result, tuple) else (result, {})


def start_processes(config):
    """Join the group that torchrun started, if it did. Returns (rank, number of processes, device)."""
    many = "RANK" in os.environ
    world, local = int(os.environ["WORLD_SIZE"]) if many else 1, int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if config.fsdp and not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise InputError(f"--fsdp needs PyTorch 2.8 or newer, and this is {torch.__version__}; leave the flag out")
    if config.fsdp and not many:
        raise InputError("--fsdp needs processes: start with torchrun --standalone --nproc_per_node=N train.py ...")
    if config.batch % (config.accumulate * world):
        raise InputError(f"--batch {config.batch} does not divide into --accumulate {config.accumulate} micro-batches "
                         f"on {world} process(es); choose a multiple of {config.accumulate * world}")
    if many and device.type == "cuda" and local >= torch.cuda.device_count():
        raise InputError(f"torchrun: --nproc_per_node must be at most {torch.cuda.device_count()}, the GPUs here")
    if many:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))  # see `wait`
    return int(os.environ.get("RANK", 0)), world, device


def distribute(loss, config):
    """Wrap a `Loss` for several processes; what does not train must be frozen.

    FSDP shards weights, gradients, optimizer and average. Whole weights exist while their block computes, a resnet or a
    transformer's; what is in none, 2% of SDXL, as long as a step. Frozen parts stay whole, for `data` calls them.
    """
    if not dist.is_initialized():
        return loss
    if not config.fsdp:
        return DistributedDataParallel(loss)
    scalars = [name for name, p in loss.model.named_parameters() if p.requires_grad and p.ndim == 0]
    if scalars:
        raise InputError(f"--fsdp cannot shard {scalars[0]!r}, a single number; train this recipe without --fsdp")
    mesh = dist.init_device_mesh(next(loss.parameters()).device.type, (dist.get_world_size(),))
    frozen = {p for p in loss.parameters() if not p.requires_grad}
    trained = [module for module in loss.modules() if isinstance(module, BLOCKS) and {*module.parameters()} - frozen]
    for module in [*trained, loss]:
        fully_shard(module, mesh=mesh, ignored_params=frozen)
        module.set_force_sum_reduction_for_comms(mesh.device_type == "cpu")  # Gloo's average is a sum in PyTorch 2.8
    return loss


def synchronize(run, on):
    """Whether the next backward pass averages gradients over processes. DDP reads it in forward: set it before."""
    if isinstance(run.loss, FSDPModule):
        run.loss.set_requires_gradient_sync(on)
    elif isinstance(run.loss, DistributedDataParallel):
        run.loss.require_backward_grad_sync = on


def share(config, step, rank, world):
    """Sample numbers of one process in one step, a list per micro-batch; together the processes cover the batch."""
    size = config.batch // (config.accumulate * world)
    first = [step * config.batch + (micro * world + rank) * size for micro in range(config.accumulate)]
    return [list(range(start, start + size)) for start in first]


def gather(rows, rank, world, device):
    """Each process's [M][K] numbers -> [world, M, K] on the CPU, the same in every process."""
    rows = torch.stack([torch.stack([torch.as_tensor(x, device=device).detach().float() for x in r]) for r in rows])
    table = rows.new_zeros(world, *rows.shape)
    table[rank] = rows
    if world > 1:
        dist.all_reduce(table)
    return table.cpu()


def seed(number, device):
    """Seed PyTorch's own generators. torch.manual_seed would keep a stack trace per call for every absent device."""
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


def first():
    """Whether this process is the one that prints and writes, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait():
    """Until every process is here; the first may draw or encode for hours before."""
    if dist.is_initialized():
        dist.barrier()


class Stop:
    """Turns the first SIGINT or SIGTERM into a request, `.signal`, to stop after the step; the second stops at once.

    A repeat within a second counts as the first: torchrun passes on the Ctrl-C that the terminal sent to everyone.
    """

    def __enter__(self):
        self.signal, self.time = "", math.inf
        self.before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __call__(self, number, frame):
        if time.monotonic() > self.time + 1:
            os._exit(128 + number)
        self.signal, self.time = signal.Signals(number).name, min(self.time, time.monotonic())


# Log --------------------------------------------------------------------------------------------------------------

def refuse_nan(config, step, table, norm, saved):
    """Raise InputError when the loss or gradient of a step is not a finite number, naming the samples."""
    world, micros, _ = table.shape
    bad = [index for micro in range(micros) for rank in range(world) if not table[rank, micro, 0].isfinite()
           for index in share(config, step, rank, world)[micro]]
    if bad or not math.isfinite(norm):
        what, where = ("loss", bad) if bad else ("gradient", range(step * config.batch, (step + 1) * config.batch))
        kept = f"the checkpoint of step {saved} is the last good one" if saved else "there is no checkpoint yet"
        raise InputError(f"the {what} of step {step + 1} is NaN or infinite, in samples {where[0]} to {where[-1]}; "
                         f"{kept}. Try a lower --lr, a longer --warmup or --precision fp32")


def start_log(config, last):
    """Rows of OUT/log.jsonl up to step `last`; later lines, and one cut by a kill, are removed from the file."""
    path, rows = Path(config.out, "log.jsonl"), []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    rows = [row for row in rows if row["step"] <= last]
    with replacing(path) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def log(config, rows, row):
    """Append a row to the list and to OUT/log.jsonl."""
    rows.append(row)
    with open(Path(config.out, "log.jsonl"), "a") as file:
        file.write(json.dumps(row) + "\n")
