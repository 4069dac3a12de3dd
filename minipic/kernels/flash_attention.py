"""Flash attention in Triton, forward and backward, for any lengths and strides, without copies.

FlashAttention-2 (arXiv 2307.08691). The forward pass: a program owns a block of queries and walks
over the keys, block by block. For each query it keeps
    largest   the largest score so far,
    total     the sum of exp(score - largest),
    output    the sum of exp(score - largest) * value.
When a larger score turns up, total and output are scaled down to it. At the end output / total is
the attention, and the log-sum-exp, largest + log(total), is saved for the backward pass.

The backward pass computes the probabilities P = exp(score - lse) again. With dO the gradient of the
output and delta = sum(dO * output) of each query,
    dV = P^T dO,   dP = dO V^T,   dS = P * (dP - delta),   dQ = scale dS K,   dK = scale dS^T Q.
One kernel owns queries and sums over keys (dQ, and delta), another owns keys and sums over queries
(dK, dV). Each number is written once, so that results repeat bit for bit.

Scores are kept in units of log 2 (score * log2(e)), because the hardware has exp2 and no exp.

Names in the kernels:
    q, out, grad (dO), dq   [B,N,h,d]
    k, v, dk, dv            [B,M,h,d]
    lse, delta              [B,h,N] in fp32
    stride_qb, stride_qn,   how far apart batch rows, tokens and heads of q lie; so for k, v, g
    stride_qh               (grad), o (out), dq, and dk, whose strides dv shares. That of d is 1.
    HEAD_DIM                d
    BLOCK_Q, BLOCK_K        queries and keys per block
    ONE_BLOCK               all keys fit into one block, so that the largest score is known at once
    EVEN                    blocks divide the length that is walked over: nothing needs a mask
    PRECISION               of the products, see `precision`
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
HEAD_DIMS = (32, 64, 128)


# Pointers -----------------------------------------------------------------------------------------
#
# Programs count blocks along axis 0, and the heads of all batch rows along axis 1.

@triton.jit
def head_start(pointer, stride_b, stride_h, heads):
    """Where this program's head starts. 64 bits, because b * stride_b may be more than 2^31."""
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    return pointer + b * stride_b + h * stride_h


@triton.jit
def load_tokens(pointer, stride, tokens, length, dims, EVEN: tl.constexpr = False):
    """Vectors [T,d] of tokens [T], zeros for tokens from `length` on. EVEN: none of these."""
    pointers = pointer + tokens[:, None] * stride + dims[None, :]
    if EVEN:
        vectors = tl.load(pointers)
    else:
        vectors = tl.load(pointers, tokens[:, None] < length, 0.0)
    return vectors


@triton.jit
def load_numbers(pointer, tokens, length, other, EVEN: tl.constexpr):
    """One number per token, [T]; `other` for tokens from `length` on."""
    if EVEN:
        numbers = tl.load(pointer + tokens)
    else:
        numbers = tl.load(pointer + tokens, tokens < length, other)
    return numbers


@triton.jit
def store_tokens(pointer, stride, tokens, length, dims, vectors):
    pointers = pointer + tokens[:, None] * stride + dims[None, :]
    tl.store(pointers, vectors.to(pointer.dtype.element_ty), tokens[:, None] < length)


# Kernels ------------------------------------------------------------------------------------------

@triton.jit
def forward_kernel(q, k, v, out, lse,
                   stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh,
                   stride_vb, stride_vn, stride_vh, stride_ob, stride_on, stride_oh,
                   heads, n, m, scale,
                   HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
                   ONE_BLOCK: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr):
    """out and lse of BLOCK_Q queries."""
    q = head_start(q, stride_qb, stride_qh, heads)
    k = head_start(k, stride_kb, stride_kh, heads)
    v = head_start(v, stride_vb, stride_vh, heads)
    out = head_start(out, stride_ob, stride_oh, heads)
    lse = lse + tl.program_id(1).to(tl.int64) * n
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    dims = tl.arange(0, HEAD_DIM)
    queries = load_tokens(q, stride_qn, rows, n, dims)

    unit = scale * LOG2E
    largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    output = tl.zeros([BLOCK_Q, HEAD_DIM], tl.float32)
    for start in range(0, BLOCK_K if ONE_BLOCK else m, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        keys = load_tokens(k, stride_kn, cols, m, dims, EVEN)
        values = load_tokens(v, stride_vn, cols, m, dims, EVEN)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if not EVEN:
            scores = tl.where(cols[None, :] < m, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1) * unit)
        # Units change here and not before, so that it is one multiply-add.
        weights = tl.exp2(scores * unit - new_largest[:, None])
        if ONE_BLOCK:
            total = tl.sum(weights, 1)
            output = tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        else:
            shrink = tl.exp2(largest - new_largest)
            total = total * shrink + tl.sum(weights, 1)
            output = tl.dot(weights.to(values.dtype), values, output * shrink[:, None],
                            input_precision=PRECISION)
        largest = new_largest

    store_tokens(out, stride_on, rows, n, dims, output / total[:, None])
    tl.store(lse + rows, largest + tl.log2(total), rows < n)


@triton.jit
def queries_kernel(q, k, v, grad, out, lse, delta, dq,
                   stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh,
                   stride_vb, stride_vn, stride_vh, stride_gb, stride_gn, stride_gh,
                   stride_ob, stride_on, stride_oh, stride_dqb, stride_dqn, stride_dqh,
                   heads, n, m, scale,
                   HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
                   EVEN: tl.constexpr, PRECISION: tl.constexpr):
    """dQ of BLOCK_Q queries, and their delta, which keys_kernel needs."""
    q = head_start(q, stride_qb, stride_qh, heads)
    k = head_start(k, stride_kb, stride_kh, heads)
    v = head_start(v, stride_vb, stride_vh, heads)
    grad = head_start(grad, stride_gb, stride_gh, heads)
    out = head_start(out, stride_ob, stride_oh, heads)
    dq = head_start(dq, stride_dqb, stride_dqh, heads)
    lse = lse + tl.program_id(1).to(tl.int64) * n
    delta = delta + tl.program_id(1).to(tl.int64) * n
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    dims = tl.arange(0, HEAD_DIM)
    queries = load_tokens(q, stride_qn, rows, n, dims)
    grads = load_tokens(grad, stride_gn, rows, n, dims)
    outputs = load_tokens(out, stride_on, rows, n, dims)
    deltas = tl.sum(outputs.to(tl.float32) * grads.to(tl.float32), 1)
    tl.store(delta + rows, deltas, rows < n)
    logsums = load_numbers(lse, rows, n, float("inf"), False)

    dqueries = tl.zeros([BLOCK_Q, HEAD_DIM], tl.float32)
    for start in range(0, m, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        keys = load_tokens(k, stride_kn, cols, m, dims, EVEN)
        values = load_tokens(v, stride_vn, cols, m, dims, EVEN)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        weights = tl.exp2(scores * (scale * LOG2E) - logsums[:, None])
        if not EVEN:
            weights = tl.where(cols[None, :] < m, weights, 0.0)
        dweights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        dscores = weights * (dweights - deltas[:, None])
        dqueries = tl.dot(dscores.to(keys.dtype), keys, dqueries, input_precision=PRECISION)

    store_tokens(dq, stride_dqn, rows, n, dims, dqueries * scale)


@triton.jit
def keys_kernel(q, k, v, grad, lse, delta, dk, dv,
                stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh,
                stride_vb, stride_vn, stride_vh, stride_gb, stride_gn, stride_gh,
                stride_dkb, stride_dkn, stride_dkh,
                heads, n, m, scale,
                HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
                EVEN: tl.constexpr, PRECISION: tl.constexpr):
    """dK and dV of BLOCK_K keys. Scores and weights are transposed: keys down, queries across."""
    q = head_start(q, stride_qb, stride_qh, heads)
    k = head_start(k, stride_kb, stride_kh, heads)
    v = head_start(v, stride_vb, stride_vh, heads)
    grad = head_start(grad, stride_gb, stride_gh, heads)
    dk = head_start(dk, stride_dkb, stride_dkh, heads)
    dv = head_start(dv, stride_dkb, stride_dkh, heads)
    lse = lse + tl.program_id(1).to(tl.int64) * n
    delta = delta + tl.program_id(1).to(tl.int64) * n
    cols = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    dims = tl.arange(0, HEAD_DIM)
    keys = load_tokens(k, stride_kn, cols, m, dims)
    values = load_tokens(v, stride_vn, cols, m, dims)

    dkeys = tl.zeros([BLOCK_K, HEAD_DIM], tl.float32)
    dvalues = tl.zeros([BLOCK_K, HEAD_DIM], tl.float32)
    for start in range(0, n, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        queries = load_tokens(q, stride_qn, rows, n, dims, EVEN)
        grads = load_tokens(grad, stride_gn, rows, n, dims, EVEN)
        # A query that does not exist gets weight 0, because its log-sum-exp is infinite.
        logsums = load_numbers(lse, rows, n, float("inf"), EVEN)
        deltas = load_numbers(delta, rows, n, 0.0, EVEN)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
        weights = tl.exp2(scores * (scale * LOG2E) - logsums[None, :])
        dvalues = tl.dot(weights.to(grads.dtype), grads, dvalues, input_precision=PRECISION)
        dweights = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
        dscores = weights * (dweights - deltas[None, :])
        dkeys = tl.dot(dscores.to(queries.dtype), queries, dkeys, input_precision=PRECISION)

    store_tokens(dk, stride_dkn, cols, m, dims, dkeys * scale)
    store_tokens(dv, stride_dkn, cols, m, dims, dvalues)


# From Python --------------------------------------------------------------------------------------

class Blocks(NamedTuple):
    """How a kernel divides its work."""

    queries: int  # per block
    keys: int  # per block
    warps: int  # per program
    stages: int  # of the pipeline of loads and products


def choose_blocks(kernel: str, q: torch.Tensor, k: torch.Tensor) -> Blocks:
    """The blocks of a kernel ("forward", "keys" or "queries") for q [B,N,h,d] and k [B,M,h,d].

    Measured on an H100 for d = 64 in 16 bits (tests/benchmarks/attention_sweep.json). d = 128 was
    chosen with the compiler for sm_90, so that no registers spill. fp32 has no tensor cores at full
    precision, so its blocks must fit the registers.
    """
    _, n, _, d = q.shape
    m = k.shape[1]
    if q.dtype == torch.float32:
        if d < 128:
            return Blocks(32, 32, 8, 1)
        return Blocks(16 if kernel == "queries" else 32, 16, 8, 1)
    if kernel == "forward" and m <= 128:  # all keys in one block
        return Blocks(64, max(16, triton.next_power_of_2(m)), 4, 1)
    if d == 128:
        return {"forward": Blocks(64, 64, 4, 2), "queries": Blocks(64, 32, 4, 2),
                "keys": Blocks(32, 64, 4, 2)}[kernel]
    if kernel == "forward" and n <= 2048:
        return Blocks(64, 128, 4, 2)
    return Blocks(64, 64, 4, 3)


def precision(x: torch.Tensor) -> str:
    """How blocks are multiplied: fp32 exactly, where "tf32" would round the factors to 10 bits."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def strides(*tensors: torch.Tensor) -> list[int]:
    """Of each tensor [B,N,h,d], the strides of batch rows, tokens and heads."""
    numbers = []
    for x in tensors:
        numbers.extend(x.stride()[:3])
    return numbers


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
           blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """(out like q, lse [B,h,N])."""
    b, n, h, d = q.shape
    m = k.shape[1]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(b, h, n, dtype=torch.float32)
    forward_kernel[triton.cdiv(n, blocks.queries), b * h](
        q, k, v, out, lse, *strides(q, k, v, out), h, n, m, d ** -0.5,
        HEAD_DIM=d, BLOCK_Q=blocks.queries, BLOCK_K=blocks.keys, ONE_BLOCK=m <= blocks.keys,
        EVEN=m % blocks.keys == 0, PRECISION=precision(q),
        num_warps=blocks.warps, num_stages=blocks.stages)
    return out, lse


def query_gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor,
                    out: torch.Tensor, lse: torch.Tensor,
                    blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """(dq, delta [B,h,N])."""
    b, n, h, d = q.shape
    m = k.shape[1]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    delta = torch.empty_like(lse)
    queries_kernel[triton.cdiv(n, blocks.queries), b * h](
        q, k, v, grad, out, lse, delta, dq,
        *strides(q, k, v, grad, out, dq), h, n, m, d ** -0.5,
        HEAD_DIM=d, BLOCK_Q=blocks.queries, BLOCK_K=blocks.keys,
        EVEN=m % blocks.keys == 0, PRECISION=precision(q),
        num_warps=blocks.warps, num_stages=blocks.stages)
    return dq, delta


def key_gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor,
                  lse: torch.Tensor, delta: torch.Tensor,
                  blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """(dk, dv)."""
    b, n, h, d = q.shape
    m = k.shape[1]
    dk = torch.empty_like(k, memory_format=torch.contiguous_format)
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    keys_kernel[triton.cdiv(m, blocks.keys), b * h](
        q, k, v, grad, lse, delta, dk, dv,
        *strides(q, k, v, grad, dk), h, n, m, d ** -0.5,
        HEAD_DIM=d, BLOCK_Q=blocks.queries, BLOCK_K=blocks.keys,
        EVEN=n % blocks.queries == 0, PRECISION=precision(q),
        num_warps=blocks.warps, num_stages=blocks.stages)
    return dk, dv


class FlashAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v and its gradients: q [B,N,h,d], k and v [B,M,h,d] -> [B,N,h,d].

    The last dimension of each must have stride 1.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse = attend(q, k, v, choose_blocks("forward", q, k))
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        q, k, v, out, lse = ctx.saved_tensors
        if grad.stride(-1) != 1:
            grad = grad.contiguous()
        dq, delta = query_gradients(q, k, v, grad, out, lse, choose_blocks("queries", q, k))
        dk, dv = key_gradients(q, k, v, grad, lse, delta, choose_blocks("keys", q, k))
        return dq, dk, dv
