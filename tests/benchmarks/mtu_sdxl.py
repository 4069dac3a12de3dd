"""MTU on SDXL at its full size, with random weights: one training step and one drawing, on a CPU.

    python tests/benchmarks/mtu_sdxl.py [--side 256] [--tasks t2i,edit,sr,inpaint]

All weights, gradients and AdamW's moments are in bf16, so that the step fits into 22 GB. In fp32,
as train.py keeps them, gradients and moments alone would take 14.8 GB, 12 bytes for each trained
weight. Prints peak memory and processor seconds, and writes them to mtu_sdxl.json (Linux).
"""

import argparse
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

from record import record  # noqa: E402
from train_step import peak  # noqa: E402

from minipic.image import to_pictures  # noqa: E402
from minipic.layers.moe import upcycle  # noqa: E402
from minipic.papers import mtu  # noqa: E402
from minipic.pipeline import DrawSettings, Pipeline  # noqa: E402
from minipic.text import Tokenizer  # noqa: E402
from minipic.weights.layouts import build_empty  # noqa: E402
from minipic.weights.single_file import SINGLE_FILES  # noqa: E402


def random_network(part) -> torch.nn.Module:
    """A network with random weights in bf16 that keep numbers near 1; without gradients."""
    model = build_empty(part.model, part.config).to(torch.bfloat16).to_empty(device="cpu")
    for name, param in model.named_parameters():
        if param.ndim > 1:
            param.data.normal_(std=param[0].numel() ** -0.5)
        else:
            param.data.fill_(name.endswith("weight"))
    return model.requires_grad_(False)


def batch_of(task: str, pipeline: Pipeline, side: int) -> dict:
    """A batch of one random latent."""
    latent = (1, 4, side // 8, side // 8)
    config = pipeline.unet.config
    batch = {
        "x0": torch.randn(latent), "noise": torch.randn(latent), "t": torch.tensor([500]),
        "size_ids": torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32),
        "context": torch.randn(1, 77, config.cross_attention_dim),
        "pooled": torch.randn(1, pipeline.text_encoder_2.config.projection_dim)}
    if task != "t2i":
        batch["source"] = torch.randn(latent)
    return batch


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=256, help="of the pictures, in pixels")
    parser.add_argument("--tasks", default="t2i,edit,sr,inpaint")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tasks = options.tasks.split(",")
    networks = {name: random_network(part) for name, part in SINGLE_FILES["sdxl"].parts.items()}
    tokenizers = {name: Tokenizer(ROOT / "weights" / "tiny" / name)
                  for name in ("tokenizer", "tokenizer_2")}
    pipeline = Pipeline(**networks, **tokenizers)

    params = upcycle(pipeline.unet, tasks, experts=4)
    trained = sum(param.numel() for param in params)
    pipeline.unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(params, 1e-5)
    config = mtu.Settings(tasks=options.tasks, gradient_checkpointing=True)
    batch = {task: batch_of(task, pipeline, options.side) for task in tasks}
    results = {"trained": trained, "side": options.side, "tasks": tasks}

    def train():
        with torch.autocast("cpu", torch.bfloat16):
            loss, losses = mtu.loss(pipeline, batch, config)
        loss.backward()
        optimizer.step()
        assert all(value.isfinite() for value in losses.values()), losses

    def draw():
        picture, = to_pictures(torch.rand(1, 3, options.side, options.side) * 2 - 1)
        task = tasks[-1]
        settings = DrawSettings(
            "a cat", steps=1, size=(options.side, options.side),
            edit=None if task == "t2i" else picture)
        mtu.draw_with(pipeline, mtu.fold(pipeline.unet, task), settings)

    for name, work in (("training step", train), ("drawing of one step", draw)):
        start = time.process_time()
        peak_gb = peak(work)
        seconds = time.process_time() - start
        results[name] = {"peak GB": peak_gb, "processor seconds": seconds}
        print(name, results[name], flush=True)
        for param in params:
            param.grad = None
        optimizer.state.clear()
    print(record("mtu_sdxl", results))


if __name__ == "__main__":
    main()
