"""Trains a ControlNet: a copy of the UNet's encoder that makes pictures follow a map.

Only the ControlNet trains, with text-to-image's own loss (arXiv 2302.05543 equation 5), on exact
maps of the world's scenes: edges, depth or segmentation. The model itself is frozen.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from minipic.common import rng
from minipic.figures import image_grid
from minipic.image import to_pictures
from minipic.latents import LatentData, denoising_loss, load_pipeline, world_pairs
from minipic.models.controlnet import ControlNet
from minipic.pipeline import Pipeline
from minipic.training.flags import option
from minipic.training.settings import DATA, PairSettings
from minipic.weights.layouts import save_part
from minipic.world.caption import caption
from minipic.world.pictures import PairPicture


@dataclass
class Settings(PairSettings):
    """Train a ControlNet for a model on maps of the world's scenes. The model itself is frozen."""

    control: str = option(
        "edges", "what the pictures follow", ("edges", "depth", "segmentation"), group=DATA)
    small: bool = option(False, "leave the transformers out, as SDXL's -small ones do", group=DATA)
    steps: int = option(2000)
    lr: float = option(3e-4)
    caption_dropout: float = option(0.3)  # so that the map must say it; the paper has 0.5


def build(config: Settings) -> Pipeline:
    """The pipeline with a new ControlNet."""
    pipeline = load_pipeline(config, frozen=True)
    controlnet = ControlNet.from_unet(pipeline.unet, pipeline.vae.config.factor, config.small)
    pipeline.attach_controlnet(controlnet.float())
    return pipeline


def setup(pipeline: Pipeline, config: Settings) -> list[nn.Parameter]:
    return list(pipeline.controlnet.parameters())


def maps_with_captions(
        pipeline: Pipeline, config: Settings, first: int, count: int) -> list[PairPicture]:
    """Pairs of a map and its picture, with captions of what is in the picture.

    The task's own prompt for a segmentation names the colours of the map, which a frozen model
    would paint.
    """
    pairs = world_pairs(config.control, pipeline, config, first, count)
    captioned = []
    for i, pair in enumerate(pairs):
        text = caption(pair.scene, rng(config.seed, "caption", first + i))
        captioned.append(replace(pair, text=text))
    return captioned


class ControlData(LatentData):
    """Latents with hint [B,3,H,W] in 0..1, the maps to follow."""

    def batch(self, step: int, indices: list[int]) -> dict:
        batch = super().batch(step, indices)
        batch["hint"] = torch.stack([self.pictures[row].source for row in batch["rows"]]) / 255
        return batch


def data(pipeline: Pipeline, config: Settings) -> ControlData:
    return ControlData(pipeline, maps_with_captions(pipeline, config, 0, config.scenes), config)


def loss(pipeline: Pipeline, batch: dict, config: Settings) -> torch.Tensor:
    def network(x, t, context, pooled, size_ids, residuals):
        residuals = pipeline.controlnet(x, t, context, batch["hint"], pooled, size_ids)
        return pipeline.unet(x, t, context, pooled, size_ids, residuals)

    return denoising_loss(pipeline, batch, config, network)


def sample(pipeline: Pipeline, config: Settings, data: ControlData) -> Image.Image:
    """Of four scenes not trained on: the map, what is drawn from it, the scene itself."""
    pictures = []
    labels = []
    for pair in maps_with_captions(pipeline, config, config.scenes, 4):
        hint, truth = to_pictures(torch.stack([pair.source, pair.image]) / 127.5 - 1)
        # The ControlNet's weights are in fp32, the UNet's may be in bf16.
        in_bf16 = config.precision == "bf16"
        with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=in_bf16):
            drawn = pipeline.generate(
                pair.text, steps=20, control=[(hint, 1.0)], progress=False)[0]
        pictures += [hint, drawn, truth]
        labels += [config.control, pair.text, "the scene"]
    return image_grid(pictures, labels, columns=3)


def export(pipeline: Pipeline, folder: Path, config: Settings, data: ControlData):
    """The ControlNet alone, as sample.py and diffusers load it; example.png is a map to try."""
    save_part(pipeline.controlnet, folder, torch.float16)
    pair = maps_with_captions(pipeline, config, config.scenes, 1)[0]
    to_pictures(pair.source[None] / 127.5 - 1)[0].save(folder / "example.png")
