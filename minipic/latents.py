"""Pictures and captions -> batches of latents, and the denoising loss on them.

Recipes and papers share it, and what the recipes of text-to-image have in common: a whole UNet or a
LoRA. A training picture is a world.pictures.Picture or PairPicture, or a training.photos.Photo.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from minipic.common import ParameterError, computes_bf16, rng
from minipic.figures import image_grid
from minipic.image import to_pictures
from minipic.layers import lora
from minipic.models.vae import VAE
from minipic.pipeline import Pipeline
from minipic.text import encode_prompts
from minipic.training.photos import Photo, read_folder
from minipic.training.processes import say
from minipic.training.settings import (
    DenoisingSettings, LoraSettings, PairSettings, PhotoSettings)
from minipic.training.workers import in_order
from minipic.weights import save_lora
from minipic.world.pictures import (
    CHUNK, PairPicture, Picture, compose, compose_counted, task_pairs)

SMALLEST_MULTIPLE = 16  # of the sides of training pictures
CACHE_BYTES = 1 << 29   # of encoded captions

TrainingPicture = Picture | PairPicture | Photo


def load_pipeline(config: DenoisingSettings, frozen: bool = False, allow: str = "") -> Pipeline:
    """The pipeline of config.model. What trains is in fp32, a frozen model in config.precision.

    allow: the `extra_input` of UNets that the recipe can train besides ordinary ones.
    """
    dtype = torch.bfloat16 if frozen and config.precision == "bf16" else torch.float32
    pipeline = Pipeline.load(config.model, dtype, cast=frozen)
    if pipeline.is_sdxl and pipeline.text_encoder is None:
        raise ParameterError(
            "model", f"{config.model} is a refiner, which no recipe trains; give an ordinary model")
    if pipeline.extra_input not in ("", allow):
        channels = pipeline.unet.config.in_channels
        raise ParameterError(
            "model", f"{config.model}: its UNet takes {channels} channels, which this recipe "
            "cannot train; give an ordinary model")
    return pipeline


# Pictures -----------------------------------------------------------------------------------------

def read_photos(pipeline: Pipeline, config: PhotoSettings, folder: str) -> list[Photo]:
    """The pictures of a folder, in buckets around config.resolution that the UNet can halve."""
    halvings = len(pipeline.unet.config.block_out_channels) - 1
    multiple = max(pipeline.vae.config.factor * 2**halvings, SMALLEST_MULTIPLE)
    resolution = config.resolution or pipeline.size[0]
    skip_bad = config.bad_images == "skip"
    return read_folder(folder, resolution, multiple, skip_bad, config.caption, say)


def world_pictures(
        config: DenoisingSettings, count: int, counted: bool = False) -> list[Picture]:
    """Pictures 0 to count - 1 of the world, or of those whose captions count alike things."""
    make = compose_counted if counted else compose
    return list(in_order(partial(make, config.seed), range(count), config.workers))


def picture_size(pipeline: Pipeline, config: DenoisingSettings) -> tuple[int, int]:
    """(height, width) of the world's pictures to train on."""
    width, height = pipeline.size
    return config.resolution or height, config.resolution or width


def world_pairs(
        task: str, pipeline: Pipeline, config: PairSettings, first: int, count: int,
        **options: int) -> list[PairPicture]:
    """Pairs first to first + count - 1 of a task, as PairPictures of config.resolution.

    options: of the task.
    """
    size = picture_size(pipeline, config)

    def make(start: int) -> list[PairPicture]:
        end = min(start + CHUNK, first + count)
        return task_pairs(task, config.seed, range(start, end), size, **options)

    pairs = []
    for some in in_order(make, range(first, first + count, CHUNK), config.workers):
        pairs += some
    return pairs


def picture_of(picture: TrainingPicture) -> Image.Image:
    """One training picture, as it is trained on."""
    image, = picture.draw([picture])
    return to_pictures(image[None])[0]


# Latents and text ---------------------------------------------------------------------------------

@torch.no_grad()
def encode_pictures(
        vae: VAE, pictures: list[TrainingPicture], workers: int | None = 0) -> list[torch.Tensor]:
    """Scaled latents of all pictures: a list of [2,4,h,w], mean and deviation, in 16 bits.

    workers: processes that draw the pictures.
    """
    at_once = pictures[0].encoded_at_once
    latents = [None] * len(pictures)
    by_size = sorted(range(len(pictures)), key=lambda i: pictures[i].size)

    def draw(start: int) -> list[tuple[list[int], torch.Tensor]]:
        rows_of_size = {}
        for i in by_size[start:start + at_once]:
            rows_of_size.setdefault(pictures[i].size, []).append(i)
        drawn = []
        for rows in rows_of_size.values():
            images = pictures[0].draw([pictures[i] for i in rows])
            drawn.append((rows, torch.stack(images)))
        return drawn

    starts = range(0, len(by_size), at_once)
    for drawn in tqdm(
            in_order(draw, starts, workers), "latents", total=len(starts),
            disable=len(pictures) == 1, leave=False, mininterval=2):
        for rows, images in drawn:
            for i, row in zip(rows, scaled_moments(vae, images)):
                latents[i] = row
    return latents


def scaled_moments(vae: VAE, images: torch.Tensor) -> torch.Tensor:
    """Pictures [B,3,H,W] -> [B,2,4,h,w], mean and deviation of scaled latents, in 16 bits."""
    images = images.to(next(vae.parameters()))
    device = images.device
    with torch.autocast(device.type, torch.bfloat16, enabled=computes_bf16(device)):
        mean, logvar = vae.encode(images)
    std = vae.config.scaling_factor * (0.5 * logvar.float()).exp()
    return torch.stack([vae.scale(mean.float()), std], dim=1).half().cpu()


def encode_text(
        pipeline: Pipeline, captions: list[str | None],
        train_text: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    """B captions -> context [B,N,D] and pooled [B,D]. None is no caption, as in drawing."""
    with torch.set_grad_enabled(train_text):
        texts = [caption or "" for caption in captions]
        context, pooled = encode_prompts(texts, pipeline.tokenizers_and_encoders, pipeline.is_sdxl)
        if pipeline.zeros_for_empty_prompt:
            is_given = [caption is not None for caption in captions]
            is_given = torch.tensor(is_given)[:, None].to(context.device, non_blocking=True)
            context = context.where(is_given[:, :, None], 0)
            pooled = pooled.where(is_given, 0)
    return context, pooled


@torch.no_grad()
def encode_captions(pipeline: Pipeline, photos: list[Photo]) -> dict:
    """{caption: (context [N,D], pooled [D])} of all photos, of the empty caption and of none."""
    captions = [None, ""] + [photo.text for photo in photos]
    encoded = {}
    for caption in tqdm(dict.fromkeys(captions), "texts", leave=False, mininterval=2):
        context, pooled = encode_text(pipeline, [caption])
        encoded[caption] = context[0].cpu(), None if pooled is None else pooled[0].cpu()
    return encoded


class CaptionCache:
    """Captions encoded by frozen text encoders, each once: the first ones up to CACHE_BYTES.

    A text must not depend on what is in the cache, and the order in which numbers are added up
    depends on how many texts are encoded together. So it is always the same number of them, if all
    batches have the same size, as those of a run do.
    """

    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline
        self.encoded = {}  # {caption: (context [N,D], pooled [D])}

    def __call__(self, captions: list[str | None]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `encode_text` gives for B captions."""
        on_gpu = self.pipeline.device.type == "cuda"
        at_once = min(len(captions), 64 if on_gpu else 16)
        rows = {}
        for caption in captions:
            rows[caption] = self.encoded.get(caption)
        missing = [caption for caption, row in rows.items() if row is None]
        for start in range(0, len(missing), at_once):
            some = missing[start:start + at_once]
            fill = [None] * (at_once - len(some))
            context, pooled = encode_text(self.pipeline, some + fill)
            for i, caption in enumerate(some):
                rows[caption] = context[i], None if pooled is None else pooled[i]
                self.keep(caption, *rows[caption])
        encoded = [rows[caption] for caption in captions]
        context = torch.stack([context for context, _ in encoded])
        pooled = None
        if encoded[0][1] is not None:
            pooled = torch.stack([pooled for _, pooled in encoded])
        return context, pooled

    def keep(self, caption: str | None, context: torch.Tensor, pooled: torch.Tensor | None):
        """Keep an encoded caption, if there is room."""
        if (len(self.encoded) + 1) * context.nbytes <= CACHE_BYTES:
            self.encoded[caption] = context.clone(), None if pooled is None else pooled.clone()


class LatentData:
    """Batches of latents, made of pictures once, before training.

    A bucket is all pictures of one size (H, W). Each batch is of one bucket, because only latents
    of one size can be stacked. A bucket is chosen as often as it has pictures, of which each counts
    `repeats` times.
    texts: what `encode_captions` made of all captions; without it `finish` encodes them.
    """

    def __init__(
            self, pipeline: Pipeline, pictures: list[TrainingPicture],
            config: DenoisingSettings, texts: dict | None = None):
        self.config = config
        self.pictures = pictures
        self.texts = texts
        self.schedule = pipeline.schedule
        self.captions = CaptionCache(pipeline)
        self.latents = encode_pictures(pipeline.vae, pictures, config.workers)
        self.buckets = {}  # {what `bucket` calls it: the numbers of its pictures}
        for i, picture in enumerate(pictures):
            self.buckets.setdefault(self.bucket(i), []).extend([i] * picture.repeats)

    def bucket(self, i: int) -> tuple:
        """What picture number i shares with all others of its bucket: its size (H, W)."""
        return self.pictures[i].size

    def batch(self, step: int, indices: list[int]) -> dict:
        """x0 and noise [B,4,h,w], t [B], size_ids [B,6], captions (None: left out).

        rows: which of the pictures. With `texts` also context [B,N,D] and pooled [B,D].
        """
        buckets = list(self.buckets.values())
        counts = torch.tensor([len(members) for members in buckets], dtype=torch.float32)
        chosen = int(torch.multinomial(counts, 1, generator=rng(self.config.seed, "bucket", step)))
        batch = {}
        for index in indices:
            for key, value in self.sample(buckets[chosen], index).items():
                batch.setdefault(key, []).append(value)
        for key, values in batch.items():
            if torch.is_tensor(values[0]):
                batch[key] = torch.stack(values)
        return batch

    def finish(self, batch: dict):
        """Add context [B,N,D] and pooled [B,D], unless they are there or have to be trained."""
        if "context" not in batch and not self.config.train_text:
            batch["context"], batch["pooled"] = self.captions(batch["captions"])

    def sample(self, members: list[int], index: int) -> dict:
        """Training sample number `index`, from one of these pictures."""
        generator = rng(self.config.seed, "sample", index)
        row = members[int(torch.randint(len(members), (), generator=generator))]
        picture = self.pictures[row]
        mean, std = self.latents[row].float()

        # Guidance needs predictions without a caption. With a negative prompt they have an encoded
        # text, as "" has. Without one, None, SDXL base has zeros, and other models have "" too.
        u = torch.rand((), generator=generator).item()
        if u < self.config.caption_dropout / 2:
            caption = None
        elif u < self.config.caption_dropout:
            caption = ""
        else:
            caption = picture.caption(generator)

        sample = {}
        if self.texts:
            context, pooled = self.texts[caption]
            sample["context"] = context
            if pooled is not None:
                sample["pooled"] = pooled
        sample["x0"] = mean + std * torch.randn(mean.shape, generator=generator)
        sample["noise"] = torch.randn(mean.shape, generator=generator)
        sample["t"] = self.schedule.draw_timestep(generator, self.config.logit_normal)
        sample["size_ids"] = picture.size_ids
        sample["captions"] = caption
        sample["rows"] = row
        return sample

    def lacks_source(self, index: int, row: int, caption: str | None) -> bool:
        """Whether training sample number `index` goes without the picture that is given with it.

        InstructPix2Pix's guidance needs predictions without the picture and without the caption. Of
        all samples, a share of caption_dropout / 2 lacks the picture alone, as many the caption
        alone, as many both.
        """
        dropout = self.config.caption_dropout
        has_caption = caption == self.pictures[row].text
        if has_caption:  # they are 1 - dropout of all samples
            without_picture = dropout / 2 / (1 - dropout)
        else:
            without_picture = 0.5
        # The word in the key is an old one: another would change what every seed trains.
        u = torch.rand((), generator=rng(self.config.seed, "told", index))
        return bool(u < without_picture)


class SourceData(LatentData):
    """Latents with source [B,4,h,w]: the given picture, unscaled, or zeros where it is left out.

    sources: the given picture of each of `pictures`, in the same order.
    """

    def __init__(
            self, pipeline: Pipeline, pictures: list[TrainingPicture],
            sources: list[TrainingPicture], config: DenoisingSettings):
        self.vae = pipeline.vae
        self.sources = encode_pictures(pipeline.vae, sources, config.workers)
        super().__init__(pipeline, pictures, config)

    def batch(self, step: int, indices: list[int]) -> dict:
        batch = super().batch(step, indices)
        sources = []
        for index, row, caption in zip(indices, batch["rows"], batch["captions"]):
            sources.append(self.source(index, row, caption))
        batch["source"] = torch.stack(sources)
        return batch

    def source(self, index: int, row: int, caption: str | None) -> torch.Tensor:
        """The latent of the given picture, or zeros."""
        mean = self.sources[row][0].float()
        if self.lacks_source(index, row, caption):
            return torch.zeros_like(mean)
        return self.vae.unscale(mean)


# The loss -----------------------------------------------------------------------------------------

def denoising_loss(
        pipeline: Pipeline, batch: dict, config: DenoisingSettings,
        network: Callable | None = None, where: torch.Tensor | None = None) -> torch.Tensor:
    """The objective's loss of a batch, a scalar (DDPM, arXiv 2006.11239 eq. 14, and successors).

    network: what predicts instead of the UNet; called as in drawing,
        network(x, t, context, pooled, size_ids, residuals). Here the residuals are None.
    where: the part of x0 that counts; None is all.
    """
    network = network or pipeline.unet
    if "context" in batch:
        context = batch["context"]
        pooled = batch.get("pooled")
    else:
        context, pooled = encode_text(pipeline, batch["captions"], config.train_text)

    def predict(x, t):
        return network(x, t, context, pooled, batch["size_ids"], None)

    timesteps = batch["t"].cpu()  # train.py has left them there
    loss = pipeline.schedule.objective.loss(
        predict, batch["x0"], batch["noise"], timesteps, config.min_snr or None,
        config.balanced, where)
    return loss.mean()


# A whole model or a LoRA --------------------------------------------------------------------------

def photo_latents(pipeline: Pipeline, config: LoraSettings) -> LatentData:
    """The latents of the pictures of config.data, and their captions, encoded once if possible."""
    photos = read_photos(pipeline, config, config.data)
    texts = None if config.train_text else encode_captions(pipeline, photos)
    return LatentData(pipeline, photos, config, texts)


def choose_trained(pipeline: Pipeline, config: LoraSettings) -> list[nn.Parameter]:
    """Replace layers by LoRA layers, if config.lora_rank is not 0. Returns the weights to train.

    Raises ParameterError for kohya's names with another model than SDXL.
    """
    if config.lora_format == "kohya" and not pipeline.is_sdxl:
        raise ParameterError(
            "lora_format", "kohya's names are for SDXL's LoRAs only; leave it out for this model")
    trained = [pipeline.unet]
    if config.train_text:
        trained += text_layers_in_use(pipeline)
    params = []
    if config.lora_rank:
        for part in trained:
            params += lora.inject(part, config.lora_rank, config.lora_alpha or None)
        return params
    if config.train_text:
        *others, _ = pipeline.text_encoders.values()
        trained += [encoder.text_model.embeddings for encoder in others]
    for part in trained:
        params += part.parameters()
    return params


def text_layers_in_use(pipeline: Pipeline) -> list[nn.Module]:
    """The layers of the text encoders whose output the UNet sees.

    Of all encoders but the last one that is the last layer but one; the last one's end also makes
    the pooled vector.
    """
    *others, last = pipeline.text_encoders.values()
    return [encoder.text_model.encoder.layers[:-1] for encoder in others] + [last]


def export_trained(
        pipeline: Pipeline, folder: Path, config: LoraSettings, data: LatentData | None = None):
    """The finished model, a pipeline folder; or the LoRA alone, folder/lora.safetensors."""
    if not config.lora_rank:
        pipeline.save(folder, torch.float16)
        return
    metadata = {"trained on": Path(config.model).name, "steps": str(config.steps)}
    save_lora(
        lora_states(pipeline), folder / "lora.safetensors", metadata,
        kohya=config.lora_format == "kohya")


def lora_states(
        pipeline: Pipeline, dtype: torch.dtype | None = None) -> dict[str, dict[str, torch.Tensor]]:
    """{part: its LoRAs as one}, as `save_lora` takes them, of the parts that have any.

    dtype: of the tensors; None: as they are.
    """
    states = {}
    for part, network in {"unet": pipeline.unet, **pipeline.text_encoders}.items():
        state = lora.lora_state_dict(network)
        if state:
            states[part] = {name: tensor.to(dtype) for name, tensor in state.items()}
    return states


def sample_captions(pipeline: Pipeline, config: PhotoSettings, data: LatentData) -> Image.Image:
    """Two pictures for each of up to four captions of the photos."""
    captions = dict.fromkeys(photo.text for photo in data.pictures)
    return sample_prompts(pipeline, list(captions)[:4])


def sample_prompts(pipeline: Pipeline, prompts: list[str]) -> Image.Image:
    """Two pictures for each prompt."""
    pictures = []
    labels = []
    for prompt in prompts:
        pictures += pipeline.generate(prompt, steps=20, n=2, progress=False)
        labels += [prompt, prompt]
    return image_grid(pictures, labels, columns=4)
