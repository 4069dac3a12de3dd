# %% [markdown]
# # MTU: one model for several tasks
#
# The paper (arXiv 2503.11905) cuts every feed-forward of a text-to-image model into experts, and
# mixes them anew for each task. This lesson checks what the cut does before any training, trains
# for a minute, and looks at the weights of the experts.
#
# **A question to answer before you run it.** A softmax over N = 4 experts begins at 1/4 for each.
# The sum of the experts is the old feed-forward. So what does the layer compute at first: the old
# output, a quarter of it, or four times as much? And what will the loss say to that?

# %%
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minipic.figures import image_grid
from minipic.layers.moe import MoE, select
from minipic.papers import mtu
from minipic.pipeline import DrawSettings

TASKS = "t2i,sr"  # drawing from words, and super-resolution
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 40


def start(scale: int):
    """The tiny model, upcycled; the parameters that train; and the settings."""
    config = mtu.Settings(
        tasks=TASKS, experts=4, scale=scale, scenes=200, batch=8, precision="fp32",
        caption_dropout=0.0)
    torch.manual_seed(0)
    pipeline = mtu.build(config)
    pipeline.requires_grad_(False)
    return pipeline, mtu.setup(pipeline, config), config


# %% [markdown]
# ## Step 0: is it still the same model?

# %%
base, _, config = start(scale=4)
data = mtu.data(base, config)
batch = data.batch(0, range(8))
before = mtu.denoising_loss(mtu.load_pipeline(config), batch["t2i"], config).item()
print(f"loss of the untouched model      {before:.4f}")
for scale in (4, 1):
    pipeline, _, config = start(scale)
    with torch.no_grad():
        _, losses = mtu.loss(pipeline, batch, config)
    print(f"upcycled, experts times {scale}        {losses['t2i']:.4f}")

# %% [markdown]
# With the sum multiplied by N the loss is the same to the last digit. To the letter of the paper
# (times 1) every feed-forward is shrunk to a quarter, and training has to repair it first.

# %% [markdown]
# ## A short training of both

# %%
trained = {}
for scale in (4, 1):
    pipeline, params, config = start(scale)
    conv_in = list(pipeline.unet.conv_in.parameters())  # one convolution for each task
    others = [param for param in params if all(param is not one for one in conv_in)]
    optimizer = torch.optim.AdamW([{"params": others, "lr": 1e-3}, {"params": conv_in, "lr": 5e-3}])
    for step in range(STEPS):
        batch = data.batch(step, range(8 * step, 8 * step + 8))
        loss, losses = mtu.loss(pipeline, batch, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == STEPS - 1:
            shown = "  ".join(f"{task} {value:.3f}" for task, value in losses.items())
            print(f"times {scale}, step {step:3}: {shown}")
    trained[scale] = pipeline

# %% [markdown]
# ## The router
#
# One row for each task, and in it the weights of the four experts in every layer. They depend on
# the task alone: not on the token, not on the timestep, not on the words. So a task is one ordinary
# feed-forward whose columns are scaled, and costs nothing extra.

# %%
pipeline = trained[4]
for task in TASKS.split(","):
    select(pipeline.unet, task)
    layers = [layer for layer in pipeline.unet.modules() if isinstance(layer, MoE)]
    rows = []
    for layer in layers:
        percents = 100 * layer.expert_weights()
        rows.append(" ".join(f"{percent:3.0f}" for percent in percents.tolist()))
    print(f"{task:4}", " | ".join(rows), "%")

# %% [markdown]
# ## Drawing: each task is an ordinary UNet

# %%
given, wanted = data.examples["sr"]
source = mtu.picture_of(given)
truth = mtu.picture_of(wanted)
pictures = [source]
for scale in (4, 1):
    unet = mtu.fold(trained[scale].unet, "sr")
    drawn, = mtu.draw_with(trained[scale], unet, DrawSettings("", steps=15, edit=source))
    pictures.append(drawn)
pictures.append(truth)
labels = ["given", "times 4", "times 1, as the paper", "wanted"]
figure = Path("mtu-lesson.png")
image_grid(pictures, labels, columns=4).save(figure)
print(f"see {figure}")

# %% [markdown]
# **Answers.** A quarter of it: the output is shrunk, in all layers at once, and the loss jumps. The
# model has to learn the factor back before it learns anything else. Multiplying by N costs nothing
# and starts from the model as it was. With N = 1 there is nothing to choose: the softmax is 1, and
# the router gets no gradient at all.
