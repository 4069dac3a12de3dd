"""The convolutional blocks that the UNet and the VAE share: residual block, downsampling, upsampling.

Attribute names are those of the official diffusers-layout files.
"""

import torch.nn as nn
import torch.nn.functional as F


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
        h = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


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
