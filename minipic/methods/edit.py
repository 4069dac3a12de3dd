"""Trains a model to edit pictures by instruction: its UNet also looks at the picture to change (arXiv 2211.09800).

The picture's latent goes beside x into new channels of conv_in that count nothing at first (section 3.2 there); the
whole UNet trains, on pairs of the world's scenes before and after an edit. Now and then the picture, the instruction or
both are left out, so that there can be guidance by either.
"""

from dataclasses import dataclass, replace

import torch

from minipic.common import InputError, option, random
from minipic.image import labelled_grid, to_pictures
from minipic.methods import t2i


@dataclass
class Recipe(t2i.Pairs):
    """Teach a model to edit pictures by instruction, on scenes of the world before and after an edit."""

    steps: int = option(4000, "optimizer steps in all")
    lr: float = option(5e-4, "peak learning rate")
    scenes: int = option(8000, "different pairs, kept in memory")
    input_lr: float = option(10.0, "learning rate of conv_in, where the picture's channels begin at zero, over that of "
                             "the rest: 1 in the paper, whose unscaled latents are 5 times those of the tiny model")
    drop: float = option(0.1, "share of instructions left out, half with the picture; as often the picture alone is")

    LEAST = t2i.Pairs.LEAST | {"input_lr": 0}

    def __post_init__(self):
        super().__post_init__()
        if self.drop > 0.6:
            raise InputError(f"--drop must be at most 0.6, not {self.drop}")


def build(config):
    """The pipeline of --model, which diffusers calls InstructPix2Pix from now on; one that edits already goes on."""
    pipeline = t2i.load(config, also="edit")
    if not pipeline.looks:
        widen(pipeline.unet)
    name = f"StableDiffusion{'XL' * pipeline.sdxl}InstructPix2PixPipeline"
    pipeline.index = pipeline.index | {"_class_name": name}
    return pipeline


def widen(unet):
    """Let a UNet take as many channels again, which count nothing at first."""
    conv, unet.config = unet.conv_in, replace(unet.config, in_channels=2 * unet.config.in_channels)
    conv.in_channels, old = unet.config.in_channels, conv.weight.detach()
    conv.weight = torch.nn.Parameter(torch.cat([old, torch.zeros_like(old)], dim=1))


def setup(pipeline, config):
    return list(pipeline.unet.parameters())


def rates(config):
    return {"unet.conv_in.weight": config.input_lr}


def data(pipeline, config):
    """t2i's batches, with source [B,4,h,w]: the unscaled latent of the picture before, zeros where it is left out."""
    pictures = t2i.pairs_of("edit", pipeline, config, 0, config.scenes)
    before = t2i.encode_pictures(pipeline.vae, [replace(pair, image=pair.source) for pair in pictures])
    batch_of = t2i.batches(pipeline, pictures, {}, config)

    def source_of(index, row, text):
        share = config.drop / 2 / (1 - config.drop) if text else 0.5
        told = torch.rand((), generator=random(config.seed, "told", index)) >= share
        return told * pipeline.vae.unscale(before[row][0].float())

    def batch(step, indices):
        found = batch_of(step, indices)
        return found | {"source": torch.stack(list(map(source_of, indices, found["rows"], found["captions"])))}
    return batch


def loss(pipeline, batch, config):
    def network(x, *told):
        return pipeline.unet(torch.cat([x, batch["source"]], dim=1), *told)
    return t2i.loss(pipeline, batch, config, network)


def sample(pipeline, config):
    """Of four pairs that it never saw: the picture before, what it makes of it as told, and the picture after."""
    cells = []
    for pair in t2i.pairs_of("edit", pipeline, config, config.scenes, 4):
        before, after = to_pictures(torch.stack([pair.source, pair.image]) / 127.5 - 1)
        drawn, = pipeline.generate(pair.text, steps=20, edit=before)
        cells += [(before, "before"), (drawn, pair.text), (after, "after")]
    return labelled_grid(*zip(*cells), columns=3)


def export(pipeline, folder, config):
    """The finished model, a pipeline folder; example.png is a picture to try."""
    pipeline.save(folder, torch.float16)
    pair, = t2i.pairs_of("edit", pipeline, config, config.scenes, 1)
    to_pictures(pair.source[None] / 127.5 - 1)[0].save(folder / "example.png")
