# %% [markdown]
# # 03 · The VAE
#
# - **Goal:** train a small autoencoder, and explain what the KL weight and the scaling factor do
# - **Time:** 40 s
# - **Needs:** 00_picture
# - **Figures:** latents, rebuilt, trained, noise
#
# SDXL does not draw in pixels. A variational autoencoder (VAE) turns a picture into a small array,
# the *latent*, and back. Diffusion happens in latents. For SDXL that means 48 times fewer numbers,
# here 12 times.

# %%
from lesson import Lesson

lesson = Lesson("03_vae")

import torch

from minipic.figures import curves, grey, image_grid
from minipic.image import to_pictures
from minipic.models.vae import VAEConfig
from minipic.pipeline import Pipeline
from minipic.recipes import vae as recipe
from minipic.world.metrics import psnr
from minipic.world.scene import render, sample_scene

vae = Pipeline.load("weights/tiny").vae
images = render([sample_scene(("vae lesson", lesson.seed), i) for i in range(64)], truth=False).rgb

# %% [markdown]
# ## Predict
#
# The encoder gives two numbers for each number of the latent: a mean and a (logarithmic) variance,
# so that a latent is a cloud, not a point. **We add noise to the latents, half as strong as the
# latents themselves. Are the pictures ruined? And what will an autoencoder do in training if it is
# fined heavily for clouds that are not the standard one, of mean 0 and variance 1?**
#
# ## A picture, its latent, and back

# %%
with torch.no_grad():
    mean, logvar = vae.encode(images)
    rebuilt = vae.decode(mean)
print("image", list(images.shape), " mean", list(mean.shape))
channels = [grey(mean[0, channel], 96) for channel in range(4)]
first, = to_pictures(images[:1])
labels = ["picture", "channel 1", "channel 2", "channel 3", "channel 4"]
row = [first.resize((96, 96), 0), *channels]
lesson.show(image_grid(row, labels, columns=5, cell=96), "latents",
            "A picture and the four channels of its latent, 16 x 16 numbers each. They are small "
            "maps of the picture: everything stays in its place.")
pairs = to_pictures(torch.cat([images[:5], rebuilt[:5]]))
lesson.show(image_grid(pairs, ["picture"] * 5 + ["and back"] * 5, columns=5, cell=100), "rebuilt",
            "Five pictures, and what is left of them after encoding and decoding: a little softer "
            "at the edges.")
lesson.expect("PSNR of pictures and back, in dB", psnr(rebuilt, images))
lesson.expect("standard deviation of a cloud over that of the latents",
              (0.5 * logvar).exp().mean() / mean.std())

# %% [markdown]
# PSNR is 10 log10(peak^2 / mean squared error), in decibels: 30 is good, 20 is visibly wrong. The
# clouds are tiny, 3 % of the spread of the latents: in practice this is an ordinary autoencoder.
#
# ## The scaling factor
#
# The noise schedule expects data with a standard deviation near 1. So latents are multiplied by a
# constant that was measured once, 0.13025 for SDXL.

# %%
factor = vae.config.scaling_factor
lesson.expect("standard deviation after scaling", mean.std() * factor)

# %% [markdown]
# ## Noise in the latent
#
# The UNet's latents are never perfect. What does the decoder make of errors?

# %%
generator = torch.Generator().manual_seed(lesson.seed)
noise = torch.randn(mean.shape, generator=generator)
strengths = [0.0, 0.05, 0.1, 0.2, 0.5]
quality = []
noisy = []
with torch.no_grad():
    for strength in strengths:
        decoded = vae.decode(mean + strength * mean.std() * noise)
        quality.append(psnr(decoded, images))
        noisy += to_pictures(decoded[:1])
labels = [f"noise {s:g}: {q:.1f} dB" for s, q in zip(strengths, quality)]
lesson.show(image_grid(noisy, labels, columns=5, cell=100), "noise",
            "Noise in the latent, as a share of its standard deviation. A tenth can hardly be "
            "seen; half of it makes blotches rather than grains, and the ring and the cylinder "
            "are still there.")
lesson.expect("PSNR with noise of 0.5, in dB", quality[-1])

# %% [markdown]
# ## Train one
#
# Now a much smaller VAE from nothing, on pictures of 32 x 32, for 40 steps, with three weights of
# the Kullback-Leibler (KL) term. For a cloud of mean m and variance s^2 it is (m^2 + s^2 - 1 - ln
# s^2) / 2: zero for the standard cloud, and larger the farther from it.

# %%
lesson.show_source(recipe.loss)
SMALL = VAEConfig(sample_size=32, block_out_channels=(16, 32, 32), layers_per_block=1,
                  norm_num_groups=4)
recipe.TINY = SMALL  # recipe.build makes it
scenes = [sample_scene(("vae training", lesson.seed), i) for i in range(256)]
train_images = render(scenes, (32, 32), truth=False).rgb
test_images = render([sample_scene(("vae test", lesson.seed), i) for i in range(32)], (32, 32),
                     truth=False).rgb


def train(kl_weight, steps=40):
    """A small VAE, and its PSNR on pictures that it has not seen, after every tenth step."""
    torch.manual_seed(lesson.seed)
    config = recipe.Settings(kl_weight=kl_weight, seed=lesson.seed)
    small = recipe.build(config)
    optimizer = torch.optim.Adam(small.parameters(), 3e-3)
    path = []
    for step in range(steps):
        rows = torch.randint(256, (16,)).tolist()
        batch = {"image": train_images[rows], "indices": [1000 * step + row for row in rows]}
        total, _ = recipe.loss(small, batch, config)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if step % 10 == 9:
            with torch.no_grad():
                path.append(psnr(small.decode(small.encode(test_images)[0]), test_images))
    return small, path


weights = [1e-4, 1e-2, 1.0]
paths = {}
spreads = {}
for weight in weights:
    small, path = train(weight)
    paths[f"{weight:g}"] = ([10, 20, 30, 40], path)
    with torch.no_grad():
        mean, logvar = small.encode(test_images)
    spreads[weight] = mean.std().item(), (0.5 * logvar).exp().mean().item()
    print(f"KL weight {weight:g}: {path[-1]:.1f} dB, spread of means {spreads[weight][0]:.2f}, "
          f"size of clouds {spreads[weight][1]:.2f}")
lesson.show(curves(paths, "step", "PSNR of unseen pictures, in dB, by KL weight"), "trained",
            "Training with three KL weights. Two small ones give nearly the same curve; with a "
            "weight of 1 the pictures hardly get better.")
lesson.expect("PSNR with KL weight 0.0001, in dB", paths["0.0001"][1][-1])
lesson.expect("PSNR lost with KL weight 1, in dB", paths["0.0001"][1][-1] - paths["1"][1][-1])
lesson.expect("spread of the means with KL weight 1", spreads[1.0][0])

# %% [markdown]
# With a heavy fine the means shrink to 0 and the clouds grow to 1: all pictures get the same
# cloud, which costs nothing and says nothing. This is called posterior collapse. The weight must
# be small: just enough to keep latents in bounds.
#
# ## Change one thing
#
# Train the small VAE longer. Where does it stop getting better?

# %%
STEPS = 60
_, path = train(1e-4, STEPS)
print(f"{STEPS} steps: {path[-1]:.1f} dB")

# %% [markdown]
# ## Exercises
#
# 1. Show that the KL term is 0 for m = 0 and s = 1, and nowhere else.
# 2. Which channel of the latent carries brightness? Add 1 to one channel at a time and decode.
# 3. Encode a picture of white noise and decode it. Why is the PSNR so low, though the VAE is good?
