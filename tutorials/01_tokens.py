# %% [markdown]
# # 01 · Tokens
#
# - **Goal:** merge the letters of a word into tokens by hand, and explain start, end, padding and
#   77
# - **Time:** 6 s
# - **Needs:** 00_picture
# - **Figures:** merges, row, words
#
# A network reads numbers, not letters. A *tokenizer* cuts a text into pieces, the tokens, of which
# each has a number. CLIP's way is byte-pair encoding (BPE): start with single letters, and merge
# two neighbours again and again, in an order that was learned once from many texts.

# %%
from lesson import Lesson

lesson = Lesson("01_tokens")

from collections import Counter

from minipic.common import find_file, rng
from minipic.figures import bars, table
from minipic.text import Tokenizer
from minipic.world.caption import caption
from minipic.world.scene import sample_scene

folder = find_file("weights/tiny/tokenizer")
tokenizer = Tokenizer(folder)
second = Tokenizer(find_file("weights/tiny/tokenizer_2"))

# %% [markdown]
# ## Predict
#
# The merges were learned from captions such as "a small red cone behind a large green sphere".
# **Which two neighbours were merged first? And into how many tokens does "astronaut" fall, a word
# that is in no caption?**
#
# ## A word, merged by hand
#
# `merges.txt` has one pair a line, the first learned first. At each step the pair with the lowest
# rank is merged. The mark `</w>` ends a word: so "red" the word and "red" in "bored" are
# different.

# %%
lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
rank = {tuple(line.split()): i for i, line in enumerate(lines)}


def merge_by_hand(word):
    """All steps from single letters to tokens."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    steps = [pieces]
    while True:
        found = [(rank[pair], i) for i, pair in enumerate(zip(pieces, pieces[1:])) if pair in rank]
        if not found:
            return steps
        _, i = min(found)
        pieces = pieces[:i] + [pieces[i] + pieces[i + 1]] + pieces[i + 2:]
        steps.append(pieces)


rows = [["step", "pieces"]]
for i, pieces in enumerate(merge_by_hand("cylinder")):
    rows.append([str(i), "  ".join(pieces)])
lesson.show(table(rows, "cylinder"), "merges",
            "Seven merges from eight letters to one token. The first is in the middle: of all "
            'pairs, "i n" was learned earliest. The pieces on the way are no syllables.')

# %% [markdown]
# Is this what minipic's tokenizer does? We compare every word of 1,000 captions.

# %%
captions = [caption(sample_scene(lesson.seed, i), rng(lesson.seed, i)) for i in range(1000)]
counts = Counter(word for text in captions for word in text.replace(",", "").split())
same = 0
for word in counts:
    tokens = tokenizer.bpe.encode(word, add_special_tokens=False).tokens
    same += merge_by_hand(word)[-1] == tokens
lesson.expect("share of words with the same tokens", same / len(counts))
lesson.expect("merges in the file", len(rank))

# %% [markdown]
# ## Learning the first merge
#
# Learning is counting: the pair that occurs most often in all words is merged, then we count
# again.

# %%
pairs = Counter()
for word, count in counts.items():
    pieces = [*word[:-1], word[-1] + "</w>"]
    for pair in zip(pieces, pieces[1:]):
        pairs[pair] += count
for pair, count in pairs.most_common(4):
    print(f"{' + '.join(pair):12} {count:5} times, rank {rank.get(pair)} in merges.txt")
lesson.expect("rank of the commonest pair in merges.txt", rank[pairs.most_common(1)[0][0]])

# %% [markdown]
# The commonest pair is no word: "n" and "d" at the end of one, as in "and" and "behind". Look at
# "a + n": it is third here, and was learned as number 48 only. Most of its places are in "and",
# and the first merge takes their "n" away. So learning has to count again after every merge.
#
# ## A whole prompt: 77 numbers
#
# A prompt becomes a start token, its tokens, an end token, and padding up to 77, which is the
# length that CLIP was trained with. SDXL's two tokenizers have the same vocabulary and pad
# differently: the first repeats the end token, the second has id 0, which is the letter "!".

# %%
prompt = "A small RED sphere, left of an astronaut"
first_ids = tokenizer([prompt])[0].tolist()
second_ids = second([prompt])[0].tolist()
rows = [["position", "token", "first ids", "second ids"]]
for i in range(20):
    token = tokenizer.bpe.id_to_token(first_ids[i])
    rows.append([str(i), token, str(first_ids[i]), str(second_ids[i])])
lesson.show(table(rows, prompt), "row",
            "The first 20 of 77 ids. Capitals are gone: RED is red. Words of captions are one "
            "token, the astronaut is seven. After the end token the two tokenizers differ.")
lesson.expect("length", len(first_ids))
lesson.expect("ids that differ between the two", sum(a != b for a, b in zip(first_ids, second_ids)))

# %%
words = ["sphere", "cylinder", "checkered", "cylinders", "astronaut", "Stable", "🙂"]
sizes = {}
for word in words[:-1]:
    sizes[word] = len(tokenizer.bpe.encode(word, add_special_tokens=False).ids)
sizes["a smiley"] = len(tokenizer.bpe.encode(words[-1], add_special_tokens=False).ids)
lesson.show(bars(sizes, "Tokens of a word"), "words",
            "No text is unknown: what was never merged falls into letters, and what is no English "
            "letter into bytes. A smiley is four bytes, so four tokens.")
lesson.expect("tokens of astronaut", sizes["astronaut"])

# %% [markdown]
# One letter more, "cylinders", and one token becomes four: the model has hardly seen those pieces
# together. SDXL's real vocabulary has 49,408 tokens, with most English words among them; rare
# names fall into pieces there too. DreamBooth looks for a token that is rare and one piece.
#
# ## Change one thing
#
# At most 75 tokens fit. What is cut off?

# %%
REPEATS = 12
long_prompt = ", ".join(["a small red sphere left of a cone"] * REPEATS)
tokens = tokenizer.bpe.encode(long_prompt, add_special_tokens=False).tokens
print(len(tokens), "tokens; the last that fits is", repr(tokens[74]))

# %% [markdown]
# ## Exercises
#
# 1. Merge "spheres" by hand with the first 100 lines of merges.txt, then check it.
# 2. Continue the learning: merge the commonest pair in all words and count again, 20 times. How
#    many of your 20 merges are among the first 20 of merges.txt?
# 3. `encode_weighted` in minipic/text.py takes prompts of any length. Read how, and say what the
#    UNet gets for a prompt of 100 tokens: what are N and the cost of cross-attention?
