"""Draws pictures from prompts. Read it from top to bottom: `draw` comes first, its helpers follow.

    python sample.py "a small red sphere left of a large blue cube"   four pictures in a grid
    python sample.py "a cat" --model weights/sdxl-base --n 1   official weights: a folder or a file
    python sample.py "a cat" --model weights/sdxl-turbo --steps 1 --guidance 0
    python sample.py "snow" --image photo.png --strength 0.6   redraw a picture
    python sample.py "snow" --image photo.png --mask m.png   redraw its white part
    python sample.py "a cat" --model weights/sdxl-base --lora style.safetensors:0.8
    python sample.py "a cube" --controlnet runs/controlnet/model --control edges.png
    python sample.py "make the cube green" --model runs/edit/model --edit picture.png
    python sample.py "make the cube green" --adapter runs/onepic/model --source picture.png
    python sample.py --adapter runs/onepic/model --help   an adapter of a paper has its own flags
    python sample.py --from pictures/grid.png --steps 50   a picture's settings again, changed
    torchrun --nproc_per_node=2 sample.py --prompts prompts.txt   several GPUs share the prompts
"""

import os
import signal
import sys


def stop(number: int, frame: object):
    """End the program: one line, and the exit code that a shell gives to a stopped program.

    At once, without an exception: while libraries are imported, some of them catch any.
    """
    line = f"\rsample.py: stopped by {signal.Signals(number).name}"  # over the progress bar
    os.write(sys.stderr.fileno(), f"{line:80}\n".encode())
    os._exit(128 + number)


if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    sys.stderr = sys.stderr or open(os.devnull, "w")  # a shell can start it without
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `sample.py ... | head` ends quietly

import dataclasses
import re
import secrets
import typing
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from minipic.common import (
    InputError, ParameterError, choose_threads, computes_bf16, enough_memory, find_file, flag_of,
    message_of, printable)
from minipic.diffusion.samplers import SAMPLERS
from minipic.diffusion.schedule import OVERRIDES, Schedule
from minipic.draw_settings import SEEDS, DrawSettings, nth_seed
from minipic.figures import image_grid
from minipic.image import (
    WRITTEN, open_control, open_mask, open_picture, read_saved_settings, save_new, to_tensor)
from minipic.papers import find_adapter, load_paper
from minipic.pipeline import Pipeline
from minipic.training.captions import read_text
from minipic.training.flags import find_flag, finite, flag_accepts, option, parse_argv
from minipic.weights.files import check_writable

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FEW_STEPS = 8  # with which "leading" spacing starts at timestep 876 of 1000 or lower
MAX_PROMPTS = 1 << 24  # bytes of a file of prompts
LARGE_MODEL = 1 << 30  # bytes of weights from which a CPU draws in bf16, if it computes in it

# The headings of `--help`.
WHAT = "what to draw"
MODEL = "the model and what is added to it"
ADAPTER = "this adapter"
HOW = "how to draw"
PICTURES = "pictures to start from or to follow"
SIZES = "SDXL's sizes"
WHERE = "where pictures go"


@dataclass
class Settings:
    """Draw pictures from prompts: python sample.py "a small red sphere"."""

    prompt: tuple[str, ...] = option(
        (), "in quotes; several prompts give several grids", group=WHAT)
    negative: str = option(None, "what not to draw", group=WHAT)
    n: int = option(4, "pictures for each prompt", group=WHAT)
    seed: int = option(
        0, "of the first picture, the next have seed + 1, ...; -1: random", group=WHAT, limit=SEEDS)
    size: str = option(
        None, "WIDTHxHEIGHT, multiples of 8; the model's, or a given picture's, if left out",
        group=WHAT)
    prompts: str = option(None, "text file with one prompt per line", group=WHAT)

    model: str = option("weights/tiny", "diffusers folder or .safetensors file", group=MODEL)
    vae: str = option(None, "another VAE: a folder or file", group=MODEL)
    refiner: str = option(None, "a second model for the last fifth of the noise", group=MODEL)
    lora: tuple[str, ...] = option((), "LoRA: FILE or FILE:SCALE, once for each", group=MODEL)
    lora_allow_partial: bool = option(False, "use a LoRA that fits only in part", group=MODEL)
    embedding: tuple[str, ...] = option((), "textual inversion: FILE or FILE:WORD", group=MODEL)
    controlnet: tuple[str, ...] = option(
        (), "ControlNet: a folder or file, once for each", group=MODEL)
    adapter: str = option(None, "what a paper's training saved: a folder or file", group=MODEL)

    steps: int = option(30, "steps from noise to picture", group=HOW)
    guidance: float = option(5.0, "how much to follow the prompt; 1 or less: off", group=HOW)
    sampler: str = option(None, f"one of {', '.join(SAMPLERS)}", group=HOW)
    spacing: str = option(
        None, "of the timesteps; Turbo and Lightning need trailing", OVERRIDES["spacing"],
        group=HOW)
    prediction: str = option(
        None, "what the model predicts, if its file is silent", OVERRIDES["prediction"], group=HOW)
    zero_snr: bool = option(
        None, "its noisiest timestep is pure noise (zero terminal SNR), if its file is silent",
        group=HOW)
    karras: bool = option(None, "Karras' noise levels; as the model's file says", group=HOW)
    device: str = option(None, "cuda, mps or cpu; the best there is if left out", group=HOW)
    dtype: str = option(None, "what suits device and model if left out", tuple(DTYPES), group=HOW)
    graph: bool = option(None, "each step as one CUDA graph; default on NVIDIA's GPUs", group=HOW)

    image: str = option(None, "picture to start from", group=PICTURES)
    strength: float = option(0.75, "how much to change --image: above 0 up to 1", group=PICTURES)
    mask: str = option(
        None, "white: draw there; black or transparent: keep --image", group=PICTURES)
    control: tuple[str, ...] = option(
        (), "picture to follow, once for each --controlnet", group=PICTURES)
    control_scale: tuple[float, ...] = option(
        (), "how closely: 1 as trained, 0 off", group=PICTURES)
    edit: str = option(None, "picture to change, with a model trained to edit", group=PICTURES)
    image_guidance: float = option(
        1.5, "how much to follow --edit or --source; 1 or less: off", group=PICTURES)
    source: tuple[str, ...] = option(
        (), "picture given to --adapter, once for each", group=PICTURES)
    task: str = option(
        None, "what --adapter should do, if it can do several things", group=PICTURES)

    original_size: str = option(
        None, "WIDTHxHEIGHT of the photo that the picture is a crop of", group=SIZES)
    crop: str = option("0,0", "LEFT,TOP of that crop", group=SIZES)
    target_size: str = option(None, "WIDTHxHEIGHT that is wanted; --size if left out", group=SIZES)

    out: str = option(
        "pictures", "folder, or name.png, .jpg or .webp; never overwrites", group=WHERE)
    film: str = option(None, "PNG for the predicted picture after every step", group=WHERE)
    from_: str = option(None, "picture drawn here, to take settings from; flags win", group=WHAT)
    selftest: bool = option(False, "compare this device with the CPU, and stop", group=HOW)

    GROUPS = (WHAT, MODEL, ADAPTER, HOW, PICTURES, SIZES, WHERE)

    def __post_init__(self):
        for name, value in vars(self).items():
            if name in ("prompt", "negative"):
                continue
            if value == "" or isinstance(value, tuple) and "" in value:
                raise ParameterError(name, "is empty; name a value or leave it out")


# The settings that are not saved in a picture.
NOT_SAVED = ("prompts", "out", "film", "device", "graph", "from_", "selftest")

# What a picture may ask for by itself; more is drawn only if flags ask for it.
MOST_VALUES = 100           # pictures, and values of one setting
MOST_PIXELS = 2048 * 2048
NOT_HERE = r"[/\\]{2}|[a-z][a-z0-9+.-]+://|[^\0]*\0"  # //server, \\server, http://; no name at all

# What does nothing without one of the others.
NEEDS = {
    "lora_allow_partial": ("lora",),
    "strength": ("image", "source"),
    "mask": ("image",),
    "control": ("controlnet",),
    "control_scale": ("controlnet",),
    "image_guidance": ("edit", "source"),
    "source": ("adapter",),
    "task": ("adapter",)}


def main(argv: list[str] | None = None) -> int:
    """Read the command line and draw.

    Returns the exit code: 0 done, 1 a failed self-test, 2 a mistake in the input.
    """
    try:
        config, paper = read_flags(sys.argv[1:] if argv is None else argv)
        choose_threads(weight_bytes(config.model))
        with enough_memory("choose a smaller --size, or --dtype bf16"):
            if config.selftest:
                return selftest(config)
            draw(config, paper)
            return 0
    except (InputError, OSError) as error:
        say(message_of(error))
        return 2


def say(text: str):
    """Write a line for the user. The paths of pictures are all that goes to standard output."""
    print(f"sample.py: {printable(text)}", file=sys.stderr)


# Drawing ------------------------------------------------------------------------------------------

@dataclass
class Adapter:
    """What --adapter adds to a drawing. A paper draws with it, see minipic/papers/__init__.py."""

    paper: ModuleType
    trained: object             # what the paper's load_adapter returned
    sources: list[Image.Image]  # the pictures of --source
    task: str | None
    options: object             # the paper's DrawOptions


def draw(config: Settings, paper: ModuleType | None):
    """Load, encode, sample, decode, save."""
    rank = int(os.environ.get("RANK", 0))  # set by torchrun
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device, dtype = choose_device(config)
    warn_if_slow(config, device)
    prompts = read_prompts(config, paper)[rank::world_size]  # each process draws its share
    single_path, grid_path = output_paths(config)
    if config.seed == -1:
        config = replace(config, seed=secrets.randbelow(2**32))
        say(f"seed {config.seed}")
    settings = draw_settings(config)
    sources = [open_picture(path) for path in config.source]

    # Load.
    pipeline, refiner = load(config, device, DTYPES[dtype])
    settings = replace(settings, refiner=refiner)
    if paper:
        adapter = add_adapter(pipeline, config, paper, sources)
        settings, drawn_size = paper.plan(
            pipeline, adapter.trained, settings, sources, adapter.task, adapter.options)
    else:
        adapter = None
        settings, _ = pipeline.plan(settings)
        drawn_size = settings.size
    pictures_at_once = pipeline.pictures_at_once(drawn_size)
    saved_settings = settings_to_save(config, settings, dtype)

    # Encode all prompts first: the text encoders give their memory back before the UNet is read,
    # and would have to be read again for the second prompt.
    for prompt in prompts:
        encode(pipeline, adapter, replace(settings, prompt=prompt))

    for prompt in prompts:
        pictures, film = [], []
        while len(pictures) < config.n:
            # Sample and decode as many as fit into the memory; the film is of the first picture.
            first = len(pictures)
            n = min(pictures_at_once, config.n - first)
            seed = nth_seed(config.seed, first)
            batch = replace(settings, prompt=prompt, seed=seed, n=n)
            batch_film = film if config.film and first == 0 else None
            drawn = draw_batch(pipeline, adapter, batch, batch_film, show_progress=rank == 0)

            # Save each.
            for i, picture in enumerate(drawn):
                own = saved_settings | {"prompt": prompt, "n": 1, "seed": nth_seed(seed, i)}
                path = save_new(picture, single_path, own)
            pictures += drawn
        if config.n > 1:
            labels = [f"seed {nth_seed(config.seed, i)}" for i in range(config.n)]
            grid = image_grid(pictures, labels, title=prompt)
            path = save_new(grid, grid_path, saved_settings | {"prompt": prompt})
        print(path, flush=True)
        if config.film:
            frames = pipeline.decode(torch.cat(film))
            labels = [f"step {i + 1}" for i in range(len(frames))]
            sheet = image_grid(frames, labels, title=prompt)
            own = saved_settings | {"prompt": prompt, "n": 1}
            print(save_new(sheet, config.film, own), flush=True)


def load(
        config: Settings, device: torch.device,
        dtype: torch.dtype) -> tuple[Pipeline, Pipeline | None]:
    """(the model of --model with all that is added to it, the --refiner or None).

    Each network is read when it is first needed.
    """
    load_options = {"dtype": dtype, "device": device, "lazy": True, "cast": True}
    pipeline = Pipeline.load(config.model, vae=config.vae, **load_options)
    pipeline.schedule = pipeline.schedule.override(
        config.spacing, config.prediction, config.karras, config.zero_snr)
    warn_if_few_steps(config, pipeline.schedule)
    add_files(pipeline, config)
    refiner = None
    if config.refiner:
        refiner = Pipeline.load(config.refiner, **load_options)
        refiner.schedule = refiner.schedule.override(config.spacing, karras=config.karras)
    return pipeline, refiner


def warn_if_few_steps(config: Settings, schedule: Schedule):
    """Say so where a single file, which rarely says how to draw with it, would start late."""
    few = config.steps <= FEW_STEPS and schedule.timestep_spacing == "leading"
    if few and not config.spacing and find_file(config.model).is_file():
        warnings.warn(
            f"--steps {config.steps}: models of few steps, such as Turbo and Lightning, need "
            "--spacing trailing, and their single files do not say so", stacklevel=1)


def add_files(pipeline: Pipeline, config: Settings):
    """Add every --lora FILE[:SCALE], --embedding FILE[:WORD] and --controlnet."""
    read_number = finite(float)  # as argparse reads the numbers of other flags
    for text in config.lora:
        path, scale = split_file(text)
        try:
            scale = read_number(scale or 1)
        except ValueError:
            raise ParameterError(
                "lora", f"{path}:{scale}: {scale!r} is no number; write FILE:0.8") from None
        pipeline.add_lora(path, scale, config.lora_allow_partial)
    for text in config.embedding:
        path, word = split_file(text)
        pipeline.add_embedding(path, word or None)
    for path in config.controlnet:
        pipeline.add_controlnet(path)


def add_adapter(
        pipeline: Pipeline, config: Settings, paper: ModuleType,
        sources: list[Image.Image]) -> Adapter:
    """Add the file of --adapter to the pipeline."""
    _, file = find_adapter(config.adapter)
    trained = paper.load_adapter(pipeline, file)
    values = {}
    for field in dataclasses.fields(paper.DrawOptions):
        values[field.name] = getattr(config, field.name)
    return Adapter(paper, trained, sources, config.task, paper.DrawOptions(**values))


def encode(pipeline: Pipeline, adapter: Adapter | None, settings: DrawSettings):
    """Encode the prompt. The pipeline and the refiner remember what they have encoded."""
    prompt = settings.prompt
    if adapter:
        prompt = adapter.paper.prompt_for(adapter.trained, prompt, adapter.task)
    pipeline.encode(prompt, settings.negative)
    if settings.refiner:
        settings.refiner.encode(settings.prompt, settings.negative)


def draw_batch(
        pipeline: Pipeline, adapter: Adapter | None, settings: DrawSettings,
        film: list | None, show_progress: bool) -> list[Image.Image]:
    """Draw settings.n pictures together, under a progress bar.

    film: a list that gets the first picture's predicted x0 [1,4,h,w] after every step, or None.
    """
    drawing = None if adapter else pipeline.prepare(settings)
    steps = settings.steps if adapter else len(drawing)  # image-to-image draws fewer
    with tqdm(
            total=steps, desc=printable(settings.prompt[:40]), disable=not show_progress,
            leave=False, mininterval=0) as bar:
        def on_step(x, x0):
            bar.update()
            if film is not None:
                film.append(x0[:1])

        if adapter:
            return adapter.paper.draw(
                pipeline, adapter.trained, settings, adapter.sources, adapter.task,
                adapter.options, on_step)
        for x, x0 in pipeline.denoise(drawing):
            on_step(x, x0)
        return pipeline.decode(x)


def settings_to_save(config: Settings, settings: DrawSettings, dtype: str) -> dict:
    """What a PNG keeps, for --from: the flags, with the values that stood for those left out."""
    width, height = settings.size
    saved = dataclasses.asdict(config)
    for name in NOT_SAVED:
        del saved[name]
    return saved | {"dtype": dtype, "sampler": settings.sampler, "size": f"{width}x{height}"}


def selftest(config: Settings) -> int:
    """Draw one picture on the CPU in fp32 and on the device: devices can go wrong silently."""
    device, dtype = choose_device(config)
    levels = []
    for kind in ((torch.float32, "cpu"), (DTYPES[dtype], device)):
        pipeline = Pipeline.load(config.model, *kind)
        picture = pipeline.generate("a red cube", steps=8, sampler="euler", progress=False)[0]
        levels.append(127.5 * to_tensor(picture))
    expected, drawn = levels
    difference = (expected - drawn).abs()
    limit = 0.5 if dtype == "fp32" else 4.0
    is_fine = difference.mean().item() <= limit and expected.std() > 1
    verdict = "fine" if is_fine else f"WRONG, at most {limit} on average expected"
    print(
        f"{device} in {dtype} against the CPU in fp32: grey levels differ by "
        f"{difference.mean():.3f} on average, {difference.max():.0f} at most: {verdict}")
    return 0 if is_fine else 1


# The command line ---------------------------------------------------------------------------------

def read_flags(argv: list[str]) -> tuple[Settings, ModuleType | None]:
    """(the flags' values, the paper of --adapter or None).

    An adapter, given or saved in the picture of --from, adds its paper's flags. --from fills in
    what is not given.
    """
    picture = find_flag("--from", argv)
    saved_settings = settings_of_picture(picture) if picture else {}
    adapter = find_flag("--adapter", argv)
    if adapter is None:
        adapter = saved_settings.get("adapter")
        check_is_here(picture, "adapter", adapter)
    if adapter is None:
        check_is_model(find_flag("--model", argv))
    paper, cls = None, Settings
    if adapter and isinstance(adapter, str):
        name, file = find_adapter(adapter)
        paper = load_paper(name)
        tasks = paper.tasks(file) if hasattr(paper, "tasks") else ()
        cls = settings_with(paper.DrawOptions, tasks)
    given = parse_argv(cls, argv, "sample.py", positional=("prompt",))
    taken = {}
    for field in dataclasses.fields(cls):
        is_given = field.name in given or (field.name == "prompt" and "prompts" in given)
        if field.name in saved_settings and not is_given:
            taken[field.name] = saved_value(picture, field, saved_settings[field.name])
    config = cls(**(taken | given))
    check_effects(given, config)
    if taken:
        values = [f"{name}={value!r}" for name, value in taken.items() if value not in ((), False)]
        say(f"{picture}: takes {', '.join(values)}")
    return config, paper


def check_is_model(path: str | None):
    """ParameterError for an adapter. Whatever else is no model is told when it is loaded."""
    if path is None:
        return
    try:
        name, _ = find_adapter(path)
    except InputError:
        return
    raise ParameterError(
        "model", f"{path} is no model but was made by train.py {name}; give it with --adapter")


def check_effects(given: dict, config: Settings):
    """ParameterError for a flag that does nothing, because another one is missing."""
    for name, others in NEEDS.items():
        if name in given and not any(getattr(config, other) for other in others):
            flags = " or ".join(flag_of(other) for other in others)
            raise ParameterError(name, f"needs {flags}; without it this does nothing")
    if "negative" in given and config.guidance <= 1 and not config.edit:
        raise ParameterError(
            "negative", "does nothing where --guidance is off; choose one above 1 or leave it out")


def settings_with(options: type, tasks: tuple[str, ...]) -> type:
    """A subclass of Settings that also has the fields of a paper's DrawOptions, as flags.

    In --help those that name no group are listed under "this adapter". tasks: what --task can be;
    empty where that is not known.
    """
    fields = [("task", str, option(None, choices=tasks or None))]
    for field in dataclasses.fields(options):
        metadata = dict(field.metadata)
        metadata["group"] = metadata.get("group") or ADAPTER
        own = dataclasses.field(default=field.default, metadata=metadata)
        fields.append((field.name, field.type, own))
    return dataclasses.make_dataclass(
        "Settings", fields, bases=(Settings,), namespace={"__doc__": Settings.__doc__})


def settings_of_picture(path: str) -> dict:
    """The settings in a picture that sample.py drew, {field: value as in JSON}, without None."""
    saved = read_saved_settings(path)
    loras = saved.get("lora")
    if saved.get("source") and "adapter" not in saved and isinstance(loras, list) and loras:
        # Before there was --adapter, the first --lora drew beside --source.
        adapter, scale = split_file(str(loras[0]))
        saved |= {"adapter": adapter, "lora": loras[1:]}
        if scale not in ("", "1", "1.0"):
            say(f"{path}: was drawn with {adapter} at a scale of {scale}, and an adapter has none; "
                "it is drawn with all of it")
    for name, value in list(saved.items()):
        if name in NOT_SAVED or value is None:
            del saved[name]
    return saved


def check_is_here(path: str, name: str, value: Any):
    """InputError for a setting in a picture that names a file on another computer.

    Anybody may have written the picture, and that computer would learn who opens it.
    """
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and re.match(NOT_HERE, text, re.IGNORECASE):
            raise InputError(
                f"{path}: its setting {name} is {text!r}, and files of other computers are not "
                f"opened for a picture; give {flag_of(name)} or leave --from out")


def saved_value(path: str, field: dataclasses.Field, saved: Any) -> Any:
    """A setting in a picture as the value of its field. InputError for what is not taken."""
    if field.name not in ("prompt", "negative"):
        check_is_here(path, field.name, saved)
    value = saved
    # A picture has one prompt, and older ones had one ControlNet.
    if typing.get_origin(field.type) is tuple:
        value = tuple(saved) if isinstance(saved, list) else (saved,)
    if field.name == "seed" and type(value) is int and -SEEDS // 2 <= value < 0:
        value += SEEDS  # PyTorch takes both for the same seed
    if not flag_accepts(field, value):
        raise InputError(
            f"{path}: its setting {field.name} is {saved!r}, which no flag can give; leave "
            "--from out")
    check_amount(path, field.name, value)
    return value


def check_amount(path: str, name: str, value: Any):
    """InputError for a setting in a picture that asks for more than it may."""
    amount, most = 1, MOST_VALUES
    if isinstance(value, tuple):
        amount = len(value)
    if name == "n":
        amount = value
    if name == "size":
        width, height = parse_pair(name, value, "x")
        amount, most = width * height, MOST_PIXELS
    if amount > most:
        raise InputError(
            f"{path}: its setting {name} asks for {amount:,}, more than {most:,}; give "
            f"{flag_of(name)} to say how much to draw")


def parse_pair(name: str, text: str | None, mark: str) -> tuple[int, int] | None:
    """A setting such as "640x480" -> (640, 480); None stays None."""
    if text is None:
        return None
    if not re.fullmatch(rf"\d{{1,6}}{mark}\d{{1,6}}", text):
        raise ParameterError(name, f"{text}: expected two whole numbers such as 64{mark}64")
    first, second = text.split(mark)
    return int(first), int(second)


def split_file(text: str) -> tuple[str, str]:
    """'style.safetensors:0.8' -> ('style.safetensors', '0.8'); '' where nothing follows.

    Instead of a file it may be a folder.
    """
    match = re.fullmatch(r"(.*\.safetensors)(?::(.*))?", text, re.IGNORECASE)
    if match is None:
        folder, _, rest = text.rpartition(":")
        is_folder = folder and find_file(folder).is_dir() and not find_file(text).exists()
        return (folder, rest) if is_folder else (text, "")
    return match[1], match[2] or ""


def read_prompts(config: Settings, paper: ModuleType | None) -> list[str]:
    """All prompts: those given directly, then the lines of --prompts.

    Without any, the empty one for a paper that draws without a prompt.
    """
    prompts = list(config.prompt)
    if config.prompts:
        lines = read_text(Path(config.prompts), MAX_PROMPTS).splitlines()
        lines = [line.strip() for line in lines if line.strip()]
        if not lines:
            raise ParameterError("prompts", f"{config.prompts}: has no line with a prompt")
        prompts += lines
    try:
        "".join([*prompts, config.negative or ""]).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"a prompt is not UTF-8 ({error.reason}); set the terminal to UTF-8") from error
    if not prompts and getattr(paper, "UNCONDITIONAL", False):
        return [""]
    if not prompts:
        raise InputError('nothing to draw; give a prompt, e.g. python sample.py "a red cube"')
    return prompts


def choose_device(config: Settings) -> tuple[torch.device, str]:
    """(device, name of the dtype) to draw with."""
    best = "cpu"
    if torch.backends.mps.is_available():
        best = "mps"
    if torch.cuda.is_available():
        best = "cuda"
    name = config.device or best
    if name == best == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))  # set by torchrun
        name = f"cuda:{local_rank % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the meta device has no numbers
    except (RuntimeError, AssertionError, ImportError) as error:  # unknown, or not in this PyTorch
        raise ParameterError("device", f"{name} is not available here; use {best}") from error
    return device, config.dtype or choose_dtype(config, device)


def choose_dtype(config: Settings, device: torch.device) -> str:
    """The dtype in which this device draws fast with this model."""
    if device.type == "cuda":
        return "bf16" if computes_bf16(device) else "fp16"
    is_large = weight_bytes(config.model) > LARGE_MODEL
    if device.type == "mps":
        return "fp16" if is_large else "fp32"
    return "bf16" if is_large and computes_bf16(device) else "fp32"


def weight_bytes(path: str) -> int:
    """The size of a model's weight files, in bytes."""
    model = find_file(path)
    files = [model]
    if model.is_dir():
        files = [*model.glob("*.safetensors"), *model.glob("*/*.safetensors")]
    return sum(file.stat().st_size for file in files if file.exists())


def warn_if_slow(config: Settings, device: torch.device):
    """Say so where a CPU has no instructions for the dtype that was asked for."""
    slow = config.dtype == "fp16" or (config.dtype == "bf16" and not computes_bf16(device))
    if device.type == "cpu" and slow:
        warnings.warn(
            f"--dtype {config.dtype}: this CPU computes it many times slower than fp32; "
            "leave it out", stacklevel=1)


def output_paths(config: Settings) -> tuple[Path, Path]:
    """(where single pictures go, where grids go).

    The folder must be writable before anything is drawn.
    """
    out = Path(config.out)
    ending = out.suffix.lower()
    if out.is_dir() or ending not in Image.registered_extensions():
        single = out / "picture.png"
        grid = out / "grid.png"
    elif ending in WRITTEN:
        single = out
        grid = out.with_stem(f"{out.stem}-grid")
    else:
        raise ParameterError(
            "out", f"{out}: pictures are not written as {ending}; choose {', '.join(WRITTEN)}")
    check_writable(f"--out {config.out}", single.parent)
    if config.film:
        film = Path(config.film)
        if film.suffix.lower() != ".png":
            raise ParameterError("film", f"{config.film} must be the name of a .png file")
        check_writable(f"--film {config.film}", film.parent)
    return single, grid


def open_controls(config: Settings) -> list[tuple]:
    """[(picture, scale), ...], one for every --controlnet."""
    networks, names = config.controlnet, config.control
    scales = config.control_scale or (1.0,) * len(names)
    if networks and not names:
        raise ParameterError("controlnet", f"{networks[0]} needs --control, the picture to follow")
    if networks and not len(networks) == len(names) == len(scales):
        raise InputError(
            f"--controlnet is given {len(networks)} times, --control {len(names)} and "
            f"--control-scale {len(scales)}; give all equally often, in the same order")
    for scale in scales:
        if scale < 0:
            raise ParameterError(
                "control_scale", f"choose 0 (off) to about 2, not {scale}; 1 is as trained")
    return [(open_control(name), scale) for name, scale in zip(names, scales)]


def draw_settings(config: Settings) -> DrawSettings:
    """What the pipeline should draw, with all given pictures opened; the prompt comes later."""
    image = open_picture(config.image) if config.image else None
    mask = open_mask(config.mask) if config.mask else None
    edit = open_picture(config.edit) if config.edit else None
    return DrawSettings(
        prompt="",
        negative=config.negative,
        steps=config.steps,
        guidance=config.guidance,
        seed=config.seed,
        n=config.n,
        size=parse_pair("size", config.size, "x"),
        sampler=config.sampler,
        image=image,
        strength=config.strength,
        mask=mask,
        control=tuple(open_controls(config)),
        edit=edit,
        image_guidance=config.image_guidance,
        original_size=parse_pair("original_size", config.original_size, "x"),
        crop=parse_pair("crop", config.crop, ","),
        target_size=parse_pair("target_size", config.target_size, "x"),
        graph=config.graph)


if __name__ == "__main__":
    if sys.stdout:  # Python has None for what was closed before
        sys.stdout.reconfigure(errors="backslashreplace")  # a path that the terminal cannot show
    warnings.showwarning = lambda message, *about, **more: say(str(message))
    sys.exit(main())
