"""Layerwise casting: a Linear keeps its weight in the 16 bits of its file and computes in fp32.

The weight is widened while the layer runs. The results are those of a weight widened beforehand, in
half the memory. On a CPU the weight stays in the mapped file, and is read when it is first used.
diffusers calls this `enable_layerwise_casting`.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

LARGE = 1 << 20  # numbers of a weight worth casting: nearly all of SDXL's, none of the tiny model's
ROWS = 1280  # of a weight, widened at a time: for more, asking the system for memory takes too long


def widened_blocks(weight: torch.Tensor,
                   dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (which rows, those rows of `weight` in `dtype`), ROWS at a time."""
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        yield rows, weight[rows].to(dtype)


class Product(torch.autograd.Function):
    """x W^T + b [...,out] of x [...,D], a frozen weight [out,D] in 16 bits, a bias [out] or None.

    The backward pass widens the weight again, so that no wide copy is kept in between.
    """

    @staticmethod
    def forward(
            ctx: Any, x: torch.Tensor, weight: torch.Tensor,
            bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        flat = x.flatten(0, -2)
        out = flat.new_empty(len(flat), len(weight))
        for rows, wide in widened_blocks(weight, x.dtype):
            if bias is None:
                torch.mm(flat, wide.T, out=out[:, rows])
            else:
                torch.addmm(bias[rows], flat, wide.T, out=out[:, rows])
        return out.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        weight, = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        grad_x = flat.new_zeros(len(flat), weight.shape[1])
        for rows, wide in widened_blocks(weight, grad.dtype):
            grad_x.addmm_(flat[:, rows], wide)
        return grad_x.unflatten(0, grad.shape[:-1]), None, None


class CastLinear(nn.Linear):
    """A Linear whose weight may have fewer bits than x. It shares weight and bias with `layer`."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, device="meta")  # needs no memory
        self.weight = layer.weight
        self.bias = layer.bias
        self.train(layer.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [...,D] -> [...,out]."""
        # Autocast brings x, weight and bias to one type of 16 bits; there is nothing to widen.
        if self.weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        if self.weight.requires_grad and torch.is_grad_enabled():
            return F.linear(x, self.weight.to(x.dtype), self.bias)
        return Product.apply(x, self.weight, self.bias)


def install(model: nn.Module) -> set[str]:
    """Put CastLinears in the place of a network's large Linears; returns their weights' names."""
    names = set()
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and module.weight.numel() >= LARGE:
            model.set_submodule(path, CastLinear(module))
            names.add(f"{path}.weight")
    return names
