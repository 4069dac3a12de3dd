# %% [markdown]
# # 14 · Change one thing: an ablation
#
# - **Goal:** plan, run and report an ablation with seeds, and tell a result from chance
# - **Time:** 50 s
# - **Needs:** 04_noise, 05_unet
# - **Figures:** runs, table
#
# An *ablation* changes one thing of a method and measures what becomes of the result. Papers are
# full of such tables, and many of their differences are chance. This lesson does one as it should
# be done: a question, one change at a time, several seeds, a control that changes nothing, a rule
# fixed before the runs, and a table with spreads.

# %%
from lesson import Lesson

lesson = Lesson("14_ablation")

import copy
from dataclasses import dataclass, replace
from statistics import mean

import torch

from minipic.common import rng
from minipic.figures import bars, table
from minipic.latents import LatentData, denoising_loss, encode_captions, load_pipeline
from minipic.layers import lora
from minipic.recipes import t2i
from minipic.world.caption import describe, say
from minipic.world.pictures import PairPicture
from minipic.world.scene import render, sample_scene
from minipic.world.styles import mosaic

# %% [markdown]
# ## 1. The question
#
# A LoRA (lesson 10) teaches the tiny model mosaics from 32 captioned pictures in 8 steps. Which of
# its choices matters: the rank, the layers that get one, the captions?
#
# ## Predict
#
# The changes are: rank 1 instead of 8; all layers instead of attention's; the caption "a
# picture" for all; and *nothing*, which is the same method with other seeds. **Sort them by how
# much they change the loss on mosaics that were not trained on. Which differences will be larger
# than chance?**
#
# ## 2. The runs
#
# Everything that is not changed must be equal: data, noise, steps, learning rate. All randomness of
# a run comes from its seed, and the runs of one seed differ in the change alone. We measure with
# the same noise for all: a loss on unseen mosaics, and, because learning may cost what was known
# before, a loss on ordinary pictures.

# %%
SEEDS = 3
STEPS = 8
BATCH = 4


@dataclass
class Method:
    """One variant of the method. The defaults are the baseline."""

    rank: int = 8
    layers: str = lora.ATTENTION
    captioned: bool = True
    other_seeds: bool = False


METHODS = {
    "baseline": Method(),
    "nothing (other seeds)": Method(other_seeds=True),
    "rank 1": Method(rank=1),
    "all layers": Method(layers=r"(down|mid|up)_block.*"),
    "one caption for all": Method(captioned=False)}

config = t2i.Settings(
    batch=BATCH, balanced=True, caption_dropout=0.1, precision="fp32", seed=lesson.seed)
pipeline = load_pipeline(config, frozen=True)


def pictures_of(key: str, count: int, shade=None, captioned: bool = True) -> list[PairPicture]:
    """Pictures of random scenes, each with a caption, as the trainer takes them."""
    scenes = [sample_scene((key, lesson.seed), i, objects=1) for i in range(count)]
    options = {} if shade is None else {"shade": shade}
    images = ((render(scenes, truth=False, **options).rgb + 1) * 127.5).round().to(torch.uint8)
    pictures = []
    for i, (scene, image) in enumerate(zip(scenes, images)):
        text = say(describe(scene), rng(key, i)) if captioned else "a picture"
        pictures.append(PairPicture(image, image, text, scene, None))
    return pictures


def data_of(pictures: list[PairPicture]) -> LatentData:
    return LatentData(pipeline, pictures, config, encode_captions(pipeline, pictures))


unseen = {
    "mosaics": data_of(pictures_of("unseen", 8, mosaic)).batch(0, range(8)),
    "ordinary": data_of(pictures_of("ordinary", 8)).batch(0, range(8))}


@torch.no_grad()
def losses_of(unet: torch.nn.Module) -> dict[str, float]:
    """The loss on unseen mosaics and on ordinary pictures, in thousandths."""
    losses = {}
    for name, batch in unseen.items():
        losses[name] = 1000 * denoising_loss(pipeline, batch, config, unet).item()
    return losses


def run(method: Method, seed: int) -> dict[str, float]:
    """Train one variant with one seed and measure it."""
    seed = 1000 * lesson.seed + seed + (100 if method.other_seeds else 0)
    torch.manual_seed(seed)
    unet = copy.deepcopy(pipeline.unet).requires_grad_(False)
    params = lora.inject(unet, method.rank, match=method.layers)
    data = training[method.captioned]
    data.config = replace(config, seed=seed)
    optimizer = torch.optim.AdamW(params, lr=3e-3)
    for step in range(STEPS):
        batch = data.batch(step, range(BATCH * step, BATCH * (step + 1)))
        loss = denoising_loss(pipeline, batch, config, unet)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses_of(unet)


training = {}
for captioned in (True, False):
    training[captioned] = data_of(pictures_of("training", 32, mosaic, captioned))
untrained = losses_of(pipeline.unet)
results = {}
for name, method in METHODS.items():
    results[name] = [run(method, seed) for seed in range(SEEDS)]
    values = [f"{result['mosaics']:.2f}" for result in results[name]]
    print(f"{name:22} loss on mosaics with each seed: {', '.join(values)}")
print("untrained", {name: round(loss, 2) for name, loss in untrained.items()})
means = {"untrained": untrained["mosaics"]}
for name in METHODS:
    means[name] = mean(result["mosaics"] for result in results[name])
lesson.show(bars(means, "Loss on unseen mosaics, in thousandths"), "runs",
            f"The mean of {SEEDS} seeds. The second bar is the same method as the baseline.")

# %% [markdown]
# ## 3. The rule
#
# Runs of one seed are compared with each other, so that what the seed does to both cancels. The
# rule, written before the runs: *a change matters if it has the same sign with every seed, and its
# mean is larger than the largest difference that changing nothing made.*

# %%
def differences(name: str, pictures: str) -> list[float]:
    """Of each seed: the variant's loss minus the baseline's."""
    pairs = zip(results[name], results["baseline"])
    return [variant[pictures] - baseline[pictures] for variant, baseline in pairs]


def verdict(name: str) -> str:
    changes = differences(name, "mosaics")
    chance = max(abs(change) for change in differences("nothing (other seeds)", "mosaics"))
    one_sign = max(changes) < 0 or min(changes) > 0
    if one_sign and abs(mean(changes)) > chance:
        return "worse" if changes[0] > 0 else "better"
    return "not told from chance"


rows = [["change", "mosaics: difference", "smallest, largest", "ordinary: difference", "verdict"]]
for name in list(METHODS)[1:]:
    changes = differences(name, "mosaics")
    forgotten = mean(differences(name, "ordinary"))
    rows.append([name, f"{mean(changes):+.2f}", f"{min(changes):+.2f}, {max(changes):+.2f}",
                 f"{forgotten:+.2f}", verdict(name)])
lesson.show(table(rows, f"{SEEDS} seeds, {STEPS} steps, loss in thousandths"), "table",
            "Differences from the baseline, mean and range over the seeds, and the verdict by the "
            "rule. The row of \"nothing\" shows what chance alone makes of the same method.")
lesson.expect("loss on mosaics, untrained minus baseline", means["untrained"] - means["baseline"])
for name in list(METHODS)[1:]:
    lesson.expect(f"difference of {name}", mean(differences(name, "mosaics")))

# %% [markdown]
# ## 4. The report
#
# "With rank 1 the LoRA learns less of the mosaics, with all layers more. Both differences are
# larger than what other seeds make, with every seed. Whether all pictures have one caption makes
# about as much difference as changing nothing: by this test we cannot tell. 3 seeds, 8 steps,
# 8 unseen pictures, one model."
#
# Three things are worth a second look. Equal signs prove little: three seeds have one sign by
# chance in one of four changes that do nothing. The spread belongs in the table, since without it
# the caption would have looked like a result. And the loss on ordinary pictures says what was paid:
# what learns mosaics faster also forgets faster, so "better" holds for one purpose only.
#
# ## Change one thing
#
# Your own change: a `Method`, with one seed to begin with. When do you believe it?

# %%
MINE = Method(rank=2)
mine = run(MINE, seed=0)
print(f"loss on mosaics {mine['mosaics']:.2f}, baseline {results['baseline'][0]['mosaics']:.2f}")

# %% [markdown]
# ## Exercises
#
# 1. Delete the seeds 1 and 2 from `results`. Which verdicts would you have given with one seed?
# 2. A LoRA of rank 1 has an eighth of the parameters. Is the comparison fair with one learning rate
#    for both? Plan an ablation that is.
# 3. With how many changes that do nothing would you expect one "worse" or "better" by this rule?
#    Think of the signs of three seeds.
