"""The denoising UNet of Stable Diffusion, one class for SDXL base, refiner, Turbo, SD 1.5, SD 2.x and the tiny model.

xt [B,4,h,w], t [B], context [B,N,D] (and pooled [B,D], size_ids [B,6]) -> prediction like xt.
SDXL: arXiv 2307.01952; the architecture: arXiv 2112.10752. Attribute paths are the keys of the official
diffusers-layout files, so a checkpoint loads with no mapping; slots without parameters are Identity for that reason.
"""

import math
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minipic.common import InputError, from_json
from minipic.layers.attention import Attention
from minipic.layers.blocks import Downsample, ResnetBlock, Upsample, add_norm, geglu, group_norm, layer_norm

# Keys of unet/config.json that these networks do not vary: the values under which the file means this code.
FIXED = {
    "act_fn": ("silu",), "addition_embed_type": (None, "text_time"), "addition_embed_type_num_heads": ...,
    "attention_type": ("default",),
    "center_input_sample": (False,), "class_embed_type": (None,), "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,), "conv_out_kernel": (3,), "cross_attention_norm": (None,), "downsample_padding": (1,),
    "dropout": (0.0,), "dual_cross_attention": (False,), "encoder_hid_dim": (None,), "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,), "freq_shift": (0,), "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,), "mid_block_type": ("UNetMidBlock2DCrossAttn",), "num_attention_heads": (None,),
    "num_class_embeds": (None,), "only_cross_attention": (False,), "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,), "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,), "time_cond_proj_dim": (None,), "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,), "time_embedding_type": ("positional",), "timestep_post_act": (None,),
    "upcast_attention": ...,  # asks for fp32 scores; the attention kernels always keep those in fp32
    "decay": ..., "inv_gamma": ..., "min_decay": ..., "optimization_step": ..., "power": ..., "use_ema_warmup": ...,
    "update_after_step": ...,  # how the weights were averaged in training, told by SDXL-inpainting's file
}


@dataclass(frozen=True)
class EncoderConfig:
    """The keys of config.json that a UNet and a ControlNet share; the defaults are SDXL base 1.0."""

    in_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280)
    down_block_types: tuple[str, ...] = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    layers_per_block: int = 2
    transformer_layers_per_block: int | tuple[int, ...] = (1, 2, 10)
    attention_head_dim: int | tuple[int, ...] = (5, 10, 20)  # the NUMBER of heads: a misnomer in the official files
    cross_attention_dim: int = 2048
    use_linear_projection: bool = True
    addition_embed_type: str | None = "text_time"
    addition_time_embed_dim: int | None = 256
    projection_class_embeddings_input_dim: int | None = 2816  # pooled 1280 + 6 size ids * 256
    norm_num_groups: int = 32
    norm_eps: float = 1e-5

    @classmethod
    def from_json(cls, values, where="config.json", fixed=FIXED):
        """Read an official config.json; keys it lacks take diffusers' defaults, which are SD 1.5's, not SDXL's."""
        legacy = {f.name: getattr(SD15, f.name, f.default) for f in fields(cls)} | {"cross_attention_dim": 1280}
        config = from_json(cls, legacy | values, fixed, where)
        for stem in ("Down", "Up"):
            for name in getattr(config, f"{stem.lower()}_block_types", ()):
                if name not in (f"{stem}Block2D", f"CrossAttn{stem}Block2D"):
                    raise InputError(f"{where}: block type {name!r} is not supported")
        for key in ("down_block_types", "up_block_types", "attention_head_dim", "transformer_layers_per_block"):
            if len(config.per_level(getattr(config, key, 0))) != len(config.block_out_channels):
                raise InputError(f"{where}: {key} must have {len(config.block_out_channels)} values, one a level")
        return config

    def per_level(self, value):
        """One value a level from a config entry that may be a single number."""
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)


@dataclass(frozen=True)
class UNetConfig(EncoderConfig):
    """The varying keys of unet/config.json; the defaults are SDXL base 1.0."""

    sample_size: int = 128
    out_channels: int = 4
    up_block_types: tuple[str, ...] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")

    def to_json(self):
        return {"_class_name": "UNet2DConditionModel", **asdict(self)}


SDXL_BASE = UNetConfig()  # Turbo too
SDXL_REFINER = UNetConfig(
    block_out_channels=(384, 768, 1536, 1536), transformer_layers_per_block=4, attention_head_dim=(6, 12, 24, 24),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=1280, projection_class_embeddings_input_dim=2560)  # pooled 1280 + 5 size ids * 256
SD15 = UNetConfig(
    sample_size=64, block_out_channels=(320, 640, 1280, 1280), transformer_layers_per_block=1, attention_head_dim=8,
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    cross_attention_dim=768, use_linear_projection=False, addition_embed_type=None, addition_time_embed_dim=None,
    projection_class_embeddings_input_dim=None)


def timestep_embedding(t, width):
    """Sinusoids of a number, t [B] -> [B,width]: cosines then sines, frequencies 10000^(-i / (width/2))."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepMLP(nn.Module):
    def __init__(self, inputs, width):
        super().__init__()
        self.linear_1 = nn.Linear(inputs, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class GEGLU(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x):
        return geglu(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    """Pixels look at each other (attn1), then at the text (attn2), then each thinks alone (ff)."""

    def __init__(self, width, heads, context_width):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads, width // heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, context_width, heads, width // heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x, context):
        x, normed = add_norm(x, self.attn1(layer_norm(x, self.norm1)), self.norm2)
        x, normed = add_norm(x, self.attn2(normed, context), self.norm3)
        return x + self.ff(normed)


class SpatialTransformer(nn.Module):
    """x [B,C,H,W] and context [B,N,D] -> [B,C,H,W]; pixels become tokens and come back."""

    def __init__(self, channels, depth, heads, config):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)  # not norm_eps: 1e-6 in the original
        linear = config.use_linear_projection  # SD 1.5 projects with 1x1 convolutions instead
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, config.cross_attention_dim) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x, context):
        linear, shape, residual = isinstance(self.proj_in, nn.Linear), x.shape[-2:], x
        x = group_norm(x, self.norm)
        x = x if linear else self.proj_in(x)
        x = x.flatten(2).transpose(1, 2)  # [B,C,H,W] -> [B,HW,C]
        x = self.proj_in(x) if linear else x
        for block in self.transformer_blocks:
            x = block(x, context)
        x = self.proj_out(x) if linear else x
        x = x.transpose(1, 2).unflatten(2, shape)  # [B,HW,C] -> [B,C,H,W]
        return residual + (x if linear else self.proj_out(x))


class Level(nn.Module):
    """The resnets of one resolution and, where `depth` > 0, the transformers that follow them."""

    def __init__(self, inputs, channels, transformers, depth, heads, config):
        super().__init__()
        temb_width = 4 * config.block_out_channels[0]
        self.resnets = nn.ModuleList(
            ResnetBlock(c, channels, config.norm_num_groups, config.norm_eps, temb_width) for c in inputs)
        self.attentions = nn.ModuleList(
            SpatialTransformer(channels, depth, heads, config) for _ in range(transformers))


class Encoder(nn.Module):
    """The way down to the middle, which a UNet and a ControlNet share."""

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = config, False  # checkpointing: recompute blocks in backward to save memory
        widths, layers = config.block_out_channels, config.layers_per_block
        depths, heads = (config.per_level(x) for x in (config.transformer_layers_per_block, config.attention_head_dim))
        temb_width, last = 4 * widths[0], len(widths) - 1

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepMLP(widths[0], temb_width)
        if config.addition_embed_type:
            self.add_embedding = TimestepMLP(config.projection_class_embeddings_input_dim, temb_width)

        self.skips, channels = [widths[0]], widths[0]  # channels of what the way down leaves for the way up
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            attends = config.down_block_types[i].startswith("CrossAttn")
            level = Level([channels] + [width] * (layers - 1), width, layers * attends, depths[i], heads[i], config)
            level.downsamplers = nn.ModuleList([Downsample(width)] if i < last else [])
            self.down_blocks.append(level)
            self.skips += [width] * (layers + len(level.downsamplers))
            channels = width

        self.mid_block = Level([channels] * 2, channels, 1, depths[-1], heads[-1], config)

    def embed(self, t, pooled, size_ids, like):
        """t, and for SDXL pooled text and size_ids, as one vector [B, 4 * first width] added in every resnet."""
        t = torch.as_tensor(t, device=like.device).expand(like.shape[0])
        temb = self.time_embedding(timestep_embedding(t, self.config.block_out_channels[0]).to(like.dtype))
        if self.config.addition_embed_type:
            sizes = timestep_embedding(size_ids.flatten(), self.config.addition_time_embed_dim)
            sizes = sizes.unflatten(0, size_ids.shape).flatten(1)  # [B,6] -> [B, 6 * addition_time_embed_dim]
            temb = temb + self.add_embedding(torch.cat([pooled, sizes.to(pooled.dtype)], dim=-1).to(like.dtype))
        return temb

    def read(self, context):
        """The text as every cross-attention sees it, {attention: (k, v)}: the same at every step of a drawing, so that
        it need not be computed again. `forward` takes it for `context`."""
        return {block.attn2: block.attn2.keys_and_values(context)
                for block in self.modules() if isinstance(block, TransformerBlock)}

    def run(self, module, *args):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *args, use_reentrant=False)
        return module(*args)

    def down(self, x, temb, context):
        """What conv_in made [B,C,h,w] -> a list of x after it and after every block, widths `skips`, and after the
        middle."""
        found = [x]
        for level in self.down_blocks:
            for i, resnet in enumerate(level.resnets):
                x = self.run(resnet, x, temb)
                x = self.run(level.attentions[i], x, context) if level.attentions else x
                found.append(x)
            for downsample in level.downsamplers:
                x = downsample(x)
                found.append(x)

        x = self.run(self.mid_block.resnets[0], x, temb)
        x = self.run(self.mid_block.attentions[0], x, context)
        return [*found, self.run(self.mid_block.resnets[1], x, temb)]


class UNet(Encoder):
    def __init__(self, config=SDXL_BASE):
        super().__init__(config)
        widths, layers = config.block_out_channels, config.layers_per_block
        depths, heads = (config.per_level(x) for x in (config.transformer_layers_per_block, config.attention_head_dim))
        last, skips, channels = len(widths) - 1, list(self.skips), widths[-1]

        self.up_blocks = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            attends = config.up_block_types[last - i].startswith("CrossAttn")
            inputs = [(channels if layer == 0 else width) + skips.pop() for layer in range(layers + 1)]
            level = Level(inputs, width, (layers + 1) * attends, depths[i], heads[i], config)
            level.upsamplers = nn.ModuleList([Upsample(width)] if i > 0 else [])
            self.up_blocks.append(level)
            channels = width

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, x, t, context, pooled=None, size_ids=None, residuals=None):
        """x [B,C,h,w], t scalar or [B] in 0..999 (fractions allowed), context [B,N,D] or what `read` made of it,
        pooled [B,D], size_ids [B,6] (both SDXL only) -> the prediction (noise, or velocity) [B,C_out,h,w].
        `residuals`: a list to add to what `down` gives."""
        temb = self.embed(t, pooled, size_ids, x)
        skips = self.down(self.conv_in(x), temb, context)
        if residuals is not None:
            skips = [skip + residual for skip, residual in zip(skips, residuals, strict=True)]
        x = skips.pop()

        for level in self.up_blocks:
            for i, resnet in enumerate(level.resnets):
                x = self.run(resnet, torch.cat([x, skips.pop()], dim=1), temb)
                x = self.run(level.attentions[i], x, context) if level.attentions else x
            for upsample in level.upsamplers:
                x = upsample(x, skips[-1].shape[-2:])
        return self.conv_out(group_norm(x, self.conv_norm_out, silu=True))
