"""What every room uses: a user's mistake, settings from JSON or the command line, and counter-based randomness."""

import argparse
import dataclasses
import hashlib
import re
import typing
from contextlib import contextmanager

import torch


class InputError(Exception):
    """A user's mistake in one sentence: which file, key or flag is wrong, and what to do. The scripts exit 2."""


def from_json(cls, values, fixed, where):
    """Fill the dataclass `cls` from an official config.json.

    `values`: the parsed JSON; `fixed`: {key: tuple of its supported values, or ... where any value changes nothing};
    `where`: the file, for messages. Keys with a leading underscore are the writer's notes.
    Raises InputError for an unknown key or an unsupported value: ignoring one would give silently wrong numbers.
    """
    known, found = {f.name: f.type for f in dataclasses.fields(cls)}, {}
    for key, value in values.items():
        value, allowed = tuple(value) if isinstance(value, list) else value, fixed.get(key, ...)
        if allowed is not ... and value not in allowed:
            raise InputError(f"{where}: {key}={value!r} is not supported (supported: {', '.join(map(repr, allowed))})")
        if key in known and not _fits(value, known[key]):
            raise InputError(f"{where}: {key}={value!r} is of the wrong type; fetch the file again or use "
                             "another model")
        if key in known:
            found[key] = value
        elif key not in fixed and not key.startswith("_"):
            raise InputError(f"{where}: unknown key {key!r} for {cls.__name__}; remove it or use a supported model")
    return cls(**found)


def _fits(value, kind):
    """Whether a value from JSON, lists made tuples, is of a field's type: int, tuple[int, ...], float | None, ..."""
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(x, inner[0]) for x in value)
    return any(_fits(value, x) for x in inner) if inner else type(value) in ((int, float) if kind is float else (kind,))


def option(default, help, choices=None):
    """A field of a recipe: its default, one line for --help, and the values allowed (None: any of its type)."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def bounded(kind):
    """`int` or `float` for argparse, without NaN, infinity and what fits no 64 bits: no flag can mean them."""
    def read(text):
        value = kind(text)
        if not abs(value) < 2**63:
            raise ValueError
        return value
    read.__name__ = kind.__name__  # argparse calls it so
    return read


@contextmanager
def enough_memory(remedy):
    """Makes an InputError that says the `remedy` of memory that runs out, a GPU's or the computer's."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # PyTorch has no one class for it
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        raise InputError(f"not enough memory; {remedy}") from error


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; --help lists every flag")


def from_argv(cls, argv, prog, positional=()):
    """Fill the dataclass `cls` from a command line: `--steps 500`, `--steps=500`, `--ema` / `--no-ema`.

    Every field is a flag (underscores become dashes); one of a tuple is given once for each value. Fields named in
    `positional` are given without a flag. Raises InputError for an unknown flag or a value of the wrong type.
    """
    parser = _Parser(prog, description=cls.__doc__, allow_abbrev=False,
                     formatter_class=lambda prog: argparse.ArgumentDefaultsHelpFormatter(prog, 32, 110))
    for f in dataclasses.fields(cls):
        kind, extra = f.type, {}
        if typing.get_origin(kind) is tuple:
            kind, extra = typing.get_args(kind)[0], {"nargs": "*"} if f.name in positional else {"action": "append"}
        if kind is bool:
            extra["action"] = argparse.BooleanOptionalAction
        else:
            extra.update(type=kind if kind is str else bounded(kind), choices=f.metadata.get("choices"))
            if f.name not in positional:
                extra["metavar"] = kind.__name__.upper()
        name = f.name if f.name in positional else "--" + f.name.rstrip("_").replace("_", "-")  # from_ is --from
        extra |= {} if f.name in positional else {"dest": f.name}
        default = None if extra.get("action") == "append" else f.default  # it would be appended to
        parser.add_argument(name, default=default, help=f.metadata.get("help"), **extra)
    given = {key: value for key, value in vars(parser.parse_args(argv)).items() if value is not None}
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})


def computes_bf16(device):
    """Whether this kind of torch.device multiplies in bf16; a CPU that does not takes up to 50 times fp32's time."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("avx512_bf16", "amx_tile") if device.type == "cpu" else ()
    return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in names)


def random(*key):
    """A CPU generator that is a pure function of `key`, e.g. random(seed, "noise", step, index).

    Training draws every number from such a generator, so resuming, the number of processes and the number of workers
    do not change what is trained.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
