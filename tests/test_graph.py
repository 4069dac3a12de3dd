"""Drawing with CUDA graphs: the pictures are those drawn without.

Where there is no GPU a recorder stands for the CUDA graph. As the real one does, it keeps the operations of one call
with the memory that they read and wrote, and runs them there again: what a step forgets to hand over stays as it was.
"""

import contextlib
import importlib.util
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import tiny
import torch
from conftest import GPU
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample
from minipic import pipeline as pipelines
from minipic.common import InputError
from minipic.image import open_picture, to_tensor
from minipic.kernels.cuda_graph import RECORDING, graph_helps, graphed
from minipic.kernels import norm_backend
from minipic.layers import attention
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
    made, check = [], pipelines.check_against_model
    if GPU:
        return made
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {"CUDAGraph": lambda: made.append(Recorder()) or made[-1], "graph": lambda graph: graph,
                           "Stream": lambda: stream, "current_stream": lambda: stream,
                           "stream": lambda stream: contextlib.nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    # With `graph`, the check asks for a GPU.
    monkeypatch.setattr(pipelines, "check_against_model", lambda settings, model: check(replace(settings, graph=None), model))
    return made


def final(pipeline, **settings):
    return list(pipeline.latents(**({"prompt": tiny.PROMPT, "steps": 5, "n": 2, "negative": tiny.NEGATIVE} | settings)))[-1]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    {}, {"sampler": "heun", "guidance_rescale": 0.7}, {"sampler": "dpmpp_2m", "guidance": 1.0, "size": (64, 48)},
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


def test_flags_and_the_default(graphs, tmp_path, monkeypatch):
    flags = ["a red cube", "--model", str(tiny.folder()), "--steps", "4", "--n", "1", "--device", DEVICE, "--dtype", "fp32"]
    for kind, helps, replays in ((["--no-graph"], True, 0), (["--graph"], False, 3), ([], True, 3), ([], False, 0)):
        monkeypatch.setattr(pipelines, "graph_helps", lambda device: helps)
        graphs.clear()
        assert sample.main([*flags, "--out", str(tmp_path / "drawn.png"), *kind]) == 0
        assert GPU or sum(graph.replays for graph in graphs) == replays
    levels = [to_tensor(open_picture(path)) for path in sorted(tmp_path.iterdir())]
    assert len(levels) == 4 and all((levels[0] - other).abs().max() <= 2 / 255 for other in levels)


def test_graphs_are_the_default_on_nvidias_gpus(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    assert graph_helps(torch.device("cuda:1"))
    assert not graph_helps(torch.device("cpu")) and not graph_helps(torch.device("mps"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not graph_helps(torch.device("cuda"))


def test_our_kernels_are_for_graphs_in_16_bits(graphs, monkeypatch):
    monkeypatch.setattr(norm_backend, "triton_works", lambda device: device == "cuda:0")

    def chosen(dtype, is_cuda=True):
        return norm_backend.choose_norm_backend(SimpleNamespace(is_cuda=is_cuda, dtype=dtype, device="cuda:0"))
    found = []
    run = graphed(lambda x: found.append([chosen(torch.bfloat16), chosen(torch.float16), chosen(torch.float32),
                                          chosen(torch.bfloat16, is_cuda=False)]) or x + 1)
    assert chosen(torch.bfloat16) == "plain"
    with torch.no_grad():
        run(torch.ones(2, device=DEVICE))
    assert found == 2 * [["triton", "triton", "plain", "plain"]]  # what is recorded was prepared
    graphed(lambda x: found.append(chosen(torch.bfloat16)) or x + 1)(torch.ones(2, device=DEVICE))
    assert found[-1] == "plain"  # these kernels have no backward pass
    with pytest.raises(ZeroDivisionError):
        graphed(lambda x: x / (1 // 0))(torch.ones(2, device=DEVICE))
    assert not RECORDING.get() and chosen(torch.bfloat16) == "plain"


def test_flash_attention_is_for_graphs_on_the_gpu_where_it_was_measured_ahead(graphs, monkeypatch):
    capability = mock.Mock(return_value=(9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(attention, "triton_works", lambda device: True)

    def chosen(keys, d=64, dtype=torch.bfloat16, **hidden):
        q = SimpleNamespace(device=torch.device("cuda:0"), is_cuda=True, dtype=dtype, shape=(2, 4096, 10, d))
        return attention.choose_backend(q, torch.empty(2, keys, 10, d, device="meta"), **hidden)
    found = []

    def work(x):
        found.append([chosen(77), chosen(4096), chosen(77, 128), chosen(77, dtype=torch.float32),
                      chosen(77, hides_keys=True)])
        return x + 1
    with torch.no_grad():
        assert chosen(77) == "sdpa"  # started by itself, it is slower
        graphed(work)(torch.ones(2, device=DEVICE))
        assert found == 2 * [["flash", "flash", "sdpa", "sdpa", "sdpa"]]
        capability.return_value = (8, 0)
        graphed(work)(torch.ones(2, device=DEVICE))
    assert found[-1] == 5 * ["sdpa"]  # not measured


def test_where_triton_does_not_work_pytorch_draws(monkeypatch):
    works = norm_backend.triton_works.__wrapped__
    if importlib.util.find_spec("triton"):
        assert works(DEVICE)
    monkeypatch.setattr(norm_backend, "fused_kernels", mock.Mock(side_effect=RuntimeError("no C compiler")))
    with pytest.warns(UserWarning, match="Triton does not work here, so drawing is slower: no C compiler"):
        assert not works(DEVICE)


def test_a_graph_needs_a_gpu():
    with pytest.raises(InputError, match="graph: is for NVIDIA's GPUs, and this draws on cpu; leave it out"):
        Pipeline.load(tiny.folder()).generate(tiny.PROMPT, graph=True)
