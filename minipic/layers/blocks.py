"""What the UNet and the VAE share: norms and gates, residual block, downsampling, upsampling.

Attribute names are those of the official diffusers-layout files.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from minipic.kernels.norm_backend import fused_kernels


def group_norm(x: torch.Tensor, norm: nn.GroupNorm, silu: bool = False,
               backend: str | None = None) -> torch.Tensor:
    """x [B,C,H,W], in any memory format -> like x. silu: apply this activation after the norm."""
    kernels = fused_kernels(x, backend)
    if kernels is not None:
        return kernels.group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)
    x = norm(x)
    if silu:
        # In place while drawing: asking for a large picture's memory takes longer than computing.
        x = F.silu(x, inplace=not torch.is_grad_enabled())
    return x


def layer_norm(x: torch.Tensor, norm: nn.LayerNorm, backend: str | None = None) -> torch.Tensor:
    """x [...,D] -> like x."""
    kernels = fused_kernels(x, backend)
    if kernels is not None:
        return kernels.layer_norm(x, norm.weight, norm.bias, norm.eps)
    return norm(x)


def add_norm(x: torch.Tensor, y: torch.Tensor, norm: nn.LayerNorm,
             backend: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y [...,D] -> (x + y, the norm of x + y), both like x."""
    kernels = fused_kernels(x, backend)
    if kernels is not None:
        return kernels.add_norm(x, y, norm.weight, norm.bias, norm.eps)
    x = x + y
    return x, norm(x)


def geglu(x: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    """x [...,2D], the value and then the gate -> value * gelu(gate) [...,D] (arXiv 2002.05202)."""
    kernels = fused_kernels(x, backend)
    if kernels is not None:
        return kernels.geglu(x)
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


class ResnetBlock(nn.Module):
    """x [B,C_in,H,W] -> [B,C_out,H,W].

    In a UNet, where `temb_width` is not None, temb [B,temb_width] is projected and added to every
    pixel.
    """

    def __init__(self, inputs: int, outputs: int, groups: int, eps: float,
                 temb_width: int | None = None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=eps)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        if temb_width is not None:
            self.time_emb_proj = nn.Linear(temb_width, outputs)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=eps)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        h = self.conv1(group_norm(x, self.norm1, silu=True))
        if temb is not None:
            h += self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(group_norm(h, self.norm2, silu=True))
        return h.add_(self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halve H and W with a strided convolution.

    one_sided: pad the right and bottom edges only, as the VAE's encoder does.
    """

    def __init__(self, channels: int, one_sided: bool = False):
        super().__init__()
        self.one_sided = one_sided
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if one_sided else 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.one_sided:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Upsample(nn.Module):
    """Double H and W by nearest neighbour, then a convolution.

    size: (H, W) of the result, where halving had rounded up and doubling would be one too many.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        if size is None:
            size = (2 * x.shape[-2], 2 * x.shape[-1])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


def double_inputs(conv: nn.Conv2d):
    """Let a convolution take as many channels again, which count nothing at first."""
    weight = conv.weight.detach()
    conv.weight = nn.Parameter(torch.cat([weight, torch.zeros_like(weight)], dim=1))
    conv.in_channels *= 2
