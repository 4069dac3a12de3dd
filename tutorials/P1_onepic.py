# %% [markdown]
# # P1 · ONE-PIC: a task is one picture
#
# - **Goal:** turn a task into one picture with a mask, draw its missing part, and say why it
#   matters where the two parts lie
# - **Time:** 40 s
# - **Needs:** 05_unet
# - **Figures:** canvas, seam, use, drawn
#
# The paper (arXiv 2412.05619) puts what is given and what is wanted on one canvas, masks the wanted
# part, and lets a LoRA learn to draw it. No new module, no new loss: the task is in the picture.
# This lesson checks what the mask does, draws step by step, and asks whether the UNet looks across
# the canvas at all. The task is deblurring. At 64 pixels and with few steps it shows the mechanism,
# not the quality that the paper claims.

# %%
from lesson import Lesson

lesson = Lesson("P1_onepic")

from dataclasses import replace

import torch
from torch.nn.functional import pad

from minipic.common import rng
from minipic.figures import bars, grey, image_grid
from minipic.image import to_pictures
from minipic.latents import denoising_loss
from minipic.models.unet import TransformerBlock
from minipic.papers import onepic
from minipic.pipeline import DrawSettings

STEPS = 16
BATCH = 4


def start(layout: str):
    """The tiny model with a new LoRA, what trains, the data, and 8 unseen pairs in batches."""
    torch.manual_seed(lesson.seed)
    config = onepic.Settings(
        task="blur", layout=layout, scenes=48, batch=BATCH, lora_rank=16, balanced=True,
        caption_dropout=0.1, precision="fp32", seed=lesson.seed)
    pipeline = onepic.build(config).requires_grad_(False)
    params = onepic.setup(pipeline, config)
    data = onepic.data(pipeline, config)
    pairs = onepic.pairs_of_world(pipeline, config, config.scenes, 8)
    unseen = onepic.CanvasData(pipeline, pairs, data.examples, config)
    tests = []
    for step in range(2):
        batch = unseen.batch(step, range(4 * step, 4 * step + 4))
        tests.append(batch | {"t": torch.full((4,), 600)})
    return pipeline, params, data, tests, config


models = {layout: start(layout) for layout in ("side", "interlaced")}

# %% [markdown]
# ## Predict
#
# Two layouts: side by side, as the paper says, and interlaced, which is minipic's own: one column
# of latents of the given picture, one of the wanted, and so on. The canvas has the same numbers in
# both. **A pixel of the wanted half attends to all pixels of the canvas. Which share of its
# attention goes to the given half, before training? And which layout learns faster?**
#
# ## The canvas and the mask
#
# `known` is what the UNet sees where nothing is masked. `mask` is 1 where the picture is drawn.

# %%
lesson.show_source(onepic.join)
pictures = []
labels = []
for layout, (pipeline, _, data, _, _) in models.items():
    batch = data.batch(0, range(1))
    pictures += [grey(batch["known"][0, 0], 240), grey(batch["x0"][0, 0], 240),
                 grey(pad(batch["mask"][0, 0].float(), (1, 1, 1, 1)), 240)]
    labels += [f"{layout}: what is known", "what is to come out", "mask"]
lesson.show(image_grid(pictures, labels, columns=3, cell=240), "canvas",
            "One of four latent channels. Side by side: the blurred picture at the left, at the "
            "right the sharp one. Interlaced: the columns alternate, so the picture looks twice "
            "as wide. The mask, in a black frame, is white where the picture is to be drawn. What "
            "is known there is never shown to the UNet.")

# %% [markdown]
# ## The mask at its limits
#
# Where all is masked, nothing is given: the UNet sees x alone, and the loss is text-to-image's.
# Where nothing is masked, it sees the given latents, clean, at every noise level.

# %%
lesson.show_source(onepic.network_view)
pipeline, _, data, _, config = models["interlaced"]
batch = data.batch(0, range(BATCH))
full = batch | {"mask": torch.ones_like(batch["mask"])}
with torch.no_grad():
    difference = onepic.loss(pipeline, full, config) - denoising_loss(pipeline, batch, config)
x = torch.randn(batch["x0"].shape, generator=rng(lesson.seed, "x"))
view = onepic.network_view(
    x, 500, batch["known"], batch["noise"], batch["mask"], "clean", pipeline.schedule.objective)
given_columns = view[..., ::2] - batch["known"][..., ::2]
drawn_columns = view[..., 1::2] - x[..., 1::2]
lesson.expect("all masked: loss minus ordinary loss", difference.abs())
lesson.expect("seen of the given half minus given", given_columns.abs().max())
lesson.expect("seen of the wanted half minus x", drawn_columns.abs().max())

# %% [markdown]
# ## Does the UNet look across?
#
# We record the self-attention of the last level, 16 x 32 pixels, in one pass at t = 700, and add up
# what the pixels of the wanted half give to the given half. If they looked everywhere alike, it
# would be 50 %.

# %%
def look_across(layout: str) -> tuple[float, torch.Tensor]:
    """(share that goes to the given half, attention of one wanted pixel [16,32])."""
    pipeline, _, _, tests, config = models[layout]
    maps = []

    def record(module, inputs, output):
        x, = inputs
        q = module.to_q(x).unflatten(-1, (module.heads, -1))
        k = module.to_k(x).unflatten(-1, (module.heads, -1))
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
        maps.append(scores.softmax(-1).mean(1))  # [B, 512 queries, 512 keys]

    hooks = []
    for name, module in pipeline.unet.named_modules():
        if isinstance(module, TransformerBlock) and name.startswith("up_blocks.2"):
            hooks.append(module.attn1.register_forward_hook(record))
    with torch.no_grad():
        onepic.loss(pipeline, tests[0] | {"t": torch.full((4,), 700)}, config)
    for hook in hooks:
        hook.remove()
    weights = torch.stack(maps).mean(0)
    is_wanted = tests[0]["mask"][0].flatten()
    share = weights[:, is_wanted][:, :, ~is_wanted].sum(-1).mean().item()
    wanted_pixels = is_wanted.nonzero().flatten()
    pixel = wanted_pixels[16 * 10 + 8]  # row 10, the middle of the wanted picture
    return 100 * share, weights[0, pixel].view(16, 32)


before = {layout: look_across(layout) for layout in models}
pictures = [grey(weights.sqrt(), 320) for _, weights in before.values()]
labels = [f"{layout}: {share:.1f} % to the given half" for layout, (share, _) in before.items()]
lesson.show(image_grid(pictures, labels, columns=2, cell=320), "seam",
            "Where one pixel of the wanted picture looks before training (row 10, column 8 of that "
            "picture; white: most, by the square root). Side by side, it looks at its own, right "
            "half, and little at its counterpart in the left one. Interlaced, some parts of the "
            "canvas get more than others, but given columns as much as wanted ones.")
for layout, (share, _) in before.items():
    lesson.expect(f"attention to the given half, {layout}, in %", share)

# %% [markdown]
# Side by side the pretrained attention hardly crosses the seam. It has a reason: the tiny model was
# trained with some pictures of two panels, which showed *unrelated* scenes, and so it has learned
# that panels are independent. The paper takes for granted a base for which a picture's other half
# means something. minipic can make one, with aligned panels (`train.py t2i --panels`);
# tests/benchmarks/side_by_side.py compares both bases.
#
# ## A short training of both layouts
#
# The same pairs, noise and steps. How much a model uses what is given is told by the loss with
# another pair's source, as a multiple of the loss with the right one: 1 is not at all.

# %%
def use_of_source(layout: str) -> float:
    """The loss of unseen pairs with another's source over that with the right one, t = 600."""
    pipeline, _, _, tests, config = models[layout]
    own, others = 0.0, 0.0
    with torch.no_grad():
        for batch in tests:
            own += onepic.loss(pipeline, batch, config).item()
            swapped = batch | {"known": batch["known"].roll(1, 0)}
            others += onepic.loss(pipeline, swapped, config).item()
    return others / own


uses = {}
for layout, (pipeline, params, data, _, config) in models.items():
    uses[f"{layout}, before"] = use_of_source(layout)
    optimizer = torch.optim.AdamW(params, lr=3e-3)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 5)
        loss = onepic.loss(pipeline, data.batch(step, range(BATCH * step, BATCH * (step + 1))),
                           config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    uses[f"{layout}, after"] = use_of_source(layout)
lesson.show(bars(uses, f"Use of the source, before and after {STEPS} steps", " times"), "use",
            "The loss with another pair's source, as a multiple of the loss with the right one. "
            "Interlaced, the source is used before any training, and more after it.")
for name, value in uses.items():
    lesson.expect(f"use of the source, {name}", value)

# %% [markdown]
# The surprise is the bar "interlaced, before": nobody has trained anything, and the source counts
# already. A 3x3 convolution mixes neighbours, a given column is the neighbour of each wanted one,
# and it shows nearly the same, without noise. No attention is needed. Side by side, the two are 16
# latent pixels apart, where only attention reaches, and attention must first learn to look there.
#
# ## Drawing, step by step
#
# The noise is that of the canvas. After each step the wanted columns are taken out of it.

# %%
lesson.show_source(onepic.wanted_panel)
rows = []
labels = []
for layout, (pipeline, _, data, _, config) in models.items():
    pair = data.examples[0]
    given, wanted = to_pictures(
        torch.stack([pair.given[0].image, pair.wanted.image]) / 127.5 - 1)
    guesses = []
    settings = DrawSettings(pair.wanted.text, steps=8, guidance=3.0, seed=lesson.seed)
    onepic.draw(pipeline, data.trained_as, settings, [given],
                on_step=lambda x, x0: guesses.append(x0.clone()))
    shown = [0, 3, 7]
    rows += [given, *(pipeline.decode(guesses[i])[0] for i in shown), wanted]
    labels += [f"given, {layout}", *(f"guess {i + 1} of 8" for i in shown), "wanted"]
lesson.show(image_grid(rows, labels, columns=5, cell=128), "drawn",
            "The blurred picture that is given, guesses of the wanted one after 1, 4 and 8 steps, "
            "and the truth. Side by side, the drawing follows the words and not the source. "
            "Interlaced, everything is at its place from the first step on; colours and outlines "
            "are still mottled after so short a training.")

# %% [markdown]
# ## Change one thing
#
# At first `visible` was "clean". "noised" shows the given half as noisy as the rest: the UNet was
# pretrained on pictures that are equally noisy everywhere. Which of the two has the lower loss
# before any training, at t = 600? `VISIBLE` is yours.

# %%
VISIBLE = "noised"
pipeline, _, _, tests, config = start("side")
for visible in ("clean", VISIBLE):
    with torch.no_grad():
        losses = [onepic.loss(pipeline, batch, replace(config, visible=visible))
                  for batch in tests]
    print(f"{visible:6} loss {sum(losses).item() / len(losses):.4f}")

# %% [markdown]
# ## Exercises
#
# 1. `visible="clean"` with `loss_on="all"` is refused. What would the UNet have to predict in the
#    given half, and why can it not?
# 2. Change the task to "edges". How does the use of the source grow now? Deblurring can copy;
#    edges must be understood.
# 3. A mask could be 1 in a part of the wanted picture only. Which ordinary task is that? Look for
#    `settings.mask` in `onepic.draw`.
