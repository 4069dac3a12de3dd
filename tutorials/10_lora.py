# %% [markdown]
# # 10 · LoRA
#
# - **Goal:** inject, train, scale and merge a LoRA, and choose its rank
# - **Time:** 30 s
# - **Needs:** 05_unet, 08_guidance
# - **Figures:** ranks, drawings, scales
#
# A layer of the UNet multiplies by a matrix W. Fine-tuning changes it to W + D, and D has as many
# numbers as W. LoRA says: let D be a product B A of two thin matrices. B has as many rows as W, A
# as many columns; the width between them is the *rank* R. W stays as it is.

# %%
from lesson import Lesson

lesson = Lesson("10_lora")

import contextlib
import io
import tempfile
from pathlib import Path

import torch

import train
from minipic.figures import image_grid, table
from minipic.image import to_tensor
from minipic.layers import lora
from minipic.pipeline import Pipeline

PROMPT = "a large magenta torus on a grey floor"
pipeline = Pipeline.load("weights/tiny")
lesson.show_source(lora.LoRA.lora)
lesson.show_source(lora.LoRA.delta)

# %% [markdown]
# ## Predict
#
# The tiny model has never read the word "magenta". Twelve pictures with captions
# (`tutorials/magenta`) are to teach it. **Which share of the UNet's 7.4 million weights does a LoRA
# of rank 1 on all attention layers have? Is it enough to learn a colour?**
#
# ## Inject
#
# A begins with random numbers, B with zeros. So B A is zero, and the model draws as before.

# %%
unet = pipeline.unet
weights = sum(param.numel() for param in unet.parameters())
x = torch.randn(1, 4, 16, 16)
text, _ = pipeline.encode(PROMPT)
sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
with torch.no_grad():
    before = unet(x, 500, text.context, text.pooled, sizes)
    params = lora.inject(unet, 1)
    after = unet(x, 500, text.context, text.pooled, sizes)
count = sum(param.numel() for param in params)
print(f"{len(lora.layers(unet))} layers, {count:,} of {weights:,} weights")
lesson.expect("change by an untrained LoRA", (after - before).abs().max())
lesson.expect("share of the weights at rank 1, in %", 100 * count / weights)

# %% [markdown]
# ## Train
#
# `train.py` does it, with the command that you would type. We train three ranks alike: 40 steps
# with 4 pictures each.

# %%
folder = tempfile.mkdtemp()
RANKS = [1, 4, 16]


def train_lora(rank):
    """Train a LoRA on the magenta pictures; returns its file."""
    out = f"{folder}/rank-{rank}"
    command = (f"t2i --data tutorials/magenta --lora-rank {rank} --steps 40 --batch 4 --lr 4e-3 "
               f"--warmup 5 --ema 0.9 --precision fp32 --seed {lesson.seed} --sample-every 0")
    print("python train.py", command)
    with contextlib.chdir(Path(train.__file__).parent):
        with contextlib.redirect_stdout(io.StringIO()):
            assert train.main([*command.split(), "--out", out]) == 0
    return f"{out}/model/lora.safetensors"


files = {rank: train_lora(rank) for rank in RANKS}

# %% [markdown]
# ## What a rank can do
#
# Two numbers. How magenta is what it draws: the share of pixels with much red and blue and little
# green. And what it costs: how far the picture of another prompt, without the word, has moved.

# %%
OTHER = "a large green cube on a grey floor"


def draw(pipeline, prompt):
    pictures = pipeline.generate(prompt, steps=8, n=3, seed=100 * lesson.seed,
                                 sampler="dpmpp_2m", progress=False)
    return pictures, torch.stack([to_tensor(picture) for picture in pictures])


def magenta(images):
    """The share of pixels, in %, that are nearer to magenta than to other strong colours."""
    red, green, blue = images.unbind(1)
    return 100 * (torch.minimum(red, blue) - green > 0.6).float().mean().item()


base = Pipeline.load("weights/tiny")
pictures, images = draw(base, PROMPT)
unscaled = images
others, unmoved = draw(base, OTHER)
shown = [pictures[0], others[0]]
rows = [["rank", "weights", "magenta pixels, %", "other prompt moved by"],
        ["none", "0", f"{magenta(images):.1f}", "0"]]
lesson.expect("magenta pixels without a LoRA, in %", magenta(images))
for rank, file in files.items():
    adapted = Pipeline.load("weights/tiny", lora=file)
    pictures, images = draw(adapted, PROMPT)
    others, moved = draw(adapted, OTHER)
    shown += [pictures[0], others[0]]
    change = (moved - unmoved).abs().mean().item()
    rows.append([str(rank), f"{rank * count:,}", f"{magenta(images):.1f}", f"{change:.3f}"])
    lesson.expect(f"magenta pixels at rank {rank}, in %", magenta(images))
    lesson.expect(f"change of the other prompt at rank {rank}", change)
lesson.show(table(rows, "Forty steps of training"), "ranks",
            "What each rank has learned after the same forty steps, and what it has changed "
            "besides. A rank of 1 has the colour; more rank moves the other picture more.")
names = ["without"] + [f"rank {rank}" for rank in RANKS]
order = shown[::2] + shown[1::2]
lesson.show(image_grid(order, names * 2, columns=4, cell=128), "drawings",
            "Above: the prompt with the new word, from one noise. Without a LoRA the ring is "
            "orange; all ranks make it red and magenta, the low ones with more red. Below: a "
            "prompt without the word. Rank 1 leaves the green cube as it was; rank 16 has made it "
            "dark.")

# %% [markdown]
# The surprise: rank 1 is enough. With 0.27 % of the weights it learns the word about as well as
# rank 16 does in as many steps, and leaves the rest alone. A colour needs few directions. A higher
# rank has more ways to change other things, and with this high learning rate and so few pictures
# it takes them. Choose the lowest rank that learns what you want.
#
# ## Scale and merge
#
# The layer computes W x + s B A x. The scale s is 1 as trained, 0 is off, and it may go beyond 1.
# To *merge* is to compute W + s B A once: the layer then costs what it did before, and draws the
# same picture.

# %%
scaled = []
SCALES = [0.0, 0.5, 1.0, 1.5]
for scale in SCALES:
    adapted.set_lora_scale(file, scale)
    pictures, images = draw(adapted, PROMPT)
    scaled.append(pictures[0])
    if scale == 0:
        lesson.expect("change at scale 0", (images - unscaled).abs().max())
lesson.show(image_grid(scaled, [f"scale {scale:g}" for scale in SCALES], columns=4, cell=128),
            "scales",
            "The LoRA of rank 16 at four scales. At 0 it is off. At 0.5 the ring is red and "
            "violet already, at 1.5 all of it is magenta.")
adapted.set_lora_scale(file, 1.0)
_, beside = draw(adapted, PROMPT)
lesson.show_source(lora.merge)
lora.merge(adapted.unet)
_, merged = draw(adapted, PROMPT)
lora.unmerge(adapted.unet)
_, again = draw(adapted, PROMPT)
lesson.expect("change by merging, in levels of 255", 127.5 * (merged - beside).abs().max())
lesson.expect("change by merging and unmerging", (again - beside).abs().max())

# %% [markdown]
# Merged and unmerged differ only by the rounding of sums in another order. Unmerging brings back
# the old weights bit for bit, because minipic keeps them: subtracting B A would round again.
#
# ## Change one thing
#
# A LoRA of rank 16 can be cut to a lower rank after training. The singular values of B A say how
# much each further rank holds. How many are a tenth of the first or more?

# %%
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
values = torch.linalg.svdvals(adapted.unet.get_submodule(LAYER).delta().detach())[:16]
print([f"{value:.2f}" for value in values / values[0]])

# %% [markdown]
# ## Exercises
#
# 1. SDXL base has a matrix of 1280 x 1280 in most of its attention layers. How many numbers has
#    its LoRA of rank 16, in % of it?
# 2. Train rank 16 with `--lora-alpha 1`. The LoRA is then scaled by alpha / rank = 1/16. Which
#    learning rate brings back the result?
# 3. Merge by hand: add `delta()` to each weight of a new pipeline, save it with `pipeline.save`,
#    and compare its drawing with `merged`.
