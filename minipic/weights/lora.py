"""LoRA files in any common spelling -> {part: {module: (A, B, alpha)}}, and back.

A LoRA (arXiv 2106.09685) adds alpha / R * B A to the weight of a layer, here called a module. A
file holds A [R, in], B [out, R] and perhaps alpha for each of them. Trainers name these tensors in
different ways, for example A of the first transformer's proj_in:

    lora_unet_input_blocks_4_1_proj_in.lora_down.weight         kohya's scripts, sgm's block names
    unet.down_blocks.1.attentions.0.proj_in.lora.down.weight    diffusers
    unet.down_blocks.1.attentions.0.proj_in.lora_A.weight       PEFT
"""

import functools
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from minipic.common import InputError, ParameterError
from minipic.weights import keys
from minipic.weights.files import Entry, read_header, save_weights, stream

PARTS_BY_START = {  # start of a tensor's name: its part; the first that fits counts
    "lora_unet_": "unet",
    "lycoris_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "diffusion_model.": "unet",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "base_model.model.text_model.": "text_encoder",
    "base_model.model.": "unet",
    "": "unet"}
KOHYA_STARTS = {  # of kohya's SDXL scripts, for writing
    "unet": "lora_unet_",
    "text_encoder": "lora_te1_",
    "text_encoder_2": "lora_te2_"}

# How a tensor's name ends, after the module's. Group 1 says which matrix it is, None is an alpha.
END = re.compile(
    r"(?:(?:\.lora_linear_layer|[._]lora)?[._](?:lora_)?(down|up|A|B)(?:\.default)?\.weight"
    r"|\.alpha)$")
ROLES = {"down": "A", "A": "A", "up": "B", "B": "B", None: "alpha"}

# The keys of PEFT's alpha_pattern are regular expressions for the end of a module's name. A file
# comes from a stranger, and some patterns, such as "(a+)+$", keep `re` busy for years. Only
# patterns of a fixed length are used: letters, dots, classes such as [0-9], and anchors.
FIXED_LENGTH = re.compile(r"\^?(?:[\w.-]|\\[.dw-]|\[[\w^-]{1,64}\]){1,300}\$?")
MAX_PATTERNS = 2000  # SDXL's UNet has fewer layers


class Place(NamedTuple):
    """What a tensor of a file is: A, B or alpha of which module."""

    part: str
    module: str
    role: str  # "A", "B" or "alpha"


# Reading ----------------------------------------------------------------------------------------


def load_lora(path: str | Path, models: dict[str, nn.Module], partial: bool = False) -> dict:
    """A LoRA file in any common spelling -> {part: {module: (A [R,...], B [out,R,...], alpha)}}.

    models: {part: network}, to which the names must belong. partial: leave out tensors that fit
    none, instead of refusing the file. alpha is the file's, from a tensor or from the metadata,
    else R. Raises InputError naming what does not fit, also for other kinds such as DoRA and LoHa.
    """
    entries, metadata = read_header(path)
    places = match_names(path, list(entries), models, partial)
    settings = read_settings(path, metadata)
    modules = read_tensors(path, entries, places)

    loras = {}
    for (part, module), tensors in modules.items():
        weight = models[part].get_submodule(module).weight
        a, b = check_shapes(tensors, weight.shape, where=f"{path}: the LoRA of {part}.{module}")
        alpha = read_alpha(path, tensors, settings, part, module)
        loras.setdefault(part, {})[module] = a, b, alpha
    return loras


def match_names(path: str | Path, names: list[str], models: dict[str, nn.Module],
                partial: bool) -> dict[str, Place]:
    """{name in the file: Place}. InputError where some fit no module, unless `partial`."""
    spellings = {part: module_spellings(part, model) for part, model in models.items()}
    candidates = {}
    for name in names:
        parsed = parse_name(name)
        if parsed is None:
            continue
        part, spelling, role = parsed
        if spelling in spellings.get(part, {}):
            candidates[name] = Place(part, spellings[part][spelling], role)

    # An alpha without matrices belongs to another kind of adapter: a LoHa has alphas too.
    with_matrices = set()
    for place in candidates.values():
        if place.role != "alpha":
            with_matrices.add((place.part, place.module))
    places = {}
    for name, place in candidates.items():
        if (place.part, place.module) in with_matrices:
            places[name] = place

    strangers = [name for name in names if name not in places]
    for name in strangers:
        if re.search("dora_scale|lora_magnitude_vector", name):
            raise InputError(f"{path} is a DoRA ({name}), which is not supported; use a LoRA")
    if not places or (strangers and not partial):
        is_loha = any(re.search("hada_w|lokr_w", name) for name in strangers)
        kind = ", of a LoHa or LoKr," if is_loha else ""
        raise ParameterError(
            "lora", f"{path}: {len(strangers)} of {len(names)} tensors{kind} fit no part of this "
            f"model ({keys.first_names(strangers, 9)}); use a LoRA made for it, or allow a partial "
            "fit")
    return places


def parse_name(name: str) -> tuple[str, str, str] | None:
    """(part, module with underscores, role) of a tensor by its name; None where it is no LoRA's.

    "unet.mid_block.attentions.0.proj_in.lora_A.weight" ->
    ("unet", "mid_block_attentions_0_proj_in", "A")
    """
    end = END.search(name)
    if end is None:
        return None
    start = next(start for start in PARTS_BY_START if name.startswith(start))
    module = name[len(start):end.start()]
    # Older diffusers has attn1.processor.to_out for attn1.to_out.0, and self_attn.to_q for q_proj.
    module = module.replace(".processor.", ".").replace(".", "_")
    module = re.sub(r"self_attn_to_(q|k|v|out)$", r"self_attn_\1_proj", module)
    module = re.sub(r"(attn\d_to_out)$", r"\1_0", module)
    return PARTS_BY_START[start], module, ROLES[end[1]]


def module_spellings(part: str, model: nn.Module) -> dict[str, str]:
    """{spelling, with underscores: name} of the Linears and convolutions of a part.

    Files name a UNet's modules as diffusers or as sgm does, and a text encoder's with or without
    "text_model".
    """
    names = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            names.append(name)

    spellings = {}
    for name in names:
        other = keys.sgm_name(name) if part == "unet" else name.removeprefix("text_model.")
        spellings[other.replace(".", "_")] = name
    for name in names:
        spellings[name.replace(".", "_")] = name
    return spellings


def read_tensors(path: str | Path, entries: dict[str, Entry],
                 places: dict[str, Place]) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    """{(part, module): {"A", "B" or "alpha": tensor}} of the tensors that have a place."""
    modules = {}
    for name, tensor in stream(path, {name: entries[name] for name in places}):
        part, module, role = places[name]
        slots = modules.setdefault((part, module), {})
        if role in slots:
            raise InputError(
                f"{path}: {name!r} is there in two spellings; the file mixes two LoRAs, use "
                "another")
        slots[role] = tensor
    return modules


def check_shapes(tensors: dict[str, torch.Tensor], shape: torch.Size,
                 where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) of one module. InputError, beginning with `where`, unless B A has this weight's shape.

    Of a convolution [out, in, k, k], A is [R, in, k, k] and B [out, R, 1, 1].
    """
    a = tensors.get("A", torch.empty(0))
    b = tensors.get("B", torch.empty(0))
    fits = a.numel() > 0 and a.ndim >= 2 and b.ndim >= 2
    if fits:
        fits = a[0].numel() == math.prod(shape[1:]) and b.flatten(1).shape == (shape[0], len(a))
    if not fits:
        raise InputError(
            f"{where} does not fit its weight {list(shape)}; use a LoRA made for this model")
    if not a.is_floating_point() or not b.is_floating_point():
        raise InputError(
            f"{where} is stored in whole numbers, which is not supported; use one in floating "
            "point")
    return a, b


# Alpha ------------------------------------------------------------------------------------------


def read_settings(path: str | Path, metadata: dict[str, str]) -> dict:
    """PEFT's settings, as newer diffusers writes them into the header: {"unet.lora_alpha": 8}."""
    try:
        return dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))
    except (ValueError, TypeError, RecursionError) as error:
        raise damaged_alpha(path, error) from None


def read_alpha(path: str | Path, tensors: dict[str, torch.Tensor], settings: dict, part: str,
               module: str) -> float:
    """A module's alpha: its tensor, else by the metadata."""
    try:
        if "alpha" in tensors:
            return float(tensors["alpha"])
        return alpha_from_metadata(settings, part, module, rank=len(tensors["A"]))
    except (ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
        raise damaged_alpha(path, error) from None


def alpha_from_metadata(settings: dict, part: str, module: str, rank: int) -> float:
    """A module's alpha by PEFT's settings; the rank where they say nothing.

    Raises ValueError, TypeError, AttributeError, OverflowError or re.error for damaged settings.
    """
    alpha = settings.get(f"{part}.lora_alpha") or rank
    patterns = settings.get(f"{part}.alpha_pattern") or {}
    if len(patterns) > MAX_PATTERNS:
        raise ValueError(f"alpha_pattern has {len(patterns):,} entries")
    if module in patterns:
        alpha = patterns[module]
    else:
        for pattern, value in patterns.items():
            if compile_pattern(pattern).fullmatch(module):
                alpha = value
                break

    alpha = float(alpha)
    if not math.isfinite(alpha):
        raise ValueError(f"an alpha is {alpha}")
    if settings.get(f"{part}.use_rslora"):  # arXiv 2312.03732: alpha / sqrt(R) instead of alpha / R
        alpha *= math.sqrt(rank)
    return alpha


@functools.lru_cache(MAX_PATTERNS)
def compile_pattern(pattern: str) -> re.Pattern:
    """The regular expression for modules that one key of an alpha_pattern means."""
    if not FIXED_LENGTH.fullmatch(pattern):
        raise ValueError(f"alpha_pattern {pattern[:60]!r} is more than a name with classes")
    return re.compile(rf"(.*\.)?({pattern})")


def damaged_alpha(path: str | Path, error: Exception) -> InputError:
    return InputError(
        f"{path}: an alpha or the header's lora_adapter_metadata is damaged or not supported "
        f"({error}); fetch the file again or use another")


# Writing ----------------------------------------------------------------------------------------


def save_lora(states: dict[str, dict[str, torch.Tensor]], path: str | Path,
              metadata: dict[str, str] | None = None, kohya: bool = False):
    """Write {part: lora.lora_state_dict(network)} to a file.

    In PEFT's spelling, which diffusers reads. There alpha / R is multiplied into B, because readers
    differ in where they look for an alpha. kohya: in the spelling of kohya's scripts for SDXL,
    with an alpha for each module.
    """
    tensors = {}
    metadata = dict(metadata or {})
    for part, state in states.items():
        modules = [key.removesuffix(".alpha") for key in state if key.endswith(".alpha")]
        for module in modules:
            a = state[f"{module}.lora_A.weight"]
            b = state[f"{module}.lora_B.weight"]
            alpha = state[f"{module}.alpha"]
            rank = len(a)
            if kohya:
                name = kohya_name(part, module)
                tensors[f"{name}.lora_down.weight"] = a
                tensors[f"{name}.lora_up.weight"] = b
                tensors[f"{name}.alpha"] = alpha
                metadata["ss_network_module"] = "networks.lora"
                metadata["ss_network_dim"] = str(rank)
                metadata["ss_network_alpha"] = str(alpha.item())
            else:
                tensors[f"{part}.{module}.lora_A.weight"] = a
                tensors[f"{part}.{module}.lora_B.weight"] = b * (alpha / rank)
    save_weights(tensors, path, metadata)


def kohya_name(part: str, module: str) -> str:
    """A module's name in kohya's files for SDXL.

    ("unet", "down_blocks.1.attentions.0.proj_in") -> "lora_unet_input_blocks_4_1_proj_in"
    """
    if part == "unet":
        module = keys.sgm_name(module)
    return KOHYA_STARTS[part] + module.replace(".", "_")
