# %% [markdown]
# # P4 · MTU: one model for several tasks
#
# - **Goal:** cut a feed-forward layer into experts that sum to the same layer, and read what a
#   router has learned
# - **Time:** 45 s
# - **Needs:** 05_unet
# - **Figures:** losses, router, drawn
#
# The paper (arXiv 2503.11905) cuts every feed-forward of a text-to-image model into experts, and
# mixes them anew for each task. This lesson checks what the cut does before any training, trains
# for half a minute, and looks at the weights of the experts. At 64 pixels it shows the mechanism,
# not the quality that the paper claims.

# %%
from lesson import Lesson

lesson = Lesson("P4_mtu")

import torch

from minipic.figures import curves, heat_map, image_grid
from minipic.layers.moe import MoE, select
from minipic.papers import mtu
from minipic.pipeline import DrawSettings

TASKS = "t2i,sr"  # drawing from words, and super-resolution
STEPS = 20

# %% [markdown]
# ## Predict
#
# A softmax over N = 4 experts begins at 1/4 for each. The sum of the experts is the old
# feed-forward. **So what does the layer compute at first: the old output, a quarter of it, or four
# times as much? And what will the loss say to that?**
#
# ## Step 0: is it still the same model?
#
# The paper multiplies nothing. minipic's default multiplies the mixture by N (`scale`).

# %%
lesson.show_source(MoE.forward)


def start(scale: int):
    """The tiny model, upcycled; the parameters that train; and the settings."""
    config = mtu.Settings(
        tasks=TASKS, experts=4, scale=scale, scenes=200, batch=8, precision="fp32",
        caption_dropout=0.0, seed=lesson.seed)
    torch.manual_seed(lesson.seed)
    pipeline = mtu.build(config)
    pipeline.requires_grad_(False)
    return pipeline, mtu.setup(pipeline, config), config


base, _, config = start(scale=4)
data = mtu.data(base, config)
batch = data.batch(0, range(8))
untouched = mtu.denoising_loss(mtu.load_pipeline(config), batch["t2i"], config).item()
print(f"loss of the untouched model      {untouched:.4f}")
at_start = {}
for scale in (4, 1):
    pipeline, _, config = start(scale)
    with torch.no_grad():
        _, losses = mtu.loss(pipeline, batch, config)
    at_start[scale] = losses["t2i"].item()
    print(f"upcycled, experts times {scale}        {at_start[scale]:.4f}")
lesson.expect("loss with experts times 4 minus untouched", abs(at_start[4] - untouched))
lesson.expect("loss with experts times 1 over untouched", at_start[1] / untouched)

# %% [markdown]
# A quarter of it: to the letter of the paper (times 1) every feed-forward is shrunk to a quarter,
# in all layers at once, and the loss jumps. Training has to repair that first. With the sum
# multiplied by N the loss is the same to the last digit.
#
# ## A short training of both

# %%
trained = {}
history = {}
for scale in (4, 1):
    pipeline, params, config = start(scale)
    conv_in = list(pipeline.unet.conv_in.parameters())  # one convolution for each task
    others = [param for param in params if all(param is not one for one in conv_in)]
    optimizer = torch.optim.AdamW([{"params": others, "lr": 1e-3}, {"params": conv_in, "lr": 5e-3}])
    history[scale] = []
    for step in range(STEPS):
        batch = data.batch(step, range(8 * step, 8 * step + 8))
        loss, losses = mtu.loss(pipeline, batch, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history[scale].append(losses["t2i"].item())
    trained[scale] = pipeline
steps = list(range(STEPS))
lesson.show(curves({f"times {scale}": (steps, values) for scale, values in history.items()},
                   "step", "loss of drawing from words"), "losses",
            "The loss of drawing from words. Both curves go up and down with the same batches. To "
            "the paper's letter (times 1) training begins above and comes down towards the other.")
last = {scale: sum(values[-5:]) / 5 for scale, values in history.items()}
lesson.expect("loss of the last five steps, times 4", last[4])
lesson.expect("the same with times 1, over it", last[1] / last[4])

# %% [markdown]
# ## The router
#
# The weights of the experts depend on the task alone: not on the token, not on the timestep, not
# on the words. So a task is one ordinary feed-forward whose columns are scaled, and costs nothing
# extra.

# %%
pipeline = trained[4]
rows = []
names = []
for task in TASKS.split(","):
    select(pipeline.unet, task)
    layers = [layer for layer in pipeline.unet.modules() if isinstance(layer, MoE)]
    weights = torch.stack([layer.expert_weights().detach() for layer in layers])  # [layers, 4]
    rows += weights.T.tolist()
    names += [f"{task}, expert {i + 1}" for i in range(4)]
columns = [str(i + 1) for i in range(len(layers))]
lesson.show(heat_map(rows, names, columns, "Weight of each expert in each layer"), "router",
            "All began at 0.25. After so few steps some layers weigh their experts unevenly, and "
            "not alike for the two tasks.")
sums = torch.tensor(rows).unflatten(0, (2, 4)).sum(1)
lesson.expect("largest error of a sum of weights", (sums - 1).abs().max())
lesson.expect("largest change of a weight", (torch.tensor(rows) - 0.25).abs().max())

# %% [markdown]
# ## Drawing: each task is an ordinary UNet

# %%
given, wanted = data.examples["sr"]
source = mtu.picture_of(given)
pictures = [source]
for scale in (4, 1):
    unet = mtu.fold(trained[scale].unet, "sr")
    pictures += mtu.draw_with(trained[scale], unet, DrawSettings("", steps=10, edit=source))
pictures.append(mtu.picture_of(wanted))
labels = ["given", "times 4", "times 1, as the paper", "wanted"]
lesson.show(image_grid(pictures, labels, columns=4, cell=128), "drawn",
            "Super-resolution after 20 steps of training. Both know the shapes and most colours. "
            "To the letter of the paper the picture is more speckled; the small pattern is lost "
            "in both.")

# %% [markdown]
# ## Change one thing
#
# With one expert there is nothing to choose: the softmax is 1, and the router gets no gradient at
# all. Set `EXPERTS` to 2 or 8: is the loss at step 0 still the same?

# %%
EXPERTS = 1
config = mtu.Settings(tasks=TASKS, experts=EXPERTS, scale=EXPERTS, scenes=200, precision="fp32",
                      caption_dropout=0.0, seed=lesson.seed)
pipeline = mtu.build(config)
mtu.setup(pipeline, config)
with torch.no_grad():
    _, losses = mtu.loss(pipeline, batch, config)
print(f"{EXPERTS} experts: loss {losses['t2i'].item():.4f} before training")

# %% [markdown]
# ## Exercises
#
# 1. Where does the bias of the second linear layer go when the layer is cut into four? Find it in
#    `upcycle` and say what would go wrong if each expert kept it.
# 2. Add the task `inpaint` to `TASKS`. How many parameters does a task cost?
# 3. Train for 100 steps. Which loss is lower in the end, times 4 or times 1?
