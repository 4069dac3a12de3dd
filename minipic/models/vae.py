"""AutoencoderKL: picture [B,3,H,W] in [-1,1] <-> latent [B,C,H/f,W/f].

f = 2 ** (levels - 1), which is 8 for SDXL. arXiv 2112.10752 section 3.1. Attribute paths are the
keys of the official diffusers-layout files. Latents here are unscaled: the UNet's are
(latent - shift_factor) * scaling_factor. Official SDXL weights overflow in fp16: use fp32 or bf16
(`force_upcast` in the file says so).
"""

from dataclasses import dataclass

import torch
import torch.nn as nn

from minipic.common import CheckedConfig, ParameterError
from minipic.layers.attention import Attention
from minipic.layers.blocks import Downsample, ResnetBlock, Upsample, group_norm

EPS = 1e-6  # of every GroupNorm; PyTorch's default 1e-5 gives pictures that are visibly off
MAX_LEVELS = 16


@dataclass(frozen=True)
class VAEConfig(CheckedConfig):
    """Where vae/config.json files differ; the defaults are SDXL's."""

    sample_size: int = 1024
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.13025
    shift_factor: float | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    LIMITS = {
        "sample_size": (1, 65536), "in_channels": (1, 1024), "out_channels": (1, 1024),
        "latent_channels": (1, 1024), "block_out_channels": (1, 65536), "layers_per_block": (1, 64),
        "norm_num_groups": (1, 65536), "scaling_factor": (1e-6, 1e6), "shift_factor": (-1e6, 1e6)}

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= len(self.block_out_channels) <= MAX_LEVELS:
            raise ParameterError("block_out_channels", f"must name 1 to {MAX_LEVELS} levels")
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                problem = f"{self.norm_num_groups} does not divide {width} channels"
                raise ParameterError("norm_num_groups", problem)

    @property
    def factor(self) -> int:
        """Pixels per latent pixel along a side."""
        return 2 ** (len(self.block_out_channels) - 1)


SDXL_VAE = VAEConfig()
SD15_VAE = VAEConfig(sample_size=512, scaling_factor=0.18215)


class PixelAttention(Attention):
    """One head over all pixels: x [B,C,H,W] -> [B,C,H,W]."""

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, channels, heads=1, head_dim=channels, qkv_bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = group_norm(x, self.group_norm).flatten(2).transpose(1, 2)  # [B,C,H,W] -> [B,HW,C]
        tokens = super().forward(tokens)
        return x + tokens.transpose(1, 2).unflatten(2, x.shape[-2:])


class Level(nn.Module):
    """The resnets of one resolution: x [B,C_in,H,W] -> [B,C_out,H,W]."""

    def __init__(self, inputs: int, outputs: int, resnets: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList()
        for i in range(resnets):
            self.resnets.append(ResnetBlock(inputs if i == 0 else outputs, outputs, groups, EPS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x


class DownLevel(Level):
    """A level of the encoder, which halves H and W unless it is the last."""

    def __init__(self, inputs: int, outputs: int, resnets: int, groups: int, is_last: bool):
        super().__init__(inputs, outputs, resnets, groups)
        self.downsamplers = nn.ModuleList([] if is_last else [Downsample(outputs, one_sided=True)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        for downsample in self.downsamplers:
            x = downsample(x)
        return x


class UpLevel(Level):
    """A level of the decoder, which doubles H and W unless it is the last."""

    def __init__(self, inputs: int, outputs: int, resnets: int, groups: int, is_last: bool):
        super().__init__(inputs, outputs, resnets, groups)
        self.upsamplers = nn.ModuleList([] if is_last else [Upsample(outputs)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class MidLevel(Level):
    """A resnet, attention, a resnet: x [B,C,H,W] -> [B,C,H,W]."""

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, channels, 2, groups)
        self.attentions = nn.ModuleList([PixelAttention(channels, groups)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """Picture [B,3,H,W] -> mean and log-variance, stacked [B,2C,H/f,W/f]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.block_out_channels
        groups = config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        channels = widths[0]
        for i, width in enumerate(widths):
            is_last = i == len(widths) - 1
            level = DownLevel(channels, width, config.layers_per_block, groups, is_last)
            self.down_blocks.append(level)
            channels = width
        self.mid_block = MidLevel(channels, groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels, eps=EPS)
        self.conv_out = nn.Conv2d(channels, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        return self.conv_out(group_norm(x, self.conv_norm_out, silu=True))


class Decoder(nn.Module):
    """Latent [B,C,h,w] -> picture [B,3,f*h,f*w]. A level has one resnet more than the encoder's."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.block_out_channels[::-1]
        groups = config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidLevel(widths[0], groups)
        self.up_blocks = nn.ModuleList()
        channels = widths[0]
        for i, width in enumerate(widths):
            is_last = i == len(widths) - 1
            level = UpLevel(channels, width, config.layers_per_block + 1, groups, is_last)
            self.up_blocks.append(level)
            channels = width
        self.conv_norm_out = nn.GroupNorm(groups, channels, eps=EPS)
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.up(self.middle(z))

    def middle(self, z: torch.Tensor) -> torch.Tensor:
        """z [B,C,h,w] -> x of the same height and width."""
        return self.mid_block(self.conv_in(z))

    def up(self, x: torch.Tensor) -> torch.Tensor:
        """What `middle` made of z [B,C,h,w] -> picture [B,3,f*h,f*w]."""
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(group_norm(x, self.conv_norm_out, silu=True))


class VAE(nn.Module):
    """Pictures [B,3,H,W] and their latents [B,C,H/f,W/f]: diffusers' AutoencoderKL."""

    def __init__(self, config: VAEConfig = SDXL_VAE):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        channels = config.latent_channels
        self.quant_conv = nn.Identity()
        if config.use_quant_conv:
            self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)  # of mean and log-variance
        self.post_quant_conv = nn.Identity()
        if config.use_post_quant_conv:
            self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def encode(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """image [B,3,H,W] in [-1,1] -> (mean, logvar), each [B,C,H/f,W/f], unscaled."""
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)  # the original's bounds: exp stays finite

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """z [B,C,h,w], unscaled -> image [B,3,f*h,f*w] in about [-1,1]."""
        return self.decoder(self.post_quant_conv(z))

    def decode_tiles(self, z: torch.Tensor, side: int = 128, overlap: int = 32) -> torch.Tensor:
        """`decode` in less memory: the way up, which takes most of it, goes tile by tile.

        Tiles have side x side latent pixels, share `overlap` of them with each neighbour and fade
        into it. The picture is near to that of `decode`, not equal: on the way up a GroupNorm sees
        one tile alone.
        """
        factor = self.config.factor
        batch, _, height, width = z.shape
        middle = self.decoder.middle(self.post_quant_conv(z))
        shape = batch, self.config.out_channels, factor * height, factor * width
        picture = torch.zeros(shape, dtype=torch.float32, device=z.device)
        weights = torch.zeros_like(picture[:1, :1])
        for top in tile_starts(height, side, overlap):
            for left in tile_starts(width, side, overlap):
                tile = self.decoder.up(middle[..., top:top + side, left:left + side])
                rows, columns = tile.shape[2:]
                fade_y = fade(rows, factor * overlap, z.device)[:, None]
                fade_x = fade(columns, factor * overlap, z.device)
                y = factor * top
                x = factor * left
                picture[..., y:y + rows, x:x + columns] += tile * fade_y * fade_x
                weights[..., y:y + rows, x:x + columns] += fade_y * fade_x
        return (picture / weights).to(z.dtype)

    def scale(self, z: torch.Tensor) -> torch.Tensor:
        """Latent -> what the UNet sees, of standard deviation about 1."""
        return (z - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def unscale(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `scale`."""
        return x / self.config.scaling_factor + (self.config.shift_factor or 0.0)


def tile_starts(length: int, side: int, overlap: int) -> list[int]:
    """Where the tiles begin along one side of a picture. The last ends where the picture does."""
    starts = range(0, max(1, length - overlap), side - overlap)
    return [max(0, min(start, length - side)) for start in starts]


def fade(length: int, border: int, device: torch.device) -> torch.Tensor:
    """Weights [length] of a tile's pixels: the distance to the nearer edge, up to `border`."""
    position = torch.arange(length, device=device) + 0.5
    return torch.minimum(position, length - position).clamp(max=border)
