"""Random choices with a torch.Generator, for captions, edits and tasks."""

from collections.abc import Sequence
from typing import Any

import torch


def chance(probability: float, generator: torch.Generator) -> bool:
    """True with this probability."""
    return torch.rand((), generator=generator).item() < probability


def between(low: float, high: float, generator: torch.Generator) -> float:
    """A number from low to high."""
    return low + (high - low) * torch.rand((), generator=generator).item()


def one_of(options: Sequence, generator: torch.Generator) -> Any:
    """One of a sequence, each as likely as any other."""
    return options[torch.randint(len(options), (), generator=generator).item()]
