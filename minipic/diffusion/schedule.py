"""The noise schedule: training timesteps, noise levels, sampling grids, and what the network is trained to predict.

Everything is written in one coordinate, the noise level sigma of x = x0 + sigma * noise (Karras et al., 2206.00364).
The "variance preserving" x_t that Stable Diffusion's networks see is x / sqrt(sigma^2 + 1), so that
sigma^2 = (1 - abar) / abar with abar the cumulative product of 1 - beta (DDPM, 2006.11239). Flow matching has its own
line, x = (1 - sigma) * x0 + sigma * noise, and is the one exception.
"""

from dataclasses import asdict, dataclass
from functools import cached_property

import torch

from minipic.common import InputError, from_json

SAMPLER_OF = {  # scheduler_config.json's `_class_name` -> the sampler that draws as it does
    "EulerDiscreteScheduler": "euler", "EulerAncestralDiscreteScheduler": "euler_ancestral", "DDIMScheduler": "ddim",
    "PNDMScheduler": "ddim",  # not the same steps, but PNDM's grid and ending; its own multistep rule is not here
    "DPMSolverMultistepScheduler": "dpmpp_2m", "HeunDiscreteScheduler": "heun",
    "FlowMatchEulerDiscreteScheduler": "flow_euler",
}

# Values of scheduler_config.json under which the file means this code.
FIXED = {
    "beta_schedule": ("linear", "scaled_linear"), "prediction_type": ("epsilon", "v_prediction", "flow"),
    "timestep_spacing": ("leading", "trailing", "linspace", None),
    "algorithm_type": ("dpmsolver++",), "clip_sample": (False,), "final_sigmas_type": ("zero",),
    "interpolation_type": ("linear",), "invert_sigmas": (False,), "lambda_min_clipped": (-float("inf"),),
    "shift_terminal": (None,), "sigma_max": (None,), "sigma_min": (None,), "solver_order": (2,),
    "solver_type": ("midpoint",), "stochastic_sampling": (False,), "thresholding": (False,),
    "timestep_type": ("discrete",), "trained_betas": (None,), "use_beta_sigmas": (False, None),
    "use_dynamic_shifting": (False,), "use_exponential_sigmas": (False, None), "use_flow_sigmas": (False,),
    "use_lu_lambdas": (False,), "variance_type": (None,),
    # these act only together with a value refused above, or only in a sampler that is not here
    "base_image_seq_len": ..., "base_shift": ..., "clip_sample_range": ..., "dynamic_thresholding_ratio": ...,
    "euler_at_final": ..., "flow_shift": ..., "lower_order_final": ..., "max_image_seq_len": ..., "max_shift": ...,
    "sample_max_value": ..., "skip_prk_steps": ..., "time_shift_type": ...,
}


@dataclass(frozen=True)
class Schedule:
    """The varying keys of scheduler_config.json; the defaults are SDXL base's."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = "leading"  # None: the file does not say; "leading" for ddim, else "linspace"
    steps_offset: int = 1
    set_alpha_to_one: bool = False  # ddim: end at no noise (true) or at the lowest trained noise level (false)
    use_karras_sigmas: bool = False
    rescale_betas_zero_snr: bool = False
    shift: float = 1.0  # flow only
    class_name: str = "EulerDiscreteScheduler"

    @classmethod
    def from_json(cls, values, where="scheduler/scheduler_config.json"):
        """Read an official scheduler_config.json; keys it lacks take diffusers' defaults, which are not SDXL's.

        Raises InputError for an unknown class, key or value.
        """
        name = values.get("_class_name")
        if name not in SAMPLER_OF:
            raise InputError(f"{where}: _class_name={name!r} is not supported (supported: {', '.join(SAMPLER_OF)})")
        legacy = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "timestep_spacing": None,
                  "steps_offset": 0, "set_alpha_to_one": True, "class_name": name,
                  "prediction_type": "flow" if SAMPLER_OF[name] == "flow_euler" else "epsilon"}
        return from_json(cls, legacy | values, FIXED, where)

    def to_json(self):
        """The scheduler_config.json that diffusers loads; `clip_sample` because its DDIM would clip by default."""
        if self.prediction_type == "flow":
            return {"_class_name": self.class_name, "num_train_timesteps": self.num_train_timesteps,
                    "shift": self.shift}
        drop = {"class_name", "shift"} | ({"timestep_spacing"} if self.timestep_spacing is None else set())
        values = {"_class_name": self.class_name, **asdict(self), "clip_sample": False, "trained_betas": None}
        return {key: value for key, value in values.items() if key not in drop}

    @property
    def sampler(self):
        """The name of the sampler that the file asks for."""
        return SAMPLER_OF[self.class_name]

    @cached_property
    def objective(self):
        """What the network predicts: an Eps, V or Flow on this schedule."""
        return OBJECTIVES[self.prediction_type](self)

    @cached_property
    def table(self):
        """sigma of every training timestep [T], float64.

        Betas and their product are rounded to float32, as in the program that trained and drew with the official
        weights: in float64 sigma would differ by 4e-7, and pictures could not be compared to the last digit.
        """
        power = 0.5 if self.beta_schedule == "scaled_linear" else 1.0
        betas = torch.linspace(self.beta_start**power, self.beta_end**power, self.num_train_timesteps,
                               dtype=torch.float32) ** (1 / power)
        abar = (1 - betas).cumprod(0)
        if self.rescale_betas_zero_snr:  # 2305.08891, algorithm 1: stretch sqrt(abar) until the last one is 0
            root = abar.sqrt()
            abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
            abar[-1] = 2**-24  # not 0, which would make sigma infinite; the value that diffusers chose
        return (((1 - abar) / abar) ** 0.5).double()

    def sigma(self, t):
        """Noise level (float64) of timesteps t (tensor of any shape), linear between the trained ones."""
        t = t.cpu().double()
        if self.prediction_type == "flow":
            return t / self.num_train_timesteps
        t = t.clamp(0, self.num_train_timesteps - 1)
        low = t.long().clamp(max=self.num_train_timesteps - 2)
        return torch.lerp(self.table[low], self.table[low + 1], t - low)

    def t(self, sigma):
        """Timestep (float64) of noise levels sigma, linear in log sigma; exact at trained levels."""
        sigma = torch.as_tensor(sigma).cpu().double()
        if self.prediction_type == "flow":
            return sigma * self.num_train_timesteps
        low = (torch.searchsorted(self.table, sigma, right=True) - 1).clamp(0, self.num_train_timesteps - 2)
        below, above = self.table[low].log(), self.table[low + 1].log()
        return low + ((sigma.log() - below) / (above - below)).clamp(0, 1)

    def draw_timestep(self, generator, spread=0.0):
        """A timestep to train at, int64 []: all alike, or at a share of the way that is the sigmoid of a normal number
        of this spread (logit-normal, 2403.03206 section 3.1). At 1 the outer tenths are drawn a seventh as often."""
        if not spread:
            return torch.randint(self.num_train_timesteps, (), generator=generator)
        share = (spread * torch.randn((), generator=generator)).sigmoid()
        return (share * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)

    def grid(self, steps, sampler=None):
        """The Grid that diffusers' scheduler of that kind walks in `steps` steps.

        `sampler`: a name in SAMPLERS (default: the file's). euler, euler_ancestral and heun use fractional timesteps
        where they fall, ddim whole ones, dpmpp_2m whole ones of a grid one step longer without its cleanest.
        """
        sampler = sampler or self.sampler
        if (sampler == "flow_euler") != (self.prediction_type == "flow"):
            raise InputError(f"--sampler {sampler} cannot draw with a model trained for {self.prediction_type!r}; "
                             "flow models need flow_euler, all others another sampler")
        spacing = self.timestep_spacing or ("leading" if sampler == "ddim" else "linspace")
        t = self._timesteps(steps, sampler, spacing)
        sigmas, end = self.sigma(t), 0.0
        if sampler == "flow_euler":
            sigmas = self.shift * sigmas / (1 + (self.shift - 1) * sigmas)
            t = self.t(sigmas)
        if self.use_karras_sigmas:  # Karras et al.'s spacing, rho = 7
            whole = sampler == "dpmpp_2m"  # it takes the whole trained range, and whole timesteps
            high, low = self.table[[-1, 0]] if whole else sigmas[[0, -1]]
            ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
            sigmas = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
            t = self.t(sigmas).round() if whole else self.t(sigmas)
        if sampler == "ddim" and not self.set_alpha_to_one:
            end = self.table[0].item()
        sigmas = torch.cat([sigmas, sigmas.new_tensor([end])]).float()
        start = sigmas[0]
        if sampler in ("ddim", "dpmpp_2m") or (sampler != "flow_euler" and spacing == "leading"):
            start = (sigmas[0] ** 2 + 1) ** 0.5  # noise of variance 1 in the network's coordinate
        return Grid(sigmas, t.float(), start, self.num_train_timesteps)

    def _timesteps(self, steps, sampler, spacing):
        """Timesteps [steps], high to low, as table 2 of 2305.08891 spaces them."""
        total, count = self.num_train_timesteps, steps + 1 if sampler == "dpmpp_2m" else steps
        if not 1 <= steps <= count <= total:
            raise InputError(f"--steps {steps}: choose between 1 and {total - count + steps}")
        if sampler == "flow_euler":
            return total - torch.arange(steps, dtype=torch.float64) * (total / steps)
        if spacing == "trailing":
            stride = total - (total - total / steps)  # rounded as numpy.arange does: at 48 steps it breaks a tie
            return (total - torch.arange(steps, dtype=torch.float64) * stride).round() - 1
        if spacing == "leading":
            t = torch.arange(count, dtype=torch.float64) * (total // count) + self.steps_offset
        else:
            t = torch.arange(count, dtype=torch.float64) * ((total - 1) / max(count - 1, 1))
            t = t.round() if sampler in ("ddim", "dpmpp_2m") else t.float().double()
        return t.flip(0)[:steps]


@dataclass(frozen=True, eq=False)
class Grid:
    """The noise levels of one drawing.

    sigmas [n+1] falls to the level of the finished latent (0, or the lowest trained one for some ddim files);
    timesteps [n] is what the network is told at each level but the last; pure noise starts as start * randn.
    All float32, on the CPU.
    """

    sigmas: torch.Tensor
    timesteps: torch.Tensor
    start: torch.Tensor
    num_train_timesteps: int

    def __len__(self):
        return len(self.timesteps)

    def _slice(self, first, last):
        if first >= last:
            raise InputError(f"no step of the {len(self)} is left to draw; raise --steps or --strength")
        return Grid(self.sigmas[first:last + 1], self.timesteps[first:last], self.start, self.num_train_timesteps)

    def strength(self, strength):
        """The last steps, those that image-to-image draws: int(n * strength) of n. Start them at
        objective.mix(x0, noise, sigmas[0])."""
        if not 0 < strength <= 1:
            raise InputError(f"--strength {strength}: choose above 0 (keep the picture) and up to 1 (replace it)")
        return self._slice(len(self) - int(len(self) * strength), len(self))

    def part(self, start=0.0, end=1.0):
        """The steps of one model where several share a drawing: from fraction `start` to `end` of the noise schedule.

        part(end=0.8) and part(start=0.8) are SDXL base's and refiner's share; the latent passes between them as it is.
        """
        total = self.num_train_timesteps
        before = [int((self.timesteps >= round(total - fraction * total)).sum()) for fraction in (start, end)]
        return self._slice(before[0] if start > 0 else 0, before[1])


class Eps:
    """The network predicts the noise (DDPM, 2006.11239). The same formulas train and sample: the two cannot disagree.

    sigma broadcasts to x.
    """

    def __init__(self, schedule):
        self.schedule = schedule

    def mix(self, x0, noise, sigma):
        """The noised data x."""
        return x0 + sigma * noise

    def scaled(self, x, sigma):
        """What the network is shown; also turns the last x into the finished latent."""
        return x / (sigma**2 + 1) ** 0.5

    def target(self, x0, noise, sigma):
        """What the network should answer."""
        return noise

    def to_x0(self, x, sigma, prediction):
        """The clean data that an answer means."""
        return x - sigma * prediction

    def snr(self, sigma):
        return sigma**-2

    def gain(self, sigma):
        """|d to_x0 / d prediction|^2"""
        return sigma**2

    def loss(self, predict, x0, noise, t, min_snr=None, balanced=False, where=None):
        """Squared error of a prediction -> [B]; `where`: the part that counts, bool, broadcasts to x0.

        `predict(x, t)`: the network; x0, noise [B,...]; t: training timesteps [B] (or [B,F], one a frame), best left
        on the CPU. `min_snr`: gamma of Min-SNR weighting (2303.09556), by which the error in x0 weighs min(snr, gamma).
        `balanced`: it weighs 2 sqrt(snr), the middle between an error in x0 and one in noise. All noise levels of a
        trained network then count about alike, which 2312.02696 learns weights for.
        """
        sigma = self.schedule.sigma(t).to(x0)
        sigma = sigma.reshape(sigma.shape + (1,) * (x0.ndim - sigma.ndim))
        prediction = predict(self.scaled(self.mix(x0, noise, sigma), sigma), t.to(x0.device))
        error = (prediction - self.target(x0, noise, sigma)) ** 2  # promotes a 16-bit prediction to x0's type
        if balanced:
            error = error * 2 * self.snr(sigma).sqrt() * self.gain(sigma)
        elif min_snr is not None:
            error = error * self.snr(sigma).clamp(max=min_snr) * self.gain(sigma)
        if where is None:
            return error.flatten(1).mean(1)
        where = where.expand_as(error).flatten(1)
        return (error.flatten(1) * where).sum(1) / where.sum(1)

    def denoiser(self, predict, grid=None):
        """A function denoise(x, sigma) -> x0 for the samplers, from the network `predict(x, t)` (guidance inside).

        With `grid` the network is told exactly the grid's timesteps; otherwise, and between them, schedule.t(sigma).
        """
        def denoise(x, sigma):
            told = () if grid is None else grid.timesteps[grid.sigmas[:-1] == sigma]
            t = told[0] if len(told) else self.schedule.t(sigma).float()
            prediction = predict(self.scaled(x, sigma), t.to(x.device))
            return self.to_x0(x, sigma, prediction.to(x.dtype))

        return denoise


class V(Eps):
    """The network predicts v = cos(phi) * noise - sin(phi) * x0 with tan(phi) = sigma (2202.00512)."""

    def target(self, x0, noise, sigma):
        return (noise - sigma * x0) / (sigma**2 + 1) ** 0.5

    def to_x0(self, x, sigma, prediction):
        return x / (sigma**2 + 1) - prediction * (sigma / (sigma**2 + 1) ** 0.5)

    def gain(self, sigma):
        return sigma**2 / (sigma**2 + 1)


class Flow(Eps):
    """The network predicts the velocity noise - x0 of the straight line from data (sigma 0) to noise (sigma 1).

    Rectified flow, 2209.03003, in the direction of the released SD3 and OneDiffusion code; t = 1000 * sigma.
    """

    def mix(self, x0, noise, sigma):
        return (1 - sigma) * x0 + sigma * noise

    def scaled(self, x, sigma):
        return x

    def target(self, x0, noise, sigma):
        return noise - x0

    def snr(self, sigma):
        return ((1 - sigma) / sigma) ** 2


OBJECTIVES = {"epsilon": Eps, "v_prediction": V, "flow": Flow}
