"""Whole models with fixed random weights that draw in a second: SDXL base, refiner and SD 1.5 in miniature."""

import functools
import tempfile
from pathlib import Path

from minipic.diffusion.schedule import Schedule
from minipic.models.clip import CLIPText, CLIPTextConfig
from minipic.models.unet import UNet, UNetConfig
from minipic.models.vae import VAE, VAEConfig
from minipic.pipeline import Pipeline
from minipic.text import END, train_tokenizer
from peers import fill

CAPTIONS = ["a small red sphere left of a large blue cube", "a cyan torus on a grey floor", "a bad picture!"] * 3
PROMPT, NEGATIVE = "a small red sphere!", "a bad picture"

UNETS = {
    "sdxl": dict(block_out_channels=(16, 32, 32), transformer_layers_per_block=(0, 1, 2), attention_head_dim=(1, 2, 2),
                 layers_per_block=1, cross_attention_dim=16 + 24, addition_time_embed_dim=8,
                 projection_class_embeddings_input_dim=20 + 6 * 8),
    "refiner": dict(block_out_channels=(16, 32), transformer_layers_per_block=1, attention_head_dim=(1, 2),
                    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1, cross_attention_dim=24,
                    addition_time_embed_dim=8, projection_class_embeddings_input_dim=20 + 5 * 8),
    "sd15": dict(block_out_channels=(16, 32), transformer_layers_per_block=1, attention_head_dim=2, layers_per_block=1,
                 down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=16,
                 up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), use_linear_projection=False,
                 addition_embed_type=None, addition_time_embed_dim=None, projection_class_embeddings_input_dim=None),
}
INDEX = {"refiner": {"_class_name": "StableDiffusionXLImg2ImgPipeline", "force_zeros_for_empty_prompt": False,
                     "requires_aesthetics_score": True},
         "sd15": {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False,
                  "safety_checker": [None, None], "feature_extractor": [None, None]}}


def build(kind="sdxl", folder=None, **schedule):
    """A Pipeline of this kind in `folder` (default: a temporary one), loaded again; `schedule`: fields of Schedule."""
    folder = Path(folder or tempfile.mkdtemp())
    scratch = folder / "scratch"
    vae = VAEConfig(sample_size=64, block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4)
    parts = {"unet": UNet(UNetConfig(sample_size=16, norm_num_groups=8, **UNETS[kind])), "vae": VAE(vae)}
    towers = {"text_encoder": dict(hidden_size=16, hidden_act="quick_gelu"),
              "text_encoder_2": dict(hidden_size=24, hidden_act="gelu", projection_dim=20, with_projection=True)}
    towers.pop({"refiner": "text_encoder", "sd15": "text_encoder_2"}.get(kind), None)
    for name, width in towers.items():
        tokenizer = train_tokenizer(CAPTIONS, scratch / name, 600, END if name == "text_encoder" else "!")
        parts[name.replace("text_encoder", "tokenizer")] = tokenizer
        parts[name] = CLIPText(CLIPTextConfig(vocab_size=tokenizer.size, intermediate_size=32, num_hidden_layers=3,
                                              num_attention_heads=2, **width))
    for part in parts.values():
        if hasattr(part, "parameters"):
            fill(part)
    Pipeline(**parts, schedule=Schedule(**schedule), index=INDEX.get(kind)).save(folder)
    return Pipeline.load(folder)


@functools.lru_cache
def folder(kind="sdxl"):
    """The folder of one such model, made once a test run."""
    path = tempfile.mkdtemp()
    build(kind, path)
    return Path(path)
