"""Attention: one function for every network, `attention(q, k, v) -> like q`, and the module that projects into it.

softmax(q k^T / sqrt(d)) v, "Attention Is All You Need" (arXiv 1706.03762) equation 1.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from minipic.common import InputError


def choose(q, k):
    """The faster backend: PyTorch's CPU kernel is about 5 times slower than the formula backwards, on few keys."""
    short = k.shape[1] <= 256 and q.device.type == "cpu" and torch.is_grad_enabled() and k.requires_grad
    return "math" if short else "sdpa"


def attention(q, k, v, causal=False, backend=None):
    """q [B,N,h,d], k and v [B,M,h,d] -> [B,N,h,d]. `causal`: token n sees tokens 0..n only (needs N == M).

    `backend`: "sdpa" is PyTorch's fused kernel; "math" is the formula itself, with an N x M matrix in memory; None
    chooses the faster.
    """
    backend = backend or choose(q, k)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if backend == "sdpa":
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    elif backend == "math":
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B,h,N,M]
        if causal:
            scores = scores.masked_fill(scores.new_ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
        out = scores.softmax(-1) @ v
    else:
        raise InputError(f"attention backend {backend!r} does not exist; use 'sdpa' or 'math'")
    return out.transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention of x [B,N,D] to `context` [B,M,D_context], or to itself, in checkpoint names."""

    def __init__(self, width, context_width, heads, head_dim, qkv_bias=False):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.to_q = nn.Linear(width, inner, bias=qkv_bias)
        self.to_k = nn.Linear(context_width, inner, bias=qkv_bias)
        self.to_v = nn.Linear(context_width, inner, bias=qkv_bias)
        self.to_out = nn.Sequential(nn.Linear(inner, width))  # a list in the files: `to_out.0.weight`

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = (project(c).unflatten(-1, (self.heads, -1))  # [B,N,h,d]
                   for project, c in ((self.to_q, x), (self.to_k, context), (self.to_v, context)))
        return self.to_out(attention(q, k, v).flatten(2))
