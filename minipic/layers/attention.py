"""Attention: a function for every network, attention(q, k, v) -> like q, and a module that uses it.

softmax(q k^T / sqrt(d)) v, "Attention Is All You Need" (arXiv 1706.03762) equation 1.
"""

import contextlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from minipic.common import InputError, computes_bf16, cpu_has
from minipic.kernels.cuda_graph import RECORDING
from minipic.kernels.norm_backend import triton_works

MAX_HEAD_DIM = 256  # of PyTorch's flash kernels on a GPU
# PyTorch's kernels to train with on a GPU. Its choice on an H100, cuDNN's, gave gradients that were
# NaN for the tiny UNet (PyTorch 2.11).
TRAINING_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def choose_backend(q: torch.Tensor, k: torch.Tensor, hides_keys: bool = False) -> str:
    """The backend for these shapes: PyTorch's fused kernel, except where another one was faster.

    hides_keys: whether some keys are not seen, by a mask or because attention is causal.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and computes_bf16(q.device):
        trains = torch.is_grad_enabled() and k.requires_grad
        few_keys = k.shape[1] <= 256
        if trains and few_keys:
            return "naive"  # the backward pass of PyTorch's kernel takes up to 4 times as long
        if not trains and not cpu_has("amx_tile"):
            return "chunked"  # without AMX, PyTorch's kernel computes bf16 at the speed of fp32
    if q.is_cuda and q.shape[-1] > MAX_HEAD_DIM:
        return "chunked"
    if q.is_cuda and not hides_keys and flash_is_faster(q):
        return "flash"
    return "sdpa"


def flash_is_faster(q: torch.Tensor) -> bool:
    """Whether minipic's flash attention was measured ahead of PyTorch's kernels, on a GPU.

    A step of SDXL's UNet on an H100 is 1.09 times as fast with it: heads of width 64, 16 bits, as a
    CUDA graph. Without a graph, Python starts it more slowly than PyTorch's.
    """
    in_graph = RECORDING.get() and not torch.is_grad_enabled()
    measured = q.dtype.itemsize == 2 and q.shape[-1] == 64
    if not in_graph or not measured:
        return False
    is_hopper = torch.cuda.get_device_capability(q.device) == (9, 0)
    return is_hopper and triton_works(q.device)


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
    backend = backend or choose_backend(q, k, hides_keys=causal or mask is not None)
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

    Keys and values are laid out once, head by head, the keys as the product with the queries reads
    them. The scores of all parts share their memory, for on a CPU new memory costs more than a
    product; but a gradient needs all of them, and autocast changes their types.
    """
    batch, n, heads, d = q.shape
    m = k.shape[1]
    has_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    is_shared = not has_gradient and not torch.is_autocast_enabled(q.device.type)
    q = head_by_head(q)
    k = (k * d ** -0.5).permute(0, 2, 3, 1).flatten(0, 1).contiguous()  # [Bh,d,M]
    v = head_by_head(v)
    if mask is not None:
        mask = mask.repeat_interleave(heads, dim=0)[:, None]  # [Bh,1,M]
    queries_at_once, heads_at_once = chunk_sizes(q, m)
    memory = q.new_empty(heads_at_once * queries_at_once * m) if is_shared else None
    out = torch.empty_like(q) if is_shared else None
    parts = []
    for head in range(0, batch * heads, heads_at_once):
        some = slice(head, head + heads_at_once)
        for query in range(0, n, queries_at_once):
            rows = slice(query, query + queries_at_once)
            some_q = q[some, rows]
            shape = (*some_q.shape[:2], m)
            scores = torch.bmm(some_q, k[some], out=part_of(memory, shape))
            if softcap:
                scores = softcap * (scores / softcap).tanh()
            if causal:
                scores = hide_future(scores, first_query=query)
            if is_shared and mask is None:
                weights = torch.softmax(scores, -1, out=scores)
            else:
                weights = masked_softmax(scores, None if mask is None else mask[some])
            part = torch.bmm(weights, v[some], out=out[some, rows] if is_shared else None)
            parts.append(part.flatten(0, 1))
    if not is_shared:
        out = torch.cat(parts).unflatten(0, (batch * heads, n))
    return out.unflatten(0, (batch, heads)).transpose(1, 2)


def chunk_sizes(q: torch.Tensor, m: int) -> tuple[int, int]:
    """How many queries of how many heads to compute together, for q [Bh,N,d] and m keys.

    Either one head, or all queries.
    Measured on CPUs with AVX512-BF16: a million scores, or 512 queries of one head. On a GPU only
    memory counts.
    """
    scores_at_once = 1 << 24 if q.is_cuda else 1 << 20
    queries = min(q.shape[1], max(512, scores_at_once // m))
    heads = max(1, scores_at_once // (queries * m))
    return queries, heads


def part_of(memory: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
    """The beginning of a flat tensor as a tensor of this shape; None of None."""
    return None if memory is None else memory[:math.prod(shape)].view(shape)


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
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    with safe_kernels(q.is_cuda, trains):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return out.transpose(1, 2)


def safe_kernels(is_cuda: bool, trains: bool) -> contextlib.AbstractContextManager:
    """Inside, PyTorch chooses among kernels whose gradients can be trusted, if there are any."""
    if is_cuda and trains:
        return sdpa_kernel(TRAINING_KERNELS)
    return contextlib.nullcontext()


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
