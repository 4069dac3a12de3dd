"""Attention: one function for every network, `attention(q, k, v) -> like q`, and the module that projects into it.

softmax(q k^T / sqrt(d)) v, "Attention Is All You Need" (arXiv 1706.03762) equation 1.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from minipic.common import InputError, computes_bf16


def choose(q, k):
    """The backend for these shapes: PyTorch's fused kernel, but where the measured exceptions are."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and computes_bf16(q.device):
        learns = torch.is_grad_enabled() and k.requires_grad
        if learns and k.shape[1] <= 256:  # backwards, on few keys, PyTorch's kernel is up to 4 times slower
            return "math"
        if not learns and not torch.cpu._is_amx_tile_supported():
            return "chunked"  # without AMX PyTorch's kernel computes bf16 at the speed of fp32
    return "chunked" if q.shape[-1] > 256 and q.is_cuda else "sdpa"  # flash kernels stop at 256


def attention(q, k, v, causal=False, backend=None):
    """q [B,N,h,d], k and v [B,M,h,d] -> [B,N,h,d]. `causal`: token n sees tokens 0..n only (needs N == M).

    `backend` (None: `choose` it): "math" is the formula itself, with an N x M matrix in memory; "chunked" is the same a
    few queries at a time; "sdpa" PyTorch's fused kernel; "triton" ours (kernels.py: CUDA, not causal, d 32, 64 or 128).
    Raises InputError for a backend that does not exist or cannot do what is asked.
    """
    backend = backend or choose(q, k)
    if backend not in BACKENDS:
        raise InputError(f"attention backend {backend!r} does not exist; use one of {', '.join(BACKENDS)}")
    return BACKENDS[backend](q, k, v, causal)


def math(q, k, v, causal, first=0):
    """`first`: which token the first of q is."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B,h,N,M]
    if causal:
        scores = scores.masked_fill(scores.new_ones(scores.shape[-2:]).triu(first + 1).bool(), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def chunked(q, k, v, causal):
    """The scores of a chunk of queries stay in the cache (CPU), or take little memory (CUDA)."""
    size = 1024 if q.is_cuda else 128
    return torch.cat([math(part, k, v, causal, i * size) for i, part in enumerate(q.split(size, dim=1))], dim=1)


def sdpa(q, k, v, causal):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def triton(q, k, v, causal):
    try:
        from minipic.layers.kernels import HEAD_DIMS, FlashAttention
    except ImportError as error:
        raise InputError("attention backend 'triton' needs the triton package, which comes with PyTorch for CUDA; "
                         "use 'sdpa'") from error
    if causal or q.shape[-1] not in HEAD_DIMS:
        raise InputError(f"attention backend 'triton' has no causal mask and only head dims {HEAD_DIMS}, "
                         f"not {q.shape[-1]}; use 'sdpa'")
    return FlashAttention.apply(*(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)))


BACKENDS = {"math": math, "chunked": chunked, "sdpa": sdpa, "triton": triton}


class Attention(nn.Module):
    """Multi-head attention of x [B,N,D] to `context` [B,M,D_context], or to itself, in checkpoint names."""

    def __init__(self, width, context_width, heads, head_dim, qkv_bias=False):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.to_q = nn.Linear(width, inner, bias=qkv_bias)
        self.to_k = nn.Linear(context_width, inner, bias=qkv_bias)
        self.to_v = nn.Linear(context_width, inner, bias=qkv_bias)
        self.to_out = nn.Sequential(nn.Linear(inner, width))  # a list in the files: `to_out.0.weight`

    def keys_and_values(self, context):
        """context [B,M,D_context] -> k and v [B,M,h,d]."""
        return [project(context).unflatten(-1, (self.heads, -1)) for project in (self.to_k, self.to_v)]

    def forward(self, x, context=None):
        """`context` (None: x): a tensor, or {attention: its keys and values}, see UNet.read."""
        k, v = context[self] if isinstance(context, dict) else self.keys_and_values(x if context is None else context)
        q = self.to_q(x).unflatten(-1, (self.heads, -1))  # [B,N,h,d]
        return self.to_out(attention(q, k, v).flatten(2))
