"""Objectives: what a network is trained to predict, and how its prediction is read as clean data.

Training and sampling use the same class, so that the two cannot disagree. Everything is written in
the coordinate of schedule.py, x = x0 + sigma * noise, except flow matching, which has its own line
between data and noise.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:  # schedule.py imports this file
    from minipic.diffusion.schedule import Grid, Schedule


class Objective:
    """What all objectives share. `schedule` gives the noise level sigma of a timestep; sigma
    broadcasts to x.
    """

    def __init__(self, schedule: "Schedule"):
        self.schedule = schedule

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """The noised data x."""
        return x0 + sigma * noise

    def network_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        """What the network sees: x divided so that its variance is about 1.

        It also turns the last x into the finished latent. A "ddim" grid ends at the lowest trained
        sigma, not at 0, where the file has set_alpha_to_one = false; dividing then gives the latent
        that diffusers hands to its VAE. At sigma 0 nothing changes.
        """
        return x / (sigma**2 + 1) ** 0.5

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """What the network should predict."""
        raise NotImplementedError

    def to_x0(self, x: Tensor, sigma: Tensor, prediction: Tensor) -> Tensor:
        """The clean data that a prediction means."""
        raise NotImplementedError

    def x0_gain(self, sigma: Tensor) -> Tensor:
        """|d to_x0 / d prediction|^2: an error of the prediction times this is the error in x0."""
        raise NotImplementedError

    def snr(self, sigma: Tensor) -> Tensor:
        """The signal-to-noise ratio."""
        return sigma**-2

    def loss(
            self, predict: Callable, x0: Tensor, noise: Tensor, t: Tensor,
            min_snr: float | None = None, balanced: bool = False,
            where: Tensor | None = None) -> Tensor:
        """Squared error of a prediction -> [B].

        predict: the network, predict(x, t). x0, noise [B,...]. t: timesteps [B] (or [B,F], one per
            frame), on the CPU.
        min_snr: gamma of Min-SNR weighting (2303.09556), under which the error in x0 weighs
            min(snr, gamma).
        balanced: the error in x0 weighs 2 sqrt(snr). That is the geometric mean of 1, which counts
            the error in x0, and snr, which counts the error in the noise. The factor 2 makes it
            equal to the weight of v, 1 + snr, where picture and noise are alike strong (snr 1).
            All noise levels of a trained network then count about alike; 2312.02696 learns weights
            that do this.
        where: the part that counts, bool, broadcasts to x0; all of it if None.
        """
        sigma = self.schedule.sigma(t).to(x0, non_blocking=True)
        sigma = sigma.reshape(sigma.shape + (1,) * (x0.ndim - sigma.ndim))
        x = self.add_noise(x0, noise, sigma)
        t = t.to(x0.device, non_blocking=True)
        prediction = predict(self.network_input(x, sigma), t)
        # A prediction in 16 bits is promoted to the type of x0 here.
        error = (prediction - self.target(x0, noise, sigma)) ** 2
        if balanced:
            error = error * 2 * self.snr(sigma).sqrt() * self.x0_gain(sigma)
        elif min_snr is not None:
            error = error * self.snr(sigma).clamp(max=min_snr) * self.x0_gain(sigma)
        error = error.flatten(1)
        if where is None:
            return error.mean(1)
        counts = where.expand_as(x0).flatten(1)
        return (error * counts).sum(1) / counts.sum(1)

    def denoiser(self, predict: Callable, grid: "Grid | None" = None) -> Callable:
        """A function denoise(x, sigma) -> x0 for the samplers, from the network `predict(x, t)`
        (guidance inside).

        grid: the Grid that is followed. At one of its levels the network gets the timestep that
            stands there, which may be rounded. At any other sigma, and without a grid, it gets
            schedule.timestep(sigma).
        """
        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            t = self.schedule.timestep(sigma).float()
            if grid is not None:
                at_this_level = grid.sigmas[:-1] == sigma  # exactly: sigma comes from the grid
                if at_this_level.any():
                    t = grid.timesteps[at_this_level][0]
            prediction = predict(self.network_input(x, sigma), t.to(x.device))
            return self.to_x0(x, sigma, prediction.to(x.dtype))

        return denoise


class Epsilon(Objective):
    """The network predicts the noise (DDPM, 2006.11239)."""

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return noise

    def to_x0(self, x: Tensor, sigma: Tensor, prediction: Tensor) -> Tensor:
        return x - sigma * prediction

    def x0_gain(self, sigma: Tensor) -> Tensor:
        return sigma**2


class VPrediction(Objective):
    """The network predicts v = cos(phi) * noise - sin(phi) * x0 with tan(phi) = sigma (2202.00512).
    """

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return (noise - sigma * x0) / (sigma**2 + 1) ** 0.5

    def to_x0(self, x: Tensor, sigma: Tensor, prediction: Tensor) -> Tensor:
        return x / (sigma**2 + 1) - prediction * (sigma / (sigma**2 + 1) ** 0.5)

    def x0_gain(self, sigma: Tensor) -> Tensor:
        return sigma**2 / (sigma**2 + 1)


class Flow(Objective):
    """The network predicts the velocity noise - x0 of the straight line from data (sigma 0) to
    noise (sigma 1).

    Rectified flow, 2209.03003, in the direction of the released SD3 and OneDiffusion code; t = 1000
    * sigma.
    """

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return (1 - sigma) * x0 + sigma * noise

    def network_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return noise - x0

    def to_x0(self, x: Tensor, sigma: Tensor, prediction: Tensor) -> Tensor:
        return x - sigma * prediction

    def x0_gain(self, sigma: Tensor) -> Tensor:
        return sigma**2

    def snr(self, sigma: Tensor) -> Tensor:
        return ((1 - sigma) / sigma) ** 2


OBJECTIVES = {"epsilon": Epsilon, "v_prediction": VPrediction, "flow": Flow}
