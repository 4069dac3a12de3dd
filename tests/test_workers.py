"""Batches that other processes prepare: the same bits for any number of them, mistakes in one sentence, a clean stop."""

import multiprocessing
import os
import signal
from dataclasses import replace

import pytest
import tiny
import torch
import toy_recipe
from toy_recipe import at, finish, hashes, one_thread, start_toys, toy, until  # noqa: F401 - a fixture

import train
from minipic import latents
from minipic.common import InputError
from minipic.recipes import clip
from minipic.training import workers
from minipic.training.workers import in_order
from minipic.weights import read_weights
from minipic.world.pictures import compose, compose_counted

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")]


@pytest.fixture(scope="module")
def bits(tmp_path_factory):
    """The checkpoints of a run without workers, after each of its 12 steps."""
    folder = tmp_path_factory.mktemp("here")
    toy("--out", folder, "--steps", 12, "--save-every", 1, "--keep", 99, "--gradient-accumulation", 2, "--workers", 0)
    return folder


@pytest.mark.parametrize("number", [1, 4])
def test_any_number_of_workers_trains_the_same_bits_also_after_a_resume(tmp_path, bits, number):
    flags = ["--steps", 12, "--gradient-accumulation", 2, "--workers", number]
    assert toy("--out", tmp_path / "whole", *flags) == 0
    assert toy("--out", tmp_path / "cut", *flags, "--resume", at(bits, 5)) == 0
    for name in ("whole", "cut"):
        assert hashes(at(tmp_path / name, 12)) == hashes(at(bits, 12))
    assert not multiprocessing.active_children()


def test_work_is_done_elsewhere_in_order_and_leaves_random_numbers_alone():
    state = torch.get_rng_state()
    rows = list(in_order(lambda number: (number, os.getpid()), range(3, 20, 2), 2))
    assert [number for number, _ in rows] == list(range(3, 20, 2))
    assert len({process for _, process in rows} - {os.getpid()}) == 2
    assert torch.get_rng_state().equal(state)


@pytest.mark.slow
def test_pictures_drawn_and_t2i_trained_with_workers_are_the_same(tmp_path):
    trained = []
    for number in (0, 2):
        out = tmp_path / f"{number}"
        flags = ["--out", out, "--workers", number, "--model", tiny.folder(), "--steps", 3, "--batch", 4]
        flags += ["--scenes", 130, "--counts", 0.3]
        assert train.main(["t2i", *map(str, flags), "--precision", "fp32", "--sample-every", "0"]) == 0
        trained.append(read_weights(at(out, 3) / "model.safetensors"))
    assert trained[0].keys() == trained[1].keys()
    assert all(value.equal(trained[1][name]) for name, value in trained[0].items())


@pytest.mark.slow
def test_the_world_is_the_same_with_workers(tmp_path):
    config = clip.Settings(scenes=70, counts=0.3, workers=2, out=str(tmp_path))
    assert latents.world_pictures(config, 20) == [compose(0, i) for i in range(20)]
    assert latents.world_pictures(config, 9, counted=True) == [compose_counted(0, i) for i in range(9)]
    towers = clip.build(config)
    images = clip.CaptionData(towers, config).images
    assert images.equal(clip.CaptionData(towers, replace(config, workers=0)).images)


@pytest.mark.parametrize("error", [InputError("bad.png: is no picture"), OSError("bad.png: is no picture")])
def test_a_mistake_in_a_worker_is_one_sentence(tmp_path, capsys, monkeypatch, error):
    def batch(self, step, indices, plain=toy_recipe.TeacherData.batch):
        if step == 3:
            raise error
        return plain(self, step, indices)
    monkeypatch.setattr(toy_recipe.TeacherData, "batch", batch)
    assert toy("--out", tmp_path, "--workers", 2, "--save-every", 3) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "train.py: bad.png: is no picture"
    assert at(tmp_path, 3).exists()


def test_a_killed_worker_is_one_sentence(tmp_path, capsys, monkeypatch):
    def batch(self, step, indices, plain=toy_recipe.TeacherData.batch):
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, step, indices)
    monkeypatch.setattr(toy_recipe.TeacherData, "batch", batch)
    assert toy("--out", tmp_path, "--workers", 1) == 2
    assert "train.py: --workers: one of these processes was killed, perhaps for lack" in capsys.readouterr().err


def test_a_low_limit_of_open_files_holds_nobody_up():
    """Each tensor that a worker sends is an open file. Without a higher limit this waits for ever."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1024:
        pytest.skip("the system allows no more open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(40)
    try:
        results = list(in_order(lambda number: [torch.full((2,), number) for _ in range(150)], range(3), 1))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [result[0].tolist() for result in results] == [[0, 0], [1, 1], [2, 2]]
    assert all(len(result) == 150 for result in results)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_saves_and_ends_all_processes(tmp_path, number):
    """A terminal sends Ctrl-C to everyone, a batch system SIGTERM."""
    flags = ["--out", tmp_path / "run", "--steps", 10 ** 6, "--lr-schedule", "constant", "--workers", 2, "--slow", 0.02]
    run = start_toys(flags, tmp_path / "said")
    until(lambda: (tmp_path / "run/log.jsonl").exists() and (tmp_path / "run/log.jsonl").stat().st_size > 500)
    with open(f"/proc/{run[0].pid}/task/{run[0].pid}/children") as file:
        children = [int(word) for word in file.read().split()]
    assert len(children) == 2
    for process in [*children, run[0].pid]:
        os.kill(process, number)
    assert finish(run) == [0]
    said = (tmp_path / "said").read_text()
    assert f"stopped by {number.name} after step" in said and "Traceback" not in said
    assert not any(os.path.exists(f"/proc/{child}") for child in children)


def test_how_many_workers_are_chosen(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    gpu = torch.device("cuda")
    assert [workers.choose_workers(gpu, processes) for processes in (1, 4, 8, 32)] == [8, 3, 1, 0]
    assert workers.choose_workers(torch.device("cpu"), 1) == 0
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert workers.choose_workers(gpu, 1) == 0
    with pytest.raises(InputError, match="workers: needs fork"):
        workers.check_workers(1)
