"""Textual inversion (arXiv 2208.01618): new words, each one vector or more in the text encoders, and their files.

A new word's ids follow those of the vocabulary. The encoders still pool at the end token (models/clip.py), although the
new ids are larger, which is where an argmax would pool.
"""

from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from minipic.common import InputError
from minipic.layers.swap import swap
from minipic.weights import read_header, read_weights, save_weights

WIDTHS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "emb_params": "text_encoder"}  # kohya's names
SUFFIXES = {"text_encoder": "", "text_encoder_2": "_2"}  # diffusers has a file an encoder


class GrownEmbedding(nn.Module):
    """ids [B,N] -> vectors [B,N,D]: the vocabulary's `weight` [V,D], and `added` [n,D] for the ids from V on."""

    def __init__(self, weight, added):
        super().__init__()
        self.weight, self.added = weight, nn.Parameter(added)

    def forward(self, ids):
        new = ids >= len(self.weight)
        known = F.embedding(ids.masked_fill(new, 0), self.weight)
        added = F.embedding((ids - len(self.weight)).clamp(min=0), self.added)
        return torch.where(new[..., None], added.to(known.dtype), known)


def grow(encoder, vectors):
    """Add vectors [n,D] to a CLIPText's token embedding, after those added before. Returns the embedding."""
    def build(name, old):
        before = old.added.data if isinstance(old, GrownEmbedding) else old.weight[:0]
        return GrownEmbedding(old.weight, torch.cat([before, vectors.to(old.weight)]).detach())
    return next(iter(swap(encoder, lambda name, _: name.endswith("token_embedding"), build).values()))


def load_embedding(path):
    """A textual inversion -> ({part: vectors [n,D]}, the word in the file or None).

    One file of kohya's scripts ("clip_l" and "clip_g"; SD 1.5: "emb_params"; ours have the word in the header), or
    diffusers' learned_embeds.safetensors, whose keys are the word, with the second encoder's beside it in
    learned_embeds_2.safetensors. InputError for others.
    """
    path, tensors = Path(path), read_weights(path)
    word = read_header(path)[1].get("word")
    if tensors.keys() <= WIDTHS.keys():
        found = {WIDTHS[key]: tensor for key, tensor in tensors.items()}
    else:
        found, (word, *more) = {"text_encoder": next(iter(tensors.values()))}, tensors
        second = path.with_name(path.name.replace("learned_embeds", "learned_embeds_2"))
        if second != path and second.exists() and not more:
            other = read_weights(second)
            more = [key for key in other if key != word]
            found["text_encoder_2"] = other.get(word, torch.empty(0))  # refused below
        if more:
            raise InputError(f"{path}: {more[0]!r} is more than one word's vectors; expected clip_l and clip_g, or one "
                             "word")
    found = {part: x[None] if x.ndim == 1 and len(x) else x for part, x in found.items()}  # diffusers until 2023
    wrong = any(x.ndim != 2 or not x.is_floating_point() for x in found.values())
    if wrong or len({len(x) for x in found.values()}) != 1:
        raise InputError(f"{path}: is no textual inversion: expected vectors [n, width], as many for each encoder")
    return found, word


def save_embedding(vectors, path, word):
    """Write {part: vectors [n,D]} as one file of kohya's spelling, `path`, and as diffusers' files beside it."""
    folder = Path(path).parent
    names = {part: key for key, part in WIDTHS.items() if key.startswith("clip") == ("text_encoder_2" in vectors)}
    save_weights({names[part]: tensor for part, tensor in vectors.items()}, path, {"word": word})
    for part, tensor in vectors.items():
        save_weights({word: tensor}, folder / f"learned_embeds{SUFFIXES[part]}.safetensors")
