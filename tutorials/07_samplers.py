# %% [markdown]
# # 07 · Samplers
#
# - **Goal:** measure the order of a sampler, and say why one with two calls a step can be cheaper
# - **Time:** 20 s
# - **Needs:** 00_picture, 04_noise
# - **Figures:** orders, errors, drawings
#
# The network says at every noise level where the clean picture is. A sampler turns these answers
# into a path from noise to picture. All of them follow the same curve; they differ in how they
# step along it.

# %%
from lesson import Lesson

lesson = Lesson("07_samplers")

import math

import torch

from minipic.common import rng
from minipic.diffusion.samplers import dpmpp_2m, euler, euler_ancestral, heun
from minipic.diffusion.schedule import karras_sigmas
from minipic.draw_settings import DrawSettings
from minipic.figures import curves, image_grid
from minipic.pipeline import Pipeline

torch.set_grad_enabled(False)
pipeline = Pipeline.load("weights/tiny")
low, high = pipeline.schedule.table[[0, -1]]  # the lowest and the highest noise level
lesson.show_source(euler)

# %% [markdown]
# The slope is (x - x0) / sigma, where x0 is the network's guess. Euler's method takes the slope at
# the start of a step for the whole step. The path is curved, so it leaves it a little, every time.
#
# ## Predict
#
# Heun's method asks the network twice in each step: at the start and at the end of a try. It then
# takes the mean of both slopes. DPM++ 2M asks once, and remembers its last guess. **With twice as
# many steps, by which factor does the error of each become smaller? And with 16 calls of the
# network to spend, which one comes closest?**
#
# ## Where the answer is known
#
# Let the data be random numbers with standard deviation s. Then the best guess is
# x0 = x s^2 / (s^2 + sigma^2), and the path can be solved on paper: x grows and shrinks like
# sqrt(s^2 + sigma^2). So the error of every sampler is known exactly.

# %%
S = 0.5
SAMPLERS = {"Euler": euler, "Heun": heun, "DPM++ 2M": dpmpp_2m}
start = high * torch.randn(1000, generator=rng(lesson.seed, "toy"), dtype=torch.float64)
exact = start * ((S**2 + low**2) / (S**2 + high**2)).sqrt()


def best_guess(x, sigma):
    return x * S**2 / (S**2 + sigma**2)


def draw(sampler, denoise, x, steps):
    """The end of the path at the lowest noise level."""
    for x, _ in sampler(denoise, x, karras_sigmas(high, low, steps + 1).to(x)):
        pass
    return x


def error(x, truth):
    return ((x - truth).norm() / truth.norm()).item()


def order(steps, errors):
    """By how many powers of two the error falls where the steps double, from first to last."""
    return math.log(errors[0] / errors[-1]) / math.log(steps[-1] / steps[0])


steps = [8, 16, 32, 64, 128]
lines = {}
for name, sampler in SAMPLERS.items():
    errors = [error(draw(sampler, best_guess, start, n), exact) for n in steps]
    lines[name] = (steps, errors)
    lesson.expect(f"order of {name} on random numbers", order(steps[2:], errors[2:]))
lesson.show(curves(lines, "steps", "relative error", True, True), "orders",
            "Relative error against the number of steps, both on logarithmic axes, where a power "
            "is a straight line. Euler's line falls by one for every one to the right, the other "
            "two fall by two; they lie on top of each other from 16 steps on.")

# %% [markdown]
# The lines have slopes of -1 and -2. This slope is the *order*. Why? Over a step of length h, the
# curve is x + h x' + h^2 x''/2 + ... Euler's method has the first two terms, so each step misses
# about h^2, and n = 1/h steps miss n h^2 = h together: order 1. The mean of two slopes also gets
# the term with x'' right; each step misses h^3, and all steps h^2: order 2. DPM++ 2M gets x'' from
# the difference of its last two guesses, for free.
#
# ## With the network
#
# There is no formula now. The truth is a drawing in very many steps. Steps are not what costs time
# but calls of the network, and Heun has two in each step. The fourth sampler, Euler ancestral,
# adds fresh noise after every step.

# %%
prompt = "a small red sphere left of a large blue cube"
drawing = pipeline.prepare(DrawSettings(prompt, guidance=1.0, seed=lesson.seed))
objective = pipeline.schedule.objective
denoise = objective.denoiser(pipeline.guided_network(drawing, drawing.stages[0]))
noise = high.float() * drawing.first_noise
truth = draw(dpmpp_2m, denoise, noise, 128)

steps = [4, 8, 16, 32]
lines = {}
pictures = {}
for name, sampler in {**SAMPLERS, "ancestral": euler_ancestral}.items():
    ends = [draw(sampler, denoise, noise, n) for n in steps]
    errors = [error(x, truth) for x in ends]
    calls = [2 * n if name == "Heun" else n for n in steps]
    lines[name] = (calls, errors)
    pictures[name] = [pipeline.decode(objective.network_input(x, low))[0] for x in ends]
    lesson.expect(f"order of {name} with the UNet", order(steps, errors))
lesson.show(curves(lines, "calls of the network", "distance to the truth", True, True), "errors",
            "The same with the tiny UNet, over calls of the network. Euler's line is about half as "
            "steep as the next two. Heun pays two calls a step, so its line begins at 8 and "
            "DPM++ 2M stays below it. The ancestral sampler comes no closer with more steps.")
lesson.expect("error with 16 calls, Euler's by DPM++ 2M's",
              lines["Euler"][1][2] / lines["DPM++ 2M"][1][2])

# %%
rows = [*pictures["Euler"], *pictures["DPM++ 2M"], *pictures["ancestral"]]
names = ("Euler", "DPM++ 2M", "ancestral")
labels = [f"{name}, {n}" for name in names for n in steps]
lesson.show(image_grid(rows, labels, columns=4, cell=110), "drawings",
            "All from one noise, in 4 to 32 steps. Euler's method and DPM++ 2M draw the same cube "
            "from 8 steps on, and nearly with 4. The ancestral sampler draws another cube every "
            "time.")

# %% [markdown]
# The surprise is in the last row. The ancestral sampler has no error in the sense of this lesson:
# its fresh noise makes it a random walk, and every number of steps ends at another picture of the
# same prompt. It is not wrong. It draws from the same distribution, but it cannot be compared
# point by point.
#
# In practice every drawing ends with a step to sigma = 0, which is Euler's for all samplers, and
# the schedule chooses the levels. `pipeline.generate(prompt, sampler="dpmpp_2m", steps=12)` does
# all this.
#
# ## Change one thing
#
# With guidance the path has sharper bends. Draw with `GUIDANCE = 5.0` and compare the errors of 16
# steps with those above. Is 16 steps of Euler's method still close?

# %%
GUIDANCE = 1.0
drawing = pipeline.prepare(DrawSettings(prompt, guidance=GUIDANCE, seed=lesson.seed))
denoise = objective.denoiser(pipeline.guided_network(drawing, drawing.stages[0]))
fine = draw(dpmpp_2m, denoise, noise, 48)
print(f"Euler, 16 steps: {error(draw(euler, denoise, noise, 16), fine):.3f}")

# %% [markdown]
# ## Exercises
#
# 1. Swap `karras_sigmas` for levels that are even in sigma: `torch.linspace(high, low, steps + 1)`.
#    Which order do you measure on random numbers, and how large is the error at 32 steps?
# 2. Write a sampler of your own as a generator: the midpoint method asks at sqrt(sigma sigma') and
#    takes that slope for the whole step. Which order has it?
# 3. Why does the last step of DPM++ 2M to sigma = 0 have to be Euler's? (lambda = -log sigma)
