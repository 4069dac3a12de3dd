"""What the UNet and the VAE share: norms and gates, residual block, downsampling, upsampling.

Attribute names are those of the official diffusers-layout files.
"""

import functools
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

from minipic.common import InputError
from minipic.layers.graph import RECORDING


def choose(x):
    """The backend of the norms and of `geglu` for x: our kernels in a CUDA graph in 16 bits, where SDXL's step on an
    H200 is 1.4 times as fast with them. Without a graph Python starts them more slowly than the GPU works."""
    return "triton" if RECORDING.get() and x.is_cuda and x.dtype.itemsize == 2 and compiles(x.device) else "plain"


@functools.cache
def compiles(device):
    """Whether Triton works here; it needs tools that not every computer has, such as a C compiler."""
    try:
        geglu(torch.ones(1, 2, device=device), "triton")
    except Exception as error:  # its tools fail in many ways, and PyTorch's kernels do the same
        warnings.warn(f"Triton does not work here, so drawing is slower: {error or type(error).__name__}", stacklevel=2)
        return False
    return True


def kernels(x, backend):
    """fused.py for the backend "triton" (CUDA), None for "plain", which is PyTorch's functions one after another.

    Raises InputError for a backend that does not exist or is not installed.
    """
    backend = backend or choose(x)
    if backend not in ("plain", "triton"):
        raise InputError(f"norm backend {backend!r} does not exist; use 'plain' or 'triton'")
    if backend == "plain":
        return None
    try:
        from minipic.layers import fused
    except ImportError as error:
        raise InputError("norm backend 'triton' needs the triton package, which comes with PyTorch for CUDA; "
                         "use 'plain'") from error
    return fused


def group_norm(x, norm, silu=False, backend=None):
    """x [B,C,H,W], in any memory format, and an nn.GroupNorm -> like x; `silu`: the activation after it."""
    if fused := kernels(x, backend):
        return fused.group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)
    # In place where nothing is learnt: for a large picture, to ask the system for memory takes longer than to compute.
    return F.silu(norm(x), inplace=not torch.is_grad_enabled()) if silu else norm(x)


def layer_norm(x, norm, backend=None):
    """x [...,D] and an nn.LayerNorm -> like x."""
    if fused := kernels(x, backend):
        return fused.LayerNorm.apply(x.contiguous(), None, norm.weight, norm.bias, norm.eps)
    return norm(x)


def add_norm(x, more, norm, backend=None):
    """x and `more` [...,D], and an nn.LayerNorm -> their sum and the norm of it, both like x."""
    if fused := kernels(x, backend):
        return fused.LayerNorm.apply(x.contiguous(), more.contiguous(), norm.weight, norm.bias, norm.eps)
    x = x + more
    return x, norm(x)


def geglu(x, backend=None):
    """x [...,2D] -> value * gelu(gate) [...,D], arXiv 2002.05202; the first half of x is the value."""
    if fused := kernels(x, backend):
        return fused.GEGLU.apply(x.contiguous())
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


class ResnetBlock(nn.Module):
    """x [B,C_in,H,W] -> [B,C_out,H,W]; `temb` [B,D] (UNet only, `temb_width` not None) is added per channel."""

    def __init__(self, inputs, outputs, groups, eps, temb_width=None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=eps)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        if temb_width is not None:
            self.time_emb_proj = nn.Linear(temb_width, outputs)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=eps)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x, temb=None):
        h = self.conv1(group_norm(x, self.norm1, silu=True))
        if temb is not None:
            h += self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(group_norm(h, self.norm2, silu=True))
        return h.add_(self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halve H and W with a strided convolution. The VAE's encoder pads the right and bottom edges only."""

    def __init__(self, channels, one_sided=False):
        super().__init__()
        self.one_sided = one_sided
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if one_sided else 1)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.one_sided else x)


class Upsample(nn.Module):
    """Nearest-neighbour to twice the size, or to `size` (H, W) where halving had rounded up; then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size=None):
        size = size or (2 * x.shape[-2], 2 * x.shape[-1])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
