"""Trains text-to-image: the UNet learns what the schedule asks for, noise or v, in latents.

DDPM's loss (arXiv 2006.11239 equation 14) on the latents of a frozen VAE, text from encoders that
are frozen too unless --train-text, SDXL's conditioning (text and size ids, arXiv 2307.01952),
Min-SNR weights (arXiv 2303.09556).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from minipic.common import ParameterError, find_file
from minipic.diffusion.schedule import Schedule
from minipic.figures import image_grid
from minipic.latents import (
    LatentData, denoising_loss, encode_captions, load_pipeline, training_pictures)
from minipic.layers import lora
from minipic.models.unet import UNet, UNetConfig
from minipic.pipeline import Pipeline
from minipic.text import Tokenizer
from minipic.training.flags import option
from minipic.training.photos import Photo
from minipic.training.settings import DATA, LORA, LOSS, PhotoSettings
from minipic.weights import save_lora
from minipic.weights.layouts import load_part, open_part

PROMPTS = (
    "a small red sphere left of a large blue cube", "a large yellow torus on a pink floor",
    "a medium green cone on the right", "a large white and red striped cylinder in the middle")


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
class Settings(PhotoSettings):
    """Train the UNet of a model, whole or by a LoRA (--lora-rank).

    The pictures are those of a folder (--data) or of the world.
    """

    lora_rank: int = option(
        0, "train a LoRA of this rank and leave the model as it is; 0: train the model", group=LORA)
    lora_alpha: float = option(
        0.0, "the LoRA is scaled by alpha / rank; 0: alpha is the rank", group=LORA)
    lora_format: str = option(
        "peft", "names in the LoRA's file: PEFT's, which diffusers reads, or kohya's",
        ("peft", "kohya"), group=LORA)
    from_nothing: bool = option(
        False, "start a new tiny UNet for the model's VAE and text encoders", group=DATA)
    train_text: bool = option(False, "train the text encoders too", group=DATA)
    scenes: int = option(
        40000, "different pictures of the world; their latents stay in memory", group=DATA)
    prediction: str = option(
        "v_prediction", "what a new UNet predicts", ("epsilon", "v_prediction"), group=LOSS)
    steps: int = option(8000)
    lr: float = option(8e-4)
    ema: float = option(0.9995)

    MINIMUM = PhotoSettings.MINIMUM | {"lora_rank": 0, "lora_alpha": 0, "scenes": 1}

    def __post_init__(self):
        super().__post_init__()
        if self.from_nothing and self.lora_rank:
            raise ParameterError(
                "lora_rank", "changes a model that is there; leave out --from-nothing")
        if self.lora_alpha and not self.lora_rank:
            raise ParameterError("lora_alpha", "needs --lora-rank; without it there is no LoRA")
        if self.lora_format == "kohya" and not self.lora_rank:
            raise ParameterError("lora_format", "needs --lora-rank; without it there is no LoRA")
        if self.resolution and not self.data:
            raise ParameterError(
                "resolution", "the world's pictures have sizes of their own; give --data, or "
                "leave it out")


def build(config: Settings) -> Pipeline:
    """The pipeline to train: that of --model, or its VAE and text encoders with a new UNet."""
    if config.from_nothing:
        return build_tiny(config)
    return load_pipeline(config, frozen=config.lora_rank > 0)


def build_tiny(config: Settings) -> Pipeline:
    """A new tiny UNet with the VAE, text encoders and tokenizers of the folder --model."""
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


def setup(pipeline: Pipeline, config: Settings) -> list[nn.Parameter]:
    """Replace layers by LoRA layers, if asked for. Returns the parameters to train.

    train.py freezes all others. Raises ParameterError for kohya's names with another model than
    SDXL.
    """
    if config.lora_format == "kohya" and not pipeline.is_sdxl:
        raise ParameterError(
            "lora_format", "kohya's names are for SDXL's LoRAs only; leave it out for this model")
    trained = [pipeline.unet]
    if config.train_text:
        trained += text_layers_in_use(pipeline)
    if config.lora_rank:
        params = []
        for part in trained:
            params += lora.inject(part, config.lora_rank, config.lora_alpha or None)
        return params
    if config.train_text:
        *others, _ = pipeline.text_encoders.values()
        trained += [encoder.text_model.embeddings for encoder in others]
    return [param for part in trained for param in part.parameters()]


def text_layers_in_use(pipeline: Pipeline) -> list[nn.Module]:
    """The layers of the text encoders whose output the UNet sees.

    Of all encoders but the last one that is the last layer but one; the last one's end also makes
    the pooled vector.
    """
    *others, last = pipeline.text_encoders.values()
    return [encoder.text_model.encoder.layers[:-1] for encoder in others] + [last]


def data(pipeline: Pipeline, config: Settings) -> LatentData:
    """Latents of the world's pictures, or of those of --data."""
    pictures = training_pictures(pipeline, config)
    encode_once = config.data and not config.train_text
    texts = encode_captions(pipeline, pictures) if encode_once else None
    return LatentData(pipeline, pictures, config, texts)


loss = denoising_loss


def sample(pipeline: Pipeline, config: Settings, data: LatentData) -> Image.Image:
    """Two pictures for each of four prompts: PROMPTS, or captions of --data."""
    prompts = PROMPTS
    if isinstance(data.pictures[0], Photo):
        captions = dict.fromkeys(photo.text for photo in data.pictures)
        prompts = list(captions)[:4]
    pictures, labels = [], []
    for prompt in prompts:
        pictures += pipeline.generate(prompt, steps=20, n=2, progress=False)
        labels += [prompt, prompt]
    return image_grid(pictures, labels, columns=4)


def export(pipeline: Pipeline, folder: Path, config: Settings, data: LatentData):
    """The finished model, a pipeline folder; or the LoRA alone, folder/lora.safetensors."""
    if not config.lora_rank:
        pipeline.save(folder, torch.float16)
        return
    states = {}
    for name, network in {"unet": pipeline.unet, **pipeline.text_encoders}.items():
        state = lora.lora_state_dict(network)
        if state:
            states[name] = state
    metadata = {"trained on": Path(config.model).name, "steps": str(config.steps)}
    save_lora(states, folder / "lora.safetensors", metadata, kohya=config.lora_format == "kohya")
