"""The samplers against diffusers, k-diffusion and the exact solution for Gaussian data; image-to-image, inpainting."""

import dataclasses
import math
from typing import NamedTuple

import pytest
import torch
from goldens.make_samplers import (CLASSES, CONFIG, FLOW, FLOW_CLASSES, HERE, SHAPE, STD, STEPS, cases, draw_diffusers,
                                   draw_noise, gaussian, generators, with_generators)
from safetensors.torch import load_file

from minipic.diffusion.samplers import SAMPLERS, keep_unmasked
from minipic.diffusion.schedule import SAMPLER_OF, Schedule
from minipic.weights.configs import read_config

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own


class Known(NamedTuple):
    """What is known of a sampler."""

    order: int | None  # of convergence; None for one that adds noise, which follows no single solution
    calls: int  # of the network in three steps, the last of which goes to noise level 0
    looks_back: bool = False  # whether a step uses the predictions of earlier ones


KNOWN = {
    "euler": Known(order=1, calls=3),
    "euler_ancestral": Known(order=None, calls=3),
    "ddim": Known(order=1, calls=3),
    "dpmpp_2m": Known(order=2, calls=3, looks_back=True),
    "heun": Known(order=2, calls=5),
    "flow_euler": Known(order=1, calls=3),
}
PEERS = CLASSES | FLOW_CLASSES  # diffusers' class that draws the same
WITHOUT_PEER = set()  # samplers that diffusers does not have
K_DIFFUSION = load_file(HERE / "samplers_k_diffusion.safetensors")


def test_the_tables_know_every_sampler():
    assert KNOWN.keys() == SAMPLERS.keys()
    assert PEERS.keys() == SAMPLERS.keys() - WITHOUT_PEER


@pytest.mark.parametrize("sampler", PEERS)
def test_a_file_that_names_a_scheduler_is_drawn_by_its_sampler(sampler):
    named = SAMPLER_OF[PEERS[sampler]]
    assert SAMPLERS[named] is SAMPLERS[sampler] and PEERS[named] == PEERS[sampler]
    assert read_config(Schedule, config_of(sampler)).sampler == named


def config_of(sampler):
    """A scheduler_config.json of a model that the sampler can draw with, asking for it where diffusers has it."""
    config = FLOW if sampler in FLOW_CLASSES else CONFIG
    return config | {"_class_name": PEERS.get(sampler, config["_class_name"])}


def last(steps):
    *_, (x, _) = steps
    return x


def best_denoiser(schedule, grid):
    """denoise(x, sigma) for N(0, STD^2) data on a grid."""
    predict = gaussian(schedule.table.numpy(), schedule.prediction_type)
    return schedule.objective.denoiser(predict, grid)


def draw(schedule, sampler, steps=STEPS):
    """A whole drawing of N(0, STD^2) data -> the latent that a pipeline would decode."""
    grid, streams = schedule.grid(steps, sampler), generators()
    denoise = best_denoiser(schedule, grid)
    x = grid.start * draw_noise(streams)
    x = last(SAMPLERS[sampler](denoise, x, grid.sigmas, lambda i: draw_noise(streams)))
    return schedule.objective.network_input(x, grid.sigmas[-1])


@pytest.mark.parametrize("sampler, spacing, karras, prediction", [*cases()])
def test_equals_diffusers(sampler, spacing, karras, prediction):
    name = f"{sampler}.{spacing}.{'karras' if karras else 'plain'}.{prediction}"
    expected = load_file(HERE / "samplers_diffusers.safetensors")[name]
    schedule = dataclasses.replace(Schedule(), timestep_spacing=spacing, use_karras_sigmas=karras,
                                   prediction_type=prediction)
    torch.testing.assert_close(draw(schedule, sampler), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [4, 7, 25])
@pytest.mark.parametrize("sampler", PEERS)
def test_equals_diffusers_live(sampler, steps):
    pytest.importorskip("diffusers")
    changes = [{}, {"timestep_spacing": "trailing"}, {"set_alpha_to_one": True}, {"steps_offset": 0}]
    if sampler == "ddim" and 1000 % steps:
        changes.pop(1)  # diffusers' DDIM leaves its own trailing grid where steps do not divide 1000
    if sampler in FLOW_CLASSES:
        changes = [{}, {"shift": 1.0}]
    for change in changes:
        config = config_of(sampler) | change
        latent = draw(read_config(Schedule, config), sampler, steps)
        torch.testing.assert_close(latent, draw_diffusers(sampler, config, steps)[0], rtol=0, atol=1e-5)


def test_ddim_step_equals_diffusers_on_any_spacing():
    """diffusers' DDIM always goes down 1000 // steps timesteps, which on linspace is not where it calls next."""
    diffusers = pytest.importorskip("diffusers")
    config = CONFIG | {"timestep_spacing": "linspace"}
    scheduler, schedule = diffusers.DDIMScheduler.from_config(config), read_config(Schedule, config)
    scheduler.set_timesteps(STEPS)
    predict = gaussian(schedule.table.numpy(), "epsilon")
    denoise, xt = schedule.objective.denoiser(predict), draw_noise(generators())
    for t in scheduler.timesteps:
        sigmas = schedule.sigma(torch.stack([t, t - 1000 // STEPS])).float()  # clamped at t = 0, whose level ends it
        x = last(SAMPLERS["ddim"](denoise, xt * (sigmas[0] ** 2 + 1) ** 0.5, sigmas))
        xt = scheduler.step(predict(xt, t), t, xt).prev_sample
        torch.testing.assert_close(schedule.objective.network_input(x, sigmas[1]), xt, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name in K_DIFFUSION])
def test_equals_k_diffusion(sampler):
    def denoise(x, sigma):
        return x * STD**2 / (sigma**2 + STD**2)

    steps = SAMPLERS[sampler](denoise, K_DIFFUSION["x"], K_DIFFUSION["sigmas"], lambda i: K_DIFFUSION["fresh"][i])
    torch.testing.assert_close(last(steps), K_DIFFUSION[sampler], rtol=0, atol=1e-5)


def order(sampler, denoise, exact, sigmas):
    """Measured order of convergence: log2 of the factor by which the error falls when steps are halved."""
    errors = [(last(SAMPLERS[sampler](denoise, exact(s[0]), s)) - exact(s[-1])).abs().max()
              for s in (sigmas(64), sigmas(128))]
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("sampler", [name for name in KNOWN if KNOWN[name].order])
def test_order_of_convergence(sampler):
    """For N(0, STD^2) data the solution through x is in proportion to the standard deviation at its noise level.

    That is sqrt(sigma^2 + STD^2), and on the line x = (1 - t) x0 + t noise it is sqrt((1 - t)^2 STD^2 + t^2).
    """
    def share_of_data(sigma):
        return 1 - sigma if sampler in FLOW_CLASSES else 1.0

    def deviation(sigma):
        return (share_of_data(sigma) ** 2 * STD**2 + sigma**2) ** 0.5 * torch.ones(1, dtype=torch.float64)

    def denoise(x, sigma):
        return x * share_of_data(sigma) * STD**2 / deviation(sigma) ** 2

    def sigmas(n):
        if sampler in FLOW_CLASSES:
            return torch.linspace(1, 0, n + 1, dtype=torch.float64)
        return torch.logspace(1, -1, n + 1, dtype=torch.float64)

    measured = order(sampler, denoise, deviation, sigmas)
    assert abs(measured - KNOWN[sampler].order) < 0.1, measured


def test_one_step_of_flow_with_the_true_velocity_lands_on_the_data():
    objective = Schedule(prediction_type="flow", class_name="FlowMatchEulerDiscreteScheduler", shift=3.0).objective
    noise, x0 = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for steps in (1, 2, 10):
        grid = objective.schedule.grid(steps)
        denoise = objective.denoiser(lambda x, t: noise - x0, grid)
        torch.testing.assert_close(last(SAMPLERS["flow_euler"](denoise, noise, grid.sigmas)), x0)


def test_two_equal_noise_levels_are_no_division_by_nothing():
    """999 steps with the leading spacing begin at a timestep 1000 that there is not."""
    assert draw(Schedule(), "dpmpp_2m", 999).isfinite().all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_step_is_yielded_at_its_noise_level(sampler):
    """With x0 known to be 0 all that is left in x is noise, of standard deviation sigma after every step."""
    sigmas = torch.tensor([8.0, 3, 1, 0.4, 0])
    generator = torch.Generator().manual_seed(0)
    draw = lambda i: torch.randn(200_000, generator=generator)
    steps = list(SAMPLERS[sampler](lambda x, sigma: x * 0, sigmas[0] * draw(0), sigmas, draw))
    assert len(steps) == 4
    for (x, x0), sigma in zip(steps, sigmas[1:]):
        assert not x0.any() and abs(x.std() - sigma) <= 0.01 * sigma + 1e-6  # 0.01 is six standard errors


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noise_may_be_left_to_the_sampler(sampler):
    sigmas, x = torch.tensor([8.0, 3.0, 1.0, 0.0]), torch.full((1, 4, 2, 2), 8.0)
    draws = []
    for noise in (None, lambda i: torch.randn_like(x)):
        torch.manual_seed(0)
        draws.append(last(SAMPLERS[sampler](lambda x, sigma: x / (1 + sigma**2), x, sigmas, noise)))
    assert torch.equal(*draws)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_calls_of_the_network(sampler):
    """A sampler that adds noise asks for it once per step, in order; the others never do."""
    calls, asked = [], []

    def denoise(x, sigma):
        calls.append(sigma)
        return x * 0

    def noise(i):
        asked.append(i)
        return 0

    last(SAMPLERS[sampler](denoise, torch.ones(2), torch.tensor([2.0, 1, 0.5, 0]), noise))
    assert len(calls) == KNOWN[sampler].calls
    assert asked == ([] if KNOWN[sampler].order else [0, 1, 2])


def inpaint_diffusers(sampler, known, noise, mask, strength):
    """The loop of StableDiffusionXLInpaintPipeline with a four-channel UNet."""
    import diffusers

    scheduler = getattr(diffusers, CLASSES[sampler]).from_config(CONFIG)
    scheduler.set_timesteps(STEPS)
    first = (STEPS - int(STEPS * strength)) * scheduler.order
    timesteps = scheduler.timesteps[first:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    predict = gaussian(Schedule().table.numpy(), "epsilon")
    extra = with_generators(scheduler, generators())
    x = scheduler.add_noise(known, noise, timesteps[:1])
    for i, t in enumerate(timesteps):
        x = scheduler.step(predict(scheduler.scale_model_input(x, t), t), t, x, **extra).prev_sample
        kept = known if i == len(timesteps) - 1 else scheduler.add_noise(known, noise, timesteps[i + 1:i + 2])
        x = (1 - mask) * kept + mask * x
    return x


@pytest.mark.parametrize("sampler", CLASSES)
@pytest.mark.parametrize("covers", ["all", "half"])
def test_image_to_image_and_inpainting_equal_diffusers(sampler, covers):
    pytest.importorskip("diffusers")
    known, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(SHAPE[0], 1, *SHAPE[2:])
    if covers == "half":
        mask[..., :2] = 0
    schedule, streams = Schedule(), generators()
    grid = schedule.grid(STEPS, sampler).strength(0.6)
    x = schedule.objective.add_noise(known, noise, grid.sigmas[0])
    steps = SAMPLERS[sampler](best_denoiser(schedule, grid), x, grid.sigmas, lambda i: draw_noise(streams))
    x = last(keep_unmasked(steps, schedule.objective.add_noise, known, noise, mask, grid.sigmas))
    x = schedule.objective.network_input(x, grid.sigmas[-1])
    x = mask * x + (1 - mask) * known
    torch.testing.assert_close(x, inpaint_diffusers(sampler, known, noise, mask, 0.6), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_keep_puts_the_known_part_back_at_every_level(sampler):
    known, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(SHAPE[0], 1, *SHAPE[2:])
    mask[..., :2] = 0
    flow = sampler in FLOW_CLASSES
    add_noise = read_config(Schedule, config_of(sampler)).objective.add_noise
    sigmas = torch.tensor([0.9, 0.6, 0.3, 0] if flow else [9.0, 4, 1, 0])
    seen = {}  # noise level: the known part of what the network saw there last, when a step began

    def denoise(x, sigma):
        seen[sigma.item()] = x[..., :2].clone()
        return x / (1 + sigma**2)

    streams = generators()
    start = add_noise(known, noise, sigmas[0])
    steps = SAMPLERS[sampler](denoise, start, sigmas, lambda i: draw_noise(streams))
    x = last(keep_unmasked(steps, add_noise, known, noise, mask, sigmas))
    assert list(seen) == sigmas[:-1].tolist()
    for sigma, part in seen.items():  # the network saw the edited x
        expected = (1 - sigma) * known + sigma * noise if flow else known + sigma * noise
        torch.testing.assert_close(part, expected[..., :2])
    assert torch.equal(x[..., :2], known[..., :2]) and (x - known)[..., 2:].abs().max() > 0.1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_handing_over_changes_only_what_looks_back(sampler):
    """Two models that draw together: the second goes on where the first stopped, without its past predictions."""
    schedule = read_config(Schedule, config_of(sampler))
    grid = schedule.grid(STEPS, sampler)
    results = []
    for parts in ([grid], [grid.part(end=0.8), grid.part(start=0.8)]):
        streams = generators()
        x = grid.start * draw_noise(streams)
        for part in parts:
            x = last(SAMPLERS[sampler](best_denoiser(schedule, grid), x, part.sigmas, lambda i: draw_noise(streams)))
        results.append(x)
    assert torch.equal(*results) != KNOWN[sampler].looks_back
    torch.testing.assert_close(*results, rtol=0, atol=0.02)
