# %% [markdown]
# # 05 · The UNet, shape by shape
#
# - **Goal:** predict the shape of every tensor in the UNet, and show where the text enters
# - **Time:** 10 s
# - **Needs:** 00_picture, 02_text_encoders, 04_noise
# - **Figures:** shapes, doors, words, kept
#
# The UNet is the network that draws. It gets a noisy latent x, the noise level as a timestep t,
# and the text. It gives back a tensor of the shape of x. Its name comes from its shape: down to a
# small size, and up again, with bridges (*skips*) from the way down to the way up.

# %%
from lesson import Lesson

lesson = Lesson("05_unet")

import torch
from torch.nn.functional import avg_pool2d

from minipic.draw_settings import DrawSettings
from minipic.figures import bars, grey, image_grid, table
from minipic.image import to_tensor
from minipic.layers.attention import Attention
from minipic.models.unet import DownLevel, MidLevel, TransformerBlock, UNet, UpLevel
from minipic.pipeline import Pipeline
from minipic.text import size_ids

torch.set_grad_enabled(False)
pipeline = Pipeline.load("weights/tiny")
unet = pipeline.unet
lesson.show_source(UNet.forward)

# %% [markdown]
# ## Predict
#
# The latent is 4 x 16 x 16. The three levels have 64, 128 and 128 channels, and every level but
# the last halves the height and the width. **Which part has the most numbers in its output: the
# first layers, the middle, or the last ones?**
#
# The text is a row of vectors, one for each word in order. **Before drawing, we shuffle the
# vectors of "a small red sphere left of a large blue cube". What will the picture show?**
#
# ## Shapes
#
# A *hook* is a function that PyTorch calls after a module has run. Ours notes the output's shape.

# %%
prompt = "a small red sphere left of a large blue cube"
text, _ = pipeline.encode(prompt)
generator = torch.Generator().manual_seed(lesson.seed)
x = torch.randn(1, 4, 16, 16, generator=generator)
sizes = size_ids((64, 64), (0, 0), (64, 64))[None]
rows = [["module", "output: channels x height x width", "numbers"]]


def note(name):
    def hook(module, inputs, output):
        x = output[0] if isinstance(output, tuple) else output
        shape = " x ".join(map(str, x.shape[1:]))
        rows.append([name, shape, f"{x[0].numel():,}"])
    return hook


hooks = []
for name, module in unet.named_modules():
    if name in ("conv_in", "conv_out") or isinstance(module, DownLevel | MidLevel | UpLevel):
        hooks.append(module.register_forward_hook(note(name)))
v = unet(x, 500, text.context, text.pooled, sizes)
for hook in hooks:
    hook.remove()
lesson.show(table(rows, "One pass through the tiny UNet"), "shapes",
            "Every part of the UNet in the order in which it runs. The outputs of the way down are "
            "halved already; those of the way up are doubled already.")
lesson.expect("parts on the way", len(rows) - 1)
lesson.expect("numbers that go in for each that comes out", x.numel() / v.numel())

# %% [markdown]
# The middle has the most channels and the fewest numbers, because halving both sides leaves a
# quarter. The most are in `up_blocks.1`: it doubles the sides before the channels become fewer. On
# a GPU, that is where the memory goes. SDXL base has the same plan, from 4 x 128 x 128 on.
#
# ## Where the text enters
#
# By two doors. The *pooled* vector is added to the embedding of the timestep, which every resnet
# receives: one message for the whole picture. The *context* is read by cross-attention: every
# pixel of a level asks its own question (query), and every token answers (key and value).

# %%
lesson.show_source(TransformerBlock.forward)
readers = {}
for name, module in unet.named_modules():
    if isinstance(module, Attention) and name.endswith("attn2"):
        readers[name] = module
lesson.expect("places that read the words", len(readers))


def predict(context, pooled):
    return unet(x, 900, context, pooled, sizes)


no_context = torch.zeros_like(text.context)
no_pooled = torch.zeros_like(text.pooled)
usual = predict(text.context, text.pooled)
closed = {
    "no context": predict(no_context, text.pooled),
    "no pooled vector": predict(text.context, no_pooled),
    "neither": predict(no_context, no_pooled)}
changes = {}
for name, prediction in closed.items():
    changes[name] = 100 * ((prediction - usual).norm() / usual.norm()).item()
lesson.show(bars(changes, "Change of the prediction at t = 900", " %"), "doors",
            "How far the prediction moves when a door is closed, as a share of its length. Without "
            "the context it is another prediction; the pooled vector changes a tenth as much.")
lesson.expect("change without context, in %", changes["no context"])
lesson.expect("change without pooled vector, in %", changes["no pooled vector"])

# %% [markdown]
# Now the shuffled words. In softmax(q k / sqrt(d)) v, each pixel sums over the tokens, and a sum
# does not depend on the order of its terms.

# %%
order = torch.arange(77)
order[1:11] = 1 + torch.randperm(10, generator=generator)
shuffled = predict(text.context[:, order], text.pooled)
lesson.expect("change by shuffling, in %", 100 * (shuffled - usual).norm() / usual.norm())

# %% [markdown]
# Nothing changes: the same picture. The UNet does not know which word came first. Order is known
# only inside the text encoders, which write it into each vector before the UNet reads them.
#
# ## One map for each word
#
# The weights of attention are softmax(q k / sqrt(d)): for each pixel, a share for each token. The
# shares of one token over all pixels are a picture. We record the queries and keys of the last
# level while a whole picture is drawn, and average over heads and steps.

# %%
shares = []


def record(module, inputs, output):
    x, context = inputs  # the context is already keys and values, the same in every step
    keys, _ = context[module]
    queries = module.to_q(x).unflatten(-1, (module.heads, -1))
    q, k = queries[-1], keys[-1]  # the row with text; row 0 is the one without
    scores = torch.einsum("nhd,mhd->hnm", q, k) / q.shape[-1] ** 0.5
    shares.append(scores.softmax(-1).mean(0))


hooks = [readers[name].register_forward_hook(record) for name in readers if "up_blocks.2" in name]
picture, = pipeline.generate(prompt, steps=20, seed=lesson.seed, progress=False)
for hook in hooks:
    hook.remove()
weights = torch.stack(shares).mean(0)  # [256 pixels, 77 tokens]

tokens = pipeline.tokenizer([prompt])[0].tolist()
words = [pipeline.tokenizer.bpe.id_to_token(id).removesuffix("</w>") for id in tokens]
pictures = [picture.resize((96, 96), 0)]
labels = ["drawn"]
for position in (1, 2, 3, 4, 5, 8, 9, 10):
    pictures.append(grey(weights[:, position].view(16, 16), 96))
    labels.append(f"{position}: {words[position]}")
lesson.show(image_grid(pictures, labels, columns=5, cell=96), "words",
            "The picture, and for eight tokens the pixels that listen to them (white: the most). "
            '"sphere" and "red" are heard on the sphere, "cube" and "blue" on the cube, and the '
            'first "a" everywhere else.')

# %% [markdown]
# Nobody has told the model where things are: it has only seen pictures with captions. A number for
# it: the share that "cube" gets from blue pixels, against the share that it gets from all others.

# %%
red, green, blue = to_tensor(picture)
is_blue = avg_pool2d(((blue - green) > 0.8).float()[None], 4).flatten() > 0.5
cube = weights[:, words.index("cube")]
print(f"from blue pixels {cube[is_blue].mean():.3f}, from others {cube[~is_blue].mean():.3f}")
lesson.expect("share of cube from blue pixels", cube[is_blue].mean())
lesson.expect("share of cube from others", cube[~is_blue].mean())
lesson.expect("share of the first a from all pixels", weights[:, 1].mean())

# %% [markdown]
# The first "a" is the surprise. The text encoders are causal (a token sees only those before it),
# so this "a" has seen nothing and says nothing. A softmax must give its shares to someone: pixels
# that want to hear nothing listen here. Large models have such resting places too.
#
# ## Change one thing
#
# `KEPT` are the tokens that the UNet may read; the vectors of all others become zeros. With 0 (the
# start) and 10 ("cube") alone, what is missing? Try 4 ("sphere") in the place of 10.

# %%
KEPT = [0, 10]
drawing = pipeline.prepare(DrawSettings(prompt, steps=15, seed=lesson.seed))
stage = drawing.stages[0]
context = torch.zeros_like(stage.cond.context)
context[:, KEPT] = stage.cond.context[:, KEPT]
stage.cond = stage.cond._replace(context=context)
for latent, _ in pipeline.denoise(drawing):
    pass
kept, = pipeline.decode(latent)
lesson.show(image_grid([picture, kept], ["all tokens", f"tokens {KEPT}"], cell=128), "kept",
            "Left: the whole text. Right: without the vectors of all words but the cube. The red "
            "sphere is gone, and the cube is still large and blue: its vector has heard the words "
            "before it.")

# %% [markdown]
# ## Exercises
#
# 1. The tiny UNet reads the words in ten places. Where are they? SDXL base has no attention in its
#    first and last level, and 2 and 10 transformer blocks in each attention of the others. Count
#    its places with `UNetConfig()`'s defaults (lesson 12 has the answer).
# 2. Record `up_blocks.0` instead of `up_blocks.2`. Its maps have 8 x 8 pixels or fewer. Do words
#    still have places?
# 3. Average the first five and the last five steps separately (`shares` has two entries a step).
#    When does "cube" find its place?
