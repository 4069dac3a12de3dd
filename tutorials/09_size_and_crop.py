# %% [markdown]
# # 09 · Size and crop
#
# - **Goal:** say what SDXL's six size ids do, and set them instead of leaving them to chance
# - **Time:** 20 s
# - **Needs:** 05_unet, 08_guidance
# - **Figures:** training, sizes, crops
#
# Training pictures have all sizes. Small ones are enlarged, so they are not sharp; large ones are
# cut, so objects are cut too. Older models learned both faults. SDXL is told about them instead:
# with every picture it gets six numbers, the *size ids*. In drawing, we say "large, and not cut".

# %%
from lesson import Lesson

lesson = Lesson("09_size_and_crop")

import torch

from minipic.figures import curves, image_grid
from minipic.image import to_pictures, to_tensor
from minipic.pipeline import Pipeline
from minipic.text import size_ids
from minipic.world.pictures import KINDS, Picture, compose

torch.set_grad_enabled(False)
pipeline = Pipeline.load("weights/tiny")
lesson.show_source(size_ids)
lesson.show_source(Picture.size_ids.fget)
print({kind: share for kind, (share, size) in KINDS.items()})

# %% [markdown]
# ## What the tiny model has seen
#
# Its training pictures come in kinds. Six of 100 are drawn at 24, 32 or 48 pixels and enlarged to
# 64; nine of 100 are drawn at 80 and cut down to 64 at a random place.

# %%
seen = {}
for i in range(300):
    picture = compose(("lesson", lesson.seed), i)
    seen.setdefault(picture.kind, []).append(picture)
shown = seen["small"][:3] + seen["crop"][:3]
labels = [str([int(number) for number in picture.size_ids]) for picture in shown]
lesson.show(image_grid(to_pictures(torch.stack(Picture.draw(shown))), labels, columns=6, cell=110),
            "training",
            "Three pictures that were drawn small and three that were cut, with their size ids: "
            "original height and width, top and left of the crop, height and width now. The first "
            "three are not sharp; in the others, objects are cut at the border.")

# %% [markdown]
# ## Predict
#
# We ask for the same picture, from the same noise, and say that it was drawn at 24 pixels. **Does
# the picture become unsharp? By how much, compared with real pictures of 24 pixels?** Then we say
# that it was cut 16 pixels from the left of a picture of 80. **Where does "in the middle" lie?**
#
# ## Original size
#
# Sharpness here is the mean difference between neighbouring pixels.

# %%
PROMPTS = ["a large red cube in the middle", "a large yellow torus in the middle"]
N = 3


def draw(**sizes):
    """N pictures of each prompt as PIL pictures and as tensors [2 N,3,64,64]."""
    pictures = []
    for prompt in PROMPTS:
        pictures += pipeline.generate(
            prompt, steps=8, n=N, seed=100 * lesson.seed, sampler="dpmpp_2m", progress=False,
            **sizes)
    return pictures, torch.stack([to_tensor(picture) for picture in pictures])


def sharpness(images):
    across = images.diff(dim=3).abs().mean()
    down = images.diff(dim=2).abs().mean()
    return ((across + down) / 2).item()


sides = [24, 32, 48, 64]
drawn = {}
for side in sides:
    drawn[side] = draw(original_size=(side, side))
sharp = [sharpness(images) for _, images in drawn.values()]

real = []
pictures = seen["plain"][:64]
for side in sides:
    kind = "plain" if side == 64 else "small"
    same = [Picture(kind, picture.scenes, (side, side), (64, 64)) for picture in pictures]
    real.append(sharpness(torch.stack(Picture.draw(same))))
of_full = [number / sharp[-1] for number in sharp]
real_of_full = [number / real[-1] for number in real]
print("drawn", [f"{number:.2f}" for number in of_full])
print("real ", [f"{number:.2f}" for number in real_of_full])
lesson.expect("sharpness at 24, of that at 64", of_full[0])
lesson.expect("the same of real pictures", real_of_full[0])
rows = [drawn[side][0][k] for k in (0, N) for side in sides]
lesson.show(image_grid(rows, [f"original {side}" for side in sides] * 2, columns=4, cell=128),
            "sizes",
            "The same noise, told four original sizes. The pictures are nearly the same, and at "
            "24 the edges are a little softer than at 64: look at the top of the cube.")

# %% [markdown]
# It becomes less sharp, in the right order of the sizes, but in this run by a third of what real
# pictures of 24 pixels lose. That is the surprise: the small model has learned the direction of
# the effect and not its full size. Six pictures in 100 are few to learn it from.
#
# ## Crop
#
# The original size is 80 x 80 now, and the crop begins at 0, 8 or 16 pixels from the left. We
# measure where the object is: the middle of all pixels of strong colour.

# %%


def middle(images):
    """Mean x of strongly coloured pixels, 0 at the left and 1 at the right."""
    strong = (images.amax(1) - images.amin(1) > 1.2).float()  # [B,64,64]
    x = (torch.arange(64) + 0.5) / 64
    weight = strong.sum(1)  # of each column
    return ((weight * x).sum() / weight.sum()).item()


lefts = [0, 8, 16]
cut = {left: draw(original_size=(80, 80), crop=(left, 8)) for left in lefts}
middles = [middle(images) for _, images in cut.values()]
print("middle of the object at crops of", dict(zip(lefts, [f"{x:.2f}" for x in middles])))
lesson.expect("middle of the object at crop 0", middles[0])
lesson.expect("shift from crop 0 to 16, in pixels", 64 * (middles[2] - middles[0]))
rows = [cut[left][0][k] for k in (0, N) for left in lefts]
lesson.show(image_grid(rows, [f"left {left}" for left in lefts] * 2, columns=3, cell=128),
            "crops",
            "The same noise, told that 0, 8 or 16 pixels of 80 were cut off at the left (and 8 at "
            "the top). The objects are larger than above and nearer to the border, and no sky is "
            "left. From left to right they move to the left.")

# %% [markdown]
# A real drawing of 80 pixels has its middle at 40. Cut at 0, this is pixel 40 of 64; cut at 16, it
# is pixel 24: a shift by -16. In this run the model shifts to the same side by a quarter of that.
# But compare these pictures with those above: "80" alone has made the objects larger. The model
# has learned what pictures look like that were cut.
#
# ## Change one thing
#
# The default of `generate` is the honest one: original size = target size = size of the picture,
# crop (0, 0). Tell the model something that no training picture had. Is a picture that "was" 256
# pixels wide sharper than all? (It is an answer to a question that training never asked.)

# %%
ORIGINAL = (256, 256)
_, images = draw(original_size=ORIGINAL)
print(f"sharpness of that at 64: {sharpness(images) / sharp[-1]:.2f}")

# %% [markdown]
# ## Exercises
#
# 1. The six numbers enter by sines and cosines, as the timestep does, and are added to its
#    embedding. Find the lines in minipic/models/unet.py. Why is a sum there enough?
# 2. Give the size ids of a small picture to the prediction without text only (lesson 08's u; it is
#    `stage.uncond`, which lesson 05 shows how to change). Is the result sharper than usual? SDXL's
#    users know this as negative size conditioning.
# 3. Draw `size=(96, 64)` with a `target_size` of (64, 64). What goes wrong?
