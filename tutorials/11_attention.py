# %% [markdown]
# # 11 · Attention, four ways
#
# - **Goal:** go from the formula of attention to flash attention, and say what each way holds in
#   memory
# - **Time:** 20 s
# - **Needs:** 05_unet
# - **Figures:** running, memory, blocks
#
# Attention answers each of N queries q with a mean of M values v. The weights are
# softmax(q k / sqrt(d)) over the M keys k, where d is the length of q. So there are N x M scores.
# This lesson computes the same numbers four ways, and counts how many scores each way holds at
# once.

# %%
from lesson import Lesson

lesson = Lesson("11_attention")

import os
import time
from functools import partial
from importlib.util import find_spec

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minipic.common import rng
from minipic.figures import curves, table
from minipic.layers.attention import attention, chunk_sizes, chunked, naive

torch.set_grad_enabled(False)


def random_qkv(tokens: int, heads: int, d: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values, each [1,N,h,d]."""
    generator = rng(lesson.seed, "qkv", tokens)
    return torch.randn(3, 1, tokens, heads, d, generator=generator).unbind(0)


# %% [markdown]
# ## Predict
#
# SDXL draws 1024 x 1024 pixels. Its second level has 64 x 64 latent pixels, and each is a token
# that attends to all of them, in 10 heads. **How many megabytes are the scores of one layer, with
# 2 bytes a score?**
#
# A softmax divides by the sum over all keys. **Can one walk over the keys in small blocks, forget
# each block's scores, and still get the exact result?**
#
# ## First way: the formula
#
# All N x M scores of each head are in memory at once, several times over.

# %%
lesson.show_source(naive)
lesson.expect("megabytes of scores in one layer of SDXL", 10 * (64 * 64) ** 2 * 2 / 1e6)

# %% [markdown]
# 336 MB, in each of many layers, and twice as much with guidance. For 2048 x 2048 pixels it is 16
# times as much.
#
# ## Second way: a few queries at a time
#
# No row of the scores needs another row. So the rows can be computed in chunks. Each chunk still
# has all M scores of its queries.

# %%
lesson.show_source(chunked)

# %% [markdown]
# ## Third way: a few keys at a time, the online softmax
#
# Now we walk over the keys in blocks. For each query we keep three things:
#
# - `largest`: the largest score m so far, because exp of a large number overflows,
# - `total`: the sum of exp(score - m),
# - `output`: the sum of exp(score - m) times the value.
#
# When a block brings a larger m', what we have was computed with the wrong m. It is repaired by
# one factor, exp(m - m'). At the end, output / total is the attention. minipic has this as a
# kernel, which comes below. Here it is in plain PyTorch, with all queries at once.

# %%
def online(q, k, v, keys_at_once, repaired=True):
    """q, k, v [1,N,h,d] -> the output so far, [1,N,h,d], after every block."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    largest = torch.full((*q.shape[:3], 1), float("-inf"))
    total = torch.zeros_like(largest)
    output = torch.zeros_like(q)
    for start in range(0, k.shape[2], keys_at_once):
        block = slice(start, start + keys_at_once)
        scores = q @ k[:, :, block].transpose(2, 3) * q.shape[-1] ** -0.5
        new_largest = torch.maximum(largest, scores.amax(-1, keepdim=True))
        weights = (scores - new_largest).exp()
        shrink = (largest - new_largest).exp() if repaired else 1.0
        total = total * shrink + weights.sum(-1, keepdim=True)
        output = output * shrink + weights @ v[:, :, block]
        largest = new_largest
        yield (output / total).transpose(1, 2)


def online_attention(q, k, v, keys_at_once=64, repaired=True):
    for output in online(q, k, v, keys_at_once, repaired):
        pass
    return output


q, k, v = random_qkv(512, heads=2, d=64)
exact = attention(q.double(), k.double(), v.double(), backend="naive")
distances = []
for output in online(q, k, v, 32):
    distances.append((output - exact).abs().max().item())
print("distance to the result after each block", [f"{distance:.1g}" for distance in distances])
lesson.show(curves({"online softmax": (list(range(1, 17)), distances)}, "blocks of 32 keys read",
                   "largest distance to attention over all keys", logarithmic=True), "running",
            "After each block, output / total is the exact attention to the keys read so far. It "
            "is far from the result until the last block, and then exact up to rounding.")
lesson.expect("distance before the last block", distances[-2])
lesson.expect("distance after the last block", distances[-1])

# %% [markdown]
# ## Fourth way: flash attention
#
# Flash attention (arXiv 2205.14135 and 2307.08691) blocks both: a small program takes a block of
# queries and walks over the blocks of keys. Its scores, such as 64 x 64 numbers, never leave the
# fast memory beside the processor's arithmetic units. This is minipic's kernel, in the language
# Triton. Find the lines of `online` in it.

# %%
os.environ.setdefault("TRITON_INTERPRET", "1")  # run the kernel here, slowly, without a GPU
has_triton = find_spec("triton") is not None
if has_triton:
    from minipic.kernels import flash_attention
    lesson.show_source(flash_attention.forward_kernel.fn)
else:
    print("Triton is not installed (tests/requirements.txt names it); read the kernel in "
          "minipic/kernels/flash_attention.py. The lesson goes on without it.")

# %% [markdown]
# Triton's interpreter runs the kernel on any computer, so all ways can be compared. "sdpa" is
# PyTorch's own flash attention, the default of minipic on most devices.

# %%
ways = {
    "naive": partial(attention, backend="naive"),
    "chunked": partial(attention, backend="chunked"),
    "sdpa": partial(attention, backend="sdpa"),
    "online": online_attention}
if has_triton:
    ways["flash"] = partial(attention, backend="flash")
errors = {}
for name, way in ways.items():
    start = time.perf_counter()
    errors[name] = (way(q, k, v) - exact).abs().max().item()
    print(f"{name:8} error {errors[name]:.1e}  {time.perf_counter() - start:7.3f} s")
lesson.expect("largest error of all ways", max(errors.values()))

# %% [markdown]
# ## Memory
#
# PyTorch tells a *dispatch mode* of every operation. Ours keeps the size of the largest tensor
# that one of them makes. Flash attention is drawn as its blocks are: 64 x 64 scores for each
# program that runs at the moment, here one.

# %%
class Largest(TorchDispatchMode):
    """Inside, `megabytes` is the size of the largest tensor that was made."""

    megabytes = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if torch.is_tensor(result):
            self.megabytes = max(self.megabytes, result.numel() * result.element_size() / 1e6)
        return result


def largest_tensor(way, *given) -> float:
    with Largest() as mode:
        way(*given)
    return mode.megabytes


counts = [256, 512, 1024, 2048, 4096]
lines = {}
for name in ("naive", "chunked", "online"):
    megabytes = [largest_tensor(ways[name], *random_qkv(tokens, 1, 64)) for tokens in counts]
    lines[name] = counts, megabytes
    print(f"{name:8}", *[f"{value:8.3f}" for value in megabytes], "MB")
lines["flash"] = counts, [64 * 64 * 4 / 1e6] * len(counts)
lesson.show(curves(lines, "tokens N = M, one head", "megabytes of the largest tensor",
                   logarithmic=True), "memory",
            "The formula's memory grows with N x N: four times for twice the tokens. Chunks "
            "share one piece of memory, of a million scores (4 MB), or of 512 queries if that is "
            "more. Online it grows with N, much lower. The blocks of flash attention do not grow.")
for name in ("naive", "online"):
    _, megabytes = lines[name]
    lesson.expect(f"{name}: growth from 2048 to 4096 tokens", megabytes[4] / megabytes[3])

# %% [markdown]
# The block size is a choice: it changes the memory, not the result.

# %%
given = random_qkv(2048, 1, 64)
truth = attention(*(x.double() for x in given), backend="naive")
rows = [["keys in a block", "largest tensor", "error", "time"]]
for size in (16, 64, 256, 1024, 2048):
    megabytes = largest_tensor(online_attention, *given, size)
    start = time.perf_counter()
    error = (online_attention(*given, size) - truth).abs().max().item()
    seconds = time.perf_counter() - start
    rows.append([str(size), f"{megabytes:.2f} MB", f"{error:.0e}", f"{1000 * seconds:.0f} ms"])
lesson.show(table(rows, "Online softmax of 2048 tokens, one head"), "blocks",
            "The last row is one block of all keys, the formula itself. With 16 keys the largest "
            "tensor is no longer the scores (0.13 MB) but the output (0.52 MB).")
queries_at_once, _ = chunk_sizes(given[0][:, :, 0], given[1].shape[1])
lesson.expect("queries in a chunk of `chunked`", queries_at_once)

# %% [markdown]
# So the answer to the second question is yes: exact up to rounding. Flash attention is no
# approximation. It computes as many scores as the formula, and is faster only because it does not
# carry them to the large, slow memory and back.
#
# ## Change one thing
#
# `REPAIRED = False` leaves out the factor exp(m - m'). How wrong is the result? And with
# `SHARPNESS = 0.01`, where all scores are almost equal?

# %%
REPAIRED = False
SHARPNESS = 1.0
wrong = online_attention(SHARPNESS * q, k, v, repaired=REPAIRED)
right = attention(SHARPNESS * q, k, v)
print(f"largest error {(wrong - right).abs().max().item():.2g}")

# %% [markdown]
# ## Exercises
#
# 1. The kernel saves one number for each query, `lse`. Show that the backward pass can compute
#    all weights again from q, k and `lse`, without a second online softmax.
# 2. Multiply q by 100 and leave `largest` at 0 in `online`. What comes out, and why?
# 3. Cross-attention has M = 77 tokens of text. How large are its scores in the layer of the first
#    question? Which of the four ways would you use there?
