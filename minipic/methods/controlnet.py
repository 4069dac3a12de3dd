"""Trains a ControlNet: a copy of the UNet's encoder learns to make the picture follow edges, depth or segmentation.

Only the ControlNet trains, with text-to-image's own loss (arXiv 2302.05543 equation 5), on maps of the world's scenes
that are exact; the model stays as it is.
"""

from dataclasses import dataclass, replace

import torch

from minipic.common import option, random
from minipic.image import labelled_grid, to_pictures
from minipic.layouts import save_part
from minipic.methods import t2i
from minipic.models.controlnet import ControlNet
from minipic.world.caption import caption


@dataclass
class Recipe(t2i.Pairs):
    """Train a ControlNet for a model on maps of the world's scenes. The model itself stays as it is."""

    control: str = option("edges", "what the pictures follow", ("edges", "depth", "segmentation"))
    small: bool = option(False, "leave its transformers out, as SDXL's -small ones: a small file, no attention to text")
    steps: int = option(2000, "optimizer steps in all")
    lr: float = option(3e-4, "peak learning rate")
    drop: float = option(0.3, "share of captions left out, so that the map must say it (the paper: 0.5)")


def build(config):
    """The pipeline with a new ControlNet."""
    pipeline = t2i.load(config, stays=True)
    pipeline.controlnet = ControlNet.from_unet(pipeline.unet, pipeline.vae.config.factor, config.small).float()
    return pipeline


def setup(pipeline, config):
    return list(pipeline.controlnet.parameters())


def scenes_of(pipeline, config, first, count):
    """Maps and pictures with captions of what is seen. segmentation's own prompts name the colours of the map, which
    the model, as it stays as it is, would paint."""
    pairs = t2i.pairs_of(config.control, pipeline, config, first, count)
    return [replace(pair, text=caption(pair.scene, random(config.seed, "caption", first + i)))
            for i, pair in enumerate(pairs)]


def data(pipeline, config):
    """t2i's batches, with hint [B,3,H,W] in 0..1."""
    pictures = scenes_of(pipeline, config, 0, config.scenes)
    batch_of = t2i.batches(pipeline, pictures, {}, config)

    def batch(step, indices):
        found = batch_of(step, indices)
        return found | {"hint": torch.stack([pictures[row].source for row in found["rows"]]) / 255}
    return batch


def loss(pipeline, batch, config):
    def network(x, t, context, pooled, size_ids):
        residuals = pipeline.controlnet(x, t, context, batch["hint"], pooled, size_ids)
        return pipeline.unet(x, t, context, pooled, size_ids, residuals)
    return t2i.loss(pipeline, batch, config, network)


def sample(pipeline, config):
    """Of four scenes that it never saw: the map, what is drawn from it with the prompt, and the scene itself."""
    cells, device = [], pipeline.device.type
    for scene in scenes_of(pipeline, config, config.scenes, 4):
        hint, truth = to_pictures(torch.stack([scene.source, scene.image]) / 127.5 - 1)
        with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16"):  # for two kinds of weights
            drawn, = pipeline.generate(scene.text, steps=20, control=[(hint, 1.0)])
        cells += [(hint, config.control), (drawn, scene.text), (truth, "the scene")]
    return labelled_grid(*zip(*cells), columns=3)


def export(pipeline, folder, config):
    """The ControlNet alone, a folder that sample.py --controlnet and diffusers load; example.png is a map to try."""
    save_part(pipeline.controlnet, folder, torch.float16)
    scene, = scenes_of(pipeline, config, config.scenes, 1)
    to_pictures(scene.source[None] / 127.5 - 1)[0].save(folder / "example.png")
