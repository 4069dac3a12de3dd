"""Flash attention in Triton, forward and backward, for any lengths and strides: no N x M matrix, no copies.

FlashAttention-2 (arXiv 2307.08691): a program owns some queries and walks over the keys, keeping for each query the
largest score m so far, the sum l of exp(score - m) and the weighted sum of values; when a larger m turns up, what was
summed is scaled down. The backward pass computes the probabilities again from the saved log-sum-exp. One kernel owns
keys and sums over queries (dK, dV), another owns queries (dQ): each number is written once, so results repeat bit for
bit. Scores are kept in units of log 2, because the hardware has exp2 and no exp.
"""

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
HEAD_DIMS = (32, 64, 128)


@triton.jit
def read(pointer, stride, index, end, features, whole: tl.constexpr = False):
    """Rows `index` [R] of a matrix; `end` is the first that does not exist, zeros stand for those from there on."""
    at = pointer + index[:, None] * stride + features[None, :]
    return tl.load(at) if whole else tl.load(at, index[:, None] < end, 0.0)


@triton.jit
def read_row(pointer, index, end, other, whole: tl.constexpr):
    """Numbers `index` [R] of a row, `other` from `end` on."""
    return tl.load(pointer + index) if whole else tl.load(pointer + index, index < end, other)


@triton.jit
def write(pointer, stride, index, end, features, values):
    at = pointer + index[:, None] * stride + features[None, :]
    tl.store(at, values.to(pointer.dtype.element_ty), index[:, None] < end)


@triton.jit
def head_of(pointer, stride_b, stride_h, heads):
    """Where the head that this program works on starts; 64 bits, for b * stride_b may pass 2^31."""
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    return pointer + b * stride_b + h * stride_h


@triton.jit
def forward_kernel(q, k, v, out, lse, sqb, sqn, sqh, skb, skn, skh, svb, svn, svh, sob, son, soh, heads, n, m, scale,
                   D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ONE: tl.constexpr, WHOLE: tl.constexpr,
                   PRECISION: tl.constexpr):
    """ONE: all keys fit into one block, so the largest score is known at once. WHOLE: m is a multiple of COLS."""
    q, k, v = head_of(q, sqb, sqh, heads), head_of(k, skb, skh, heads), head_of(v, svb, svh, heads)
    out = head_of(out, sob, soh, heads)
    rows, features = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    queries = read(q, sqn, rows, n, features)
    largest, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    summed, unit = tl.zeros([ROWS, D], tl.float32), scale * LOG2E
    for start in range(0, COLS if ONE else m, COLS):
        cols = start + tl.arange(0, COLS)
        keys, values = read(k, skn, cols, m, features, WHOLE), read(v, svn, cols, m, features, WHOLE)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if not WHOLE:
            scores = tl.where(cols[None, :] < m, scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, 1) * unit)
        weights = tl.exp2(scores * unit - higher[:, None])  # one multiply-add: units change here, not before
        if ONE:
            total = tl.sum(weights, 1)
            summed = tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        else:
            shrink = tl.exp2(largest - higher)
            total = total * shrink + tl.sum(weights, 1)
            summed = tl.dot(weights.to(values.dtype), values, summed * shrink[:, None], input_precision=PRECISION)
        largest = higher
    write(out, son, rows, n, features, (summed / total[:, None]))
    tl.store(lse + tl.program_id(1).to(tl.int64) * n + rows, largest + tl.log2(total), rows < n)


@triton.jit
def keys_kernel(q, k, v, grad, lse, delta, dk, dv, sqb, sqn, sqh, skb, skn, skh, svb, svn, svh, sgb, sgn, sgh,
                sdb, sdn, sdh, heads, n, m, scale, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                WHOLE: tl.constexpr, PRECISION: tl.constexpr):
    """dK and dV of COLS keys. P^T is the weights turned: keys down, queries across. WHOLE: n is a multiple of ROWS."""
    q, k, v, grad = (head_of(q, sqb, sqh, heads), head_of(k, skb, skh, heads), head_of(v, svb, svh, heads),
                     head_of(grad, sgb, sgh, heads))
    lse, delta = lse + tl.program_id(1).to(tl.int64) * n, delta + tl.program_id(1).to(tl.int64) * n
    cols, features = tl.program_id(0) * COLS + tl.arange(0, COLS), tl.arange(0, D)
    keys = read(k, skn, cols, m, features)
    values = read(v, svn, cols, m, features)
    dkeys, dvalues = tl.zeros([COLS, D], tl.float32), tl.zeros([COLS, D], tl.float32)
    for start in range(0, n, ROWS):
        rows = start + tl.arange(0, ROWS)
        queries, grads = read(q, sqn, rows, n, features, WHOLE), read(grad, sgn, rows, n, features, WHOLE)
        # a query that does not exist gets weight 0, for its log-sum-exp is infinite
        logsum, mean = read_row(lse, rows, n, float("inf"), WHOLE), read_row(delta, rows, n, 0.0, WHOLE)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
        weights = tl.exp2(scores * (scale * LOG2E) - logsum[None, :])
        dvalues = tl.dot(weights.to(grads.dtype), grads, dvalues, input_precision=PRECISION)
        dweights = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
        dscores = weights * (dweights - mean[None, :])
        dkeys = tl.dot(dscores.to(queries.dtype), queries, dkeys, input_precision=PRECISION)
    dk, dv = head_of(dk, sdb, sdh, heads), head_of(dv, sdb, sdh, heads)
    write(dk, sdn, cols, m, features, (dkeys * scale))
    write(dv, sdn, cols, m, features, dvalues)


@triton.jit
def queries_kernel(q, k, v, grad, out, lse, delta, dq, sqb, sqn, sqh, skb, skn, skh, svb, svn, svh, sgb, sgn, sgh,
                   sob, son, soh, sdb, sdn, sdh, heads, n, m, scale, D: tl.constexpr, ROWS: tl.constexpr,
                   COLS: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr):
    """dQ of ROWS queries, and their delta = sum(out * grad), which the keys need. WHOLE: m is a multiple of COLS."""
    q, k, v, grad = (head_of(q, sqb, sqh, heads), head_of(k, skb, skh, heads), head_of(v, svb, svh, heads),
                     head_of(grad, sgb, sgh, heads))
    out, dq, first = head_of(out, sob, soh, heads), head_of(dq, sdb, sdh, heads), tl.program_id(1).to(tl.int64) * n
    rows, features = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    queries, grads = read(q, sqn, rows, n, features), read(grad, sgn, rows, n, features)
    mean = tl.sum(read(out, son, rows, n, features).to(tl.float32) * grads.to(tl.float32), 1)
    tl.store(delta + first + rows, mean, rows < n)
    logsum, dqueries = read_row(lse + first, rows, n, float("inf"), False), tl.zeros([ROWS, D], tl.float32)
    for start in range(0, m, COLS):
        cols = start + tl.arange(0, COLS)
        keys, values = read(k, skn, cols, m, features, WHOLE), read(v, svn, cols, m, features, WHOLE)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        weights = tl.exp2(scores * (scale * LOG2E) - logsum[:, None])
        if not WHOLE:
            weights = tl.where(cols[None, :] < m, weights, 0.0)
        dweights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        dscores = weights * (dweights - mean[:, None])
        dqueries = tl.dot(dscores.to(keys.dtype), keys, dqueries, input_precision=PRECISION)
    write(dq, sdn, rows, n, features, dqueries * scale)


def blocks(pass_, q, k):
    """(ROWS, COLS, warps, stages) of a pass ("forward", "keys" or "queries") for q [B,N,h,d] and k [B,M,h,d].

    Chosen with the compiler for sm_90: no configuration here spills registers. Few queries take small blocks, which
    spread more evenly over the processors. fp32 has no tensor cores at full precision: blocks fit the registers.
    """
    n, m, d, full = q.shape[1], k.shape[1], q.shape[3], q.dtype == torch.float32
    if pass_ == "forward" and m <= 128 and not full:  # all keys in one block
        return 64, max(16, triton.next_power_of_2(m)), 4, 1
    if full:
        return 16 if d == 128 and pass_ == "queries" else 32, 32 if d < 128 else 16, 8, 1
    if pass_ == "forward":
        return (64, 64, 4, 2) if n <= 2048 or d == 128 else (128, 64, 4, 3)
    if d == 128:
        return (32, 64, 4, 2) if pass_ == "keys" else (64, 32, 4, 2)
    return (64, 128, 8, 2) if pass_ == "keys" else (128, 64, 8, 2)


class FlashAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v and its gradients: q [B,N,h,d], k and v [B,M,h,d] -> [B,N,h,d]."""

    @staticmethod
    def forward(ctx, q, k, v):
        b, n, h, d = q.shape
        out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(b, h, n, dtype=torch.float32)
        rows, cols, warps, stages = blocks("forward", q, k)
        m, scale = k.shape[1], d ** -0.5
        strides = [stride for x in (q, k, v, out) for stride in x.stride()[:3]]
        forward_kernel[(triton.cdiv(n, rows), b * h)](
            q, k, v, out, lse, *strides, h, n, m, scale, D=d, ROWS=rows, COLS=cols, ONE=m <= cols, WHOLE=m % cols == 0,
            PRECISION=precision(q), num_warps=warps, num_stages=stages)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        (b, n, h, d), m, grad = q.shape, k.shape[1], grad if grad.stride(-1) == 1 else grad.contiguous()
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        delta, strides = torch.empty_like(lse), [stride for x in (q, k, v, grad) for stride in x.stride()[:3]]
        shared = {"D": d, "PRECISION": precision(q)}
        rows, cols, warps, stages = blocks("queries", q, k)
        queries_kernel[(triton.cdiv(n, rows), b * h)](  # first, for it makes delta
            q, k, v, grad, out, lse, delta, dq, *strides, *out.stride()[:3], *dq.stride()[:3], h, n, m, d ** -0.5,
            ROWS=rows, COLS=cols, WHOLE=m % cols == 0, num_warps=warps, num_stages=stages, **shared)
        rows, cols, warps, stages = blocks("keys", q, k)
        keys_kernel[(triton.cdiv(m, cols), b * h)](
            q, k, v, grad, lse, delta, dk, dv, *strides, *dk.stride()[:3], h, n, m, d ** -0.5, ROWS=rows, COLS=cols,
            WHOLE=n % rows == 0, num_warps=warps, num_stages=stages, **shared)
        return dq, dk, dv


def precision(x):
    """How a product of blocks is computed: exact in fp32, where "tf32" would round the factors to 10 bits."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
