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
from minipic.models.clip import CLIPText, CLIPTextConfig
from minipic.models.controlnet import ControlNet, ControlNetConfig
from minipic.models.unet import UNet, UNetConfig
from minipic.models.vae import VAE, VAEConfig
from minipic.weights import keys
from minipic.weights.files import read_header, read_json, save_weights, write_json
from minipic.weights.parts import Part, Source, check_part, part_entries
from minipic.weights.configs import config_to_json, read_config


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
    "controlnet": Kind(
        ControlNet, ControlNetConfig, ("ControlNetModel",), "diffusion_pytorch_model",
        keys.controlnet)}
MODEL_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")  # a ControlNet has its own folder
# What else an official model_index.json may list: it is read elsewhere, or not needed to draw.
OTHER_PARTS = (
    "scheduler", "tokenizer", "tokenizer_2", "feature_extractor", "safety_checker", "image_encoder")
PIPELINES = re.compile(r"StableDiffusion(XL)?(Img2Img|Inpaint|InstructPix2Pix)?Pipeline")


# Reading ----------------------------------------------------------------------------------------


def open_folder(path: Path, half: bool = False) -> Source:
    """A whole model. Its networks must fit each other.

    half: prefer the fp16 files where a folder has both.
    """
    index_file = path / "model_index.json"
    index = read_json(index_file)
    parts = {name: open_part(path / name, name, half) for name in listed_parts(index, index_file)}
    for name in ("unet", "vae"):
        if name not in parts:
            raise InputError(f"{index_file} lists no {name!r}; fetch the folder again")
    check_parts_fit(parts, path)
    return Source(parts, index, read_json(path / "scheduler" / "scheduler_config.json"))


def listed_parts(index: dict, index_file: Path) -> list[str]:
    """The networks that a model_index.json lists, in the order of MODEL_PARTS."""
    pipeline = index.get("_class_name")
    if not PIPELINES.fullmatch(str(pipeline)):
        raise InputError(
            f"{index_file} describes a {pipeline}; supported: Stable Diffusion 1, 2, XL")
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
    latent = parts["vae"].config.latent_channels
    to_edit = 2 * latent  # x and the latent of the picture to edit
    to_inpaint = 2 * latent + 1  # x, the mask, and the latent of the picture around it
    if unet.in_channels not in (latent, to_edit, to_inpaint) or unet.out_channels != latent:
        raise InputError(
            f"{path / 'unet'} takes {unet.in_channels} channels and makes {unet.out_channels}; "
            f"with a VAE of {latent}, it can take {latent}, {to_edit} (edits) or {to_inpaint} "
            "(inpainting)")

    text_width = 0  # SDXL puts the states of two encoders side by side
    for name in ("text_encoder", "text_encoder_2"):
        if name in parts:
            text_width += parts[name].config.hidden_size
    if text_width != unet.cross_attention_dim:
        raise InputError(
            f"{path}: its text encoders make {text_width} numbers a token, its UNet takes "
            f"{unet.cross_attention_dim}; fetch the folder again, with every text encoder")


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

    half: prefer fp16 to full precision. Without it, fp16 is read where there is nothing else.
    """
    full = [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
    fp16 = [f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json",
            f"{stem}.fp16.safetensors.index.json"]
    for name in fp16 + full if half else full + fp16:
        path = folder / name
        if path.is_file():
            return [path] if path.suffix == ".safetensors" else find_shards(path)
    pickles = "; only pickle files, which are never read" if any(folder.glob("*.bin")) else ""
    raise InputError(
        f"{folder}: neither {stem}.safetensors nor {stem}.fp16.safetensors is there{pickles}")


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

    dtype: of the stored weights; None keeps the network's. Files of an older model in 16 bits or in
    shards would be read in place of the new one, and are removed.
    """
    folder = Path(folder)
    values = config_to_json(model.config)
    stem = "diffusion_pytorch_model" if "_class_name" in values else "model"  # transformers' name
    save_weights(
        {key: tensor.to(dtype=dtype) for key, tensor in model.state_dict().items()},
        folder / f"{stem}.safetensors")
    for old in folder.glob(f"{stem}*safetensors*"):
        if re.search("fp16|index|-of-", old.name):
            old.unlink()
    write_json(values, folder / "config.json")
    return values


def save_folder(folder: str | Path, parts: dict[str, nn.Module], index: dict, scheduler: dict,
                dtype: torch.dtype | None = None):
    """Write {part: network} as a folder that diffusers loads, but for the tokenizers' folders.

    index, scheduler: as in Source. dtype: as in `save_part`. model_index.json is written last: a
    folder without it is unfinished.
    """
    folder = Path(folder)
    index = dict(index)
    for name, value in index.items():
        if isinstance(value, list):
            index[name] = [None, None]  # absent, unless it is among the parts that follow
    for name, model in parts.items():
        values = save_part(model, folder / name, dtype)
        if "_class_name" in values:
            index[name] = ["diffusers", values["_class_name"]]
        else:
            index[name] = ["transformers", values["architectures"][0]]
            tokenizer = name.replace("text_encoder", "tokenizer")
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    write_json(scheduler, folder / "scheduler" / "scheduler_config.json")
    write_json(index, folder / "model_index.json")
