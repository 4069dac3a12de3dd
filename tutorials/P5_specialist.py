# %% [markdown]
# # P5 · Specialist Diffusion: a style from eight pictures
#
# - **Goal:** tell a loss that trains from one that is only shown, and weigh style against content
# - **Time:** 60 s
# - **Needs:** 04_noise
# - **Figures:** pictures, drawings
#
# The paper (CVPR 2023) fine-tunes a model on fewer than ten pictures of a style. It varies their
# captions, changes the pictures, trains only the timesteps that a drawing visits, and adds a
# content loss. This lesson asks of the content loss whether it does anything, then trains for half
# a minute and looks at what is learned, the style, against what is lost, the content. At 64 pixels
# it shows the mechanism, not the quality that the paper claims.

# %%
from lesson import Lesson

lesson = Lesson("P5_specialist")

import contextlib
import io
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from minipic.common import find_file, rng
from minipic.figures import image_grid
from minipic.image import to_pictures, to_tensor
from minipic.papers import specialist
from minipic.pipeline import Pipeline
from minipic.world import probe
from minipic.world.caption import describe, say
from minipic.world.scene import render, sample_scene
from minipic.world.styles import poster

STEPS = 50
PROMPTS = 6
specialist.CONTENT_STEPS = 5  # a short drawing will do here

# %% [markdown]
# ## Predict
#
# The released code draws a picture with the model, saves it as 8-bit levels, and compares it with
# the training picture by CLIP. The result is added to the loss. **What is its gradient?**
#
# ## Eight pictures with captions

# %%
folder = Path(tempfile.mkdtemp())
scenes = [sample_scene(("lesson", lesson.seed), i, objects=1) for i in range(8)]
pictures = to_pictures(render(scenes, truth=False, shade=poster).rgb)
captions = [say(describe(scene), rng("lesson", i)) for i, scene in enumerate(scenes)]
for i, (picture, caption) in enumerate(zip(pictures, captions)):
    picture.save(folder / f"{i}.png")
    (folder / f"{i}.txt").write_text(caption)
lesson.show(image_grid(pictures[:4], captions[:4], columns=4, cell=128), "pictures",
            "Four of the eight posters that are all that the model gets to see of the style. Their "
            "captions say what is shown, not how.")

config = specialist.Settings(
    data=str(folder), style="poster", batch=8, lr=2e-4, doubled=0.2, precision="fp32",
    content_every=1, seed=lesson.seed)


def start(config: specialist.Settings):
    """The tiny model, what trains, and the batches."""
    pipeline = specialist.build(config)
    pipeline.requires_grad_(False)
    params = specialist.setup(pipeline, config)
    for param in params:
        param.requires_grad_(True)
    with contextlib.redirect_stdout(io.StringIO()):  # it reports on the folder every time
        return pipeline, params, specialist.data(pipeline, config)


# %% [markdown]
# ## The gradient of the content loss

# %%
gradients = {}
differences = {}
for content in ("off", "released", "grad"):
    own = replace(config, content=content, content_weight=1.0)
    pipeline, params, data = start(own)
    loss, _ = specialist.loss(pipeline, data.batch(0, range(8)), own)
    gradient = torch.autograd.grad(loss, params)
    gradients[content] = torch.cat([part.flatten() for part in gradient])
    difference = (gradients[content] - gradients["off"]).norm() / gradients["off"].norm()
    differences[content] = 100 * difference.item()
    print(f"{content:8}  loss {loss:.4f}  its gradient differs by {100 * difference:.1f} %")
lesson.expect("change of the gradient by the released content loss, in %", differences["released"])
lesson.expect("change of the gradient by one with a gradient, in %", differences["grad"])

# %% [markdown]
# None: rounding to levels ends every path back to the weights, and the code does not even record
# one. As released, the content loss only adds a number to the loss that is shown. With a gradient
# through one step of the drawing it does pull at the model, and costs a drawing in each step. A
# test of one line would have told: `assert content.requires_grad`.
#
# ## Style against content
#
# Six prompts that no picture shows. The style is how far the textures are from those of true
# posters; the content is how many of the facts in the caption a judge reads.

# %%
judge = probe.load_judge(find_file("weights/tiny/judge"))
unseen = [sample_scene("unseen", i, objects=1) for i in range(PROMPTS)]
asked = [describe(scene) for scene in unseen]
prompts = [say(facts, rng("unseen", i)) for i, facts in enumerate(asked)]
truth = render([sample_scene("truth", i) for i in range(60)], truth=False, shade=poster).rgb
with torch.no_grad():
    textures = probe.embed_style(judge, truth).mean(0, keepdim=True)


@torch.no_grad()
def measure(pipeline: Pipeline):
    """(style distance, share of facts that are right, the drawings)."""
    drawn = []
    for i, prompt in enumerate(prompts):
        text = specialist.prompt_for("poster", prompt)
        drawn += pipeline.generate(text, steps=8, seed=i, progress=False)
    images = torch.stack([to_tensor(picture) for picture in drawn])
    style = probe.distance(probe.embed_style(judge, images), textures).mean().item()
    facts = probe.accuracy(asked, probe.read(judge, images))
    shares = [facts[name] for name in ("color", "shape", "size", "floor", "sky")]
    return style, sum(shares) / len(shares), drawn


def train(config: specialist.Settings):
    """The pipeline after STEPS steps, and what `measure` says of it."""
    pipeline, params, data = start(config)
    optimizer = torch.optim.AdamW(params, config.lr)
    for step in range(STEPS):
        batch = data.batch(step, range(8 * step, 8 * step + 8))
        loss, _ = specialist.loss(pipeline, batch, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return pipeline, measure(pipeline)


pipeline, _, _ = start(config)
before = measure(pipeline)
specialised, whole = train(config)
_, plain = train(replace(config, doubled=0.0, templates=False, synonyms=False, sparse_steps=0))
rows = {"untouched": before, "Specialist": whole, "plain fine-tuning": plain}
for name, (style, content, _) in rows.items():
    print(f"{name:18} style distance {style:.3f}  content {content:.2f}")
drawings = [picture for row in rows.values() for picture in row[2]]
labels = []
for name in rows:
    labels += [name] + [""] * (PROMPTS - 1)
lesson.show(image_grid(drawings, labels, columns=PROMPTS, cell=64), "drawings",
            "Six prompts: the untouched model, Specialist Diffusion and plain fine-tuning after "
            f"{STEPS} steps on the same eight pictures.")
lesson.expect("style distance of the untouched model", before[0])
lesson.expect("how much nearer Specialist is", before[0] - whole[0])
lesson.expect("how much nearer plain fine-tuning is", before[0] - plain[0])
lesson.expect("content after Specialist", whole[1])

# %% [markdown]
# ## Change one thing
#
# The prompts above all name the style. Leave it out: does the specialised model still draw
# posters?

# %%
PROMPT = prompts[0]
for text in (specialist.prompt_for("poster", PROMPT), PROMPT):
    drawn = specialised.generate(text, steps=8, n=2, progress=False)
    images = torch.stack([to_tensor(picture) for picture in drawn])
    with torch.no_grad():
        distance = probe.distance(probe.embed_style(judge, images), textures).mean()
    print(f"style distance {distance:.3f} for {text!r}")

# %% [markdown]
# ## Exercises
#
# 1. `sparse_steps` trains only the timesteps that a drawing visits. Which are these for 20 steps?
#    Show with a gradient that all others leave no trace.
# 2. Leave out one part, such as `replace(config, doubled=0.0)`. Which one matters for the style,
#    which for the content? tests/benchmarks/specialist.py measures it on hundreds of drawings.
# 3. Train for 200 steps. At which step is the style learned, and at which is content lost?
