# %% [markdown]
# # 13 · Pictures as conditions
#
# - **Goal:** give a model a picture to follow in two ways, and say what each costs and when it
#   begins to work
# - **Time:** 50 s
# - **Needs:** 05_unet
# - **Figures:** doors, costs, edges, learning
#
# Words do not say where a line runs. ControlNet (arXiv 2302.05543) and InstructPix2Pix (arXiv
# 2211.09800) let a model follow a picture, here a map of edges. ControlNet leaves the UNet as it is
# and trains a copy of its way down, whose outputs are added to the skips. InstructPix2Pix gives the
# UNet four more input channels, for the latent of the picture, and trains all of it.

# %%
from lesson import Lesson

lesson = Lesson("13_pictures_as_conditions")

from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from minipic.common import find_file
from minipic.figures import grey, image_grid, table
from minipic.image import to_pictures, to_tensor
from minipic.latents import encode_pictures
from minipic.models.controlnet import ControlNet, ControlNetConfig
from minipic.models.unet import SDXL_BASE, UNet
from minipic.pipeline import Pipeline
from minipic.recipes import controlnet, edit
from minipic.weights.layouts import build_empty
from minipic.world import metrics

# %% [markdown]
# ## Predict
#
# **SDXL's UNet has 2.6 billion parameters. How many does each of the two ways train? How much
# longer does a step of drawing take with each? And after the same short training, which way looks
# at the edges more?**
#
# ## At first, neither does anything
#
# Both begin at zero: ControlNet's outputs go through convolutions whose weights are 0, and the new
# input channels have weights 0. So the first step of training starts from the model as it is.

# %%
lesson.show_source(controlnet.loss)
lesson.show_source(edit.loss)
config = controlnet.Settings(
    scenes=80, batch=4, small=True, balanced=True, caption_dropout=0.1, precision="fp32",
    seed=lesson.seed)
torch.manual_seed(lesson.seed)
with_controlnet = controlnet.build(config)
with_input = edit.load_pipeline(config)
edit.double_input_channels(with_input.unet)
plain = Pipeline.load("weights/tiny")

data = controlnet.data(with_controlnet, config)
unseen_pairs = controlnet.maps_with_captions(with_controlnet, config, config.scenes, 16)
unseen = controlnet.ControlData(with_controlnet, unseen_pairs, config)


def sources_of(data: controlnet.ControlData) -> torch.Tensor:
    """The latents of the maps, unscaled, as InstructPix2Pix takes them."""
    maps = [replace(pair, image=pair.source) for pair in data.pictures]
    means = [mean.float() for mean, _ in encode_pictures(plain.vae, maps)]
    return plain.vae.unscale(torch.stack(means))


def batch_of(data: controlnet.ControlData, sources: torch.Tensor, step: int) -> dict:
    batch = data.batch(step, range(4 * step, 4 * step + 4))
    batch["source"] = sources[batch["rows"]]
    return batch


sources = sources_of(data)
tests = [batch_of(unseen, sources_of(unseen), step) for step in range(4)]
for batch in tests:
    batch["t"] = torch.full((4,), 600)
losses = {
    "ControlNet": lambda batch: controlnet.loss(with_controlnet, batch, config),
    "input channels": lambda batch: edit.loss(with_input, batch, config)}
with torch.no_grad():
    untouched = controlnet.denoising_loss(plain, tests[0], config).item()
    at_start = [loss(tests[0]).item() for loss in losses.values()]
print("untouched", untouched, "with either", at_start)
lesson.expect("largest change of the loss at the start",
              max(abs(loss - untouched) for loss in at_start))

# %% [markdown]
# What enters is not the same. ControlNet has a small encoder for the map, which is trained too. The
# input channels get what the VAE makes of it, and the VAE was made for pictures.

# %%
pair = data.pictures[0]
hint = pair.source[None] / 255
with torch.no_grad():
    features = with_controlnet.controlnet.controlnet_cond_embedding(hint)[0]
picture, = to_pictures(pair.source[None] / 127.5 - 1)
doors = [picture.resize((96, 96), 0)]
doors += [grey(features[i], 96) for i in range(2)] + [grey(sources[0, i], 96) for i in range(2)]
labels = ["map", "hint, channel 0", "hint, channel 1", "latent, channel 0", "latent, channel 1"]
lesson.show(image_grid(doors, labels, columns=5, cell=96), "doors",
            "A map of edges, two of 64 channels of ControlNet's hint before training, and two of "
            "four channels of the VAE's latent. In all of them the lines can be seen at their "
            "places.")

# %% [markdown]
# ## What each costs for SDXL
#
# On the meta device (lesson 12) we count parameters, and the operations of one step for 1024 x 1024
# pixels. "small" is a ControlNet without transformers, as our tiny one is.

# %%
def operations(network: torch.nn.Module, channels: int = 4, *hint) -> int:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.empty(1, channels, 128, 128), torch.empty(1), torch.empty(1, 77, 2048),
                *hint, pooled=torch.empty(1, 1280), size_ids=torch.empty(1, 6))
    return counter.get_total_flops()


hint = torch.empty(1, 3, 1024, 1024, device="meta")
small = ControlNetConfig(
    down_block_types=("DownBlock2D",) * 3, transformer_layers_per_block=(0, 0, 0))
extra = {
    "ControlNet": (build_empty(ControlNet, ControlNetConfig()), 4, hint),
    "ControlNet, small": (build_empty(ControlNet, small), 4, hint),
    "input channels": (build_empty(UNet, replace(SDXL_BASE, in_channels=8)), 8)}
sdxl = build_empty(UNet, SDXL_BASE)
params_of_unet = sum(param.numel() for param in sdxl.parameters())
operations_of_unet = operations(sdxl)
rows = [["SDXL with", "new parameters", "trained parameters", "operations of a step"]]
more = {}
for name, (network, *given) in extra.items():
    trained = sum(param.numel() for param in network.parameters())
    is_unet = isinstance(network, UNet)
    new = trained - params_of_unet if is_unet else trained
    added = operations(network, *given) - (operations_of_unet if is_unet else 0)
    more[name] = 100 * added / operations_of_unet
    rows.append([name, f"{new:,}", f"{trained:,}", f"+ {more[name]:.3g} %"])
lesson.show(table(rows), "costs",
            "ControlNet adds almost half of a step to every step, the small one a twelfth. "
            "The input channels cost next to nothing in drawing, but the whole UNet is trained "
            "and shipped anew.")
lesson.expect("ControlNet's additional operations, in %", more["ControlNet"])
lesson.expect("those of input channels, in %", more["input channels"])

# %% [markdown]
# ## Edges, followed
#
# weights/adapters/edges is a small ControlNet for the tiny model, trained for 1000 steps. A number
# for it: the F1 of edges, 1 if all edges of the drawing are those of the map and none is missing.
# Shadows and patterns have edges too, so even the true pictures have only 0.78 (RESULTS.md).

# %%
drawer = Pipeline.load("weights/tiny")
drawer.add_controlnet(find_file("weights/adapters/edges"))
cases = unseen_pairs[:4]
maps = to_pictures(torch.stack([pair.source for pair in cases]) / 127.5 - 1)
truth = torch.stack([pair.source[0] > 127 for pair in cases])


def steep(images: torch.Tensor) -> torch.Tensor:
    """Where the right or the lower neighbour is very different: bool [B,H,W]."""
    right = images.diff(dim=3, append=images[..., -1:]).abs().amax(1)
    down = images.diff(dim=2, append=images[..., -1:, :]).abs().amax(1)
    return torch.maximum(right, down) > 0.25


scores = {}
pictures = list(maps)
for name, shown, scale in (
        ("scale 0", maps, 0.0), ("scale 1", maps, 1.0), ("another map", maps[1:] + maps[:1], 1.0)):
    drawn = []
    for i, pair in enumerate(cases):
        drawn += drawer.generate(
            pair.text, steps=10, guidance=3.0, seed=i, control=[(shown[i], scale)], progress=False)
    images = torch.stack([to_tensor(picture) for picture in drawn])
    scores[name] = metrics.edge_f1(steep(images), truth)
    pictures += drawn
labels = ["map", "", "", ""]
for name, score in scores.items():
    labels += [f"{name}: F1 {score:.2f}", "", "", ""]
lesson.show(image_grid(pictures, labels, columns=4, cell=96), "edges",
            "Four maps, and what is drawn from the same words and noise: without the map (scale "
            "0), with it, and with the map of the next column. F1 compares with the map above.")
for name, score in scores.items():
    lesson.expect(f"edge F1, {name}", score)

# %% [markdown]
# ## When does it begin to work?
#
# We train both for a moment. The loss with the right map against the loss with another picture's
# map tells how much a model looks at it: 0 % is not at all.

# %%
STEPS = 40


def attention_to_map(loss) -> float:
    """By how much the loss grows with another picture's map, in %, at t = 600."""
    own, others = 0.0, 0.0
    with torch.no_grad():
        for batch in tests:
            own += loss(batch).item()
            others += loss(batch | {
                "hint": batch["hint"].roll(1, 0), "source": batch["source"].roll(1, 0)}).item()
    return 100 * (others / own - 1)


conv_in = with_input.unet.conv_in.weight
others = [param for param in with_input.unet.parameters() if param is not conv_in]
with_controlnet.unet.requires_grad_(False)
optimizers = {
    "ControlNet": torch.optim.AdamW(with_controlnet.controlnet.parameters(), lr=1e-3),
    "input channels": torch.optim.AdamW(
        [{"params": others, "lr": 3e-4}, {"params": [conv_in], "lr": 3e-3}])}
rows = [["trained steps", *losses]]
looks = {0: [attention_to_map(loss) for loss in losses.values()]}
for step in range(STEPS):
    batch = batch_of(data, sources, step)
    for name, loss in losses.items():
        optimizers[name].zero_grad()
        loss(batch).backward()
        optimizers[name].step()
looks[STEPS] = [attention_to_map(loss) for loss in losses.values()]
for step, values in looks.items():
    rows.append([str(step), *(f"{value:+.1f} %" for value in values)])
lesson.show(table(rows), "learning",
            "By how much the loss grows with another picture's map. Both ways start at exactly 0, "
            "and both have begun to look at the map.")
for name, value in zip(losses, looks[STEPS]):
    lesson.expect(f"attention to the map after training, {name}", value)

# %% [markdown]
# ControlNet is ahead, although it trains fewer weights: it has an encoder for maps, and a copy of a
# UNet that can draw. Beyond that the choice is one of cost. One ControlNet serves every fine-tuned
# copy of its UNet and can be scaled, and it makes drawing slower. Input channels are free in
# drawing, and bound to one UNet.
#
# ## Change one thing
#
# The scale multiplies ControlNet's outputs. What do 0.5 and 2 look like?

# %%
SCALE = 0.5
changed = []
for i, pair in enumerate(cases):
    changed += drawer.generate(
        pair.text, steps=10, guidance=3.0, seed=i, control=[(maps[i], SCALE)], progress=False)
images = torch.stack([to_tensor(picture) for picture in changed])
print(f"scale {SCALE}: edge F1 {metrics.edge_f1(steep(images), truth):.2f}")

# %% [markdown]
# ## Exercises
#
# 1. Why is the hint's encoder not zero at first, although ControlNet's outputs are? What would
#    become of the gradients if all were zero?
# 2. Guidance draws with and without the text. ControlNet sees the map both times here. What would
#    guidance by the map be, and how many evaluations of the UNet would a step have?
# 3. A model has learned edges by input channels, another one depth. Can they be combined in one
#    drawing? Can two ControlNets?
