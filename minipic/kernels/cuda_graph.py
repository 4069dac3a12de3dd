"""CUDA graphs: many small kernels, recorded once and from then on started as one."""

from collections.abc import Callable
from contextvars import ContextVar

import torch

# Whether the code that runs now is being recorded: Python then takes no time to start kernels.
RECORDING = ContextVar("RECORDING", default=False)


def graph_helps(device: torch.device) -> bool:
    """Whether to draw with graphs by default: on NVIDIA's GPUs.

    AMD's, which PyTorch also calls "cuda", are untested.
    """
    return device.type == "cuda" and torch.version.hip is None


def graphed(function: Callable) -> Callable:
    """The same function, for calls whose tensors have the shapes and types of the first call's.

    It takes tensors on a GPU and returns one. A step of SDXL's UNet starts about 1800 kernels,
    which can take the CPU longer than the GPU needs for them. The first call runs `function` as it
    is and then records it. Later calls copy their arguments into the first call's tensors and
    replay the graph. What `function` reads besides its arguments must stay where it is in memory,
    and Python's numbers stay as recorded.
    """
    graph = torch.cuda.CUDAGraph()
    inputs = None  # the tensors that the graph reads
    output = None  # the tensor that it writes

    def run(*arguments):
        nonlocal inputs, output
        if inputs is None:
            copies = [x.clone() for x in arguments]
            first_output, output = record(function, copies, graph)
            inputs = copies
            return first_output
        for own, x in zip(inputs, arguments, strict=True):
            own.copy_(x)
        graph.replay()
        return output.clone()  # the next replay writes into `output`

    return run


def record(function: Callable, inputs: list[torch.Tensor],
           graph: "torch.cuda.CUDAGraph") -> tuple[torch.Tensor, torch.Tensor]:
    """Run function(*inputs), then record it: (its output, the tensor that the graph will write)."""
    token = RECORDING.set(True)
    try:
        # Kernels are loaded and chosen in a first run, which cannot be recorded.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            first_output = function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):  # records, and runs nothing
            output = function(*inputs)
    finally:
        RECORDING.reset(token)
    return first_output, output
