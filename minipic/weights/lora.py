"""LoRA files in any common spelling -> {part: {module: (A, B, alpha)}}, and back.

A LoRA (arXiv 2106.09685) adds alpha / R * B A to the weight of a layer, here called a module. A
file holds A [R, in], B [out, R] and perhaps alpha for each of them. Trainers name these tensors in
different ways, for example A of the first transformer's proj_in:

    lora_unet_input_blocks_4_1_proj_in.lora_down.weight         kohya's scripts, sgm's block names
    unet.down_blocks.1.attentions.0.proj_in.lora.down.weight    diffusers
    unet.down_blocks.1.attentions.0.proj_in.lora_A.weight       PEFT

Some files hold more: whole differences of weights and biases (ComfyUI, LyCORIS), and the vectors of
new words (OneTrainer, A1111).
"""

import functools
import json
import math
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from minipic.common import InputError
from minipic.weights import keys
from minipic.weights.embedding import PART_OF, check_vectors
from minipic.weights.files import Entry, read_header, read_json, save_weights, stream

ALL_PARTS = ("unet", "text_encoder", "text_encoder_2")
PARTS_BY_START = {  # start of a tensor's name: its part; the first that fits counts
    "lora_unet_": ("unet",),
    "lycoris_": ("unet",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te_": ("text_encoder",),
    "unet.unet.": ("unet",),  # diffusers, for a few weeks of 2023
    "unet.": ("unet",),
    "text_encoder.": ("text_encoder",),
    "text_encoder_2.": ("text_encoder_2",),
    # ComfyUI
    "diffusion_model.": ("unet",),
    "model.diffusion_model.": ("unet",),
    "text_encoders.clip_l.transformer.": ("text_encoder",),
    "text_encoders.clip_g.transformer.": ("text_encoder_2",),
    # OneTrainer, whose format is called OMI
    "clip_l.": ("text_encoder",),
    "clip_g.": ("text_encoder_2",),
    # PEFT has one network in a file and does not say which
    "": ALL_PARTS}
FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # PEFT's, diffusers'
KOHYA_STARTS = {  # of kohya's SDXL scripts, for writing
    "unet": "lora_unet_",
    "text_encoder": "lora_te1_",
    "text_encoder_2": "lora_te2_"}

# How a tensor's name ends, after the module's: what it is, and perhaps PEFT's name of the adapter.
END = re.compile(
    r"(?:(?:\.lora_linear_layer|[._]lora)?[._](?:lora_)?(down|up|mid|A|B)(?:\.([^.]+))?\.weight"
    r"|\.(alpha|diff|diff_b|w_norm|b_norm))$")
ROLES = {
    "down": "A", "A": "A",
    "up": "B", "B": "B",
    "mid": "mid",  # LyCORIS: a convolution between A and B, which then are 1x1
    "alpha": "alpha",
    "diff": "weight", "w_norm": "weight",  # a whole difference
    "diff_b": "bias", "b_norm": "bias"}

# A word's vectors in a LoRA: bundle_emb.WORD.clip_l
BUNDLE = "bundle_emb."
BUNDLED_WORD = re.compile(rf"bundle_emb\.(.+?)\.({'|'.join(map(re.escape, PART_OF))})")

# Names of a single-file checkpoint of a whole model
WHOLE_MODEL = r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\."
FAMILIES = {  # the width of the text that the UNet attends to
    768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "SDXL's refiner", 2048: "SDXL"}

# PEFT's settings that can make a LoRA something else, and the values, beside None, that do not.
PLAIN_SETTINGS = {
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (), "lora_bias": (),
    "use_rslora": (True,),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),  # others change the weights too
    "fan_in_fan_out": (), "modules_to_save": (), "layer_replication": (), "target_parameters": (),
    "trainable_token_indices": (), "alora_invocation_tokens": (), "use_qalora": (),
    "use_bdlora": (), "arrow_config": (), "kasa_config": (), "monteclora_config": ()}
PEFT_ALPHA = 8  # where its settings have none
LARGEST = 1e9  # alpha or rank

# The keys of PEFT's alpha_pattern and rank_pattern are regular expressions for the end of a
# module's name. A file comes from a stranger, and some patterns, such as "(a+)+$", keep `re` busy
# for years. So no group is repeated, and the ways to try a file's patterns on a name are bounded.
PATTERN_PIECE = re.compile(
    r"(?:\\d|\[0-9\])(?P<repeated_digits>[*+?]|\{\d(?:,\d)?\})?"
    r"|(?:[\w.-]|\\[.w-]|\[\^?[\w.^-]{1,64}\])(?P<repeated>[*+?]|\{\d(?:,\d)?\})?"
    r"|(?P<choice>\((?:\?:)?|\||\)\?)|[)^$]")
WAYS = {"repeated": 32, "repeated_digits": 4, "choice": 2}
MAX_WAYS = 1 << 18  # a few seconds for all modules of SDXL
MAX_PATTERN_LENGTH = 1000  # characters
MAX_PATTERNS = 2000  # SDXL's UNet has fewer layers


class ParsedName(NamedTuple):
    """What a tensor's name says of it."""

    parts: tuple[str, ...]  # its part, or those that it may belong to
    module: str  # with underscores; or "bundle_emb.WORD"
    role: str  # "A", "B", "mid" or "alpha"; "weight" or "bias", a whole difference; or "word"
    adapter: str | None  # PEFT's name of the LoRA


class Place(NamedTuple):
    """What a tensor of a file is in the models."""

    part: str
    module: str
    role: str


class LoRAFile(NamedTuple):
    """What a LoRA file holds."""

    layers: dict[str, dict]  # {part: {module: (A [R,...], B [out,R,...], alpha)}}
    differences: dict[str, dict]  # {part: {parameter: tensor of its shape}}
    words: dict[str, dict]  # {word: {part: vectors [n,D]}}


# Reading ----------------------------------------------------------------------------------------


def load_lora(
        path: str | Path, models: dict[str, nn.Module], allow_partial: bool = False) -> dict:
    """A LoRA file in any common spelling -> {part: {module: (A [R,...], B [out,R,...], alpha)}}.

    As `read_lora`, for files that hold nothing else. InputError for those that do.
    """
    file = read_lora(path, models, allow_partial)
    if file.differences or file.words:
        raise InputError(
            f"{path}: holds whole differences or new words beside its LoRA; add it to a pipeline, "
            "or read it with read_lora")
    return file.layers


def read_lora(
        path: str | Path, models: dict[str, nn.Module], allow_partial: bool = False) -> LoRAFile:
    """What a LoRA file holds, in any common spelling. path: the file, or the folder it lies in.

    models: {part: network}, to which the names must belong. allow_partial: leave out tensors that
    fit none, with a warning, instead of refusing the file. alpha is the file's, from a tensor or
    from PEFT's settings, else R. Raises InputError naming what does not fit, also for other kinds
    such as DoRA and LoHa.
    """
    path = find_lora_file(Path(path))
    entries, metadata = read_header(path)
    settings = read_peft_settings(path, metadata, entries)
    places = match_names(path, entries, models, allow_partial)

    layers, differences, words = {}, {}, {}
    for (part, name), tensors in read_tensors(path, entries, places).items():
        if "word" in tensors:
            words.setdefault(name.removeprefix(BUNDLE), {})[part] = tensors["word"]
            continue
        where = f"{path}: the LoRA of {part}.{name}"
        module = models[part].get_submodule(name)
        if "A" in tensors or "B" in tensors:
            a, b = check_shapes(tensors, module.weight.shape, where)
            alpha = read_alpha(tensors, settings.get(part, settings.get("", {})), name, where)
            layers.setdefault(part, {})[name] = a, b, alpha
        for role in tensors.keys() & {"weight", "bias"}:
            if tensors[role].shape != getattr(module, role).shape:
                raise InputError(f"{where} does not fit its {role}; use one made for this model")
            differences.setdefault(part, {})[f"{name}.{role}"] = tensors[role]
    for word, vectors in words.items():
        words[word] = check_vectors(path, vectors)
    return LoRAFile(layers, differences, words)


def find_lora_file(path: Path) -> Path:
    """The file itself, or the one in a folder, as PEFT, diffusers and train.py write it."""
    if not path.is_dir():
        return path
    known = [path / name for name in FILES if (path / name).exists()]
    files = known or list(path.glob("*.safetensors"))
    if len(files) != 1:
        raise InputError(
            f"{path}: has {len(files)} LoRAs in .safetensors instead of one; give the file itself")
    return files[0]


def match_names(
        path: Path, entries: dict[str, Entry], models: dict[str, nn.Module],
        allow_partial: bool) -> dict[str, Place]:
    """{name in the file: Place}. InputError where some fit no part, unless `allow_partial`."""
    parsed = {}
    rows = {}  # of B, by which modules of the two text encoders differ
    for name, entry in entries.items():
        tensor = parse_name(name)
        if tensor is not None:
            parsed[name] = tensor
            if tensor.role == "B":
                rows[tensor.module] = entry.shape[:1]
    check_family(path, entries, parsed, models)
    check_one_adapter(path, parsed)

    spellings = {part: module_spellings(part, model) for part, model in models.items()}
    candidates = {}
    for name, tensor in parsed.items():
        place = find_place(tensor, rows.get(tensor.module), spellings, models)
        if place is not None:
            candidates[name] = place

    # An alpha without matrices belongs to another kind of adapter: a LoHa has alphas too.
    with_matrices = set()
    for place in candidates.values():
        if place.role in ("A", "B"):
            with_matrices.add((place.part, place.module))
    places = {}
    for name, place in candidates.items():
        if place.role not in ("alpha", "mid") or (place.part, place.module) in with_matrices:
            places[name] = place

    strangers = [name for name in entries if name not in places]
    if allow_partial and places:
        check_kind(path, strangers, only="a DoRA")  # without its scales it is wrong
        if strangers:
            warnings.warn(
                f"{path}: {len(strangers)} tensors are left out: {in_words(strangers)}",
                stacklevel=2)
    elif strangers or not places:
        check_kind(path, strangers)
        raise InputError(
            f"{path}: {len(strangers)} of {len(entries)} tensors fit no part of this model "
            f"({in_words(strangers[:9])}); use a LoRA made for it, or set allow_partial to "
            "leave them out")
    return places


def parse_name(name: str) -> ParsedName | None:
    """What a tensor is by its name; None where it is no LoRA's.

    "unet.mid_block.attentions.0.proj_in.lora_A.weight" ->
    (("unet",), "mid_block_attentions_0_proj_in", "A", None)
    """
    bundled = BUNDLED_WORD.fullmatch(name)
    if bundled is not None:
        return ParsedName((PART_OF[bundled[2]],), BUNDLE + bundled[1], "word", None)

    name = keys.unwrapped(name).replace("_orig_mod_", "")  # the latter in kohya's names
    end = END.search(name)
    if end is None:
        return None
    start = next(start for start in PARTS_BY_START if name.startswith(start))
    module = name[len(start):end.start()]
    # Older diffusers has attn1.processor.to_out for attn1.to_out.0, and self_attn.to_q for q_proj.
    module = module.replace(".processor.", ".").replace(".", "_")
    module = re.sub(r"self_attn_to_(q|k|v|out)$", r"self_attn_\1_proj", module)
    module = re.sub(r"(attn\d_to_out)$", r"\1_0", module)
    matrix, adapter, other = end.groups()
    return ParsedName(PARTS_BY_START[start], module, ROLES[matrix or other], adapter)


def module_spellings(part: str, model: nn.Module) -> dict[str, str]:
    """{spelling, with underscores: name} of the modules of a part that have a weight.

    Files name a UNet's modules as diffusers or as sgm does, and a text encoder's with or without
    "text_model".
    """
    names = []
    for name, module in model.named_modules():
        if getattr(module, "weight", None) is not None:
            names.append(name)

    spellings = {}
    for name in names:
        other = keys.sgm_name(name) if part == "unet" else name.removeprefix("text_model.")
        spellings[other.replace(".", "_")] = name
    for name in names:
        spellings[name.replace(".", "_")] = name
    return spellings


def find_place(
        tensor: ParsedName, rows: tuple[int, ...] | None, spellings: dict[str, dict[str, str]],
        models: dict[str, nn.Module]) -> Place | None:
    """Where a tensor belongs; None where it fits no part. rows: (those of its module's B,)."""
    for part in tensor.parts:
        if tensor.role == "word" and part in models:
            return Place(part, tensor.module, "word")
        name = spellings.get(part, {}).get(tensor.module)
        if name is None:
            continue
        module = models[part].get_submodule(name)
        if tensor.role in ("weight", "bias"):
            has_role = getattr(module, tensor.role, None) is not None
        else:
            has_role = isinstance(module, (nn.Linear, nn.Conv2d))
        is_other_encoder = len(tensor.parts) > 1 and rows not in (None, module.weight.shape[:1])
        if has_role and not is_other_encoder:
            return Place(part, name, tensor.role)
    return None


def check_family(
        path: Path, entries: dict[str, Entry], parsed: dict[str, ParsedName],
        models: dict[str, nn.Module]):
    """InputError for a LoRA whose UNet attends to text of another width: of another family."""
    modules = models["unet"].named_modules() if "unet" in models else ()
    own = {layer.in_features for name, layer in modules if name.endswith("attn2.to_k")}
    for name, tensor in parsed.items():
        if tensor.role == "A" and tensor.module.endswith("attn2_to_k"):
            width = entries[name].shape[-1] if entries[name].shape else 0
            if own and width not in own:
                family = FAMILIES.get(width, "another model")
                raise InputError(
                    f"{path} is a LoRA for {family}: its text is {width} wide, this model's "
                    f"{max(own)}; use a LoRA made for this model")


def check_one_adapter(path: Path, parsed: dict[str, ParsedName]):
    """InputError for several LoRAs in one file, which PEFT's names of adapters tell apart."""
    adapters = {tensor.adapter or "" for tensor in parsed.values() if tensor.role in ("A", "B")}
    if len(adapters) > 1:
        names = in_words(sorted(adapters))
        raise InputError(
            f"{path}: holds {len(adapters)} LoRAs, called {names}; save the one to use by itself")


def check_kind(path: Path, names: list[str], only: str | None = None):
    """InputError for a file that has the name of another kind, saying which kind it is.

    only: the one kind that is refused; None: all.
    """
    found = keys.foreign_kind(names, besides="a LoRA")
    for name in names:
        if found is None and re.search(WHOLE_MODEL, name) and not re.search(keys.LORA, name):
            found = "a whole model", name
    if found is None or only not in (None, found[0]):
        return
    kind, name = found
    if kind.endswith(("model", "transformer")) and re.search(keys.LORA, name):
        kind = f"a LoRA for {kind}"
    raise InputError(f"{path} is {kind} ({name!r}); expected a LoRA made for this model")


def in_words(names: list[str]) -> str:
    """Names from a file, quoted, so that a terminal obeys nothing in them."""
    return ", ".join(map(repr, names))


def read_tensors(
        path: Path, entries: dict[str, Entry],
        places: dict[str, Place]) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    """{(part, module): {role: tensor}} of the tensors that have a place."""
    modules = {}
    for name, tensor in stream(path, {name: entries[name] for name in places}):
        part, module, role = places[name]
        slots = modules.setdefault((part, module), {})
        if role in slots:
            raise InputError(
                f"{path}: {name!r} is there in two spellings; the file mixes two LoRAs, use "
                "another")
        if role != "alpha" and not tensor.is_floating_point():
            raise InputError(
                f"{path}: {name!r} is stored in whole numbers, which is not supported; use one in "
                "floating point")
        slots[role] = tensor
    return modules


def check_shapes(
        tensors: dict[str, torch.Tensor], shape: torch.Size,
        where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) of one module. InputError, beginning with `where`, unless B A has this weight's shape.

    Of a convolution [out, in, k, k], A is [R, in, k, k] and B [out, R, 1, 1]. With a `mid`
    [R, R, k, k], A is [R, in, 1, 1] in the file, and both together are one A.
    """
    a = tensors.get("A", torch.empty(0))
    b = tensors.get("B", torch.empty(0))
    mid = tensors.get("mid")
    fits = a.numel() > 0 and a.ndim >= 2 and b.ndim >= 2
    if fits and mid is not None:
        fits = a.ndim == 4 and mid.shape == (len(a), len(a), *shape[2:])
        if fits:
            a = torch.einsum("srij,rc->scij", mid.float(), a.float().flatten(1))
    if fits:
        fits = a[0].numel() == math.prod(shape[1:]) and b.flatten(1).shape == (shape[0], len(a))
    if not fits:
        raise InputError(
            f"{where} does not fit its weight {list(shape)}; use a LoRA made for this model")
    return a, b


# Alpha ------------------------------------------------------------------------------------------


def read_peft_settings(
        path: Path, metadata: dict[str, str], names: Iterable[str]) -> dict[str, dict]:
    """{part: PEFT's settings} for a file without alphas of its own; "" stands for every part.

    Newer diffusers writes them into the header, {"unet.lora_alpha": 8}; PEFT writes them into
    adapter_config.json beside the file. "source" is where they are from.
    """
    source = path.with_name("adapter_config.json")
    if any(name.endswith(".alpha") for name in names):
        return {}
    if "lora_adapter_metadata" in metadata:
        source = f"{path}: the header's lora_adapter_metadata"
        try:
            values = dict(json.loads(metadata["lora_adapter_metadata"]))
        except (ValueError, TypeError, RecursionError) as error:
            raise damaged(source, error) from None
    else:
        values = read_json(source) if source.exists() else {}

    settings = {}
    for key, value in values.items():
        part, _, name = str(key).rpartition(".")
        if name in PLAIN_SETTINGS and value and value not in PLAIN_SETTINGS[name]:
            raise InputError(
                f"{source}: {name} is {str(value)[:60]!r}, which is not supported; use a plain "
                "LoRA")
        settings.setdefault(part, {"source": source})[name] = value
    return settings


def read_alpha(
        tensors: dict[str, torch.Tensor], settings: dict, module: str, where: str) -> float:
    """A module's alpha: its tensor, else by PEFT's settings, else the rank."""
    rank = len(tensors["A"])
    source = f"{where}: its alpha" if "alpha" in tensors else settings.get("source")
    try:
        if "alpha" in tensors:
            return finite(tensors["alpha"])
        if not settings:
            return rank
        alpha = finite(settings.get("lora_alpha", PEFT_ALPHA))
        alpha = value_for(module, settings.get("alpha_pattern"), alpha)
        expected_rank = value_for(module, settings.get("rank_pattern"), settings.get("r", rank))
    except (ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
        raise damaged(source, error) from None
    if expected_rank != rank:
        raise InputError(
            f"{where} has rank {rank}, but {expected_rank:g} by {source}; give the file that these "
            "settings are of")
    # arXiv 2312.03732: alpha / sqrt(R) instead of alpha / R
    return alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha


def value_for(module: str, patterns: dict | None, value: Any) -> float:
    """The value of the first of PEFT's patterns that fits a module's name, else the given one.

    Raises ValueError, TypeError, AttributeError, OverflowError or re.error for damaged settings.
    """
    patterns = patterns or {}
    for pattern, pattern_value in zip(compile_patterns(tuple(patterns)), patterns.values()):
        if pattern.fullmatch(module):
            return finite(pattern_value)
    return finite(value)


def finite(value: Any) -> float:
    number = float(value)
    if not abs(number) <= LARGEST:
        raise ValueError(f"{number:g} is no useful number")
    return number


@functools.lru_cache(8)
def compile_patterns(patterns: tuple[str, ...]) -> list[re.Pattern]:
    """The regular expressions for modules that the keys of a pattern of PEFT's mean."""
    if len(patterns) > MAX_PATTERNS:
        raise ValueError(f"one of its patterns has {len(patterns):,} entries")
    all_ways = 0
    for pattern in patterns:
        all_ways += ways_to_match(pattern)
        if all_ways > MAX_WAYS:
            raise ValueError(
                f"its pattern {pattern[:60]!r} repeats or chooses too much, or is no name's")
    return [re.compile(rf"(.*\.)?({pattern})") for pattern in patterns]


def ways_to_match(pattern: str) -> float:
    """About how many ways there are to try a pattern on a name; infinity where that is unknown."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        return math.inf
    ways = 1
    position = 0
    while position < len(pattern):
        piece = PATTERN_PIECE.match(pattern, position)
        if piece is None:
            return math.inf
        ways *= WAYS.get(piece.lastgroup, 1)
        position = piece.end()
    return ways


def damaged(source: str | Path, error: Exception) -> InputError:
    return InputError(
        f"{source} is damaged or not supported ({error}); fetch it again or use another")


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
