"""attention()'s backends beside PyTorch's own kernels, at SDXL's shapes. Writes attention.json beside, on a CPU with
AMX attention-amx.json and on a GPU attention-gpu.json: what is fastest differs between the three.

    python tests/benchmarks/attention.py [--rounds 30]

Interleaved in one process on the same inputs; the median on a GPU (events), the smallest processor time of one thread
on a CPU, where other programs run too. On a GPU also forward and backward together; there ten calls are one CUDA graph,
for Python takes longer to start the small ones than the GPU to run them. A kernel that gives other numbers than the
formula in float32 is an error.
"""

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from record import record
from side_by_side import GPU, measure
from torch.nn.attention import SDPBackend, sdpa_kernel

from minipic.common import cpu_has
from minipic.layers.attention import attention

SHAPES = {"self, 64x64 latents": (10, 4096, 4096), "self, 32x32 latents": (20, 1024, 1024),  # heads, N, M; d is 64
          "text, 64x64 latents": (10, 4096, 77), "text, 32x32 latents": (20, 1024, 77)}
PEERS = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
         "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION}
CALLS = 10 if GPU else 1  # in a graph
OURS = ["chunked", "flash"] if GPU else ["naive", "chunked"]


def peer(backend, q, k, v):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def candidates():
    """{name: attention}; the first is what a user has without us."""
    found = {"sdpa": lambda q, k, v: F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)}
    if GPU:
        from torch.nn.attention.flex_attention import flex_attention
        flex = torch.compile(flex_attention)
        found |= {name: partial(peer, backend) for name, backend in PEERS.items()}
        found["flex"] = lambda q, k, v: flex(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    return found | {f"minipic {name}": partial(attention, backend=name) for name in OURS}


def backward(run, q, k, v, grad):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.autograd.grad(run(*leaves), leaves, grad)


def recorded(work):
    """work(), CALLS times, as a CUDA graph where there is a GPU."""
    if not GPU:
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            work()
    return graph.replay


def times(works, rounds):
    """{name: {"ms": of one call, "speed over sdpa": ...}}"""
    seconds = measure({name: recorded(work) for name, work in works.items()}, rounds)
    return {name: {"ms": 1e3 * t / CALLS, "speed over sdpa": seconds["sdpa"] / t} for name, t in seconds.items()}


def compare(shape, dtype, rounds):
    heads, n, m = shape
    make = partial(torch.randn, device="cuda" if GPU else "cpu", dtype=dtype)
    q, k, v = (make(1 + GPU, size, heads, 64) for size in (n, m, m))
    expected, works = attention(q.float(), k.float(), v.float(), backend="naive"), {}
    for name, run in candidates().items():
        with torch.no_grad():
            error = (run(q, k, v).float() - expected).abs().max().item() / expected.abs().max().item()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2), f"{name} is wrong by {error:.1e}"
        works[name] = torch.no_grad()(partial(run, q, k, v))
    rows = {"forward": times(works, rounds)}
    if GPU:
        works = {name: partial(backward, run, q, k, v, torch.randn_like(q)) for name, run in candidates().items()}
        rows["forward and backward"] = times(works, rounds)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for dtype in (torch.bfloat16,) if GPU else (torch.bfloat16, torch.float32):
        for name, shape in SHAPES.items():
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            results[label] = compare(shape, dtype, options.rounds)
            for direction, rows in results[label].items():
                print(f"{label}, {direction}: " + "  ".join(
                    f"{kind} {row['ms']:.3f} ms ({row['speed over sdpa']:.2f}x)" for kind, row in rows.items()))
    name = "attention"
    if GPU:
        name = "attention-gpu"
    elif cpu_has("amx_tile"):
        name = "attention-amx"
    print(record(name, results, rounds=options.rounds, calls=CALLS))


if __name__ == "__main__":
    main()
