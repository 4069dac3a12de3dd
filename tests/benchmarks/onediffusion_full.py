"""One step of OneDiffusion's released size, 2.8 B weights, random and in bf16, on a picture of 256x256 and its depth.

    python tests/benchmarks/onediffusion_full.py [--frames 2] [--side 256]

It needs 5.6 GB for the weights. Memory is the peak of the whole process. Writes onediffusion_full.json beside it.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

from record import record  # noqa: E402

from minipic.models.nextdit import NextDiT, NextDiTConfig  # noqa: E402
from minipic.weights.layouts import build_empty  # noqa: E402


def random_network(device: str) -> NextDiT:
    """The released network with random weights, made one by one: never two copies in memory."""
    network = build_empty(NextDiT, NextDiTConfig())
    state = {}
    for name, tensor in network.state_dict().items():
        value = torch.empty(tensor.shape, dtype=torch.bfloat16, device=device)
        width = tensor.shape[-1]
        state[name] = value.uniform_(-1, 1).mul_(width**-0.5) if tensor.ndim > 1 else value.fill_(1.0)
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval()


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=2)
    parser.add_argument("--side", type=int, default=256)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = random_network(device)
    config = network.config
    side = options.side // 8
    x = torch.randn(1, options.frames, config.in_channels, side, side, device=device).bfloat16()
    t = torch.tensor([[500.0] + [0.0] * (options.frames - 1)], device=device)
    text = torch.randn(1, 64, config.caption_channels, device=device).bfloat16()
    mask = torch.ones(1, 64, device=device)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        out = network(x, t, text, mask)
        assert out.isfinite().all() and out.shape == x.shape
        seconds.append(time.perf_counter() - start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device == "cuda":
        memory = torch.cuda.max_memory_allocated()
    results = {"parameters": sum(p.numel() for p in network.parameters()), "seconds a step": min(seconds),
               "peak memory in GB": memory / 1e9}
    print(results)
    print(record("onediffusion_full", results, frames=options.frames, side=options.side))


if __name__ == "__main__":
    main()
