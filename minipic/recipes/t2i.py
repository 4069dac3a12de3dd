"""Trains text-to-image: the UNet learns what the schedule asks for, noise or v, in latents.

DDPM's loss (arXiv 2006.11239 equation 14) on the latents of a frozen VAE, text from encoders that
are frozen too unless train_text is set, SDXL's conditioning (text and size ids, arXiv 2307.01952),
Min-SNR weights (arXiv 2303.09556).

With aligned panels (--panels), attention learns to look for what corresponds in the other half of a
picture. ONE-PIC (papers/onepic.py), side by side, relies on such a model.

With scenes of alike things (--counts), it learns what "two red cubes" are: other captions name each
thing by itself.
"""

from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import nn

from minipic.common import ParameterError, find_file
from minipic.diffusion.schedule import Schedule
from minipic.latents import (
    LatentData, choose_trained, denoising_loss, encode_pictures, export_trained, load_pipeline,
    photo_latents, sample_captions, sample_prompts, world_pictures)
from minipic.models.unet import UNet, UNetConfig
from minipic.pipeline import Pipeline
from minipic.text import Tokenizer
from minipic.training.flags import option
from minipic.training.settings import DATA, LOSS, LoraSettings
from minipic.weights.layouts import load_part, open_part
from minipic.world.pictures import PANEL_SIZE, task_pairs
from minipic.world.tasks import GIVEN

PROMPTS = (
    "a small red sphere left of a large blue cube", "a large yellow torus on a pink floor",
    "a medium green cone on the right", "a large white and red striped cylinder in the middle")

# Tasks of the world whose two pictures are aligned panels.
PANELS = ("edges", "depth", "segmentation", "blur", "edit", "view", "subject")


def tiny_unet_config(context_width: int, pooled_width: int) -> UNetConfig:
    """SDXL in miniature: three levels, heads of width 64, about 7 M parameters.

    Unlike SDXL's, its first level attends to the text too: what stands in a 64-pixel picture is
    decided on its 16x16.
    """
    return UNetConfig(
        sample_size=16,
        block_out_channels=(64, 128, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=(1, 2, 2),
        norm_num_groups=8,
        cross_attention_dim=context_width,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=pooled_width + 6 * 32)


@dataclass
class Settings(LoraSettings):
    """Train the UNet of a model, whole or by a LoRA (--lora-rank).

    The pictures are those of a folder (--data) or of the world.
    """

    from_nothing: bool = option(
        False, "start a new tiny UNet for the model's VAE and text encoders", group=DATA)
    scenes: int = option(
        40000, "different pictures of the world; their latents stay in memory", group=DATA)
    panels: float = option(
        0.0, "share of the samples that are two pictures side by side of which each tells of the "
        "other: a map and its picture, before and after an edit, two views, and so on", group=DATA)
    counts: float = option(
        0.0, "share of the samples that show two or three alike things, whose captions count them: "
        "two red cubes", group=DATA)
    prediction: str = option(
        "v_prediction", "what a new UNet predicts", ("epsilon", "v_prediction"), group=LOSS)
    steps: int = option(8000)
    lr: float = option(8e-4)
    ema: float = option(0.9995)

    MINIMUM = LoraSettings.MINIMUM | {"scenes": 1, "panels": 0, "counts": 0}

    def __post_init__(self):
        super().__post_init__()
        if self.from_nothing and self.lora_rank:
            raise ParameterError(
                "lora_rank", "a new UNet is trained whole; leave it out, or start from a model")
        for name, example in (("panels", 0.5), ("counts", 0.15)):
            share = getattr(self, name)
            if share >= 1:
                raise ParameterError(name, f"must be below 1, not {share}; try {example}")
            if share and self.data:
                raise ParameterError(name, "are pictures of the world; leave data out")
        if self.panels + self.counts >= 1:
            rest = 1 - self.panels
            raise ParameterError(
                "counts", f"must be below {rest:g}, what panels leave, not {self.counts}")
        if self.resolution and not self.data:
            raise ParameterError(
                "resolution", "the world's pictures have sizes of their own; give a folder of "
                "data, or leave it out")


def build(config: Settings) -> Pipeline:
    """The pipeline of config.model, or its VAE and text encoders with a new UNet."""
    if config.from_nothing:
        return build_tiny(config)
    return load_pipeline(config, frozen=config.lora_rank > 0)


def build_tiny(config: Settings) -> Pipeline:
    """A new tiny UNet with the VAE, text encoders and tokenizers of the folder config.model."""
    folder = find_file(config.model)
    vae = load_part(open_part(folder / "vae", "vae"), torch.float32)
    encoders = []
    for name in ("text_encoder", "text_encoder_2"):
        encoders.append(load_part(open_part(folder / name, name), torch.float32))
    first, second = encoders
    context_width = first.config.hidden_size + second.config.hidden_size
    unet = UNet(tiny_unet_config(context_width, second.config.projection_dim))
    zero_residual_branches(unet)
    return Pipeline(
        unet=unet,
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=Tokenizer(folder / "tokenizer"),
        tokenizer_2=Tokenizer(folder / "tokenizer_2"),
        schedule=Schedule(prediction_type=config.prediction),
        index={"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True})


def zero_residual_branches(unet: UNet):
    """Zero the last layer of every ResnetBlock and SpatialTransformer, and conv_out.

    As in LDM's code. Every such block then begins as its shortcut alone and the network's output as
    zero, the mean of what it learns, instead of as random numbers that training must first undo.
    """
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "proj_out")) or name == "conv_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


setup = choose_trained


def data(pipeline: Pipeline, config: Settings) -> LatentData:
    """Latents of the world's pictures, or of those of config.data."""
    if config.data:
        return photo_latents(pipeline, config)
    return WorldData(pipeline, config)


class WorldData(LatentData):
    """Latents of the world's pictures.

    A share config.panels of all are aligned panels, and config.counts show alike things.
    """

    def __init__(self, pipeline: Pipeline, config: Settings):
        panels = min(round(config.panels * config.scenes), config.scenes - 1)
        counted = min(round(config.counts * config.scenes), config.scenes - panels - 1)
        pictures = world_pictures(config, config.scenes - panels - counted)
        pictures += world_pictures(config, counted, counted=True)
        super().__init__(pipeline, pictures, config)
        for number, task in enumerate(PANELS):
            start = panels * number // len(PANELS)
            end = panels * (number + 1) // len(PANELS)
            if start < end:
                self.add_panels(pipeline, task, range(start, end))

    def add_panels(self, pipeline: Pipeline, task: str, numbers: range):
        """Add these pairs of a task, each half encoded by itself as ONE-PIC does."""
        pairs = task_pairs(task, (self.config.seed, "panels"), numbers, PANEL_SIZE)
        sources = [replace(pair, image=pair.source) for pair in pairs]
        left = encode_pictures(pipeline.vae, sources, self.config.workers)
        right = encode_pictures(pipeline.vae, pairs, self.config.workers)
        height, width = PANEL_SIZE
        for i, pair in enumerate(pairs):
            text = f"two panels: {GIVEN[task]} | {pair.text}"
            self.pictures.append(Panels(text, (height, 2 * width)))
            self.latents.append(torch.cat([left[i], right[i]], dim=3))
            row = len(self.pictures) - 1
            self.buckets.setdefault(self.bucket(row), []).append(row)


@dataclass(frozen=True)
class Panels:
    """Two pictures side by side that belong together. Of the pictures only latents are kept."""

    text: str
    size: tuple[int, int]  # (height, width) of both together

    @property
    def size_ids(self) -> torch.Tensor:
        """[6], see world.pictures.Picture.size_ids."""
        return torch.tensor([*self.size, 0, 0, *self.size], dtype=torch.float32)

    def caption(self, generator: torch.Generator) -> str:
        """Always the text."""
        return self.text


loss = denoising_loss


def sample(pipeline: Pipeline, config: Settings, data: LatentData) -> Image.Image:
    """Two pictures for each of four prompts: PROMPTS, or captions of config.data."""
    if config.data:
        return sample_captions(pipeline, config, data)
    return sample_prompts(pipeline, PROMPTS)


export = export_trained
