"""ONE-PIC (arXiv 2412.05619): a task is one picture, part given and part drawn by a LoRA.

The paper (of which its abstract could be read; there is no code): given and wanted pictures are
arranged in one, which keeps fine-tuning close to pretraining. What is wanted is masked, and only
that is predicted. So control, edits, subjects and try-on differ in their pictures alone, without
new modules, branches or losses. By second hand: a LoRA on a frozen SDXL.

Inferred, or our choice:
1. Pictures lie side by side, several in 2x2, or interlaced (`layout`), which is ours: columns of
   each in turn, so that what corresponds lies in one 3x3 kernel.
2. The UNet sees what is given clean, or as noisy as the rest (`visible`). The loss counts what is
   to be drawn, or all (`loss_on`).
3. Each picture is encoded by itself. Encoded at once, the VAE would carry the answer into what is
   given. The size ids are the canvas's, and one prompt describes all of it.
4. Guidance by the source is InstructPix2Pix's (arXiv 2211.09800); a source left out is zero.
5. One LoRA learns one task or several, which the prompt names. Maps are read out of pictures too.

Measured (RESULTS.md): after 300 steps with edges, interlaced, their F1 in the drawing is 0.44 (two
seeds; 0.18 to the edges of another picture). Side by side it is 0.20 (one seed), no more than to
another picture's: the tiny base's own panels are unrelated, and its attention does not look across.
`train.py t2i --panels` makes a base that knows aligned panels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from minipic.common import CheckedConfig, InputError, ParameterError, rng
from minipic.diffusion.objectives import Objective
from minipic.draw_settings import nth_seed, warn_if_cut
from minipic.figures import image_grid
from minipic.image import (
    mask_to_tensor, open_mask, resize_and_crop, to_pictures, to_rgb, to_tensor)
from minipic.latents import (
    LatentData, denoising_loss, encode_pictures, load_pipeline, lora_states, picture_of,
    read_photos, world_pairs)
from minipic.layers import lora
from minipic.models.vae import VAE
from minipic.papers import from_metadata, metadata_of
from minipic.pipeline import DrawSettings, Pipeline, latent_mask
from minipic.training.flags import option
from minipic.training.photos import Photo, match_by_stem, read_sources
from minipic.training.settings import DATA, LORA, LOSS, PairSettings, PhotoSettings
from minipic.weights import save_lora
from minipic.world import tasks as world
from minipic.world.pictures import PairPicture, to_uint8

# Tasks of the world whose given half is a map. They are also done the other way round, and are
# then called image2edges and so on.
MAPS = ("edges", "depth", "normals", "segmentation", "boxes")
WITH_LEGEND = ("segmentation", "boxes")  # maps whose colours the words explain
MAP_OF = {f"image2{name}": name for name in MAPS}
# Every task, and what the prompt calls its given half.
GIVEN = world.GIVEN | dict.fromkeys(MAP_OF, "a picture")
LORA_LAYERS = {"blocks": r"(down|mid|up)_block.*", "attention": lora.ATTENTION}
LAYOUTS = ("interlaced", "side")
VISIBLE = ("clean", "noised")
MOST_SOURCES = 3  # a canvas of 2x2 has room for so many given pictures
GREY = 128  # hides what is to be drawn of the wanted picture, where the rest of it is given


@dataclass
class Settings(PairSettings, PhotoSettings):
    """Teach a model one task or several by a LoRA: given and wanted picture on one canvas.

    The pairs are of the world or of a folder (--data).
    """

    task: str = option(
        "edit", f"which pairs of the world, or several such as edges,edit: {', '.join(GIVEN)}",
        group=DATA)
    references: int = option(
        1, "pictures of the object that the task subject gives: 1 up to so many", group=DATA)
    data: str = option(
        "", "folder with target/ (pictures with captions), source/ (what is given, of the same "
        "names), perhaps source2/ and source3/, and mask/ (white where to draw); the world if "
        "left out")
    prompt: str = option(
        "two panels: {given} | {text}", "the prompt of both halves: {text} is the wanted one's, "
        "{given} the task's word for the other", group=DATA)
    layout: str = option(
        "interlaced", "where the pictures lie: in alternate columns, or side by side (several "
        "given ones: in 2x2)", LAYOUTS, group=DATA)
    visible: str = option(
        "clean", "how the UNet sees what is given: clean, or as noisy as the rest", VISIBLE,
        group=LOSS)
    loss_on: str = option(
        "masked", "where the prediction counts: in what is to be drawn, or in all",
        ("masked", "all"), group=LOSS)
    source_dropout: bool = option(
        False, "leave out what is given as often as the caption, for --image-guidance", group=LOSS)
    lora_rank: int = option(32, "rank of the LoRA", group=LORA)
    lora_layers: str = option(
        "blocks", "the layers that get it: all of the UNet's blocks, or only those of attention",
        tuple(LORA_LAYERS), group=LORA)
    steps: int = option(2000)
    batch: int = option(16)
    warmup: int = option(20)

    MINIMUM = PairSettings.MINIMUM | {"lora_rank": 1, "references": 1}

    def __post_init__(self):
        super().__post_init__()
        unknown = [task for task in self.tasks if task not in GIVEN]
        if unknown:
            raise ParameterError(
                "task", f"{unknown[0]!r} is unknown; choose of {', '.join(GIVEN)}")
        if self.references > MOST_SOURCES:
            raise ParameterError("references", f"choose 1 to {MOST_SOURCES}, not {self.references}")
        if self.references > 1 and "subject" not in self.tasks:
            raise ParameterError(
                "references", "is for the task subject; a folder of data has source2/ and source3/")
        if self.source_dropout and not 0 < self.caption_dropout <= 0.6:
            raise ParameterError(
                "source_dropout", "needs a caption_dropout above 0, up to 0.6: guidance by the "
                f"source needs predictions without both, and it is {self.caption_dropout}")
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
    size: tuple[int, int]  # (width, height) of each picture, in pixels
    layout: str = "side"
    tasks: tuple[str, ...] = ()
    sources: tuple[int, ...] = (1,)  # how many pictures can be given, to the task subject if it has
    source_dropout: bool = False


@dataclass
class DrawOptions:
    """Nothing besides what sample.py has: --source, --image with --mask, and the ordinary flags."""


@dataclass(frozen=True)
class Example:
    """A pair to show or to train on, of one or several given pictures and a wanted one.

    task: of GIVEN; None: the pair is of a folder.
    mask [1,H,W]: true where the wanted picture is to be drawn; None: all of it.
    """

    wanted: Photo | PairPicture
    given: tuple[Photo | PairPicture, ...]
    task: str | None = None
    mask: torch.Tensor | None = None


# Training -----------------------------------------------------------------------------------------

def build(config: Settings) -> Pipeline:
    return load_pipeline(config, frozen=True)


def setup(pipeline: Pipeline, config: Settings) -> list[nn.Parameter]:
    layers = LORA_LAYERS[config.lora_layers]
    return lora.inject(pipeline.unet, config.lora_rank, match=layers)


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
    """`count` pairs, in equal shares of each task.

    Pair number i has the scene number first + i.
    """
    examples = []
    for task, of_task in zip(config.tasks, shares(range(first, first + count), len(config.tasks))):
        most = config.references if task == "subject" else 1
        for references, numbers in zip(range(1, most + 1), shares(of_task, most)):
            examples += pairs_of_task(task, references, pipeline, config, numbers)
    return examples


def shares(numbers: range, parts: int) -> list[range]:
    """Numbers in so many parts, each as large as the others if possible."""
    ends = [len(numbers) * part // parts for part in range(parts + 1)]
    return [numbers[start:end] for start, end in zip(ends, ends[1:])]


def pairs_of_task(
        task: str, references: int, pipeline: Pipeline, config: Settings,
        numbers: range) -> list[Example]:
    """Pairs of one task. In trying on, only the garment is to be drawn.

    references: how many pictures the task subject gives.
    """
    name = MAP_OF.get(task, task)
    options = {"references": references} if task == "subject" else {}
    examples = []
    for pair in world_pairs(name, pipeline, config, numbers.start, len(numbers), **options):
        mask = pair.mask if task == "wear" else None
        if task in MAP_OF:
            text = f"{GIVEN[name]}: {pair.text}" if name in WITH_LEGEND else GIVEN[name]
            pair = replace(pair, image=pair.source, source=pair.image, text=text)
        given = [pair.source] if pair.references is None else pair.references
        pictures = tuple(replace(pair, image=image) for image in given)
        examples.append(Example(pair, pictures, task, mask))
    return examples


def pairs_of_folder(pipeline: Pipeline, config: Settings) -> list[Example]:
    """The pairs of --data: its target/, source/ and so on, matched by their names."""
    folder = Path(config.data)
    photos = read_photos(pipeline, config, str(folder / "target"))
    if not (folder / "source").is_dir():
        raise InputError(f"{folder} has no source/; put there what is given, of the same names")
    sources = read_sources(folder, photos, MOST_SOURCES)
    masks = match_by_stem(folder / "mask", photos) if (folder / "mask").is_dir() else None
    examples = []
    for i, photo in enumerate(photos):
        mask = read_mask(photo, masks[i], pipeline.vae.config.factor) if masks else None
        examples.append(Example(photo, tuple(sources[i]), mask=mask))
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
    """Batches of canvases [B,4,h,w], each of given pictures and a wanted one, see `join`.

    Besides LatentData's: `known`, which the UNet sees where `mask` [B,1,h,w] is false.
    """

    def __init__(
            self, pipeline: Pipeline, pairs: list[Example], examples: list[Example],
            config: Settings):
        self.examples = examples
        prompt = config.prompt
        if len(config.tasks) == 1:
            prompt = prompt.replace("{given}", GIVEN[config.task])
        sources = {len(pair.given) for pair in pairs}
        if config.tasks:
            sources = range(1, config.references + 1)
        self.trained_as = TrainedAs(
            config.visible, prompt, most_common_size(pairs), config.layout, config.tasks,
            tuple(sources), config.source_dropout)

        pictures = [picture for pair in pairs for picture in pair.given]
        moments = encode_pictures(pipeline.vae, pictures, config.workers)
        means = iter([mean for mean, _ in moments])
        self.given = []  # [V,4,h,w] of each pair
        for pair in pairs:
            given = torch.stack([next(means) for _ in pair.given])
            self.given.append(fill_canvas(given, config.layout))
        self.hidden = [given[0] for given in self.given]  # where all is masked, anything may be
        self.masks = [torch.ones(1, *given.shape[2:]) for given in self.given]
        with_mask = [i for i, pair in enumerate(pairs) if pair.mask is not None]
        for i, (mean, _) in zip(with_mask, encode_hidden(pipeline.vae, pairs, with_mask)):
            self.hidden[i] = mean
            self.masks[i] = latent_mask(pairs[i].mask.float(), pipeline.vae.config.factor)[0]

        wanted = []
        for pair in pairs:
            text = prompt_for(self.trained_as, pair.wanted.text, pair.task)
            wanted.append(replace(pair.wanted, text=text))
        super().__init__(pipeline, wanted, config)

    def bucket(self, i: int) -> tuple:
        """Canvases of one bucket also have equally many given pictures."""
        return *super().bucket(i), len(self.given[i])

    def batch(self, step: int, indices: list[int]) -> dict:
        batch = super().batch(step, indices)
        rows = batch["rows"]
        given = torch.stack([self.given[row] for row in rows]).float()  # [B,V,4,h,w]
        hidden = torch.stack([self.hidden[row] for row in rows]).float()
        mask = torch.stack([self.masks[row] for row in rows]).float()
        noise = []
        for i, (index, row) in enumerate(zip(indices, rows)):
            generator = rng(self.config.seed, "given", index)
            noise.append(torch.randn(given.shape[1:], generator=generator))
            if self.config.source_dropout and self.lacks_source(index, row, batch["captions"][i]):
                given[i] = 0
        layout = self.config.layout
        batch["x0"] = join(given, batch["x0"], layout)
        batch["noise"] = join(torch.stack(noise), batch["noise"], layout)
        batch["known"] = join(given, hidden, layout)
        is_given = torch.zeros_like(given[:, :, :1])
        batch["mask"] = join(is_given, mask, layout).bool()
        height, width = canvas_size(self.pictures[rows[0]].size, given.shape[1], layout)
        size_ids = [height, width, 0, 0, height, width]
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
            image, = pairs[i].wanted.draw([pairs[i].wanted])
            image = to_uint8(image).masked_fill(pairs[i].mask, GREY)
            hidden.append(PairPicture(image, image, ""))
        latents += encode_pictures(vae, hidden)
    return latents


def fill_canvas(given: torch.Tensor, layout: str) -> torch.Tensor:
    """Given pictures [V,4,h,w] -> as many as the canvas has places for; the rest is zero.

    Zero is what the UNet sees where a source is left out. Of 2x2 places three are for given ones.
    """
    if layout == "side" and len(given) == 2:
        return torch.cat([given, torch.zeros_like(given[:1])])
    return given


def join(given: torch.Tensor, wanted: torch.Tensor, layout: str) -> torch.Tensor:
    """Given pictures [B,V,C,h,w] and a wanted one [B,C,h,w] -> the canvas.

    side: [B,C,h,2w], the given one at the left; of three [B,C,2h,2w], the wanted one last.
    interlaced: [B,C,h,(V+1)w], in turn a column of each picture, the wanted one last.
    """
    panels = [*given.unbind(1), wanted]
    if layout == "interlaced":
        return torch.stack(panels, dim=4).flatten(3)
    rows = []
    for left, right in zip(panels[::2], panels[1::2]):
        rows.append(torch.cat([left, right], dim=3))
    return torch.cat(rows, dim=2)


def wanted_panel(canvas: torch.Tensor, sources: int, layout: str) -> torch.Tensor:
    """The wanted picture [B,C,h,w] of a canvas that `join` made of so many given ones."""
    if layout == "interlaced":
        return canvas[..., sources::sources + 1]
    right = canvas.chunk(2, dim=3)[1]
    return right if sources == 1 else right.chunk(2, dim=2)[1]


def canvas_size(size: tuple[int, int], sources: int, layout: str) -> tuple[int, int]:
    """(height, width) of the canvas of pictures of this size."""
    height, width = size
    if layout == "interlaced":
        return height, (sources + 1) * width
    return (height if sources == 1 else 2 * height), 2 * width


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
    """Four times the (first) given picture, what it draws beside it, and the wanted one."""
    pictures = []
    labels = []
    for example in data.examples:
        given = [picture_of(picture) for picture in example.given]
        wanted = picture_of(example.wanted)
        mask = None
        if example.mask is not None:
            mask = to_pictures(example.mask.expand(1, 3, -1, -1) * 2.0 - 1)[0]
        settings = DrawSettings(
            example.wanted.text, steps=20, size=wanted.size, image=wanted if mask else None,
            mask=mask)
        # The LoRA's weights are in fp32, the UNet's may be in bf16.
        in_bf16 = config.precision == "bf16"
        with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=in_bf16):
            drawn = draw(pipeline, data.trained_as, settings, given, example.task)[0]
        pictures += [given[0], drawn, wanted]
        labels += ["given", example.wanted.text, "wanted"]
    return image_grid(pictures, labels, columns=3)


def export(pipeline: Pipeline, folder: Path, config: Settings, data: CanvasData):
    """The LoRA, whose file says how to draw with it.

    example.png, and perhaps example2.png and so on, are given pictures to try.
    """
    metadata = metadata_of("onepic", data.trained_as)
    save_lora(lora_states(pipeline, torch.float16), folder / "lora.safetensors", metadata)
    for number, picture in enumerate(data.examples[0].given, 1):
        name = "example.png" if number == 1 else f"example{number}.png"
        picture_of(picture).save(folder / name)


# Drawing ------------------------------------------------------------------------------------------

def load_adapter(pipeline: Pipeline, path: Path) -> TrainedAs:
    """Add the LoRA of a file to a pipeline. Returns how it was trained."""
    pipeline.add_lora(path)
    return read_trained_as(path)


def read_trained_as(path: Path) -> TrainedAs:
    """How the LoRA of a file was trained. InputError where its metadata is damaged."""
    choices = {"visible": VISIBLE, "layout": LAYOUTS}
    return from_metadata(TrainedAs, "onepic", path, choices)


def tasks(path: Path) -> tuple[str, ...]:
    """The tasks of the world that the LoRA of a file was trained for."""
    return read_trained_as(path).tasks


def prompt_for(trained_as: TrainedAs, prompt: str, task: str | None = None) -> str:
    """The prompt of all pictures together."""
    template = trained_as.prompt
    if len(trained_as.tasks) > 1:
        template = template.replace("{given}", GIVEN[task])
    return template.replace("{text}", prompt)


def plan(
        pipeline: Pipeline, trained_as: TrainedAs, settings: DrawSettings,
        sources: list[Image.Image], task: str | None = None, options: DrawOptions | None = None,
        ) -> tuple[DrawSettings, tuple[int, int]]:
    """Check what is asked for. settings.size: of each picture, as trained if None."""
    tasks = trained_as.tasks
    if task is None and len(tasks) > 1:
        raise ParameterError(
            "task", f"this adapter was trained for several; choose one of {', '.join(tasks)}")
    if task is not None and task not in tasks:
        remedy = f"choose one of {', '.join(tasks)}" if tasks else "leave it out"
        raise ParameterError("task", f"this adapter was not trained for {task!r}; {remedy}")
    numbers = trained_as.sources if task in (None, "subject") else (1,)
    if len(sources) not in numbers:
        allowed = "one given picture"
        if numbers != (1,):
            allowed = f"{' or '.join(map(str, numbers))} given pictures"
        raise ParameterError("source", f"this adapter draws beside {allowed}, not {len(sources)}")
    if settings.image is not None and settings.mask is None:
        raise ParameterError("image", "needs a mask, black where the image is given")
    for name in ("refiner", "control", "edit"):
        if getattr(settings, name):
            raise ParameterError(
                name, "does not go with an adapter that draws beside a picture; leave it out")
    if not trained_as.source_dropout:
        if settings.image_guidance not in (1.0, DrawSettings.image_guidance):
            raise ParameterError(
                "image_guidance", "this adapter was trained without source_dropout, so that it "
                "cannot be guided by what is given; leave it out")
        settings = replace(settings, image_guidance=1.0)
    settings = replace(settings, size=settings.size or trained_as.size, strength=1.0)
    settings, _ = pipeline.plan(settings)
    for source in sources:
        warn_if_cut("source", source, settings.size)
    width, height = settings.size
    height, width = canvas_size((height, width), len(sources), trained_as.layout)
    return settings, (width, height)


@torch.no_grad()
def draw(
        pipeline: Pipeline, trained_as: TrainedAs, settings: DrawSettings,
        sources: list[Image.Image], task: str | None = None, options: DrawOptions | None = None,
        on_step: Callable | None = None) -> list[Image.Image]:
    """Draw beside given pictures -> a list of settings.n PIL pictures, the wanted ones.

    Where settings.mask is black, settings.image is given too. on_step(x, x0) gets the wanted
    picture's [n,4,h,w]. settings.image_guidance above 1 also guides by `sources`.
    """
    settings, canvas_size = plan(pipeline, trained_as, settings, sources, task, options)
    n = settings.n
    width, height = settings.size
    objective = pipeline.schedule.objective

    # The wanted picture is grey where it is to be drawn, that is where the mask is 1.
    wanted_mask = torch.ones(1, height, width)
    wanted = torch.full((3, height, width), GREY / 127.5 - 1)
    if settings.mask is not None:
        wanted_mask = mask_to_tensor(settings.mask, settings.size)
        image = to_tensor(resize_and_crop(settings.image, settings.size))
        wanted = torch.where(wanted_mask.bool(), wanted, image)
    given = []
    for source in sources:
        image = to_tensor(resize_and_crop(to_rgb(source), settings.size))
        given.append(pipeline.mean_latent(image))
    layout = trained_as.layout
    given = fill_canvas(torch.cat(given), layout)[None]  # [1,V,4,h,w]
    hidden = pipeline.mean_latent(wanted)
    is_drawn = latent_mask(wanted_mask, pipeline.vae.config.factor).bool().to(given.device)

    known = join(given, hidden, layout).expand(n, -1, -1, -1)
    unknown = join(torch.zeros_like(given), hidden, layout).expand(n, -1, -1, -1)
    mask = join(torch.zeros_like(given[:, :, :1]).bool(), is_drawn, layout)
    noise = []
    for i in range(n):
        generator = rng(nth_seed(settings.seed, i), "given")
        noise.append(torch.randn(known.shape[1:], generator=generator))
    noise = torch.stack(noise).to(known)
    guide_by_source = settings.image_guidance > 1

    def network(x, t, context, pooled, size_ids, residuals):
        branches = len(x) // n  # what guidance combines, such as with and without the text
        shown = [known] * branches
        if guide_by_source:
            shown[0] = unknown
        all_noise = noise.repeat(branches, 1, 1, 1)
        x = network_view(
            x, t, torch.cat(shown), all_noise, mask, trained_as.visible, objective)
        return pipeline.unet(x, t, context, pooled, size_ids, residuals)

    # The noise level of a "noised" half is looked up on the CPU, which no CUDA graph can record.
    graph = False if trained_as.visible == "noised" else settings.graph
    canvas_settings = replace(
        settings, prompt=prompt_for(trained_as, settings.prompt, task), size=canvas_size,
        image=None, mask=None, graph=graph)
    drawing = pipeline.prepare(canvas_settings)
    for x, x0 in pipeline.denoise(drawing, network, guide_by_source):
        x = torch.where(is_drawn, wanted_panel(x, len(sources), layout), hidden.to(x))
        x0 = torch.where(is_drawn, wanted_panel(x0, len(sources), layout), hidden.to(x0))
        if on_step is not None:
            on_step(x, x0)
    return pipeline.decode(x)
