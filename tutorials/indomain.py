# %% [markdown]
# # In-domain generation: two guidances
#
# The paper (arXiv 2312.08195) teaches a copy of the model a domain from pictures without captions,
# and leaves the model itself alone. Every step of a drawing combines three predictions: the
# model's without text (u), the domain's (d), and the model's with the prompt (c).
#
#     eps = eps_u + w_d (eps_d - eps_u) + w_c (eps_c - eps_u)
#
# This lesson checks the limits of the formula, trains a small domain, and draws with a grid of
# weights. Beside it, it does what the paper avoids: it trains the model itself.
#
# **A question to answer before you run it.** The domain's copy never reads a word. If w_d grows
# and w_c stays, is what the prompt says drawn less often? And what becomes of the prompt if the
# model itself is trained on the same pictures, for as many steps, with one caption for all?

# %%
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minipic.common import find_file
from minipic.diffusion.guidance import combine
from minipic.figures import image_grid
from minipic.image import to_tensor
from minipic.latents import denoising_loss, load_pipeline
from minipic.layers import lora
from minipic.papers import indomain
from minipic.papers.indomain import Adapter, DrawOptions
from minipic.pipeline import DrawSettings
from minipic.world import probe
from minipic.world.caption import parse
from minipic.world.scene import render, sample_scene
from minipic.world.styles import mosaic

PROMPTS = (
    "a large red cube", "a large green sphere", "a large blue cone",
    "a small yellow sphere left of a large purple cube")
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 30

# %% [markdown]
# ## The formula at its limits

# %%
eps_u, eps_d, eps_c = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def differs(w_d: float, w_c: float, expected: torch.Tensor) -> float:
    return (combine(eps_u, [(w_d, eps_d), (w_c, eps_c)]) - expected).abs().max().item()


print(f"w_d 0, w_c 0: the model without text    {differs(0, 0, eps_u):.0e}")
print(f"w_d 1, w_c 0: the domain alone          {differs(1, 0, eps_d):.0e}")
print(f"w_d 0, w_c 1: the prompt alone          {differs(0, 1, eps_c):.0e}")
print(f"w_d 0, w_c 5: ordinary guidance of 5    {differs(0, 5, eps_u + 5 * (eps_c - eps_u)):.0e}")

# %% [markdown]
# ## Training
#
# Both get a LoRA of the same rank and the same mosaics. The copy reads no text. The model reads
# the caption "a picture" each time, as one does who has no captions.

# %%
config = indomain.Settings(scenes=100, batch=8, lora_rank=16, precision="fp32")
torch.manual_seed(0)
model = indomain.build(config)
domain_params = indomain.setup(model, config)
data = indomain.data(model, config)

tuned = load_pipeline(config, frozen=True)
tuned_params = lora.inject(tuned.unet, rank=16, match=indomain.BLOCK_LAYERS)

optimizer = torch.optim.AdamW(domain_params + tuned_params, lr=2e-3)
for step in range(STEPS):
    batch = data.batch(step, range(8 * step, 8 * step + 8))
    batch["captions"] = ["a picture"] * 8
    domain_loss = indomain.loss(model, batch, config)
    tuned_loss = denoising_loss(tuned, batch, config)
    optimizer.zero_grad()
    (domain_loss + tuned_loss).backward()
    optimizer.step()
    if step % 10 == 0 or step == STEPS - 1:
        print(f"step {step:3}: domain {domain_loss.item():.3f}, model {tuned_loss.item():.3f}")

# %% [markdown]
# ## A grid of weights
#
# The judge reads every picture: is the whole caption right? And how far are its textures from
# those of true mosaics?

# %%
judge = probe.load_judge(find_file("weights/tiny/judge"))
mosaics = render([sample_scene(1, i) for i in range(64)], truth=False, shade=mosaic).rgb
with torch.no_grad():
    textures = probe.embed_style(judge, mosaics)
    mean_texture = textures.mean(0, keepdim=True)


@torch.no_grad()
def measure(pictures: list) -> str:
    """pictures: two of each prompt."""
    images = torch.stack([to_tensor(picture) for picture in pictures])
    asked = [parse(prompt) for prompt in PROMPTS for _ in range(2)]
    right = probe.accuracy(asked, probe.read(judge, images))["whole"]
    distance = probe.distance(probe.embed_style(judge, images), mean_texture).mean()
    return f"right {right:.2f}, distance {distance:.2f}"


adapter = Adapter(domain=model.domain.eval())
pictures = []
labels = []
for w_d in (0.0, 2.0, 4.0):
    for w_c in (1.0, 3.0, 5.0):
        drawn = []
        for prompt in PROMPTS:
            settings = DrawSettings(prompt, steps=8, n=2)
            options = DrawOptions(w_d, w_c)
            drawn += indomain.draw(model.pipeline, adapter, settings, options=options)
        numbers = measure(drawn)
        print(f"w_d {w_d:g}, w_c {w_c:g}: {numbers}")
        pictures.append(drawn[0])
        labels.append(f"{w_d:g}, {w_c:g}: {numbers}")
print(f"true mosaics: distance {probe.distance(textures, mean_texture).mean():.2f}")

# %% [markdown]
# ## Forgetting
#
# The same numbers for the model that was trained itself. Now both of its predictions have moved:
# the one with the prompt, and the one without, from which guidance measures.

# %%
tuned.eval()
for guidance in (1.0, 3.0, 5.0):
    drawn = []
    for prompt in PROMPTS:
        drawn += tuned.generate(prompt, steps=8, guidance=guidance, n=2, progress=False)
    numbers = measure(drawn)
    print(f"fine-tuned, guidance {guidance:g}: {numbers}")
    pictures.append(drawn[0])
    labels.append(f"fine-tuned, {guidance:g}: {numbers}")
figure = Path("indomain-lesson.png")
image_grid(pictures, labels, columns=3).save(figure)
print(f"see {figure}: {PROMPTS[0]!r}, with w_d and w_c below")

# %% [markdown]
# **Answers.** Yes: the domain says nothing about the prompt, so a large w_d outvotes it, and little
# of the caption is left where w_d is 4 and w_c is 1. A larger w_c brings the caption back and costs
# some of the texture. Each weight does mostly its own work, and both are chosen after training.
#
# The model that was trained itself has one knob for both. Its prediction without text has moved
# to the mosaics too, and guidance leads away from it: the caption comes back, and with it the old
# textures. Compare it with the grid where the distances are about the same: fewer of its captions
# are right. Eight pictures are few, and the training is short; tests/benchmarks/indomain.py asks
# for hundreds.
