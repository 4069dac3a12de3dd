# %% [markdown]
# # P3 · OneDiffusion: every task a sequence of frames
#
# - **Goal:** tell a given frame from one to be drawn by its noise level alone, and train a network
#   from nothing that does
# - **Time:** 45 s
# - **Needs:** 04_noise
# - **Figures:** frames, depth, uses, drawn
#
# In OneDiffusion (arXiv 2411.16318) pictures, maps and cameras are frames of one sequence. A
# transformer is trained with a noise level of its own for each frame. To draw, one holds the given
# frames at level 0 and lets the others come down from noise. This lesson checks that given frames
# stay as they are, draws depth both ways with the small network that ships, and trains a still
# smaller one on two tasks.

# %%
from lesson import Lesson

lesson = Lesson("P3_onediffusion")

import math

import torch

from minipic.common import find_file, rng
from minipic.diffusion.frames import flow_grid, sample_frames
from minipic.draw_settings import DrawSettings
from minipic.figures import curves, image_grid
from minipic.image import to_pictures, to_tensor
from minipic.papers import find_adapter, onediffusion
from minipic.papers.onediffusion import Adapter, DrawOptions
from minipic.pipeline import Pipeline
from minipic.world.tasks import TASKS as WORLD

TASKS = ("deblurring", "super_resolution")
STEPS = 140
BATCH = 8

config = onediffusion.Settings(
    tasks=",".join(TASKS), hidden_size=96, depth=4, scenes=160, batch=BATCH, caption_dropout=0.1,
    precision="fp32", seed=lesson.seed)
torch.manual_seed(lesson.seed)
pipeline = onediffusion.build(config)
params = onediffusion.setup(pipeline, config)
data = onediffusion.data(pipeline, config)
network = pipeline.nextdit
print(f"{sum(param.numel() for param in params):,} weights, all of them new")

# %% [markdown]
# ## Predict
#
# Training never says which frame is the answer. It only draws a noise level for each frame. **How
# can the network know which frame is given? And if we start to draw with the picture and the
# blurred picture both at level 1, pure noise, what will come out?**
#
# ## Frames
#
# A sample of deblurring has two frames, the sharp picture and the blurred one. The text names the
# task, `[[deblurring]]`.

# %%
example = data.examples[0]
print(onediffusion.full_text(example.task, example.text))
frames = data.frames[0].float()  # [2,4,16,16]: two latents
noise = torch.randn(frames.shape, generator=rng(lesson.seed, "noise"))
rows = []
labels = []
for levels in ((0.0, 0.0), (0.7, 0.0), (0.3, 0.8), (1.0, 1.0)):
    sigma = torch.tensor(levels)[:, None, None, None]
    noisy = (1 - sigma) * frames + sigma * noise
    rows.append(onediffusion.frame_picture(pipeline, noisy))
    labels.append(f"levels {levels[0]:g} and {levels[1]:g}")
lesson.show(image_grid(rows, labels, columns=2, cell=256), "frames",
            "The two frames of one sample, decoded, at four pairs of noise levels: both clean, the "
            "blurred one given, two different levels as in training, and both pure noise.")

# %% [markdown]
# The noise is added along a straight line, x = (1 - sigma) x0 + sigma noise, and the network
# predicts its direction, noise - x0. The level of each frame is an input of the network: so it
# knows which frame can be trusted. `way` below is which frames are given in drawing; a share of
# `clean` of the training samples has them exactly clean, because independent levels are almost
# never 0.

# %%
lesson.show_source(onediffusion.draw_timesteps)
lesson.show_source(onediffusion.loss)
levels = []
for index in range(400):
    levels.append(onediffusion.draw_timesteps(2, config, rng(lesson.seed, "levels", index)) / 1000)
levels = torch.stack(levels)
print("way", onediffusion.ways_to_give("deblurring", 2))
print(f"of 400 samples, {int((levels.amin(1) < 0.02).sum())} have a frame below level 0.02")
lesson.expect("correlation of the two levels", torch.corrcoef(levels.T)[0, 1])

# %% [markdown]
# ## A frame at level 0 comes back unchanged
#
# The sampler, `sample_frames` in minipic/diffusion/frames.py, is told which frames to draw.
# Whatever the network says of the others, they stay. We try it with a "network" that answers with
# random numbers.

# %%
def nonsense(x, t):
    return torch.randn(x.shape, generator=rng(lesson.seed, "nonsense"))


is_drawn = torch.tensor([True, False])
x = torch.where(is_drawn[:, None, None, None], noise, frames)[None]
for x, x0 in sample_frames(nonsense, x, is_drawn, flow_grid(10), label="zero"):
    pass
lesson.expect("change of the given frame", (x[0, 1] - frames[1]).abs().max())
lesson.expect("change of the drawn frame", (x[0, 0] - noise[0]).abs().max())

# %% [markdown]
# The network sees the given frames at every step, clean. Nothing else makes a task: to go the other
# way round, from a picture to its map, one swaps `is_drawn`.
#
# ## Depth both ways, with trained weights
#
# `weights/adapters/onediffusion` is a network of 5.0 million weights that learned twelve tasks in
# 80 minutes of one CPU core. Below, the same two frames are drawn twice: first the picture is given
# and the depth is drawn, then the depth is given. The scenes are new to it. Depth maps of this
# world are all alike in part, near at the bottom and far at the top. So we compare each drawn map
# with its own truth and with that of another scene.

# %%
drawer = Pipeline.load(find_file("weights/tiny"))
_, file = find_adapter(find_file("weights/adapters/onediffusion"))
shipped = onediffusion.load_adapter(drawer, file)
scenes = WORLD["depth"]((lesson.seed, "lesson"), range(6))
pictures = []
labels = []
maps = []
for picture, depth, prompt in zip(
        to_pictures(scenes.target), to_pictures(scenes.source), scenes.prompts):
    settings = DrawSettings(prompt, steps=10, guidance=2.0, seed=lesson.seed)
    to_depth = onediffusion.draw(drawer, shipped, settings, [picture], "image2depth")[0]
    to_picture = onediffusion.draw(drawer, shipped, settings, [depth], "depth2image")[0]
    pictures += [picture, to_depth, depth, to_picture]
    labels += [prompt, "its depth, drawn", "its depth, true", "from the true depth, drawn"]
    maps.append(to_tensor(to_depth))
lesson.show(image_grid(pictures[:16], labels[:16], columns=4, cell=128), "depth",
            "A row for each of four scenes: the given picture, its depth as the network draws it, "
            "its true depth (near is bright), and a picture that is drawn from the true depth and "
            "the caption.")
drawn_maps = torch.stack(maps)
error = (drawn_maps - scenes.source).square().mean().sqrt()
others = (drawn_maps - scenes.source.roll(1, 0)).square().mean().sqrt()
lesson.expect("error of the drawn depth over that to another scene's", error / others)

# %% [markdown]
# The way from the picture to its depth has one answer, and the network nearly finds it. The way
# back has many: the depth says nothing of colours, floor and sky, and there the network follows the
# caption only in part.
#
# Which of the twelve tasks the text asks for is decided at the very beginning of a drawing, where
# the drawn frame is pure noise. With the usual logit-normal levels, one in 20,000 lies above 0.98.
# A first training of 8,000 steps therefore often drew the wrong kind of map. 4,000 more steps with
# `--shift 3`, the paper's, which moves the levels towards noise, brought the depth's relative error
# from 0.44 to 0.08.
#
# ## A short training, from nothing
#
# The loss with another sample's given frame, as a multiple of the loss with the right one, tells
# how much the network uses it: 1 is not at all.

# %%
unseen = {}
for task in TASKS:
    examples = onediffusion.examples_of_world(task, pipeline, config, config.scenes, 16)
    clean = torch.stack(onediffusion.encode_frames(pipeline, examples)).float()
    text, mask = onediffusion.encode(pipeline, [data.text(example) for example in examples])
    given = torch.tensor([False, True]).expand(16, 2)
    unseen[task] = {
        "x0": clean, "noise": torch.randn(clean.shape, generator=rng(lesson.seed, task)),
        "t": torch.full((16, 2), 600.0).masked_fill(given, 0), "given": given, "text": text,
        "mask": mask}


@torch.no_grad()
def use_of_given(task: str) -> float:
    """The loss with another sample's given frame over that with the right one, at level 0.6."""
    batch = unseen[task]
    own = onediffusion.loss(pipeline, batch, config)
    swapped = batch["x0"].clone()
    swapped[:, 1] = swapped[:, 1].roll(1, 0)
    others = onediffusion.loss(pipeline, batch | {"x0": swapped}, config)
    return (others / own).item()


optimizer = torch.optim.AdamW(params, lr=4e-3)
uses = {task: ([], []) for task in TASKS}
for step in range(STEPS + 1):
    if step % 20 == 0:
        for task, (steps, values) in uses.items():
            steps.append(step)
            values.append(use_of_given(task))
    for group in optimizer.param_groups:
        group["lr"] = 4e-3 * min(1, (step + 1) / 10)
    loss = onediffusion.loss(
        pipeline, data.batch(step, range(BATCH * step, BATCH * (step + 1))), config)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
for task, (_, values) in uses.items():
    print(f"{task:16}", [round(value, 2) for value in values])
lesson.show(curves(uses, "steps of training", "use of the given frame",
                   logarithmic=True), "uses",
            "The loss with another sample's given frame, as a multiple of the loss with the right "
            "one, on a logarithmic scale. It grows for both tasks alike, and faster than "
            "exponentially for a while.")
for task, (_, values) in uses.items():
    lesson.expect(f"doublings of the loss with another's frame, {task}", math.log2(values[-1]))

# %% [markdown]
# ## Drawing with known and unknown frames

# %%
network.eval()
adapter = Adapter(network, data.trained_as)
pictures = []
labels = []
for example, task in zip(data.shown, TASKS):
    clean, = onediffusion.encode_frames(pipeline, [example])
    settings = DrawSettings(example.text, steps=10, guidance=1.0, seed=lesson.seed)
    wanted, given = (onediffusion.frame_picture(pipeline, clean[i:i + 1].float()) for i in (0, 1))
    drawn = onediffusion.draw(pipeline, adapter, settings, [given], task)[0]
    both = onediffusion.draw_frames(
        pipeline, adapter, clean.float(), torch.tensor([True, True]), task, settings,
        DrawOptions())[0]
    pictures += [given, drawn, wanted, *(
        onediffusion.frame_picture(pipeline, both[i:i + 1]) for i in (0, 1))]
    labels += [f"given, {task}", "drawn", "wanted", "both drawn: picture", "and the other"]
lesson.show(image_grid(pictures, labels, columns=5, cell=128), "drawn",
            "A row for each task, here of the same scene: the given frame, the drawn one, "
            "the truth, and both frames drawn from noise. With a given frame the object, its place "
            "and colours come out, in patches. With none the network draws coloured patches that "
            "show nothing, but the same ones in both frames.")
agreement = torch.corrcoef(both.flatten(1))[0, 1]
lesson.expect("correlation of two frames drawn together", agreement)

# %% [markdown]
# From pure noise the network makes no picture; that takes far longer. But the two frames agree,
# although their noise does not. It has learned first what frames have to do with each other. That
# is the idea of the paper: one network for all joint and conditional drawings, and the noise levels
# say which one is meant.
#
# ## Change one thing
#
# `LABEL` is the noise level that given frames are said to have. The released code says "last", the
# last level of the drawing; after training with exactly clean frames "zero" is right. Does it
# matter here?

# %%
LABEL = "last"
changed = onediffusion.draw(
    pipeline, adapter, settings, [given], task, DrawOptions(label=LABEL))[0]
difference = (to_tensor(changed) - to_tensor(drawn)).abs().mean()
print(f"mean difference of a pixel {127.5 * difference.item():.1f} of 255 levels")

# %% [markdown]
# ## Exercises
#
# 1. Set `shared_t=True`: one level for all frames of a sample. Which drawings can such a network
#    still do?
# 2. Set `clean=0`, which is the paper's. How often is a given frame nearly clean in training? Count
#    with `levels` above, and look at the use of the given frame.
# 3. Add the task "depth2image". It is done both ways. Which way would you expect to be learned
#    first, and what does a short training say?
