"""The schedule against diffusers' numbers: tables, grids, config files, objectives, and which steps remain of a cut."""

import dataclasses
import json

import pytest
import torch
from goldens.make_samplers import CLASSES, CONFIG, FLOW, HERE, STEPS, cases
from safetensors.torch import load_file

from minipic.common import InputError, ParameterError
from minipic.diffusion.objectives import Flow
from minipic.diffusion.schedule import SAMPLER_OF, Schedule
from minipic.weights.configs import config_to_json, read_config

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own

SD15 = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_start": 0.00085,
        "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "set_alpha_to_one": False, "steps_offset": 1,
        "skip_prk_steps": True, "trained_betas": None, "clip_sample": False}
TURBO = CONFIG | {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}


def near(actual, expected, tolerance=1e-6):
    """Relative comparison with printed numbers."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(actual).double(), expected, rtol=tolerance, atol=0)


def test_sdxl_file_is_the_default():
    assert read_config(Schedule, CONFIG) == Schedule()


def test_table():
    table = Schedule().table
    near(table[[0, 999]], [0.02916753, 14.61464662])
    near(1 / (1 + table[[0, 999]] ** 2), [0.9991499782, 0.0046600951])


@pytest.mark.parametrize("steps, t, sigma, start", [(20, 951, 11.028336, 11.073581), (30, 958, 11.476851, 11.520334),
                                                    (50, 981, 13.120416, 13.158469)])
def test_leading(steps, t, sigma, start):
    grid = Schedule().grid(steps)
    assert grid.timesteps[0] == t and grid.timesteps[-1] == 1 and grid.sigmas[-1] == 0
    near(grid.sigmas[[0, -2]], [sigma, 0.041314], 2e-5)
    near(grid.start, start)


def test_trailing_of_turbo():
    grid = read_config(Schedule, TURBO).grid(4)
    assert grid.timesteps.tolist() == [999, 749, 499, 249]
    near(grid.sigmas[:4], [14.614647, 4.081731, 1.612887, 0.693205])
    assert grid.sigmas[4] == 0 and grid.start == grid.sigmas[0]


def test_karras():
    sigmas = Schedule(use_karras_sigmas=True).grid(30).sigmas
    near(sigmas[[0, 1, 2, 28, 29]], [11.476851, 10.031294, 8.744695, 0.055309, 0.041314], 2e-5)


def test_grids_equal_diffusers():
    """Noise levels to the last bit, of which CPUs differ; timesteps, except where Karras levels fall between two."""
    golden = load_file(HERE / "samplers_diffusers.safetensors")
    for sampler, spacing, karras, _ in cases():
        name = f"{sampler}.{spacing}.{'karras' if karras else 'plain'}"
        grid = dataclasses.replace(Schedule(), timestep_spacing=spacing, use_karras_sigmas=karras).grid(STEPS, sampler)
        timesteps, sigmas = golden[f"{name}.timesteps"], golden.get(f"{name}.sigmas")
        if sampler == "heun":  # diffusers lists its two calls a step one by one
            timesteps, sigmas = timesteps[::2], torch.cat([sigmas[:1], sigmas[1::2]])
        torch.testing.assert_close(grid.timesteps, timesteps, rtol=0, atol=1e-4 if karras else 0, msg=name)
        if sampler != "ddim":
            torch.testing.assert_close(grid.sigmas, sigmas, rtol=3e-7, atol=0, msg=name)


def test_grids_equal_diffusers_at_many_steps():
    diffusers = pytest.importorskip("diffusers")
    for sampler, spacing in [(s, p) for s in CLASSES for p in ("leading", "trailing", "linspace")]:
        config = CONFIG | {"timestep_spacing": spacing}
        scheduler, schedule = getattr(diffusers, CLASSES[sampler]).from_config(config), read_config(Schedule, config)
        for steps in (1, 2, 3, 7, 25, 26, 30, 48, 50, 99):
            scheduler.set_timesteps(steps)
            grid = schedule.grid(steps, sampler)
            assert scheduler.timesteps.float()[::2 if sampler == "heun" else 1].tolist() == grid.timesteps.tolist()
            if sampler in ("euler", "euler_ancestral", "heun"):
                assert float(scheduler.init_noise_sigma) == float(grid.start)


def test_sigma_and_t_are_inverse():
    schedule, t = Schedule(), torch.tensor([0.0, 1, 52.5, 958, 998.999, 999])
    on_grid = torch.tensor([0, 1, 958, 999])
    assert torch.equal(schedule.timestep(schedule.sigma(on_grid).float()).float(), on_grid.float())
    torch.testing.assert_close(schedule.timestep(schedule.sigma(t)), t.double(), rtol=0, atol=2e-3)  # linear against log
    assert schedule.timestep(1e-4) == 0 and schedule.timestep(100.0) == 999
    assert read_config(Schedule, FLOW).timestep(0.25) == 250 and read_config(Schedule, FLOW).sigma(torch.tensor(250)) == 0.25


def test_steps_are_refused_where_no_grid_exists():
    for steps, sampler in [(0, "euler"), (1001, "euler"), (1000, "dpmpp_2m")]:
        with pytest.raises(InputError, match=f"steps: .*not {steps}"):
            Schedule().grid(steps, sampler)
    with pytest.raises(InputError, match="flow_euler"):
        Schedule().grid(10, "flow_euler")


def test_defaults_of_files_that_say_little():
    """What diffusers' from_config does with SD 1.5's file: each scheduler class takes its own default spacing."""
    diffusers = pytest.importorskip("diffusers")
    original = diffusers.PNDMScheduler.from_config(SD15)
    for sampler, name in CLASSES.items():
        scheduler = getattr(diffusers, name).from_config(original.config)
        scheduler.set_timesteps(20)
        grid = read_config(Schedule, SD15).grid(20, sampler)
        assert grid.timesteps.tolist() == scheduler.timesteps.float()[::2 if sampler == "heun" else 1].tolist(), sampler


@pytest.mark.parametrize("name", [*SAMPLER_OF])
def test_config_written_by_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
    extra = {"clip_sample": False} if name == "DDIMScheduler" else {}
    written = json.loads(getattr(diffusers, name)(**extra).to_json_string())
    schedule = read_config(Schedule, written)
    assert schedule.sampler == SAMPLER_OF[name]
    assert read_config(Schedule, config_to_json(schedule)) == schedule
    again = getattr(diffusers, name).from_config(json.loads(json.dumps(config_to_json(schedule)))).config
    assert {key: again[key] for key in written if key[0] != "_"} == {k: v for k, v in written.items() if k[0] != "_"}


@pytest.mark.parametrize("change, message", [
    ({"_class_name": None}, "_class_name=None .*EulerDiscreteScheduler"), ({"beta": 1}, "unknown key 'beta'"),
    ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule: 'squaredcos_cap_v2'"),
    ({"prediction_type": "sample"}, "prediction_type: 'sample'"), ({"timestep_spacing": "even"}, "timestep_spacing"),
    ({"beta_end": 2.0}, "beta_end: 2.0"), ({"_class_name": ["EulerDiscreteScheduler"]}, "_class_name="), ({"final_sigmas_type": "sigma_min"}, "final_sigmas_type"), ({"clip_sample": True}, "clip_sample"),
    ({"trained_betas": [0.01] * 1000}, "trained_betas=.0.01, ")])
def test_refused_config(change, message):
    with pytest.raises(InputError, match="here.json: .*" + message) as caught:
        read_config(Schedule, CONFIG | change, "here.json")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("change, words", [
    ({"num_train_timesteps": 1000.0}, "num_train_timesteps: 1000.0 is of the wrong type; expected int"),
    ({"set_alpha_to_one": None}, "set_alpha_to_one: None is of the wrong type"),
    ({"num_train_timesteps": 1}, "num_train_timesteps: 1 is out of range"),
    ({"num_train_timesteps": 10**9}, "num_train_timesteps: 1000000000 is out of range"),
    ({"steps_offset": -1}, "steps_offset: -1 is out of range"),
    ({"steps_offset": 1000}, "steps_offset: 1000 is none of the 1000 timesteps"),
    ({"shift": 0.0}, "shift: 0.0 is out of range"), ({"shift": float("nan")}, "shift: nan is out of range"),
    ({"beta_start": 0.0}, "beta_start: 0.0 is not between 0 and 1"),
    ({"beta_start": float("nan")}, "beta_start: nan is not between 0 and 1"),
    ({"beta_end": 0.0001}, "beta_end: 0.0001 is not between beta_start and 1"),
    ({"beta_end": float("inf")}, "beta_end: inf is not between beta_start and 1"),
    ({"beta_end": 0.9}, "beta_end: some timestep would have no signal or no noise"),
    ({"beta_start": 1e-12}, "beta_end: some timestep would have no signal or no noise"),
    ({"beta_schedule": "cosine"}, r"beta_schedule: 'cosine' is not supported \(supported: linear, scaled_linear\)"),
    ({"prediction_type": "sample"}, "prediction_type: 'sample' is not supported"),
    ({"timestep_spacing": "even"}, "timestep_spacing: 'even' is not supported"),
    ({"class_name": 3}, "class_name: 3 is of the wrong type")])
def test_a_schedule_checks_itself(change, words):
    with pytest.raises(ParameterError, match=f"^{words}"):
        Schedule(**change)


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize("name", [
    "UniPCMultistepScheduler", "LCMScheduler", "DPMSolverSinglestepScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "DDPMScheduler", "DEISMultistepScheduler", "TCDScheduler", "EDMEulerScheduler",
    "DDIMParallelScheduler", "SASolverScheduler", "IPNDMScheduler"])
def test_a_scheduler_that_is_not_here_gives_its_noise_levels_to_another_sampler(name):
    diffusers = pytest.importorskip("diffusers")
    changed = CONFIG | {"beta_end": 0.013, "prediction_type": "v_prediction", "use_karras_sigmas": True}
    theirs = getattr(diffusers, name).from_config(changed)
    written = json.loads(theirs.to_json_string())
    schedule = read_config(Schedule, written)
    peer = diffusers.EulerDiscreteScheduler.from_config(theirs.config)
    peer.set_timesteps(7)
    grid = schedule.grid(7, "euler")
    torch.testing.assert_close(grid.sigmas, peer.sigmas, rtol=1e-6, atol=0)
    assert schedule.prediction_type == "v_prediction" and schedule.sampler is None
    with pytest.raises(ParameterError, match=f"^sampler: the {name} of this model is not here; choose one of euler, "):
        schedule.grid(7)
    assert config_to_json(schedule)["_class_name"] == name


@pytest.mark.parametrize("change", [
    {"algorithm_type": "sde-dpmsolver++"}, {"solver_type": "heun"}, {"solver_order": 3}])
def test_a_variant_of_a_scheduler_is_another_sampler(change):
    config = CONFIG | {"_class_name": "DPMSolverMultistepScheduler"} | change
    schedule = read_config(Schedule, config)
    assert schedule.grid(5, "euler").sigmas.equal(Schedule().grid(5).sigmas)
    (key, value), = change.items()
    with pytest.raises(ParameterError) as caught:
        schedule.grid(5)
    assert f"the DPMSolverMultistepScheduler({key}={value!r}) of this model is not here" in str(caught.value)
    assert config_to_json(schedule)["_class_name"] == "DPMSolverMultistepScheduler"


@pytest.mark.parametrize("name, more", [
    ("EDMEulerScheduler", {"sigma_min": 0.002, "sigma_max": 80.0}), ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    ("UniPCMultistepScheduler", {"beta_start": 0.1, "use_flow_sigmas": True}),
    ("DDPMScheduler", {"beta_start": 0.1, "trained_betas": [0.1, 0.2]}),
    ("DEISMultistepScheduler", {"beta_start": 0.1, "use_exponential_sigmas": True})])
def test_a_scheduler_of_another_process_is_refused(name, more):
    """Its noise levels are none of these betas, whatever sampler is asked for."""
    with pytest.raises(InputError, match="here.json: .*is not supported"):
        read_config(Schedule, {"_class_name": name, "num_train_timesteps": 1000} | more, "here.json")


def test_what_a_user_knows_better_than_the_file():
    few = Schedule().override(spacing="trailing")
    assert few.grid(1).timesteps.tolist() == [999] and few.grid(4).timesteps.tolist() == [999, 749, 499, 249]
    assert Schedule().grid(1).timesteps.tolist() == [1]
    assert Schedule().override(prediction="v_prediction").prediction_type == "v_prediction"
    assert Schedule().override(karras=True) == Schedule(use_karras_sigmas=True)
    assert Schedule(use_karras_sigmas=True).override(karras=False) == Schedule() == Schedule().override()
    for change, words in (({"spacing": "even"}, "spacing: 'even' is unknown; choose leading or trailing or linspace"),
                          ({"prediction": "flow"}, "prediction: 'flow' is unknown; choose epsilon or v_prediction")):
        with pytest.raises(ParameterError, match=words):
            Schedule().override(**change)


def test_zero_terminal_snr():
    diffusers = pytest.importorskip("diffusers")
    config = CONFIG | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = diffusers.EulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(20)
    grid = read_config(Schedule, config).grid(20)
    overridden = read_config(Schedule, CONFIG).override(spacing="trailing", zero_snr=True)
    assert overridden == read_config(Schedule, config)
    assert overridden.override(zero_snr=False, spacing="leading") == read_config(Schedule, CONFIG)
    assert grid.sigmas[0] == scheduler.sigmas[0] and 4000 < grid.sigmas[0] < 4200
    torch.testing.assert_close(grid.sigmas, scheduler.sigmas, rtol=1e-5, atol=0)


def test_strength():
    img2img = pytest.importorskip("diffusers").StableDiffusionXLImg2ImgPipeline
    scheduler = pytest.importorskip("diffusers").EulerDiscreteScheduler.from_config(CONFIG)
    for steps, strength in [(50, 0.3), (20, 0.6), (30, 0.99), (4, 0.5), (10, 1.0)]:
        scheduler.set_timesteps(steps)
        holder = type("Holder", (), {"scheduler": scheduler})
        kept = img2img.get_timesteps(holder, steps, strength, "cpu")[0]
        grid = Schedule().grid(steps).strength(strength)
        assert grid.timesteps.tolist() == kept.tolist() and len(grid.sigmas) == len(kept) + 1
        assert grid.sigmas[0] == scheduler.sigmas[scheduler.begin_index] and grid.sigmas[-1] == 0
    for strength, message in [(0.01, "no step of the 20"), (0.0, "strength: .*not 0.0"), (1.5, "strength: .*not 1.5")]:
        with pytest.raises(InputError, match=message):
            Schedule().grid(20).strength(strength)


def test_refiner_takes_over_where_the_base_stops():
    img2img = pytest.importorskip("diffusers").StableDiffusionXLImg2ImgPipeline
    scheduler = pytest.importorskip("diffusers").EulerDiscreteScheduler.from_config(CONFIG)
    for steps, fraction, cutoff in [(50, 0.8, 200), (50, 0.799, 201), (20, 0.8, 200), (30, 0.333, 667)]:
        scheduler.set_timesteps(steps)
        kept = img2img.get_timesteps(type("Holder", (), {"scheduler": scheduler}), steps, 0.3, "cpu", fraction)[0]
        base, refiner = Schedule().grid(steps).part(end=fraction), Schedule().grid(steps).part(start=fraction)
        assert refiner.timesteps.tolist() == kept.tolist()
        assert base.timesteps.tolist() == [t for t in scheduler.timesteps.tolist() if t >= cutoff]
        assert base.sigmas[-1] == refiner.sigmas[0] and len(base) + len(refiner) == steps
    for whole in (Schedule().grid(20), read_config(Schedule, FLOW).grid(20)):
        assert whole.part().timesteps.tolist() == whole.timesteps.tolist()


def test_flow_grid():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(FLOW)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 20, 20).tolist())  # as the flow pipelines call it
    grid = read_config(Schedule, FLOW).grid(20)
    torch.testing.assert_close(grid.sigmas, scheduler.sigmas)
    torch.testing.assert_close(grid.timesteps, scheduler.timesteps)
    assert grid.start == 1 == grid.sigmas[0] and isinstance(read_config(Schedule, FLOW).objective, Flow)


def data(seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, 4, 4, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_perfect_prediction(kind):
    """Answering the target costs nothing, and means the clean data at every noise level."""
    objective = Schedule(prediction_type=kind).objective
    (x0, noise), t = data(), torch.tensor([20, 980])
    sigma = objective.schedule.sigma(t).reshape(2, 1, 1, 1)
    target = objective.target(x0, noise, sigma)
    assert objective.loss(lambda x, t: target, x0, noise, t).tolist() == [0, 0]
    near(objective.loss(lambda x, t: target + 0.5, x0, noise, t), [0.25, 0.25])
    for i in range(2):
        denoise = objective.denoiser(lambda x, t: target)
        x0_again = denoise(objective.add_noise(x0, noise, sigma[i]), sigma[i, 0, 0, 0])[i]
        torch.testing.assert_close(x0_again, x0[i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_training_pairs_equal_diffusers(kind):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler.from_config(CONFIG)
    (x0, noise), t = data(1).float(), torch.tensor([3, 700])
    shown = scheduler.add_noise(x0, noise, t)
    target = noise if kind == "epsilon" else scheduler.get_velocity(x0, noise, t)

    def predict(x, times):
        torch.testing.assert_close(x, shown, rtol=0, atol=1e-6)
        assert times.tolist() == [3, 700]
        return torch.sin(x)

    expected = ((torch.sin(shown) - target) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(Schedule(prediction_type=kind).objective.loss(predict, x0, noise, t), expected)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_objectives_equal_k_diffusion(kind):
    golden = load_file(HERE / "samplers_k_diffusion.safetensors")
    objective, t = Schedule(prediction_type=kind).objective, golden["t"]

    def predict(x, t):
        return torch.sin(x + t.reshape(-1, 1, 1, 1) / 1000)

    torch.testing.assert_close(objective.loss(predict, golden["x0"], golden["noise"], t), golden[f"loss.{kind}"],
                               rtol=1e-5, atol=0)
    for i, sigma in enumerate(objective.schedule.sigma(t).float()):
        x = objective.add_noise(golden["x0"], golden["noise"], sigma)
        x0 = objective.denoiser(predict)(x, sigma)[i]
        torch.testing.assert_close(x0, golden[f"denoised.{kind}"][i], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind, power", [("epsilon", 0), ("v_prediction", 1)])
def test_min_snr(kind, power):
    """min(snr, 5) / snr for noise and min(snr, 5) / (snr + 1) for v (2303.09556)."""
    objective, (x0, noise) = Schedule(prediction_type=kind).objective, data()
    t = torch.tensor([10, 900])
    snr = objective.schedule.sigma(t) ** -2
    assert snr[0] > 5 > snr[1]
    plain, weighted = (objective.loss(lambda x, t: x, x0, noise, t, min_snr=g) for g in (None, 5.0))
    torch.testing.assert_close(weighted / plain, snr.clamp(max=5) / (snr + power))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_weights_are_of_the_error_in_x0(kind):
    objective, (x0, noise), t = Schedule(prediction_type=kind).objective, data(), torch.tensor([10, 900])
    sigma = objective.schedule.sigma(t).reshape(2, 1, 1, 1)
    x = objective.add_noise(x0, noise, sigma)
    error = (objective.to_x0(x, sigma, torch.cos(objective.network_input(x, sigma))) - x0) ** 2
    for settings, weight in (({"min_snr": 5.0}, objective.snr(sigma).clamp(max=5)),
                             ({"balanced": True}, 2 * objective.snr(sigma).sqrt())):
        expected = (weight * error).flatten(1).mean(1)
        torch.testing.assert_close(objective.loss(lambda x, t: torch.cos(x), x0, noise, t, **settings), expected)


def test_balanced_is_the_sine_of_twice_the_angle_for_v():
    """tan(phi) = sigma: v's own loss counts every level alike, balanced most where picture and noise are alike strong."""
    objective, (x0, noise), t = Schedule(prediction_type="v_prediction").objective, data(), torch.tensor([350, 900])
    plain, weighted = (objective.loss(lambda x, t: x, x0, noise, t, balanced=b) for b in (False, True))
    torch.testing.assert_close(weighted / plain, torch.sin(2 * objective.schedule.sigma(t).atan()))


def test_timesteps_to_train_at():
    """Shares of the ranges of timesteps, against the normal distribution's own."""
    schedule, generator = Schedule(), torch.Generator().manual_seed(0)
    for spread in (0.0, 1.0, 1.2, 50.0):  # at 50 the sigmoid rounds to 1, which would be one timestep too many
        t = torch.tensor([int(schedule.draw_timestep(generator, spread)) for _ in range(20000)])
        assert t.min() >= 0 and t.max() <= 999
        for end in (100, 300, 500, 800):
            share = end / 1000
            expected = torch.special.ndtr(torch.logit(torch.tensor(share)) / spread).item() if spread else share
            assert abs((t < end).float().mean().item() - expected) < 0.015, (spread, end)


def test_signal_to_noise_of_a_flow():
    near(Schedule(prediction_type="flow").objective.snr(torch.tensor([0.2, 0.5, 0.8])), [16, 1, 0.0625], 1e-5)


def test_flow_takes_a_time_per_frame():
    objective, (x0, noise) = Schedule(prediction_type="flow").objective, data()
    t = torch.tensor([[0, 250, 500, 1000], [100, 200, 300, 400]])
    seen = []
    objective.loss(lambda x, t: seen.append(x) or x, x0, noise, t)
    assert torch.equal(seen[0][0, 0], x0[0, 0]) and torch.equal(seen[0][0, 3], noise[0, 3])
    torch.testing.assert_close(seen[0][1, 2], 0.7 * x0[1, 2] + 0.3 * noise[1, 2])


def test_denoiser_tells_the_network_the_grids_timesteps():
    schedule = Schedule(timestep_spacing="linspace")
    grid, told = schedule.grid(20), []
    denoise = schedule.objective.denoiser(lambda x, t: told.append(t.item()) or x, grid)
    for sigma in grid.sigmas[:-1]:
        denoise(torch.zeros(1, 4, 2, 2), sigma)
    assert told == grid.timesteps.tolist() and told[1] != round(told[1])
    denoise(torch.zeros(1, 4, 2, 2), torch.tensor(1.0))  # a level between two of the grid
    assert told[-1] == schedule.timestep(1.0).float().item() not in told[:-1]
