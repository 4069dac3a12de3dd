"""Flash attention's block sizes, warps and stages at SDXL's shapes. Writes attention_sweep.json beside.

    python tests/benchmarks/attention_sweep.py [--rounds 20] [--minutes 7]
    TRITON_INTERPRET=1 python tests/benchmarks/attention_sweep.py --toy     (a trial without a GPU)

One kernel at a time (forward, queries, keys) takes every setting of GRID, the others keep theirs; PyTorch's kernel runs
in the same turns. A setting that does not compile, or gives other numbers than the formula in float32, is left out. The
best go into flash_attention.choose_blocks by hand. When --minutes have passed, what is left is not measured.
"""

import argparse
import time
from functools import partial
from itertools import product
from unittest import mock

import torch
from attention import SHAPES, backward, candidates, recorded
from record import record
from side_by_side import DEVICE, GPU, measure

from minipic.kernels import flash_attention
from minipic.kernels.flash_attention import Blocks, FlashAttention
from minipic.layers.attention import attention

GRID = {  # of each kernel: queries, keys, warps, stages
    "forward": ((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)),
    "queries": ((64, 128), (32, 64, 128), (4, 8), (2, 3)),
    "keys": ((32, 64, 128), (64, 128), (4, 8), (2, 3))}
TOY_GRID = {kernel: ((16,), (16, 32), (4,), (1,)) for kernel in GRID}
TOY_SHAPES = {"self": (1, 32, 32), "text": (1, 32, 20)}


def with_blocks(kernel, blocks, work):
    """The same work, in which one kernel divides its work in this way."""
    default = flash_attention.choose_blocks

    def choose_blocks(name, q, k):
        return blocks if name == kernel else default(name, q, k)

    def run():
        with mock.patch.object(flash_attention, "choose_blocks", choose_blocks):
            return work()
    return run


def settings(kernel, grid, m):
    """The Blocks to try. All of a text's keys are in one block, as choose_blocks has it."""
    for blocks in map(Blocks._make, product(*grid[kernel])):
        if kernel == "forward" and m <= 128:
            blocks = blocks._replace(keys=max(16, 1 << (m - 1).bit_length()))
        yield blocks


def works_of(kernel, grid, q, k, v):
    """{a setting's numbers: its work}, of those that compile and are right."""
    expected = attention(q.float(), k.float(), v.float(), backend="naive")
    grad = torch.randn_like(q)
    leaves = [x.detach().float().requires_grad_() for x in (q, k, v)]
    gradients = torch.autograd.grad(attention(*leaves, backend="naive"), leaves, grad.float())
    works = {}
    for blocks in dict.fromkeys(settings(kernel, grid, k.shape[1])):
        if kernel == "forward":
            work = partial(FlashAttention.apply, q, k, v)
        else:
            work = partial(backward, FlashAttention.apply, q, k, v, grad)
        work = with_blocks(kernel, blocks, work)
        try:
            found = work() if kernel == "forward" else gradients_of(kernel, blocks, q, k, v, grad)
        except (RuntimeError, flash_attention.triton.CompilationError) as error:  # too many registers, or too large
            print(f"    {tuple(blocks)}: {type(error).__name__}")
            continue
        wanted = [expected] if kernel == "forward" else gradients
        found = [found] if kernel == "forward" else found
        errors = [((a.float() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted)]
        if max(errors) < 2e-2:
            works[" ".join(map(str, blocks))] = work
        else:
            print(f"    {tuple(blocks)}: wrong by {max(errors):.0e}")
    return works


def gradients_of(kernel, blocks, q, k, v, grad):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return with_blocks(kernel, blocks, lambda: torch.autograd.grad(FlashAttention.apply(*leaves), leaves, grad))()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=7)
    parser.add_argument("--toy", action="store_true", help="small shapes and few settings, in fp32")
    options = parser.parse_args()
    shapes, grid = (TOY_SHAPES, TOY_GRID) if options.toy else (SHAPES, GRID)
    dtype = torch.float32 if options.toy else torch.bfloat16
    end, results = time.monotonic() + 60 * options.minutes, {}
    for (name, (heads, n, m)), kernel in product(shapes.items(), GRID):
        if time.monotonic() > end:
            print(f"{name}, {kernel}: no time left")
            continue
        q, k, v = (torch.randn(1 + GPU, size, heads, 64, device=DEVICE, dtype=dtype) for size in (n, m, m))
        peer = candidates()["sdpa"]
        works = works_of(kernel, grid, q, k, v)
        work = partial(peer, q, k, v) if kernel == "forward" else partial(backward, peer, q, k, v, torch.randn_like(q))
        seconds = measure({way: recorded(run) for way, run in {"sdpa": work, **works}.items()}, options.rounds)
        rows = {way: {"speed over sdpa": seconds["sdpa"] / t} for way, t in seconds.items()}
        results[f"{name}, {kernel}"] = rows
        best = max(rows, key=lambda way: rows[way]["speed over sdpa"] if way != "sdpa" else 0)
        print(f"{name}, {kernel}: best {best} at {rows[best]['speed over sdpa']:.2f}x, {len(works)} settings", flush=True)
    print(record("attention_sweep", results, rounds=options.rounds, columns="queries keys warps stages"))


if __name__ == "__main__":
    main()
