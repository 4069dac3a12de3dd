"""Training on a GPU: Python does not wait for it between lines of the log, and workers leave the bits as they are."""

import json

import pytest
import tiny
import torch

import train
from minipic.weights import read_weights

GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not GPU, reason="needs a GPU")


@pytest.mark.parametrize("recipe, flags", [
    ("t2i", ["--scenes", "64"]), ("t2i", ["--scenes", "64", "--balanced", "--logit-normal", "1"]),
    ("controlnet", ["--scenes", "64"]), ("edit", ["--scenes", "64"]), ("onepic", ["--scenes", "64"])])
def test_nothing_waits_for_the_gpu_between_lines_of_the_log(tmp_path, monkeypatch, recipe, flags):
    rate = train.learning_rate

    def rate_of_step(config, step, time_share):
        logs = (step + 1) % config.log_every == 0
        torch.cuda.set_sync_debug_mode("default" if logs else "error")
        return rate(config, step, time_share)
    monkeypatch.setattr(train, "learning_rate", rate_of_step)
    flags = [*flags, "--model", str(tiny.folder()), "--out", str(tmp_path), "--steps", "8", "--log-every", "4",
             "--batch", "8", "--sample-every", "0", "--workers", "1"]
    try:
        assert train.main([recipe, *flags]) == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_workers_leave_the_bits_as_they_are(tmp_path):
    trained = []
    for number in ("0", "3"):
        out = tmp_path / number
        flags = ["--model", str(tiny.folder()), "--out", str(out), "--steps", "4", "--batch", "8", "--scenes", "130",
                 "--sample-every", "0", "--workers", number, "--log-every", "1"]
        assert train.main(["t2i", *flags]) == 0
        losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
        trained.append((losses, read_weights(out / "checkpoints/step-000004/model.safetensors")))
    assert trained[0][0][0] == trained[1][0][0]  # later ones follow sums whose order a GPU chooses
    assert trained[0][0] == pytest.approx(trained[1][0], rel=1e-3)
