"""OneDiffusion (arXiv 2411.16318): every task is a sequence of frames, any of which can be given.

From the paper and its public code, which draws but does not train: pictures, maps and camera rays
are frames of one sequence. One transformer (models/nextdit.py) is trained by flow matching with a
noise level of its own for each frame. Drawing holds the given frames clean and draws the others.
The text names the task in double brackets; which way round it is done, only the levels say.

Inferred, or our choice:
1. With independent levels a nearly clean frame, sigma below 0.02, is rarer than one in ten
   thousand. So a share of the samples has exactly clean given frames, and the loss on the others
   (`clean`; 0 is the paper's).
2. The code tells the network that given frames are at the last timestep of the drawing. After
   training with clean frames that is 0 (`label`).
3. Captions are left out for guidance, as is usual. Two tasks have tokens of ours: normals, and
   super-resolution, whose token is not published.
4. A ray has 6 numbers. Latents of 16 channels hold one for each latent pixel, as in the code;
   those of 4 channels one for each patch of 2x2, which has 16 numbers too.
5. The code has no way from rays back to cameras in use. Here: least squares, and an SVD.

Measured (RESULTS.md; 5.0 M weights, all tasks, one seed): after 8,000 steps, depth read from a
picture has an AbsRel of .44, because many of the maps are of another task: the text decides that at
levels near 1, and logit-normal levels are rarely there. After 4,000 more steps with shift 3, the
paper's, AbsRel is .08 (.20 from another's picture), normals are off by 12 degrees, edges have an F1
of .64. A step of the released size, two frames of 256x256 in bf16 on a CPU: 14 s and 6.0 GB. How to
use its weights: diffusion/frames.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from minipic.common import CheckedConfig, InputError, ParameterError, rng
from minipic.diffusion.frames import (
    SCHEDULE, dynamic_shift, flow_grid, guided, sample_frames)
from minipic.draw_settings import DrawSettings
from minipic.figures import image_grid
from minipic.image import resize_and_crop, to_pictures, to_rgb, to_tensor
from minipic.latents import load_pipeline
from minipic.layers import lora
from minipic.models.nextdit import NextDiT, NextDiTConfig
from minipic.papers import from_metadata, metadata_of
from minipic.papers.sequences import (
    POSE, WORLD_TASKS, Example, encode_frames, examples_of_folder, examples_of_world, given_frames,
    names_of_tasks, ways_to_give)
from minipic.pipeline import Pipeline, SeededNoise
from minipic.text import encode_unpadded
from minipic.training.flags import option
from minipic.training.settings import DATA, HOW, LORA, LOSS, PairSettings, PhotoSettings
from minipic.weights import load_lora, save_weights
from minipic.weights.configs import config_to_json
from minipic.weights.files import write_json
from minipic.weights.layouts import load_part, open_part
from minipic.weights.networks import TEXT_ENCODERS
from minipic.world.camera import FOCAL
from minipic.world.rays import (
    cameras_of_frames, describe_cameras, frames_of_cameras, orbit, rays_of_frames, read_orbit)

UNCONDITIONAL = True  # a drawing needs no prompt
HEAD_DIM = 48


@dataclass
class Settings(PairSettings, PhotoSettings):
    """Teach one transformer many tasks, each as a sequence of frames of which any can be given."""

    tasks: str = option(
        ",".join(WORLD_TASKS), "which tasks of the world, with commas between them", group=DATA)
    data: str = option(
        "", "folder with a folder for each task: target/ (pictures with captions), and source/, "
        "source2/ ... (what is given, of the same names); multiview/ has scenes with "
        "transforms.json; the world if left out")
    start: str = option(
        "", "folder of an earlier training to go on from; a new network if left out", group=DATA)
    hidden_size: int = option(
        192, f"width of a new network, a multiple of {2 * HEAD_DIM}", group=HOW)
    depth: int = option(8, "layers of a new network", group=HOW)
    task_token: bool = option(True, "name the task in the text", group=DATA)
    clean: float = option(
        0.75, "share of samples whose given frames are exactly clean; 0 is the paper's",
        group=LOSS)
    shared_t: bool = option(
        False, "one noise level for all frames of a sample, instead of one for each", group=LOSS)
    shift: float = option(
        1.0, "noise levels are moved up, 3 in the paper, for large pictures; 1: not", group=LOSS)
    lora_rank: int = option(
        0, "train a LoRA of this rank of the network in --start; 0: train the network", group=LORA)
    scenes: int = option(4000, "different samples of all tasks together, kept in memory")
    logit_normal: float = option(1.0)
    steps: int = option(2000)
    batch: int = option(16)
    lr: float = option(2e-3)

    MINIMUM = PairSettings.MINIMUM | {
        "hidden_size": 1, "depth": 1, "clean": 0, "shift": 0.01, "lora_rank": 0}

    def __post_init__(self):
        super().__post_init__()
        for task in self.tasks.split(","):
            if not self.data and task not in WORLD_TASKS:
                raise ParameterError(
                    "tasks", f"{task!r} is unknown; choose from {', '.join(WORLD_TASKS)}, or give "
                    "your own as folders in data")
        if self.hidden_size % (2 * HEAD_DIM):
            raise ParameterError(
                "hidden_size", f"must be a multiple of {2 * HEAD_DIM}, not {self.hidden_size}")
        if self.clean > 1:
            raise ParameterError("clean", f"must be at most 1, not {self.clean}")
        if self.lora_rank and not self.start:
            raise ParameterError("lora_rank", "needs start, the network that the LoRA is for")
        for name in ("min_snr", "balanced"):
            if getattr(self, name):
                raise ParameterError(
                    name, "a velocity's loss has no weights here; use logit_normal and shift")


@dataclass(frozen=True)
class TrainedAs(CheckedConfig):
    """How a network was trained, which drawing must repeat. It is kept in the file's metadata."""

    tasks: tuple[str, ...]
    size: tuple[int, int]  # (width, height) of each frame, in pixels
    focal: float = FOCAL  # of the views, in sides of a picture
    task_token: bool = True
    start: str = ""  # the folder of the network that a LoRA is for


# Text ---------------------------------------------------------------------------------------------

@torch.no_grad()
def encode(pipeline: Pipeline, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """B texts -> states [B,M,D] of the pipeline's encoders, and which tokens are real [B,M]."""
    pipeline.fetch(*TEXT_ENCODERS)
    return encode_unpadded(texts, pipeline.tokenizers_and_encoders, pipeline.is_sdxl)


def full_text(task: str, text: str, task_token: bool = True) -> str:
    """What the encoders read of a task: "[[depth2image]] a red cube"."""
    return f"[[{task}]] {text}".strip() if task_token else text


# Training -----------------------------------------------------------------------------------------

def build(config: Settings) -> Pipeline:
    """The pipeline of --model, whose VAE and text encoders serve, with `nextdit` beside them."""
    pipeline = load_pipeline(config, frozen=True)
    if config.start:
        frozen = config.lora_rank and config.precision == "bf16"
        dtype = torch.bfloat16 if frozen else torch.float32
        pipeline.nextdit = load_network(pipeline, Path(config.start), dtype)
    else:
        heads = config.hidden_size // HEAD_DIM
        pipeline.nextdit = NextDiT(NextDiTConfig(
            in_channels=pipeline.vae.config.latent_channels,
            hidden_size=config.hidden_size, depth=config.depth, num_heads=heads,
            num_kv_heads=heads // 2, multiple_of=64, softcap=0.0,
            caption_channels=pipeline.unet.config.cross_attention_dim))
    return pipeline


def load_network(pipeline: Pipeline, folder: Path, dtype: torch.dtype) -> NextDiT:
    """The network of a folder. InputError where it does not fit the pipeline's VAE and text."""
    part = open_part(folder, "transformer")
    needed = pipeline.vae.config.latent_channels, pipeline.unet.config.cross_attention_dim
    found = part.config.in_channels, part.config.caption_channels
    if found != needed:
        raise InputError(
            f"{folder} takes latents of {found[0]} channels and text of {found[1]}, this model "
            f"has {needed[0]} and {needed[1]}; give the model that it was trained with")
    return load_part(part, dtype, pipeline.device)


def setup(pipeline: Pipeline, config: Settings) -> list[nn.Parameter]:
    if config.lora_rank:
        return lora.inject(pipeline.nextdit, config.lora_rank, match=r"layers\..*")
    return list(pipeline.nextdit.parameters())


def data(pipeline: Pipeline, config: Settings) -> "FramesData":
    """Samples of the world's tasks or of --data; and one of each task to show."""
    if config.data:
        examples = examples_of_folder(pipeline, config)
        shown = list({example.task: example for example in examples}.values())
    else:
        tasks = config.tasks.split(",")
        examples, shown = [], []
        for number, task in enumerate(tasks):
            start = config.scenes * number // len(tasks)
            end = config.scenes * (number + 1) // len(tasks)
            examples += examples_of_world(task, pipeline, config, start, end - start)
            shown += examples_of_world(task, pipeline, config, config.scenes, 1)  # unseen
    return FramesData(pipeline, examples, shown, config)


class FramesData:
    """Batches of frames of one task and one shape each; every task is as likely as any other."""

    def __init__(
            self, pipeline: Pipeline, examples: list[Example], shown: list[Example],
            config: Settings):
        self.config = config
        self.shown = shown
        self.examples = examples
        height, width = examples[0].pictures[0].size
        tasks = tuple(dict.fromkeys(example.task for example in examples))
        focals = [example.focal for example in examples if example.cameras is not None]
        focal = focals[0] if focals else FOCAL
        self.trained_as = TrainedAs(
            tasks, (width, height), focal, config.task_token, config.start)
        self.frames = encode_frames(pipeline, examples, config.workers)
        self.groups = {}  # {task: {shape of the frames: numbers of the examples}}
        for i, (example, frames) in enumerate(zip(examples, self.frames)):
            of_task = self.groups.setdefault(example.task, {})
            of_task.setdefault(frames.shape, []).append(i)
        self.texts = {}  # {text: (states [M,D], mask [M])}
        for text in ("", *(self.text(example) for example in examples)):
            if text not in self.texts:
                states, mask = encode(pipeline, [text])
                self.texts[text] = states[0].cpu(), mask[0].cpu()

    def text(self, example: Example) -> str:
        return full_text(example.task, example.text, self.config.task_token)

    def batch(self, step: int, indices: list[int]) -> dict:
        """x0, noise [B,F,C,h,w], t [B,F], given [B,F], text [B,M,D], mask [B,M]."""
        generator = rng(self.config.seed, "task", step)
        tasks = list(self.groups)
        task = tasks[int(torch.randint(len(tasks), (), generator=generator))]
        groups = list(self.groups[task].values())
        counts = torch.tensor([len(rows) for rows in groups], dtype=torch.float32)
        rows = groups[int(torch.multinomial(counts, 1, generator=generator))]
        samples = [self.sample(task, rows, index) for index in indices]
        batch = {}
        for key in ("x0", "noise", "t", "given"):
            batch[key] = torch.stack([sample[key] for sample in samples])
        states, masks = zip(*(sample["text"] for sample in samples))
        batch["text"] = nn.utils.rnn.pad_sequence(states, batch_first=True)
        batch["mask"] = nn.utils.rnn.pad_sequence(masks, batch_first=True)
        return batch

    def sample(self, task: str, rows: list[int], index: int) -> dict:
        """Training sample number `index`, from one of these examples."""
        config = self.config
        generator = rng(config.seed, "sample", index)
        row = rows[int(torch.randint(len(rows), (), generator=generator))]
        x0 = self.frames[row].float()
        is_left_out, is_clean, which = torch.rand(3, generator=generator).tolist()
        given = torch.zeros(len(x0), dtype=torch.bool)
        ways = ways_to_give(task, len(x0))
        if ways and is_clean < config.clean:
            given = torch.tensor(ways[int(which * len(ways))])
        noise = torch.randn(x0.shape, generator=generator)
        t = draw_timesteps(len(x0), config, generator)
        text = "" if is_left_out < config.caption_dropout else self.text(self.examples[row])
        return {"x0": x0, "noise": noise, "t": t.masked_fill(given, 0), "given": given,
                "text": self.texts[text]}


def draw_timesteps(frames: int, config: Settings, generator: torch.Generator) -> torch.Tensor:
    """A timestep for each frame [F]: logit-normal, or even if config.logit_normal is 0."""
    if config.logit_normal:
        sigma = (config.logit_normal * torch.randn(frames, generator=generator)).sigmoid()
    else:
        sigma = torch.rand(frames, generator=generator)
    if config.shared_t:
        sigma = sigma[:1].expand(frames)
    sigma = config.shift * sigma / (1 + (config.shift - 1) * sigma)
    return sigma * SCHEDULE.num_train_timesteps


def loss(pipeline: Pipeline, batch: dict, config: Settings) -> torch.Tensor:
    """The error of the velocity in the frames that are not given (equations 3 to 5)."""
    def predict(x, t):
        return pipeline.nextdit(x, t, batch["text"], batch["mask"])

    is_drawn = ~batch["given"][:, :, None, None, None]
    losses = SCHEDULE.objective.loss(
        predict, batch["x0"], batch["noise"], batch["t"].cpu(), where=is_drawn)
    return losses.mean()


def sample(pipeline: Pipeline, config: Settings, data: FramesData) -> Image.Image:
    """Of each task one sample: its text, and for each way the frames given, drawn and wanted."""
    pictures, labels = [], []
    adapter = Adapter(pipeline.nextdit, data.trained_as)
    for example, frames in zip(data.shown, encode_frames(pipeline, data.shown)):
        frames = frames.float()
        for given in ways_to_give(example.task, len(frames)) or [[False] * len(frames)]:
            is_drawn = ~torch.tensor(given)
            with torch.autocast(
                    pipeline.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                x = draw_frames(
                    pipeline, adapter, frames, is_drawn, example.task,
                    DrawSettings(example.text, steps=20), DrawOptions())
            wanted = frame_picture(pipeline, frames[is_drawn])
            hidden = torch.where(is_drawn[:, None, None, None], 0, frames)
            pictures += [frame_picture(pipeline, hidden), frame_picture(pipeline, x[0][is_drawn]),
                         wanted]
            labels += [example.task, example.text, "wanted"]
    return image_grid(pictures, labels, columns=3)


def frame_picture(pipeline: Pipeline, frames: torch.Tensor) -> Image.Image:
    """Frames [F,C,h,w] side by side."""
    images = [to_tensor(picture) for picture in pipeline.decode(frames.to(pipeline.device))]
    return to_pictures(torch.cat(images, dim=2)[None])[0]


def export(pipeline: Pipeline, folder: Path, config: Settings, data: FramesData):
    """The network in a folder, or the LoRA in a file, which says how to draw with it."""
    metadata = metadata_of("onediffusion", data.trained_as)
    if config.lora_rank:
        state = lora.lora_state_dict(pipeline.nextdit)
        save_weights(state, folder / "lora.safetensors", metadata)
        return
    tensors = {name: tensor.half() for name, tensor in pipeline.nextdit.state_dict().items()}
    save_weights(tensors, folder / "diffusion_pytorch_model.safetensors", metadata)
    write_json(config_to_json(pipeline.nextdit.config), folder / "config.json")


# Drawing ------------------------------------------------------------------------------------------

@dataclass
class DrawOptions:
    """Cameras of views, and how noise levels are told."""

    camera: tuple[str, ...] = option(
        (), "AZIMUTH,ELEVATION of a view in degrees, once for each; sources are the first views")
    views: int = option(2, "how many views, where no camera is known")
    label: str = option(
        "zero", "the timestep that given frames are said to be at: 0, or the last of the drawing",
        ("zero", "last"))
    shift: float = option(
        1.0, "of the noise levels; 0: by the number of tokens, as the released model")


@dataclass(frozen=True)
class Adapter:
    """A network of frames, and how it was trained."""

    network: NextDiT
    trained_as: TrainedAs


def load_adapter(pipeline: Pipeline, path: Path) -> Adapter:
    """The network of a folder, or of the folder that a LoRA is for; the pipeline stays as it is."""
    trained_as = from_metadata(TrainedAs, "onediffusion", path)
    is_lora = path.name == "lora.safetensors"
    folder = Path(trained_as.start) if is_lora else path.parent
    network = load_network(pipeline, folder, pipeline.dtype)
    if is_lora:
        layers = load_lora(path, {"unet": network})["unet"]
        for layer, (a, b, alpha) in layers.items():
            lora.add(
                network, layer, str(path), a.to(pipeline.dtype), b.to(pipeline.dtype), alpha)
    return Adapter(network.eval(), trained_as)


def tasks(path: Path) -> tuple[str, ...]:
    """What the network of a file can be asked for."""
    return tuple(names_of_tasks(from_metadata(TrainedAs, "onediffusion", path).tasks))


def trained_task(trained_as: TrainedAs, task: str | None) -> str:
    """The task as it was trained, the only one if None. ParameterError for what is not known."""
    names = names_of_tasks(trained_as.tasks)
    if task is None and len(trained_as.tasks) == 1:
        return trained_as.tasks[0]
    if task not in names:
        problem = "is needed" if task is None else f"{task!r} was not trained"
        raise ParameterError("task", f"{problem}; choose one of {', '.join(names)}")
    return names[task]


def prompt_for(adapter: Adapter, prompt: str, task: str | None = None) -> str:
    """The prompt with the name of the task as it was trained."""
    name = trained_task(adapter.trained_as, task)
    return full_text(name, prompt, adapter.trained_as.task_token)


def plan(
        pipeline: Pipeline, adapter: Adapter, settings: DrawSettings, sources: list[Image.Image],
        task: str | None = None, options: DrawOptions | None = None,
        ) -> tuple[DrawSettings, tuple[int, int]]:
    """Check what is asked for. settings.size: of each frame, as trained if None."""
    options = options or DrawOptions()
    name = trained_task(adapter.trained_as, task)
    cameras = [read_orbit(camera) for camera in options.camera]
    given = given_frames(name, task, len(sources), len(cameras), options.views)
    for field in ("refiner", "control", "edit", "image", "mask"):
        if getattr(settings, field):
            raise ParameterError(field, "does not go with this adapter; give pictures as source")
    if settings.sampler not in (None, "flow_euler"):
        raise ParameterError("sampler", "this adapter draws with flow_euler; leave it out")
    if options.shift < 0:
        raise ParameterError("shift", f"must be 0 or more, not {options.shift}")
    size = settings.size or adapter.trained_as.size
    settings, _ = pipeline.plan(replace(settings, size=size, sampler=None))
    width, height = settings.size
    multiple = 2 * pipeline.vae.config.factor
    if width % multiple or height % multiple:
        raise ParameterError("size", f"{width}x{height}: must be multiples of {multiple}")
    if name == "multiview" and width != height:
        raise ParameterError("size", f"{width}x{height}: views must be square")
    return replace(settings, sampler="flow_euler"), (width * len(given), height)


@torch.no_grad()
def draw(
        pipeline: Pipeline, adapter: Adapter, settings: DrawSettings, sources: list[Image.Image],
        task: str | None = None, options: DrawOptions | None = None,
        on_step: Callable | None = None) -> list[Image.Image]:
    """Draw the frames that are not given -> settings.n PIL pictures; several frames side by side.

    The task camera_pose prints the cameras that it finds, and draws their rays.
    """
    options = options or DrawOptions()
    settings, _ = plan(pipeline, adapter, settings, sources, task, options)
    name = trained_task(adapter.trained_as, task)
    cameras = [read_orbit(camera) for camera in options.camera]
    given = given_frames(name, task, len(sources), len(cameras), options.views)
    is_drawn = ~torch.tensor(given)
    width, height = settings.size
    factor = pipeline.vae.config.factor
    channels = pipeline.vae.config.latent_channels
    frames = torch.zeros(len(is_drawn), channels, height // factor, width // factor)

    # The sources fill the places of given pictures in their order. Views have rays between them.
    step = 2 if name == "multiview" else 1
    places = [i for i in range(0, len(is_drawn), step) if not is_drawn[i]]
    for place, source in zip(places, sources):
        image = to_tensor(resize_and_crop(to_rgb(source), settings.size))
        frames[place] = pipeline.mean_latent(image)[0]
    if name == "multiview":
        known = torch.stack(cameras or [orbit(0, 0)])
        rays = frames_of_cameras(known, adapter.trained_as.focal, channels, height // factor)
        frames[1:2 * len(rays):2] = rays

    x = draw_frames(pipeline, adapter, frames, is_drawn, name, settings, options, on_step)
    if task == POSE:
        return [report_cameras(rows, adapter.trained_as, settings.size) for rows in x[:, 1::2]]
    if name == "multiview":
        is_drawn = is_drawn & (torch.arange(len(is_drawn)) % 2 == 0)
    return [frame_picture(pipeline, rows[is_drawn]) for rows in x]


@torch.no_grad()
def draw_frames(
        pipeline: Pipeline, adapter: Adapter, frames: torch.Tensor, is_drawn: torch.Tensor,
        task: str, settings: DrawSettings, options: DrawOptions,
        on_step: Callable | None = None) -> torch.Tensor:
    """Frames [F,C,h,w], of which some are drawn -> [n,F,C,h,w]. task: as it was trained."""
    network = adapter.network
    device = pipeline.device
    prompt = full_text(task, settings.prompt, adapter.trained_as.task_token)
    text, mask = encode(pipeline, [settings.negative or "", prompt])
    text = text.to(next(network.parameters()))
    mask = mask.to(device)
    predict = guided(network, text[1:], mask[1:], text[:1], mask[:1], settings.guidance)

    noise = SeededNoise(settings.seed, settings.n, frames.shape, device)()
    x = torch.where(is_drawn.to(device)[:, None, None, None], noise, frames.float().to(device))

    tokens = int(is_drawn.sum()) * frames[0, 0].numel() // network.config.patch_size[1] ** 2
    grid = flow_grid(settings.steps, options.shift or dynamic_shift(tokens))
    first = int(is_drawn.int().argmax())
    for x, x0 in sample_frames(predict, x, is_drawn, grid, options.label):
        if on_step is not None:
            on_step(x[:, first], x0[:, first])
    return x


def report_cameras(
        frames: torch.Tensor, trained_as: TrainedAs, size: tuple[int, int]) -> Image.Image:
    """Print the cameras of ray frames [V,C,h,w]; their directions as colours."""
    for line in describe_cameras(cameras_of_frames(frames, trained_as.focal)):
        print(line)
    rays = rays_of_frames(frames.float().cpu())
    width, height = size
    maps = F.interpolate(rays[:, :3], size=(height, width))
    return to_pictures(torch.cat(list(maps), dim=2)[None])[0]
