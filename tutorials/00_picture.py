# %% [markdown]
# # 00 · One picture, every stage
#
# - **Goal:** name the six steps from a prompt to a picture, and the shape of what each one makes
# - **Time:** 10 s
# - **Needs:** nothing
# - **Figures:** stages, film
#
# Stable Diffusion XL (SDXL) turns a sentence into a picture. Here a tiny SDXL does it. It has the
# same parts in the same order as the large one, and it draws cubes, spheres and cones. We do by
# hand what `pipeline.generate` does in one call.

# %%
from lesson import Lesson

lesson = Lesson("00_picture")

import torch

from minipic.common import find_file
from minipic.diffusion.guidance import combine
from minipic.diffusion.samplers import euler
from minipic.figures import grey, image_grid
from minipic.image import to_tensor
from minipic.pipeline import Pipeline
from minipic.text import encode_prompts, size_ids
from minipic.world import probe
from minipic.world.caption import parse

PROMPT = "a small red sphere left of a large blue cube"
STEPS = 20
GUIDANCE = 5.0

pipeline = Pipeline.load("weights/tiny")
torch.set_grad_enabled(False)  # nothing is trained here
print(pipeline)

# %% [markdown]
# ## Predict
#
# The model starts from pure noise and removes it in 20 steps. After every step it also makes a
# guess of the finished picture. A second network, the judge, reads pictures and says what is in
# them. **After how many of the 20 steps does the judge find everything that the prompt asks for?**
# Write a number down before you go on.
#
# ## Step 1: tokens
#
# The tokenizer cuts the prompt into tokens and gives each a number, its id. There are always 77: a
# start, the words, an end, and padding.

# %%
ids = pipeline.tokenizer([PROMPT])
print("ids", list(ids.shape), ids[0, :12].tolist(), "...")

# %% [markdown]
# ## Step 2: text encoders
#
# Two networks turn the ids into vectors. The *context* has one vector for each token: 96 numbers
# from the first encoder beside 128 from the second. The *pooled* vector is one for the whole text.

# %%
context, pooled = encode_prompts([PROMPT], pipeline.tokenizers_and_encoders)
print("context", list(context.shape), " pooled", list(pooled.shape))

# %% [markdown]
# ## Step 3: noise
#
# The picture is not drawn in pixels. It is drawn as a *latent*: 4 channels of 16 x 16 numbers. We
# start from random ones, called x. The *grid* lists the noise levels sigma on the way down to 0.

# %%
grid = pipeline.schedule.grid(STEPS)
generator = torch.Generator().manual_seed(lesson.seed)
noise = torch.randn(1, 4, 16, 16, generator=generator)
x = grid.start * noise
print("x", list(x.shape), " sigmas", [round(sigma, 2) for sigma in grid.sigmas[::5].tolist()])

# %% [markdown]
# ## Steps 4 and 5: the UNet and the sampler
#
# The UNet sees x and the text, and predicts v, a mixture of noise and picture from which both can
# be computed (lesson 04). It does so twice: without text (all zeros) and with it. Guidance of 5
# goes from the first answer towards the second, five times as far. The sampler, Euler's method,
# then takes one step from one sigma to the next. SDXL's UNet is also given the sizes of the
# picture, six numbers.

# %%
both_contexts = torch.cat([torch.zeros_like(context), context])
both_pooled = torch.cat([torch.zeros_like(pooled), pooled])
sizes = size_ids((64, 64), (0, 0), (64, 64)).expand(2, -1)


def predict(x, t):
    without_text, with_text = pipeline.unet(
        torch.cat([x, x]), t, both_contexts, both_pooled, sizes).chunk(2)
    return combine(without_text, [(GUIDANCE, with_text)])


objective = pipeline.schedule.objective
denoise = objective.denoiser(predict, grid)
states = []
guesses = []
for i, (x, guess) in enumerate(euler(denoise, x, grid.sigmas)):
    states.append(objective.network_input(x, grid.sigmas[i + 1]))
    guesses.append(guess)

# %% [markdown]
# ## Step 6: the VAE's decoder
#
# The decoder turns the 4 x 16 x 16 latent into 3 x 64 x 64 pixels.

# %%
picture, = pipeline.decode(states[-1])
expected, = pipeline.generate(
    PROMPT, steps=STEPS, guidance=GUIDANCE, seed=lesson.seed, progress=False)
difference = (to_tensor(picture) - to_tensor(expected)).abs().max()
lesson.expect("largest difference to pipeline.generate", difference)
lesson.expect("pixel numbers for each latent number", 3 * 64 * 64 / x.numel())

token_rows = ids[0, :11, None].expand(-1, 11).float()
stages = [grey(token_rows, 128), grey(context[0, :32, :32], 128), grey(noise[0, 0], 128),
          grey(states[-1][0, 0], 128), picture.resize((128, 128), 0)]
labels = ["1 token ids", "2 context", "3 noise", "4, 5 latent", "6 picture"]
lesson.show(image_grid(stages, labels, columns=5, cell=128), "stages",
            "What each step makes, as shades of grey: the ids of the first 11 tokens (one row "
            "each), a corner of the context, one of four channels of the noise and of the "
            "finished latent, and the picture. The latent is already a small map of the picture.")

# %% [markdown]
# ## The film
#
# Now the answer to the question. We decode every guess and let the judge read it.

# %%
judge = probe.load_judge(find_file("weights/tiny/judge"))
images = torch.stack([to_tensor(pipeline.decode(guess)[0]) for guess in guesses])
found = probe.read(judge, images)
right = [probe.accuracy([parse(PROMPT)], [one])["whole"] == 1 for one in found]
first = 1 + right.index(True)
print("after each step, is all of the prompt there?", "".join("x" if ok else "." for ok in right))
lesson.expect("first step whose guess shows all of the prompt", first)

shown = [0, 4, 7, 11, STEPS - 1]
frames = [pipeline.decode(series[i])[0] for series in (states, guesses) for i in shown]
labels = [f"{word} {i + 1}" for word in ("x after", "guess") for i in shown]
lesson.show(image_grid(frames, labels, columns=5, cell=100), "film",
            "Above: x after 1, 5, 8, 12 and 20 steps, decoded. Below: the model's guess of the "
            "finished picture at the same steps. The first guess has a red blob left of a blue "
            "block already, in colours too strong. The guess after 5 steps has a red spot too "
            "many, above the cube. Later guesses only get sharper.")

# %% [markdown]
# The surprise is the very first guess: x is noise to our eyes, and the model knows already what
# goes where. What a picture shows is decided early; most of the steps make it sharp. This is why
# drawing from an existing picture with a low `strength`, which starts late, can change how things
# look but not where they are.
#
# ## Change one thing
#
# The prompt, the steps and the guidance are yours. Which is the smallest number of steps with
# which the judge still finds everything?

# %%
few, = pipeline.generate(PROMPT, steps=6, guidance=GUIDANCE, seed=lesson.seed, progress=False)
read, = probe.read(judge, to_tensor(few)[None])
print(read)

# %% [markdown]
# ## Exercises
#
# 1. SDXL base draws 1024 x 1024 pixels from 4 x 128 x 128 latents. How many pixel numbers are
#    there for each latent number? Compare with the checkpoint above.
# 2. Set `GUIDANCE = 1`. Then `combine` returns the prediction with text alone. What does the judge
#    find now? Lesson 08 says why.
# 3. Add `0.1 * torch.randn(...)` to x between two steps, early and late. Which one does the
#    picture forgive?
