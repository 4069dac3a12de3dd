"""Golden numbers for the samplers and objectives, from diffusers and k-diffusion on an analytic denoiser.

    python tests/goldens/make_samplers.py        writes tests/goldens/samplers_*.safetensors

It needs diffusers (0.42); what k-diffusion (0.1.1) gives is written where that is installed. The data is Gaussian with
standard deviation STD, for which the best prediction is known, so no network is needed. The tests use `gaussian` and
`draw_diffusers` too, to compare live where diffusers is installed.
"""

import importlib.util
import inspect
import itertools
import sys
import types
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
STD = 0.7  # of the data; not 1, or eps and v predictions would be alike
STEPS, SHAPE, SEEDS = 20, (2, 4, 4, 4), (7, 8)
CONFIG = {  # SDXL base's scheduler_config.json
    "_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False, "interpolation_type": "linear",
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None,
    "use_karras_sigmas": False,
}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
CLASSES = {  # sampler: diffusers' class that draws the same, of models that predict noise or v
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "heun": "HeunDiscreteScheduler",
}
FLOW_CLASSES = {"flow_euler": "FlowMatchEulerDiscreteScheduler"}  # of models that predict a velocity


def cases():
    """(sampler, spacing, karras, prediction) of every comparison.

    Left out: Karras levels where diffusers has none, and ddim on linspace, where diffusers' DDIM leaves its own grid.
    """
    spacings, predictions = ("leading", "trailing", "linspace"), ("epsilon", "v_prediction")
    for case in itertools.product(CLASSES, spacings, (False, True), predictions):
        sampler, spacing, karras, _ = case
        if not (karras and sampler in ("ddim", "euler_ancestral")) and (sampler, spacing) != ("ddim", "linspace"):
            yield case


def generators():
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def draw_noise(generators):
    """[B,C,h,w], sample i from generator i, as diffusers draws for a list of generators."""
    return torch.cat([torch.randn((1, *SHAPE[1:]), generator=g) for g in generators])


def gaussian(table, prediction_type):
    """The best predict(x, t) for N(0, STD^2) data; table: sigma of every training timestep."""
    def predict_velocity(x, t):
        """On the line x = (1 - sigma) x0 + sigma * noise, where t = 1000 sigma."""
        sigma = float(t) / 1000
        return x * (sigma - (1 - sigma) * STD**2) / ((1 - sigma) ** 2 * STD**2 + sigma**2)

    def predict(x, t):
        sigma = np.interp(float(t), np.arange(len(table)), table)
        x = x * (sigma**2 + 1) ** 0.5
        noise, x0 = x * sigma / (sigma**2 + STD**2), x * STD**2 / (sigma**2 + STD**2)
        return noise if prediction_type == "epsilon" else (noise - sigma * x0) / (sigma**2 + 1) ** 0.5

    return predict_velocity if prediction_type == "flow" else predict


def draw_diffusers(sampler, config, steps=STEPS):
    """A whole drawing as StableDiffusionXLPipeline runs it -> (latent, timesteps, sigmas or None)."""
    import diffusers

    streams = generators()
    if sampler in FLOW_CLASSES:
        scheduler = getattr(diffusers, FLOW_CLASSES[sampler]).from_config(config)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())  # as the flow pipelines call it
        predict = gaussian(None, "flow")
        x = draw_noise(streams)
    else:
        scheduler = getattr(diffusers, CLASSES[sampler]).from_config(config)
        scheduler.set_timesteps(steps)
        predict = gaussian(np.array(((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5),
                           config["prediction_type"])
        x = draw_noise(streams) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(predict(seen, t), t, x, **with_generators(scheduler, streams)).prev_sample
    return x, scheduler.timesteps.float(), getattr(scheduler, "sigmas", None)


def with_generators(scheduler, streams):
    """The generators as an argument of scheduler.step, which some schedulers draw fresh noise from."""
    return {"generator": streams} if "generator" in inspect.signature(scheduler.step).parameters else {}


def from_diffusers():
    tensors = {}
    for sampler, spacing, karras, prediction in cases():
        config = CONFIG | {"timestep_spacing": spacing, "use_karras_sigmas": karras, "prediction_type": prediction}
        latent, timesteps, sigmas = draw_diffusers(sampler, config)
        name = f"{sampler}.{spacing}.{'karras' if karras else 'plain'}"
        tensors[f"{name}.{prediction}"] = latent
        tensors[f"{name}.timesteps"] = timesteps
        if sigmas is not None:
            tensors[f"{name}.sigmas"] = sigmas.clone()
    return tensors


def from_k_diffusion():
    # its __init__ imports everything needed for training and metrics; its sampling needs only two files of it
    package = types.ModuleType("k_diffusion")
    package.__path__ = importlib.util.find_spec("k_diffusion").submodule_search_locations
    transforms = types.ModuleType("torchvision.transforms")
    transforms.functional = None
    sys.modules.update({"k_diffusion": package, "torchvision": types.ModuleType("torchvision"),
                        "torchvision.transforms": transforms})
    from k_diffusion import external, sampling

    def denoise(x, sigma):
        return x * STD**2 / (sigma[:, None, None, None] ** 2 + STD**2)

    sigmas = sampling.get_sigmas_karras(STEPS, 0.05, 14.0)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * sigmas[0]
    streams = generators()
    fresh = torch.stack([draw_noise(streams) for _ in range(STEPS)])
    levels = iter(fresh)
    tensors = {"sigmas": sigmas, "x": x, "fresh": fresh,
               "euler_ancestral": sampling.sample_euler_ancestral(denoise, x, sigmas, disable=True,
                                                                  noise_sampler=lambda *_: next(levels))}
    for name in ("euler", "heun", "dpmpp_2m"):
        tensors[name] = getattr(sampling, f"sample_{name}")(denoise, x, sigmas, disable=True)

    betas = torch.linspace(CONFIG["beta_start"] ** 0.5, CONFIG["beta_end"] ** 0.5, 1000) ** 2
    abar = (1 - betas).cumprod(0)
    t = torch.tensor([3, 700])
    sigma = ((1 - abar[t]) / abar[t]) ** 0.5
    x0, noise = fresh[0].clone(), fresh[1].clone()
    tensors |= {"t": t, "x0": x0, "noise": noise}
    wrappers = {"epsilon": external.DiscreteEpsDDPMDenoiser, "v_prediction": external.DiscreteVDDPMDenoiser}
    for kind, wrapper in wrappers.items():
        model = wrapper(lambda x, t: torch.sin(x + t[:, None, None, None] / 1000), abar, quantize=False)
        model.get_v = model.inner_model
        tensors[f"loss.{kind}"] = model.loss(x0, noise, sigma)
        tensors[f"denoised.{kind}"] = model(x0 + sigma[:, None, None, None] * noise, sigma)
    return tensors


if __name__ == "__main__":
    save_file(from_diffusers(), HERE / "samplers_diffusers.safetensors")
    if importlib.util.find_spec("k_diffusion"):
        save_file(from_k_diffusion(), HERE / "samplers_k_diffusion.safetensors")
