"""Trains the tiny CLIP: two text encoders of different kind against one vision tower (arXiv 2103.00020 figure 3).

The first encoder is like CLIP-L (quick-gelu; its projection is only for training), the second like OpenCLIP's bigG
(gelu, with a projection), as in SDXL. Their tokenizers differ in the padding only, as SDXL's do.

Contrast alone is content with colours: of what a UNet would read in these encoders, shapes and places were 2% of the
variance, and it never learned them. So linear heads must also read the facts of the caption in it, each as clearly.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from minipic import training
from minipic.common import option, random
from minipic.data import Picture, compose
from minipic.image import labelled_grid, to_pictures
from minipic.layouts import save_part
from minipic.models.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig, contrastive_loss
from minipic.text import END, Tokenizer, train_tokenizer
from minipic.training import Recipe as Base
from minipic.world.caption import RELATIONS, Thing, parse
from minipic.world.edits import edited
from minipic.world.scene import COLORS, FLOORS, PATTERNS, PLACES, SHAPES, SIZES, SKIES, is_held_out

CAPTIONS = 2000  # whose words make the vocabulary
WIDTH = 128  # of the space where pictures and captions meet
# What a caption may say of a thing, in the order of Thing's fields, and of up to three things in each of two panels
LOOKS = {"color": COLORS, "color2": COLORS, "shape": SHAPES, "size": SIZES, "pattern": PATTERNS, "place": PLACES}
PANEL = [*[names for _ in range(3) for names in LOOKS.values()], RELATIONS, RELATIONS, FLOORS, SKIES]
FACTS = [len(names) + 1 for names in 2 * PANEL]  # answers to each question; the first is "not said"
FAMILY, EDITS = 4, ("recolour", "move", "resize", "reshape")  # pictures that are alike but for one of these edits


@dataclass
class Recipe(Base):
    """Train both text encoders and the vision tower to match pictures with their captions."""

    steps: int = option(2500, "optimizer steps in all")
    batch: int = option(64, "picture and caption pairs a step")
    weight_decay: float = option(0.1, "AdamW's decay of matrices and kernels (never of biases and norms)")
    scenes: int = option(10000, "different pictures, drawn before training starts")
    vocabulary: int = option(1024, "tokens of the vocabulary, at most; the captions' words need about 700")

    LEAST = Base.LEAST | {"scenes": FAMILY}


class Towers(nn.Module):
    """The three towers and what only training needs: the first encoder's projection, two temperatures, heads."""

    def __init__(self, vocab_size):
        super().__init__()
        self.text_encoder = CLIPText(CLIPTextConfig(
            vocab_size=vocab_size, hidden_size=96, intermediate_size=384, num_hidden_layers=4, num_attention_heads=3,
            hidden_act="quick_gelu", projection_dim=96))
        self.text_encoder_2 = CLIPText(CLIPTextConfig(
            vocab_size=vocab_size, hidden_size=128, intermediate_size=512, num_hidden_layers=5, num_attention_heads=4,
            hidden_act="gelu", projection_dim=WIDTH, with_projection=True))
        self.image_encoder = CLIPVision(CLIPVisionConfig(
            image_size=64, patch_size=8, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
            num_attention_heads=4, hidden_act="quick_gelu", projection_dim=WIDTH))
        self.text_projection = nn.Linear(96, WIDTH, bias=False)
        self.logit_scale = nn.Parameter(torch.full((2,), math.log(1 / 0.07)))
        self.facts = nn.ModuleList(nn.Linear(width, sum(FACTS)) for width in (96, 128, WIDTH))
        for module in self.modules():  # CLIP's small start: default embeddings of deviation 1 drown what follows
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)


def build(config):
    """New towers, and the vocabulary of the captions in `<out>/tokenizer` and `tokenizer_2`."""
    folder = Path(config.out)
    if training.first() and not (config.resume and (folder / "tokenizer_2" / "merges.txt").exists()):  # written last
        captions = [compose(config.seed, i).caption(random(config.seed, "vocabulary", i)) for i in range(CAPTIONS)]
        train_tokenizer(captions, folder / "tokenizer", config.vocabulary, END)
        train_tokenizer(captions, folder / "tokenizer_2", config.vocabulary, "!")
    training.wait()
    towers = Towers(Tokenizer(folder / "tokenizer").size)
    towers.tokenizers = [Tokenizer(folder / "tokenizer"), Tokenizer(folder / "tokenizer_2")]
    return towers


def setup(towers, config):
    return list(towers.parameters())


def sibling(seed, index):
    """Picture number `index`. Of each FAMILY the others are the first with one thing changed: strangers differ in their
    colours already, and a batch of them teaches hardly anything about shape, size and place."""
    picture, generator = compose(seed, index - index % FAMILY), random(seed, "sibling", index)
    if index % FAMILY == 0 or picture.kind == "panels":
        return picture
    for _ in range(8):
        change = edited(picture.scenes[0], EDITS[int(torch.randint(len(EDITS), (), generator=generator))], generator)
        if change and not any(map(is_held_out, change[0].objects)):
            return replace(picture, scenes=(change[0],))
    return picture


def data(towers, config):
    """Batches of (pictures [B,3,64,64], two id tensors [B,N]); pictures of other shapes are squashed to 64x64."""
    pictures = [sibling(config.seed, i) for i in tqdm(range(config.scenes), "scenes", leave=False, mininterval=2)]
    starts = tqdm(range(0, len(pictures), 64), "pictures", leave=False, mininterval=2)
    drawn = (x for start in starts for x in Picture.draw(pictures[start:start + 64]))
    images = torch.stack([(squash(x) * 127).round().to(torch.int8) for x in drawn])

    def batch(step, indices):
        families = [int(torch.randint(len(pictures) // FAMILY, (), generator=random(config.seed, "pick", i // FAMILY)))
                    for i in indices]
        rows = [FAMILY * family + i % FAMILY for family, i in zip(families, indices)]
        captions = [pictures[row].caption(random(config.seed, "caption", i)) for row, i in zip(rows, indices)]
        return {"image": images[rows] / 127, **tokens(towers, captions),
                "facts": torch.tensor([facts_of(caption) for caption in captions])}
    return batch


def facts_of(caption):
    """The number of each of FACTS' answers, 0 where a caption says nothing."""
    answers = []
    for text in [*caption.removeprefix("two panels: ").split(" | "), None][:2]:
        said = parse(text) if text else None
        things = [*(said.things if said else ()), *[Thing()] * 3][:3]
        near = {(i, j): word for i, word, j in (said.relations if said else ())}
        values = [getattr(thing, look) for thing in things for look in LOOKS]
        values += [near.get((0, 1)), near.get((0, 2)), *((said.floor, said.sky) if said else (None, None))]
        answers += [0 if value is None else 1 + list(names).index(value) for value, names in zip(values, PANEL)]
    return answers


def squash(image):
    return F.interpolate(image[None], size=(64, 64), mode="area")[0]


def tokens(towers, captions):
    """Ids of both tokenizers, cut to the longest caption: in a causal encoder padding changes nothing before it."""
    ids = [tokenizer(captions) for tokenizer in towers.tokenizers]
    longest = int((ids[0] == towers.tokenizers[0].end).int().argmax(1).max()) + 1
    return {"ids": ids[0][:, :longest], "ids_2": ids[1][:, :longest]}


def loss(towers, batch, config):
    """Contrast of pictures with both encoders' vectors, and the likelihood of the captions' facts in what SDXL reads
    of the encoders: the last layer but one of each, a mean over tokens as attention begins with, and the vector."""
    image = towers.image_encoder(batch["image"])[1].float()
    (states, text), (states_2, text_2) = towers.text_encoder(batch["ids"]), towers.text_encoder_2(batch["ids_2"])
    text, text_2 = towers.text_projection(text).float(), text_2.float()
    scale = towers.logit_scale.clamp(max=math.log(100))  # CLIP section 2.5: no larger than 100
    contrast = contrastive_loss(image, text, scale[0]) + contrastive_loss(image, text_2, scale[1])
    told = 0.0
    for head, x in zip(towers.facts, (states[-2].mean(1), states_2[-2].mean(1), text_2)):
        answers = head(F.layer_norm(x.float(), x.shape[-1:])).float().split(FACTS, dim=1)
        told = told + sum(F.cross_entropy(a, right) for a, right in zip(answers, batch["facts"].T))
    with torch.no_grad():
        right = [(F.normalize(image, dim=1) @ F.normalize(t, dim=1).T).argmax(1) for t in (text, text_2)]
        rows = torch.arange(len(image), device=image.device)
        numbers = {f"top1_{i}": (best == rows).float().mean() for i, best in enumerate(right)}
    return contrast + told, numbers | {"facts": told}


@torch.no_grad()
def sample(towers, config):
    """Eight pictures, each under the caption of the eight that the second encoder likes best for it."""
    pictures = [compose(config.seed, 10**6 + i) for i in range(8)]
    captions = [p.caption(random(config.seed, "sample", i)) for i, p in enumerate(pictures)]
    images = torch.stack([squash(x) for x in Picture.draw(pictures)]).to(towers.logit_scale.device)
    ids = tokens(towers, captions)["ids_2"].to(images.device)
    match = F.normalize(towers.image_encoder(images)[1], dim=1) @ F.normalize(towers.text_encoder_2(ids)[1], dim=1).T
    labels = [("" if row == best else "WRONG ") + captions[best] for row, best in enumerate(match.argmax(1).tolist())]
    return labelled_grid(to_pictures(images), labels, columns=4)


def export(towers, folder, config):
    """Write tokenizers, text encoders and the vision tower as a diffusers folder has them."""
    for name, tokenizer in zip(("tokenizer", "tokenizer_2"), towers.tokenizers):
        tokenizer.save(folder / name)
    for name in ("text_encoder", "text_encoder_2", "image_encoder"):
        save_part(getattr(towers, name), folder / name, torch.float16)
