"""AdamW and Muon on the tiny UNet from nothing: the loss of the same batches. Writes optimizers.json beside.

    python tests/benchmarks/optimizers.py [--steps 400] [--batch 32] [--scenes 2000]

`train.py t2i --from-nothing`, once with each, at the same time and with one thread each. The loss is the mean over a
quarter of the steps: what a single step gives depends most on the noise levels that were drawn.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from record import record

ROOT = Path(__file__).parents[2]
FLAGS = ["t2i", "--from-nothing", "--lr", "1e-3", "--clip", "0.5", "--sample-every", "0", "--log-every", "1"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"steps": 400, "batch": 32, "scenes": 2000}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # as the runs have, for the record
    flags = [text for name, value in vars(chosen).items() for text in (f"--{name}", str(value))]
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: subprocess.Popen(
            [sys.executable, "train.py", *FLAGS, *flags, "--optimizer", name, "--out", f"{folder}/{name}"], cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"}) for name in ("adamw", "muon")}
        assert [run.wait() for run in runs.values()] == [0, 0]
        logs = {name: [json.loads(line) for line in Path(folder, name, "log.jsonl").read_text().splitlines()]
                for name in runs}
    parts = [range(i * chosen.steps // 4, (i + 1) * chosen.steps // 4) for i in range(4)]
    results = {name: {"loss by quarter": [statistics.mean(rows[step]["loss"] for step in part) for part in parts],
                      "samples a second": statistics.median(row["samples_per_s"] for row in rows)}
               for name, rows in logs.items()}
    for name, row in results.items():
        print(f"{name}: loss", *(f"{loss:.4f}" for loss in row["loss by quarter"]), f"{row['samples a second']} samples/s")
    print(record("optimizers", results))


if __name__ == "__main__":
    main()
