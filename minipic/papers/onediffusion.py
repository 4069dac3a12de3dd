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

Measured at tiny scale: 4.9 M weights, 260 s of one core, depth both ways alone: sampled depth has
an AbsRel of 0.135 (0.202 from another picture). A step of the released size, two frames of
256x256 in bf16 on a CPU: 14 s and 6.0 GB. How to use its weights: diffusion/frames.py.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from minipic.common import CheckedConfig, InputError, ParameterError, rng
from minipic.diffusion.frames import (
    SCHEDULE, dynamic_shift, flow_grid, guided, sample_frames)
from minipic.draw_settings import DrawSettings, nth_seed
from minipic.figures import image_grid
from minipic.image import resize_and_crop, to_pictures, to_rgb, to_tensor
from minipic.latents import encode_pictures, load_pipeline, read_photos
from minipic.layers import lora
from minipic.models.nextdit import NextDiT, NextDiTConfig
from minipic.pipeline import Pipeline
from minipic.text import text_states
from minipic.training.flags import option
from minipic.training.photos import Photo, is_hidden, match_by_stem
from minipic.training.posed import read_scene
from minipic.training.settings import DATA, HOW, LORA, LOSS, PairSettings, PhotoSettings
from minipic.weights import read_weights, save_weights
from minipic.weights.configs import config_from_json, config_to_json
from minipic.weights.files import read_header, write_json
from minipic.weights.layouts import load_part, open_part
from minipic.weights.networks import TEXT_ENCODERS
from minipic.world import tasks as world
from minipic.world.camera import FOCAL, eyes
from minipic.world.pictures import CHUNK, PairPicture
from minipic.world.rays import (
    RAY_AXES, at_distance, cameras_of_rays, frames_of_cameras, orbit, pinhole, rays_of_frames)

# {task, whose token is [[task]]: the task of the world that it is trained on}
WORLD_TASKS = {
    "text2image": "depth",  # its pictures, without their maps
    "depth2image": "depth",
    "normals2image": "normals",
    "semanticmap2image": "segmentation",
    "boundingbox2image": "boxes",
    "canny2image": "edges",
    "deblurring": "blur",
    "super_resolution": "small",
    "image_inpainting": "masked",
    "image_editing": "edit",
    "multiview": "view",
    "subject_driven": "subject",
}
# Arguments of the world's tasks, for samples of different numbers of frames in equal shares.
VARIANTS = {
    "multiview": ({"views": 2}, {"views": 3}),
    "subject_driven": ({"references": 1}, {"references": 2}, {"references": 3}),
}
UNCONDITIONAL = True  # a drawing needs no prompt
POSE = "camera_pose"  # multiview, whose rays are drawn and read
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


@dataclass(frozen=True)
class Example:
    """One sample. Of views, `pictures` has no rays, and there are cameras [V,3,4]."""

    task: str
    pictures: tuple[Photo | PairPicture, ...]
    text: str
    cameras: torch.Tensor | None = None
    focal: float = FOCAL


# Text ---------------------------------------------------------------------------------------------

@torch.no_grad()
def encode(pipeline: Pipeline, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """B texts -> states [B,M,D] of the pipeline's encoders, and which tokens are real [B,M]."""
    pipeline.fetch(*TEXT_ENCODERS)
    states = []
    for tokenizer, encoder in pipeline.tokenizers_and_encoders:
        ids = tokenizer(texts)
        state, _ = text_states(ids, encoder, pipeline.is_sdxl)
        states.append(state)
    ends = (ids == tokenizer.end).int().argmax(dim=1)  # the first END of each
    longest = int(ends.max()) + 1
    mask = torch.arange(longest) <= ends[:, None]
    states = torch.cat(states, dim=-1)[:, :longest]
    return states, mask.to(states.device)


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


def examples_of_world(
        task: str, pipeline: Pipeline, config: Settings, first: int, count: int) -> list[Example]:
    """Samples first to first + count - 1 of a task, of each number of frames about as many."""
    width, height = pipeline.size
    size = config.resolution or height, config.resolution or width
    variants = VARIANTS.get(task, ({},))
    examples = []
    for number, options in enumerate(variants):
        own = range(first + number, first + count, len(variants))
        for start in range(0, len(own), CHUNK):
            batch = world.TASKS[WORLD_TASKS[task]](
                config.seed, own[start:start + CHUNK], size, **options)
            examples += examples_of_batch(task, batch)
    return examples


def examples_of_batch(task: str, batch: world.TaskBatch) -> list[Example]:
    """The samples of one of the world's batches; the wanted picture comes first."""
    cameras = [None] * len(batch.prompts)
    texts = batch.prompts
    if task == "multiview":
        frames = batch.truth["pictures"]
        cameras = [at_distance(views) for views in batch.truth["extrinsics"]]
        texts = [""] * len(frames)  # the world's text would tell how the camera moves
    elif task == "subject_driven":
        frames = torch.cat([batch.target[:, None], batch.truth["references"]], dim=1)
    elif task == "text2image":
        frames = batch.target[:, None]
    else:
        frames = torch.stack([batch.target, batch.source], dim=1)
    frames = ((frames + 1) * 127.5).round().to(torch.uint8)
    examples = []
    for images, text, views in zip(frames, texts, cameras):
        pictures = [PairPicture(image, image, text, None, None) for image in images]
        examples.append(Example(task, tuple(pictures), text, views))
    return examples


def examples_of_folder(pipeline: Pipeline, config: Settings) -> list[Example]:
    """The samples of --data: a folder for each task, matched by the pictures' names."""
    root = Path(config.data)
    if not root.is_dir():
        raise ParameterError("data", f"{root}: no such folder")
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not is_hidden(path)]
    examples = []
    for folder in folders:
        if folder.name == "multiview":
            examples += examples_of_scenes(folder, pipeline, config)
            continue
        if not (folder / "target").is_dir():
            raise InputError(
                f"{folder} has no target/; put a task's wanted pictures there, and what is given "
                "into source/")
        photos = read_photos(pipeline, config, str(folder / "target"))
        given = []
        for name in ("source", "source2", "source3", "source4"):
            if (folder / name).is_dir():
                given.append(match_by_stem(folder / name, photos))
        if not given and folder.name != "text2image":
            raise InputError(f"{folder} has no source/; only the task text2image needs none")
        for i, photo in enumerate(photos):
            pictures = [photo]
            pictures += [replace(photo, path=paths[i]) for paths in given]
            examples += [Example(folder.name, tuple(pictures), photo.text)] * photo.repeats
    if not examples:
        raise InputError(f"{root} has no folder of a task, such as {root / 'depth2image'}")
    return examples


def examples_of_scenes(folder: Path, pipeline: Pipeline, config: Settings) -> list[Example]:
    """For each view of each scene with a transforms.json one sample, with one or two others."""
    files = sorted(folder.glob("*/transforms.json"))
    if not files:
        raise InputError(f"{folder} has no scene, such as {folder / 'kitchen/transforms.json'}")
    examples = []
    for file in files:
        scene = read_scene(file, config.resolution or pipeline.size[0])
        try:
            cameras = at_distance(scene.cameras)
        except ParameterError:
            raise InputError(f"{file}: its cameras look at no common point") from None
        count = len(scene.photos)
        for first in range(count):
            generator = rng(config.seed, "views", file.parent.name, first)
            order = torch.randperm(count, generator=generator).tolist()
            others = [view for view in order if view != first][:1 + first % 2]
            chosen = [first, *others]
            photos = tuple(scene.photos[view] for view in chosen)
            examples.append(
                Example("multiview", photos, photos[0].text, cameras[chosen], scene.focal))
    return examples


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


@torch.no_grad()
def encode_frames(
        pipeline: Pipeline, examples: list[Example],
        workers: int | None = 0) -> list[torch.Tensor]:
    """The frames [F,C,h,w] of each example, in 16 bits: a view is a picture and then its rays."""
    pictures = [picture for example in examples for picture in example.pictures]
    latents = iter(encode_pictures(pipeline.vae, pictures, workers))
    encoded = []
    for example in examples:
        frames = torch.stack([next(latents)[0] for _ in example.pictures])  # their means
        if example.cameras is not None:
            channels, side = frames.shape[1:3]
            rays = frames_of_cameras(example.cameras, example.focal, channels, side)
            frames = torch.stack([frames, rays.half()], dim=1).flatten(0, 1)
        encoded.append(frames)
    return encoded


def is_map(task: str) -> bool:
    """Whether a task draws pictures from maps, so that it can be done the other way round."""
    return task.endswith("2image") and task != "text2image"


def ways_to_give(task: str, frames: int) -> list[list[bool]]:
    """Which frames are given in drawing, in all the ways that a task is done."""
    if task == "multiview":
        views = frames // 2
        ways = []
        for known in range(1, views + 1):
            pictures = [view < known for view in range(views)]
            for first_camera_only in (False, True):
                rays = [view == 0 or not first_camera_only for view in range(views)]
                both = [given for pair in zip(pictures, rays) for given in pair]
                if not all(both):
                    ways.append(both)
        return ways
    if frames == 1:
        return []
    ways = [[False] + [True] * (frames - 1)]
    if is_map(task):
        ways.append([True] + [False] * (frames - 1))  # the map from the picture
    return ways


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
    pictures = pipeline.decode(frames.to(pipeline.device))
    height = pictures[0].height
    row = Image.new("RGB", (sum(picture.width for picture in pictures), height))
    for i, picture in enumerate(pictures):
        row.paste(picture, (i * picture.width, 0))
    return row


def export(pipeline: Pipeline, folder: Path, config: Settings, data: FramesData):
    """The network in a folder, or the LoRA in a file, which says how to draw with it."""
    metadata = {"paper": "onediffusion", "onediffusion": json.dumps(asdict(data.trained_as))}
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
    trained_as = read_trained_as(path)
    on_disk = pipeline.on_disk.get("unet")
    dtype = on_disk.dtype if on_disk else next(pipeline.unet.parameters()).dtype
    if path.name != "lora.safetensors":
        return Adapter(load_network(pipeline, path.parent, dtype).eval(), trained_as)
    network = load_network(pipeline, Path(trained_as.start), dtype)
    tensors = read_weights(path)
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            parts = [tensors[f"{layer}.{part}"] for part in ("lora_A.weight", "lora_B.weight")]
            a, b = (part.to(pipeline.device, dtype) for part in parts)
            lora.add(network, layer, str(path), a, b, tensors[f"{layer}.alpha"].item())
    return Adapter(network.eval(), trained_as)


def read_trained_as(path: Path) -> TrainedAs:
    """How the network of a file was trained. InputError where its metadata is damaged."""
    try:
        _, metadata = read_header(path)
        values = dict(json.loads(metadata["onediffusion"]))
        return config_from_json(TrainedAs, values, {}, path)
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{path}: its metadata does not say how it was trained; it is damaged or was not made "
            "by train.py onediffusion") from None


def names_of_tasks(trained_as: TrainedAs) -> dict[str, str]:
    """{what can be asked for: the task as it was trained}, such as image2depth: depth2image."""
    names = {}
    for task in trained_as.tasks:
        names[task] = task
        if is_map(task):
            names["image2" + task.removesuffix("2image")] = task
        if task == "multiview":
            names[POSE] = task
    return names


def tasks(path: Path) -> tuple[str, ...]:
    """What the network of a file can be asked for."""
    return tuple(names_of_tasks(read_trained_as(path)))


def trained_task(trained_as: TrainedAs, task: str | None) -> str:
    """The task as it was trained, the only one if None. ParameterError for what is not known."""
    names = names_of_tasks(trained_as)
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


def read_cameras(options: DrawOptions) -> list[torch.Tensor]:
    """The world-to-camera matrices [3,4] of the option `camera`."""
    cameras = []
    for text in options.camera:
        try:
            azimuth, elevation = map(float, text.split(","))
        except ValueError:
            raise ParameterError(
                "camera", f"{text}: expected degrees of azimuth and elevation, such as 30,15"
                ) from None
        if not (abs(azimuth) < math.inf and abs(elevation) < 90):
            raise ParameterError("camera", f"{text}: the elevation must be between -90 and 90")
        cameras.append(orbit(azimuth, elevation))
    return cameras


def frames_to_draw(
        adapter: Adapter, sources: int, task: str | None, options: DrawOptions) -> list[bool]:
    """Which frames of a drawing are drawn. ParameterError for sources that do not fit the task."""
    name = trained_task(adapter.trained_as, task)
    cameras = read_cameras(options)
    if cameras and (name != "multiview" or task == POSE):
        raise ParameterError("camera", "only multiview follows cameras; leave it out")
    if task == POSE:
        if sources < 2:
            raise ParameterError("source", f"camera_pose needs two pictures or more, not {sources}")
        return [False, False] + [False, True] * (sources - 1)
    if name == "multiview":
        views = len(cameras) or max(options.views, sources)
        if not 0 <= sources <= views or sources == views and cameras:
            raise ParameterError("source", f"{sources} pictures leave no view of {views} to draw")
        rays_known = [bool(cameras) or view == 0 for view in range(views)]
        return [is_drawn for view in range(views)
                for is_drawn in (view >= sources, not rays_known[view])]
    if name == "text2image":
        if sources:
            raise ParameterError("source", "text2image is given no picture; leave it out")
        return [True]
    if is_map(name):
        if sources > 1:
            raise ParameterError("source", f"{name} is given one picture or none, not {sources}")
        from_picture = task is not None and task.startswith("image2")
        return [True, True] if not sources else [not from_picture, from_picture]
    if not sources:
        raise ParameterError("source", f"{name} needs a picture")
    return [True] + [False] * sources


def plan(
        pipeline: Pipeline, adapter: Adapter, settings: DrawSettings, sources: list[Image.Image],
        task: str | None = None, options: DrawOptions | None = None,
        ) -> tuple[DrawSettings, tuple[int, int]]:
    """Check what is asked for. settings.size: of each frame, as trained if None."""
    options = options or DrawOptions()
    is_drawn = frames_to_draw(adapter, len(sources), task, options)
    for name in ("refiner", "control", "edit", "image", "mask"):
        if getattr(settings, name):
            raise ParameterError(name, "does not go with this adapter; give pictures as source")
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
    if trained_task(adapter.trained_as, task) == "multiview" and width != height:
        raise ParameterError("size", f"{width}x{height}: views must be square")
    return replace(settings, sampler="flow_euler"), (width * len(is_drawn), height)


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
    is_drawn = torch.tensor(frames_to_draw(adapter, len(sources), task, options))
    width, height = settings.size
    factor = pipeline.vae.config.factor
    channels = pipeline.vae.config.latent_channels
    frames = torch.zeros(len(is_drawn), channels, height // factor, width // factor)

    # Pictures come in their order into the places of pictures that are given; then known rays.
    places = range(0, len(is_drawn), 2) if name == "multiview" else range(len(is_drawn))
    places = [i for i in places if not is_drawn[i]]
    for place, source in zip(places, sources):
        image = to_tensor(resize_and_crop(to_rgb(source), settings.size))
        mean, _ = pipeline.encode_moments(image)
        frames[place] = pipeline.vae.scale(mean)[0]
    if name == "multiview":
        known = torch.stack(read_cameras(options) or [orbit(0, 0)])
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

    noise = []
    for i in range(settings.n):
        generator = torch.Generator().manual_seed(nth_seed(settings.seed, i))
        noise.append(torch.randn(frames.shape, generator=generator))
    chosen = is_drawn[:, None, None, None]
    x = torch.where(chosen, torch.stack(noise), frames.float()).to(device)

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
    rays = rays_of_frames(frames.float().cpu())
    cameras = cameras_of_rays(rays, pinhole(trained_as.focal, (1, 1)), (1, 1))
    axes = RAY_AXES[:3, 0, 0]
    centres = eyes(cameras) * axes
    directions = cameras[:, 2, :3] * axes
    for number, (centre, direction) in enumerate(zip(centres, directions), 1):
        place = ", ".join(f"{value:.2f}" for value in centre.tolist())
        toward = ", ".join(f"{value:.2f}" for value in direction.tolist())
        print(f"view {number}: at ({place}), looks along ({toward}); left, up, forward of view 1")
    width, height = size
    maps = F.interpolate(rays[:, :3], size=(height, width))
    return to_pictures(torch.cat(list(maps), dim=2)[None])[0]
