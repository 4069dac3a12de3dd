"""Specialist Diffusion (CVPR 2023): an unseen style from fewer than ten pictures with captions.

From the paper and its code: the whole UNet is trained. Captions are put into templates, their words
are replaced by synonyms and whole captions by similar ones. Half of the pictures are changed by one
of eight operations, which the caption then names. Only the timesteps that the sampler visits are
trained. A content loss compares what the model draws of a caption with the picture of it, by CLIP.
A new word may stand for the style; it is trained together with the UNet.

The released content loss has no gradient (`released`), and the released retrieval never fires.
Inferred from the project's page (`grad`): the gradient of the content loss goes through one step of
the drawing, and the target is the picture or its text.

Our choices: pictures are changed after they were cut to their bucket; the content loss draws in
CONTENT_STEPS steps and compares projected vectors of CLIP; SDXL, too large to train whole, gets a
LoRA; a new word starts as the tokens of the style's name; no row of the vocabulary decays.

Measured (RESULTS.md; posters, three seeds, 100 steps of 8 pictures): style distance, and share of
captions drawn wholly right. Before .37, .47; Specialist .29, .57; plain fine-tuning .29, .62;
DreamBooth .31, .39; a LoRA .29, .40; textual inversion .41, .15. So it is ahead of the methods that
the paper compares with, and not of plain fine-tuning on captions; without changed pictures it has
.29, .64. With the paper's own settings (half of them changed, captions above a cosine of .65) .31,
.30: of such captions 7 % are true of the picture. Above .95 there were none for these eight.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import nn

from minipic.common import InputError, ParameterError, find_file, rng
from minipic.diffusion.samplers import SAMPLERS
from minipic.image import to_pictures, to_tensor
from minipic.latents import (
    LatentData, denoising_loss, encode_text, load_pipeline, lora_states, read_photos,
    sample_prompts)
from minipic.layers import lora
from minipic.pipeline import DrawSettings, Pipeline
from minipic.training.flags import option
from minipic.training.photos import Photo
from minipic.training.processes import is_main_process
from minipic.training.settings import DATA, LORA, LOSS, PhotoSettings
from minipic.weights import save_lora
from minipic.weights.embedding import save_embedding
from minipic.weights.files import read_header
from minipic.weights.image_encoder import load_image_encoder
from minipic.world.caption import caption
from minipic.world.choices import one_of
from minipic.world.scene import sample_scene

TEMPLATES = (
    "{item} in the style of {style}", "{item} in {style} style",
    "a picture of {item} in {style} style", "a rendering of {item} in {style} style",
    "a painting of {item} in {style} style")
OPERATIONS = {
    "inverted colors": ImageOps.invert,
    "posterize": lambda picture: ImageOps.posterize(picture, bits=2),
    "solarize": lambda picture: ImageOps.solarize(picture, threshold=100),
    "sharpness": lambda picture: ImageEnhance.Sharpness(picture).enhance(3),
    "autocontrast": ImageOps.autocontrast,
    "equalize": ImageOps.equalize,
    "horizontal flip": ImageOps.mirror,
    "vertical flip": ImageOps.flip,
}
SUFFIX = " with the {operation} transformation"
SYNONYMS_FILE = Path(__file__).with_name("synonyms.txt")
WORLD_CAPTIONS = 3000  # to choose similar ones from
CONTENT_STEPS = 20  # of a drawing
CONTENT_GUIDANCE = 7.5
BLOCK_LAYERS = r"(down|mid|up)_block.*"  # get a LoRA: a style is in the convolutions too


@dataclass
class Settings(PhotoSettings):
    """Teach a model a style (--style) from fewer than ten pictures with captions (--data)."""

    style: str = option("", 'the name of the style in prompts, such as "flat design"', group=DATA)
    word: str = option(
        "", "a new word that stands for the style and is trained too, such as <flat>", group=DATA)
    embedding: str = option("", "a textual inversion to start from, for the word", group=DATA)
    templates: bool = option(
        True, "put captions into five sentences that name the style; else into one", group=DATA)
    synonyms: bool = option(True, "replace words of captions by others", group=DATA)
    doubled: float = option(
        0.5, "share of the pictures that are changed in ways that captions then name; 0: none",
        group=DATA)
    retrieval: str = option(
        "", "draw similar captions from a text file with one in each line, or from those of the "
        "world: world", group=DATA)
    similar: float = option(
        0.65, "cosine above which a caption may stand for another; the paper's 0.65 fits CLIP-L, "
        "0.95 the tiny model", group=DATA)
    lora_rank: int = option(
        0, "train a LoRA of this rank and leave the model as it is; 0: train the UNet", group=LORA)
    lora: str = option("", "a LoRA to start from, such as DreamBooth's", group=LORA)
    sparse_steps: int = option(
        100, "train the timesteps of a drawing in so many steps alone; 0: all", group=LOSS)
    content: str = option(
        "off", "the content loss: without a gradient as released, or with it",
        ("off", "released", "grad"), group=LOSS)
    content_weight: float = option(0.1, "how much it counts; 0.001 in the paper", group=LOSS)
    content_target: str = option(
        "image", "what drawings should resemble: the picture, or its caption", ("image", "text"),
        group=LOSS)
    content_every: int = option(5, "steps from one content loss to the next", group=LOSS)
    image_encoder: str = option(
        "", "folder of CLIP's vision tower; MODEL/image_encoder if left out", group=LOSS)
    steps: int = option(400)
    batch: int = option(4)
    lr: float = option(1e-4, "peak learning rate; 1e-5 in the paper")
    lr_schedule: str = option("halved")
    warmup: int = option(0)
    ema: float = option(0.0)
    max_grad_norm: float = option(0.0)
    caption_dropout: float = option(0.0)

    MINIMUM = PhotoSettings.MINIMUM | {
        "lora_rank": 0, "doubled": 0, "sparse_steps": 0, "content_weight": 0, "content_every": 1}

    def __post_init__(self):
        super().__post_init__()
        if self.doubled > 1:
            raise ParameterError("doubled", f"must be at most 1, not {self.doubled}; try 0.5")
        if self.lora and not self.lora_rank:
            raise ParameterError(
                "lora_rank", "goes on from a LoRA with a LoRA; choose its rank, such as 16")

    @property
    def train_text(self) -> bool:
        """Whether captions are encoded with gradients: the word's vectors lie in the encoders."""
        return bool(self.word or self.embedding)


# The model ----------------------------------------------------------------------------------------

def build(config: Settings) -> Pipeline:
    """The pipeline with the new word and, for the content loss, `image_encoder`."""
    if not config.data:
        raise ParameterError("data", "name a folder of pictures of the style, with captions")
    if not config.style and not config.embedding:
        raise ParameterError("style", 'say what the style is called, such as "flat design"')
    pipeline = load_pipeline(config, frozen=config.lora_rank > 0)
    if config.lora:
        pipeline.add_lora(config.lora)
    if config.train_text:
        add_word(pipeline, config)
    if config.content != "off":
        add_image_encoder(pipeline, config)
    return pipeline


def add_word(pipeline: Pipeline, config: Settings):
    """The word of config.embedding, or a new one that starts as the tokens of the style's name."""
    if config.embedding:
        pipeline.add_embedding(config.embedding, config.word or None)
    else:
        vectors = pipeline.vectors_of(config.style)
        try:
            pipeline.add_word(config.word, vectors)
        except InputError as error:
            raise ParameterError("word", str(error)) from None
    for vectors in pipeline.word_vectors().values():
        vectors.data = vectors.data.float()  # what trains is in fp32


def add_image_encoder(pipeline: Pipeline, config: Settings):
    """The vision tower of the content loss. Its vectors and the text's must be of one CLIP."""
    folder = find_file(config.image_encoder or Path(config.model, "image_encoder"))
    pipeline.image_encoder = load_image_encoder(folder)
    text_config = list(pipeline.text_encoders.values())[-1].config
    width = pipeline.image_encoder.vision.config.projection_dim
    fits = text_config.with_projection and text_config.projection_dim == width
    if config.content_target == "text" and not fits:
        raise ParameterError(
            "content_target", f"{folder} does not belong to the model's last text encoder; choose "
            "image")


def setup(pipeline: Pipeline, config: Settings) -> list[nn.Parameter]:
    """The whole UNet or a LoRA of it, and the vectors of the word."""
    if config.lora_rank:
        params = lora.inject(pipeline.unet, config.lora_rank, match=BLOCK_LAYERS)
    else:
        params = list(pipeline.unet.parameters())
    if pipeline.words:
        params += pipeline.word_vectors().values()
    return params


# Captions and pictures ----------------------------------------------------------------------------

@dataclass(frozen=True)
class StylePhoto(Photo):
    """A photo to which one of OPERATIONS is done, or none."""

    operation: str = ""

    @staticmethod
    def draw(photos: list["StylePhoto"]) -> list[torch.Tensor]:
        images = []
        for photo, image in zip(photos, Photo.draw(photos)):
            if photo.operation:
                picture, = to_pictures(image[None])
                image = to_tensor(OPERATIONS[photo.operation](picture))
            images.append(image)
        return images


def doubled(photos: list[Photo], share: float) -> list[StylePhoto]:
    """Every photo as it is and with each operation; `share` of all draws, to a hundredth, have one.
    """
    share = Fraction(share).limit_denominator(100)
    as_it_is = len(OPERATIONS) * (share.denominator - share.numerator)
    pictures = []
    for photo in photos:
        plain = StylePhoto(photo.path, photo.text, photo.original, photo.size)
        pictures.append(replace(plain, repeats=as_it_is * photo.repeats))
        for operation in OPERATIONS:
            repeats = share.numerator * photo.repeats
            pictures.append(replace(plain, operation=operation, repeats=repeats))
    return pictures


def replace_words(text: str, generator: torch.Generator) -> str:
    """Replace each word that has k synonyms by one of them; it stays with probability 1/(k+1).

    Words are what blanks separate: "cat," and "Cat" are not "cat".
    """
    words = []
    for word in text.split():
        choices = [word, *synonyms().get(word, ())]
        words.append(one_of(choices, generator))
    return " ".join(words)


@functools.cache
def synonyms() -> dict[str, list[str]]:
    """{word: others that may stand for it}."""
    found = {}
    for line in SYNONYMS_FILE.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            word, others = line.split(": ")
            found[word] = others.split(", ")
    return found


@torch.no_grad()
def find_similar(
        pipeline: Pipeline, texts: list[str], candidates: list[str],
        least: float) -> dict[str, list[str]]:
    """{text: [itself, then all candidates whose vector has a cosine above `least`]}.

    The vectors are those of the first text encoder; in SD 1.x and SDXL it is the paper's, CLIP-L.
    """
    tokenizer, encoder = pipeline.tokenizers_and_encoders[0]
    everything = texts + candidates
    vectors = []
    for start in range(0, len(everything), 64):
        ids = tokenizer(everything[start:start + 64]).to(pipeline.device)
        _, pooled = encoder(ids, ids.new_tensor(tokenizer.end))
        vectors.append(F.normalize(pooled.float(), dim=1))
    vectors = torch.cat(vectors)
    cosines = vectors[:len(texts)] @ vectors[len(texts):].T
    similar = {}
    for text, row in zip(texts, cosines):
        similar[text] = [text]
        for i in (row > least).nonzero()[:, 0].tolist():
            similar[text].append(candidates[i])
    return similar


def read_candidates(config: Settings) -> list[str]:
    """The captions of config.retrieval: of a text file, or of the world."""
    if config.retrieval == "world":
        captions = []
        for i in range(WORLD_CAPTIONS):
            captions.append(caption(sample_scene(0, i), rng(0, "similar", i)))
        return captions
    try:
        text = find_file(config.retrieval).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise ParameterError(
            "retrieval", f"{config.retrieval}: cannot be read; name a text file in UTF-8 with a "
            "caption in each line, or say world") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def data(pipeline: Pipeline, config: Settings) -> "StyleData":
    photos = read_photos(pipeline, config, config.data)
    similar = {photo.text: [photo.text] for photo in photos}
    if config.retrieval:
        similar = find_similar(
            pipeline, list(similar), read_candidates(config), config.similar)
        if is_main_process():
            counts = [len(texts) - 1 for texts in similar.values()]
            print(f"similar captions: {min(counts)} to {max(counts)} for each picture")
    return StyleData(pipeline, photos, config, similar)


class StyleData(LatentData):
    """Batches of the style's pictures, some of them changed, with captions that always vary.

    similar: {caption of a photo: those that may stand for it}.
    A batch in which the content loss counts also has `content_image` [3,H,W], `content_caption`
    and `content_seed`.
    """

    def __init__(
            self, pipeline: Pipeline, photos: list[Photo], config: Settings,
            similar: dict[str, list[str]]):
        self.similar = similar
        self.style = next(iter(pipeline.words), config.style)  # the new word, if there is one
        self.timesteps = None
        if config.sparse_steps:
            grid = pipeline.schedule.grid(config.sparse_steps)
            self.timesteps = grid.timesteps.round().long().flip(0)  # low to high
        if config.doubled:
            photos = doubled(photos, config.doubled)
        super().__init__(pipeline, photos, config)

    def batch(self, step: int, indices: list[int]) -> dict:
        batch = super().batch(step, indices)
        if self.config.content != "off" and (step + 1) % self.config.content_every == 0:
            photo = self.pictures[batch["rows"][0]]
            generator = rng(self.config.seed, "content", indices[0])
            batch["content_image"], = Photo.draw([photo])  # never changed
            batch["content_caption"] = self.raw_caption(photo.text, generator)
            batch["content_seed"] = generator.initial_seed() // 2
        return batch

    def sample(self, members: list[int], index: int) -> dict:
        sample = super().sample(members, index)
        generator = rng(self.config.seed, "style", index)
        if sample["captions"]:
            sample["captions"] = self.caption(self.pictures[sample["rows"]], generator)
        if self.timesteps is not None:
            number = sample["t"] * len(self.timesteps) // self.schedule.num_train_timesteps
            sample["t"] = self.timesteps[number]
        return sample

    def raw_caption(self, text: str, generator: torch.Generator) -> str:
        """A caption that does not name the style."""
        return replace_words(text, generator) if self.config.synonyms else text

    def caption(self, photo: Photo, generator: torch.Generator) -> str:
        """What is trained on: retrieval, synonyms, template and suffix, in this order."""
        text = one_of(self.similar[photo.text], generator)
        item = self.raw_caption(text, generator)
        templates = TEMPLATES if self.config.templates else TEMPLATES[:1]
        text = one_of(templates, generator).format(item=item, style=self.style)
        operation = getattr(photo, "operation", "")
        return text + SUFFIX.format(operation=operation) if operation else text


# The loss -----------------------------------------------------------------------------------------

def content_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """1 - cosine of vectors [1,D] -> a scalar from 0 to 2."""
    return 1 - F.cosine_similarity(a, b, eps=1e-6).mean()


def draw_once(pipeline: Pipeline, settings: DrawSettings, step: int) -> torch.Tensor:
    """The picture [1,3,H,W] that step number `step` of a drawing predicts.

    Gradients, where they are enabled, go through this step alone, not through those before it.
    """
    with torch.no_grad():
        drawing = pipeline.prepare(settings)
        stage, = drawing.stages
        sigmas = stage.grid.sigmas
        sampler = SAMPLERS[drawing.settings.sampler]
        objective = pipeline.schedule.objective
        denoise = objective.denoiser(pipeline.guided_network(drawing, stage), stage.grid)
        x = drawing.x
        for x, _ in sampler(denoise, x, sigmas[:step + 1], drawing.noise):
            pass
    # Made again, for it holds keys and values of the text, which have no gradient above.
    denoise = objective.denoiser(pipeline.guided_network(drawing, stage), stage.grid)
    x0 = denoise(x, sigmas[step])
    return pipeline.vae.decode(pipeline.vae.unscale(x0).to(next(pipeline.vae.parameters())))


def content_loss(pipeline: Pipeline, batch: dict, config: Settings) -> torch.Tensor:
    """How far, for CLIP, a drawing of the caption without the style's name is from the target."""
    image = batch["content_image"][None]
    height, width = image.shape[2:]
    seed = batch["content_seed"]
    settings = DrawSettings(
        batch["content_caption"], steps=CONTENT_STEPS, guidance=CONTENT_GUIDANCE, seed=seed,
        size=(width, height))
    with torch.no_grad():
        if config.content_target == "text":
            _, target = encode_text(pipeline, [batch["content_caption"]])
        else:
            target = pipeline.image_encoder(image)
    if config.content == "released":
        with torch.no_grad():  # the finished picture, as if it came from a file
            drawn = draw_once(pipeline, settings, CONTENT_STEPS - 1)
    else:
        drawn = draw_once(pipeline, settings, seed % CONTENT_STEPS)
    return content_distance(pipeline.image_encoder(drawn), target.float())


def loss(pipeline: Pipeline, batch: dict, config: Settings) -> tuple[torch.Tensor, dict]:
    denoising = denoising_loss(pipeline, batch, config)
    if "content_image" not in batch:
        return denoising, {}
    content = content_loss(pipeline, batch, config)
    logged = {"denoising": denoising.detach(), "content": content.detach()}
    return denoising + config.content_weight * content, logged


def sample(pipeline: Pipeline, config: Settings, data: StyleData) -> Image.Image:
    """Two pictures for each of up to four captions, in the style."""
    items = list(data.similar)[:4]
    return sample_prompts(pipeline, [prompt_for(data.style, item) for item in items])


def export(pipeline: Pipeline, folder: Path, config: Settings, data: StyleData):
    """The whole model, a pipeline folder, or a LoRA; and the word's vectors."""
    if config.lora_rank:
        metadata = {"paper": "specialist", "style": data.style}
        states = lora_states(pipeline, torch.float16)
        save_lora(states, folder / "lora.safetensors", metadata)
    else:
        whole = Pipeline.load(config.model, lazy=True)  # its text encoders know no new word
        whole.on_disk.pop("unet")
        whole.unet = pipeline.unet
        whole.save(folder, torch.float16)
    if pipeline.words:
        vectors = pipeline.word_vectors()
        save_embedding(vectors, folder / "embedding.safetensors", data.style)


# Drawing ------------------------------------------------------------------------------------------

@dataclass
class DrawOptions:
    """Nothing besides what sample.py has."""


def load_adapter(pipeline: Pipeline, path: Path) -> str:
    """Add the LoRA of a file, and the word's vectors beside it. Returns the style's name."""
    _, metadata = read_header(path)
    style = metadata.get("style")
    if not style:
        raise InputError(
            f"{path}: its metadata does not name the style; it is damaged or was not made by "
            "train.py specialist")
    pipeline.add_lora(path)
    embedding = path.with_name("embedding.safetensors")
    if embedding.exists():
        pipeline.add_embedding(embedding, style)
    return style


def prompt_for(style: str, prompt: str, task: str | None = None) -> str:
    """The prompt with the style's name."""
    return TEMPLATES[0].format(item=prompt, style=style)


def plan(
        pipeline: Pipeline, style: str, settings: DrawSettings, sources: list[Image.Image],
        task: str | None = None, options: DrawOptions | None = None,
        ) -> tuple[DrawSettings, tuple[int, int]]:
    """Check what is asked for; everything but sources and tasks goes with a style."""
    if sources:
        raise ParameterError("source", "this adapter takes none; a picture to change is the image")
    if task is not None:
        raise ParameterError("task", f"this adapter was not trained for {task!r}; leave it out")
    settings, _ = pipeline.plan(settings)
    return settings, settings.size


def draw(
        pipeline: Pipeline, style: str, settings: DrawSettings, sources: list[Image.Image] = (),
        task: str | None = None, options: DrawOptions | None = None,
        on_step: Callable | None = None) -> list[Image.Image]:
    """Draw in the style -> a list of settings.n PIL pictures."""
    settings, _ = plan(pipeline, style, settings, sources, task, options)
    drawing = pipeline.prepare(replace(settings, prompt=prompt_for(style, settings.prompt)))
    for x, x0 in pipeline.denoise(drawing):
        if on_step is not None:
            on_step(x, x0)
    return pipeline.decode(x)
