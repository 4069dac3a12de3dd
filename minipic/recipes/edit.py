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

from minipic.common import ParameterError, rng
from minipic.figures import image_grid
from minipic.image import to_pictures
from minipic.latents import LatentData, denoising_loss, encode_pictures, load_pipeline, world_pairs
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
    """The pipeline of --model, as InstructPix2Pix. Input channels are added if it has none."""
    pipeline = load_pipeline(config, allow="edit")
    if not pipeline.extra_input:
        double_input_channels(pipeline.unet)
    family = "StableDiffusionXL" if pipeline.is_sdxl else "StableDiffusion"
    pipeline.index = pipeline.index | {"_class_name": f"{family}InstructPix2PixPipeline"}
    return pipeline


def double_input_channels(unet: UNet):
    """Let a UNet take as many channels again, which count nothing at first."""
    conv = unet.conv_in
    weight = conv.weight.detach()
    conv.weight = nn.Parameter(torch.cat([weight, torch.zeros_like(weight)], dim=1))
    conv.in_channels = 2 * unet.config.in_channels
    unet.config = replace(unet.config, in_channels=conv.in_channels)


def setup(pipeline: Pipeline, config: Settings) -> list[nn.Parameter]:
    return list(pipeline.unet.parameters())


def lr_scale(config: Settings) -> dict[str, float]:
    return {"unet.conv_in.weight": config.input_lr}


class EditData(LatentData):
    """Latents with source [B,4,h,w]: the picture before, unscaled, or zeros where left out."""

    def __init__(self, pipeline: Pipeline, pairs: list, config: Settings):
        before = [replace(pair, image=pair.source) for pair in pairs]
        self.vae = pipeline.vae
        self.before = encode_pictures(pipeline.vae, before)
        super().__init__(pipeline, pairs, config)

    def batch(self, step: int, indices: list[int]) -> dict:
        batch = super().batch(step, indices)
        sources = []
        for index, row, caption in zip(indices, batch["rows"], batch["captions"]):
            sources.append(self.source(index, row, caption))
        batch["source"] = torch.stack(sources)
        return batch

    def source(self, index: int, row: int, caption: str | None) -> torch.Tensor:
        """The latent of the picture before, or zeros.

        Of all samples, a share of caption_dropout / 2 lacks the picture alone, as many the
        instruction alone, as many both.
        """
        dropout = self.config.caption_dropout
        share = 0.5  # of the samples without an instruction
        if caption:
            share = dropout / 2 / (1 - dropout)
        is_given = torch.rand((), generator=rng(self.config.seed, "told", index)) >= share
        return is_given * self.vae.unscale(self.before[row][0].float())


def data(pipeline: Pipeline, config: Settings) -> EditData:
    return EditData(pipeline, world_pairs("edit", pipeline, config, 0, config.scenes), config)


def loss(pipeline: Pipeline, batch: dict, config: Settings) -> torch.Tensor:
    def network(x, t, context, pooled, size_ids, residuals):
        x = torch.cat([x, batch["source"]], dim=1)
        return pipeline.unet(x, t, context, pooled, size_ids, residuals)

    return denoising_loss(pipeline, batch, config, network)


def sample(pipeline: Pipeline, config: Settings, data: EditData) -> Image.Image:
    """Of four pairs not trained on: the picture before, what is made of it, the one after."""
    pictures, labels = [], []
    for pair in world_pairs("edit", pipeline, config, config.scenes, 4):
        before, after = to_pictures(torch.stack([pair.source, pair.image]) / 127.5 - 1)
        drawn = pipeline.generate(pair.text, steps=20, edit=before, progress=False)[0]
        pictures += [before, drawn, after]
        labels += ["before", pair.text, "after"]
    return image_grid(pictures, labels, columns=3)


def export(pipeline: Pipeline, folder: Path, config: Settings, data: EditData):
    """The finished model, a pipeline folder; example.png is a picture to try."""
    pipeline.save(folder, torch.float16)
    pair = world_pairs("edit", pipeline, config, config.scenes, 1)[0]
    to_pictures(pair.source[None] / 127.5 - 1)[0].save(folder / "example.png")
