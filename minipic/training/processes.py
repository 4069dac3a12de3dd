"""Several processes, as torchrun starts them: PyTorch's DistributedDataParallel or FSDP."""

import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from minipic.common import InputError, ParameterError
from minipic.training.fsdp import check_fsdp, is_sharded, shard
from minipic.training.settings import TrainSettings


class Loss(nn.Module):
    """A recipe's loss as a module, so that DDP and FSDP see one forward.

    batch -> (scalar, {name: value to log}).
    """

    def __init__(self, model: nn.Module, loss: Callable, config: TrainSettings):
        super().__init__()
        self.model = model
        self.loss = loss
        self.config = config

    def forward(self, batch: dict) -> tuple[torch.Tensor, dict]:
        result = self.loss(self.model, batch, self.config)
        return result if isinstance(result, tuple) else (result, {})


def start_processes(config: TrainSettings) -> tuple[int, int, torch.device]:
    """Join the group that torchrun started, if any. Returns (rank, number of processes, device)."""
    launched = "RANK" in os.environ
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ["WORLD_SIZE"]) if launched else 1
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")

    if config.fsdp:
        check_fsdp()
        if not launched:
            raise ParameterError(
                "fsdp", "needs processes; start with torchrun --standalone --nproc_per_node=N")
    parts = config.gradient_accumulation * world_size
    if config.batch % parts:
        raise ParameterError(
            "batch", f"{config.batch} does not divide into {config.gradient_accumulation} parts "
            f"(gradient_accumulation) on {world_size} process(es); choose a multiple of {parts}")
    if launched and on_gpu and local_rank >= torch.cuda.device_count():
        raise InputError(
            f"torchrun: --nproc_per_node must be at most {torch.cuda.device_count()}, "
            "the GPUs here")

    if launched:
        if on_gpu:
            torch.cuda.set_device(device)
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))  # see wait_for_everyone
    return rank, world_size, device


def end_processes():
    """Leave the group. Gloo's is left standing: to take it down can hang in PyTorch 2.6."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        dist.destroy_process_group()


def distribute(loss: Loss, config: TrainSettings) -> nn.Module:
    """Wrap a `Loss` for several processes. What does not train must be frozen before."""
    if not dist.is_initialized():
        return loss
    return shard(loss) if config.fsdp else DistributedDataParallel(loss)


def synchronize_gradients(loss: nn.Module, on: bool):
    """Whether the next backward pass averages gradients over processes.

    DDP reads it in forward: set it before.
    """
    if is_sharded(loss):
        loss.set_requires_gradient_sync(on)
    elif isinstance(loss, DistributedDataParallel):
        loss.require_backward_grad_sync = on


def sample_indices(config: TrainSettings, step: int, rank: int, world_size: int) -> list[list[int]]:
    """The numbers of the samples of one process in one step, a list for each micro-batch.

    All processes together cover the samples step * batch to (step + 1) * batch - 1.
    """
    size = config.batch // (config.gradient_accumulation * world_size)
    micro_batches = []
    for micro in range(config.gradient_accumulation):
        first = step * config.batch + (micro * world_size + rank) * size
        micro_batches.append(list(range(first, first + size)))
    return micro_batches


def gather_numbers(
        rows: list[list], rank: int, world_size: int, device: torch.device) -> torch.Tensor:
    """Each process's M lists of K numbers -> [world_size, M, K] on the device of every process."""
    numbers = []
    for row in rows:
        tensors = []
        for x in row:
            if not torch.is_tensor(x):
                x = torch.full((), x, device=device)
            tensors.append(x.detach().float())
        numbers.append(torch.stack(tensors))
    numbers = torch.stack(numbers)
    table = numbers.new_zeros(world_size, *numbers.shape)
    table[rank] = numbers
    if world_size > 1:
        dist.all_reduce(table)
    return table


def anyone(here: bool) -> bool:
    """Whether `here` is true in any process. Every process must ask."""
    if not dist.is_initialized():
        return here
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    answer = torch.tensor(float(here), device=device)
    dist.all_reduce(answer, dist.ReduceOp.MAX)
    return answer.item() > 0


def of_main_process(value: float) -> float:
    """The first process's value, in every process. Every process must ask."""
    if not dist.is_initialized():
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    answer = torch.tensor(value, device=device, dtype=torch.float64)
    dist.broadcast(answer, 0)
    return answer.item()


def seed_everything(seed: int, device: torch.device):
    """Seed PyTorch's own generators.

    torch.manual_seed keeps a stack trace per call for every absent device.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def say(line: str):
    """Print a line, if this is the main process."""
    if is_main_process():
        print(line)


def wait_for_everyone():
    """Wait until every process is here. The first may draw or encode for hours before it comes."""
    if dist.is_initialized():
        dist.barrier()
