"""ONE-PIC (arXiv 2412.05619): a task is one picture, half given and half drawn by a LoRA.

From the paper (its abstract; there is no code): what is given and what is wanted are put side by
side into one picture. The wanted half is masked, and only that is predicted. Control, edits,
subjects and try-on then differ in their pictures alone, and the network stays as it is.

Our choices:
1. The two halves lie side by side, as the abstract says, or interlaced (`layout`): even columns of
   latents are given, odd ones wanted. The canvas is as large and the network the same, but what
   corresponds lies in one 3x3 kernel. Side by side, attention has to find it, and a base that never
   saw two panels that belong together does not look.
2. The UNet sees the given half clean, or as noisy as the rest (`visible`).
3. The loss counts what is to be drawn, or both halves (`loss_on`).
4. Each half is encoded by itself. Encoded at_once, the VAE's convolutions and attention would
   carry the answer into the half that is given.
5. One prompt describes both halves, and the size ids are those of a picture twice as wide.
6. One LoRA learns one task or several, which the prompt names.

Measured: see tests/benchmarks/RESULTS.md.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from minipic.common import CheckedConfig, InputError, ParameterError, rng
from minipic.draw_settings import nth_seed, warn_if_cut
from minipic.figures import image_grid
from minipic.image import (
    mask_to_tensor, open_mask, open_picture, resize_and_crop, to_pictures, to_rgb, to_tensor)
from minipic.latents import (
    LatentData, denoising_loss, encode_pictures, load_pipeline, read_photos, world_pairs)
from minipic.diffusion.objectives import Objective
from minipic.layers import lora
from minipic.models.vae import VAE
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
LAYOUTS = ("interlaced", "side")
VISIBLE = ("clean", "noised")
GREY = 128  # hides what is to be drawn of the wanted picture, where the rest of it is given


@dataclass
class Settings(PairSettings, PhotoSettings):
    """Teach a model one task or several by a LoRA: given and wanted picture on one canvas.

    The pairs are of the world or of a folder (--data).
    """

    task: str = option(
        "edit", f"which pairs of the world, or several such as edges,edit: {', '.join(GIVEN)}",
        group=DATA)
    data: str = option(
        "", "folder with target/ (pictures with captions), source/ (what is given, of the same "
        "names) and perhaps mask/ (white where to draw); the world if left out")
    prompt: str = option(
        "two panels: {given} | {text}", "the prompt of both halves: {text} is the wanted one's, "
        "{given} the task's word for the other", group=DATA)
    layout: str = option(
        "interlaced", "where the halves lie: in alternate columns, or side by side", LAYOUTS,
        group=DATA)
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
        unknown = [task for task in self.tasks if task not in GIVEN]
        if unknown:
            raise ParameterError(
                "task", f"{unknown[0]!r} is unknown; choose of {', '.join(GIVEN)}")
        if len(self.tasks) > 1 and "{given}" not in self.prompt:
            raise ParameterError(
                "prompt", f"{self.prompt} lacks {{given}}, which tells several tasks apart")
        if self.visible == "clean" and self.loss_on == "all":
            raise ParameterError(
                "loss_on", "all needs visible=noised: of a clean half the UNet cannot tell the "
                "noise that it would have to predict")
        if "{text}" not in self.prompt:
            raise ParameterError(
                "prompt", f"{self.prompt} lacks {{text}}, where the wanted half is described")
        if self.data and "{given}" in self.prompt:
            raise ParameterError(
                "data", "say in the prompt what is given, such as "
                '"two panels: a sketch | {text}"')


    @property
    def tasks(self) -> tuple[str, ...]:
        """The names in `task`; of a folder, which is no task of the world, none."""
        return () if self.data else tuple(self.task.split(","))


@dataclass(frozen=True)
class TrainedAs(CheckedConfig):
    """How a LoRA was trained, which drawing must repeat. It is kept in the file's metadata."""

    visible: str
    prompt: str  # with {text}, and with {given} where it depends on the task
    size: tuple[int, int]  # (width, height) of each half, in pixels
    layout: str = "side"
    tasks: tuple[str, ...] = ()


@dataclass
class DrawOptions:
    """Nothing besides what sample.py has: --source, --image with --mask, and the ordinary flags."""


@dataclass(frozen=True)
class Example:
    """A pair to show or to train on.

    task: of the world; None: the pair is of a folder.
    mask [1,H,W]: true where the wanted picture is to be drawn; None: all of it.
    """

    wanted: Photo | PairPicture
    given: Photo | PairPicture
    task: str | None = None
    mask: torch.Tensor | None = None


# Training -----------------------------------------------------------------------------------------

def build(config: Settings) -> Pipeline:
    return load_pipeline(config, frozen=True)


def setup(pipeline: Pipeline, config: Settings) -> list[nn.Parameter]:
    return lora.inject(pipeline.unet, config.lora_rank, match=BLOCK_LAYERS)


def data(pipeline: Pipeline, config: Settings) -> "CanvasData":
    """The pairs of tasks of the world, or of --data; and four of them to show."""
    if config.data:
        pairs = pairs_of_folder(pipeline, config)
        examples = pairs[:4]
    else:
        pairs = pairs_of_world(pipeline, config, 0, config.scenes)
        examples = pairs_of_world(pipeline, config, config.scenes, 4)  # never trained on
    return CanvasData(pipeline, pairs, examples, config)


def pairs_of_world(pipeline: Pipeline, config: Settings, first: int, count: int) -> list[Example]:
    """`count` pairs, in equal shares of each task. In trying on, only the garment is to be drawn.

    Pair number i has the scene number first + i.
    """
    examples = []
    tasks = config.tasks
    for number, task in enumerate(tasks):
        start = count * number // len(tasks)
        end = count * (number + 1) // len(tasks)
        for pair in world_pairs(task, pipeline, config, first + start, end - start):
            mask = pair.mask if task == "wear" else None
            examples.append(Example(pair, replace(pair, image=pair.source), task, mask))
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
        examples.append(Example(photo, given, mask=mask))
    return examples


def read_mask(photo: Photo, path: Path, factor: int) -> torch.Tensor:
    """The mask of a photo, cut as the photo is. InputError if it does not fit or masks nothing."""
    mask = open_mask(path)
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
    """Batches of canvases [B,4,h,2w], each of a given and a wanted picture, see `join`.

    Besides LatentData's: `known`, which the UNet sees where `mask` [B,1,h,2w] is false.
    """

    def __init__(
            self, pipeline: Pipeline, pairs: list[Example], examples: list[Example],
            config: Settings):
        self.examples = examples
        prompt = config.prompt
        if len(config.tasks) == 1:
            prompt = prompt.replace("{given}", GIVEN[config.task])
        self.trained_as = TrainedAs(
            config.visible, prompt, most_common_size(pairs), config.layout, config.tasks)

        moments = encode_pictures(pipeline.vae, [pair.given for pair in pairs])
        self.given = [mean for mean, _ in moments]
        self.hidden = list(self.given)  # where all is masked, anything may lie behind the mask
        self.masks = [torch.ones(1, *mean.shape[1:]) for mean in self.given]
        with_mask = [i for i, pair in enumerate(pairs) if pair.mask is not None]
        for i, (mean, _) in zip(with_mask, encode_hidden(pipeline.vae, pairs, with_mask)):
            self.hidden[i] = mean
            self.masks[i] = latent_mask(pairs[i].mask.float(), pipeline.vae.config.factor)[0]

        wanted = []
        for pair in pairs:
            text = prompt_for(self.trained_as, pair.wanted.text, pair.task)
            wanted.append(replace(pair.wanted, text=text))
        super().__init__(pipeline, wanted, config)

    def batch(self, step: int, indices: list[int]) -> dict:
        batch = super().batch(step, indices)
        rows = batch["rows"]
        given = torch.stack([self.given[row] for row in rows]).float()
        hidden = torch.stack([self.hidden[row] for row in rows]).float()
        mask = torch.stack([self.masks[row] for row in rows]).float()
        noise = []
        for index in indices:
            generator = rng(self.config.seed, "given", index)
            noise.append(torch.randn(given.shape[1:], generator=generator))
        height, width = self.pictures[rows[0]].size
        layout = self.config.layout
        batch["x0"] = join(given, batch["x0"], layout)
        batch["noise"] = join(torch.stack(noise), batch["noise"], layout)
        batch["known"] = join(given, hidden, layout)
        batch["mask"] = join(torch.zeros_like(mask), mask, layout).bool()
        size_ids = [height, 2 * width, 0, 0, height, 2 * width]
        batch["size_ids"] = torch.tensor([size_ids] * len(indices), dtype=torch.float32)
        return batch


def most_common_size(pairs: list[Example]) -> tuple[int, int]:
    """(width, height) of the largest bucket; the first one of equally large ones."""
    sizes = [pair.wanted.size for pair in pairs]
    height, width = max(dict.fromkeys(sizes), key=sizes.count)
    return width, height


def encode_hidden(vae: VAE, pairs: list[Example], chosen: list[int]) -> list[torch.Tensor]:
    """Latents of chosen pairs' wanted pictures, GREY where they are to be drawn.

    See encode_pictures. All are of one kind: of the world or of a folder.
    """
    latents = []
    at_once = pairs[0].wanted.encoded_at_once
    for start in range(0, len(chosen), at_once):
        hidden = []
        for i in chosen[start:start + at_once]:
            image = draw_one(pairs[i].wanted)
            image = ((image + 1) * 127.5).round().to(torch.uint8).masked_fill(pairs[i].mask, GREY)
            hidden.append(PairPicture(image, image, "", None, None))
        latents += encode_pictures(vae, hidden)
    return latents


def join(given: torch.Tensor, wanted: torch.Tensor, layout: str) -> torch.Tensor:
    """Two halves [B,C,h,w] -> the canvas [B,C,h,2w]."""
    if layout == "side":
        return torch.cat([given, wanted], dim=3)
    return torch.stack([given, wanted], dim=4).flatten(3)  # column 0 given, 1 wanted, 2 given, ...


def wanted_half(canvas: torch.Tensor, layout: str) -> torch.Tensor:
    """[B,C,h,2w] -> [B,C,h,w]."""
    if layout == "side":
        return canvas.chunk(2, dim=3)[1]
    return canvas[..., 1::2]


def network_view(
        x: torch.Tensor, t: torch.Tensor, known: torch.Tensor, noise: torch.Tensor,
        mask: torch.Tensor, visible: str, objective: Objective) -> torch.Tensor:
    """What the UNet sees: x [B,4,h,w] where `mask` is true, elsewhere the latents `known`.

    visible: "clean", or "noised" with `noise`, as x is at the timesteps t, a scalar or [B].
    """
    if visible == "noised":
        sigma = objective.schedule.sigma(t).to(known).reshape(-1, 1, 1, 1)
        known = objective.network_input(objective.add_noise(known, noise, sigma), sigma)
    return torch.where(mask, x, known.to(x.dtype))


def loss(pipeline: Pipeline, batch: dict, config: Settings) -> torch.Tensor:
    objective = pipeline.schedule.objective
    known = batch["known"]
    noise = batch["noise"]
    mask = batch["mask"]

    def network(x, t, context, pooled, size_ids, residuals):
        x = network_view(x, t, known, noise, mask, config.visible, objective)
        return pipeline.unet(x, t, context, pooled, size_ids, residuals)

    where = mask if config.loss_on == "masked" else None
    return denoising_loss(pipeline, batch, config, network, where)


def sample(pipeline: Pipeline, config: Settings, data: CanvasData) -> Image.Image:
    """Four times the given picture, what it draws beside it, and the wanted one."""
    pictures = []
    labels = []
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
            drawn = draw(pipeline, data.trained_as, settings, [given], example.task)[0]
        pictures += [given, drawn, wanted]
        labels += ["given", example.wanted.text, "wanted"]
    return image_grid(pictures, labels, columns=3)


def draw_one(picture: Photo | PairPicture) -> torch.Tensor:
    """The image [3,H,W] of one training picture."""
    return picture.draw([picture])[0]


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
        choices = {"visible": VISIBLE, "layout": LAYOUTS}
        return config_from_json(TrainedAs, values, choices, path)
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{path}: its metadata does not say how it was trained; it is damaged or was not made "
            "by train.py onepic") from None


def tasks(path: Path) -> tuple[str, ...]:
    """The tasks of the world that the LoRA of a file was trained for."""
    return read_trained_as(path).tasks


def prompt_for(trained_as: TrainedAs, prompt: str, task: str | None = None) -> str:
    """The prompt of both halves together."""
    template = trained_as.prompt
    if len(trained_as.tasks) > 1:
        template = template.replace("{given}", GIVEN[task])
    return template.replace("{text}", prompt)


def plan(
        pipeline: Pipeline, trained_as: TrainedAs, settings: DrawSettings,
        sources: list[Image.Image], task: str | None = None, options: DrawOptions | None = None,
        ) -> tuple[DrawSettings, tuple[int, int]]:
    """Check what is asked for. settings.size: of each half, as trained if None."""
    if len(sources) != 1:
        raise ParameterError(
            "source", f"this adapter draws beside one given picture, not {len(sources)}")
    tasks = trained_as.tasks
    if task is None and len(tasks) > 1:
        raise ParameterError(
            "task", f"this adapter was trained for several; choose one of {', '.join(tasks)}")
    if task is not None and task not in tasks:
        remedy = f"choose one of {', '.join(tasks)}" if tasks else "leave it out"
        raise ParameterError("task", f"this adapter was not trained for {task!r}; {remedy}")
    if settings.image is not None and settings.mask is None:
        raise ParameterError("image", "needs a mask, black where the image is given")
    for name in ("refiner", "control", "edit"):
        if getattr(settings, name):
            raise ParameterError(
                name, "does not go with an adapter that draws beside a picture; leave it out")
    settings = replace(settings, size=settings.size or trained_as.size, strength=1.0)
    settings, _ = pipeline.plan(settings)
    warn_if_cut("source", sources[0], settings.size)
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
    given = mean_latent(pipeline, given)
    hidden = mean_latent(pipeline, wanted)
    is_drawn = latent_mask(wanted_mask, pipeline.vae.config.factor).bool().to(given.device)

    layout = trained_as.layout
    known = join(given, hidden, layout).expand(n, -1, -1, -1)
    mask = join(torch.zeros_like(is_drawn), is_drawn, layout)
    noise = []
    for i in range(n):
        generator = rng(nth_seed(settings.seed, i), "given")
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
        settings, prompt=prompt_for(trained_as, settings.prompt, task), size=canvas_size,
        image=None, mask=None, graph=graph)
    drawing = pipeline.prepare(canvas_settings)
    for x, x0 in pipeline.denoise(drawing, network):
        x = torch.where(is_drawn, wanted_half(x, layout), hidden.to(x))
        x0 = torch.where(is_drawn, wanted_half(x0, layout), hidden.to(x0))
        if on_step is not None:
            on_step(x, x0)
    return pipeline.decode(x)


def mean_latent(pipeline: Pipeline, image: torch.Tensor) -> torch.Tensor:
    """image [3,H,W] in [-1,1] -> the mean of its latent, scaled [1,4,h,w]."""
    mean, _ = pipeline.encode_moments(image)
    return pipeline.vae.scale(mean).to(pipeline.device)
