"""LoRA: W x + s B A x with W frozen and B A of low rank R (arXiv 2106.09685 section 4.1), s = scale * alpha / R.

A layer keeps its class, its `weight` and `bias`, hence its keys; it gains the children lora_A and lora_B. Several LoRAs
lie side by side in them, as if they were one whose rank is the sum, and every rank has its own factor: the scale of
each can be changed between two pictures.
"""

import math
import re

import torch
import torch.nn as nn

from minipic.layers.casting import CastLinear
from minipic.layers.swap import swap

ATTENTION = r".*attn[12]\.to_(q|k|v|out\.0)|.*self_attn\.(q|k|v|out)_proj"  # of the UNet, and of the text encoders


class LoRA:
    """What LoRALinear and LoRAConv2d share: the second base class of both."""

    def lora(self, x):
        factor, kind = self.factor.view(-1, *[1] * (self.lora_A.weight.ndim - 2)), self.lora_A.weight.dtype
        return self.lora_B(self.lora_A(x.to(kind)) * factor.to(kind)).to(x.dtype)

    def delta(self):
        """What the LoRAs add to `weight`, in its shape."""
        a, b = self.lora_A.weight.flatten(1), self.lora_B.weight.flatten(1)
        return (b * self.factor.to(b) @ a).view_as(self.weight).to(self.weight.dtype)

    def forward(self, x):
        return super().forward(x) + self.lora(x) if self.original is None else super().forward(x)


class LoRALinear(LoRA, nn.Linear):
    pass


class LoRACastLinear(LoRA, CastLinear):
    pass


class LoRAConv2d(LoRA, nn.Conv2d):
    pass


LAYERS = {nn.Linear: LoRALinear, CastLinear: LoRACastLinear, nn.Conv2d: LoRAConv2d}


def inject(model, rank, alpha=None, match=ATTENTION, name="default"):
    """Give every Linear and Conv2d whose name fits the pattern `match` a new LoRA; returns the parameters to train, in
    fp32 whatever the model is in.

    A is random as a Linear's start, B zero: the output stays what it was, bit for bit. alpha: `rank` if None. All else
    in the model is frozen. `name` is what `set_scale` calls it. Raises ValueError if nothing matches, for a rank below
    1 and for a name that is taken.
    """
    if rank < 1:
        raise ValueError(f"a LoRA's rank must be at least 1, not {rank}")

    def build(_, module):
        a = torch.empty(rank, *module.weight.shape[1:], device=module.weight.device)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        return add(module, name, a, a.new_zeros(len(module.weight), rank), alpha)

    model.requires_grad_(False)
    found = swap(model, lambda path, module: re.fullmatch(match, path) and isinstance(module, tuple(LAYERS)), build)
    if not found:
        raise ValueError(f"no Linear or Conv2d of this {type(model).__name__} has a name like {match!r}")
    return [p for module in found.values() for p in (module.lora_A.weight, module.lora_B.weight)]


def add(module, name, a, b, alpha=None):
    """Add the LoRA a [R, ...], b [out, R] to a Linear or Conv2d as `name`, and return it. alpha: R if None.

    The same module gets another class, so that whatever refers to it or to its weight goes on to do so.
    """
    rank, kernel = len(a), module.weight.shape[2:]
    a, b = a.reshape(rank, -1, *kernel), b.reshape(len(b), rank, *[1] * len(kernel))
    if not isinstance(module, LoRA):
        module.__class__ = LAYERS[type(module)]
        module.ranks, module.original = {}, None  # {name: [R, alpha / R, scale]}; the weight without what was merged
    elif module.original is not None:
        raise ValueError("the LoRAs of this model are merged; unmerge before adding one")
    if name in module.ranks:
        raise ValueError(f"this model already has a LoRA called {name!r}; give another name")
    a, b = a.to(module.weight.device), b.to(module.weight.device)
    if module.ranks:
        a, b = torch.cat([module.lora_A.weight, a]), torch.cat([module.lora_B.weight, b], 1)
    module.ranks[name] = [rank, (rank if alpha is None else alpha) / rank, 1.0]
    if isinstance(module, nn.Linear):
        module.lora_A = nn.Linear(module.in_features, len(a), bias=False, device="meta")
        module.lora_B = nn.Linear(len(a), module.out_features, bias=False, device="meta")
    else:  # a strided layer's A strides
        module.lora_A = nn.Conv2d(module.in_channels, len(a), module.kernel_size, module.stride, module.padding,
                                  module.dilation, bias=False, device="meta")
        module.lora_B = nn.Conv2d(len(a), module.out_channels, 1, bias=False, device="meta")
    module.lora_A.weight, module.lora_B.weight = nn.Parameter(a), nn.Parameter(b)
    return refresh(module)


def refresh(module):
    factors = [torch.full((rank,), base * scale) for rank, base, scale in module.ranks.values()]
    module.register_buffer("factor", torch.cat(factors).to(module.weight.device), persistent=False)
    return module


def layers(model):
    """{name: LoRA layer} of a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRA)}


@torch.no_grad()
def set_scale(model, scale, name="default"):
    """Change the strength of the LoRA `name`: 1 as trained, 0 off."""
    for module in layers(model).values():
        if name in module.ranks:
            module.ranks[name][2] = scale
            refresh(module)
            if module.original is not None:
                module.weight.data = module.original + module.delta()


@torch.no_grad()
def merge(model):
    """Add every LoRA to its weight: the same pictures at the speed of the model without. Undone by `unmerge`."""
    for module in layers(model).values():
        if module.original is None:
            module.original = module.weight.data
            module.weight.data = module.original + module.delta()


def unmerge(model):
    """The weights as they were before `merge`, bit for bit: they were kept, for subtracting would round."""
    for module in layers(model).values():
        if module.original is not None:
            module.weight.data, module.original = module.original, None


def lora_state_dict(model):
    """{"<layer>.lora_A.weight": [R, ...], "<layer>.lora_B.weight": ..., "<layer>.alpha": scalar} of all LoRAs as one:
    where scales or alphas differ, they are multiplied into B and alpha becomes the rank."""
    state = {}
    for name, module in layers(model).items():
        a, b, factor = module.lora_A.weight.detach(), module.lora_B.weight.detach(), module.factor
        same = bool((factor == factor[0]).all())
        b = b if same else (b.flatten(1) * factor.to(b)).view_as(b)
        state |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b,
                  f"{name}.alpha": factor[0].cpu() * len(a) if same else torch.tensor(float(len(a)))}
    return state
