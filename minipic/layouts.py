"""Models on disk -> networks: a diffusers folder or a single .safetensors file, opened part by part.

    source = open_model("weights/sdxl-base")           # reads headers and configs only
    encoder = load_part(source.parts["text_encoder"], torch.bfloat16, "cpu")   # reads this part's weights

Nothing is read twice or held twice, so a caller can use a text encoder and drop it before it loads the UNet.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from minipic import keys
from minipic.common import InputError
from minipic.layers import casting
from minipic.models.clip import CLIP_L, OPENCLIP_BIGG, CLIPText, CLIPTextConfig
from minipic.models.controlnet import ControlNet, ControlNetConfig
from minipic.models.unet import SD15, SDXL_BASE, SDXL_REFINER, UNet, UNetConfig
from minipic.models.vae import SD15_VAE, SDXL_VAE, VAE, VAEConfig
from minipic.weights import read_header, read_json, save_weights, stream, verify, write_json


@dataclass(frozen=True)
class Part:
    """One network on disk: how to build it, and where its tensors lie."""

    model: type  # of the network: model(config)
    config: object
    files: dict[Path, dict] = field(default_factory=dict)  # {file: {tensor name: Entry}}, the part's own tensors only
    prefix: str = ""  # what their names begin with
    convert: Callable = keys.unet  # (name without prefix, tensor) -> [(name, tensor)], see keys.py


@dataclass(frozen=True)
class Source:
    """A whole model on disk. `index` is model_index.json's content, `scheduler` scheduler_config.json's."""

    parts: dict[str, Part]
    index: dict
    scheduler: dict


KINDS = {  # part: network, its config, the classes that the official files name, its weights' file, its renaming
    "unet": (UNet, UNetConfig, ("UNet2DConditionModel",), "diffusion_pytorch_model", keys.unet),
    "vae": (VAE, VAEConfig, ("AutoencoderKL",), "diffusion_pytorch_model", keys.vae),
    "text_encoder": (CLIPText, CLIPTextConfig, ("CLIPTextModel", "CLIPTextModelWithProjection"), "model", keys.clip),
    "text_encoder_2": (CLIPText, CLIPTextConfig, ("CLIPTextModelWithProjection",), "model", keys.clip),
    "controlnet": (ControlNet, ControlNetConfig, ("ControlNetModel",), "diffusion_pytorch_model", keys.controlnet),
}
ADDED = {"controlnet"}  # parts that are no part of a model's folder
# What else an official model_index.json may list: read elsewhere, or not needed to draw.
OTHERS = ("scheduler", "tokenizer", "tokenizer_2", "feature_extractor", "safety_checker", "image_encoder")
PIPELINES = re.compile(r"StableDiffusion(XL)?(Img2Img|Inpaint|InstructPix2Pix)?Pipeline")
WIDER = {8: "InstructPix2Pix", 9: "Inpaint"}  # of UNets that take so many channels: what diffusers calls the pipeline

SDXL_SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 1}
UNET = Part(UNet, SDXL_BASE, prefix="model.diffusion_model.", convert=keys.unet)
FIRST_STAGE = Part(VAE, SDXL_VAE, prefix="first_stage_model.", convert=keys.vae)
CONTROL = "control_model."  # begins a ControlNet's names in the LDM layout
FLOATS = ("F32", "F16", "BF16")  # how weights are stored; integer tensors of official files are all ignored ones
SINGLE_FILES = {  # what a single file holds, which says nothing of its configs: (parts, index, scheduler)
    "sdxl": ({
        "unet": UNET, "vae": FIRST_STAGE,
        "text_encoder": Part(CLIPText, CLIP_L, prefix="conditioner.embedders.0.transformer.", convert=keys.clip),
        "text_encoder_2": Part(CLIPText, OPENCLIP_BIGG, prefix="conditioner.embedders.1.model.", convert=keys.openclip),
    }, {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}, SDXL_SCHEDULER),
    "refiner": ({
        "unet": replace(UNET, config=SDXL_REFINER), "vae": FIRST_STAGE,
        "text_encoder_2": Part(CLIPText, OPENCLIP_BIGG, prefix="conditioner.embedders.0.model.", convert=keys.openclip),
    }, {"_class_name": "StableDiffusionXLImg2ImgPipeline", "force_zeros_for_empty_prompt": False,
        "requires_aesthetics_score": True}, SDXL_SCHEDULER),
    "sd15": ({
        "unet": replace(UNET, config=SD15), "vae": replace(FIRST_STAGE, config=SD15_VAE),
        "text_encoder": Part(CLIPText, CLIP_L, prefix="cond_stage_model.transformer.", convert=keys.clip),
    }, {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False,
        "safety_checker": [None, None], "feature_extractor": [None, None]},
        SDXL_SCHEDULER | {"_class_name": "PNDMScheduler"}),
}


def open_model(path, half=False, check_hashes=False, vae=None):
    """A Source for a diffusers folder or a single .safetensors file; reads configs and headers, no weights.

    `half`: prefer a folder's fp16 files where it has both. `check_hashes`: every weights file must be an official one.
    `vae`: a VAE's folder or file, which some single files need, for they have none."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; fetch official weights with weights/download.py")
    if path.is_dir() and not (path / "model_index.json").exists():
        files = list(path.glob("*.safetensors"))
        if len(files) != 1:
            raise InputError(f"{path} is no model: it has neither model_index.json nor one .safetensors file")
        path = files[0]
    source = open_folder(path, half) if path.is_dir() else open_file(path)
    if vae is not None:
        source.parts["vae"] = open_vae(vae, source.parts["vae"].config)
    if not any(source.parts["vae"].files.values()):
        raise InputError(f"{vae or path} holds no VAE; name one that does with --vae")
    if check_hashes:
        for file in dict.fromkeys(file for part in source.parts.values() for file in part.files):
            verify(file)
    return source


def open_file(path):
    """A single-file checkpoint: SDXL base, Turbo, refiner or SD 1.5."""
    what = look(path)[1]
    if what not in SINGLE_FILES:
        raise InputError(f"{path} is {'a VAE alone (give it with --vae)' if what == 'vae' else what}; expected a "
                         "single-file SDXL base, Turbo, refiner or SD 1.5 model, or a diffusers folder")
    return from_single_file(path, *SINGLE_FILES[what])


def look(path):
    """The header entries of a single file, and what keys.identify makes of them."""
    entries, _ = read_header(path)
    return entries, keys.identify({name: entry.shape for name, entry in entries.items()})


def from_single_file(path, parts, index, scheduler):
    """The parts of a file whose kind is known; every tensor must belong to a part or to the ignored ones."""
    path, (entries, metadata) = Path(path), read_header(path)
    if "v_pred" in entries or metadata.get("modelspec.prediction_type") == "v":  # ComfyUI's mark, and sd-scripts'
        scheduler = scheduler | {"prediction_type": "v_prediction"}
    if "ztsnr" in entries:
        scheduler = scheduler | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    channels, unet = keys.channels({name: entry.shape for name, entry in entries.items()}), parts["unet"]
    if channels in WIDER:
        parts = parts | {"unet": replace(unet, config=replace(unet.config, in_channels=channels))}
        index = index | {"_class_name": index["_class_name"].replace("Pipeline", f"{WIDER[channels]}Pipeline")}
    prefixes = tuple(part.prefix for part in parts.values())
    strangers = [name for name in entries if not name.startswith(prefixes) and not keys.IGNORED.fullmatch(name)]
    if strangers:
        raise InputError(f"{path} holds {len(strangers)} unexpected tensors: {listed(strangers)}")
    parts = {name: replace(part, files={path: own(entries, part.prefix)}) for name, part in parts.items()}
    parts = {name: checked(part) if part.files[path] or name != "vae" else part for name, part in parts.items()}
    return Source(parts, index, scheduler)


def own(entries, prefix=""):
    """The header entries of the part whose tensors' names begin with `prefix`, without the ignored ones."""
    return {name: entry for name, entry in entries.items()
            if name.startswith(prefix) and not keys.IGNORED.fullmatch(name[len(prefix):])}


def open_folder(path, half=False):
    """A diffusers folder: model_index.json names the parts, each with a config.json and its weights."""
    index = read_json(path / "model_index.json")
    pipeline = index.get("_class_name")
    if not PIPELINES.fullmatch(str(pipeline)):
        raise InputError(f"{path / 'model_index.json'} describes a {pipeline}; supported: Stable Diffusion 1, 2, XL")
    present = {name for name, value in index.items() if isinstance(value, list) and value[1:] != [None]}
    for name in sorted(present - (KINDS.keys() - ADDED) - set(OTHERS)):
        raise InputError(f"{path / 'model_index.json'} lists a part {name!r}, which is not supported")
    parts = {name: open_part(path / name, name, half) for name in KINDS if name in present}
    if missing := [name for name in ("unet", "vae") if name not in parts]:
        raise InputError(f"{path / 'model_index.json'} lists no {missing[0]!r}; fetch the folder again")
    unet, latent = parts["unet"].config, parts["vae"].config.latent_channels
    if unet.in_channels not in (latent, 2 * latent, 2 * latent + 1) or unet.out_channels != latent:
        raise InputError(f"{path / 'unet'} takes {unet.in_channels} channels and makes {unet.out_channels}; with a VAE "
                         f"of {latent}, it can take {latent}, {2 * latent} (edits) or {2 * latent + 1} (inpainting)")
    heard = sum(parts[name].config.hidden_size for name in ("text_encoder", "text_encoder_2") if name in parts)
    if heard != unet.cross_attention_dim:
        raise InputError(f"{path}: its text encoders make {heard} numbers a token, its UNet takes "
                         f"{unet.cross_attention_dim}; fetch the folder again, with every text encoder")
    return Source(parts, index, read_json(path / "scheduler" / "scheduler_config.json"))


def open_part(folder, name, half=False):
    """One part of a diffusers folder: its config.json and its weights files, whose tensors must fit each other."""
    model, config_type, classes, stem, convert = KINDS[name]
    values = read_json(folder / "config.json")
    named = values.get("_class_name", values.get("architectures"))  # diffusers' way, transformers' way
    if named not in [*classes, *([name] for name in classes)]:
        raise InputError(f"{folder / 'config.json'} describes a {named}; expected a {' or '.join(classes)}")
    config = config_type.from_json(values, str(folder / "config.json"))
    files = {path: own(read_header(path)[0]) for path in find_files(folder, stem, half)}
    return checked(Part(model, config, files, convert=convert))


def find_files(folder, stem, half):
    """The weights of a part: one file or the shards an index lists; in full precision or fp16."""
    full = [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
    fp16 = [f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json", f"{stem}.fp16.safetensors.index.json"]
    present = [folder / name for name in (fp16 + full if half else full + fp16) if (folder / name).is_file()]
    if not present:
        pickles = "; only pickle files, which are never read" if any(folder.glob("*.bin")) else ""
        raise InputError(f"{folder}: neither {stem}.safetensors nor {stem}.fp16.safetensors is there{pickles}")
    if present[0].suffix == ".safetensors":
        return (present[0],)
    shards = read_json(present[0]).get("weight_map")
    shards = list(shards.values()) if isinstance(shards, dict) else [None]
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InputError(f"{present[0]}: its weight_map names {shard!r}; expected files of the same folder")
    return tuple(folder / shard for shard in sorted(set(shards)))


def open_vae(path, config=SDXL_VAE):
    """A VAE alone: a folder with its config.json, or a file in LDM or diffusers names, for which `config` stands."""
    path = Path(path)
    if path.is_dir():
        return open_part(path / "vae" if (path / "model_index.json").exists() else path, "vae")
    entries, what = look(path)
    if what in SINGLE_FILES:
        return open_file(path).parts["vae"]
    if what != "vae":
        raise InputError(f"{path} is {what}; expected a VAE")
    prefix = FIRST_STAGE.prefix if any(name.startswith(FIRST_STAGE.prefix) for name in entries) else ""
    return checked(Part(VAE, config, {path: own(entries, prefix)}, prefix, keys.vae))


def open_controlnet(path, unet, factor, half=False):
    """A ControlNet for a UNet of config `unet` and a VAE of `factor`: a folder, or a file in LDM or diffusers names."""
    path = Path(path)
    if path.is_file():
        entries, what = look(path)
        if what != "a ControlNet" or "shuffle" in path.stem:  # only its config or its name would tell
            what = "one that averages over the picture, which is not supported" if what == "a ControlNet" else what
            raise InputError(f"--controlnet {path} is {what}; expected an ordinary ControlNet")
        prefix = CONTROL if any(name.startswith(CONTROL) for name in entries) else ""
        entries = own(entries, prefix)
        shapes = {keys.controlnet(name[len(prefix):], None)[0][0]: entry.shape for name, entry in entries.items()}
        part = Part(ControlNet, ControlNetConfig.told(shapes, unet), {path: entries}, prefix, keys.controlnet)
    elif (path / "model_index.json").exists():
        raise InputError(f"{path} is a whole model; expected a ControlNet's folder")
    else:
        part = open_part(path, "controlnet", half)
    if misfit := part.config.misfit(unet, factor):
        raise InputError(f"--controlnet {path}: {misfit}; use a ControlNet that was made for this model")
    return checked(part) if path.is_file() else part


def checked(part):
    """The part itself, whose tensors, after renaming, are exactly its network's: none missing, none left over.

    Judged by the headers, before any weights are read. Raises InputError naming the file and the tensors otherwise.
    """
    found, dtypes = {}, {}
    for path, entries in part.files.items():
        for name, entry in entries.items():
            if entry.dtype not in FLOATS:
                raise InputError(f"{path}: tensor {name!r} is stored as {entry.dtype}; expected {', '.join(FLOATS)}")
            dtypes[entry.dtype] = name
            for key, tensor in part.convert(name[len(part.prefix):], torch.empty(entry.shape, device="meta")):
                if key in found:
                    raise InputError(f"{path}: tensors {found[key][0]!r} and {name!r} are the same weight {key!r}; "
                                     "the file mixes two layouts, use another")
                found[key] = name, tuple(tensor.shape)
    where = path if len(part.files) == 1 else path.parent
    check_fit(blank(part.model, part.config), found, where)
    if {"F16", "BF16"} <= dtypes.keys():  # no writer mixes these; one read as the other is silently wrong
        raise InputError(f"{where}: tensor {dtypes['F16']!r} is F16 but {dtypes['BF16']!r} is BF16: "
                         "the file is damaged; fetch it again")
    return part


class Uninitialised(TorchFunctionMode):
    """Leaves nn.init out: on the meta device it does nothing but import PyTorch's compiler, for a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs else args[0]
        return function(*args, **(kwargs or {}))


def blank(model, config):
    """A network with shapes and no memory, on the meta device, for load_state_dict(assign=True) to fill."""
    with torch.device("meta"), Uninitialised():
        return model(config)


def check_fit(model, found, where):
    """InputError unless `found`, {name: (name in the file, shape)}, are the names and shapes of the model's state."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    unexpected = [found[name][0] for name in found if name not in wanted]
    if foreign := keys.foreign(unexpected):
        raise InputError(f"{where} is {foreign}; expected the weights of a {type(model).__name__}")
    problems = {
        "missing": [name for name in wanted if name not in found], "unexpected": unexpected,
        "misshapen": [f"{name} is {list(shape)} instead of {list(wanted[key])}"
                      for key, (name, shape) in found.items() if key in wanted and shape != wanted[key]]}
    if any(problems.values()):
        raise InputError(f"{where} does not fit a {type(model).__name__} with its config: " + "; ".join(
            f"{len(names)} {problem} ({listed(names)})" for problem, names in problems.items() if names))


def listed(names, most=3):
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def load_part(part, dtype=None, device="cpu", cast=False):
    """Read one part's weights into its network, tensor by tensor: never two copies in memory.

    `dtype` None keeps the file's: such weights stay mapped and cost memory only when used; `cast`: in float32 the large
    ones do so too, see layers/casting.py."""
    model, state = blank(part.model, part.config), {}
    stay = casting.install(model) if cast and dtype == torch.float32 else ()
    for path, entries in part.files.items():
        for name, tensor in stream(path, entries):
            for key, x in part.convert(name[len(part.prefix):], tensor):
                kept = order(dtype) if x.ndim == 4 else torch.preserve_format
                state[key] = x.to(device=device, dtype=None if key in stay else dtype, memory_format=kept)
    model.load_state_dict(state, strict=True, assign=True)
    return model


def order(dtype):
    """The memory format of convolutions: channels-last in 16 bits, up to 6 times faster in bf16 on a CPU with AMX. Not
    in fp32, where little is to gain and PyTorch's GroupNorm is then off by 2e-4 where the mean is 10 deviations."""
    return torch.channels_last if dtype and dtype.itemsize == 2 else torch.preserve_format


def save_part(model, folder, dtype=None):
    """Write one network as a diffusers folder holds it: config.json, which is returned, and the weights. Weights that
    are there in 16 bits or in shards would be read in their place, and are removed."""
    values = model.config.to_json()
    stem = "diffusion_pytorch_model" if "_class_name" in values else "model"  # transformers' files have the short name
    save_weights({key: x.to(dtype=dtype) for key, x in model.state_dict().items()}, folder / f"{stem}.safetensors")
    for old in folder.glob(f"{stem}*safetensors*"):
        if re.search("fp16|index|-of-", old.name):
            old.unlink()
    write_json(values, folder / "config.json")
    return values


def save_folder(folder, parts, index, scheduler, dtype=None):
    """Write {part: network} as a diffusers folder that diffusers loads; the tokenizers' folders are the caller's.

    `index`, `scheduler`: as in Source. `dtype`: stored so, None keeps. A folder without model_index.json is unfinished.
    """
    folder = Path(folder)
    index = {key: [None, None] if isinstance(value, list) else value for key, value in index.items()}  # parts not kept
    for name, model in parts.items():
        values = save_part(model, folder / name, dtype)
        if "_class_name" in values:
            index[name] = ["diffusers", values["_class_name"]]
        else:
            index[name] = ["transformers", values["architectures"][0]]
            index[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    write_json(scheduler, folder / "scheduler" / "scheduler_config.json")
    write_json(index, folder / "model_index.json")
