"""ONE-PIC (arXiv 2412.05619): a task is one picture, half given and half drawn by a LoRA.

From the paper (its abstract; there is no code): what is given and what is wanted are put side by
side into one picture. The wanted half is masked, and only that is predicted. Control, edits,
subjects and try-on then differ in their pictures alone, and the network stays as it is.

Our choices:
1. The UNet sees the given half clean, or as noisy as the rest (`visible`).
2. The loss counts what is to be drawn, or both halves (`loss_on`).
3. Each half is encoded by itself. Encoded together, the VAE's convolutions and attention would
   carry the answer into the half that is given.
4. One prompt describes both halves, and the size ids are those of a picture twice as wide.

Measured: not yet; see tests/benchmarks/RESULTS.md.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from minipic.common import CheckedConfig, InputError, ParameterError, rng
from minipic.figures import image_grid
from minipic.image import (
    mask_to_tensor, open_picture, resize_and_crop, to_pictures, to_rgb, to_tensor)
from minipic.latents import (
    LatentData, denoising_loss, encode_pictures, load_pipeline, read_photos, world_pairs)
from minipic.layers import lora
from minipic.pipeline import DrawSettings, Pipeline, latent_mask
from minipic.training.flags import option
from minipic.training.photos import Photo, match_by_stem
from minipic.training.settings import DATA, LORA, LOSS, PairSettings, PhotoSettings
from minipic.weights import save_lora
from minipic.weights.configs import config_from_json
from minipic.weights.files import read_header
from minipic.world.pictures import PairPicture

# Every task of the world, and what the prompt calls its given half.
GIVEN = {
    "edges": "its edges", "depth": "its depth", "normals": "its normals",
    "segmentation": "its parts in colours", "boxes": "boxes around its objects",
    "blur": "a blurred picture", "small": "a picture of few pixels",
    "masked": "a picture with a hole", "edit": "the picture before", "view": "another view",
    "subject": "the same object", "wear": "the garment"}
BLOCK_LAYERS = r"(down|mid|up)_block.*"  # get a LoRA; on attention alone it learns more slowly
VISIBLE = ("clean", "noised")
GREY = 128  # hides what is to be drawn of the wanted picture, where the rest of it is given


@dataclass
class Settings(PairSettings, PhotoSettings):
    """Teach a model a task by a LoRA: given and wanted picture side by side.

    The pairs are of the world or of a folder (--data).
    """

    task: str = option(
        "edit", "which pairs of the world; see minipic/world/tasks.py", tuple(GIVEN), group=DATA)
    data: str = option(
        "", "folder with target/ (pictures with captions), source/ (what is given, of the same "
        "names) and perhaps mask/ (white where to draw); the world if left out")
    prompt: str = option(
        "two panels: {given} | {text}", "the prompt of both halves: {text} is the wanted one's, "
        "{given} the task's word for the other", group=DATA)
    visible: str = option(
        "clean", "how the UNet sees what is given: clean, or as noisy as the rest", VISIBLE,
        group=LOSS)
    loss_on: str = option(
        "masked", "where the prediction counts: in what is to be drawn, or in all",
        ("masked", "all"), group=LOSS)
    lora_rank: int = option(32, "rank of the LoRA", group=LORA)
    steps: int = option(2000)
    batch: int = option(16)
    warmup: int = option(20)

    MINIMUM = PairSettings.MINIMUM | {"lora_rank": 1}

    def __post_init__(self):
        super().__post_init__()
        if "{text}" not in self.prompt:
            raise ParameterError(
                "prompt", f"{self.prompt} lacks {{text}}, where the wanted half is described")
        if self.data and "{given}" in self.prompt:
            raise ParameterError(
                "data", "say in the prompt what is given, such as "
                '"two panels: a sketch | {text}"')


@dataclass(frozen=True)
class TrainedAs(CheckedConfig):
    """How a LoRA was trained, which drawing must repeat. It is kept in the file's metadata."""

    visible: str
    prompt: str
    size: tuple[int, int]  # (width, height) of each half, in pixels


@dataclass
class DrawOptions:
    """Nothing besides what sample.py has: --source, --image with --mask, and the ordinary flags."""


@dataclass(frozen=True)
class Example:
    """A pair to show or to train on.

    mask [1,H,W]: true where the wanted picture is to be drawn; None: all of it.
    """

    wanted: Photo | PairPicture
    given: Photo | PairPicture
    mask: torch.Tensor | None = None


# Training -----------------------------------------------------------------------------------------

def build(config: Settings) -> Pipeline:
    return load_pipeline(config, frozen=True)


def setup(pipeline: Pipeline, config: Settings) -> list[nn.Parameter]:
    return lora.inject(pipeline.unet, config.lora_rank, match=BLOCK_LAYERS)


def data(pipeline: Pipeline, config: Settings) -> "CanvasData":
    """The pairs of a task of the world, or of --data; and four of them to show."""
    if config.data:
        pairs = pairs_of_folder(pipeline, config)
        examples = pairs[:4]
    else:
        pairs = pairs_of_world(pipeline, config, 0, config.scenes)
        examples = pairs_of_world(pipeline, config, config.scenes, 4)  # never trained on
    return CanvasData(pipeline, pairs, examples, config)


def pairs_of_world(pipeline: Pipeline, config: Settings, first: int, count: int) -> list[Example]:
    """Pairs of a task of the world. In trying on, only the garment is to be drawn, else all."""
    examples = []
    for pair in world_pairs(config.task, pipeline, config, first, count):
        mask = pair.mask if config.task == "wear" else None
        examples.append(Example(pair, replace(pair, image=pair.source), mask))
    return examples


def pairs_of_folder(pipeline: Pipeline, config: Settings) -> list[Example]:
    """The pairs of --data: its target/, source/ and mask/, matched by their names."""
    folder = Path(config.data)
    photos = read_photos(pipeline, config, str(folder / "target"))
    sources = match_by_stem(folder / "source", photos)
    masks = match_by_stem(folder / "mask", photos) if (folder / "mask").is_dir() else None
    examples = []
    for i, photo in enumerate(photos):
        width, height = open_picture(sources[i]).size
        given = replace(photo, path=sources[i], original=(height, width))
        mask = read_mask(photo, masks[i], pipeline.vae.config.factor) if masks else None
        examples.append(Example(photo, given, mask))
    return examples


def read_mask(photo: Photo, path: Path, factor: int) -> torch.Tensor:
    """The mask of a photo, cut as the photo is. InputError if it does not fit or masks nothing."""
    mask = open_picture(path)
    height, width = photo.original
    if mask.size != (width, height):
        raise InputError(
            f"{path} has {mask.width}x{mask.height} pixels and its picture {width}x{height}; "
            "make both the same size")
    mask = mask_to_tensor(mask, photo.size[::-1])
    if not latent_mask(mask, factor).any():
        raise InputError(
            f"{path}: hardly anything is white, so nothing is to be drawn; leave the pair out")
    return mask.bool()


class CanvasData(LatentData):
    """Batches of canvases [B,4,h,2w], the given picture on the left, the wanted one on the right.

    Besides LatentData's: `known`, which the UNet sees where `mask` [B,1,h,2w] is false.
    """

    def __init__(
            self, pipeline: Pipeline, pairs: list[Example], examples: list[Example],
            config: Settings):
        self.examples = examples
        prompt = config.prompt.replace("{given}", GIVEN[config.task])
        self.trained_as = TrainedAs(config.visible, prompt, most_common_size(pairs))
        factor = pipeline.vae.config.factor

        given = encode_pictures(pipeline.vae, [pair.given for pair in pairs])
        self.left = [mean for mean, _ in given]
        if pairs[0].mask is None:
            self.right = self.left  # all of it is masked, so anything may lie behind the mask
            self.masks = [torch.ones(1, *mean.shape[1:]) for mean in self.left]
        else:
            hidden = encode_hidden(pipeline.vae, pairs)
            self.right = [mean for mean, _ in hidden]
            self.masks = [latent_mask(pair.mask.float(), factor)[0] for pair in pairs]

        wanted = []
        for pair in pairs:
            text = prompt.replace("{text}", pair.wanted.text)
            wanted.append(replace(pair.wanted, text=text))
        super().__init__(pipeline, wanted, config)

    def batch(self, step: int, indices: list[int]) -> dict:
        batch = super().batch(step, indices)
        rows = batch["rows"]
        left = torch.stack([self.left[row] for row in rows]).float()
        right = torch.stack([self.right[row] for row in rows]).float()
        mask = torch.stack([self.masks[row] for row in rows]).float()
        noise = []
        for index in indices:
            generator = rng(self.config.seed, "given", index)
            noise.append(torch.randn(left.shape[1:], generator=generator))
        height, width = self.pictures[rows[0]].size
        batch["x0"] = side_by_side(left, batch["x0"])
        batch["noise"] = side_by_side(torch.stack(noise), batch["noise"])
        batch["known"] = side_by_side(left, right)
        batch["mask"] = side_by_side(torch.zeros_like(mask), mask).bool()
        size_ids = [height, 2 * width, 0, 0, height, 2 * width]
        batch["size_ids"] = torch.tensor([size_ids] * len(indices), dtype=torch.float32)
        return batch


def most_common_size(pairs: list[Example]) -> tuple[int, int]:
    """(width, height) of the largest bucket; the first one of equally large ones."""
    sizes = [pair.wanted.size for pair in pairs]
    height, width = max(dict.fromkeys(sizes), key=sizes.count)
    return width, height


def encode_hidden(vae, pairs: list[Example]) -> list[torch.Tensor]:
    """Latents of the wanted pictures, with GREY where they are to be drawn; see encode_pictures."""
    latents = []
    chunk = 64 if isinstance(pairs[0].wanted, PairPicture) else 1  # photos may be large
    for start in range(0, len(pairs), chunk):
        hidden = []
        for pair in pairs[start:start + chunk]:
            image = type(pair.wanted).draw([pair.wanted])[0]
            image = ((image + 1) * 127.5).round().to(torch.uint8).masked_fill(pair.mask, GREY)
            hidden.append(PairPicture(image, image, "", None, None))
        latents += encode_pictures(vae, hidden)
    return latents


def side_by_side(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Two of [B,C,h,w] -> [B,C,h,2w]."""
    return torch.cat([left, right], dim=3)


def network_view(x, t, known, noise, mask, visible: str, objective) -> torch.Tensor:
    """What the UNet sees: x [B,4,h,w] where `mask` is true, elsewhere the latents `known`.

    visible: "clean", or "noised" with `noise`, as x is at the timesteps t, a scalar or [B].
    """
    if visible == "noised":
        sigma = objective.schedule.sigma(t).to(known).reshape(-1, 1, 1, 1)
        known = objective.network_input(objective.add_noise(known, noise, sigma), sigma)
    return torch.where(mask, x, known.to(x.dtype))


def loss(pipeline: Pipeline, batch: dict, config: Settings) -> torch.Tensor:
    objective = pipeline.schedule.objective
    known, noise, mask = batch["known"], batch["noise"], batch["mask"]

    def network(x, t, context, pooled, size_ids, residuals):
        x = network_view(x, t, known, noise, mask, config.visible, objective)
        return pipeline.unet(x, t, context, pooled, size_ids, residuals)

    where = mask if config.loss_on == "masked" else None
    return denoising_loss(pipeline, batch, config, network, where)


def sample(pipeline: Pipeline, config: Settings, data: CanvasData) -> Image.Image:
    """Four times the given picture, what it draws beside it, and the wanted one."""
    pictures, labels = [], []
    for example in data.examples:
        pair = torch.stack([draw_one(example.given), draw_one(example.wanted)])
        given, wanted = to_pictures(pair)
        mask = None
        if example.mask is not None:
            mask = to_pictures(example.mask.expand(1, 3, -1, -1) * 2.0 - 1)[0]
        settings = DrawSettings(
            example.wanted.text, steps=20, size=wanted.size, image=wanted if mask else None,
            mask=mask)
        # The LoRA's weights are in fp32, the UNet's may be in bf16.
        in_bf16 = config.precision == "bf16"
        with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=in_bf16):
            drawn = draw(pipeline, data.trained_as, settings, [given])[0]
        pictures += [given, drawn, wanted]
        labels += ["given", example.wanted.text, "wanted"]
    return image_grid(pictures, labels, columns=3)


def draw_one(picture: Photo | PairPicture) -> torch.Tensor:
    """The image [3,H,W] of one training picture."""
    return type(picture).draw([picture])[0]


def export(pipeline: Pipeline, folder: Path, config: Settings, data: CanvasData):
    """The LoRA, whose file says how to draw with it; example.png is a given picture to try."""
    metadata = {"paper": "onepic", "onepic": json.dumps(asdict(data.trained_as))}
    save_lora({"unet": lora.lora_state_dict(pipeline.unet)}, folder / "lora.safetensors", metadata)
    example = draw_one(data.examples[0].given)
    to_pictures(example[None])[0].save(folder / "example.png")


# Drawing ------------------------------------------------------------------------------------------

def load_adapter(pipeline: Pipeline, path: Path) -> TrainedAs:
    """Add the LoRA of a file to a pipeline. Returns how it was trained."""
    pipeline.add_lora(path)
    return read_trained_as(path)


def read_trained_as(path: Path) -> TrainedAs:
    """How the LoRA of a file was trained. InputError where its metadata is damaged."""
    try:
        _, metadata = read_header(path)
        values = dict(json.loads(metadata["onepic"]))
        return config_from_json(TrainedAs, values, {"visible": VISIBLE}, path)
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{path}: its metadata does not say how it was trained; it is damaged or was not made "
            "by train.py onepic") from None


def prompt_for(trained_as: TrainedAs, prompt: str) -> str:
    """The prompt of both halves together."""
    return trained_as.prompt.replace("{text}", prompt)


def plan(
        pipeline: Pipeline, trained_as: TrainedAs, settings: DrawSettings,
        sources: list[Image.Image], task: str | None = None, options: DrawOptions | None = None,
        ) -> tuple[DrawSettings, tuple[int, int]]:
    """Check what is asked for. settings.size: of each half, as trained if None."""
    if len(sources) != 1:
        raise ParameterError(
            "source", f"this adapter draws beside one given picture, not {len(sources)}")
    if task is not None:
        raise ParameterError("task", "this adapter was trained for one task; leave it out")
    if settings.image is not None and settings.mask is None:
        raise ParameterError("image", "needs a mask, black where the image is given")
    for name in ("refiner", "control", "edit"):
        if getattr(settings, name):
            raise ParameterError(
                name, "does not go with an adapter that draws beside a picture; leave it out")
    settings = replace(settings, size=settings.size or trained_as.size, strength=1.0)
    settings, _ = pipeline.plan(settings)
    width, height = settings.size
    return settings, (2 * width, height)


@torch.no_grad()
def draw(
        pipeline: Pipeline, trained_as: TrainedAs, settings: DrawSettings,
        sources: list[Image.Image], task: str | None = None, options: DrawOptions | None = None,
        on_step: Callable | None = None) -> list[Image.Image]:
    """Draw beside one given picture -> a list of settings.n PIL pictures, the wanted halves.

    Where settings.mask is black, settings.image is given too. on_step(x, x0) gets the wanted
    half's [n,4,h,w].
    """
    settings, canvas_size = plan(pipeline, trained_as, settings, sources, task, options)
    n = settings.n
    width, height = settings.size
    objective = pipeline.schedule.objective

    # The wanted half is grey where it is to be drawn, that is where the mask is 1.
    wanted_mask = torch.ones(1, height, width)
    wanted = torch.full((3, height, width), GREY / 127.5 - 1)
    if settings.mask is not None:
        wanted_mask = mask_to_tensor(settings.mask, settings.size)
        image = to_tensor(resize_and_crop(settings.image, settings.size))
        wanted = torch.where(wanted_mask.bool(), wanted, image)
    given = to_tensor(resize_and_crop(to_rgb(sources[0]), settings.size))
    left = mean_latent(pipeline, given)
    right = mean_latent(pipeline, wanted)
    is_drawn = latent_mask(wanted_mask, pipeline.vae.config.factor).bool().to(left.device)

    known = side_by_side(left, right).expand(n, -1, -1, -1)
    mask = side_by_side(torch.zeros_like(is_drawn), is_drawn)
    noise = []
    for i in range(n):
        generator = rng(settings.seed + i, "given")
        noise.append(torch.randn(known.shape[1:], generator=generator))
    noise = torch.stack(noise).to(known)

    def network(x, t, context, pooled, size_ids, residuals):
        branches = len(x) // n  # with and without the text
        all_known = known.repeat(branches, 1, 1, 1)
        all_noise = noise.repeat(branches, 1, 1, 1)
        x = network_view(x, t, all_known, all_noise, mask, trained_as.visible, objective)
        return pipeline.unet(x, t, context, pooled, size_ids, residuals)

    # The noise level of a "noised" half is looked up on the CPU, which no CUDA graph can record.
    graph = False if trained_as.visible == "noised" else settings.graph
    canvas_settings = replace(
        settings, prompt=prompt_for(trained_as, settings.prompt), size=canvas_size,
        image=None, mask=None, graph=graph)
    drawing = pipeline.prepare(canvas_settings)
    for x, x0 in pipeline.denoise(drawing, network):
        _, x_right = x.chunk(2, dim=3)
        _, x0_right = x0.chunk(2, dim=3)
        x = torch.where(is_drawn, x_right, right.to(x))
        x0 = torch.where(is_drawn, x0_right, right.to(x0))
        if on_step is not None:
            on_step(x, x0)
    return pipeline.decode(x)


def mean_latent(pipeline: Pipeline, image: torch.Tensor) -> torch.Tensor:
    """image [3,H,W] in [-1,1] -> the mean of its latent, scaled [1,4,h,w]."""
    mean, _ = pipeline.encode_moments(image)
    return pipeline.vae.scale(mean).to(pipeline.device)
