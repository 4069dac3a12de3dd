# %% [markdown]
# # 04 · Noise and targets
#
# - **Goal:** write x_t from a picture, noise and sigma, and turn epsilon, v and x0 into each other
# - **Time:** 10 s
# - **Needs:** 00_picture, 03_vae
# - **Figures:** ladder, snr, errors
#
# Training a diffusion model is one game. Take a picture's latent x0, add noise, and let a network
# find out what was added. The rules of the game are a noise schedule and a target.

# %%
from lesson import Lesson

lesson = Lesson("04_noise")

import torch

from minipic.common import rng
from minipic.diffusion.objectives import Epsilon, VPrediction
from minipic.figures import curves, image_grid
from minipic.latents import encode_text
from minipic.pipeline import Pipeline
from minipic.text import size_ids
from minipic.world.caption import caption
from minipic.world.scene import render, sample_scene

torch.set_grad_enabled(False)
pipeline = Pipeline.load("weights/tiny")
schedule = pipeline.schedule
scenes = [sample_scene(("lesson", lesson.seed), i) for i in range(64)]
mean, _ = pipeline.vae.encode(render(scenes, truth=False).rgb)
x0 = pipeline.vae.scale(mean)  # [64,4,16,16]
noise = torch.randn(x0.shape, generator=rng(lesson.seed, "noise"))

# %% [markdown]
# ## Predict
#
# Timestep t runs from 0 (nearly no noise) to 999 (nearly only noise). **At which t are picture and
# noise equally strong? And at t = 999, is anything of the picture left in x?**
#
# ## Adding noise
#
# Everything is written with one number, the noise level sigma:
#
#     x = x0 + sigma * noise
#
# noise has a standard deviation of 1, and x0 too, nearly (that is what the VAE's scaling factor is
# for). The network sees x divided by sqrt(sigma^2 + 1), so that its input always has the size of
# 1.

# %%
lesson.show_source(VPrediction.network_input)
objective = schedule.objective
times = torch.tensor([0, 200, 354, 500, 700, 999])
steps = []
for t in times:
    sigma = schedule.sigma(t).float()
    x = objective.network_input(objective.add_noise(x0[:1], noise[:1], sigma), sigma)
    steps += pipeline.decode(x)
labels = [f"t {t}, sigma {schedule.sigma(t):.2f}" for t in times]
lesson.show(image_grid(steps, labels, columns=6, cell=100), "ladder",
            "One picture with more and more noise, decoded. At t = 354, with as much noise as "
            "picture, the striped cube and the small cylinder can still be seen; at 700 there is a "
            "hint of dark stripes for those who know; at 999 nothing that an eye could see.")

# %% [markdown]
# ## Signal and noise
#
# The signal-to-noise ratio is SNR = 1 / sigma^2. SDXL's schedule makes it fall steeply at first,
# then evenly (the axis is logarithmic).

# %%
snr = schedule.table ** -2  # of all 1000 timesteps
equal = int((snr > 1).sum())
lesson.expect("t at which picture and noise are equally strong", equal)
lesson.expect("sigma at t = 999", schedule.table[-1])
every = range(0, 1000, 27)  # the last is 999
lesson.show(curves({"SNR": (list(every), snr[::27].tolist()), "as strong": ([0, 999], [1, 1])},
                   "timestep t", "signal-to-noise ratio", logarithmic=True), "snr",
            "The signal-to-noise ratio over the timesteps. It crosses 1 at a third of the way and "
            "ends at 0.005, not at 0.")

# %% [markdown]
# The end is the surprise: at t = 999 something of the picture is left. A pixel's share is small,
# but a mean over 256 pixels has 16 times less noise. Can one still read how bright a picture is?

# %%
x = objective.add_noise(x0, noise, schedule.sigma(torch.tensor(999)).float())
before = x0.mean((2, 3)).flatten()
after = x.mean((2, 3)).flatten()
correlation = torch.corrcoef(torch.stack([before, after]))[0, 1]
lesson.expect("correlation of channel means with those at t = 999", correlation)

# %% [markdown]
# One can. In training the network learns to rely on it. When it draws, it starts from pure noise,
# whose mean is always near 0, and so the pictures of such models are never very dark or very
# bright ("zero terminal SNR", arXiv 2305.08891, is the remedy).
#
# ## Three targets that mean the same
#
# The network could predict the noise (epsilon), the picture (x0), or v, a mixture of both that has
# the size of 1 at every noise level. From x and any one of them the other two follow.

# %%
lesson.show_source(VPrediction.target)
lesson.show_source(VPrediction.to_x0)
sigma = schedule.sigma(torch.tensor(600)).float()
x = objective.add_noise(x0, noise, sigma)
for kind in (Epsilon, VPrediction):
    own = kind(schedule)
    again = own.to_x0(x, sigma, own.target(x0, noise, sigma))
    lesson.expect(f"error of x0 from a perfect {kind.__name__}", (again - x0).abs().max())
v = VPrediction(schedule).target(x0, noise, sigma)
epsilon = (v + sigma * x / (sigma**2 + 1) ** 0.5) / (sigma**2 + 1) ** 0.5
lesson.expect("error of the noise from v", (epsilon - noise).abs().max())

# %% [markdown]
# ## Where the model has work to do
#
# We let the tiny model guess x0 at eleven noise levels and compare with the truth. Beside it, the
# best guess that knows nothing of pictures: x / (sigma^2 + 1), which is right for random numbers.

# %%
few = slice(0, 16)  # of the pictures, for speed
texts = [caption(scene, rng(lesson.seed, i)) for i, scene in enumerate(scenes[few])]
context, pooled = encode_text(pipeline, texts)
sizes = size_ids((64, 64), (0, 0), (64, 64)).expand(len(texts), -1)


def errors(t):
    """Mean squared error of x0: the model's, and that of the guess without a model."""
    sigma = schedule.sigma(torch.tensor(t)).float()
    x = objective.add_noise(x0[few], noise[few], sigma)
    prediction = pipeline.unet(objective.network_input(x, sigma), t, context, pooled, sizes)
    guess = objective.to_x0(x, sigma, prediction)
    simple = x / (sigma**2 + 1)
    return (guess - x0[few]).square().mean().item(), (simple - x0[few]).square().mean().item()


levels = [1, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999]
model, simple = zip(*[errors(t) for t in levels])
lesson.show(curves({"tiny UNet": (levels, model), "no model": (levels, simple)},
                   "timestep t", "error of x0"), "errors",
            "The squared error of the guess of x0. Without a model it nears the variance of x0, "
            "1; the UNet stays far below, most of all in the middle.")
lesson.expect("error of the UNet at t = 100", model[1])
lesson.expect("error of the UNet at t = 500", model[5])
lesson.expect("error of the UNet at t = 999", model[-1])

# %% [markdown]
# Even at t = 999 the UNet is better than nothing: the caption tells it what to expect.
#
# ## Change one thing
#
# Take the caption away (`""` in place of each text) and compute the last error again. How much of
# the picture was in the words?

# %%
TEXTS = [""] * len(texts)
context, pooled = encode_text(pipeline, TEXTS)
print(f"error at t = 999: {errors(999)[0]:.3f} without captions, {model[-1]:.3f} with them")

# %% [markdown]
# ## Exercises
#
# 1. Show on paper that x / sqrt(sigma^2 + 1) has variance 1 if x0 and noise have.
# 2. Write epsilon in terms of x and v. The line above that computes `epsilon` is the answer.
# 3. `Schedule(rescale_betas_zero_snr=True)` is the remedy of 2305.08891. Which correlation do you
#    measure at its last timestep? Why can such a model not be trained to predict epsilon?
