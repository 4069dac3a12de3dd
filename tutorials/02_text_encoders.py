# %% [markdown]
# # 02 · Two text encoders
#
# - **Goal:** say which layer of which encoder SDXL reads, what the pooled vector is, and what a
#   causal encoder cannot know
# - **Time:** 10 s
# - **Needs:** 01_tokens
# - **Figures:** causal, pooled, towers
#
# CLIP's text encoder turns 77 token ids into 77 vectors. It was trained together with an encoder
# of pictures: a text and its picture must get similar vectors. SDXL has two such text encoders, a
# small one and a large one, and reads both.

# %%
from lesson import Lesson

lesson = Lesson("02_text_encoders")

import torch
from torch.nn.functional import normalize

from minipic.common import find_file
from minipic.draw_settings import DrawSettings
from minipic.figures import heat_map, image_grid
from minipic.image import to_tensor
from minipic.pipeline import Pipeline
from minipic.text import encode_prompts, text_states
from minipic.world import probe
from minipic.world.caption import parse

torch.set_grad_enabled(False)
pipeline = Pipeline.load("weights/tiny")
first, second = pipeline.tokenizers_and_encoders
prompt = "a small red sphere left of a large blue cube"

# %% [markdown]
# ## Predict
#
# In "a small red sphere left of a large blue cube" we replace one word, "red", by "green". **Which
# of the ten word vectors change? And what does the UNet draw if one of the two encoders is
# silenced?**
#
# ## Two encoders side by side
#
# Each encoder has an input and a few layers. Each layer gives 77 vectors. SDXL takes those of the
# last layer but one and puts the two encoders' side by side. Why not the last layer? CLIP's
# training uses only the end token of it, so that layer gathers the text in one place. The one
# before says more of each word.

# %%
lesson.show_source(text_states)
for name, (tokenizer, encoder) in (("first", first), ("second", second)):
    hidden_states, vector = encoder(tokenizer([prompt]))
    print(f"{name}: input and {len(hidden_states) - 1} layers of {list(hidden_states[-2].shape)}, "
          f"pooled {list(vector.shape)}")
context, pooled = encode_prompts([prompt], [first, second])
print("context", list(context.shape), " pooled", list(pooled.shape))
lesson.expect("width of the context", context.shape[2])

# %% [markdown]
# SDXL base has 768 + 1280 = 2048 numbers a token, here 96 + 128 = 224.
#
# ## Causal: a token knows only what came before
#
# CLIP's encoders hide the future: token n attends to tokens 0 to n. We replace each word in turn
# and measure which vectors move.

# %%
words = prompt.split()
others = ["the", "large", "green", "cone", "right", "on", "the", "small", "red", "cone"]
prompts = [prompt]
for i, other in enumerate(others):
    prompts.append(" ".join([*words[:i], other, *words[i + 1:]]))
states, _ = encode_prompts(prompts, [first, second])
moved = (states[1:, 1:11] - states[:1, 1:11]).norm(dim=2) / states[:1, 1:11].norm(dim=2)
rows = [f"{word} -> {other}" for word, other in zip(words, others)]
lesson.show(heat_map(moved.tolist(), rows, words, "How far each vector moves", cell=38), "causal",
            "One row for each replaced word, one column for each vector. Below the diagonal all "
            "is 0: no vector knows of a word that comes after it. The word itself moves most, and "
            "then its neighbours; the effect fades, but it reaches the last word.")
lesson.expect("largest change before the replaced word", moved.tril(-1).max())
lesson.expect("mean change after it", moved[moved.triu(1) > 0].mean())

# %% [markdown]
# So the vector of the first "small" is the same whatever is small, and that of "cube", the last
# word, can hold the whole prompt. In the UNet, the pixels of the cube listen to "cube" (lesson
# 05).
#
# ## The pooled vector: one for the whole text
#
# It is the end token's state after the last layer and a projection: what CLIP compares with
# pictures. Its cosine similarity says which texts CLIP takes for alike.

# %%
texts = ["large red sphere", "large red ball", "large red cube", "large blue sphere",
         "red sphere left of blue cube", "blue sphere left of red cube"]
sentences = [f"a {text}".replace("of ", "of a ") for text in texts]
_, vectors = encode_prompts(sentences, [first, second])
unit = normalize(vectors, dim=1)
similar = unit @ unit.T
lesson.show(heat_map(similar.tolist(), texts, list("123456"), "Cosine of pooled vectors"), "pooled",
            "Sphere and ball are the same to CLIP: their pictures were. The last two texts share "
            "all words and swap the colours; CLIP finds them about as similar as texts that "
            "differ in one word.")
lesson.expect("similarity of sphere and ball", similar[0, 1])
lesson.expect("similarity of red and blue sphere", similar[0, 3])
lesson.expect("similarity with swapped colours", similar[4, 5])

# %% [markdown]
# The last number is the surprise, and a known weakness of CLIP: it knows well which words occur,
# and less well which belongs to which. A UNet that only had the pooled vector would mix up
# colours.
#
# ## One encoder silenced
#
# We put zeros in the place of one encoder's half of the context, and draw.

# %%
judge = probe.load_judge(find_file("weights/tiny/judge"))
halves = {"both": [], "without the first": slice(0, 96), "without the second": slice(96, 224)}


def draw(silent):
    """Four pictures without those numbers of each context vector."""
    drawing = pipeline.prepare(DrawSettings(prompt, steps=12, seed=4 * lesson.seed, n=4))
    stage = drawing.stages[0]
    context = stage.cond.context.clone()
    context[:, :, silent] = 0
    stage.cond = stage.cond._replace(context=context)
    for latent, _ in pipeline.denoise(drawing):
        pass
    return pipeline.decode(latent)


drawn = {name: draw(silent) for name, silent in halves.items()}
right = {}
for name, pictures in drawn.items():
    images = torch.stack([to_tensor(picture) for picture in pictures])
    right[name] = probe.accuracy([parse(prompt)] * 4, probe.read(judge, images))["color"]
    print(f"{name}: share of colours that are right {right[name]:.2f}")
pictures = [picture for row in drawn.values() for picture in row]
labels = [name for name in drawn for _ in range(4)]
lesson.show(image_grid(pictures, labels, columns=4, cell=100), "towers",
            "Rows: with both encoders, without the first, without the second. Without the first "
            "the red sphere stays and the cube is lost or broken. Without the second the cube "
            "stays, and the sphere is lost or has turned purple.")
lesson.expect("right colours with both", right["both"])
lesson.expect("right colours lost without the first", right["both"] - right["without the first"])
lesson.expect("right colours lost without the second", right["both"] - right["without the second"])

# %% [markdown]
# Neither half is enough. That does not say that one encoder could not do: this UNet has been
# trained with both, and has shared the work between them. Stable Diffusion 1.5 has only the first.
#
# ## Change one thing
#
# Silence the pooled vector instead. Would you see it?

# %%
drawing = pipeline.prepare(DrawSettings(prompt, steps=12, seed=4 * lesson.seed, n=4))
stage = drawing.stages[0]
stage.cond = stage.cond._replace(pooled=torch.zeros_like(stage.cond.pooled))
for latent, _ in pipeline.denoise(drawing):
    pass
images = torch.stack([to_tensor(picture) for picture in pipeline.decode(latent)])
print(probe.accuracy([parse(prompt)] * 4, probe.read(judge, images))["whole"], "are right")

# %% [markdown]
# ## Exercises
#
# 1. Which is the first position whose vector differs between "a red cube" and "a red cone"? Which
#    differ between "a red cube" and "a red cube on a pink floor"? Check the end tokens too.
# 2. Feed the UNet the last layer, `encoder.last(hidden_states)`, instead of the last but one. What
#    does the judge say, and why was it to be expected?
# 3. Find two captions of different meaning whose pooled vectors have a similarity above 0.9.
