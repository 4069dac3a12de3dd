"""ControlNet: a second encoder that looks at a picture and tells the frozen UNet what to add (arXiv 2302.05543).

hint [B,3,H,W] in 0..1, and what the UNet gets -> residuals for every skip connection and the middle of the UNet.
Official files for SDXL (full, -mid and -small) and SD 1.5 load unchanged: attribute paths are diffusers' keys.
"""

import re
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from minipic.models.unet import FIXED, Encoder, EncoderConfig


@dataclass(frozen=True)
class ControlNetConfig(EncoderConfig):
    """The varying keys of a ControlNet's config.json; the defaults are a full one for SDXL."""

    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)  # each but the first halves the picture

    @classmethod
    def from_json(cls, values, where="config.json"):
        """As EncoderConfig's."""
        return super().from_json(values, where, FIXED | {
            "controlnet_conditioning_channel_order": ("rgb",), "global_pool_conditions": (False,)})

    @classmethod
    def told(cls, shapes, unet):
        """The config of a file that has none: its {name: shape} tell what differs from that of its UNet, `unet`."""
        def count(start):  # how many different numbers follow it
            return len({name[len(start):].partition(".")[0] for name in shapes if name.startswith(start)})

        def width(name):
            return (shapes.get(f"{name}.bias") or (0,))[0]
        levels, hint = range(count("down_blocks.")), "controlnet_cond_embedding."
        ends = [f"down_blocks.{i}.attentions.0." for i in levels]
        depths = [count(f"{start}transformer_blocks.") for start in [*ends[:-1], "mid_block.attentions.0."]]
        heard = [shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight") and len(shape) == 2]
        return cls(**{f.name: getattr(unet, f.name) for f in fields(EncoderConfig)} | {
            "in_channels": unet.out_channels,
            "block_out_channels": tuple(width(f"down_blocks.{i}.resnets.0.conv1") for i in levels),
            "down_block_types": tuple(f"{'CrossAttn' * bool(count(start))}DownBlock2D" for start in ends),
            "transformer_layers_per_block": tuple(depths),
            "cross_attention_dim": heard[0] if heard else unet.cross_attention_dim,
            "conditioning_embedding_out_channels": tuple(width(hint + slot) for slot in (
                "conv_in", *(f"blocks.{i}" for i in range(1, count(hint + "blocks."), 2))))})

    def to_json(self):
        return {"_class_name": "ControlNetModel", **asdict(self)}

    def misfit(self, unet, factor):
        """Why this cannot steer a UNet with the UNetConfig `unet` and a VAE of `factor`, in words; None if it can."""
        if self.in_channels != unet.out_channels:  # it sees x alone, also where the UNet sees a picture too
            return f"takes {self.in_channels} channels and the UNet makes {unet.out_channels}"
        for name in ("block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type",
                     "projection_class_embeddings_input_dim"):
            if getattr(self, name) != getattr(unet, name):
                return f"has {name}={getattr(self, name)!r} and the UNet {getattr(unet, name)!r}"
        channels, times = self.conditioning_channels, 2 ** (len(self.conditioning_embedding_out_channels) - 1)
        if (channels, times) != (3, factor):
            return f"takes {channels} channels of {times} times the latents' size instead of 3 of {factor} times"


def zero(conv):
    """Let a convolution begin as zero: what it feeds is then at first as if it were not there (section 3.1)."""
    nn.init.zeros_(conv.weight), nn.init.zeros_(conv.bias)
    return conv


class HintEncoder(nn.Module):
    """hint [B,3,H,W] -> [B,C,h,w], the size of latents."""

    def __init__(self, config):
        super().__init__()
        first, *_ = widths = config.conditioning_embedding_out_channels
        self.conv_in = nn.Conv2d(config.conditioning_channels, first, 3, padding=1)
        self.blocks = nn.ModuleList()
        for narrow, wide in zip(widths, widths[1:]):
            self.blocks += [nn.Conv2d(narrow, narrow, 3, padding=1), nn.Conv2d(narrow, wide, 3, stride=2, padding=1)]
        self.conv_out = nn.Conv2d(widths[-1], config.block_out_channels[0], 3, padding=1)

    @torch.no_grad()
    def begin(self):
        """Draw Gaussian weights (section 3.2) under which noise leaves every layer with variance 1 (arXiv 1511.06422).
        At He's scale SiLU fades the map to a tenth of the latents that it joins, and it is found late or never."""
        x = torch.rand(1, self.conv_in.in_channels, 64, 64)
        for conv in (self.conv_in, *self.blocks, self.conv_out):
            nn.init.normal_(conv.weight), nn.init.zeros_(conv.bias)
            conv.weight /= conv(x).std()
            x = F.silu(conv(x))

    def forward(self, x):
        for conv in (self.conv_in, *self.blocks):
            x = F.silu(conv(x))
        return self.conv_out(x)


class ControlNet(Encoder):
    def __init__(self, config=ControlNetConfig()):
        super().__init__(config)
        self.controlnet_cond_embedding = HintEncoder(config)
        self.controlnet_down_blocks = nn.ModuleList(zero(nn.Conv2d(width, width, 1)) for width in self.skips)
        self.controlnet_mid_block = zero(nn.Conv2d(self.skips[-1], self.skips[-1], 1))

    @classmethod
    def from_unet(cls, unet, factor=8, small=False):
        """A new ControlNet with a copy of a UNet's encoder, which changes nothing before it is trained. `factor`: the
        VAE's, a power of 2 up to 8. `small`: leave the transformers out, as the -small ones for SDXL do."""
        config = ControlNetConfig(**{f.name: getattr(unet.config, f.name) for f in fields(EncoderConfig)})
        if small:
            levels = len(config.block_out_channels)
            config = replace(config, down_block_types=("DownBlock2D",) * levels,
                             transformer_layers_per_block=(0,) * levels)
        widths = config.conditioning_embedding_out_channels[:factor.bit_length()]
        model = cls(replace(config, conditioning_embedding_out_channels=widths))
        model.controlnet_cond_embedding.begin()
        model.to(next(unet.parameters()))
        known = unet.state_dict()
        model.load_state_dict({name: known.get(name, x) for name, x in model.state_dict().items()})
        return model

    def forward(self, x, t, context, hint, pooled=None, size_ids=None, scale=1.0):
        """hint [B or 1,3,H,W] in 0..1, the rest as the UNet takes it -> `residuals` for it, times `scale`: a list of
        [B,C,h,w] that ends with the middle's."""
        temb = self.embed(t, pooled, size_ids, x)
        found = self.down(self.conv_in(x) + self.controlnet_cond_embedding(hint), temb, context)
        convs = (*self.controlnet_down_blocks, self.controlnet_mid_block)
        return [scale * conv(x) for conv, x in zip(convs, found, strict=True)]
