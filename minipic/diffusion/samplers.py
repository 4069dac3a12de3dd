"""Samplers: from noise to data along the noise levels of a grid.

Each is a generator sampler(denoise, x, sigmas, noise=None) that yields (x, x0) after every step:
the state at the next noise level and the prediction of the clean data that led there.
    denoise(x, sigma) -> x0   the model (Objective.denoiser)
    x [B,...]                 starts at level sigmas[0]
    sigmas [n+1]              noise levels, falling
    noise(i)                  fresh unit noise for step i, for the sampler that adds some; if None
                              PyTorch's own generator makes it
Edit a yielded x in place and the next step goes on from the edited one (`keep_unmasked` does).

Every formula is in the coordinate x = x0 + sigma * noise, where a deterministic step only moves x
along the straight line through x0. Karras et al., 2206.00364.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[int], Tensor] | None
Steps = Iterator[tuple[Tensor, Tensor]]  # (x, x0) after every step


def euler(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise = None) -> Steps:
    """Keep the noise that x0 leaves in x, lower its amount; first order.

    In this coordinate it is also DDIM (2010.02502, eq. 12 with eta = 0; DDIM's own coordinate is
    x / sqrt(sigma^2 + 1)) and, because (x - x0) / sigma is noise - x0 on a flow's line, Euler's
    method for flow matching.
    """
    for i in range(len(sigmas) - 1):
        x0 = denoise(x, sigmas[i])
        slope = (x - x0) / sigmas[i]
        x = x + slope * (sigmas[i + 1] - sigmas[i])
        yield x, x0


def euler_ancestral(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise = None) -> Steps:
    """Step below the next level and add fresh noise up to it: the noise is renewed step by step.

    This is DDPM's own step (2006.11239, eq. 7), or DDIM with eta = 1. Given x and x0, the state at
    the next level has a normal distribution. Its mean keeps the amount sigmas[i+1]^2 / sigmas[i] of
    the old noise, and its variance is what fresh noise must add to reach sigmas[i+1].
    """
    for i in range(len(sigmas) - 1):
        x0 = denoise(x, sigmas[i])
        slope = (x - x0) / sigmas[i]  # the predicted noise, since x = x0 + sigma * noise
        down = sigmas[i + 1] ** 2 / sigmas[i]
        up = (sigmas[i + 1] ** 2 - down**2) ** 0.5  # variances of old and new noise add up
        x = x + slope * (down - sigmas[i]) + up * (noise(i) if noise else torch.randn_like(x))
        yield x, x0


def heun(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise = None) -> Steps:
    """Try Euler's step, then redo it with the mean of the slopes at both ends.

    Second order, two calls per step. 2206.00364, algorithm 1.
    """
    for i in range(len(sigmas) - 1):
        x0 = denoise(x, sigmas[i])
        slope = (x - x0) / sigmas[i]
        step = sigmas[i + 1] - sigmas[i]
        if sigmas[i + 1] > 0:  # at 0 there is no slope
            ahead = x + slope * step
            slope = (slope + (ahead - denoise(ahead, sigmas[i + 1])) / sigmas[i + 1]) / 2
        x = x + slope * step
        yield x, x0


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise = None) -> Steps:
    """Euler's step towards an x0 extrapolated from the last two predictions.

    Second order, one call per step. DPM-Solver++(2M), 2211.01095, algorithm 2: x0 is a line in
    lambda = -log(sigma), taken half a step ahead.

    Three kinds of steps are plain Euler's: the first, which has no past; one to sigma 0, where
    lambda is infinite; and one whose previous step was between equal levels, where the line has no
    slope.
    """
    past = None
    for i in range(len(sigmas) - 1):
        x0 = ahead = denoise(x, sigmas[i])
        if past is not None and sigmas[i - 1] > sigmas[i] and sigmas[i + 1] > 0:
            ratio = (sigmas[i] / sigmas[i + 1]).log() / (sigmas[i - 1] / sigmas[i]).log()
            ahead = x0 + ratio * (x0 - past) / 2
        x = ahead + (sigmas[i + 1] / sigmas[i]) * (x - ahead)
        past = x0
        yield x, x0


SAMPLERS = {
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "ddim": euler,  # Euler's step on a grid of its own (Schedule.grid)
    "dpmpp_2m": dpmpp_2m,
    "heun": heun,
    "flow_euler": euler,  # Euler's step on a grid of its own
}


def keep_unmasked(
        steps: Steps, add_noise: Callable, known: Tensor, noise: Tensor, mask: Tensor,
        sigmas: Tensor) -> Steps:
    """Inpainting by latent replacement: after each of a sampler's steps, put back the part to keep.

    steps: the sampler's generator. This one yields the same.
    add_noise: Objective.add_noise.
    known [B,C,h,w]: the clean latent.
    noise [B,C,h,w]: the unit noise that x started from.
    mask [B,1,h,w]: 1 where to draw, 0 where to keep.
    sigmas: the sampler's.
    """
    for i, (x, x0) in enumerate(steps):
        x.copy_(mask * x + (1 - mask) * add_noise(known, noise, sigmas[i + 1]))
        yield x, x0
