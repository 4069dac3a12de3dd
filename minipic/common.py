"""What every room uses: the users' mistakes, checked configs, counter-based randomness."""

import dataclasses
import hashlib
import re
import typing
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]  # the checkout, from which minipic is used without installation


class InputError(Exception):
    """A user's mistake in one sentence: which file, key or value is wrong, and what to do about it.

    The scripts print it and exit with code 2.
    """


class ParameterError(InputError):
    """A mistake in the value of one parameter of a function, or of one setting.

    From Python it reads "steps: choose 1 or more, not 0"; the scripts write the same with their
    flag, "--steps: ...".
    """

    def __init__(self, parameter: str, problem: str):
        super().__init__(f"{parameter}: {problem}")
        self.parameter = parameter
        self.problem = problem

    def as_flag(self) -> str:
        """The message in the words of a command line."""
        return f"{flag_of(self.parameter)}: {self.problem}"


def flag_of(field: str) -> str:
    """The flag of a settings field: "image_guidance" -> "--image-guidance", "from_" -> "--from"."""
    return "--" + field.rstrip("_").replace("_", "-")


def message_of(error: Exception) -> str:
    """What a script prints of an error."""
    return error.as_flag() if isinstance(error, ParameterError) else str(error)


def find_file(path: str | Path) -> Path:
    """A path as given; one that does not exist here is looked for beside the package.

    So "weights/tiny" is found from any folder.
    """
    path = Path(path)
    beside = ROOT / path
    return beside if not path.exists() and beside.exists() else path


class CheckedConfig:
    """A config dataclass that checks itself when it is made, from Python as from JSON.

    It checks the types of all fields, and ranges by LIMITS, {field: (smallest, largest)}, which
    hold for each number of a tuple. Other fields are not limited. Raises ParameterError.
    """

    LIMITS = {}

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not has_type(value, field.type):
                is_class = isinstance(field.type, type)
                expected = field.type.__name__ if is_class else field.type
                raise ParameterError(
                    field.name, f"{value!r} is of the wrong type; expected {expected}")
            if field.name in self.LIMITS and value is not None:
                low, high = self.LIMITS[field.name]
                for number in value if isinstance(value, tuple) else (value,):
                    if not low <= number <= high:
                        raise ParameterError(
                            field.name, f"{value!r} is out of range; expected {low} to {high}")


def has_type(value, kind) -> bool:
    """Whether a value has the type of a field: int, float (or int), tuple[int, ...], X | None."""
    alternatives = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        if alternatives[-1] is ...:
            alternatives = alternatives[:1] * len(value)
        return len(value) == len(alternatives) and all(map(has_type, value, alternatives))
    if alternatives:
        return any(has_type(value, alternative) for alternative in alternatives)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


@contextmanager
def enough_memory(remedy: str):
    """Turns "out of memory", of a GPU or the computer, into an InputError with the `remedy`."""
    try:
        yield
    except MemoryError as error:
        raise InputError(f"not enough memory; {remedy}") from error
    except RuntimeError as error:  # PyTorch has no class of its own for the computer's memory
        if not re.search("out of memory|allocate memory", str(error)):
            raise
        raise InputError(f"not enough memory; {remedy}") from error


def computes_bf16(device: torch.device) -> bool:
    """Whether a device of this kind multiplies in bf16. Other CPUs need up to 50 times longer."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    return cpu_has("avx512_bf16") or cpu_has("amx_tile")


def cpu_has(capability: str) -> bool:
    """Whether this CPU has "avx512_bf16" (bf16 products) or "amx_tile" (a matrix unit for them)."""
    # Not every version of PyTorch has both names.
    probe = getattr(torch.cpu, f"_is_{capability}_supported", None)
    return probe is not None and probe()


def rng(*key) -> torch.Generator:
    """A CPU generator that is a pure function of `key`, such as rng(seed, "noise", step, index).

    Training draws every number from such a generator. So neither a resumed run nor another number
    of processes changes what is trained.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    seed = int.from_bytes(digest[:8], "little") >> 1
    return torch.Generator().manual_seed(seed)
