"""Which kernels compute norms and gates: PyTorch's functions one after another, or norms.py."""

import functools
import warnings
from types import ModuleType

import torch

from minipic.common import InputError
from minipic.kernels.cuda_graph import RECORDING


def choose_norm_backend(x: torch.Tensor) -> str:
    """The backend of the norms and of `geglu`: "triton" for drawing in 16 bits with a CUDA graph.

    SDXL's step on an H200 is 1.4 times as fast with these kernels. Without a graph, Python starts
    them more slowly than the GPU runs them. They have no backward pass.
    """
    in_graph = RECORDING.get() and not torch.is_grad_enabled()
    if in_graph and x.is_cuda and x.dtype.itemsize == 2 and triton_works(x.device):
        return "triton"
    return "plain"


@functools.cache
def triton_works(device: torch.device) -> bool:
    """Whether Triton works here. It needs tools that not every computer has, as a C compiler."""
    try:
        fused_kernels(torch.ones(1), "triton").geglu(torch.ones(1, 2, device=device))
    except Exception as error:  # its tools fail in many ways; PyTorch's kernels do the same
        reason = str(error) or type(error).__name__
        warnings.warn(f"Triton does not work here, so drawing is slower: {reason}", stacklevel=2)
        return False
    return True


def fused_kernels(x: torch.Tensor, backend: str | None) -> ModuleType | None:
    """The module kernels/norms.py for the backend "triton"; None for "plain", PyTorch's functions.

    Raises InputError for a backend that does not exist or is not installed.
    """
    backend = backend or choose_norm_backend(x)
    if backend not in ("plain", "triton"):
        raise InputError(f"norm backend {backend!r} does not exist; use 'plain' or 'triton'")
    if backend == "plain":
        return None
    try:
        from minipic.kernels import norms
    except ImportError as error:
        raise InputError("norm backend 'triton' needs the triton package, which comes with PyTorch "
                         "for CUDA; use 'plain'") from error
    return norms
