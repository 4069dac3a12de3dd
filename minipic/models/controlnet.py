"""ControlNet (arXiv 2302.05543): a second encoder that makes a frozen UNet follow a picture.

hint [B,3,H,W] in 0..1, and what the UNet gets -> residuals for every skip connection and the middle
of the UNet. Official files for SDXL (full, -mid and -small) and SD 1.5 load unchanged: attribute
paths are diffusers' keys.
"""

from dataclasses import dataclass, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from minipic.common import ParameterError
from minipic.layers.attention import TextKeysValues
from minipic.models.unet import MAX_LEVELS, Encoder, EncoderConfig, UNet


@dataclass(frozen=True)
class ControlNetConfig(EncoderConfig):
    """Where config.json files of ControlNets differ; the defaults are a full one for SDXL."""

    conditioning_channels: int = 3
    # Each width but the first halves the picture.
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)

    LIMITS = EncoderConfig.LIMITS | {
        "conditioning_channels": (1, 1024), "conditioning_embedding_out_channels": (1, 65536)}

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= len(self.conditioning_embedding_out_channels) <= MAX_LEVELS:
            raise ParameterError(
                "conditioning_embedding_out_channels", f"must name 1 to {MAX_LEVELS} widths")


def zero(conv: nn.Conv2d) -> nn.Conv2d:
    """Let a convolution begin at zero, as if what it feeds were not there (section 3.1)."""
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


class HintEncoder(nn.Module):
    """hint [B,3,H,W] -> [B,C,h,w], the size of latents."""

    def __init__(self, config: ControlNetConfig):
        super().__init__()
        widths = config.conditioning_embedding_out_channels
        self.conv_in = nn.Conv2d(config.conditioning_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for narrow, wide in zip(widths, widths[1:]):
            self.blocks.append(nn.Conv2d(narrow, narrow, 3, padding=1))
            self.blocks.append(nn.Conv2d(narrow, wide, 3, stride=2, padding=1))
        self.conv_out = nn.Conv2d(widths[-1], config.block_out_channels[0], 3, padding=1)

    @torch.no_grad()
    def initialize(self):
        """Draw Gaussian weights (section 3.2), so that noise leaves layers with variance 1.

        That is arXiv 1511.06422. At He's scale SiLU fades the map to a tenth of the latents that it
        joins, and training uses it late or never.
        """
        x = torch.rand(1, self.conv_in.in_channels, 64, 64)
        for conv in (self.conv_in, *self.blocks, self.conv_out):
            nn.init.normal_(conv.weight)
            nn.init.zeros_(conv.bias)
            conv.weight /= conv(x).std()
            x = F.silu(conv(x))

    def forward(self, hint: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.conv_in(hint))
        for conv in self.blocks:
            x = F.silu(conv(x))
        return self.conv_out(x)


class ControlNet(Encoder):
    """The encoder of a UNet, whose outputs are added to the frozen UNet's skip connections."""

    def __init__(self, config: ControlNetConfig = ControlNetConfig()):
        super().__init__(config)
        self.controlnet_cond_embedding = HintEncoder(config)
        self.controlnet_down_blocks = nn.ModuleList(
            zero(nn.Conv2d(channels, channels, 1)) for channels in self.skip_channels)
        channels = config.block_out_channels[-1]
        self.controlnet_mid_block = zero(nn.Conv2d(channels, channels, 1))

    @classmethod
    def from_unet(cls, unet: UNet, factor: int = 8, small: bool = False) -> "ControlNet":
        """A new ControlNet with a copy of a UNet's encoder, without effect before it is trained.

        factor: the VAE's, a power of 2 up to 8.
        small: leave the transformers out, as the -small ones for SDXL do.
        """
        shared = {field.name: getattr(unet.config, field.name) for field in fields(EncoderConfig)}
        config = ControlNetConfig(**shared)
        if small:
            levels = len(config.block_out_channels)
            config = replace(
                config, down_block_types=("DownBlock2D",) * levels,
                transformer_layers_per_block=(0,) * levels)
        widths = config.conditioning_embedding_out_channels[:factor.bit_length()]
        model = cls(replace(config, conditioning_embedding_out_channels=widths))
        model.controlnet_cond_embedding.initialize()
        model.to(next(unet.parameters()))
        known = unet.state_dict()
        own = model.state_dict()
        model.load_state_dict({name: known.get(name, x) for name, x in own.items()})
        return model

    def forward(
            self, x: torch.Tensor, t: torch.Tensor | float, context: torch.Tensor | TextKeysValues,
            hint: torch.Tensor, pooled: torch.Tensor | None = None,
            size_ids: torch.Tensor | None = None, scale: float = 1.0) -> list[torch.Tensor]:
        """The residuals for the UNet, times `scale`.

        They are [B,C,h,w] for each skip connection, and the middle's at the end.
        hint: [B or 1,3,H,W] in 0..1. The rest is as the UNet takes it.
        """
        temb = self.embed(t, pooled, size_ids, x)
        x = self.conv_in(x) + self.controlnet_cond_embedding(hint)
        x, skips = self.encode(x, temb, context)
        residuals = []
        for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True):
            residuals.append(scale * conv(skip))
        residuals.append(scale * self.controlnet_mid_block(x))
        return residuals
