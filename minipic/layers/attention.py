"""Attention: a function for every network, attention(q, k, v) -> like q, and a module that uses it.

softmax(q k^T / sqrt(d)) v, "Attention Is All You Need" (arXiv 1706.03762) equation 1.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from minipic.common import InputError, computes_bf16, cpu_has

MAX_HEAD_DIM = 256  # of PyTorch's flash kernels on a GPU


def choose_backend(q: torch.Tensor, k: torch.Tensor) -> str:
    """The backend for these shapes: PyTorch's fused kernel, except where another one was faster."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and computes_bf16(q.device):
        trains = torch.is_grad_enabled() and k.requires_grad
        few_keys = k.shape[1] <= 256
        if trains and few_keys:
            return "naive"  # the backward pass of PyTorch's kernel takes up to 4 times as long
        if not trains and not cpu_has("amx_tile"):
            return "chunked"  # without AMX, PyTorch's kernel computes bf16 at the speed of fp32
    if q.is_cuda and q.shape[-1] > MAX_HEAD_DIM:
        return "chunked"
    return "sdpa"


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False,
              backend: str | None = None, mask: torch.Tensor | None = None,
              softcap: float = 0.0) -> torch.Tensor:
    """q [B,N,h,d], k and v [B,M,h,d] -> [B,N,h,d].

    causal: token n sees tokens 0..n only. It needs N == M.
    mask [B,M]: true for the keys that are seen; None: all. Without any the output is 0.
    softcap: scores s become softcap * tanh(s / softcap) (Gemma 2, arXiv 2408.00118); 0: they stay.
    backend, by default the one that `choose_backend` picks:
        "naive"    the formula itself, with an N x M matrix in memory
        "chunked"  the same, a few heads and queries at a time
        "sdpa"     PyTorch's fused kernel
        "flash"    minipic's, in Triton (kernels/flash_attention.py): for CUDA, not causal, without
                   mask, and d of 32, 64 or 128
    Only "naive" and "chunked" have a softcap.
    Raises InputError for a backend that does not exist or cannot do what is asked.
    """
    if softcap and backend is None:
        backend = "chunked"
    backend = backend or choose_backend(q, k)
    if backend not in BACKENDS:
        raise InputError(f"attention backend {backend!r} does not exist; "
                         f"use one of {', '.join(BACKENDS)}")
    if softcap and backend not in ("naive", "chunked"):
        raise InputError(f"attention backend {backend!r} has no softcap; use 'naive' or 'chunked'")
    return BACKENDS[backend](q, k, v, causal, mask, softcap)


def naive(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, mask: torch.Tensor | None,
        softcap: float) -> torch.Tensor:
    """The formula."""
    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)  # [B,h,N,d]
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)           # [B,h,N,M]
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if causal:
        scores = hide_future(scores)
    if mask is not None:
        mask = mask[:, None, None]
    return (masked_softmax(scores, mask) @ v).transpose(1, 2)


def chunked(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, mask: torch.Tensor | None,
        softcap: float) -> torch.Tensor:
    """The formula for a few heads or a few queries at a time, whose scores stay in a CPU's cache.

    Keys and values are laid out once, head by head: the products of a CPU without AMX are then as
    fast as its large matrix products.
    """
    batch, n, heads, d = q.shape
    q = head_by_head(q * d ** -0.5)
    k = head_by_head(k)
    v = head_by_head(v)
    if mask is not None:
        mask = mask.repeat_interleave(heads, dim=0)[:, None]  # [Bh,1,M]
    queries_at_once, heads_at_once = chunk_sizes(q, k)
    outputs = []
    for head in range(0, batch * heads, heads_at_once):
        some = slice(head, head + heads_at_once)
        chunks = []
        for query in range(0, n, queries_at_once):
            scores = torch.bmm(q[some, query:query + queries_at_once], k[some].transpose(1, 2))
            if softcap:
                scores = softcap * (scores / softcap).tanh()
            if causal:
                scores = hide_future(scores, first_query=query)
            weights = masked_softmax(scores, None if mask is None else mask[some])
            chunks.append(torch.bmm(weights, v[some]))
        outputs.append(torch.cat(chunks, dim=1))
    return torch.cat(outputs).unflatten(0, (batch, heads)).transpose(1, 2)


def chunk_sizes(q: torch.Tensor, k: torch.Tensor) -> tuple[int, int]:
    """How many queries of how many heads to compute together, for q [Bh,N,d] and k [Bh,M,d].

    Measured on a CPU with AVX512-BF16: a million scores are 2 MB in bf16, twice its second-level
    cache. On a GPU only memory counts.
    """
    scores_at_once = 1 << 24 if q.is_cuda else 1 << 20
    n = q.shape[1]
    m = k.shape[1]
    queries = min(n, max(256, scores_at_once // m))
    heads = max(1, scores_at_once // (queries * m))
    return queries, heads


def head_by_head(x: torch.Tensor) -> torch.Tensor:
    """[B,N,h,d] -> [Bh,N,d], contiguous."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def hide_future(scores: torch.Tensor, first_query: int = 0) -> torch.Tensor:
    """Scores [...,N,M], -inf for keys that come after their query. Row 0 is query `first_query`."""
    future = scores.new_ones(scores.shape[-2:]).triu(first_query + 1).bool()
    return scores.masked_fill(future, float("-inf"))


def masked_softmax(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the keys where the mask is true; weights of 0 where it is true of none."""
    if mask is None:
        return scores.softmax(-1)
    lowest = torch.finfo(scores.dtype).min  # -inf everywhere would make NaN
    return scores.masked_fill(~mask, lowest).softmax(-1).masked_fill(~mask, 0)


def sdpa(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, mask: torch.Tensor | None,
        softcap: float) -> torch.Tensor:
    """PyTorch's scaled_dot_product_attention, which takes [B,h,N,d]."""
    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    if mask is not None:
        mask = mask[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return out.transpose(1, 2)


def flash(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, mask: torch.Tensor | None,
        softcap: float) -> torch.Tensor:
    """minipic's own flash attention."""
    try:
        from minipic.kernels.flash_attention import HEAD_DIMS, FlashAttention
    except ImportError as error:
        raise InputError("attention backend 'flash' needs the triton package, which comes with "
                         "PyTorch for CUDA; use 'sdpa'") from error
    if causal or mask is not None or q.shape[-1] not in HEAD_DIMS:
        raise InputError(f"attention backend 'flash' has no mask and only head dims "
                         f"{HEAD_DIMS}, not {q.shape[-1]}; use 'sdpa'")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return FlashAttention.apply(q, k, v)


BACKENDS = {"naive": naive, "chunked": chunked, "sdpa": sdpa, "flash": flash}


class TextKeysValues(dict):
    """{cross-attention: its keys and values of the text}, the same in every step of a drawing.

    Networks take it in the place of `context`. Small networks gain most: what they compute of the
    text is a large part of their step.
    """


class Attention(nn.Module):
    """Multi-head attention of x [B,N,D] to context [B,M,D_context], or to itself.

    Attribute names are those of the official files.
    """

    def __init__(self, width: int, context_width: int, heads: int, head_dim: int,
                 qkv_bias: bool = False):
        super().__init__()
        self.heads = heads
        inner = heads * head_dim
        self.to_q = nn.Linear(width, inner, bias=qkv_bias)
        self.to_k = nn.Linear(context_width, inner, bias=qkv_bias)
        self.to_v = nn.Linear(context_width, inner, bias=qkv_bias)
        self.to_out = nn.Sequential(nn.Linear(inner, width))  # in the files: `to_out.0.weight`

    def keys_and_values(self, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """context [B,M,D_context] -> k and v [B,M,h,d]."""
        k = self.to_k(context).unflatten(-1, (self.heads, -1))
        v = self.to_v(context).unflatten(-1, (self.heads, -1))
        return k, v

    def forward(self, x: torch.Tensor,
                context: torch.Tensor | TextKeysValues | None = None) -> torch.Tensor:
        """x [B,N,D] -> [B,N,D]. Without `context` x attends to itself."""
        if isinstance(context, TextKeysValues):
            k, v = context[self]
        else:
            k, v = self.keys_and_values(x if context is None else context)
        q = self.to_q(x).unflatten(-1, (self.heads, -1))  # [B,N,h,d]
        return self.to_out(attention(q, k, v).flatten(2))
