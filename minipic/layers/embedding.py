"""New words of textual inversion (arXiv 2208.01618): rows after those of the vocabulary.

The new ids are larger than the end token's. The encoders still pool at the end token
(models/clip.py), where an argmax over the ids would pool at a new word.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from minipic.layers.swap import swap


class GrownEmbedding(nn.Module):
    """ids [B,N] -> vectors [B,N,D].

    Ids below V are rows of `weight` [V,D], ids from V on are rows of `added` [n,D].
    """

    def __init__(self, weight: nn.Parameter, added: torch.Tensor):
        super().__init__()
        self.weight = weight
        self.added = nn.Parameter(added)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        vocabulary = len(self.weight)
        is_new = ids >= vocabulary
        known = F.embedding(ids.masked_fill(is_new, 0), self.weight)
        added = F.embedding((ids - vocabulary).clamp(min=0), self.added)
        return torch.where(is_new[..., None], added.to(known.dtype), known)


def grow(encoder: nn.Module, vectors: torch.Tensor) -> GrownEmbedding:
    """Add vectors [n,D] to a CLIPText's token embedding, after those added before.

    Returns the embedding.
    """
    def build(path, embedding):
        if isinstance(embedding, GrownEmbedding):
            before = embedding.added.data
        else:
            before = embedding.weight[:0]
        added = torch.cat([before, vectors.to(embedding.weight)]).detach()
        return GrownEmbedding(embedding.weight, added)

    grown = swap(encoder, lambda path, _: path.endswith("token_embedding"), build)
    return next(iter(grown.values()))
