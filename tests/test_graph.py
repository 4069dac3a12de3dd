"""Drawing with CUDA graphs: the pictures are those drawn without.

Where there is no GPU a recorder stands for the CUDA graph. As the real one does, it keeps the operations of one call
with the memory that they read and wrote, and runs them there again: what a step forgets to hand over stays as it was.
"""

import contextlib
from types import SimpleNamespace

import pytest
import tiny
import torch
from conftest import GPU
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample
from minipic.common import InputError
from minipic.image import open_picture, to_tensor
from minipic.layers.graph import graphed
from minipic.models.controlnet import ControlNet
from minipic.pipeline import Pipeline
from peers import fill
from test_pipeline import mask, picture

DEVICE = "cuda" if GPU else "cpu"


class Recorder(TorchDispatchMode):
    """torch.cuda.CUDAGraph and, as a context, torch.cuda.graph."""

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, out))
        return out

    def replay(self):
        self.replays += 1
        for operation, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(operation(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """The recorders made; without a GPU, which needs none."""
    made, plan = [], Pipeline.plan
    if GPU:
        return made
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {"CUDAGraph": lambda: made.append(Recorder()) or made[-1], "graph": lambda graph: graph,
                           "Stream": lambda: stream, "current_stream": lambda: stream,
                           "stream": lambda stream: contextlib.nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(Pipeline, "plan", lambda self, *given: plan(self, *given[:-1]))  # it would ask for a GPU
    return made


def final(pipeline, **settings):
    return list(pipeline.latents(**({"prompt": tiny.PROMPT, "steps": 5, "n": 2, "negative": tiny.NEGATIVE} | settings)))[-1]


@pytest.mark.parametrize("settings", [
    {}, {"sampler": "heun", "rescale": 0.7}, {"sampler": "dpmpp_2m", "guidance": 1.0, "size": (64, 48)},
    {"sampler": "euler_ancestral", "image": picture(), "strength": 0.9}, {"image": picture(), "mask": mask()},
    {"control": [(picture(1), 0.8)]}], ids=lambda settings: "+".join(settings) or "plain")
def test_pictures_are_the_same(settings, graphs):
    pipeline = Pipeline.load(tiny.folder(), device=DEVICE)
    if "control" in settings:
        pipeline.controlnet = fill(ControlNet.from_unet(pipeline.unet, pipeline.vae.config.factor))
    for more in ({}, {"prompt": "a cyan torus", "seed": 5}):
        expected = final(pipeline, **settings, **more)
        found = final(pipeline, **settings, **more, graph=True)
        assert torch.allclose(found, expected, atol=1e-5 if GPU else 0, rtol=0)
    assert GPU or len(graphs) == 2 and all(graph.replays > 1 for graph in graphs)


def test_answers_and_what_is_given_outlive_the_next_call(graphs):
    run, given = graphed(lambda x, y: x * y + 1), [torch.full((3,), float(i), device=DEVICE) for i in range(5)]
    answers = [run(x, y) for x, y in zip(given, given[1:])]
    assert [answer.tolist() for answer in answers] == [3 * [float(i * (i + 1) + 1)] for i in range(4)]
    assert [x.tolist() for x in given] == [3 * [float(i)] for i in range(5)]


def test_the_flag_draws_with_one(graphs, tmp_path):
    flags = ["a red cube", "--model", str(tiny.folder()), "--steps", "4", "--n", "1", "--device", DEVICE, "--dtype", "fp32"]
    for name in ("plain", "graph"):
        more = ["--graph"] if name == "graph" else []
        assert sample.main([*flags, "--out", str(tmp_path / f"{name}.png"), *more]) == 0
        assert GPU or sum(graph.replays for graph in graphs) == 3 * len(more)
    levels = [to_tensor(open_picture(tmp_path / f"{name}.png")) for name in ("plain", "graph")]
    assert (levels[0] - levels[1]).abs().max() <= 2 / 255


def test_a_graph_needs_a_gpu():
    with pytest.raises(InputError, match="--graph: is for NVIDIA's GPUs, and this draws on cpu; leave it out"):
        Pipeline.load(tiny.folder()).generate(tiny.PROMPT, graph=True)
