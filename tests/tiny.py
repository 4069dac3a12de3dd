"""Whole models with fixed random weights that draw in a second, and small pictures to start from.

SDXL base, its refiner and SD 1.5 in miniature.
"""

import contextlib
import copy
import dataclasses
import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minipic.diffusion.schedule import Schedule
from minipic.models.clip import CLIPText, CLIPTextConfig
from minipic.models.unet import UNet, UNetConfig
from minipic.models.vae import VAE, VAEConfig
from minipic.pipeline import Pipeline
from minipic.recipes.clip import train_tokenizer
from minipic.weights.tokenizer import END
from peers import fill

CAPTIONS = ["a small red sphere left of a large blue cube", "a cyan torus on a grey floor", "a bad picture!"] * 3
PROMPT = "a small red sphere!"
NEGATIVE = "a bad picture"

UNETS = {
    "sdxl": dict(
        block_out_channels=(16, 32, 32),
        transformer_layers_per_block=(0, 1, 2),
        attention_head_dim=(1, 2, 2),
        layers_per_block=1,
        cross_attention_dim=16 + 24,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 6 * 8),
    "refiner": dict(
        block_out_channels=(16, 32),
        transformer_layers_per_block=1,
        attention_head_dim=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 5 * 8),
    "sd15": dict(
        block_out_channels=(16, 32),
        transformer_layers_per_block=1,
        attention_head_dim=2,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        use_linear_projection=False,
        addition_embed_type=None,
        addition_time_embed_dim=None,
        projection_class_embeddings_input_dim=None),
}
VAE_CONFIG = VAEConfig(sample_size=64, block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4)
TEXT_ENCODERS = {
    "text_encoder": dict(hidden_size=16, hidden_act="quick_gelu"),
    "text_encoder_2": dict(hidden_size=24, hidden_act="gelu", projection_dim=20, with_projection=True),
}
MISSING = {"refiner": "text_encoder", "sd15": "text_encoder_2"}  # the encoder that this kind of model lacks
INDEX = {
    "refiner": {
        "_class_name": "StableDiffusionXLImg2ImgPipeline",
        "force_zeros_for_empty_prompt": False,
        "requires_aesthetics_score": True},
    "sd15": {
        "_class_name": "StableDiffusionPipeline",
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "feature_extractor": [None, None]},
}


def build(kind: str = "sdxl", folder: Path | None = None, **schedule) -> Pipeline:
    """A Pipeline of this kind for a test to change: written to `folder` and loaded again, or, which
    is quicker, a copy of `model(kind)`.

    schedule: fields of Schedule, only with a folder.
    """
    if folder is None:
        assert not schedule
        return copy.deepcopy(model(kind))
    unet = UNet(UNetConfig(sample_size=16, norm_num_groups=8, **UNETS[kind]))
    networks = {"unet": unet, "vae": VAE(VAE_CONFIG)}
    tokenizers = {}
    for name, config in TEXT_ENCODERS.items():
        if name == MISSING.get(kind):
            continue
        pad = END if name == "text_encoder" else "!"
        tokenizer = train_tokenizer(CAPTIONS, folder / "scratch" / name, 600, pad)
        tokenizers[name.replace("text_encoder", "tokenizer")] = tokenizer
        networks[name] = CLIPText(CLIPTextConfig(
            vocab_size=tokenizer.size, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, **config))
    for network in networks.values():
        fill(network)
    Pipeline(**networks, **tokenizers, schedule=Schedule(**schedule), index=INDEX.get(kind)).save(folder)
    return Pipeline.load(folder)


@functools.cache
def folder(kind: str = "sdxl") -> Path:
    """The folder of one such model, made once in a test run."""
    path = Path(tempfile.mkdtemp())
    build(kind, path)
    return path


@functools.cache
def model(kind: str = "sdxl") -> Pipeline:
    """One such model, loaded once in a test run. No test may change it."""
    return Pipeline.load(folder(kind))


@contextlib.contextmanager
def short_drawings():
    """Inside, a drawing takes two steps at most: the sample pictures of a training run."""
    prepare = Pipeline.prepare

    def prepare_two_steps(pipeline, settings):
        return prepare(pipeline, dataclasses.replace(settings, steps=min(settings.steps, 2)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "prepare", prepare_two_steps)
        yield


def picture(seed: int = 0) -> Image.Image:
    """A smooth picture of 64 x 64 pixels."""
    waves = np.random.RandomState(seed).standard_normal((3, 3, 2))
    y, x = np.mgrid[0:64, 0:64] / 64
    channels = [sum(np.sin(6 * (a * x + b * y)) for a, b in wave) for wave in waves]
    return Image.fromarray((127.5 + 40 * np.stack(channels, -1)).clip(0, 255).astype(np.uint8))


def mask() -> Image.Image:
    """White, where to draw, in the left 27 columns of 64 x 64 pixels.

    Their edge is not that of a latent pixel.
    """
    row = 255 * (np.arange(64) < 27)
    return Image.fromarray(np.repeat(row[None], 64, axis=0).astype(np.uint8))
