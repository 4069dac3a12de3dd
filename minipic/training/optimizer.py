"""AdamW (arXiv 1711.05101), its learning rate, and a weight average (Polyak, Juditsky 1992)."""

import contextlib
import math
from collections.abc import Iterator

import torch

from minipic.training.fsdp import full_tensor
from minipic.training.settings import TrainSettings


def learning_rate(config: TrainSettings, step: int) -> float:
    """Rises linearly to config.lr in the warm-up, then is constant, falls to 0, or is halved twice.

    "halved" is Specialist Diffusion's: at its 20th and 100th of 400 epochs.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
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


def clip_gradients(params: dict, max_norm: float) -> float:
    """Scale gradients down to this norm (0: leave them). Returns their norm, of all processes."""
    norm = torch.nn.utils.clip_grad_norm_(params.values(), max_norm or math.inf)
    return full_tensor(norm).item()


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
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in self.values.items():
            value.lerp_(self.params[name].detach().float(), 1 - decay)

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
