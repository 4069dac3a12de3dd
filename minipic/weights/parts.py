"""One network on disk: what it is, whether its tensors fit, and how they are read into it.

    part = open_part(Path("weights/tiny/unet"), "unet")    # see folders.py: reads config and header
    unet = load_part(part, torch.bfloat16, "cuda")         # reads the weights
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from minipic.common import InputError
from minipic.kernels import casting
from minipic.weights import keys
from minipic.weights.files import Entry, stream

# How weights are stored; official files' integers are all ignored.
FLOATS = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Part:
    """One network on disk: how to build it, and where its tensors lie."""

    model: type[nn.Module]  # the network is model(config)
    config: object
    files: dict[Path, dict[str, Entry]] = field(default_factory=dict)  # only the part's own tensors
    prefix: str = ""  # what the names of the tensors begin with
    convert: Callable = keys.unet  # (name without prefix, tensor) -> [(name, tensor), ...]

    def renamed(self, name: str, tensor: torch.Tensor) -> keys.Renamed:
        """[(name, tensor), ...] of the network, from one of the file."""
        return self.convert(keys.unwrapped(name)[len(self.prefix):], tensor)


@dataclass(frozen=True)
class Source:
    """A whole model on disk: what a diffusers folder, or what is known of a single file, says."""

    parts: dict[str, Part]  # "unet", "vae", "text_encoder", "text_encoder_2"
    index: dict  # the content of model_index.json
    scheduler: dict  # the content of scheduler_config.json


def part_entries(entries: dict[str, Entry], prefix: str = "") -> dict[str, Entry]:
    """The entries of one part, whose tensors' names begin with `prefix`, without the ignored."""
    own = {}
    for name, entry in entries.items():
        whole = keys.unwrapped(name)
        short = whole.removeprefix(prefix)
        is_ignored = keys.IGNORED.fullmatch(whole) or keys.IGNORED.fullmatch(short)
        if whole.startswith(prefix) and not is_ignored:
            own[name] = entry
    return own


def prefix_in(entries: dict[str, Entry], prefix: str) -> str:
    """The prefix, where some names in a file begin with it, else ""."""
    has_prefix = any(keys.unwrapped(name).startswith(prefix) for name in entries)
    return prefix if has_prefix else ""


class Uninitialised(TorchFunctionMode):
    """Skips nn.init, which does nothing on the meta device but import a compiler, for a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs else args[0]
        return function(*args, **(kwargs or {}))


def build_empty(model: type[nn.Module], config: Any) -> nn.Module:
    """A network without memory, on the meta device, for load_state_dict(assign=True) to fill."""
    with torch.device("meta"), Uninitialised():
        return model(config)


# Checking ---------------------------------------------------------------------------------------


def check_part(part: Part) -> Part:
    """The part itself, if its tensors, renamed, are those of its network: none missing, none left.

    Judged by the headers, before any weights are read. Raises InputError naming file and tensors.
    """
    origins = {}  # {name in the network: (name in the file, shape)}
    example_of_dtype = {}
    for path, entries in part.files.items():
        for name, entry in entries.items():
            if entry.dtype not in FLOATS:
                expected = ", ".join(FLOATS)
                raise InputError(
                    f"{path}: tensor {name!r} is stored as {entry.dtype}; expected {expected}")
            example_of_dtype[entry.dtype] = name

            tensor = torch.empty(entry.shape, device="meta")
            for key, renamed in part.renamed(name, tensor):
                if key in origins:
                    other, _ = origins[key]
                    raise InputError(
                        f"{path}: tensors {other!r} and {name!r} are the same weight {key!r}; the "
                        "file mixes two layouts, use another")
                origins[key] = name, tuple(renamed.shape)

    where = path if len(part.files) == 1 else path.parent  # a file, or the folder of the shards
    check_fit(part.model, part.config, origins, where)
    if "F16" in example_of_dtype and "BF16" in example_of_dtype:
        # No writer mixes these. Bits of one that are read as the other are silently wrong numbers.
        raise InputError(
            f"{where}: tensor {example_of_dtype['F16']!r} is F16 but "
            f"{example_of_dtype['BF16']!r} is BF16: the file is damaged; fetch it again")
    return part


@functools.cache
def state_shapes(model: type[nn.Module], config: Any) -> dict[str, tuple]:
    """{name: shape} of the state of a network. A model is often opened several times in a run."""
    state = build_empty(model, config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def check_fit(
        model: type[nn.Module], config: Any, origins: dict[str, tuple[str, tuple]], where: Path):
    """InputError unless the names and shapes in `origins` are those of the network's state.

    origins: {name in the network: (name in the file, shape)}. where: the file, for messages.
    """
    expected = state_shapes(model, config)
    missing = [name for name in expected if name not in origins]
    unexpected = []
    misshapen = []
    for key, (name, shape) in origins.items():
        if key not in expected:
            unexpected.append(name)
        elif shape != expected[key]:
            misshapen.append(f"{name} is {list(shape)} instead of {list(expected[key])}")

    network = model.__name__
    foreign = keys.foreign_kind(unexpected)
    if foreign is not None and foreign[0] != f"a {network}":
        kind, _ = foreign
        raise InputError(f"{where} is {kind}; expected the weights of a {network}")
    problems = []
    for problem, names in (
            ("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)):
        if names:
            problems.append(f"{len(names)} {problem} ({keys.first_names(names)})")
    if problems:
        raise InputError(f"{where} does not fit a {network} with its config: {'; '.join(problems)}")


# Loading ----------------------------------------------------------------------------------------


def load_part(part: Part, dtype: torch.dtype | None = None, device: str | torch.device = "cpu",
              cast: bool = False) -> nn.Module:
    """Read one part's weights into its network, tensor by tensor: never two copies in memory.

    dtype: None keeps the file's; such weights stay mapped and cost memory only when they are used.
    cast: in float32, the large weights stay in the file's dtype too, see kernels/casting.py.
    """
    model = build_empty(part.model, part.config)
    kept_as_stored = casting.install(model) if cast and dtype == torch.float32 else ()
    state = {}
    for path, entries in part.files.items():
        for name, tensor in stream(path, entries):
            for key, weight in part.renamed(name, tensor):
                weight_dtype = None if key in kept_as_stored else dtype
                order = memory_format(dtype) if weight.ndim == 4 else torch.preserve_format
                state[key] = weight.to(device=device, dtype=weight_dtype, memory_format=order)
    model.load_state_dict(state, strict=True, assign=True)
    return model


def memory_format(dtype: torch.dtype | None) -> torch.memory_format:
    """The memory format of convolutions: channels-last in 16 bits.

    In bf16 it is up to 6 times faster on a CPU with AMX. In fp32 it gains little, and PyTorch's
    GroupNorm is then off by 2e-4 where the mean is 10 standard deviations.
    """
    if dtype is not None and dtype.itemsize == 2:
        return torch.channels_last
    return torch.preserve_format
