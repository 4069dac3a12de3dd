"""Layerwise casting: a Linear keeps its weight in the 16 bits of its file, widened while the layer computes in fp32.

The numbers are those of a weight widened beforehand, in half the memory; and still on the disk, mapped, while nobody
has asked for it. diffusers has it as `enable_layerwise_casting`.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

LARGE = 1 << 20  # weights of a layer from which it is worth it: nearly all of SDXL's, none of the tiny model's
ROWS = 1280  # widened at a time: to ask the system for more memory takes a third of the time of a small product


def widened(weight, dtype):
    """Yield (rows, those rows of `weight` in `dtype`)."""
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        yield rows, weight[rows].to(dtype)


class Product(torch.autograd.Function):
    """x [...,D], a frozen weight [E,D] -> x W^T + b [...,E]. Backward widens again, so that nothing wide is kept."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        flat = x.flatten(0, -2)
        out = flat.new_empty(len(flat), len(weight))
        for rows, wide in widened(weight, x.dtype):
            if bias is None:
                torch.mm(flat, wide.T, out=out[:, rows])
            else:
                torch.addmm(bias[rows], flat, wide.T, out=out[:, rows])
        return out.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, grad):
        weight, = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        back = flat.new_zeros(len(flat), weight.shape[1])
        for rows, wide in widened(weight, grad.dtype):
            back.addmm_(flat[:, rows], wide)
        return back.unflatten(0, grad.shape[:-1]), None, None


class CastLinear(nn.Linear):
    """nn.Linear, but its weight may have fewer bits than x."""

    def forward(self, x):
        if self.weight.dtype == x.dtype:
            return super().forward(x)
        if self.weight.requires_grad and torch.is_grad_enabled():
            return F.linear(x, self.weight.to(x.dtype), self.bias)
        return Product.apply(x, self.weight, self.bias)


def install(model):
    """Make CastLinears of a network's large Linears; returns the names of their weights."""
    found = {name: module for name, module in model.named_modules()
             if type(module) is nn.Linear and module.weight.numel() >= LARGE}
    for module in found.values():
        module.__class__ = CastLinear  # as LoRA has it: the module stays the same
    return {f"{name}.weight" for name in found}
