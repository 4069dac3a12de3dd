"""The two programs on the tiny model, before and now: processor time of one thread. Writes programs.json beside.

    git worktree add BEFORE COMMIT && python tests/benchmarks/programs.py BEFORE [--rounds 3]

A step of `train.py t2i` is what more steps add to a whole run; a picture of `sample.py` is the whole run, most of which
is Python starting. The smallest of the rounds, in which both versions run in turn.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from record import record

ROOT = Path(__file__).parents[2]
SAMPLE = ["sample.py", "a red cube on a blue floor"]
TRAIN = ["train.py", "t2i", "--scenes", "32", "--batch", "32", "--sample-every", "0", "--ema", "0.999"]
STEPS = 2, 10


def seconds(root, command):
    """Processor time of one run of a program."""
    with tempfile.TemporaryDirectory() as out:
        run = subprocess.Popen([sys.executable, *command, "--out", out], cwd=root, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        _, status, usage = os.wait4(run.pid, 0)
    assert status == 0, command
    return usage.ru_utime + usage.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the version to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    roots = {"before": arguments.before.resolve(), "now": ROOT}
    commands = {"sample": SAMPLE} | {steps: [*TRAIN, "--steps", str(steps)] for steps in STEPS}
    times = {(name, what): [] for name in roots for what in commands}
    for _ in range(arguments.rounds):
        for name, what in times:
            times[name, what].append(seconds(roots[name], commands[what]))
    best = {key: min(values) for key, values in times.items()}
    step = {name: (best[name, STEPS[1]] - best[name, STEPS[0]]) / (STEPS[1] - STEPS[0]) for name in roots}
    run = {name: best[name, "sample"] for name in roots}
    results = {"step of train.py t2i, batch 32": step, "run of sample.py": run}
    commit = subprocess.run(["git", "-C", arguments.before, "rev-parse", "--short", "HEAD"], check=True, text=True,
                            capture_output=True).stdout.strip()
    for what, row in results.items():
        ratio = row["before"] / row["now"]
        print(f"{what}: {row['before']:.3f} s before, {row['now']:.3f} s now: {ratio:.2f} times as fast")
    print(record("programs", results, before=commit, rounds=arguments.rounds))


if __name__ == "__main__":
    main()
