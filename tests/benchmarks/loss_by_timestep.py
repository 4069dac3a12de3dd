"""Where on the way from noise to picture a model has learned more than another: the loss by timestep.

    python tests/benchmarks/loss_by_timestep.py BEFORE [--model weights/tiny] [--pictures 192]

BEFORE is the other model's folder, with the same VAE and text encoders. Pictures of two objects that no model was
trained on, the same noise for both; the loss weighs as --balanced does. "text" is what another picture's caption
adds to it: how much of the caption is used. Prints a table and writes loss_by_timestep.json beside this file.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

from quality import WORLD  # noqa: E402
from record import record  # noqa: E402

from minipic.common import computes_bf16, rng  # noqa: E402
from minipic.latents import encode_pictures, encode_text  # noqa: E402
from minipic.pipeline import Pipeline  # noqa: E402
from minipic.world.pictures import Picture  # noqa: E402
from minipic.world.scene import sample_scene  # noqa: E402

TIMESTEPS = (20, 100, 200, 300, 400, 500, 600, 700, 800, 900, 980)


@torch.no_grad()
def losses(pipeline, count):
    """{timestep: (loss, loss with another picture's caption)} of `count` pictures."""
    pictures = [Picture("plain", (sample_scene(WORLD, i, 2, "any"),), (64, 64), (64, 64)) for i in range(count)]
    x0 = torch.stack(encode_pictures(pipeline.vae, pictures)).float()[:, 0]
    captions = [picture.caption(rng(WORLD, "caption", i)) for i, picture in enumerate(pictures)]
    context, pooled = encode_text(pipeline, captions)
    size_ids = torch.stack([picture.size_ids for picture in pictures])
    noise = torch.randn(x0.shape, generator=rng(WORLD, "noise"))

    def loss(timestep, context, pooled):
        def predict(x, t):
            return pipeline.unet(x, t, context, pooled, size_ids)

        timesteps = torch.full((count,), timestep)
        with torch.autocast("cpu", torch.bfloat16, enabled=computes_bf16(x0.device)):
            losses = pipeline.schedule.objective.loss(predict, x0, noise, timesteps, balanced=True)
        return losses.mean().item()

    rows = {}
    for t in TIMESTEPS:
        rows[t] = loss(t, context, pooled), loss(t, context.roll(1, 0), pooled.roll(1, 0))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("--model", type=Path, default="weights/tiny")
    parser.add_argument("--pictures", type=int, default=192)
    options = parser.parse_args()
    before, now = (losses(Pipeline.load(folder), options.pictures) for folder in (options.before, options.model))
    rows = {t: {"before": before[t][0], "now": now[t][0], "text before": before[t][1] - before[t][0],
                "text now": now[t][1] - now[t][0]} for t in TIMESTEPS}
    for t, row in rows.items():
        print(f"{t:4} {row['before']:.4f} before, {row['now']:.4f} now: "
              f"{100 * (row['now'] / row['before'] - 1):+5.1f} %; another caption adds "
              f"{row['text before']:.4f}, {row['text now']:.4f}")
    print(record("loss_by_timestep", rows, pictures=options.pictures))


if __name__ == "__main__":
    main()
