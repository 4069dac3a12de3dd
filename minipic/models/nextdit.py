"""NextDiT: the transformer of OneDiffusion (arXiv 2411.16318), from Lumina-Next (arXiv 2406.18583).

x [B,F,C,h,w], t [B,F], text [B,M,D], mask [B,M] -> the velocity noise - data, like x.

F frames are one sequence of tokens, frame by frame and row by row, and every token attends to all.
Each frame has a noise level of its own, and nothing else says what a frame is for. Attribute paths
are the keys of the official checkpoint, so that it loads without renaming.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minipic.common import CheckedConfig, ParameterError
from minipic.layers.attention import attention
from minipic.models.unet import timestep_embedding

THETA = 10000.0  # base of the rotary frequencies
SINUSOIDS = 256  # numbers that a timestep becomes before the MLP
LARGEST_MODULATION = 1024  # width of the vectors that modulate the blocks, at most


@dataclass(frozen=True)
class NextDiTConfig(CheckedConfig):
    """The keys of config.json that matter; the defaults are the released model's.

    softcap is not among the official keys: the official program applies 30 in 16 bits, where the
    model was trained, and none in 32. Here it holds in every precision; 0 turns it off.
    """

    in_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)  # frames, rows, columns
    hidden_size: int = 3840
    depth: int = 16
    num_heads: int = 32
    num_kv_heads: int = 8  # each serves num_heads / num_kv_heads queries
    multiple_of: int = 256  # the feed-forward's width is rounded up to it
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    caption_channels: int = 2048
    rotary_max_length: int = 128  # tokens on each axis, at most
    rotary_max_length_t: int | None = None  # frames; None: the same
    softcap: float = 30.0

    LIMITS = {
        "in_channels": (1, 1024), "patch_size": (1, 64), "hidden_size": (6, 65536),
        "depth": (1, 256), "num_heads": (1, 1024), "num_kv_heads": (1, 1024),
        "multiple_of": (1, 65536), "ffn_dim_multiplier": (1e-3, 1e3), "norm_eps": (0.0, 1.0),
        "caption_channels": (1, 65536), "rotary_max_length": (1, 65536),
        "rotary_max_length_t": (1, 65536), "softcap": (0.0, 1e6)}

    def __post_init__(self):
        super().__post_init__()
        frames, rows, columns = self.patch_size
        if frames != 1 or rows != columns:
            raise ParameterError(
                "patch_size", f"{self.patch_size} is not supported; use a square of one frame")
        if self.hidden_size % self.num_heads:
            raise ParameterError(
                "num_heads", f"{self.num_heads} does not divide hidden_size {self.hidden_size}")
        if self.head_dim % 6:
            raise ParameterError(
                "num_heads", f"makes heads of {self.head_dim}; three axes of pairs need a "
                "multiple of 6")
        if self.num_heads % self.num_kv_heads:
            raise ParameterError(
                "num_kv_heads", f"{self.num_kv_heads} does not divide num_heads {self.num_heads}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def modulation_width(self) -> int:
        return min(self.hidden_size, LARGEST_MODULATION)

    @property
    def feed_forward_width(self) -> int:
        width = int(2 / 3 * 4 * self.hidden_size)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return self.multiple_of * math.ceil(width / self.multiple_of)


# ---- positions -----------------------------------------------------------------------------------

def rotations(
        frames: int, rows: int, columns: int, head_dim: int, scale_factor: float = 1.0,
        linear: bool = False, device: torch.device | None = None) -> torch.Tensor:
    """Unit complex numbers [N, head_dim/2] that turn queries and keys by their places (RoPE).

    A third of the pairs turns with the frame, a third with the row, a third with the column.
    scale_factor stretches all positions for more frames or larger pictures than in training:
    linear: by dividing the frequencies; else by a larger base ("NTK").
    """
    i = torch.arange(0, head_dim, 6, dtype=torch.float32, device=device)
    theta = THETA if linear else THETA * scale_factor
    frequencies = 1 / theta ** (i / head_dim)
    if linear:
        frequencies = frequencies / scale_factor
    places = [torch.arange(count, device=device) for count in (frames, rows, columns)]
    angles = []
    for place in torch.meshgrid(*places, indexing="ij"):
        angles.append(place.flatten()[:, None] * frequencies)
    angles = torch.cat(angles, dim=1)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring pairs of x [B,N,h,d] by rotation [N,d/2], in fp32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * rotation[:, None])
    return turned.flatten(-2).to(x.dtype)


# ---- layers --------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps), computed in fp32, times a weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class FramesAttention(nn.Module):
    """Attention of all tokens to each other and, through a gate that begins closed, to the text.

    Both have one query. Queries and keys are normed over all heads together.
    """

    def __init__(self, config: NextDiTConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        kv_width = config.num_kv_heads * config.head_dim
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, kv_width, bias=False)
        self.wv = nn.Linear(width, kv_width, bias=False)
        self.wk_y = nn.Linear(config.caption_channels, kv_width, bias=False)
        self.wv_y = nn.Linear(config.caption_channels, kv_width, bias=False)
        self.gate = nn.Parameter(torch.zeros(config.num_heads))
        self.wo = nn.Linear(width, width, bias=False)
        self.q_norm = nn.LayerNorm(width)
        self.k_norm = nn.LayerNorm(kv_width)
        self.ky_norm = nn.LayerNorm(kv_width, eps=1e-6)

    def forward(
            self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor,
            rotation: torch.Tensor) -> torch.Tensor:
        """x [B,N,D], text [B,M,D_text], mask [B,M], rotation [N,d/2] -> [B,N,D]."""
        def heads(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.unflatten(-1, (-1, self.config.head_dim))

        queries_per_key = self.config.num_heads // self.config.num_kv_heads
        q = rotate(heads(self.q_norm(self.wq(x))), rotation)
        k = rotate(heads(self.k_norm(self.wk(x))), rotation)
        v = heads(self.wv(x))
        # Of the frames' keys, query h reads key h // queries_per_key ...
        k = k.repeat_interleave(queries_per_key, dim=2)
        v = v.repeat_interleave(queries_per_key, dim=2)
        from_frames = attention(q.to(v.dtype), k.to(v.dtype), v, softcap=self.config.softcap)

        # ... and of the text's, key h % num_kv_heads: the checkpoint was trained so.
        text_k = heads(self.ky_norm(self.wk_y(text))).repeat(1, 1, queries_per_key, 1)
        text_v = heads(self.wv_y(text)).repeat(1, 1, queries_per_key, 1)
        from_text = attention(q.to(text_v.dtype), text_k.to(text_v.dtype), text_v, mask=mask)

        out = from_frames + self.gate.tanh()[:, None].to(from_text.dtype) * from_text
        return self.wo(out.flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Attention and feed-forward, each between two norms, scaled and gated frame by frame."""

    def __init__(self, config: NextDiTConfig):
        super().__init__()
        width = config.hidden_size
        self.attention = FramesAttention(config)
        self.feed_forward = FeedForward(width, config.feed_forward_width)
        self.attention_norm1 = RMSNorm(width, config.norm_eps)
        self.attention_norm2 = RMSNorm(width, config.norm_eps)
        self.ffn_norm1 = RMSNorm(width, config.norm_eps)
        self.ffn_norm2 = RMSNorm(width, config.norm_eps)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(config.modulation_width, 4 * width))
        self.attention_y_norm = RMSNorm(config.caption_channels, config.norm_eps)
        # All gates begin closed: a new block does nothing.
        nn.init.zeros_(self.adaLN_modulation[1].weight)
        nn.init.zeros_(self.adaLN_modulation[1].bias)

    def forward(
            self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor, rotation: torch.Tensor,
            modulation: torch.Tensor) -> torch.Tensor:
        """x [B,F,n,D] with n tokens a frame, modulation [B,F,1,A] -> [B,F,n,D]."""
        scales_and_gates = self.adaLN_modulation(modulation).chunk(4, dim=-1)
        attention_scale, attention_gate, ffn_scale, ffn_gate = scales_and_gates
        frames = x.shape[1]
        h = self.attention_norm1(x) * (1 + attention_scale)
        h = self.attention(h.flatten(1, 2), self.attention_y_norm(text), mask, rotation)
        x = x + attention_gate.tanh() * self.attention_norm2(h.unflatten(1, (frames, -1)))
        h = self.feed_forward(self.ffn_norm1(x) * (1 + ffn_scale))
        return x + ffn_gate.tanh() * self.ffn_norm2(h)


class TimestepEmbedder(nn.Module):
    """t [...], 0 (data) to 1000 (noise), -> [...,A]."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOIDS, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        sinusoids = timestep_embedding(t.flatten(), SINUSOIDS).unflatten(0, t.shape)
        return self.mlp(sinusoids.to(self.mlp[0].weight.dtype))


class FinalLayer(nn.Module):
    """Tokens [B,F,n,D] -> the numbers of their patches [B,F,n,P]."""

    def __init__(self, config: NextDiTConfig, patch_numbers: int):
        super().__init__()
        width = config.hidden_size
        self.linear = nn.Linear(width, patch_numbers)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(config.modulation_width, width))
        for layer in (self.linear, self.adaLN_modulation[1]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return self.linear(x * (1 + self.adaLN_modulation(modulation)))


# ---- the network ---------------------------------------------------------------------------------

class NextDiT(nn.Module):
    def __init__(self, config: NextDiTConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        width = config.modulation_width
        patch_numbers = math.prod(config.patch_size) * config.in_channels
        self.x_embedder = nn.Linear(patch_numbers, config.hidden_size)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = nn.Sequential(
            nn.LayerNorm(config.caption_channels, eps=1e-6),
            nn.Linear(config.caption_channels, width))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config, patch_numbers)

    def enable_gradient_checkpointing(self, on: bool = True):
        """Recompute every block in the backward pass: less memory, more time."""
        self.gradient_checkpointing = on

    def forward(
            self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, mask: torch.Tensor,
            scale_factor: float = 1.0, scale_watershed: float = 1.0) -> torch.Tensor:
        """x [B,F,C,h,w], t [B,F] in 0..1000, text [B,M,D], mask [B,M] -> like x.

        mask: 1 at real tokens of the text, 0 at padding.
        scale_factor: see `rotations`; it is linear while all t are below scale_watershed
            (Lumina-Next section 2.3).
        Raises ParameterError for sizes that the network cannot take.
        """
        rows, columns = self.check_size(x)
        frames = x.shape[1]
        linear = t.max().item() < scale_watershed if scale_factor != 1 else False
        rotation = rotations(
            frames, rows, columns, self.config.head_dim, scale_factor, linear, x.device)
        mask = mask.bool()

        shown = mask[:, :, None].to(text)
        pooled = (text * shown).sum(1) / (shown.sum(1) + 1e-8)
        modulation = self.t_embedder(t) + self.y_embedder(pooled)[:, None]
        modulation = modulation[:, :, None]  # [B,F,1,A]

        h = self.x_embedder(self.patchify(x))
        for block in self.layers:
            given = h, text, mask, rotation, modulation
            if self.gradient_checkpointing and self.training:
                h = checkpoint(block, *given, use_reentrant=False)
            else:
                h = block(*given)
        return self.unpatchify(self.final_layer(h, modulation), rows, columns)

    def check_size(self, x: torch.Tensor) -> tuple[int, int]:
        """The rows and columns of tokens of each frame."""
        config = self.config
        side = config.patch_size[1]
        frames, _, height, width = x.shape[1:]
        most_frames = config.rotary_max_length_t or config.rotary_max_length
        if frames > most_frames:
            raise ParameterError("x", f"{frames} frames are more than {most_frames}")
        if height % side or width % side:
            raise ParameterError("x", f"{height}x{width} is not cut into patches of {side}")
        if max(height, width) > side * config.rotary_max_length:
            raise ParameterError(
                "x", f"{height}x{width} is more than {side * config.rotary_max_length} a side")
        return height // side, width // side

    def patchify(self, x: torch.Tensor) -> torch.Tensor:
        """[B,F,C,h,w] -> [B,F,n,P]; the numbers of a patch: row, column, channel."""
        side = self.config.patch_size[1]
        x = x.unflatten(4, (-1, side)).unflatten(3, (-1, side))  # [B,F,C,rows,side,columns,side]
        return x.permute(0, 1, 3, 5, 4, 6, 2).flatten(4).flatten(2, 3)

    def unpatchify(self, x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """[B,F,n,P] -> [B,F,C,h,w]."""
        side = self.config.patch_size[1]
        x = x.unflatten(3, (side, side, -1)).unflatten(2, (rows, columns))
        return x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5).flatten(3, 4)
