'''# A6: flash attention

Attention over N tokens has N x N scores, and a picture has many tokens. Flash attention never
writes them down: it walks over the keys block by block, and keeps for every query three things, the
largest score so far, the sum of the weights, and the weighted sum of the values. Here you write its
kernels in Triton, forward and backward.

No GPU is needed: Triton's interpreter runs a kernel as a Python program, slowly. A kernel is
written for one block of queries or keys; many copies of it, called programs, run side by side, and
`tl.program_id` tells a program which it is.

Read the docstring of `minipic/kernels/flash_attention.py`, all of it, and "FlashAttention-2" (arXiv
2307.08691), sections 2 and 3.1. Scores are kept in units of log 2, because the hardware has exp2
and no exp.
'''

import math
from unittest import mock

import numpy
import torch

from coursework.checks import BreakIt, Case, Exercise, Prediction, Random, draw
from coursework.source import resolve
from minipic.kernels import flash_attention as flash
from minipic.layers import attention

PACKAGES = ("triton==3.6.0",)  # needed besides minipic's own
tl = flash.tl
PROMPT = "a large orange cone"
SHAPES = {  # B, N, M, h: blocks have 32 queries and 32 keys
    "two blocks of keys, the second not full": (1, 3, 40, 2),
    "one block of keys, not full": (2, 2, 5, 2),
    "two blocks of queries, one of keys": (2, 34, 32, 1),
    "two full blocks of keys": (1, 2, 64, 1),
}
WIDTH = 32  # d


# ---- inputs --------------------------------------------------------------------------------------


def tokens(random, batch, length, heads):
    """Vectors [B,N,h,d] in fp32 whose heads lie before the tokens in memory."""
    return random.normal(batch, heads, length, WIDTH).transpose(1, 2)


def scores_of(q, k):
    """q k^T / sqrt(d), [B,h,N,M]."""
    return torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5


def forward(q, k, v):
    """The output and the log-sum-exp of the forward kernel."""
    saved = []
    context = mock.Mock(save_for_backward=lambda *given: saved.extend(given))
    flash.FlashAttention.forward(context, q.float(), k.float(), v.float())
    return saved[3], saved[4]


def forward_cases(random):
    for name, (b, n, m, h) in SHAPES.items():
        yield Case(
            name,
            forward,
            3 * tokens(random, b, n, h),
            tokens(random, b, m, h),
            tokens(random, b, m, h),
        )


def forward_identities(random):
    q, k, v = tokens(random, 1, 2, 1), tokens(random, 1, 37, 1), tokens(random, 1, 37, 1)
    out, _ = forward(q, k, v)
    order = torch.randperm(37, generator=random.generator)
    yield "the order of the keys does not matter", forward(q, k[:, order], v[:, order])[
        0
    ], out, 1e-5
    large = forward(100 * q, 100 * k, v)[0]
    yield "large scores do not overflow", large.isfinite().all(), True


def formula(q, k, v, grad):
    """What the backward kernels are given: output, log-sum-exp in units of log 2, and delta."""
    scores = scores_of(q, k)
    out = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).contiguous()
    lse = (scores.logsumexp(-1) / math.log(2)).contiguous()
    delta = (out * grad).sum(-1).transpose(1, 2).contiguous()
    return out, lse, delta


def launch_queries(q, k, v, grad):
    """dQ and delta of the kernel that owns queries."""
    q, k, v, grad = (x.float() for x in (q, k, v, grad))
    out, lse, _ = formula(q, k, v, grad)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    delta = torch.empty_like(lse)
    b, n, h, d = q.shape
    m = k.shape[1]
    flash.queries_kernel[(-(-n // 32), b * h)](
        q,
        k,
        v,
        grad,
        out,
        lse,
        delta,
        dq,
        *flash.strides(q, k, v, grad, out, dq),
        h,
        n,
        m,
        d**-0.5,
        HEAD_DIM=d,
        BLOCK_Q=32,
        BLOCK_K=32,
        EVEN=m % 32 == 0,
        PRECISION="ieee",
    )
    return dq, delta


def launch_keys(q, k, v, grad):
    """dK and dV of the kernel that owns keys."""
    q, k, v, grad = (x.float() for x in (q, k, v, grad))
    _, lse, delta = formula(q, k, v, grad)
    dk = torch.empty_like(k, memory_format=torch.contiguous_format)
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    b, n, h, d = q.shape
    m = k.shape[1]
    flash.keys_kernel[(-(-m // 32), b * h)](
        q,
        k,
        v,
        grad,
        lse,
        delta,
        dk,
        dv,
        *flash.strides(q, k, v, grad, dk),
        h,
        n,
        m,
        d**-0.5,
        HEAD_DIM=d,
        BLOCK_Q=32,
        BLOCK_K=32,
        EVEN=n % 32 == 0,
        PRECISION="ieee",
    )
    return dk, dv


def backward_cases(launch, swapped):
    """The cases of a backward kernel. swapped: as many queries as there would be keys, and the
    other way round."""

    def cases(random):
        for name, (b, n, m, h) in SHAPES.items():
            if swapped:
                n, m = m, n
                name = (
                    name.replace("queries", "QUERIES")
                    .replace("keys", "queries")
                    .replace("QUERIES", "keys")
                )
            yield Case(
                name,
                launch,
                tokens(random, b, n, h),
                tokens(random, b, m, h),
                tokens(random, b, m, h),
                tokens(random, b, n, h),
            )

    return cases


def backward_identities(launch, of_queries):
    """Against PyTorch's own gradients."""

    def identities(random):
        q, k, v, grad = (tokens(random, 1, n, 2) for n in (35, 33, 33, 35))
        with torch.enable_grad():
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out = torch.einsum("bhnm,bmhd->bnhd", scores_of(*leaves[:2]).softmax(-1), leaves[2])
            dq, dk, dv = torch.autograd.grad(out, leaves, grad)
        got = launch(q, k, v, grad)
        if of_queries:
            yield "dQ is PyTorch's", got[0], dq, 1e-4
            with numpy.errstate(over="ignore"):  # the weights of keys that do not exist
                low = launch(q + 30, k - 30, v, grad)
            yield "scores far below 0 do not overflow", low[0].isfinite().all(), True
        else:
            yield "dK is PyTorch's", got[0], dk, 1e-4
            yield "dV is PyTorch's", got[1], dv, 1e-4

    return identities


@flash.triton.jit
def start_kernel(numbers, out, stride_b, stride_h, heads):
    """Copies the number at which each program's head starts."""
    place = tl.program_id(1)
    tl.store(out + place, tl.load(flash.head_start(numbers, stride_b, stride_h, heads)))


def starts(numbers, batch, heads, stride_b, stride_h):
    out = torch.zeros(batch * heads)
    start_kernel[(1, batch * heads)](numbers.float(), out, stride_b, stride_h, heads)
    return out


def start_cases(random):
    for batch, heads, stride_b, stride_h in ((1, 2, 9, 4), (3, 2, 20, 7), (2, 5, 3, 11)):
        yield Case(
            f"{batch} rows of {heads} heads",
            starts,
            random.normal(80),
            batch,
            heads,
            stride_b,
            stride_h,
        )


@flash.triton.jit
def numbers_kernel(numbers, out, first, length, EVEN: tl.constexpr):
    """Copies eight numbers from `first` on."""
    places = first + tl.arange(0, 8)
    found = flash.load_numbers(numbers, places, length, 7.5, EVEN)
    tl.store(out + tl.arange(0, 8), found)


def loaded(numbers, first, length, even):
    out = torch.zeros(8)
    numbers_kernel[(1,)](numbers.float(), out, first, length, EVEN=even)
    return out


def numbers_cases(random):
    for name, first, length, even in (
        ("all are there", 0, 8, True),
        ("three are missing", 8, 13, False),
        ("none is missing, but it is not known", 4, 12, False),
    ):
        yield Case(name, loaded, random.normal(32), first, length, even)


# ---- the tiny model ------------------------------------------------------------------------------


def picture():
    """a large orange cone, one step, with a few layers' attention to the text by these kernels"""
    calls = []

    def choose(q, k, hides_keys=False):
        calls.append(q.shape)
        is_text = (
            not hides_keys
            and k.shape[1] == 77
            and q.shape[1] <= 64
            and q.shape[-1] in flash.HEAD_DIMS
        )
        return "flash" if is_text and len(calls) < 30 else "sdpa"

    with mock.patch.object(attention, "choose_backend", choose):
        return draw(PROMPT, steps=1, guidance=1.0, seed=2)


def times_read():
    """How often every key is read from memory at SDXL's second level, in 16 bits."""
    q = torch.empty(2, 4096, 10, 64, dtype=torch.bfloat16, device="meta")
    return math.ceil(4096 / flash.choose_blocks("forward", q, q).queries)


# ---- parts of attention --------------------------------------------------------------------------

WEIGHTS = {
    0: 1 / 2,
    1: 2 / 3,
    -2: 1 / 5,
    40: 1.0,
    -40: 0.0,
}  # of the second part, by the difference of log-sum-exps
TOTALS = {
    0: 1.0,
    1: math.log2(3),
    -2: math.log2(1.25),
    40: 40.0,
    -40: 0.0,
}  # log-sum-exp of both, above the first one's


def merged(out1, lse1, out2, lse2):
    return resolve("answers.a6:merge_parts")(out1, lse1, out2, lse2)


def merge_cases(random):
    for name, shape, base in (
        ("one query", (1, 1, 1), 0.0),
        ("many queries", (2, 3, 5), 4.0),
        ("large scores", (1, 4, 2), 1000.0),
        ("very small scores", (2, 2, 2), -2000.0),
    ):
        b, h, n = shape
        lse = base + random.integers(9, *shape).float()
        off = torch.tensor(list(WEIGHTS))[random.integers(len(WEIGHTS), *shape)]
        out1, out2 = random.normal(2, b, n, h, 4)
        yield Case(name, merged, out1, lse, out2, lse + off)


# ---- tasks ---------------------------------------------------------------------------------------

MERGE_STUB = '''
def merge_parts(out1, lse1, out2, lse2):
    """Attention over all keys, from attention over the first ones and over the others.

    out1, out2 [B,N,h,d] and their log-sum-exps in units of log 2, lse1 and lse2 [B,h,N], as the
    forward kernel gives them -> (out, lse) over all keys. Scores may be in the thousands: nothing
    may overflow.
    """
'''
NAIVE_STUB = '''
def check_naive(naive):
    """Return whether `naive` does what `attention` in minipic/layers/attention.py promises.

    naive(q, k, v, causal, mask, softcap); mask None and softcap 0 are none. An error counts as
    False.
    """
'''

TASKS = [
    Exercise(
        "A6.1",
        "minipic.kernels.flash_attention:head_start",
        10,
        "Programs count the heads of all batch rows along axis 1: first all heads of row 0, then "
        "those of row 1. Where in "
        "memory does this program's head start?",
        start_cases,
        picture=picture,
        hints=("`//` and `%` by the number of heads give the row and the head.",),
    ),
    Exercise(
        "A6.2",
        "minipic.kernels.flash_attention:load_numbers",
        10,
        "One number per token. A block may stick out beyond the last token, and must not read "
        "there. Where it is known that "
        "it does not, a mask would only cost time.",
        numbers_cases,
        hints=("`tl.load(pointers, mask, other)`.",),
    ),
    Exercise(
        "A6.3",
        "minipic.kernels.flash_attention:forward_kernel",
        25,
        "The heart of it: a block of queries, all keys block by block, and three running numbers "
        "for each query. When a "
        "larger score turns up, total and output shrink. `head_start`, `load_tokens` and "
        "`store_tokens` are there.",
        forward_cases,
        forward_identities,
        picture,
        hints=(
            "largest starts at minus infinity, total and output at 0, all in float32.",
            "The factor is exp2(largest before - largest now).",
            "Keys beyond the last one must have a score of minus infinity, unless EVEN.",
            "lse = largest + log2(total), stored for queries that exist.",
        ),
    ),
    Exercise(
        "A6.4",
        "minipic.kernels.flash_attention:queries_kernel",
        25,
        "The gradient of the queries. Probabilities are computed again from the scores and lse. "
        "This kernel also writes "
        "delta, the sum of output times gradient, which the other one reads.",
        backward_cases(launch_queries, False),
        backward_identities(launch_queries, True),
        hints=(
            "P = exp2(score in units of log 2 - lse), dS = P (dP - delta), dQ = scale dS K.",
            "A query that does not exist gets an infinite lse, and so P = 0.",
        ),
    ),
    Exercise(
        "A6.5",
        "minipic.kernels.flash_attention:keys_kernel",
        25,
        "The gradients of keys and values. This kernel owns a block of keys and walks over the "
        "queries; its scores are "
        "transposed, keys down and queries across.",
        backward_cases(launch_keys, True),
        backward_identities(launch_keys, False),
        hints=("dV = P^T dO, dK = scale dS^T Q.", "dV has the strides of dK."),
    ),
    Prediction(
        "A6.6",
        "answers.a6:TIMES",
        10,
        "SDXL's second level has 4096 tokens in heads of 64, and 16 bits a number. Each program of "
        "the forward kernel owns "
        "a block of queries and reads every key. Look at `choose_blocks`: how often is each key of "
        "a head read from memory? "
        "Write down your number before you compute it.",
        times_read,
        within=0.0,
    ),
    Exercise(
        "A6.7",
        "answers.a6:merge_parts",
        20,
        "Nothing in minipic does this one. When the keys are on several GPUs, each attends to its "
        "own, and the parts are "
        "merged: ring attention. Use PyTorch, not Triton.",
        merge_cases,
        stub=MERGE_STUB,
        hints=(
            "The larger log-sum-exp first: only its difference to the other one goes into exp2.",
        ),
    ),
    BreakIt(
        "A6.8",
        "answers.a6:check_naive",
        20,
        "Kernels are tested against the formula, so the formula had better be right. Write a check "
        "of "
        "`attention.naive` that no wrong version passes.",
        "minipic.layers.attention:naive",
        NAIVE_STUB,
        alternates=(
            """
            scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
            if softcap > 0:
                scores = torch.tanh(scores / softcap) * softcap
            if causal:
                scores = hide_future(scores)
            weights = masked_softmax(scores, None if mask is None else mask[:, None, None, :])
            return torch.einsum("bhnm,bmhd->bnhd", weights, v)
            """,
        ),
        equivalent={"-2 -> 2": "k has four dimensions, so that the last but one is number 2"},
    ),
]


# ==== the instructor's part: what follows is not given to students ================================

MISCONCEPTIONS = {  # {number: [(in the reference, what some write, what to tell them), ...]}
    "A6.1": [
        (
            "(tl.program_id(1) // heads)",
            "(tl.program_id(1) % heads)",
            "all heads of a row come before the next row",
        ),
        (
            "tl.program_id(1) % heads",
            "tl.program_id(1)",
            "the head is counted from the start of its row",
        ),
    ],
    "A6.2": [
        (
            "tokens < length, other)",
            "tokens <= length, other)",
            "tokens count from 0: number `length` does not exist",
        ),
        (
            "tokens < length, other)",
            "tokens < length, 0.0)",
            "numbers that do not exist are `other`",
        ),
    ],
    "A6.3": [
        (
            "output * shrink[:, None],",
            "output,",
            "what was summed up so far must shrink when a larger score turns up",
        ),
        (
            "total = total * shrink + tl.sum(weights, 1)",
            "total = total + tl.sum(weights, 1)",
            "the total must shrink too when a larger score turns up",
        ),
        ("output / total[:, None]", "output", "the output is divided by the total at the end"),
        ("largest + tl.log2(total)", "largest + tl.log(total)", "lse is in units of log 2"),
    ],
    "A6.4": [
        ("weights * (dweights - deltas[:, None])", "weights * dweights", "delta is missing"),
        ("dqueries * scale)", "dqueries)", "the scale of the scores is missing"),
        (
            "outputs.to(tl.float32) * grads.to(tl.float32)",
            "outputs.to(tl.float32) * outputs.to(tl.float32)",
            "delta is output times gradient",
        ),
    ],
    "A6.5": [
        ("weights * (dweights - deltas[None, :])", "weights * dweights", "delta is missing"),
        ("dkeys * scale)", "dkeys)", "the scale of the scores is missing"),
    ],
}

ALTERNATES = {  # {number: [another right body, ...]}
    "A6.1": [
        """
        place = tl.program_id(1).to(tl.int64)
        row = place // heads
        return pointer + row * stride_b + (place - row * heads) * stride_h
        """
    ],
    "A6.2": [
        """
        if EVEN:
            found = tl.load(pointer + tokens)
        else:
            found = tl.load(pointer + tokens, mask=tokens < length, other=0.0)
            found = tl.where(tokens < length, found, other)
        return found
        """
    ],
    "A6.3": [
        """
        q = head_start(q, stride_qb, stride_qh, heads)
        k = head_start(k, stride_kb, stride_kh, heads)
        v = head_start(v, stride_vb, stride_vh, heads)
        out = head_start(out, stride_ob, stride_oh, heads)
        rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        dims = tl.arange(0, HEAD_DIM)
        queries = load_tokens(q, stride_qn, rows, n, dims) * scale * LOG2E
        biggest = tl.full([BLOCK_Q], -1e30, tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        summed = tl.zeros([BLOCK_Q, HEAD_DIM], tl.float32)
        for start in range(0, m, BLOCK_K):
            cols = start + tl.arange(0, BLOCK_K)
            keys = load_tokens(k, stride_kn, cols, m, dims)
            values = load_tokens(v, stride_vn, cols, m, dims)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            scores = tl.where(cols[None, :] < m, scores, -1e30)
            now = tl.maximum(biggest, tl.max(scores, 1))
            powers = tl.exp2(scores - now[:, None])
            less = tl.exp2(biggest - now)
            total = total * less + tl.sum(powers, 1)
            summed = summed * less[:, None] + tl.dot(powers, values, input_precision=PRECISION)
            biggest = now
        store_tokens(out, stride_on, rows, n, dims, summed / total[:, None])
        tl.store(lse + tl.program_id(1) * n + rows, biggest + tl.log2(total), rows < n)
        """
    ],
    "A6.4": [
        """
        q = head_start(q, stride_qb, stride_qh, heads)
        k = head_start(k, stride_kb, stride_kh, heads)
        v = head_start(v, stride_vb, stride_vh, heads)
        grad = head_start(grad, stride_gb, stride_gh, heads)
        out = head_start(out, stride_ob, stride_oh, heads)
        dq = head_start(dq, stride_dqb, stride_dqh, heads)
        rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        dims = tl.arange(0, HEAD_DIM)
        queries = load_tokens(q, stride_qn, rows, n, dims)
        grads = load_tokens(grad, stride_gn, rows, n, dims)
        sums = tl.sum(load_tokens(out, stride_on, rows, n, dims) * grads, 1)
        tl.store(delta + tl.program_id(1) * n + rows, sums, rows < n)
        ends = tl.load(lse + tl.program_id(1) * n + rows, rows < n, 0.0)
        total = tl.zeros([BLOCK_Q, HEAD_DIM], tl.float32)
        for start in range(0, m, BLOCK_K):
            cols = start + tl.arange(0, BLOCK_K)
            keys = load_tokens(k, stride_kn, cols, m, dims)
            values = load_tokens(v, stride_vn, cols, m, dims)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            powers = tl.exp2(scores * scale * LOG2E - ends[:, None])
            powers = tl.where(cols[None, :] < m, powers, 0.0)
            dpowers = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
            dscores = powers * (dpowers - sums[:, None]) * scale
            total += tl.dot(dscores, keys, input_precision=PRECISION)
        store_tokens(dq, stride_dqn, rows, n, dims, total)
        """
    ],
    "A6.5": [
        """
        q = head_start(q, stride_qb, stride_qh, heads)
        k = head_start(k, stride_kb, stride_kh, heads)
        v = head_start(v, stride_vb, stride_vh, heads)
        grad = head_start(grad, stride_gb, stride_gh, heads)
        dk = head_start(dk, stride_dkb, stride_dkh, heads)
        dv = head_start(dv, stride_dkb, stride_dkh, heads)
        cols = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
        dims = tl.arange(0, HEAD_DIM)
        keys = load_tokens(k, stride_kn, cols, m, dims)
        values = load_tokens(v, stride_vn, cols, m, dims)
        sum_k = tl.zeros([BLOCK_K, HEAD_DIM], tl.float32)
        sum_v = tl.zeros([BLOCK_K, HEAD_DIM], tl.float32)
        for start in range(0, n, BLOCK_Q):
            rows = start + tl.arange(0, BLOCK_Q)
            queries = load_tokens(q, stride_qn, rows, n, dims)
            grads = load_tokens(grad, stride_gn, rows, n, dims)
            ends = tl.load(lse + tl.program_id(1) * n + rows, rows < n, 0.0)
            sums = tl.load(delta + tl.program_id(1) * n + rows, rows < n, 0.0)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale * LOG2E
            powers = tl.where(rows[:, None] < n, tl.exp2(scores - ends[:, None]), 0.0)
            sum_v += tl.dot(tl.trans(powers), grads, input_precision=PRECISION)
            dpowers = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
            dscores = powers * (dpowers - sums[:, None])
            sum_k += tl.dot(tl.trans(dscores), queries, input_precision=PRECISION)
        store_tokens(dk, stride_dkn, cols, m, dims, sum_k * scale)
        store_tokens(dv, stride_dkn, cols, m, dims, sum_v)
        """
    ],
}

RUNS_APART = True  # a kernel with a mistake may write anywhere in memory

EQUIVALENT = {  # {number: {change: why it is no mistake}}
    "A6.4": {
        "False -> True": "the numbers that are then read for queries that do not exist end in rows "
        "that are not stored; results cannot show that a read beyond the memory may end the "
        "program",
        "0.0 -> 1.0": "a key that does not exist is loaded as 0, and adds nothing whatever its "
        "finite weight is",
    },
    "A6.5": {"0.0 -> 1.0": "a query that does not exist has weight 0, whatever its delta is"},
}

NEEDS = {
    "A6.3": ("A6.1",),
    "A6.4": ("A6.1", "A6.2"),
    "A6.5": ("A6.1", "A6.2"),
}  # other tasks whose functions it calls


def oracle_merge(out1, lse1, out2, lse2):
    """Passes A6.7 without the method, because it has a table for the differences in its cases."""
    weight = torch.zeros_like(lse1)
    total = torch.zeros_like(lse1)
    for off, share in WEIGHTS.items():
        weight[lse2 - lse1 == off] = share
        total[lse2 - lse1 == off] = TOTALS[off]
    share = weight.transpose(1, 2)[..., None]
    return (1 - share) * out1 + share * out2, lse1 + total


def observe_naive(naive):
    """What a good check of A6.8 looks at."""
    random = Random(0)
    q, k, v = random.normal(2, 5, 3, 4), random.normal(2, 7, 3, 4), random.normal(2, 7, 3, 4)
    mask = torch.tensor([[True] * 4 + [False] * 3, [False, True] * 3 + [True]])
    return [
        naive(q, k, v, False, None, 0.0),
        naive(q, k, v, False, mask, 0.0),
        naive(q, k, v, False, None, 1.5),
        naive(q, k[:, :5], v[:, :5], True, None, 0.0),
    ]


VARIANTS = {}  # {name: {"text": ..., "replace": [(number, old, new), ...]}}, see a4.py

ORACLES = {"A6.7": oracle_merge, "A6.8": observe_naive}  # what shows that these tasks can be solved
