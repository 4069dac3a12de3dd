"""MTU (arXiv 2503.11905): one text-to-image model becomes one for several tasks, at its old cost.

The paper (ICML 2025; there is no code). Every feed-forward of the UNet is cut into N experts. Their
outputs are mixed densely, by weights that depend only on the task. Each task also has its own norm
before the experts and its own conv_in, which takes a given picture in 4 more channels. All else is
frozen. The loss is the sum of the tasks' ordinary losses.

Inferred, because the paper leaves it open:
1. A cut of a GEGLU takes value rows, gate rows and output columns of the same neurons, and counts
   the output's bias once. Then the sum of the experts is the feed-forward. A cut of the fused rows
   in N pieces would mix values with gates.
2. Softmax weights are about 1/N at first, so equation 1 as it stands shrinks every feed-forward to
   an N-th. `scale` = N undoes that: the model starts as what it was. `scale` = 1 is the paper's.
3. With N = 1 the softmax is 1 and its gradient 0: router and task embedding do nothing.
4. A task is one dense feed-forward whose output columns are weighted. So a task is drawn as an
   ordinary UNet (`fold`), without extra cost, and diffusers can draw it too (`export_task`).
5. Each step has one batch of each task. Pictures and captions are left out as in InstructPix2Pix.

Measured (RESULTS.md; three seeds, 200 steps): of captions with two objects .65 are drawn wholly
right at scale N and .48 at the paper's scale 1, with four experts; .68 with one expert, and before.
SDXL at its full size, pictures of 128x128, all in bf16: a training step of two tasks 15.2 GB and
31 s of one core, a drawing 9.4 GB.
"""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint

from minipic.common import CheckedConfig, InputError, ParameterError
from minipic.figures import image_grid
from minipic.kernels import casting
from minipic.latents import (
    CaptionCache, LatentData, SourceData, denoising_loss, load_pipeline, picture_of, read_photos,
    world_pairs)
from minipic.layers.moe import (
    TASK_LAYERS, MoE, PerTask, select, task_state_dict, upcycle)
from minipic.models.unet import UNet, UNetConfig
from minipic.papers import from_metadata, metadata_of
from minipic.pipeline import DrawSettings, Pipeline
from minipic.training.flags import option
from minipic.training.photos import read_sources
from minipic.training.settings import DATA, HOW, PairSettings, PhotoSettings
from minipic.weights import read_weights, save_weights
from minipic.weights.layouts import build_empty
from minipic.weights.networks import TEXT_ENCODERS
from minipic.world.pictures import compose

# The tasks of the world, and where their pairs come from; t2i has none, only pictures.
WORLD_TASKS = {"t2i": None, "edit": "edit", "sr": "small", "inpaint": "masked"}
EXPERTS = "the experts"


@dataclass
class Settings(PairSettings, PhotoSettings):
    """Teach one model several tasks, by experts cut out of its own feed-forwards."""

    tasks: str = option(
        "t2i,edit,sr,inpaint", "names with commas between them: of the world's tasks, which are "
        "these four, or of folders in --data", group=DATA)
    data: str = option(
        "", "folder with a folder for each task: target/ (pictures with captions) and, if a "
        "picture is given, source/ (of the same names); the world if left out")
    experts: int = option(4, "experts that each feed-forward is cut into", group=EXPERTS)
    scale: int = option(
        0, "what their sum is multiplied by: their number, which keeps the model as it is at "
        "first, or 1, which is the paper's; 0: their number", group=EXPERTS)
    top_k: int = option(0, "how many experts each task uses; 0: all", group=EXPERTS)
    steps: int = option(2000)
    batch: int = option(16, "samples of each task per step, over all processes")
    lr: float = option(5e-4)
    warmup: int = option(20)
    # 1 in the paper, whose unscaled latents are 5 times as large as those of the tiny model
    input_lr: float = option(
        10.0, "learning rate of conv_in as a multiple of the others'", group=HOW)

    GROUPS = (DATA, EXPERTS, *PairSettings.GROUPS[1:])
    MINIMUM = PairSettings.MINIMUM | {"experts": 1, "scale": 0, "top_k": 0, "input_lr": 0}

    def __post_init__(self):
        super().__post_init__()
        if self.caption_dropout > 0.6:
            raise ParameterError(
                "caption_dropout", f"must be at most 0.6, not {self.caption_dropout}")
        for task in task_names(self):
            if not self.data and task not in WORLD_TASKS:
                raise ParameterError(
                    "tasks", f"{task!r} is unknown; choose from {', '.join(WORLD_TASKS)}, or give "
                    "your own as folders in data")


def task_names(config: Settings) -> tuple[str, ...]:
    return tuple(name.strip() for name in config.tasks.split(","))


@dataclass(frozen=True)
class TrainedAs(CheckedConfig):
    """How a UNet was upcycled, which drawing must repeat. It is kept in the file's metadata."""

    tasks: tuple[str, ...]
    pictures: tuple[str, ...]  # those of them that are given a picture
    experts: int
    scale: int
    top_k: int = 0


@dataclass
class DrawOptions:
    """Nothing besides what sample.py has: --task, --source and the ordinary flags."""


# Training -----------------------------------------------------------------------------------------

def build(config: Settings) -> Pipeline:
    """The pipeline of --model. What will be frozen gets the precision of the arithmetic."""
    pipeline = load_pipeline(config)
    if config.precision == "bf16":
        for name, param in pipeline.named_parameters():
            if not re.fullmatch(rf"unet\.({TASK_LAYERS})\..*", name):
                param.data = param.data.bfloat16()
    return pipeline


def setup(pipeline: Pipeline, config: Settings) -> list[nn.Parameter]:
    return upcycle(pipeline.unet, **asdict(trained_as(config)))


def trained_as(config: Settings) -> TrainedAs:
    """What the settings make of a UNet. A task of --data is given a picture if it has source/."""
    tasks = task_names(config)
    if config.data:
        pictures = [task for task in tasks if Path(config.data, task, "source").is_dir()]
    else:
        pictures = [task for task in tasks if WORLD_TASKS[task]]
    scale = config.scale or config.experts
    return TrainedAs(tasks, tuple(pictures), config.experts, scale, config.top_k)


def lr_scale(config: Settings) -> dict[str, float]:
    return {f"unet.conv_in.tasks.{task}.weight": config.input_lr for task in task_names(config)}


class TasksData:
    """In every step a batch of each task: {task: what its LatentData or SourceData gives}.

    What task A gets does not depend on which other tasks there are.
    """

    def __init__(self, pipeline: Pipeline, config: Settings):
        self.trained_as = trained_as(config)
        self.captions = CaptionCache(pipeline)
        self.tasks = {}
        self.examples = {}  # {task: (given picture or None, wanted picture)}
        for task in self.trained_as.tasks:
            own = copy.copy(config)  # not `replace`, which would check the seed
            own.seed = (config.seed, task)  # so each task has pictures and noise of its own
            wanted, given = task_pictures(pipeline, own, task, task in self.trained_as.pictures)
            if given:
                self.tasks[task] = SourceData(pipeline, wanted[:-1], given[:-1], own)
                self.examples[task] = given[-1], wanted[-1]
            else:
                self.tasks[task] = LatentData(pipeline, wanted[:-1], own)
                self.examples[task] = None, wanted[-1]

    def batch(self, step: int, indices: list[int]) -> dict:
        return {task: data.batch(step, indices) for task, data in self.tasks.items()}

    def finish(self, batch: dict):
        for own in batch.values():
            own["context"], own["pooled"] = self.captions(own["captions"])


def data(pipeline: Pipeline, config: Settings) -> TasksData:
    return TasksData(pipeline, config)


def task_pictures(
        pipeline: Pipeline, config: Settings, task: str, has_source: bool) -> tuple[list, list]:
    """(wanted pictures, given ones) of a task, the last of them to be shown and not trained on.

    The given ones are [] where there are none. Of a folder all are trained on, and the first shown.
    Super-resolution is asked for without words, as in the paper.
    """
    if config.data:
        folder = Path(config.data, task)
        wanted = read_photos(pipeline, config, str(folder / "target"))
        given = []
        if has_source:
            given = [sources[0] for sources in read_sources(folder, wanted, most=1)]
        return wanted + wanted[:1], given + given[:1]
    if not has_source:
        return [compose(config.seed, i) for i in range(config.scenes + 1)], []
    wanted = world_pairs(WORLD_TASKS[task], pipeline, config, 0, config.scenes + 1)
    if task == "sr":
        wanted = [replace(pair, text="") for pair in wanted]
    return wanted, [replace(pair, image=pair.source) for pair in wanted]


def loss(pipeline: Pipeline, batch: dict, config: Settings) -> tuple[torch.Tensor, dict]:
    """The sum of the tasks' losses (equation 2), and each of them."""
    losses = {}
    for task, own in batch.items():
        network = partial(predict, pipeline.unet, task, own.get("source"))
        if config.gradient_checkpointing:
            # The UNet recomputes its layers in the backward pass, which must select the task again.
            network = partial(checkpoint, network, use_reentrant=False)
        losses[task] = denoising_loss(pipeline, own, config, network)
    return sum(losses.values()), losses


def predict(
        unet: UNet, task: str, source: torch.Tensor | None, x: torch.Tensor,
        *given: torch.Tensor | None) -> torch.Tensor:
    """What an upcycled UNet predicts for a task. given: t, context and so on, as of the UNet."""
    select(unet, task)
    if source is not None:
        x = torch.cat([x, source], dim=1)
    return unet(x, *given)


def sample(pipeline: Pipeline, config: Settings, data: TasksData) -> Image.Image:
    """For each task: the given picture (white if none), what is drawn, and the wanted one."""
    pictures = []
    labels = []
    for task, (given, wanted) in data.examples.items():
        truth = picture_of(wanted)
        text = wanted.caption(torch.Generator())
        source = picture_of(given) if given else None
        settings = DrawSettings(text, steps=20, size=truth.size, edit=source)
        # The weights that train are in fp32, the others may be in bf16.
        in_bf16 = config.precision == "bf16"
        with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=in_bf16):
            drawn, = draw_with(pipeline, fold(pipeline.unet, task), settings)
        pictures += [source or Image.new("RGB", truth.size, "white"), drawn, truth]
        labels += [task, text, "wanted"]
    return image_grid(pictures, labels, columns=3)


def export(pipeline: Pipeline, folder: Path, config: Settings, data: TasksData):
    """The changed weights, in a file that says how to draw with them; TASK.png to try each."""
    metadata = metadata_of("mtu", data.trained_as)
    tensors = {}
    for name, tensor in task_state_dict(pipeline.unet).items():
        tensors[name] = tensor.half()
    save_weights(tensors, folder / "mtu.safetensors", metadata)
    for task, (given, _) in data.examples.items():
        if given:
            picture_of(given).save(folder / f"{task}.png")


# One task as an ordinary UNet ---------------------------------------------------------------------

@torch.no_grad()
def fold(unet: UNet, task: str) -> UNet:
    """One task of an upcycled UNet as an ordinary UNet, which shares most weights with it.

    It takes 8 channels if the task is given a picture, as InstructPix2Pix does.
    """
    select(unet, task)
    state = unet.state_dict()
    for path, layer in unet.named_modules():
        if isinstance(layer, MoE):
            if layer.full_size:
                raise ParameterError(
                    "full_size", "copies of whole feed-forwards do not fold into an ordinary UNet")
            state[f"{path}.net.2.weight"] = layer.folded_weight()
        if isinstance(layer, PerTask):
            for name, tensor in layer.tasks[task].state_dict().items():
                state[f"{path}.{name}"] = tensor
    channels = unet.conv_in.tasks[task].in_channels
    ordinary = build_empty(UNet, replace(unet.config, in_channels=channels))
    casting.install(ordinary)  # in fp32, frozen weights may still have the 16 bits of their file
    names = ordinary.state_dict().keys()
    ordinary.load_state_dict({name: state[name] for name in names}, strict=True, assign=True)
    return ordinary.requires_grad_(False).eval()


def upcycled(config: UNetConfig, trained_as: TrainedAs) -> UNet:
    unet = UNet(config)
    upcycle(unet, **asdict(trained_as))
    return unet


@dataclass(frozen=True)
class Adapter:
    """What the training saved: the tensors of `task_state_dict`, and how they were trained."""

    trained_as: TrainedAs
    tensors: dict[str, torch.Tensor]

    def unet(self, base: UNet, task: str) -> UNet:
        """One task as an ordinary UNet; what was not trained is shared with the base."""
        state = base.state_dict()
        for name, tensor in self.tensors.items():
            like = state.get(name, state["conv_in.weight"])
            state[name] = tensor.to(like)
        unet = build_empty(partial(upcycled, trained_as=self.trained_as), base.config)
        names = unet.state_dict().keys()
        unet.load_state_dict({name: state[name] for name in names}, strict=True, assign=True)
        return fold(unet, task)

    def choose_task(self, task: str | None) -> str:
        """The task itself, if the adapter has it; its only one where none is named."""
        tasks = self.trained_as.tasks
        if task is None and len(tasks) == 1:
            return tasks[0]
        if task not in tasks:
            found = "is needed" if task is None else f"{task!r} is unknown"
            raise ParameterError("task", f"{found}; this adapter does {', '.join(tasks)}")
        return task


def export_task(pipeline: Pipeline, adapter: Adapter, task: str, folder: str | Path):
    """Write one task as a diffusers folder, an InstructPix2Pix one if it is given a picture."""
    pipeline.fetch("unet")
    unet = adapter.unet(pipeline.unet, adapter.choose_task(task))
    with drawing_with(pipeline, unet):
        class_name = None
        if pipeline.extra_input == "edit":
            family = "StableDiffusionXL" if pipeline.is_sdxl else "StableDiffusion"
            class_name = f"{family}InstructPix2PixPipeline"
        pipeline.save(folder, class_name=class_name)


# Drawing ------------------------------------------------------------------------------------------

def load_adapter(pipeline: Pipeline, path: Path) -> Adapter:
    """Read a file; the pipeline stays as it is. InputError where the file does not fit it."""
    trained_as = from_metadata(TrainedAs, "mtu", path)
    tensors = read_weights(path)
    try:
        unet = build_empty(partial(upcycled, trained_as=trained_as), pipeline.unet.config)
    except ParameterError as error:
        raise InputError(f"{path} does not fit this model ({error}); give the one that it was "
                         "trained with as model") from None
    expected = task_state_dict(unet)
    misfits = sorted(expected.keys() ^ tensors.keys())
    if not misfits:
        misfits = [name for name in expected if expected[name].shape != tensors[name].shape]
    if misfits:
        raise InputError(f"{path} does not fit this model (see {misfits[0]!r}); give the one that "
                         "it was trained with as model")
    return Adapter(trained_as, tensors)


def prompt_for(adapter: Adapter, prompt: str, task: str | None = None) -> str:
    """The prompt as it is."""
    return prompt


def plan(
        pipeline: Pipeline, adapter: Adapter, settings: DrawSettings,
        sources: list[Image.Image], task: str | None = None, options: DrawOptions | None = None,
        ) -> tuple[DrawSettings, tuple[int, int]]:
    """Check what is asked for. settings.size: of the given picture if None, or the model's own."""
    task = adapter.choose_task(task)
    if task in adapter.trained_as.pictures and len(sources) != 1:
        raise ParameterError("source", f"{task} needs one given picture, not {len(sources)}")
    if task not in adapter.trained_as.pictures and sources:
        raise ParameterError("source", f"{task} is given no picture; leave it out")
    if settings.edit is not None:
        raise ParameterError("edit", "give the picture as source")
    if settings.refiner is not None:
        raise ParameterError("refiner", "does not go with this adapter; leave it out")
    if sources and settings.size is None and settings.image is None:
        size = sources[0].width // 8 * 8, sources[0].height // 8 * 8
        settings = replace(settings, size=size)
    settings, _ = pipeline.plan(settings)
    return settings, settings.size


def draw(
        pipeline: Pipeline, adapter: Adapter, settings: DrawSettings,
        sources: list[Image.Image], task: str | None = None, options: DrawOptions | None = None,
        on_step: Callable | None = None) -> list[Image.Image]:
    """Draw one task -> a list of settings.n PIL pictures.

    A given picture has a guidance of its own, settings.image_guidance. Without words there is no
    guidance at all, as in the paper's super-resolution.
    """
    settings, _ = plan(pipeline, adapter, settings, sources, task, options)
    # The text encoders give their memory back before the UNet is read.
    pipeline.encode(settings.prompt, settings.negative)
    pipeline.free(*TEXT_ENCODERS)
    pipeline.fetch("unet")
    unet = adapter.unet(pipeline.unet, adapter.choose_task(task))
    source = sources[0] if sources else None
    return draw_with(pipeline, unet, replace(settings, edit=source), on_step)


@torch.no_grad()
def draw_with(
        pipeline: Pipeline, unet: UNet, settings: DrawSettings,
        on_step: Callable | None = None) -> list[Image.Image]:
    """Draw with another UNet in the pipeline's place."""
    if not settings.prompt:
        settings = replace(settings, guidance=1.0, image_guidance=1.0)
    with drawing_with(pipeline, unet):
        drawing = pipeline.prepare(settings)
        for x, x0 in pipeline.denoise(drawing):
            if on_step is not None:
                on_step(x, x0)
    return pipeline.decode(x)


@contextmanager
def drawing_with(pipeline: Pipeline, unet: UNet) -> Iterator[None]:
    """Inside, the pipeline has this UNet, with the LoRAs that were added to its own."""
    base = pipeline.unet
    pipeline.unet = unet
    try:
        pipeline.apply_added("unet")
        yield
    finally:
        pipeline.unet = base
