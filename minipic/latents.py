"""Pictures and captions -> batches of latents, and the denoising loss on them.

Recipes and papers share it. A training picture is a world.pictures.Picture or PairPicture, or a
training.photos.Photo. They have in common: `size` (H, W), `size_ids` [6], `caption(generator)`, and
`draw(pictures)`, which draws many at once.
"""

from collections.abc import Callable

import torch
from tqdm import tqdm

from minipic.common import ParameterError, computes_bf16, rng
from minipic.pipeline import Pipeline
from minipic.text import encode_prompts
from minipic.training.photos import Photo, read_folder
from minipic.training.processes import is_main_process
from minipic.training.settings import DenoisingSettings, PairSettings, PhotoSettings
from minipic.world.pictures import compose, task_pairs

SMALLEST_MULTIPLE = 16  # of the sides of training pictures


def load_pipeline(config: DenoisingSettings, frozen: bool = False, allow: str = "") -> Pipeline:
    """The pipeline of --model. What is trained is in fp32, a frozen model in config.precision.

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

def training_pictures(pipeline: Pipeline, config: PhotoSettings) -> list:
    """The pictures to train on: those of --data, or config.scenes of the world."""
    if config.data:
        return read_photos(pipeline, config, config.data)
    return [compose(config.seed, i) for i in range(config.scenes)]


def read_photos(pipeline: Pipeline, config: PhotoSettings, folder: str) -> list[Photo]:
    """The pictures of a folder, in buckets around --resolution that the UNet can halve."""
    halvings = len(pipeline.unet.config.block_out_channels) - 1
    multiple = max(pipeline.vae.config.factor * 2**halvings, SMALLEST_MULTIPLE)
    resolution = config.resolution or pipeline.size[0]
    report = print if is_main_process() else do_not_print
    skip_bad = config.bad_images == "skip"
    return read_folder(folder, resolution, multiple, skip_bad, config.caption, report)


def do_not_print(line: str):
    """Only the first of several processes prints."""


def world_pairs(
        task: str, pipeline: Pipeline, config: PairSettings, first: int, count: int) -> list:
    """Pairs first to first + count - 1 of a task, as PairPictures of --resolution."""
    width, height = pipeline.size
    size = config.resolution or height, config.resolution or width
    return task_pairs(task, config.seed, range(first, first + count), size)


# Latents and text ---------------------------------------------------------------------------------

@torch.no_grad()
def encode_pictures(vae, pictures: list) -> list[torch.Tensor]:
    """Scaled latents of all pictures: a list of [2,4,h,w], mean and deviation, in 16 bits."""
    # Photos may be large, and must not depend on their neighbours in a batch.
    chunk = 1 if isinstance(pictures[0], Photo) else 64
    latents = [None] * len(pictures)
    by_size = sorted(range(len(pictures)), key=lambda i: pictures[i].size)
    starts = range(0, len(by_size), chunk)
    for start in tqdm(starts, "latents", disable=len(pictures) == 1, leave=False, mininterval=2):
        indices = by_size[start:start + chunk]
        for size in {pictures[i].size for i in indices}:
            same = [i for i in indices if pictures[i].size == size]
            moments = scaled_moments(vae, [pictures[i] for i in same])
            for i, row in zip(same, moments):
                latents[i] = row
    return latents


def scaled_moments(vae, pictures: list) -> torch.Tensor:
    """Pictures of one size -> [B,2,4,h,w], mean and deviation of scaled latents, in 16 bits."""
    images = torch.stack(type(pictures[0]).draw(pictures)).to(next(vae.parameters()))
    device = images.device
    with torch.autocast(device.type, torch.bfloat16, enabled=computes_bf16(device)):
        mean, logvar = vae.encode(images)
    std = vae.config.scaling_factor * (0.5 * logvar.float()).exp()
    return torch.stack([vae.scale(mean.float()), std], dim=1).half().cpu()


def encode_text(pipeline: Pipeline, captions: list, train_text: bool = False) -> tuple:
    """Captions -> (context [B,N,D], pooled [B,D]). pooled is None without SDXL.

    A caption of None is left out: its rows are zeros.
    """
    with torch.set_grad_enabled(train_text):
        texts = [caption or "" for caption in captions]
        context, pooled = encode_prompts(texts, pipeline.tokenizers_and_encoders, pipeline.is_sdxl)
    is_given = torch.tensor([caption is not None for caption in captions], device=context.device)
    context = context * is_given[:, None, None]
    if pooled is not None:
        pooled = pooled * is_given[:, None]
    return context, pooled


@torch.no_grad()
def encode_captions(pipeline: Pipeline, photos: list[Photo]) -> dict:
    """{caption: (context [N,D], pooled [D])} of all photos, of the empty caption and of none."""
    encoded = {}
    captions = dict.fromkeys([None, "", *(photo.text for photo in photos)])
    for caption in tqdm(captions, "texts", leave=False, mininterval=2):
        context, pooled = encode_text(pipeline, [caption])
        encoded[caption] = context[0].cpu(), None if pooled is None else pooled[0].cpu()
    return encoded


class LatentData:
    """Batches of latents, made of pictures once, before training.

    A bucket is all pictures of one size (H, W). Each batch is of one bucket, because only latents
    of one size can be stacked. A bucket is chosen as often as it has pictures.
    texts: what `encode_captions` made of all captions; without it they are encoded in every step.
    """

    def __init__(
            self, pipeline: Pipeline, pictures: list, config: DenoisingSettings,
            texts: dict | None = None):
        self.config = config
        self.pictures = pictures
        self.texts = texts
        self.schedule = pipeline.schedule
        self.latents = encode_pictures(pipeline.vae, pictures)
        self.buckets = {}  # {size: the numbers of its pictures}
        for i, picture in enumerate(pictures):
            self.buckets.setdefault(picture.size, []).append(i)

    def batch(self, step: int, indices: list[int]) -> dict:
        """x0 and noise [B,4,h,w], t [B], size_ids [B,6], captions (None: left out).

        rows: which of the pictures. With `texts` also context [B,N,D] and pooled [B,D].
        """
        counts = torch.tensor([float(len(members)) for members in self.buckets.values()])
        chosen = int(torch.multinomial(counts, 1, generator=rng(self.config.seed, "bucket", step)))
        members = list(self.buckets.values())[chosen]
        samples = [self.sample(members, index) for index in indices]
        batch = {}
        for key, first in samples[0].items():
            values = [sample[key] for sample in samples]
            batch[key] = torch.stack(values) if torch.is_tensor(first) else values
        return batch

    def sample(self, members: list[int], index: int) -> dict:
        """Training sample number `index`, from one of these pictures."""
        generator = rng(self.config.seed, "sample", index)
        row = members[int(torch.randint(len(members), (), generator=generator))]
        picture = self.pictures[row]
        mean, std = self.latents[row].float()

        # Guidance needs predictions without a caption. With a negative prompt they have an encoded
        # text, as "" has; without one SDXL base gets zeros, as None gives. So both are trained.
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
        context, pooled = batch["context"], batch.get("pooled")
    else:
        context, pooled = encode_text(pipeline, batch["captions"], config.train_text)

    def predict(x, t):
        return network(x, t, context, pooled, batch["size_ids"], None)

    timesteps = batch["t"].cpu()
    loss = pipeline.schedule.objective.loss(
        predict, batch["x0"], batch["noise"], timesteps, config.min_snr or None,
        config.balanced, where)
    return loss.mean()
