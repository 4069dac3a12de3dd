# %% [markdown]
# # 06 · Train it from nothing
#
# - **Goal:** write the training loop of a diffusion model, test it, and say what its loss tells
# - **Time:** 60 s
# - **Needs:** 04_noise, 05_unet
# - **Figures:** loss, levels, drawings, unknown
#
# Lesson 04 has the game: add noise, guess what was added. Lesson 05 has the network. Training plays
# the game again and again, and after each round moves the weights a little so that the guess gets
# better. This lesson does that for twenty seconds, with a network that knows nothing.

# %%
from lesson import Lesson

lesson = Lesson("06_train")

import contextlib
import inspect
import io
import itertools
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

import train
from minipic.common import find_file, rng
from minipic.diffusion.objectives import Objective
from minipic.figures import curves, image_grid, loss_curve
from minipic.image import to_tensor
from minipic.latents import encode_text
from minipic.models.unet import UNet
from minipic.pipeline import Pipeline
from minipic.recipes import t2i
from minipic.text import size_ids
from minipic.training.optimizer import EMA, build_optimizer, clip_gradients
from minipic.world import probe
from minipic.world.caption import parse
from minipic.world.scene import Object, render, sample_scene

pipeline = Pipeline.load("weights/tiny")
objective = pipeline.schedule.objective

# %% [markdown]
# ## Predict
#
# The new network begins with zero as its answer to everything. **How large is its first loss? You
# can compute it: lesson 04 has the target v.** Then it sees 240 batches of eight pictures of red,
# green, blue and yellow spheres, cubes and cones. **What does it get right first, the colours or
# the shapes? And does its loss fall to zero?**
#
# ## A small world
#
# Twelve captions. What the caption leaves open is the camera, the light, and how the solid is
# turned. The VAE and the text encoders are the shipped ones and stay as they are. Neither sees
# noise, so each picture and each caption goes through them once.

# %%
COLORS = ("red", "green", "blue", "yellow")
SHAPES = ("sphere", "cube", "cone")
PAIRS = list(itertools.product(COLORS, SHAPES))
PROMPTS = [f"a {color} {shape}" for color, shape in PAIRS]


@torch.no_grad()
def latents_of(key: str, count: int) -> torch.Tensor:
    """Latents [count,4,16,16] of one large solid in the middle; number i shows pair i % 12."""
    scenes = []
    for i in range(count):
        scene = sample_scene((key, lesson.seed), i, objects=1)
        color, shape = PAIRS[i % len(PAIRS)]
        solid = Object(shape, color, "large", turn=scene.objects[0].turn)
        scenes.append(replace(scene, objects=(solid,), floor="grey", sky="blue"))
    images = render(scenes, truth=False).rgb
    means = [pipeline.vae.encode(part)[0] for part in images.split(48)]
    return pipeline.vae.scale(torch.cat(means))


x0 = latents_of("training", 192)
captions = torch.arange(len(x0)) % len(PROMPTS)  # their numbers in PROMPTS
context, pooled = encode_text(pipeline, PROMPTS)
sizes = size_ids((64, 64), (0, 0), (64, 64))

# %% [markdown]
# ## The loss
#
# minipic has one function for it. It adds the noise, asks the network, and compares.

# %%
lesson.show_source(Objective.loss)
BATCH = 8


def loss_of(unet, x0, captions, noise, t) -> torch.Tensor:
    """The loss of each picture [B], with noise of the level of its own timestep t."""
    def predict(x, t):
        return unet(x, t, context[captions], pooled[captions], sizes.expand(len(x), -1))
    return objective.loss(predict, x0, noise, t)


def batch(step: int) -> tuple[torch.Tensor, ...]:
    """Pictures, caption numbers, noise and timesteps, all drawn at random."""
    generator = rng(lesson.seed, "batch", step)
    rows = torch.randint(len(x0), (BATCH,), generator=generator)
    noise = torch.randn(BATCH, *x0.shape[1:], generator=generator)
    t = torch.randint(1000, (BATCH,), generator=generator)
    return x0[rows], captions[rows], noise, t


# %% [markdown]
# ## A new network, and its first loss
#
# The class is the shipped UNet's. As in SDXL, the first level has no attention. The widths are half
# of the shipped ones.

# %%
shipped = pipeline.unet
small = replace(
    shipped.config, block_out_channels=(32, 64, 64), attention_head_dim=(1, 1, 1),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))
lesson.show_source(t2i.zero_residual_branches)


def new_unet() -> UNet:
    torch.manual_seed(lesson.seed)
    unet = UNet(small)
    t2i.zero_residual_branches(unet)
    return unet


unet = new_unet()
print(f"{sum(param.numel() for param in unet.parameters()):,} weights")
pictures, numbers, noise, t = batch(0)
first = loss_of(unet, pictures, numbers, noise, t).mean().item()
sigma = pipeline.schedule.sigma(t)
square = pictures.square().mean((1, 2, 3))  # of each picture's latent
theory = ((1 + sigma**2 * square) / (sigma**2 + 1)).mean().item()
print(f"first loss {first:.3f}, in theory {theory:.3f}")
lesson.expect("first loss over the theory's", first / theory)

# %% [markdown]
# With an answer of zero, the loss is the mean square of the target, v = (noise - sigma x0) /
# sqrt(sigma^2 + 1). Noise has a mean square of 1, and the latents of these pictures have one a
# little above. A first loss far from this number is a bug: a wrong scale, a wrong target, or
# weights that begin too large.
#
# ## First test: one batch by heart
#
# Before any long run, take one batch with its noise and its timesteps, and train on nothing else. A
# program that cannot learn eight samples by heart cannot learn anything.

# %%
settings = t2i.Settings(batch=BATCH, lr=2e-3, ema=0.98)


def one_step(unet, optimizer, samples) -> float:
    """Forward, backward, step. Returns the loss before the step."""
    loss = loss_of(unet, *samples).mean()
    optimizer.zero_grad()
    loss.backward()
    clip_gradients(dict(unet.named_parameters()), settings.max_grad_norm)
    optimizer.step()
    return loss.item()


optimizer = build_optimizer(dict(unet.named_parameters()), settings, {})
by_heart = [one_step(unet, optimizer, batch(0)) for _ in range(50)]
with torch.no_grad():
    other = loss_of(unet, *batch(1)).mean().item()
print("loss at steps 0, 20, 49:", [f"{by_heart[step]:.3f}" for step in (0, 20, 49)])
print(f"loss of another batch: {other:.3f}")
lesson.expect("loss of a batch learned by heart, over its first", by_heart[-1] / by_heart[0])
lesson.expect("loss of another batch over that", other / by_heart[-1])

# %% [markdown]
# In fifty steps the loss has fallen to a quarter, and it is still falling: the program can learn.
# The other batch shows how little that means. So the loss that counts is measured on samples that
# were never trained on.
#
# ## The loop
#
# Every step draws new pictures, new noise and new levels. After each step, an average of the
# weights (EMA) moves towards them, by a share that shrinks from 90 % to 4 %; the 2 % of `ema=0.98`
# would come at step 440. Three times we stop to look: at the loss of unseen pictures at six noise
# levels, with the weights and with their average, and at drawings.

# %%
lesson.show_source(EMA.update)
STEPS = 240
STOPS = (40, 100, STEPS)
LEVELS = (50, 200, 400, 600, 800, 999)
unseen = latents_of("unseen", 24)
unseen_noise = torch.randn(unseen.shape, generator=rng(lesson.seed, "unseen"))
judge = probe.load_judge(find_file("weights/tiny/judge"))
asked = [parse(prompt) for prompt in PROMPTS]


@torch.no_grad()
def loss_at_levels(unet) -> list[float]:
    losses = []
    for level in LEVELS:
        t = torch.full((len(unseen),), level)
        losses.append(loss_of(unet, unseen, captions[:24], unseen_noise, t).mean().item())
    return losses


def draw(unet, prompts: list[str]) -> list:
    """One picture for each prompt, all from the same noise."""
    pipeline.unet = unet
    pictures = []
    for prompt in prompts:
        pictures += pipeline.generate(
            prompt, steps=10, guidance=1.0, seed=lesson.seed, progress=False)
    return pictures


unet = new_unet()
params = dict(unet.named_parameters())
optimizer = build_optimizer(params, settings, {})
ema = EMA(params, settings.ema)
log = []
levels = {"0 steps": loss_at_levels(unet)}
average_over_last = {}  # {step: the loss of the averaged weights over that of the last ones}
drawn = {}
for step in range(STEPS):
    log.append({"step": step, "loss": one_step(unet, optimizer, batch(step))})
    ema.update(step)
    if step + 1 in STOPS:
        raw = loss_at_levels(unet)
        with ema.swapped_in():
            averaged = loss_at_levels(unet)
            drawn[step + 1] = draw(unet, PROMPTS)
        levels[f"{step + 1} steps"] = averaged
        average_over_last[step + 1] = sum(averaged) / sum(raw)
lesson.show(loss_curve(log), "loss",
            "The loss of every step (thin) and its running average (thick), on a logarithmic "
            "scale. The jumps are neither progress nor harm: they come from the noise levels that "
            "a batch of eight happens to draw.")
lesson.expect("mean loss of the last 20 steps", sum(row["loss"] for row in log[-20:]) / 20)

# %% [markdown]
# ## The loss by noise level
#
# One number hides where a model is good. At each level apart, on unseen pictures:

# %%
lines = {name: (LEVELS, losses) for name, losses in levels.items()}
lines["shipped"] = (LEVELS, loss_at_levels(shipped))
lesson.show(curves(lines, "timestep t", "loss of unseen pictures"), "levels",
            "The loss at six noise levels, with averaged weights. It falls first at the noisy "
            "end, and last at t = 50, where after 40 steps it is still above that of answering "
            "zero. The shipped UNet is far better on the left and far worse on the right.")
trained = levels[f"{STEPS} steps"]
for number in (0, 2, -1):
    lesson.expect(f"loss at t = {LEVELS[number]}", trained[number])
lesson.expect("loss of the shipped UNet at t = 50", lines["shipped"][1][0])
lesson.expect("loss of the shipped UNet at t = 999", lines["shipped"][1][-1])
means = torch.stack([x0[captions == number].mean(0) for number in range(len(PROMPTS))])
floor = (unseen - means[captions[:24]]).square().mean()
lesson.expect("loss at t = 999 of a guess that is the mean of each caption's pictures", floor)

# %% [markdown]
# Nowhere can it fall to zero. At t = 999 the picture is all but hidden, and the best guess is the
# mean of all pictures with this caption. What the caption leaves open stays as loss: the last
# checkpoint says how much, and our network is still at more than twice that. It is also why the
# shipped model "loses": it knows solids of all sizes, left and right, under three skies, and cannot
# know that ours are always large, in the middle and under a blue one. Losses can be compared only
# on the same data, and a lower one is not always a better model.
#
# At t = 50 the question is the opposite one: which part of a nearly clean picture is noise? For
# that one must know edges and surfaces exactly. There twenty seconds buy little, and a long
# training buys nearly everything.
#
# ## What it draws

# %%
rows = []
names = []
for step, pictures in drawn.items():
    images = torch.stack([to_tensor(picture) for picture in pictures])
    facts = probe.accuracy(asked, probe.read(judge, images))
    rows += pictures[::2]
    names += [f"{step} steps"] + [""] * 5
    print(f"{step:3} steps: colours right {facts['color']:.2f}, shapes {facts['shape']:.2f}; loss "
          f"of the average over that of the last weights {average_over_last[step]:.3f}")
    if step == STOPS[1]:
        lesson.expect("colours ahead of shapes at the second stop", facts["color"] - facts["shape"])
right = (facts["color"] + facts["shape"]) / 2
lesson.expect("colours and shapes right at the end", right)
lesson.expect("loss of the average over that of the last weights", average_over_last[STEPS])
lesson.show(image_grid(rows, names, columns=6, cell=64), "drawings",
            "A red sphere, a red cone, a green cube, a blue sphere, a blue cone and a yellow cube, "
            "all from one noise, after 40, 100 and 240 steps. First spots, among them some of the "
            "right colour; then a patch of it; then a blotchy solid on a grey floor.")

# %% [markdown]
# Colours come first: a colour is one number for the whole solid, and it can be read at high noise.
# A shape is where one colour ends, a matter of lower levels. This order is the order of the curves
# above, from right to left.
#
# The average costs a copy of the weights. Early it is late: it still remembers worse weights. At a
# constant learning rate it is then better than the weights, which each batch pushes about: here by
# a few per cent. A learning rate that falls to zero does much of the same.
#
# ## The same as a command
#
# `train.py` has the same steps. These are the lines of its loop that you have just written:

# %%
lines = inspect.getsource(train.train).splitlines()
for name in ("compute_gradients", "clip_gradients", "optimizer.step", "zero_grad", "ema.update"):
    number, line = next((i, line) for i, line in enumerate(lines) if name in line)
    print(f"line {number + 1:3} of {len(lines)}: {line.strip()}")
command = (f"t2i --from-nothing --scenes 16 --steps 3 --batch 8 --log-every 1 --sample-every 0 "
           f"--precision fp32 --seed {lesson.seed}")
print("python train.py", command)
with tempfile.TemporaryDirectory() as out:
    with contextlib.chdir(Path(train.__file__).parent), contextlib.redirect_stdout(io.StringIO()):
        assert train.main([*command.split(), "--out", out]) == 0
    print("its folder:", sorted(path.name for path in Path(out).glob("[a-z]*")))
    last = json.loads(Path(out, "log.jsonl").read_text().splitlines()[-1])
lesson.expect("loss of its third step", last["loss"])

# %% [markdown]
# All the other lines are for runs that take hours: they check for numbers that are not finite, log,
# save, stop on Ctrl-C, and go on exactly where they stopped. The recipe also leaves out a tenth of
# the captions, without which there is no guidance (lesson 08), and lets the learning rate rise over
# a hundred steps. After three of them nothing is learned, and the loss is still that of an answer
# of zero: about 1, because over the whole world the latents have a mean square near 1. The shipped
# UNet began with `t2i --from-nothing` and 7,411 steps of 64 pictures, about 250 times as many as
# ours has seen; weights/README.md has that run and those that followed.
#
# ## Change one thing
#
# The text encoders know more words than the new UNet has seen. `UNKNOWN` are prompts outside its
# world. What will it draw?

# %%
UNKNOWN = ["a purple sphere", "a red torus", "a small green cube", "a blue cone at night"]
with ema.swapped_in():
    pictures = draw(unet, UNKNOWN)
lesson.show(image_grid(pictures, UNKNOWN, columns=4, cell=128), "unknown",
            "Prompts with words that the UNet has never met in training. For purple it takes "
            "colours that it knows, the torus has no hole, the cube is not small, and at night the "
            "sky is as light as ever.")

# %% [markdown]
# ## Exercises
#
# 1. Double the learning rate, `lr=4e-3`. What becomes of the loss, and of the drawings? Is the
#    average still only a little better?
# 2. Leave `zero_residual_branches` out. What is the first loss, and after how many steps has the
#    difference gone?
# 3. After `Pipeline.load`, put `pipeline.schedule = pipeline.schedule.override(
#    prediction="epsilon")`: now the noise is the target, and the shipped UNet's curve means
#    nothing. What should the first loss be? Where, over the noise levels, is the loss now high and
#    where low, and why can one not compare it with that of v?
