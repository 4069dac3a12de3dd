"""The noise schedule: training timesteps, noise levels, sampling grids.

Everything is written in one coordinate, the noise level sigma of x = x0 + sigma * noise (Karras et
al., 2206.00364). The "variance preserving" x_t that Stable Diffusion's networks see is
x / sqrt(sigma^2 + 1), so that sigma^2 = (1 - abar) / abar with abar the cumulative product of
1 - beta (DDPM, 2006.11239). Flow matching has its own line, x = (1 - sigma) * x0 + sigma * noise,
and is the one exception.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from minipic.common import CheckedConfig, ParameterError
from minipic.diffusion.objectives import OBJECTIVES, Objective
from minipic.diffusion.samplers import SAMPLERS

# `_class_name` of scheduler_config.json -> the sampler that draws as it does.
SAMPLER_OF = {
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "ddim",  # PNDM's grid and ending; its own multistep rule is not here
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "HeunDiscreteScheduler": "heun",
    "FlowMatchEulerDiscreteScheduler": "flow_euler",
}
CHOICES = {
    "beta_schedule": ("linear", "scaled_linear"),
    "prediction_type": tuple(OBJECTIVES),
    "timestep_spacing": ("leading", "trailing", "linspace", None),
}
# What `Schedule.override` takes; a flow has other samplers, and is none of the two predictions.
OVERRIDES = {
    "spacing": ("leading", "trailing", "linspace"), "prediction": ("epsilon", "v_prediction")}


@dataclass(frozen=True)
class Schedule(CheckedConfig):
    """The keys in which official scheduler_config.json files differ; defaults are SDXL base's."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = "leading"  # None: "leading" for ddim, otherwise "linspace"
    steps_offset: int = 1
    set_alpha_to_one: bool = False  # ddim: end at no noise, not at the lowest trained level
    use_karras_sigmas: bool = False
    rescale_betas_zero_snr: bool = False
    shift: float = 1.0  # flow only
    class_name: str = "EulerDiscreteScheduler"  # may be one whose sampler is not here

    LIMITS = {
        "num_train_timesteps": (2, 100_000), "steps_offset": (0, 100_000), "shift": (0.01, 100.0)}

    def __post_init__(self):
        super().__post_init__()
        for key, choices in CHOICES.items():
            value = getattr(self, key)
            if value not in choices:
                supported = ", ".join(str(choice) for choice in choices)
                raise ParameterError(key, f"{value!r} is not supported (supported: {supported})")
        if not 0 < self.beta_start < 1:
            raise ParameterError("beta_start", f"{self.beta_start} is not between 0 and 1")
        if not self.beta_start < self.beta_end < 1:
            raise ParameterError("beta_end", f"{self.beta_end} is not between beta_start and 1")
        if self.steps_offset >= self.num_train_timesteps:
            raise ParameterError("steps_offset", f"{self.steps_offset} is none of the "
                                                 f"{self.num_train_timesteps} timesteps")
        if not (self.table.isfinite() & (self.table > 0)).all():
            raise ParameterError("beta_end", "some timestep would have no signal or no noise")

    def override(
            self, spacing: str | None = None, prediction: str | None = None,
            karras: bool | None = None, zero_snr: bool | None = None) -> "Schedule":
        """This schedule, changed by what a user knows better than the file; None leaves a key.

        Single files rarely say how they are to be drawn. Turbo, Lightning and other models of few
        steps need spacing="trailing", and some models prediction="v_prediction". zero_snr: the last
        timestep is noise without any picture (2305.08891), as in most models that predict v; such
        need spacing="trailing" too, to begin there.

            pipeline.schedule = pipeline.schedule.override(spacing="trailing")
        """
        for name, value in (("spacing", spacing), ("prediction", prediction)):
            if value is not None and value not in OVERRIDES[name]:
                supported = " or ".join(OVERRIDES[name])
                raise ParameterError(name, f"{value!r} is unknown; choose {supported}")
        known = {
            "timestep_spacing": spacing, "prediction_type": prediction,
            "use_karras_sigmas": karras, "rescale_betas_zero_snr": zero_snr}
        return replace(self, **{key: value for key, value in known.items() if value is not None})

    @property
    def sampler(self) -> str | None:
        """The name of the sampler that the file asks for; None if it is not here."""
        return SAMPLER_OF.get(self.class_name)

    @cached_property
    def objective(self) -> Objective:
        """What the network predicts."""
        return OBJECTIVES[self.prediction_type](self)

    @cached_property
    def table(self) -> torch.Tensor:
        """sigma of every training timestep [T], float64.

        Betas and their product are rounded to float32, as in the program that trained and drew with
        the official weights. In float64 sigma would differ by 4e-7, and pictures could not be
        compared to the last digit.
        """
        power = 0.5 if self.beta_schedule == "scaled_linear" else 1.0
        start = self.beta_start**power
        end = self.beta_end**power
        betas = torch.linspace(start, end, self.num_train_timesteps, dtype=torch.float32)
        betas = betas ** (1 / power)
        abar = (1 - betas).cumprod(0)
        if self.rescale_betas_zero_snr:
            # 2305.08891, algorithm 1: stretch sqrt(abar) until the last one is 0.
            root = abar.sqrt()
            abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
            abar[-1] = 2**-24  # diffusers' choice; 0 would make sigma infinite
        return (((1 - abar) / abar) ** 0.5).double()

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """Noise level (float64) of timesteps t, of any shape; linear between the trained ones."""
        t = t.cpu().double()
        if self.prediction_type == "flow":
            return t / self.num_train_timesteps
        t = t.clamp(0, self.num_train_timesteps - 1)
        below = t.long().clamp(max=self.num_train_timesteps - 2)
        return torch.lerp(self.table[below], self.table[below + 1], t - below)

    def timestep(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """Timesteps (float64) of noise levels: linear in log sigma, exact at trained levels."""
        sigma = torch.as_tensor(sigma).cpu().double()
        if self.prediction_type == "flow":
            return sigma * self.num_train_timesteps
        below = torch.searchsorted(self.table, sigma, right=True) - 1
        below = below.clamp(0, self.num_train_timesteps - 2)
        low = self.table[below].log()
        high = self.table[below + 1].log()
        return below + ((sigma.log() - low) / (high - low)).clamp(0, 1)

    def draw_timestep(self, generator: torch.Generator, spread: float = 0.0) -> torch.Tensor:
        """A random timestep to train at, int64 [].

        spread 0: all timesteps alike often. Otherwise t / num_train_timesteps is the sigmoid of a
        normal random number with this standard deviation (logit-normal, 2403.03206 section 3.1).
        At spread 1 the first and the last tenth are a seventh as frequent as at 0.
        """
        if not spread:
            return torch.randint(self.num_train_timesteps, (), generator=generator)
        share = (spread * torch.randn((), generator=generator)).sigmoid()
        return (share * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)

    def grid(self, steps: int, sampler: str | None = None) -> "Grid":
        """The Grid on which diffusers' scheduler of this kind draws in `steps` steps.

        sampler: a name in SAMPLERS; the file's if None. euler, euler_ancestral and heun use
            fractional timesteps, ddim and dpmpp_2m whole ones.
        Raises ParameterError for steps that do not fit, and for a sampler of another kind of model.
        """
        sampler = sampler or self.sampler
        if sampler is None:
            names = [name for name in SAMPLERS if name != "flow_euler"]
            raise ParameterError(
                "sampler", f"the {self.class_name} of this model is not here; choose one of "
                f"{', '.join(names)}")
        if (sampler == "flow_euler") != (self.prediction_type == "flow"):
            problem = (f"{sampler} cannot draw with a model trained for {self.prediction_type!r}; "
                       "flow models need flow_euler, all others another sampler")
            raise ParameterError("sampler", problem)
        spacing = self.timestep_spacing or ("leading" if sampler == "ddim" else "linspace")
        t = self.spaced_timesteps(steps, sampler, spacing)
        sigmas = self.sigma(t)
        if sampler == "flow_euler":
            sigmas = self.shift * sigmas / (1 + (self.shift - 1) * sigmas)
            t = self.timestep(sigmas)
        if self.use_karras_sigmas:
            if sampler == "dpmpp_2m":  # takes the whole trained range, and whole timesteps
                sigmas = karras_sigmas(self.table[-1], self.table[0], steps)
                t = self.timestep(sigmas).round()
            else:
                sigmas = karras_sigmas(sigmas[0], sigmas[-1], steps)
                t = self.timestep(sigmas)

        end = 0.0
        if sampler == "ddim" and not self.set_alpha_to_one:
            end = self.table[0].item()
        sigmas = torch.cat([sigmas, sigmas.new_tensor([end])]).float()

        # The network sees x / sqrt(sigma^2 + 1). In diffusers, ddim, dpmpp_2m and every "leading"
        # grid start so that it sees noise of variance exactly 1. All other grids start at sigma *
        # noise, of which it sees slightly less. Pictures are the same only if the start is.
        start = sigmas[0]
        leading = spacing == "leading" and sampler != "flow_euler"
        if sampler in ("ddim", "dpmpp_2m") or leading:
            start = (sigmas[0] ** 2 + 1) ** 0.5
        return Grid(sigmas, t.float(), start, self.num_train_timesteps)

    def spaced_timesteps(self, steps: int, sampler: str, spacing: str) -> torch.Tensor:
        """Timesteps [steps], high to low, as table 2 of 2305.08891 spaces them.

        4 of 1000 timesteps with steps_offset 1, for every sampler but dpmpp_2m and flow_euler:
            leading    751 501 251   1
            trailing   999 749 499 249
            linspace   999 666 333   0
        Raises ParameterError for a number of steps that the timesteps do not allow.
        """
        total = self.num_train_timesteps
        # For dpmpp_2m diffusers spaces one step more and leaves out the cleanest timestep, except
        # in trailing spacing.
        count = steps + 1 if sampler == "dpmpp_2m" else steps
        if not 1 <= steps <= count <= total:
            most = total - (count - steps)
            raise ParameterError("steps", f"choose between 1 and {most}, not {steps}")
        if sampler == "flow_euler":
            # Equal steps in sigma = t / total from pure noise, t = total; the last goes to 0.
            return total - torch.arange(steps, dtype=torch.float64) * (total / steps)
        if spacing == "trailing":
            # Counted down from the noisiest timestep, so that the start is what was trained there.
            stride = total - (total - total / steps)  # rounded as by numpy.arange: at 48 it matters
            return (total - torch.arange(steps, dtype=torch.float64) * stride).round() - 1
        t = torch.arange(count, dtype=torch.float64)
        if spacing == "leading":
            # Counted up from the offset in whole strides: the rule that SD and SDXL came with.
            t = t * (total // count) + self.steps_offset
        else:
            # linspace: both ends are timesteps of the grid, and the strides may be fractions.
            t = t * ((total - 1) / max(count - 1, 1))
            # diffusers rounds to whole timesteps for ddim and dpmpp_2m, to float32 for the others.
            t = t.round() if sampler in ("ddim", "dpmpp_2m") else t.float().double()
        return t.flip(0)[:steps]


def karras_sigmas(high: torch.Tensor, low: torch.Tensor, steps: int) -> torch.Tensor:
    """Noise levels [steps], high to low, even in sigma^(1/7): 2206.00364, eq. 5 with rho = 7."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7


@dataclass(frozen=True, eq=False)
class Grid:
    """The noise levels of one drawing.

    sigmas [n+1]: falls to the level of the finished latent: 0, for some ddim files the lowest
        trained one.
    timesteps [n]: what the network gets at each level but the last.
    start: pure noise starts as start * randn.
    All float32, on the CPU.
    """

    sigmas: torch.Tensor
    timesteps: torch.Tensor
    start: torch.Tensor
    num_train_timesteps: int

    def __len__(self) -> int:
        return len(self.timesteps)

    def strength(self, strength: float) -> "Grid":
        """The last int(n * strength) of n steps, those that image-to-image draws.

        Start them at objective.add_noise(x0, noise, sigmas[0]). Raises ParameterError for a
        strength outside (0, 1], and where no step is left.
        """
        if not 0 < strength <= 1:
            raise ParameterError("strength", f"choose above 0 (keep the picture) and up to 1 "
                                             f"(replace it), not {strength}")
        return self.steps_between(len(self) - int(len(self) * strength), len(self))

    def part(self, start: float = 0.0, end: float = 1.0) -> "Grid":
        """The steps of one of several models that draw together.

        start, end: fractions of the way through the schedule; 0 is pure noise, 1 the picture.
            part(end=0.8) and part(start=0.8) are the shares of SDXL's base and refiner; the latent
            passes between them as it is.
        Raises ParameterError where no step is left.
        """
        first = self.steps_above(start) if start > 0 else 0
        return self.steps_between(first, self.steps_above(end))

    def steps_above(self, fraction: float) -> int:
        """How many steps start at or above the timestep where `fraction` of the schedule is done.

        With 1000 timesteps, 0.8 of the schedule is done at timestep 200.
        """
        total = self.num_train_timesteps
        lowest = round(total - fraction * total)
        return int((self.timesteps >= lowest).sum())

    def steps_between(self, first: int, last: int) -> "Grid":
        """Steps number `first` to `last` - 1, counted from the noisy end."""
        if first >= last:
            raise ParameterError(
                "steps", f"no step of the {len(self)} is left to draw; choose more steps or a "
                "higher strength")
        sigmas = self.sigmas[first:last + 1]
        timesteps = self.timesteps[first:last]
        return Grid(sigmas, timesteps, self.start, self.num_train_timesteps)
