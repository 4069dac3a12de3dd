"""What every room uses: the users' mistakes, checked configs, the computer, randomness by counters.

These are few lines each, and all lie below every other room.
"""

import dataclasses
import hashlib
import os
import re
import stat
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]  # the checkout, from which minipic is used without installation
SMALL_MODEL = 1 << 27  # bytes of weights up to which one thread computes; see choose_threads
LONGEST_MESSAGE = 2000  # characters
SPECIAL_FILES = {  # that could be waited for without end, or hold something else at every look
    stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device"}


def printable(text: str) -> str:
    """A text from a file, safe to print.

    What is no printable character is escaped: a terminal would obey it. A very long text loses its
    middle.
    """
    half = LONGEST_MESSAGE // 2
    if len(text) > LONGEST_MESSAGE:
        text = f"{text[:half]} ... {text[-half:]}"
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class InputError(Exception):
    """A user's mistake in one sentence: which file, key or value is wrong, and what to do about it.

    The scripts print it and exit with code 2. Names and words from files may be put into it as they
    are.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


class ParameterError(InputError):
    """A mistake in the value of one parameter of a function, or of one setting.

    From Python it reads "steps: choose 1 or more, not 0"; the scripts write the same with their
    flag, "--steps: ...".
    """

    def __init__(self, parameter: str, problem: str):
        super().__init__(f"{parameter}: {problem}")
        self.parameter = parameter
        self.problem = printable(problem)

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
    if not isinstance(path, (str, Path)):
        raise InputError(f"{path!r} is no file and no folder; give its path")
    path = Path(path)
    beside = ROOT / path
    try:
        return beside if not path.exists() and beside.exists() else path
    except OSError as error:  # a name that is too long, or a folder that must not be read
        raise InputError(f"{path}: cannot be opened ({error.strerror}); give its path") from None


def real_path(path: str | Path) -> Path:
    """An absolute path without links. Unlike Path.resolve it allows links that form a circle."""
    return Path(os.path.realpath(path))


def check_ordinary(path: str | Path):
    """InputError for a pipe, a socket or a device, which a reader must not open, and for no name.

    Folders and missing files pass: the system refuses to read them.
    """
    try:
        kind = SPECIAL_FILES.get(stat.S_IFMT(os.stat(path).st_mode))
    except OSError:
        return
    except ValueError:  # a zero byte, or half a surrogate pair, as JSON can hold
        raise InputError(f"{path} cannot be the name of a file") from None
    if kind is not None:
        raise InputError(f"{path} is {kind}; give an ordinary file")


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


def has_type(value: Any, kind: Any) -> bool:
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
def enough_memory(remedy: str) -> Iterator[None]:
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


def choose_threads(num_bytes: int):
    """Let one thread compute a model whose weights take no more than SMALL_MODEL bytes.

    Its products are so small that threads spend their time waiting for each other: on a busy
    machine PyTorch's default, a thread per core, took 2 to 8 times the processor time. Larger
    models keep that default. The user's environment variable OMP_NUM_THREADS wins.
    """
    if num_bytes <= SMALL_MODEL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def rng(*key: object) -> torch.Generator:
    """A CPU generator that is a pure function of `key`, such as rng(seed, "noise", step, index).

    Training draws every number from such a generator. So neither a resumed run nor another number
    of processes changes what is trained.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    seed = int.from_bytes(digest[:8], "little") >> 1
    return torch.Generator().manual_seed(seed)
