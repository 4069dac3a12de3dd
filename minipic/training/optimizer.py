"""AdamW (arXiv 1711.05101), its learning rate, and a weight average (Polyak, Juditsky 1992)."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from minipic.training.fsdp import is_in_shards, local_tensor
from minipic.training.settings import TrainSettings


def learning_rate(config: TrainSettings, step: int, time_share: float = 0.0) -> float:
    """Rises linearly to config.lr in the warm-up, then is constant, falls to 0, or is halved twice.

    time_share: of config.minutes, how much is over. What is nearer to its end counts, this or the
    share of the steps.
    "halved" is Specialist Diffusion's: at its 20th and 100th of 400 epochs.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    step_share = (step - config.warmup) / max(1, config.steps - config.warmup)
    progress = max(step_share, time_share)
    if config.lr_schedule == "cosine":
        return config.lr * (0.5 + 0.5 * math.cos(math.pi * progress))
    if config.lr_schedule == "linear":
        return config.lr * (1 - progress)
    if config.lr_schedule == "halved":
        halvings = (progress >= 0.05) + (progress >= 0.25)
        return config.lr / 2**halvings
    return config.lr


def build_optimizer(
        params: dict, config: TrainSettings, lr_scale: dict[str, float]) -> torch.optim.AdamW:
    """AdamW over {name: parameter}. Only matrices and kernels decay: no biases, norms, scalars.

    lr_scale: {name: its learning rate as a multiple of the others'}, kept in each group.
    """
    groups = {}
    for name, param in params.items():
        decays = param.ndim > 1
        scale = lr_scale.get(name, 1.0)
        if (decays, scale) not in groups:
            weight_decay = config.weight_decay if decays else 0.0
            groups[decays, scale] = {"params": [], "weight_decay": weight_decay, "lr_scale": scale}
        groups[decays, scale]["params"].append(param)
    return torch.optim.AdamW(list(groups.values()), lr=config.lr, fused=True)


def set_learning_rate(optimizer: torch.optim.AdamW, lr: float):
    """Give every group of `build_optimizer` its learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def clip_gradients(params: dict, max_norm: float) -> torch.Tensor:
    """Scale gradients down to this norm (0: leave them). Returns their norm, of all processes."""
    norm = torch.nn.utils.clip_grad_norm_(params.values(), max_norm or math.inf)
    return norm.full_tensor() if is_in_shards(norm) else norm


class EMA:
    """An exponential moving average of parameters, kept in fp32.

    values: {name: tensor}, empty if decay is 0.
    """

    def __init__(self, params: dict, decay: float):
        self.params = params
        self.decay = decay
        self.values = {}
        if decay:
            self.values = {name: param.detach().float().clone() for name, param in params.items()}

    @torch.no_grad()
    def update(self, step: int):
        """After step `step`, from 0. The decay grows at first: the random start must not linger."""
        if not self.values:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = [local_tensor(value) for value in self.values.values()]
        newest = [local_tensor(self.params[name].detach()).float() for name in self.values]
        average_all = get_ema_multi_avg_fn(decay)  # a few kernels for all of them
        average_all(averages, newest, None)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the parameters hold the average."""
        with torch.no_grad():
            trained = {name: self.params[name].detach().clone() for name in self.values}
            for name, value in self.values.items():
                self.params[name].copy_(value)
            try:
                yield
            finally:
                for name, value in trained.items():
                    self.params[name].copy_(value)
