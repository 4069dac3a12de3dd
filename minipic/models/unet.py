"""The denoising UNet: one class for SDXL base, refiner, Turbo, SD 1.5, SD 2.x and the tiny model.

x [B,4,h,w], t [B], context [B,N,D] (and pooled [B,D], size_ids [B,6]) -> prediction like x.

SDXL: arXiv 2307.01952; the architecture: arXiv 2112.10752. Attribute paths are the keys of the
official files in diffusers' layout, so that a checkpoint loads without renaming. Slots without
parameters are Identity for that reason.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minipic.common import CheckedConfig, ParameterError
from minipic.layers.attention import Attention, TextKeysValues
from minipic.layers.blocks import (
    Downsample, ResnetBlock, Upsample, add_norm, geglu, group_norm, layer_norm)

MAX_LEVELS = 8
MAX_BLOCKS = 256  # transformer blocks on the way down, of which SDXL has 24


@dataclass(frozen=True)
class EncoderConfig(CheckedConfig):
    """The keys of config.json that a UNet and a ControlNet share; the defaults are SDXL base's."""

    in_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280)
    down_block_types: tuple[str, ...] = (
        "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    layers_per_block: int = 2
    transformer_layers_per_block: int | tuple[int, ...] = (1, 2, 10)
    attention_head_dim: int | tuple[int, ...] = (5, 10, 20)  # the NUMBER of heads: a misnomer
    cross_attention_dim: int = 2048
    use_linear_projection: bool = True
    addition_embed_type: str | None = "text_time"
    addition_time_embed_dim: int | None = 256
    projection_class_embeddings_input_dim: int | None = 2816  # pooled 1280 + 6 size ids * 256
    norm_num_groups: int = 32
    norm_eps: float = 1e-5

    LIMITS = {
        "in_channels": (1, 1024), "out_channels": (1, 1024), "sample_size": (1, 65536),
        "block_out_channels": (1, 65536), "layers_per_block": (1, 64),
        "transformer_layers_per_block": (0, 256), "attention_head_dim": (1, 1024),
        "cross_attention_dim": (1, 65536), "addition_time_embed_dim": (2, 65536),
        "projection_class_embeddings_input_dim": (1, 1 << 20), "norm_num_groups": (1, 65536),
        "norm_eps": (1e-12, 1.0)}

    def __post_init__(self):
        super().__post_init__()
        levels = len(self.block_out_channels)
        if not 1 <= levels <= MAX_LEVELS:
            raise ParameterError("block_out_channels", f"must name 1 to {MAX_LEVELS} levels")
        for key in (
                "down_block_types", "up_block_types", "attention_head_dim",
                "transformer_layers_per_block"):
            value = getattr(self, key, 0)  # a ControlNet has no way up
            if len(self.per_level(value)) != levels:
                raise ParameterError(
                    key, f"must have {levels} values, one for each of block_out_channels")
        for stem in ("Down", "Up"):
            key = f"{stem.lower()}_block_types"
            known = (f"{stem}Block2D", f"CrossAttn{stem}Block2D")
            for name in getattr(self, key, ()):
                if name not in known:
                    raise ParameterError(
                        key, f"block type {name!r} is not supported; use {' or '.join(known)}")
        heads_per_level = self.per_level(self.attention_head_dim)
        for width, heads in zip(self.block_out_channels, heads_per_level):
            if width % self.norm_num_groups:
                raise ParameterError(
                    "norm_num_groups", f"{self.norm_num_groups} does not divide {width} channels")
            if width % heads:
                raise ParameterError(
                    "attention_head_dim", f"{heads} heads do not divide {width} channels")
        blocks = self.layers_per_block * sum(self.per_level(self.transformer_layers_per_block))
        if blocks > MAX_BLOCKS:
            raise ParameterError(
                "transformer_layers_per_block", f"asks for {blocks} blocks on the way down; "
                f"expected at most {MAX_BLOCKS}")
        if self.addition_embed_type is not None:
            self.check_addition()

    def check_addition(self):
        """ParameterError unless the pooled text and the size ids make up the added embedding."""
        if self.addition_embed_type != "text_time":
            raise ParameterError(
                "addition_embed_type",
                f"{self.addition_embed_type!r} is not supported; use 'text_time' or None")
        for key in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
            if getattr(self, key) is None:
                raise ParameterError(key, "is needed for addition_embed_type='text_time'")
        width = self.addition_time_embed_dim
        if width % 2:
            raise ParameterError(
                "addition_time_embed_dim", f"{width} is odd; a cosine and a sine make two each")
        if self.projection_class_embeddings_input_dim <= 5 * width:
            raise ParameterError(
                "projection_class_embeddings_input_dim",
                f"{self.projection_class_embeddings_input_dim} has no room for a pooled text "
                f"besides five size ids of {width}")

    def per_level(self, value: int | str | tuple) -> tuple:
        """One value per level, from a config entry that may be a single number for all of them."""
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)


@dataclass(frozen=True)
class UNetConfig(EncoderConfig):
    """The keys in which official unet/config.json files differ; the defaults are SDXL base 1.0."""

    sample_size: int = 128
    out_channels: int = 4
    up_block_types: tuple[str, ...] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")


SDXL_BASE = UNetConfig()  # Turbo too
SDXL_REFINER = UNetConfig(
    block_out_channels=(384, 768, 1536, 1536),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=4,
    attention_head_dim=(6, 12, 24, 24),
    cross_attention_dim=1280,
    projection_class_embeddings_input_dim=2560)  # pooled 1280 + 5 size ids * 256
SD15 = UNetConfig(
    sample_size=64,
    block_out_channels=(320, 640, 1280, 1280),
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    transformer_layers_per_block=1,
    attention_head_dim=8,
    cross_attention_dim=768,
    use_linear_projection=False,
    addition_embed_type=None,
    addition_time_embed_dim=None,
    projection_class_embeddings_input_dim=None)


def timestep_embedding(t: torch.Tensor, width: int) -> torch.Tensor:
    """Sinusoids of a number, t [B] -> [B,width]: cosines then sines.

    Their frequencies are 10000^(-i / (width/2)).
    """
    half = width // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(10000) * i / half)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepMLP(nn.Module):
    """[B,in_width] -> [B,width]."""

    def __init__(self, in_width: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class GEGLU(nn.Module):
    """x [B,N,D] -> [B,N,inner]: values times the GELU of gates."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return geglu(self.proj(x))


class FeedForward(nn.Module):
    """x [B,N,D] -> [B,N,D], by way of 4D numbers for each token."""

    def __init__(self, width: int):
        super().__init__()
        inner = 4 * width
        # diffusers' ff.net has a Dropout at index 1; Identity keeps the number in "net.2.weight".
        self.net = nn.Sequential(GEGLU(width, inner), nn.Identity(), nn.Linear(inner, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention of pixels (attn1), attention to the text (attn2), a feed-forward net (ff)."""

    def __init__(self, width: int, heads: int, context_width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads, width // heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, context_width, heads, width // heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(
            self, x: torch.Tensor, context: torch.Tensor | TextKeysValues) -> torch.Tensor:
        # add_norm is `x = x + y; return x, norm(x)`, which one kernel can do
        x, normed = add_norm(x, self.attn1(layer_norm(x, self.norm1)), self.norm2)
        x, normed = add_norm(x, self.attn2(normed, context), self.norm3)
        return x + self.ff(normed)


class SpatialTransformer(nn.Module):
    """x [B,C,H,W] and context [B,N,D] -> [B,C,H,W]; pixels become tokens and come back."""

    def __init__(self, channels: int, depth: int, heads: int, config: EncoderConfig):
        super().__init__()
        self.projects_tokens = config.use_linear_projection  # SD 1.5: pixels, by 1x1 convolutions
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)  # not norm_eps
        self.proj_in = self.projection(channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, config.cross_attention_dim) for _ in range(depth))
        self.proj_out = self.projection(channels)

    def projection(self, channels: int) -> nn.Module:
        if self.projects_tokens:
            return nn.Linear(channels, channels)
        return nn.Conv2d(channels, channels, 1)

    def forward(
            self, x: torch.Tensor, context: torch.Tensor | TextKeysValues) -> torch.Tensor:
        residual = x
        height, width = x.shape[-2:]
        x = group_norm(x, self.norm)
        if not self.projects_tokens:
            x = self.proj_in(x)
        x = x.flatten(2).transpose(1, 2)  # [B,C,H,W] -> [B,HW,C]
        if self.projects_tokens:
            x = self.proj_in(x)
        for block in self.transformer_blocks:
            x = block(x, context)
        if self.projects_tokens:
            x = self.proj_out(x)
        x = x.transpose(1, 2).unflatten(2, (height, width))  # [B,HW,C] -> [B,C,H,W]
        if not self.projects_tokens:
            x = self.proj_out(x)
        return residual + x


class Level(nn.Module):
    """The resnets of one resolution, each followed by a transformer where `transformers` > 0.

    resnet_inputs: the channels that each resnet takes; all of them make `channels`.

    `temb` is everywhere the embedding of t and, for SDXL, of the pooled text and the sizes, [B, 4 *
    first width]; see Encoder.embed. Every resnet adds a projection of it. `context` [B,N,D] is the
    text.
    """

    def __init__(
            self, resnet_inputs: list[int], channels: int, transformers: int, depth: int,
            heads: int, config: EncoderConfig):
        super().__init__()
        self.gradient_checkpointing = False  # recompute layers in the backward pass, for memory
        temb_width = 4 * config.block_out_channels[0]
        groups = config.norm_num_groups
        eps = config.norm_eps
        self.resnets = nn.ModuleList(
            ResnetBlock(width, channels, groups, eps, temb_width) for width in resnet_inputs)
        self.attentions = nn.ModuleList(
            SpatialTransformer(channels, depth, heads, config) for _ in range(transformers))

    def layer(
            self, i: int, x: torch.Tensor, temb: torch.Tensor,
            context: torch.Tensor | TextKeysValues) -> torch.Tensor:
        """Resnet number i and its transformer, if the level has any."""
        x = self.run(self.resnets[i], x, temb)
        if self.attentions:
            x = self.run(self.attentions[i], x, context)
        return x

    def run(self, module: nn.Module, *inputs: torch.Tensor | TextKeysValues) -> torch.Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)


class DownLevel(Level):
    """diffusers' CrossAttnDownBlock2D, or its DownBlock2D if not `attends`.

    x [B,C_in,H,W] -> (x at half the size, except in the last level; skip connections). The skip
    connections are x after every layer and after the downsampling.
    """

    def __init__(
            self, in_channels: int, channels: int, attends: bool, depth: int, heads: int,
            is_last: bool, config: EncoderConfig):
        layers = config.layers_per_block
        resnet_inputs = [in_channels] + [channels] * (layers - 1)
        super().__init__(resnet_inputs, channels, layers if attends else 0, depth, heads, config)
        self.downsamplers = nn.ModuleList([] if is_last else [Downsample(channels)])

    def forward(
            self, x: torch.Tensor, temb: torch.Tensor, context: torch.Tensor | TextKeysValues,
            ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, temb, context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, skips


class MidLevel(Level):
    """diffusers' UNetMidBlock2DCrossAttn: a resnet, a transformer, a resnet.

    x [B,C,H,W] -> [B,C,H,W].
    """

    def __init__(self, channels: int, depth: int, heads: int, config: EncoderConfig):
        super().__init__([channels, channels], channels, 1, depth, heads, config)

    def forward(
            self, x: torch.Tensor, temb: torch.Tensor,
            context: torch.Tensor | TextKeysValues) -> torch.Tensor:
        x = self.layer(0, x, temb, context)
        return self.run(self.resnets[1], x, temb)


class UpLevel(Level):
    """diffusers' CrossAttnUpBlock2D, or its UpBlock2D if not `attends`.

    x [B,C_in,H,W] -> x at twice the size, except in the last level. The level pops its skip
    connections off the end of `skips`, which it shares with the other levels.
    resnet_inputs: for each resnet, the channels of x and of its skip connection together.
    """

    def __init__(
            self, resnet_inputs: list[int], channels: int, attends: bool, depth: int, heads: int,
            is_last: bool, config: EncoderConfig):
        transformers = len(resnet_inputs) if attends else 0
        super().__init__(resnet_inputs, channels, transformers, depth, heads, config)
        self.upsamplers = nn.ModuleList([] if is_last else [Upsample(channels)])

    def forward(
            self, x: torch.Tensor, skips: list[torch.Tensor], temb: torch.Tensor,
            context: torch.Tensor | TextKeysValues) -> torch.Tensor:
        for i in range(len(self.resnets)):
            x = torch.cat([x, skips.pop()], dim=1)
            x = self.layer(i, x, temb, context)
        for upsample in self.upsamplers:
            x = upsample(x, size=skips[-1].shape[-2:])
        return x


class Encoder(nn.Module):
    """The way down to the middle, which a UNet and a ControlNet share."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        depths = config.per_level(config.transformer_layers_per_block)
        heads = config.per_level(config.attention_head_dim)
        temb_width = 4 * widths[0]

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepMLP(widths[0], temb_width)
        if config.addition_embed_type:
            added_width = config.projection_class_embeddings_input_dim
            self.add_embedding = TimestepMLP(added_width, temb_width)

        self.down_blocks = nn.ModuleList()
        channels = widths[0]
        self.skip_channels = [channels]  # of the skip connections, in the order they are made
        for i, width in enumerate(widths):
            attends = config.down_block_types[i].startswith("CrossAttn")
            is_last = i == len(widths) - 1
            level = DownLevel(channels, width, attends, depths[i], heads[i], is_last, config)
            self.down_blocks.append(level)
            self.skip_channels += [width] * (len(level.resnets) + len(level.downsamplers))
            channels = width

        self.mid_block = MidLevel(channels, depths[-1], heads[-1], config)

    def enable_gradient_checkpointing(self, on: bool = True):
        """Recompute every layer in the backward pass: less memory, more time."""
        for module in self.modules():
            if isinstance(module, Level):
                module.gradient_checkpointing = on

    def embed(
            self, t: torch.Tensor | float, pooled: torch.Tensor | None,
            size_ids: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        """temb [B, 4 * first width], the embedding of t and, for SDXL, pooled text and sizes."""
        t = torch.as_tensor(t, device=x.device).expand(x.shape[0])
        sinusoids = timestep_embedding(t, self.config.block_out_channels[0])
        temb = self.time_embedding(sinusoids.to(x.dtype))
        if self.config.addition_embed_type:
            width = self.config.addition_time_embed_dim
            sizes = timestep_embedding(size_ids.flatten(), width)
            sizes = sizes.unflatten(0, size_ids.shape).flatten(1)  # [B,6] -> [B, 6 * width]
            added = torch.cat([pooled, sizes.to(pooled.dtype)], dim=-1)
            temb = temb + self.add_embedding(added.to(x.dtype))
        return temb

    def encode(
            self, x: torch.Tensor, temb: torch.Tensor, context: torch.Tensor | TextKeysValues,
            ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What conv_in made, [B,C,h,w] -> (x after the middle, the skip connections)."""
        skips = [x]
        for level in self.down_blocks:
            x, more = level(x, temb, context)
            skips += more
        return self.mid_block(x, temb, context), skips

    def text_keys_values(self, context: torch.Tensor) -> TextKeysValues:
        """What every cross-attention computes of the text, context [B,N,D].

        `forward` takes it for `context`.
        """
        keys_values = TextKeysValues()
        for block in self.modules():
            if isinstance(block, TransformerBlock):
                keys_values[block.attn2] = block.attn2.keys_and_values(context)
        return keys_values


class UNet(Encoder):
    """The encoder, and the way up with its skip connections: diffusers' UNet2DConditionModel."""

    def __init__(self, config: UNetConfig = SDXL_BASE):
        super().__init__(config)
        widths = config.block_out_channels
        depths = config.per_level(config.transformer_layers_per_block)
        heads = config.per_level(config.attention_head_dim)

        self.up_blocks = nn.ModuleList()
        channels = widths[-1]
        skips = list(self.skip_channels)
        for i in reversed(range(len(widths))):
            resnet_inputs = []
            for layer in range(config.layers_per_block + 1):
                before = channels if layer == 0 else widths[i]
                resnet_inputs.append(before + skips.pop())
            attends = config.up_block_types[len(widths) - 1 - i].startswith("CrossAttn")
            is_last = i == 0
            level = UpLevel(
                resnet_inputs, widths[i], attends, depths[i], heads[i], is_last, config)
            self.up_blocks.append(level)
            channels = widths[i]

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(
            self, x: torch.Tensor, t: torch.Tensor | float, context: torch.Tensor | TextKeysValues,
            pooled: torch.Tensor | None = None, size_ids: torch.Tensor | None = None,
            residuals: list[torch.Tensor] | None = None) -> torch.Tensor:
        """The prediction (noise, or velocity) [B,C_out,h,w] for x [B,C,h,w].

        t: timesteps, a scalar or [B], in 0..999 (fractions allowed).
        context: the text [B,N,D], or what `text_keys_values` made of it.
        pooled [B,D], size_ids [B,6]: SDXL only.
        residuals: a ControlNet's, one for each skip connection, and the last one for the middle.
        """
        temb = self.embed(t, pooled, size_ids, x)
        x, skips = self.encode(self.conv_in(x), temb, context)
        if residuals is not None:
            *for_skips, for_middle = residuals
            skips = [skip + residual for skip, residual in zip(skips, for_skips, strict=True)]
            x = x + for_middle
        for level in self.up_blocks:
            x = level(x, skips, temb, context)
        return self.conv_out(group_norm(x, self.conv_norm_out, silu=True))
