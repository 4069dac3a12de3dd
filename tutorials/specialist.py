# %% [markdown]
# # Specialist Diffusion: a style from eight pictures
#
# The paper (CVPR 2023) fine-tunes a model on fewer than ten pictures of a style. It varies their
# captions, changes the pictures, trains only the timesteps that a drawing visits, and adds a
# content loss. This lesson asks of the content loss whether it does anything, then trains for half
# a minute and looks at what is learned, the style, against what is lost, the content.
#
# **A question to answer before you run it.** The released code draws a picture with the model,
# saves it as 8-bit levels, and compares it with the training picture by CLIP. The result is added
# to the loss. What is its gradient?

# %%
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minipic.common import rng
from minipic.figures import image_grid
from minipic.image import to_pictures, to_tensor
from minipic.papers import specialist
from minipic.pipeline import Pipeline
from minipic.world import probe
from minipic.world.caption import describe, say
from minipic.world.scene import render, sample_scene
from minipic.world.styles import mosaic

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 40
ABLATION = sys.argv[2] if len(sys.argv) > 2 else "doubled"  # or templates, synonyms, sparse_steps
PROMPTS = 6
specialist.CONTENT_STEPS = 5  # a short drawing will do here


# %% [markdown]
# ## Eight pictures with captions

# %%
folder = Path(tempfile.mkdtemp())
scenes = [sample_scene("lesson", i, objects=1) for i in range(8)]
pictures = to_pictures(render(scenes, truth=False, shade=mosaic).rgb)
captions = [say(describe(scene), rng("lesson", i)) for i, scene in enumerate(scenes)]
for i, (picture, caption) in enumerate(zip(pictures, captions)):
    picture.save(folder / f"{i}.png")
    (folder / f"{i}.txt").write_text(caption)
image_grid(pictures, captions, columns=4).save("specialist-pictures.png")
print("see specialist-pictures.png")

config = specialist.Settings(
    data=str(folder), style="mosaic", batch=8, lr=6e-4, precision="fp32", content_every=1)


def start(config: specialist.Settings):
    """The tiny model, what trains, and the batches."""
    pipeline = specialist.build(config)
    pipeline.requires_grad_(False)
    params = specialist.setup(pipeline, config)
    for param in params:
        param.requires_grad_(True)
    return pipeline, params, specialist.data(pipeline, config)


# %% [markdown]
# ## The gradient of the content loss

# %%
gradients = {}
for content in ("off", "released", "grad"):
    own = replace(config, content=content, content_weight=1.0)
    pipeline, params, data = start(own)
    loss, _ = specialist.loss(pipeline, data.batch(0, range(8)), own)
    gradient = torch.autograd.grad(loss, params)
    gradients[content] = torch.cat([part.flatten() for part in gradient])
    difference = (gradients[content] - gradients["off"]).norm() / gradients["off"].norm()
    print(f"{content:8}  loss {loss:.4f}  its gradient differs by {100 * difference:.1f} %")


# %% [markdown]
# As released, it only adds a number to the loss that is shown. With a gradient through one step of
# the drawing it does pull at the model, and costs a drawing in each step.
#
# ## Style against content
#
# Six prompts that no picture shows. The style is how far the Gram matrix of early features is from
# that of true mosaics; the content is how many of the facts in the caption a judge reads.

# %%
judge = probe.load_judge("weights/tiny/judge")
unseen = [sample_scene("unseen", i, objects=1) for i in range(PROMPTS)]
asked = [describe(scene) for scene in unseen]
prompts = [say(facts, rng("unseen", i)) for i, facts in enumerate(asked)]
truth = render([sample_scene("truth", i) for i in range(60)], truth=False, shade=mosaic).rgb
gram = probe.embed_style(judge, truth).mean(0, keepdim=True)


def measure(pipeline: Pipeline) -> tuple[float, float, list[Image.Image]]:
    """(style distance, share of facts that are right, the drawings)."""
    drawn = []
    for i, prompt in enumerate(prompts):
        text = specialist.prompt_for("mosaic", prompt)
        drawn += pipeline.generate(text, steps=10, seed=i, progress=False)
    images = torch.stack([to_tensor(picture) for picture in drawn])
    style = probe.distance(probe.embed_style(judge, images), gram).mean().item()
    facts = probe.accuracy(asked, probe.read(judge, images))
    shares = [facts[name] for name in ("color", "shape", "size", "place", "floor", "sky")]
    return style, sum(shares) / len(shares), drawn


def train(config: specialist.Settings) -> tuple[list[tuple[float, float]], list[Image.Image]]:
    """(style distance and content before, in the middle and at the end; the last drawings)."""
    pipeline, params, data = start(config)
    optimizer = torch.optim.AdamW(params, config.lr)
    path = [measure(pipeline)[:2]]
    for step in range(STEPS):
        batch = data.batch(step, range(8 * step, 8 * step + 8))
        loss, _ = specialist.loss(pipeline, batch, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step + 1 in (STEPS // 2, STEPS):
            style, content, drawn = measure(pipeline)
            path.append((style, content))
            print(f"step {step + 1:3}  style distance {style:.3f}  content {content:.2f}")
    return path, drawn


# %%
print("Specialist")
whole, drawn = train(config)
print(f"without {ABLATION}")
left_out = {ABLATION: 0 if ABLATION == "sparse_steps" else False}
reduced, drawn_reduced = train(replace(config, **left_out))

# %%
plot = Image.new("RGB", (420, 320), "white")
pen = ImageDraw.Draw(plot)
pen.rectangle([60, 30, 400, 290], outline="lightgray")
pen.text((60, 296), "style distance, from 0.2 to 0.5", fill="black")
pen.text((60, 8), "content, from 0.5 to 1", fill="black")
curves = {"Specialist": (whole, "navy"), f"without {ABLATION}": (reduced, "crimson")}
for row, (name, (path, color)) in enumerate(curves.items()):
    points = []
    for style, content in path:
        x = 60 + (style - 0.2) / 0.3 * 340
        y = 290 - (content - 0.5) / 0.5 * 260
        points.append((x, y))
    pen.line(points, fill=color, width=2)
    x, y = points[-1]
    pen.ellipse([x - 4, y - 4, x + 4, y + 4], fill=color)
    pen.text((70, 250 + 16 * row), name, fill=color)
plot.save("specialist-plot.png")
labels = prompts + [f"without {ABLATION}"] * PROMPTS
image_grid(drawn + drawn_reduced, labels, columns=PROMPTS).save("specialist-drawings.png")
print("see specialist-plot.png and specialist-drawings.png")

# %% [markdown]
# **Answer.** None: rounding to levels ends every path back to the weights, and the code does not
# even record one. A test of one line would have told: `assert content.requires_grad`.
#
# **Try it.** Choose another part to leave out: `python tutorials/specialist.py 40 templates`. Which
# one matters for the style, which for the content? Then end a prompt with " with the inverted
# colors transformation": what did the suffix keep out of the other drawings?
