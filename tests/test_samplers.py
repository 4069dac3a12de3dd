"""The samplers against diffusers, k-diffusion and the exact solution for Gaussian data; image-to-image, inpainting."""

import dataclasses
import math

import pytest
import torch
from goldens.make_samplers import (CONFIG, HERE, SHAPE, STD, STEPS, cases, draw_diffusers, draw_noise, gaussian,
                                   generators)
from safetensors.torch import load_file

from minipic.diffusion.samplers import SAMPLERS, keep_unmasked
from minipic.diffusion.schedule import Schedule
from minipic.weights.configs import read_config

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own


def last(steps):
    *_, (x, _) = steps
    return x


def draw(schedule, sampler, steps=STEPS):
    """A whole drawing of N(0, STD^2) data -> the latent that a pipeline would decode."""
    grid, streams = schedule.grid(steps, sampler), generators()
    denoise = schedule.objective.denoiser(gaussian(schedule.table.numpy(), schedule.prediction_type), grid)
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


@pytest.mark.parametrize("sampler, steps", [("euler", 7), ("euler_ancestral", 4), ("ddim", 30), ("dpmpp_2m", 8),
                                            ("dpmpp_2m", 25), ("heun", 11)])
def test_equals_diffusers_live(sampler, steps):
    pytest.importorskip("diffusers")
    for change in ({}, {"timestep_spacing": "trailing"}, {"set_alpha_to_one": True}, {"steps_offset": 0}):
        if sampler == "ddim" and "timestep_spacing" in change:
            continue  # its trailing grid is its own only where steps divide 1000
        config = CONFIG | change
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


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "euler_ancestral"])
def test_equals_k_diffusion(sampler):
    golden = load_file(HERE / "samplers_k_diffusion.safetensors")

    def denoise(x, sigma):
        return x * STD**2 / (sigma**2 + STD**2)

    x = last(SAMPLERS[sampler](denoise, golden["x"], golden["sigmas"], lambda i: golden["fresh"][i]))
    torch.testing.assert_close(x, golden[sampler], rtol=0, atol=1e-5)


def order(sampler, denoise, exact, sigmas):
    """Measured order of convergence: log2 of the factor by which the error falls when steps are halved."""
    errors = [(last(SAMPLERS[sampler](denoise, exact(s[0]), s)) - exact(s[-1])).abs().max()
              for s in (sigmas(64), sigmas(128))]
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("sampler, expected", [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(sampler, expected):
    """For N(0, STD^2) data the solution through x is x * sqrt(sigma^2 + STD^2), up to a constant."""
    found = order(sampler, lambda x, sigma: x * STD**2 / (sigma**2 + STD**2),
                  lambda sigma: (sigma**2 + STD**2) ** 0.5 * torch.ones(1, dtype=torch.float64),
                  lambda n: torch.logspace(1, -1, n + 1, dtype=torch.float64))
    assert abs(found - expected) < 0.1, found


def test_order_of_convergence_of_flow():
    """On the line x = (1 - t) x0 + t noise the solution is x * sqrt((1 - t)^2 STD^2 + t^2)."""
    def denoise(x, t):
        return x * (1 - t) * STD**2 / ((1 - t) ** 2 * STD**2 + t**2)

    found = order("flow_euler", denoise, lambda t: ((1 - t) ** 2 * STD**2 + t**2) ** 0.5 * torch.ones(1).double(),
                  lambda n: torch.linspace(1, 0, n + 1, dtype=torch.float64))
    assert abs(found - 1) < 0.1, found


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


def test_calls_of_the_network():
    """Steps with one call each, heun two but for the last; the noise is asked for once a step, in order."""
    sigmas = torch.tensor([2.0, 1, 0.5, 0])
    for name, count in [("euler", 3), ("euler_ancestral", 3), ("ddim", 3), ("dpmpp_2m", 3), ("heun", 5)]:
        calls, asked = [], []
        denoise, noise = lambda x, sigma: calls.append(sigma) or x * 0, lambda i: asked.append(i) or 0
        last(SAMPLERS[name](denoise, torch.ones(2), sigmas, noise))
        assert len(calls) == count and asked == ([0, 1, 2] if name == "euler_ancestral" else []), name


def inpaint_diffusers(sampler, config, known, noise, mask, strength):
    """The loop of StableDiffusionXLInpaintPipeline with a four-channel UNet."""
    import diffusers

    scheduler = getattr(diffusers, sampler).from_config(config)
    scheduler.set_timesteps(STEPS)
    first = STEPS - int(STEPS * strength)
    timesteps = scheduler.timesteps[first:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    predict = gaussian(Schedule().table.numpy(), "epsilon")
    x = scheduler.add_noise(known, noise, timesteps[:1])
    for i, t in enumerate(timesteps):
        x = scheduler.step(predict(scheduler.scale_model_input(x, t), t), t, x).prev_sample
        kept = known if i == len(timesteps) - 1 else scheduler.add_noise(known, noise, timesteps[i + 1:i + 2])
        x = (1 - mask) * kept + mask * x
    return x


@pytest.mark.parametrize("sampler, scheduler", [("euler", "EulerDiscreteScheduler"), ("ddim", "DDIMScheduler"),
                                                ("dpmpp_2m", "DPMSolverMultistepScheduler")])
@pytest.mark.parametrize("covers", ["all", "half"])
def test_image_to_image_and_inpainting_equal_diffusers(sampler, scheduler, covers):
    pytest.importorskip("diffusers")
    known, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(SHAPE[0], 1, *SHAPE[2:])
    if covers == "half":
        mask[..., :2] = 0
    schedule = Schedule()
    grid = schedule.grid(STEPS, sampler).strength(0.6)
    denoise = schedule.objective.denoiser(gaussian(schedule.table.numpy(), "epsilon"), grid)
    x = schedule.objective.add_noise(known, noise, grid.sigmas[0])
    steps = SAMPLERS[sampler](denoise, x, grid.sigmas)
    x = last(keep_unmasked(steps, schedule.objective.add_noise, known, noise, mask, grid.sigmas))
    x = schedule.objective.network_input(x, grid.sigmas[-1])
    x = mask * x + (1 - mask) * known
    torch.testing.assert_close(x, inpaint_diffusers(scheduler, CONFIG, known, noise, mask, 0.6), rtol=0, atol=1e-5)


def test_keep_puts_the_known_part_back_at_every_level():
    known, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(SHAPE[0], 1, *SHAPE[2:])
    mask[..., :2] = 0
    sigmas, add_noise, seen = torch.tensor([9.0, 4, 1, 0]), Schedule().objective.add_noise, []

    def denoise(x, sigma):
        seen.append((x[..., :2].clone(), sigma))
        return x / (1 + sigma**2)

    steps = SAMPLERS["euler"](denoise, add_noise(known, noise, sigmas[0]), sigmas)
    x = last(keep_unmasked(steps, add_noise, known, noise, mask, sigmas))
    for part, sigma in seen:  # the network saw the edited x
        torch.testing.assert_close(part, (known + sigma * noise)[..., :2])
    assert torch.equal(x[..., :2], known[..., :2]) and (x - known)[..., 2:].abs().max() > 0.1


@pytest.mark.parametrize("sampler", ["euler", "ddim", "heun"])
def test_handing_over_half_way_changes_nothing(sampler):
    schedule = Schedule()
    grid = schedule.grid(STEPS, sampler)
    denoise = schedule.objective.denoiser(gaussian(schedule.table.numpy(), "epsilon"), grid)
    x = grid.start * draw_noise(generators())
    whole = last(SAMPLERS[sampler](denoise, x, grid.sigmas))
    for part in (grid.part(end=0.8), grid.part(start=0.8)):
        x = last(SAMPLERS[sampler](denoise, x, part.sigmas))
    assert torch.equal(x, whole)
