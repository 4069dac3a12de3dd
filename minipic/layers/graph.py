"""CUDA graphs: many small kernels, recorded once and from then on started as one."""

from contextvars import ContextVar

import torch

RECORDING = ContextVar("RECORDING", default=False)  # whether what runs becomes a graph, where starting a kernel is free


def pays(device):
    """Whether to draw with graphs if nobody says: on NVIDIA's GPUs. AMD's, to PyTorch also "cuda", are untested."""
    return device.type == "cuda" and torch.version.hip is None


def graphed(work):
    """The same function, tensors on a GPU -> tensor, for calls whose shapes and types are those of the first.

    A step of a UNet starts about 1800 kernels, which can take the CPU longer than the GPU needs for them. The first
    call runs `work` as it is, then records it; the others copy what they are given into the first call's tensors and
    replay. What `work` reads besides must stay where it is in memory, and numbers of Python stay as recorded.
    """
    graph, own, out = torch.cuda.CUDAGraph(), None, None

    def run(*given):
        nonlocal own, out
        if own is not None:
            for mine, x in zip(own, given, strict=True):
                mine.copy_(x)
            graph.replay()
            return out.clone()  # the next replay writes into `out`
        own, stream, token = [x.clone() for x in given], torch.cuda.Stream(), RECORDING.set(True)
        try:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # loads and chooses kernels, which cannot be recorded
                first = work(*own)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):  # runs nothing
                out = work(*own)
        finally:
            RECORDING.reset(token)
        return first

    return run
