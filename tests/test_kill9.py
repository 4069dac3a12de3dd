"""SIGKILL at random moments: what is on the disk then resumes to bitwise the weights of an uninterrupted run.

The suite kills a few times. As a program it kills as often as asked, with one and with two processes, half of the times
on a disk made slow so that many kills fall into the writing of a checkpoint: `python tests/test_kill9.py 200`
"""

import collections
import random
import sys
import tempfile
import time
from pathlib import Path

import pytest
from toy_recipe import at, finish, hashes, start_toys, until

from minipic.training.checkpoint import complete_checkpoints, find_damage

STEPS = 60
FLAGS = ["--steps", STEPS, "--save-every", 2, "--gradient-accumulation", 2, "--dropout", 0.2, "--log-every", 5]


def train_and_kill(folder, kills, world, slow_disk, seed):
    """Train in fresh folders, one after another, until `kills` kills are spent, and compare each end with a run that
    lived. Returns how many kills there were, how many left a half-written or half-removed checkpoint, and how many runs
    came through.
    """
    chance, count = random.Random(seed), collections.Counter(kills=0, while_saving=0, runs=0)
    assert finish(start_toys([*FLAGS, "--out", folder / "lived"], folder / "said", world=world)) == [0] * world
    while count["kills"] < kills:
        out = folder / f"run{count['runs']}"
        while (newest := max(complete_checkpoints(out / "checkpoints"), default=0)) < STEPS:
            said = folder / f"said{count['runs']}-{count['kills']}"
            resume = ["--resume", "latest"] if newest else []
            run = start_toys([*FLAGS, "--out", out, *resume], said, world=world, slow_disk=slow_disk)
            if count["kills"] < kills:
                until(lambda: said.exists() and ("starting in" in said.read_text() or "going on" in said.read_text()))
                time.sleep(chance.uniform(0, 0.4))
                chance.shuffle(run)
                run[0].kill()
                time.sleep(chance.choice([0, 0.05]))  # the rest of a broken group may live a little longer
            for process in run[1:] * (count["kills"] < kills):
                process.kill()
            killed = -9 in finish(run)
            count["kills"] += killed
            count["while_saving"] += killed and any(out.glob("checkpoints/*.tmp"))
            if newest:
                assert f"going on from {at(out, newest)}\n" in said.read_text()  # nothing finished is lost
            for path in complete_checkpoints(out / "checkpoints").values():
                assert find_damage(path) == ""  # a finished name is a promise
        assert hashes(at(out, STEPS)) == hashes(at(folder / "lived", STEPS))
        count["runs"] += 1
    return dict(count)


@pytest.mark.slow
@pytest.mark.parametrize("world, kills", [(1, 4), (2, 2)])
def test_killed_runs_resume_bitwise(tmp_path, world, kills):
    assert train_and_kill(tmp_path, kills, world, slow_disk=0.004, seed=world)["kills"] == kills


if __name__ == "__main__":
    for world in (1, 2):
        for slow_disk in (0, 0.01):  # seconds a flush
            with tempfile.TemporaryDirectory() as folder:
                count = train_and_kill(Path(folder), int(sys.argv[1]) // 4, world, slow_disk, seed=7)
            print(f"{world} process(es), {slow_disk} s a flush: {count}; all weights bitwise equal", flush=True)
