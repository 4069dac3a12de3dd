# %% [markdown]
# # 08 · Guidance
#
# - **Goal:** say what guidance does to obedience and to variety, and use a negative prompt
# - **Time:** 20 s
# - **Needs:** 00_picture, 05_unet
# - **Figures:** tradeoff, weights, night
#
# The UNet can predict with the text (c) and without it (u). *Classifier-free guidance* follows
# neither. It starts from u, takes the difference c - u, and goes w times as far:
#
#     prediction = u + w (c - u)
#
# At w = 0 the text is ignored, at w = 1 the prediction is c. All usual weights are above 1.

# %%
from lesson import Lesson

lesson = Lesson("08_guidance")

import torch

from minipic.common import find_file
from minipic.diffusion.guidance import combine
from minipic.figures import curves, image_grid
from minipic.image import to_tensor
from minipic.pipeline import Pipeline
from minipic.world import probe
from minipic.world.caption import parse

torch.set_grad_enabled(False)
pipeline = Pipeline.load("weights/tiny")
judge = probe.load_judge(find_file("weights/tiny/judge"))
lesson.show_source(combine)
u = torch.randn(4)
c = torch.randn(4)
lesson.expect("difference of weight 1 to c", (combine(u, [(1.0, c)]) - c).abs().max())
distance = (combine(u, [(5.0, c)]) - u).norm() / (c - u).norm()
lesson.expect("distance from u at weight 5, in distances of c", round(distance.item(), 3))

# %% [markdown]
# ## Predict
#
# We draw four captions four times each, at weights from 1 to 12. The judge reads every picture and
# says which facts of the caption are right. We also measure variety: how different the four
# pictures of one caption are to the judge. **Which of the two rises with the weight, and which
# falls? Does either turn back?**

# %%
PROMPTS = ["a small red sphere left of a large blue cube",
           "a large yellow torus and a small white cone",
           "a green and white striped cylinder in front of a purple cube",
           "a medium cyan diamond behind a small orange sphere"]
WEIGHTS = [1.0, 3.0, 6.0, 12.0]
N = 4
FACTS = ("color", "shape")


def draw(prompt, guidance, negative=None, n=N):
    """n pictures, as PIL pictures and as tensors [n,3,64,64]."""
    pictures = pipeline.generate(prompt, negative, steps=8, guidance=guidance, n=n,
                                 seed=100 * lesson.seed, sampler="dpmpp_2m", progress=False)
    return pictures, torch.stack([to_tensor(picture) for picture in pictures])


def variety(images):
    """Mean distance of two of these pictures in the judge's features: 0 if all are the same."""
    features = probe.embed(judge, images)
    i, j = torch.triu_indices(len(images), len(images), 1)
    return probe.distance(features[i], features[j]).mean().item()


obeyed = []
varieties = []
extremes = []
shown = []
for guidance in WEIGHTS:
    scores = []
    spread = []
    levels = []
    for prompt in PROMPTS:
        pictures, images = draw(prompt, guidance)
        found = probe.accuracy([parse(prompt)] * N, probe.read(judge, images))
        scores.append(sum(found[fact] for fact in FACTS) / len(FACTS))
        spread.append(variety(images))
        levels.append((images.abs() > 0.98).float().mean().item())
        shown.append(pictures[0])
    obeyed.append(sum(scores) / len(scores))
    varieties.append(sum(spread) / len(spread))
    extremes.append(100 * sum(levels) / len(levels))
    print(f"weight {guidance:4g}: obeyed {obeyed[-1]:.2f}, variety {varieties[-1]:.4f}, "
          f"extreme levels {extremes[-1]:.1f} %")

# %%
share_of_variety = [number / varieties[0] for number in varieties]
lines = {"obeyed": (WEIGHTS, obeyed), "variety, of that at weight 1": (WEIGHTS, share_of_variety)}
lesson.show(curves(lines, "guidance weight", "share"), "tradeoff",
            "What is obeyed (right colours and shapes) rises steeply from weight 1 to 3, and "
            "falls a little after. Variety falls all the way, to about 0.6 of that at weight 1.")
lesson.expect("obeyed at weight 1", obeyed[0])
lesson.expect("obeyed at weight 6", obeyed[2])
lesson.expect("variety at weight 6, of that at weight 1", share_of_variety[2])
lesson.expect("extreme levels at weight 12 by those at 1", extremes[-1] / extremes[0])
labels = [f"weight {guidance:g}" for guidance in WEIGHTS for _ in PROMPTS]
lesson.show(image_grid(shown, labels, columns=4, cell=110), "weights",
            "One noise for each caption (columns) at four weights (rows). At 1, the cylinder "
            "lacks its green stripes; at 3 it has them. At 12 the colours are at their limits, "
            "and the last picture has broken into things that nobody asked for.")

# %% [markdown]
# The surprise is that obedience turns back. A weight above 1 exaggerates what the text changes, so
# the picture is more typical of its text, and the pictures are more alike. But far outside of what
# the network has seen, its predictions are no longer pictures: more and more colours are at their
# limits, and shapes break.
#
# ## A negative prompt
#
# The formula does not care where u comes from. Put another text in its place, and the picture goes
# away from that text. We ask for a cube and count the pictures with a night sky. From these noises
# there are many: the caption says nothing of the sky.

# %%
plain, plain_images = draw("a large red cube", 5.0, n=6)
other, other_images = draw("a large red cube", 5.0, "at night", n=6)
nights = []
for name, images in (("without", plain_images), ("with", other_images)):
    skies = [found.sky for found in probe.read(judge, images)]
    nights.append(skies.count("night") / len(skies))
    print(f"{name} the negative prompt: {skies}")
lesson.expect("share of nights without a negative prompt", nights[0])
lesson.expect("share of nights with it", nights[1])
_, alone = draw("a large red cube", 1.0, n=1)
_, unheard = draw("a large red cube", 1.0, "at night", n=1)
lesson.expect("change by a negative prompt at weight 1", (alone - unheard).abs().max())
lesson.show(image_grid(plain + other, ["none"] * 6 + ["at night"] * 6, columns=6, cell=100),
            "night",
            "The same six noises without (above) and with (below) the negative prompt. One night "
            "sky has turned blue and one into sunset, the sunset has turned blue, and three "
            "nights stay.")

# %% [markdown]
# A negative prompt costs nothing: u is computed anyway. At weight 1, u has no weight, and a
# negative prompt does nothing at all.
#
# ## Change one thing
#
# `NEGATIVE` is yours. Which colour do cubes have that must not be red? Try "blue" too: is the
# opposite of a colour a colour?

# %%
NEGATIVE = "a red cube"
_, images = draw("a large cube", 5.0, NEGATIVE)
print([found.things[0].color for found in probe.read(judge, images) if found.things])

# %% [markdown]
# ## Exercises
#
# 1. Every step costs two calls of the network. Set the weight to 1 after the first half of the
#    steps (write the loop of lesson 00). How much obedience is lost?
# 2. `guidance_rescale=0.7` brings the contrast back to that of c. Which of the three numbers above
#    does it change at weight 12?
# 3. A negative prompt n takes the place of u: n + w (c - n). Show that this equals
#    u + w (c - u) - v (n - u), and find v. It is two terms of `combine`.
