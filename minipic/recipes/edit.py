"""Trains a model to edit pictures by instruction (InstructPix2Pix, arXiv 2211.09800).

Its UNet also sees the picture to change: the latent enters through new channels of conv_in, which
count nothing at first (section 3.2 there). The whole UNet trains, on pairs of the world's scenes
before and after an edit. Now and then the picture, the instruction or both are left out, so that
there can be guidance by either.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from minipic.common import ParameterError
from minipic.figures import image_grid
from minipic.image import to_pictures
from minipic.latents import SourceData, denoising_loss, load_pipeline, world_pairs
from minipic.layers.blocks import double_inputs
from minipic.models.unet import UNet
from minipic.pipeline import Pipeline
from minipic.training.flags import option
from minipic.training.settings import HOW, PairSettings


@dataclass
class Settings(PairSettings):
    """Teach a model to edit pictures by instruction, on scenes before and after an edit."""

    steps: int = option(4000)
    lr: float = option(5e-4)
    scenes: int = option(8000)
    # 1 in the paper, whose unscaled latents are 5 times as large as those of the tiny model
    input_lr: float = option(
        10.0, "learning rate of conv_in as a multiple of the others'", group=HOW)
    caption_dropout: float = option(
        0.1, "share of instructions left out, half of them with the picture; as often the picture "
        "alone is left out")

    MINIMUM = PairSettings.MINIMUM | {"input_lr": 0}

    def __post_init__(self):
        super().__post_init__()
        if self.caption_dropout > 0.6:
            raise ParameterError(
                "caption_dropout", f"must be at most 0.6, not {self.caption_dropout}")


def build(config: Settings) -> Pipeline:
    """The pipeline of config.model, whose UNet gets input channels if it has none to see with."""
    pipeline = load_pipeline(config, allow="edit")
    if not pipeline.extra_input:
        double_input_channels(pipeline.unet)
    return pipeline


def double_input_channels(unet: UNet):
    """Let a UNet take as many channels again, which count nothing at first."""
    double_inputs(unet.conv_in)
    unet.config = replace(unet.config, in_channels=unet.conv_in.in_channels)


def setup(pipeline: Pipeline, config: Settings) -> list[nn.Parameter]:
    return list(pipeline.unet.parameters())


def lr_scale(config: Settings) -> dict[str, float]:
    return {"unet.conv_in.weight": config.input_lr}


def data(pipeline: Pipeline, config: Settings) -> SourceData:
    pairs = world_pairs("edit", pipeline, config, 0, config.scenes)
    before = [replace(pair, image=pair.source) for pair in pairs]
    return SourceData(pipeline, pairs, before, config)


def loss(pipeline: Pipeline, batch: dict, config: Settings) -> torch.Tensor:
    def network(x, t, context, pooled, size_ids, residuals):
        x = torch.cat([x, batch["source"]], dim=1)
        return pipeline.unet(x, t, context, pooled, size_ids, residuals)

    return denoising_loss(pipeline, batch, config, network)


def sample(pipeline: Pipeline, config: Settings, data: SourceData) -> Image.Image:
    """Of four pairs not trained on: the picture before, what is made of it, the one after."""
    pictures = []
    labels = []
    for pair in world_pairs("edit", pipeline, config, config.scenes, 4):
        before, after = to_pictures(torch.stack([pair.source, pair.image]) / 127.5 - 1)
        drawn = pipeline.generate(pair.text, steps=20, edit=before, progress=False)[0]
        pictures += [before, drawn, after]
        labels += ["before", pair.text, "after"]
    return image_grid(pictures, labels, columns=3)


def export(pipeline: Pipeline, folder: Path, config: Settings, data: SourceData):
    """The finished model, a pipeline folder; example.png is a picture to try."""
    family = "StableDiffusionXL" if pipeline.is_sdxl else "StableDiffusion"
    pipeline.save(folder, torch.float16, class_name=f"{family}InstructPix2PixPipeline")
    pair = world_pairs("edit", pipeline, config, config.scenes, 1)[0]
    to_pictures(pair.source[None] / 127.5 - 1)[0].save(folder / "example.png")
