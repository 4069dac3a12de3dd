"""Diffusers folders, read and written: model_index.json, and one folder for each network.

A network's folder holds its config.json and its weights, in one file or in several, the shards.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from minipic.common import InputError
from minipic.models.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from minipic.models.controlnet import ControlNet, ControlNetConfig
from minipic.models.nextdit import NextDiT, NextDiTConfig
from minipic.models.unet import UNet, UNetConfig
from minipic.models.vae import VAE, VAEConfig
from minipic.weights import keys
from minipic.weights.files import (
    read_header, read_json, replacing_folder, save_weights, write_json)
from minipic.weights.parts import Part, Source, check_part, part_entries
from minipic.weights.configs import config_to_json, read_config
from minipic.weights.tokenizer import LENGTH


@dataclass(frozen=True)
class Kind:
    """What a folder of one part holds."""

    model: type[nn.Module]
    config: type
    classes: tuple[str, ...]  # that its config.json may name
    stem: str  # of the names of its weights files
    convert: Callable  # renames its tensors, see keys.py


KINDS = {
    "unet": Kind(
        UNet, UNetConfig, ("UNet2DConditionModel",), "diffusion_pytorch_model", keys.unet),
    "vae": Kind(
        VAE, VAEConfig, ("AutoencoderKL",), "diffusion_pytorch_model", keys.vae),
    "text_encoder": Kind(
        CLIPText, CLIPTextConfig, ("CLIPTextModel", "CLIPTextModelWithProjection"), "model",
        keys.clip),
    "text_encoder_2": Kind(
        CLIPText, CLIPTextConfig, ("CLIPTextModelWithProjection",), "model", keys.clip),
    "image_encoder": Kind(
        CLIPVision, CLIPVisionConfig, ("CLIPVisionModelWithProjection",), "model", keys.clip),
    "controlnet": Kind(
        ControlNet, ControlNetConfig, ("ControlNetModel",), "diffusion_pytorch_model",
        keys.controlnet),
    "transformer": Kind(
        NextDiT, NextDiTConfig, ("NextDiT",), "diffusion_pytorch_model", keys.unchanged)}
# A ControlNet and OneDiffusion's transformer have folders of their own.
MODEL_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
# What else a model_index.json may list: it is read elsewhere, or not needed to draw.
OTHER_PARTS = (
    "scheduler", "tokenizer", "tokenizer_2", "feature_extractor", "safety_checker", "image_encoder")
# What other pipelines add to a model, which is whole without it. Their folders are read as the
# model's own; a ControlNet in one can be added from its own folder.
ADDED_PARTS = ("controlnet", "adapter")
ADDED_WORDS = re.compile(
    "ControlNet(Union)?|Adapter|PAG|SAG|KDiffusion|Panorama|AttendAndExcite|Paradigms|Differential|"
    "LongPromptWeighting")
PIPELINES = re.compile(r"StableDiffusion(XL)?(Img2Img|Inpaint|InstructPix2Pix)?Pipeline")
VARIANTS = ("fp16", "bf16")  # in the names of weights files in 16 bits
UNREAD = {"*.bin": "pickle", "*.onnx": "ONNX", "*.msgpack": "Flax", "*.gguf": "GGUF"}


# Reading ----------------------------------------------------------------------------------------


def open_folder(path: Path, half: bool = False) -> Source:
    """A whole model. Its networks must fit each other.

    half: prefer the fp16 files where a folder has both.
    """
    index_file = path / "model_index.json"
    index = plain_index(read_json(index_file), index_file)
    parts = {name: open_part(path / name, name, half) for name in listed_parts(index, index_file)}
    for name in ("unet", "vae"):
        if name not in parts:
            raise InputError(f"{index_file} lists no {name!r}; fetch the folder again")
    check_parts_fit(parts, path)
    return Source(parts, index, read_json(path / "scheduler" / "scheduler_config.json"))


def plain_index(index: dict, index_file: Path) -> dict:
    """A model_index.json as the plain pipeline of the same model has it."""
    pipeline = index.get("_class_name")
    plain = ADDED_WORDS.sub("", str(pipeline))
    if plain == "DiffusionPipeline":  # diffusers' base class, which says nothing
        xl = "XL" if "text_encoder_2" in index else ""
        plain = f"StableDiffusion{xl}Pipeline"
    if not PIPELINES.fullmatch(plain):
        raise InputError(
            f"{index_file} describes a {pipeline}; supported: Stable Diffusion 1, 2, XL")
    values = {name: value for name, value in index.items() if name not in ADDED_PARTS}
    return values | {"_class_name": plain}


def listed_parts(index: dict, index_file: Path) -> list[str]:
    """The networks that a model_index.json lists, in the order of MODEL_PARTS."""
    present = set()
    for name, value in index.items():
        # A part is [library, class], an absent part [None, None], and a setting no list.
        if isinstance(value, list) and value[1:] != [None]:
            present.add(name)
    for name in sorted(present):
        if name not in MODEL_PARTS and name not in OTHER_PARTS:
            raise InputError(f"{index_file} lists a part {name!r}, which is not supported")
    return [name for name in MODEL_PARTS if name in present]


def check_parts_fit(parts: dict[str, Part], path: Path):
    """InputError unless the UNet takes the latents of the VAE and the text of the text encoders."""
    unet = parts["unet"].config
    vae = parts["vae"].config
    if (vae.in_channels, vae.out_channels) != (3, 3):
        raise InputError(
            f"{path / 'vae'} takes {vae.in_channels} colours and makes {vae.out_channels}; "
            "expected 3 of each")
    latent = vae.latent_channels
    to_edit = 2 * latent  # x and the latent of the picture to edit
    to_inpaint = 2 * latent + 1  # x, the mask, and the latent of the picture around it
    if unet.in_channels not in (latent, to_edit, to_inpaint) or unet.out_channels != latent:
        raise InputError(
            f"{path / 'unet'} takes {unet.in_channels} channels and makes {unet.out_channels}; "
            f"with a VAE of {latent}, it can take {latent}, {to_edit} (edits) or {to_inpaint} "
            "(inpainting)")

    text_width = 0  # SDXL puts the states of two encoders side by side
    pooled_width = 0  # the last encoder's
    for name in ("text_encoder", "text_encoder_2"):
        if name in parts:
            encoder = parts[name].config
            text_width += encoder.hidden_size
            pooled_width = encoder.projection_dim if encoder.with_projection else 0
            if encoder.max_position_embeddings < LENGTH:
                raise InputError(
                    f"{path / name} reads {encoder.max_position_embeddings} tokens; prompts have "
                    f"{LENGTH}")
    if text_width != unet.cross_attention_dim:
        raise InputError(
            f"{path}: its text encoders make {text_width} numbers a token, its UNet takes "
            f"{unet.cross_attention_dim}; fetch the folder again, with every text encoder")
    if unet.addition_embed_type is not None:
        width = unet.addition_time_embed_dim
        pooled_and_sizes = unet.projection_class_embeddings_input_dim
        # Six size ids, or five in a refiner
        if pooled_width not in (pooled_and_sizes - 6 * width, pooled_and_sizes - 5 * width):
            raise InputError(
                f"{path / 'unet'} takes {pooled_and_sizes} numbers of pooled text and sizes, which "
                f"a text encoder of {pooled_width} does not fit; fetch the folder again")


def open_part(folder: Path, name: str, half: bool = False) -> Part:
    """One part: its config.json and its weights files, whose tensors must fit each other.

    name: a key of KINDS. half: prefer the fp16 files where the folder has both.
    """
    kind = KINDS[name]
    values = read_json(folder / "config.json")
    # diffusers has {"_class_name": "X"}, transformers {"architectures": ["X"]}
    described = values.get("_class_name", values.get("architectures"))
    if described not in kind.classes and described not in [[one] for one in kind.classes]:
        raise InputError(
            f"{folder / 'config.json'} describes a {described}; expected a "
            f"{' or '.join(kind.classes)}")
    config = read_config(kind.config, values, str(folder / "config.json"))

    files = {}
    for path in find_files(folder, kind.stem, half):
        entries, _ = read_header(path)
        files[path] = part_entries(entries)
    return check_part(Part(kind.model, config, files, convert=kind.convert))


def find_files(folder: Path, stem: str, half: bool) -> list[Path]:
    """The weights files of a part: one, or the shards that an index lists.

    half: prefer 16 bits to full precision. Without it, they are read where there is nothing else.
    Then another variant is read too, such as fp32 or non_ema, if it is the only one.
    """
    full = [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
    in_16_bits = []
    for variant in VARIANTS:
        in_16_bits += [
            f"{stem}.{variant}.safetensors", f"{stem}.safetensors.index.{variant}.json",
            f"{stem}.{variant}.safetensors.index.json"]
    for name in in_16_bits + full if half else full + in_16_bits:
        path = folder / name
        if path.is_file():
            return [path] if path.suffix == ".safetensors" else find_shards(path)
    others = list(folder.glob(f"{stem}.*.safetensors"))
    if len(others) == 1:
        return others
    unread = [kind for pattern, kind in UNREAD.items() if any(folder.glob(pattern))]
    only = f"; only {' and '.join(unread)} files, which are never read" if unread else ""
    raise InputError(
        f"{folder}: neither {stem}.safetensors nor {stem}.fp16.safetensors is there{only}")


def find_shards(index: Path) -> list[Path]:
    """The files that the index of a part lists. They must lie in the same folder."""
    weight_map = read_json(index).get("weight_map")  # {tensor: file}
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names:
        raise InputError(f"{index}: its weight_map names no files; fetch it again")
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(
                f"{index}: its weight_map names {name!r}; expected files of the same folder")
    return [index.parent / name for name in sorted(set(names))]


# Writing ----------------------------------------------------------------------------------------


def save_part(model: nn.Module, folder: str | Path, dtype: torch.dtype | None = None) -> dict:
    """Write one network: config.json, whose content is returned, and the weights.

    Both appear together, in place of an older network. dtype: of the stored weights; None keeps the
    network's.
    """
    with replacing_folder(folder) as temporary:
        return write_part(model, temporary, dtype)


def write_part(model: nn.Module, folder: Path, dtype: torch.dtype | None = None) -> dict:
    """`save_part` into a new folder."""
    values = config_to_json(model.config)
    stem = "diffusion_pytorch_model" if "_class_name" in values else "model"  # transformers' name
    save_weights(
        {key: tensor.to(dtype=dtype) for key, tensor in model.state_dict().items()},
        folder / f"{stem}.safetensors")
    write_json(values, folder / "config.json")
    return values


def save_folder(folder: str | Path, parts: dict[str, nn.Module], index: dict, scheduler: dict,
                dtype: torch.dtype | None = None):
    """Write {part: network} as a new folder that diffusers loads, but for the tokenizers' folders.

    index, scheduler: as in Source. dtype: as in `save_part`.
    """
    folder = Path(folder)
    index = dict(index)
    for name, value in index.items():
        if isinstance(value, list):
            index[name] = [None, None]  # absent, unless it is among the parts that follow
    for name, model in parts.items():
        values = write_part(model, folder / name, dtype)
        if "_class_name" in values:
            index[name] = ["diffusers", values["_class_name"]]
        else:
            index[name] = ["transformers", values["architectures"][0]]
            tokenizer = name.replace("text_encoder", "tokenizer")
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    write_json(scheduler, folder / "scheduler" / "scheduler_config.json")
    write_json(index, folder / "model_index.json")
