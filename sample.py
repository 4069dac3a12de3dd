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

import dataclasses
import os
import re
import sys
import typing
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from PIL import Image
from tqdm import tqdm

from minipic.common import (
    InputError, ParameterError, computes_bf16, enough_memory, find_file, has_type, message_of)
from minipic.diffusion.samplers import SAMPLERS
from minipic.figures import image_grid
from minipic.image import open_picture, read_settings, save_new, to_tensor
from minipic.papers import find_adapter, load_paper
from minipic.pipeline import DrawSettings, Pipeline
from minipic.training.flags import LARGEST_NUMBER, finite, option, parse_argv
from minipic.weights.files import check_writable

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
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
    seed: int = option(0, "of the first picture; the next have seed + 1, ...", group=WHAT)
    size: str = option(None, "WIDTHxHEIGHT, multiples of 8; the model's if left out", group=WHAT)
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
    device: str = option(None, "cuda, mps or cpu; the best there is if left out", group=HOW)
    dtype: str = option(None, "what suits device and model if left out", tuple(DTYPES), group=HOW)
    graph: bool = option(None, "each step as one CUDA graph; default on NVIDIA's GPUs", group=HOW)

    image: str = option(None, "picture to start from", group=PICTURES)
    strength: float = option(0.75, "how much to change --image: above 0 up to 1", group=PICTURES)
    mask: str = option(None, "white: draw there; black: keep --image", group=PICTURES)
    control: tuple[str, ...] = option(
        (), "picture to follow, once for each --controlnet", group=PICTURES)
    control_scale: tuple[float, ...] = option(
        (), "how closely: 1 as trained, 0 off", group=PICTURES)
    edit: str = option(None, "picture to change, with a model trained to edit", group=PICTURES)
    image_guidance: float = option(
        1.5, "how much to keep of --edit; 1 or less: off", group=PICTURES)
    source: tuple[str, ...] = option(
        (), "picture given to --adapter, once for each", group=PICTURES)
    task: str = option(
        None, "what --adapter should do, if it can do several things", group=PICTURES)

    original_size: str = option(
        None, "WIDTHxHEIGHT of the photo it is drawn as a cut of", group=SIZES)
    crop: str = option("0,0", "LEFT,TOP of that cut", group=SIZES)
    target_size: str = option(None, "WIDTHxHEIGHT that is wanted; --size if left out", group=SIZES)

    out: str = option("pictures", "folder or name.png; never overwrites", group=WHERE)
    film: str = option(None, "PNG for the predicted picture after every step", group=WHERE)
    from_: str = option(None, "PNG drawn here, to take settings from; flags win", group=WHERE)
    selftest: bool = option(False, "compare this device with the CPU, and stop", group=WHERE)

    GROUPS = (WHAT, MODEL, ADAPTER, HOW, PICTURES, SIZES, WHERE)

    def __post_init__(self):
        for name, value in vars(self).items():
            if name in ("prompt", "negative"):
                continue
            if value == "" or isinstance(value, tuple) and "" in value:
                raise ParameterError(name, "is empty; name a value or leave it out")


# The settings that are not saved in a picture.
NOT_SAVED = ("prompts", "out", "film", "device", "graph", "from_", "selftest")


def main(argv: list[str] | None = None) -> int:
    """Read the command line and draw.

    Returns the exit code: 0 done, 1 a failed self-test, 2 a mistake in the input.
    """
    try:
        config, paper = read_flags(sys.argv[1:] if argv is None else argv)
        with enough_memory("choose a smaller --size, or --dtype bf16"):
            if config.selftest:
                return selftest(config)
            draw(config, paper)
            return 0
    except (InputError, OSError) as error:
        print(f"sample.py: {message_of(error)}", file=sys.stderr)
        return 2


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
    prompts = read_prompts(config)[rank::world_size]  # each process draws its share
    single_path, grid_path = output_paths(config)
    settings = draw_settings(config)
    sources = open_sources(config, paper)

    # Load.
    pipeline, refiner = load(config, device, DTYPES[dtype])
    settings = replace(settings, refiner=refiner)
    if paper:
        adapter = load_adapter(pipeline, config, paper, sources)
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
            batch = replace(settings, prompt=prompt, seed=config.seed + first, n=n)
            batch_film = film if config.film and first == 0 else None
            drawn = draw_batch(pipeline, adapter, batch, batch_film, show_progress=rank == 0)

            # Save each.
            for i, picture in enumerate(drawn):
                own = saved_settings | {"prompt": prompt, "n": 1, "seed": batch.seed + i}
                path = save_new(picture, single_path, own)
            pictures += drawn
        if config.n > 1:
            path = save_grid(pictures, grid_path, saved_settings | {"prompt": prompt})
        print(path)
        if config.film:
            frames = pipeline.decode(torch.cat(film))
            print(save_film(frames, config.film, saved_settings | {"prompt": prompt, "n": 1}))


def load(
        config: Settings, device: torch.device,
        dtype: torch.dtype) -> tuple[Pipeline, Pipeline | None]:
    """(the model of --model with all that is added to it, the --refiner or None).

    Each network is read when it is first needed.
    """
    load_options = {"dtype": dtype, "device": device, "lazy": True, "cast": True}
    pipeline = Pipeline.load(config.model, vae=config.vae, **load_options)
    add_files(pipeline, config)
    refiner = Pipeline.load(config.refiner, **load_options) if config.refiner else None
    return pipeline, refiner


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


def load_adapter(
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
        prompt = adapter.paper.prompt_for(adapter.trained, prompt)
    pipeline.encode(prompt, settings.negative)
    if settings.refiner:
        settings.refiner.encode(settings.prompt, settings.negative)


def draw_batch(
        pipeline: Pipeline, adapter: Adapter | None, settings: DrawSettings,
        film: list | None, show_progress: bool) -> list[Image.Image]:
    """Draw settings.n pictures together, under a progress bar.

    film: a list that gets the first picture's predicted x0 [1,4,h,w] after every step, or None.
    """
    with tqdm(
            total=settings.steps, desc=settings.prompt[:40], disable=not show_progress,
            leave=False, mininterval=0) as bar:
        def on_step(x, x0):
            bar.update()
            if film is not None:
                film.append(x0[:1])

        if adapter:
            return adapter.paper.draw(
                pipeline, adapter.trained, settings, adapter.sources, adapter.task,
                adapter.options, on_step)
        drawing = pipeline.prepare(settings)
        bar.reset(total=len(drawing))  # image-to-image draws fewer steps
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


def save_grid(pictures: list[Image.Image], path: Path, saved_settings: dict) -> Path:
    """All pictures of one prompt in one PNG, under their seeds."""
    first_seed = saved_settings["seed"]
    labels = [f"seed {first_seed + i}" for i in range(len(pictures))]
    grid = image_grid(pictures, labels, title=saved_settings["prompt"])
    return save_new(grid, path, saved_settings)


def save_film(frames: list[Image.Image], path: str, saved_settings: dict) -> Path:
    """The predicted picture after every step, all in one PNG."""
    labels = [f"step {i + 1}" for i in range(len(frames))]
    sheet = image_grid(frames, labels, title=saved_settings["prompt"])
    return save_new(sheet, path, saved_settings)


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
    paper, cls = None, Settings
    adapter = find_flag("--adapter", argv)
    picture = find_flag("--from", argv)
    if adapter is None and picture:
        adapter = read_settings(picture).get("adapter")
    if adapter and isinstance(adapter, str):
        name, _ = find_adapter(adapter)
        paper = load_paper(name)
        cls = settings_with(paper.DrawOptions)
    given = parse_argv(cls, argv, "sample.py", positional=("prompt",))
    if not given.get("from_"):
        return cls(**given), paper
    saved_settings = settings_of_picture(given["from_"], cls)
    if "prompt" in given or "prompts" in given:
        saved_settings.pop("prompt", None)
    return cls(**(saved_settings | given)), paper


def find_flag(flag: str, argv: list[str]) -> str | None:
    """The last value of a flag that decides which other flags there are."""
    value = None
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            value = argv[i + 1]
        if word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return value


def settings_with(options) -> type:
    """A subclass of Settings that also has the fields of a paper's DrawOptions, as flags.

    In --help those that name no group are listed under "this adapter".
    """
    fields = []
    for field in dataclasses.fields(options):
        metadata = dict(field.metadata)
        metadata["group"] = metadata.get("group") or ADAPTER
        own = dataclasses.field(default=field.default, metadata=metadata)
        fields.append((field.name, field.type, own))
    return dataclasses.make_dataclass(
        "Settings", fields, bases=(Settings,), namespace={"__doc__": Settings.__doc__})


def settings_of_picture(path: str, cls) -> dict:
    """The settings in a PNG that sample.py wrote. InputError for a value that no flag can give."""
    settings = {}
    saved_settings = read_settings(path)
    for field in dataclasses.fields(cls):
        saved = saved_settings.get(field.name)
        if field.name in NOT_SAVED or saved is None:
            continue
        value = saved
        # A picture has one prompt, and older ones had one ControlNet.
        if typing.get_origin(field.type) is tuple:
            value = tuple(saved) if isinstance(saved, list) else (saved,)
        if not flag_accepts(field, value):
            raise InputError(
                f"{path}: its setting {field.name} is {saved!r}, which no flag can give; leave "
                "--from out")
        settings[field.name] = value
    return settings


def flag_accepts(field: dataclasses.Field, value) -> bool:
    """Whether the command line accepts a value for this field: its type, choices and size."""
    if not has_type(value, field.type):
        return False
    choices = field.metadata.get("choices")
    for item in value if isinstance(value, tuple) else (value,):
        if choices and item not in choices:
            return False
        # Written so that it is also false of NaN, which is neither smaller nor larger.
        if isinstance(item, (int, float)) and not abs(item) < LARGEST_NUMBER:
            return False
    return True


def parse_pair(config: Settings, name: str, mark: str) -> tuple[int, int] | None:
    """A setting such as "640x480" -> (640, 480); None stays None."""
    text = getattr(config, name)
    if text is None:
        return None
    if not re.fullmatch(rf"\d{{1,6}}{mark}\d{{1,6}}", text):
        raise ParameterError(name, f"{text}: expected two whole numbers such as 64{mark}64")
    first, second = text.split(mark)
    return int(first), int(second)


def split_file(text: str) -> tuple[str, str]:
    """'style.safetensors:0.8' -> ('style.safetensors', '0.8'); '' where nothing follows."""
    match = re.fullmatch(r"(.*\.safetensors)(?::(.*))?", text, re.IGNORECASE)
    if match is None:
        return text, ""
    return match[1], match[2] or ""


def read_prompts(config: Settings) -> list[str]:
    """All prompts: those given directly, then the lines of --prompts."""
    prompts = list(config.prompt)
    if config.prompts:
        try:
            lines = Path(config.prompts).read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise ParameterError(
                "prompts", f"{config.prompts} cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise ParameterError(
                "prompts", f"{config.prompts} is not UTF-8; save it as UTF-8") from error
        prompts += [line.strip() for line in lines if line.strip()]
    try:
        "".join([*prompts, config.negative or ""]).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"a prompt is not UTF-8 ({error.reason}); set the terminal to UTF-8") from error
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
    model = find_file(config.model)
    files = model.rglob("*.safetensors") if model.is_dir() else [model]
    is_large = sum(file.stat().st_size for file in files if file.exists()) > LARGE_MODEL
    if device.type == "mps":
        return "fp16" if is_large else "fp32"
    return "bf16" if is_large and computes_bf16(device) else "fp32"


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
    single = Path(config.out)
    grid = single.with_name(f"{single.stem}-grid.png")
    if single.suffix.lower() != ".png":
        single, grid = single / "picture.png", single / "grid.png"
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
    return [(open_picture(name), scale) for name, scale in zip(names, scales)]


def open_if_given(name: str | None) -> Image.Image | None:
    """The picture of a file; None stays None."""
    return open_picture(name) if name else None


def open_sources(config: Settings, paper: ModuleType | None) -> list[Image.Image]:
    """The pictures of --source."""
    sources = [open_picture(path) for path in config.source]
    if sources and not paper:
        raise ParameterError("source", "needs --adapter, what the training of a paper saved")
    return sources


def draw_settings(config: Settings) -> DrawSettings:
    """What the pipeline should draw, with all given pictures opened; the prompt comes later."""
    image = open_if_given(config.image)
    mask = open_if_given(config.mask)
    edit = open_if_given(config.edit)
    return DrawSettings(
        prompt="",
        negative=config.negative,
        steps=config.steps,
        guidance=config.guidance,
        seed=config.seed,
        n=config.n,
        size=parse_pair(config, "size", "x"),
        sampler=config.sampler,
        image=image,
        strength=config.strength,
        mask=mask,
        control=tuple(open_controls(config)),
        edit=edit,
        image_guidance=config.image_guidance,
        original_size=parse_pair(config, "original_size", "x"),
        crop=parse_pair(config, "crop", ","),
        target_size=parse_pair(config, "target_size", "x"),
        graph=config.graph)


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *about, **more: f"sample.py: {message}\n"
    sys.exit(main())
