"""AutoencoderKL: picture [B,3,H,W] in [-1,1] <-> latent [B,C,H/f,W/f], f = 2 ** (levels - 1), 8 for SDXL.

arXiv 2112.10752 section 3.1. Attribute paths are the keys of the official diffusers-layout files. Latents here are
unscaled: the UNet's are (latent - shift_factor) * scaling_factor. Official SDXL weights overflow in fp16: use fp32 or
bf16 (`force_upcast` in the file says so).
"""

from dataclasses import asdict, dataclass
from itertools import product

import torch
import torch.nn as nn

from minipic.common import from_json
from minipic.layers.attention import Attention
from minipic.layers.blocks import Downsample, ResnetBlock, Upsample, group_norm

FIXED = {"act_fn": ("silu",), "latents_mean": (None,), "latents_std": (None,), "mid_block_add_attention": (True,)}
TYPES = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}  # one for each level
EPS = 1e-6  # of every GroupNorm; PyTorch's default 1e-5 gives pictures that are visibly off


@dataclass(frozen=True)
class VAEConfig:
    """The varying keys of vae/config.json; the defaults are SDXL's."""

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

    @classmethod
    def from_json(cls, values, where="vae/config.json"):
        """Read an official config.json; keys it lacks take diffusers' defaults. SD 1.5's lacks the scaling factor."""
        legacy = {"sample_size": 32, "block_out_channels": (64,), "layers_per_block": 1, "scaling_factor": 0.18215}
        values = legacy | values
        widths = values["block_out_channels"]
        levels = len(widths) if isinstance(widths, (list, tuple)) else 0  # from_json refuses others
        types = {key: (name * levels,) for key, name in TYPES.items()}
        return from_json(cls, values, FIXED | types, where)

    def to_json(self):
        types = {key: name * len(self.block_out_channels) for key, name in TYPES.items()}
        return {"_class_name": "AutoencoderKL", **asdict(self), **types}

    @property
    def factor(self):
        """Pixels per latent pixel along a side."""
        return 2 ** (len(self.block_out_channels) - 1)


SDXL_VAE = VAEConfig()
SD15_VAE = VAEConfig(sample_size=512, scaling_factor=0.18215)


class PixelAttention(Attention):
    """One head over all pixels, x [B,C,H,W] -> [B,C,H,W]."""

    def __init__(self, channels, groups):
        super().__init__(channels, channels, heads=1, head_dim=channels, qkv_bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)

    def forward(self, x):
        tokens = group_norm(x, self.group_norm).flatten(2).transpose(1, 2)  # [B,C,H,W] -> [B,HW,C]
        return x + super().forward(tokens).transpose(1, 2).unflatten(2, x.shape[-2:])


class Level(nn.Module):
    def __init__(self, inputs, outputs, resnets, groups):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(inputs if i == 0 else outputs, outputs, groups, EPS) for i in range(resnets))

    def forward(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        return x


class MidLevel(Level):
    def __init__(self, channels, groups):
        super().__init__(channels, channels, 2, groups)
        self.attentions = nn.ModuleList([PixelAttention(channels, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """Picture [B,3,H,W] -> mean and log-variance, stacked [B,2C,H/f,W/f]."""

    def __init__(self, config):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[max(i - 1, 0)], width, config.layers_per_block, groups)
            level.downsamplers = nn.ModuleList([Downsample(width, one_sided=True)] if i < len(widths) - 1 else [])
            self.down_blocks.append(level)
        self.mid_block = MidLevel(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
            for downsample in level.downsamplers:
                x = downsample(x)
        x = self.mid_block(x)
        return self.conv_out(group_norm(x, self.conv_norm_out, silu=True))


class Decoder(nn.Module):
    """Latent [B,C,h,w] -> picture [B,3,f*h,f*w]. The way up has one resnet more a level than the way down."""

    def __init__(self, config):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidLevel(widths[0], groups)
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[max(i - 1, 0)], width, config.layers_per_block + 1, groups)
            level.upsamplers = nn.ModuleList([Upsample(width)] if i < len(widths) - 1 else [])
            self.up_blocks.append(level)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z):
        return self.up(self.mid_block(self.conv_in(z)))

    def up(self, x):
        """What the middle made of z [B,C,h,w] -> picture [B,3,f*h,f*w]."""
        for level in self.up_blocks:
            x = level(x)
            for upsample in level.upsamplers:
                x = upsample(x)
        return self.conv_out(group_norm(x, self.conv_norm_out, silu=True))


class VAE(nn.Module):
    def __init__(self, config=SDXL_VAE):
        super().__init__()
        self.config, c = config, config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(c, c, 1) if config.use_post_quant_conv else nn.Identity()

    def encode(self, image):
        """image [B,3,H,W] in [-1,1] -> (mean, logvar), each [B,C,H/f,W/f], unscaled."""
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)  # the original's bounds: exp stays finite

    def decode(self, z):
        """z [B,C,h,w], unscaled -> image [B,3,f*h,f*w] in about [-1,1]."""
        return self.decoder(self.post_quant_conv(z))

    def decode_tiles(self, z, side=128, overlap=32):
        """`decode` with the way up, which takes the memory, in tiles of `side` x `side` latent pixels that share
        `overlap` with their neighbours and fade into them. Near to what `decode` gives, not equal: on the way up
        GroupNorm sees one tile alone."""
        f, (height, width) = self.config.factor, z.shape[2:]
        middle = self.decoder.mid_block(self.decoder.conv_in(self.post_quant_conv(z)))
        picture = z.new_zeros(len(z), self.config.out_channels, f * height, f * width, dtype=torch.float32)
        weights = torch.zeros_like(picture[:1, :1])
        rows, columns = ([max(0, min(start, n - side)) for start in range(0, max(1, n - overlap), side - overlap)]
                         for n in (height, width))
        for y, x in product(rows, columns):
            tile = self.decoder.up(middle[..., y:y + side, x:x + side])
            inward = [torch.arange(n, device=z.device) + 0.5 for n in tile.shape[2:]]  # pixels from either edge
            down, across = (torch.minimum(i, len(i) - i).clamp(max=f * overlap) for i in inward)
            here = ..., slice(f * y, f * y + len(down)), slice(f * x, f * x + len(across))
            picture[here] += tile * down[:, None] * across
            weights[here] += down[:, None] * across
        return (picture / weights).to(z.dtype)

    def scale(self, z):
        """Latent -> what the UNet sees, of standard deviation about 1."""
        return (z - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def unscale(self, x):
        return x / self.config.scaling_factor + (self.config.shift_factor or 0.0)
