"""Scenes a second of the world, on one core: sampled, drawn at 64x64, and with all maps. Writes world.json beside.

    python tests/benchmarks/world.py
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
from record import record  # noqa: E402

from minipic.world.scene import render, sample_scene  # noqa: E402

COUNT, ROUNDS = 128, 5


def rate(work):
    """The best of ROUNDS in scenes a second of processor time, so that other programs count less."""
    times = []
    for k in range(ROUNDS):
        start = time.process_time()
        work(k)
        times.append(time.process_time() - start)
    return round(COUNT / min(times), 1)


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    scenes = [sample_scene(0, i) for i in range(COUNT)]
    results = {
        "sample": rate(lambda k: [sample_scene(k + 1, i) for i in range(COUNT)]),
        "render": rate(lambda k: render(scenes, truth=False)),
        "render with maps": rate(lambda k: render(scenes)),
        "sample and render": rate(lambda k: render([sample_scene(k, i) for i in range(COUNT)], truth=False)),
    }
    for name, value in results.items():
        print(f"{name:20} {value:8.1f} scenes/s on one core")
    record("world", results)


if __name__ == "__main__":
    main()
