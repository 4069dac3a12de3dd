"""Flash attention's block sizes, warps and stages at SDXL's shapes. Writes attention_sweep.json beside.

    python tests/benchmarks/attention_sweep.py [--rounds 10] [--minutes 7]
    TRITON_INTERPRET=1 python tests/benchmarks/attention_sweep.py --toy     (a trial without a GPU)

Every kernel by itself (forward, queries, keys) with every setting of GRID, and PyTorch's kernels, forward and forward
with backward: microseconds of one call of ten in a CUDA graph. A setting that does not compile, or gives other numbers
than PyTorch in float32, is left out, and said. The best go into flash_attention.choose_blocks by hand. When --minutes
have passed, what is left is not measured.
"""

import argparse
import time
from functools import partial
from itertools import product

import torch
from attention import CALLS, SHAPES, backward, candidates, recorded
from record import record
from side_by_side import DEVICE, GPU, measure

from minipic.kernels.flash_attention import Blocks, attend, key_gradients, query_gradients, triton
from minipic.layers.attention import attention

GRID = {  # of each kernel: queries, keys, warps, stages
    "forward": ((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)),
    "queries": ((64, 128), (32, 64, 128), (4, 8), (2, 3)),
    "keys": ((32, 64, 128), (64, 128), (4, 8), (2, 3))}
TOY_GRID = {kernel: ((16,), (16, 32), (4,), (1,)) for kernel in GRID}
TOY_SHAPES = {"self": (1, 32, 32), "text": (1, 32, 20)}
TOLERANCE = 2e-2  # of the largest number, in bf16


def microseconds(works: dict, rounds: int) -> dict[str, float]:
    seconds = measure({name: recorded(work) for name, work in works.items()}, rounds)
    return {name: 1e6 * t / CALLS for name, t in seconds.items()}


def kernels_of(q, k, v, grad) -> dict:
    """{kernel: (its work, given blocks; what it should give)}, all on the same inputs."""
    leaves = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = attention(*leaves, backend="sdpa")
    dq, dk, dv = torch.autograd.grad(expected, leaves, grad.float())
    blocks = Blocks(16, 16, 4, 1) if q.dtype == torch.float32 else Blocks(64, 64, 4, 2)
    out, lse = attend(q, k, v, blocks)
    _, delta = query_gradients(q, k, v, grad, out, lse, blocks)
    return {"forward": (partial(attend, q, k, v), [expected.detach()]),
            "queries": (partial(query_gradients, q, k, v, grad, out, lse), [dq]),
            "keys": (partial(key_gradients, q, k, v, grad, lse, delta), [dk, dv])}


def right_works(work, expected, grid) -> dict:
    """{a setting's numbers: the work with it}, of those that compile and are right."""
    works = {}
    for blocks in map(Blocks._make, product(*grid)):
        try:
            found = work(blocks)
        except (RuntimeError, triton.CompilationError) as error:  # too many registers, or too large
            print(f"    {tuple(blocks)}: {type(error).__name__}")
            continue
        errors = []
        for own, right in zip(found, expected):
            errors.append(((own.float() - right).abs().max() / right.abs().max()).item())
        if max(errors) < TOLERANCE:
            works[" ".join(map(str, blocks))] = partial(work, blocks)
        else:
            print(f"    {tuple(blocks)}: wrong by {max(errors):.0e}")
    return works


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=7)
    parser.add_argument("--toy", action="store_true", help="small shapes and few settings, in fp32")
    options = parser.parse_args()
    shapes, grids = (TOY_SHAPES, TOY_GRID) if options.toy else (SHAPES, GRID)
    dtype = torch.float32 if options.toy else torch.bfloat16
    end = time.monotonic() + 60 * options.minutes
    results = {}
    for name, (heads, n, m) in shapes.items():
        if time.monotonic() > end:
            print(f"{name}: no time left")
            continue
        q, k, v = (torch.randn(1 + GPU, size, heads, 64, device=DEVICE, dtype=dtype) for size in (n, m, m))
        grad = torch.randn_like(q)
        peers = {peer: run for peer, run in candidates().items() if peer.startswith("sdpa")}
        both = {peer: partial(backward, run, q, k, v, grad) for peer, run in peers.items()}
        with torch.no_grad():
            rows = {"PyTorch, forward": microseconds({peer: partial(run, q, k, v) for peer, run in peers.items()},
                                                     options.rounds)}
        rows["PyTorch, forward and backward"] = microseconds(both, options.rounds)
        for kernel, (work, expected) in kernels_of(q, k, v, grad).items():
            rows[kernel] = microseconds(right_works(work, expected, grids[kernel]), options.rounds)
            best = min(rows[kernel], key=rows[kernel].get)
            print(f"{name}, {kernel}: best {best} in {rows[kernel][best]:.1f} us of {len(rows[kernel])}", flush=True)
        results[name] = rows
    print(record("attention_sweep", results, rounds=options.rounds, columns="queries keys warps stages"))


if __name__ == "__main__":
    main()
