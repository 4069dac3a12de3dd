"""Trains the tiny CLIP: two text encoders and a vision tower (arXiv 2103.00020 figure 3).

The first encoder is like CLIP-L (quick-gelu; its projection is only for training), the second like
OpenCLIP's bigG (gelu, with a projection), as in SDXL. Their tokenizers differ in the padding only,
as SDXL's do.

Contrast alone is content with colours: of what a UNet would read in these encoders, shapes and
places were 2% of the variance, and it never learned them. So linear heads must also read the facts
of the caption there, each as clearly.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tokenizers import pre_tokenizers, trainers
from tqdm import tqdm

from minipic.common import InputError, ParameterError, rng
from minipic.figures import image_grid
from minipic.image import to_pictures
from minipic.models.clip import (
    CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig, contrastive_loss)
from minipic.text import Tokenizer
from minipic.training.flags import option
from minipic.training.processes import is_main_process, wait_for_everyone
from minipic.training.settings import DATA, TrainSettings
from minipic.training.workers import in_order
from minipic.weights.files import write_json
from minipic.weights.layouts import save_part
from minipic.weights.tokenizer import END, START, WORD_END, byte_level_bpe, write_tokenizer
from minipic.world.caption import RELATIONS, Thing, parse
from minipic.world.edits import edited, put
from minipic.world.pictures import CHUNK, Picture, compose, compose_counted
from minipic.world.scene import COLORS, FLOORS, PATTERNS, PLACES, SHAPES, SIZES, SKIES, is_held_out

CAPTIONS = 2000  # whose words make the vocabulary
WIDTH = 128      # of the space where pictures and captions meet

# Questions about a caption: of up to three things in each of two panels, what they look like; how
# the first one stands to the second and to the third; floor and sky. Each has its possible answers.
ATTRIBUTES = {
    "color": COLORS, "color2": COLORS, "shape": SHAPES, "size": SIZES, "pattern": PATTERNS,
    "place": PLACES}
PANEL_QUESTIONS = 3 * list(ATTRIBUTES.values()) + [RELATIONS, RELATIONS, FLOORS, SKIES]
ANSWERS = [len(answers) + 1 for answers in 2 * PANEL_QUESTIONS]  # how many; number 0: "not said"

# Pictures come in families that are alike but for one edit.
FAMILY = 4
EDITS = ("recolour", "move", "resize", "reshape")


@dataclass
class Settings(TrainSettings):
    """Train both text encoders and the vision tower to match pictures with their captions."""

    scenes: int = option(10000, "different pictures, drawn before training starts", group=DATA)
    counts: float = option(
        0.0, "share of the pictures that show two or three alike things, whose captions count "
        "them: two red cubes", group=DATA)
    vocabulary: int = option(
        1024, "tokens at most; the words of captions need about 700", group=DATA)
    steps: int = option(2500)
    batch: int = option(64)
    weight_decay: float = option(0.1)

    MINIMUM = TrainSettings.MINIMUM | {"scenes": FAMILY, "counts": 0}

    def __post_init__(self):
        super().__post_init__()
        if self.counts >= 1:
            raise ParameterError("counts", f"must be below 1, not {self.counts}; try 0.15")


class Towers(nn.Module):
    """The three towers and their tokenizers.

    Only training needs the text projection, the two temperatures and the heads of the facts.
    """

    def __init__(self, tokenizers: list[Tokenizer]):
        super().__init__()
        self.tokenizers = tokenizers
        self.text_encoder = CLIPText(CLIPTextConfig(
            vocab_size=tokenizers[0].size, hidden_size=96, intermediate_size=384,
            num_hidden_layers=4, num_attention_heads=3, hidden_act="quick_gelu",
            projection_dim=96))
        self.text_encoder_2 = CLIPText(CLIPTextConfig(
            vocab_size=tokenizers[0].size, hidden_size=128, intermediate_size=512,
            num_hidden_layers=5, num_attention_heads=4, hidden_act="gelu",
            projection_dim=WIDTH, with_projection=True))
        self.image_encoder = CLIPVision(CLIPVisionConfig(
            image_size=64, patch_size=8, hidden_size=128, intermediate_size=512,
            num_hidden_layers=4, num_attention_heads=4, hidden_act="quick_gelu",
            projection_dim=WIDTH))
        self.text_projection = nn.Linear(96, WIDTH, bias=False)
        self.logit_scale = nn.Parameter(torch.full((2,), math.log(1 / 0.07)))
        self.facts = nn.ModuleList(nn.Linear(width, sum(ANSWERS)) for width in (96, 128, WIDTH))
        for module in self.modules():
            if isinstance(module, nn.Embedding):  # by default of deviation 1, they drown the rest
                nn.init.normal_(module.weight, std=0.02)


def build(config: Settings) -> Towers:
    """New towers, and the vocabulary of the captions in OUT/tokenizer and OUT/tokenizer_2."""
    first = Path(config.out, "tokenizer")
    second = Path(config.out, "tokenizer_2")
    is_complete = (second / "merges.txt").exists()  # the file that is written last
    if is_main_process() and not (config.resume and is_complete):
        captions = []
        for i in range(CAPTIONS):
            captions.append(compose(config.seed, i).caption(rng(config.seed, "vocabulary", i)))
        for i in range(round(config.counts * CAPTIONS)):
            picture = compose_counted(config.seed, i)
            captions.append(picture.caption(rng(config.seed, "counted vocabulary", i)))
        train_tokenizer(captions, first, config.vocabulary, END)
        train_tokenizer(captions, second, config.vocabulary, "!")
    wait_for_everyone()
    return Towers([Tokenizer(first), Tokenizer(second)])


def setup(towers: Towers, config: Settings) -> list[nn.Parameter]:
    return list(towers.parameters())


def family_picture(seed: int, index: int) -> Picture:
    """Picture number `index`. A family is its first picture and copies with one thing changed.

    Strangers differ in their colours already, and a batch of them teaches hardly anything about
    shape, size and place.
    """
    first = compose(seed, index - index % FAMILY)
    if index % FAMILY == 0 or first.kind == "panels":
        return first
    generator = rng(seed, "sibling", index)
    for _ in range(8):
        edit = EDITS[int(torch.randint(len(EDITS), (), generator=generator))]
        result = edited(first.scenes[0], edit, generator)
        if result is None:
            continue
        scene, _ = result
        if not any(is_held_out(thing) for thing in scene.objects):
            return replace(first, scenes=(scene,))
    return first


def counted_picture(seed: int, index: int) -> Picture:
    """Picture number `index` of other families, in which captions count alike things.

    A family is a picture of three things, and the same without each of them: "three red cubes" and
    "two red cubes" differ in the number alone.
    """
    first = compose_counted(seed, index - index % FAMILY, objects=3)
    if index % FAMILY == 0 or first.kind == "panels":
        return first
    scene = put(first.scenes[0], index % FAMILY - 1, None)
    return replace(first, scenes=(scene,))


def training_picture(seed: int, counted: int, number: int) -> Picture:
    """Picture `number` of those of a run: so many counted ones come first."""
    if number < counted:
        return counted_picture(seed, number)
    return family_picture(seed, number - counted)


def train_tokenizer(
        captions: list[str], folder: str | Path, vocab_size: int, pad: str = END) -> Tokenizer:
    """Learn a vocabulary of at most `vocab_size` tokens from captions and write it to a folder.

    Its order is CLIP's: 256 bytes ("!" is the first), the same bytes ending a word, the merges,
    START, END. The vocabulary is smaller than `vocab_size` where the captions hold no more pairs.
    pad: END, or "!" as in SDXL's second tokenizer. transformers' CLIPTokenizer reads the folder as
    well.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet += [byte + WORD_END for byte in alphabet]
    smallest = len(alphabet) + 2
    if vocab_size < smallest:
        raise InputError(
            f"vocab_size={vocab_size}: a byte-level vocabulary has at least {smallest} tokens")

    merges = learn_merges(captions, vocab_size)[:vocab_size - smallest]
    tokens = alphabet + [first + second for first, second in merges] + [START, END]
    vocab = {}
    for token in tokens:
        if token not in vocab:  # two pairs may make one token
            vocab[token] = len(vocab)
    write_tokenizer(Path(folder), vocab, merges, pad)
    return Tokenizer(folder)


def learn_merges(captions: list[str], vocab_size: int) -> list[list[str]]:
    """The pairs of tokens that BPE merges, the first learned first, for at most `vocab_size`."""
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, end_of_word_suffix=WORD_END, show_progress=False,
        min_frequency=2)  # a pair that occurs once teaches nothing
    bpe = byte_level_bpe({}, [])
    bpe.train_from_iterator(captions, trainer)
    return json.loads(bpe.to_str())["model"]["merges"]


class CaptionData:
    """Batches of pictures [B,3,64,64], their captions' ids by both tokenizers and their facts."""

    def __init__(self, towers: Towers, config: Settings):
        self.config = config
        self.tokenizers = towers.tokenizers
        families = config.scenes // FAMILY
        counted = FAMILY * min(round(config.counts * families), families - 1)
        numbers = range(config.scenes)
        make = partial(training_picture, config.seed, counted)
        pictures = in_order(make, numbers, config.workers)
        self.pictures = list(tqdm(
            pictures, "scenes", total=len(numbers), leave=False, mininterval=2))
        starts = range(0, config.scenes, CHUNK)
        images = in_order(self.draw, starts, config.workers)
        self.images = torch.cat(list(tqdm(
            images, "pictures", total=len(starts), leave=False, mininterval=2)))

    def draw(self, start: int) -> torch.Tensor:
        """CHUNK pictures from number `start` on, int8 [n,3,64,64] from -127 to 127."""
        images = []
        for image in Picture.draw(self.pictures[start:start + CHUNK]):
            images.append((squash(image) * 127).round().to(torch.int8))
        return torch.stack(images)

    def batch(self, step: int, indices: list[int]) -> dict:
        rows = []
        captions = []
        for index in indices:
            generator = rng(self.config.seed, "pick", index // FAMILY)  # one for the whole family
            family = int(torch.randint(len(self.pictures) // FAMILY, (), generator=generator))
            row = FAMILY * family + index % FAMILY
            rows.append(row)
            captions.append(self.pictures[row].caption(rng(self.config.seed, "caption", index)))
        facts = torch.tensor([facts_of(caption) for caption in captions])
        ids = tokenize(self.tokenizers, captions)
        return {"image": self.images[rows] / 127, **ids, "facts": facts}


def data(towers: Towers, config: Settings) -> CaptionData:
    return CaptionData(towers, config)


def facts_of(caption: str) -> list[int]:
    """The number of the answer to each question about a caption, 0 where it says nothing."""
    panels = caption.removeprefix("two panels: ").split(" | ")
    answers = []
    for panel in range(2):
        things = []
        relations = {}
        floor = sky = None
        if panel < len(panels):
            description = parse(panels[panel])
            things = list(description.things)
            relations = {(i, j): word for i, word, j in description.relations}
            floor = description.floor
            sky = description.sky
        things = (things + 3 * [Thing()])[:3]
        values = []
        for thing in things:
            values += [getattr(thing, name) for name in ATTRIBUTES]
        values += [relations.get((0, 1)), relations.get((0, 2)), floor, sky]
        for value, choices in zip(values, PANEL_QUESTIONS):
            answers.append(0 if value is None else 1 + list(choices).index(value))
    return answers


def squash(image: torch.Tensor) -> torch.Tensor:
    """A picture [3,H,W] of any shape -> [3,64,64]."""
    return F.interpolate(image[None], size=(64, 64), mode="area")[0]


def tokenize(tokenizers: list[Tokenizer], captions: list[str]) -> dict:
    """Ids of both tokenizers, cut to the longest caption.

    In a causal encoder padding changes nothing before it.
    """
    first, second = tokenizers
    ids = first(captions)
    length = int((ids == first.end).int().argmax(1).max()) + 1
    return {"ids": ids[:, :length], "ids_2": second(captions)[:, :length]}


def loss(towers: Towers, batch: dict, config: Settings) -> tuple[torch.Tensor, dict]:
    """Contrast of pictures with both encoders' vectors, and the likelihood of the captions' facts.

    The facts are read in what SDXL reads of the encoders: the last layer but one of each, as a mean
    over the tokens, which is what attention begins with, and the pooled vector.
    """
    image = towers.image_encoder(batch["image"])[1].float()
    states, pooled = towers.text_encoder(batch["ids"])
    states_2, pooled_2 = towers.text_encoder_2(batch["ids_2"])
    text = towers.text_projection(pooled).float()
    text_2 = pooled_2.float()

    scale = towers.logit_scale.clamp(max=math.log(100))  # CLIP section 2.5: no larger than 100
    contrast = contrastive_loss(image, text, scale[0]) + contrastive_loss(image, text_2, scale[1])

    facts_loss = 0.0
    for head, x in zip(towers.facts, (states[-2].mean(1), states_2[-2].mean(1), text_2)):
        logits = head(F.layer_norm(x.float(), x.shape[-1:])).float()
        answers = logits.split(ANSWERS, dim=1)
        losses = [F.cross_entropy(*pair) for pair in zip(answers, batch["facts"].T)]
        facts_loss = facts_loss + sum(losses)

    logged = {}
    with torch.no_grad():
        rows = torch.arange(len(image), device=image.device)
        for i, vectors in enumerate((text, text_2)):
            best = similarity(image, vectors).argmax(1)
            logged[f"top1_{i}"] = (best == rows).float().mean()
    return contrast + facts_loss, logged | {"facts": facts_loss}


def similarity(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Cosines of vectors [B,D] and [B,D] -> [B,B]."""
    return F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T


@torch.no_grad()
def sample(towers: Towers, config: Settings, data: CaptionData) -> Image.Image:
    """Eight pictures, each under the caption of the eight that the second encoder prefers."""
    pictures = [compose(config.seed, 10**6 + i) for i in range(8)]
    captions = []
    for i, picture in enumerate(pictures):
        captions.append(picture.caption(rng(config.seed, "sample", i)))
    images = torch.stack([squash(image) for image in Picture.draw(pictures)])
    images = images.to(towers.logit_scale.device)
    ids = tokenize(towers.tokenizers, captions)["ids_2"].to(images.device)
    match = similarity(towers.image_encoder(images)[1], towers.text_encoder_2(ids)[1])
    labels = []
    for row, best in enumerate(match.argmax(1).tolist()):
        labels.append(captions[best] if row == best else f"WRONG {captions[best]}")
    return image_grid(to_pictures(images), labels, columns=4)


def export(towers: Towers, folder: Path, config: Settings, data: CaptionData):
    """Write tokenizers, text encoders and the vision tower as a diffusers folder has them."""
    for name, tokenizer in zip(("tokenizer", "tokenizer_2"), towers.tokenizers):
        tokenizer.save(folder / name)
    for name in ("text_encoder", "text_encoder_2", "image_encoder"):
        save_part(getattr(towers, name), folder / name, torch.float16)
    # Pictures in [0,1] become what `squash` was given; official CLIPs have other numbers.
    normalisation = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    write_json(normalisation, folder / "image_encoder" / "preprocessor_config.json")
