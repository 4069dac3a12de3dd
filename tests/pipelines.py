"""The same drawing here and in diffusers, both in float64, for the tests of whole pipelines.

In float32 the order of a sum decides the last digit. CPUs differ in that order, and the steps of a
network with random weights can multiply the difference by thousands: a bound for float32 would be
too wide, or wrong on some CPU. In float64 two programs differ only if their formulas do.
"""

import contextlib
import functools
from pathlib import Path

import pytest
import tiny
import torch
from goldens.make_samplers import CLASSES

from minipic.pipeline import Pipeline
from tiny import PROMPT

STEPS, SEED = 8, 3
FLOAT32 = torch.float32


@contextlib.contextmanager
def in_float64():
    """Inside, programs that ask for float32 get float64, here and in diffusers.

    Only noise is drawn in float32 and widened: the random stream of float64 is another one.
    """
    randn = torch.randn

    def widened_randn(*size, dtype=None, **given):
        return randn(*size, dtype=FLOAT32, **given).double()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(torch, "randn", widened_randn)
        yield


@functools.cache
def load64(folder: Path) -> Pipeline:
    """The model in a folder with float64 weights, loaded once in a test run.

    No test may change it.
    """
    pipeline = Pipeline.load(folder).double()
    pipeline.schedule.table  # made now, in float32, as diffusers makes its own
    return pipeline


def final(pipeline: Pipeline, prompt: str = PROMPT, **settings) -> torch.Tensor:
    """The latents of the finished pictures [n,4,h,w]."""
    *_, last = pipeline.latents(prompt, **settings)
    return last


def final64(pipeline: Pipeline, **settings) -> torch.Tensor:
    """The latents that `peer_latents` should give too. The pipeline is one of `load64`."""
    with in_float64():
        return final(pipeline, **{"steps": STEPS, "seed": SEED, "n": 2, **settings})


@functools.cache
def peer(name: str, folder: Path):
    """diffusers' pipeline for the weights in a folder, in float64, and its scheduler's config."""
    diffusers = pytest.importorskip("diffusers")
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    pytest.importorskip("transformers").logging.set_verbosity_error()
    pipeline = getattr(diffusers, name).from_pretrained(folder).to(torch.float64)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, pipeline.scheduler.config


def peer_latents(name: str, folder: Path, sampler: str = "euler", **given) -> torch.Tensor:
    """The latents of the pictures that diffusers' pipeline draws. `given`: its own parameters."""
    pipeline, scheduler = peer(name, folder)
    return run_peer(pipeline, scheduler, sampler, **given)


def run_peer(pipeline, scheduler: dict, sampler: str = "euler", **given) -> torch.Tensor:
    """The same with a pipeline that is already there. scheduler: the config of its scheduler."""
    pipeline.scheduler = getattr(pytest.importorskip("diffusers"), CLASSES[sampler]).from_config(scheduler)
    set_timesteps = pipeline.scheduler.set_timesteps

    def widened_set_timesteps(*given, **more):
        set_timesteps(*given, **more)
        if sampler != "ddim":  # which has no sigmas
            pipeline.scheduler.sigmas = pipeline.scheduler.sigmas.double()

    pipeline.scheduler.set_timesteps = widened_set_timesteps
    generators = [torch.Generator().manual_seed(SEED + i) for i in range(2)]
    given = {"prompt": PROMPT, "num_inference_steps": STEPS, "output_type": "latent", **given}
    with in_float64():
        return pipeline(num_images_per_prompt=2, generator=generators, **given).images


def assert_same(found: torch.Tensor, expected: torch.Tensor, sampler: str = "euler"):
    """Equal to 1e-9 standard deviations of the latents.

    With ddim to 1e-6, for which diffusers keeps a table of abar in float32, and we one of sigma.
    """
    bound = 1e-6 if sampler == "ddim" else 1e-9
    assert found.shape == expected.shape and found.dtype == expected.dtype == torch.float64
    assert (found - expected).abs().max() < bound * expected.std()
