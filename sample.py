"""Draws pictures from prompts, read from top to bottom.

    python sample.py "a small red sphere left of a large blue cube"          four pictures in a labelled grid
    python sample.py "a cat" --model weights/sdxl-base --n 1                 official weights: a folder or a single file
    python sample.py "a cat" --model weights/sdxl-turbo --steps 1 --guidance 0
    python sample.py "snow" --image photo.png --strength 0.6 --mask m.png    redraw a picture, or its white part only
    python sample.py "a cat" --model weights/sdxl-base --lora style.safetensors:0.8
    python sample.py "a red cube" --controlnet runs/controlnet/model --control edges.png --control-scale 0.8
    python sample.py "make the cube green" --model runs/edit/model --edit picture.png --image-guidance 1.5
    python sample.py "make the cube green" --lora runs/onepic/model/lora.safetensors --source picture.png
    python sample.py --from pictures/grid.png --steps 50                     the settings of an earlier picture again
    torchrun --nproc_per_node=2 sample.py --prompts prompts.txt              several GPUs share the prompts
"""

import dataclasses
import functools
import os
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from minipic.common import InputError, bounded, computes_bf16, enough_memory, from_argv, option
from minipic.image import labelled_grid, open_picture, read_settings, save_new, to_tensor
from minipic.methods import onepic
from minipic.pipeline import Pipeline
from minipic.weights import writable

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LARGE = 1 << 30  # bytes of weights from which a CPU draws in bf16, where it computes in it


@dataclass
class Settings:
    """Draw pictures from prompts."""

    prompt: tuple[str, ...] = option((), "what to draw; several prompts give several grids")
    model: str = option("weights/tiny", "diffusers folder or single .safetensors file")
    prompts: str = option(None, "text file in UTF-8 with a prompt a line, besides those given directly")
    negative: str = option(None, "what not to draw")
    steps: int = option(30, "steps from noise to picture")
    guidance: float = option(5.0, "how much to follow the prompt; 1 or less turns it off, as Turbo wants it")
    seed: int = option(0, "of the first picture; the others follow with seed + 1, seed + 2, ...")
    n: int = option(4, "pictures a prompt")
    size: str = option(None, "WIDTHxHEIGHT in pixels, multiples of 8; the model's own if left out")
    sampler: str = option(None, "euler, euler_ancestral, ddim, dpmpp_2m or heun; the model's own if left out")
    image: str = option(None, "picture to start from")
    strength: float = option(0.75, "how much to change --image: above 0 up to 1")
    mask: str = option(None, "picture of the size of --image: draw where it is white, keep where it is black")
    refiner: str = option(None, "a second model for the last fifth of the noise schedule")
    vae: str = option(None, "another VAE: a folder or file")
    lora: tuple[str, ...] = option((), "LoRA file, or FILE:SCALE; give the flag once for each")
    embedding: tuple[str, ...] = option((), "textual inversion file, or FILE:WORD; give the flag once for each")
    lora_allow_partial: bool = option(False, "use a LoRA although some of its tensors fit no layer of this model")
    controlnet: tuple[str, ...] = option((), "a ControlNet's folder or file; give the flag once for each")
    control: tuple[str, ...] = option((), "picture to follow, of what the ControlNet was trained on; once for each")
    control_scale: tuple[float, ...] = option((), "how closely, 1 as trained, 0 off; none, or once for each ControlNet")
    edit: str = option(None, "picture to change as the prompt says, with a model that was trained to edit")
    image_guidance: float = option(1.5, "how much to stay with --edit; 1 or less turns it off")
    source: str = option(None, "picture to draw beside, with a --lora of train.py onepic; --image and --mask: what of "
                         "the drawn picture is given too, where the mask is black")
    original_size: str = option(None, "WIDTHxHEIGHT that SDXL is told the training picture had; --size if left out")
    crop: str = option("0,0", "LEFT,TOP of the cut that SDXL is told was made from that picture")
    target_size: str = option(None, "WIDTHxHEIGHT that SDXL is told was wanted; --size if left out")
    device: str = option(None, "cuda, mps or cpu; the best there is if left out")
    dtype: str = option(None, "fp32, bf16 or fp16; what suits the device and the model if left out", tuple(DTYPES))
    graph: bool = option(None, "each step as one CUDA graph; on an NVIDIA GPU, where it is faster, unless --no-graph")
    out: str = option("pictures", "folder, or name.png; a number is added where the name is taken")
    film: str = option(None, "PNG to draw the predicted picture after every step into")
    from_: str = option(None, "PNG drawn here: start from the settings kept inside it; flags win")
    verify: bool = option(False, "refuse weights whose sha256 is not an official file's")
    selftest: bool = option(False, "compare this device with the CPU on the tiny model, and stop")

    def __post_init__(self):
        for key, value in vars(self).items():
            if key not in ("prompt", "negative") and (value == "" or isinstance(value, tuple) and "" in value):
                raise InputError(f"--{key.rstrip('_').replace('_', '-')}: is empty; name a value or leave it out")


FORGET = ("prompts", "out", "film", "device", "graph", "from_", "verify", "selftest")  # a picture keeps the rest


def main(argv=None):
    """Read the command line and draw. Returns the exit code: 0 done, 1 a failed self-test, 2 a mistake in the input."""
    try:
        config = read_flags(sys.argv[1:] if argv is None else argv)
        with enough_memory("choose a smaller --size, or --dtype bf16"):
            return selftest(config) if config.selftest else draw(config)
    except (InputError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2


def read_flags(argv):
    """Settings from the command line; those in the picture named by --from come first, so that later flags win."""
    config = from_argv(Settings, argv, "sample.py", ("prompt",))
    if config.from_ is None:
        return config
    given = {key for key, value in vars(config).items() if isinstance(value, tuple) and value}  # would else be added to
    kept, names = read_settings(config.from_), {f.name for f in dataclasses.fields(Settings)} - set(FORGET) - given
    flags = [f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}")
             for key, values in kept.items() if key in names - {"prompt"}
             for value in (values if isinstance(values, list) else [values])
             if value is not None and value is not False]
    config = from_argv(Settings, flags + argv, "sample.py", ("prompt",))
    if config.prompt or config.prompts or "prompt" not in kept:
        return config
    return dataclasses.replace(config, prompt=(str(kept["prompt"]),))


def pair(text, flag, mark):
    """'640x480' -> (640, 480); None stays None."""
    if text is None:
        return None
    if not re.fullmatch(rf"\d{{1,6}}{mark}\d{{1,6}}", text):
        raise InputError(f"--{flag} {text}: expected two whole numbers such as 64{mark}64")
    return tuple(int(number) for number in text.split(mark))


def cut(text):
    """'style.safetensors:0.8' -> ('style.safetensors', '0.8'); '' where nothing follows the file."""
    found = re.fullmatch(r"(.*\.safetensors)(?::(.*))?", text, re.IGNORECASE)
    return (found[1], found[2] or "") if found else (text, "")


def add_files(pipeline, config):
    """Add every --lora FILE[:SCALE], --embedding FILE[:WORD] and --controlnet."""
    for path, scale in map(cut, config.lora):
        try:
            scale = bounded(float)(scale or 1)
        except ValueError:
            raise InputError(f"--lora {path}:{scale}: {scale!r} is no number; write FILE:0.8") from None
        pipeline.add_lora(path, scale, config.lora_allow_partial)
    for path, word in map(cut, config.embedding):
        pipeline.add_embedding(path, word or None)
    for path in config.controlnet:
        pipeline.add_control(path)


def open_controls(config):
    """[(picture, scale), ...], one for every --controlnet."""
    nets, names, scales = config.controlnet, config.control, config.control_scale or (1.0,) * len(config.control)
    if nets and not names:
        raise InputError(f"--controlnet {nets[0]}: needs --control, the picture to follow")
    if nets and not len(nets) == len(names) == len(scales):
        raise InputError(f"--controlnet is given {len(nets)} times, --control {len(names)} and --control-scale "
                         f"{len(scales)}; give all equally often, in the same order")
    return [(open_picture(name), scale) for name, scale in zip(names, scales)]


def open_source(config):
    """(picture, onepic.Context) of --source, or two Nones."""
    if not config.source:
        return None, None
    for flag in ("refiner", "controlnet", "edit"):
        if getattr(config, flag):
            raise InputError(f"--source: draws beside a picture as its LoRA was taught; leave --{flag} out")
    if not config.lora:
        raise InputError("--source: needs --lora, a LoRA of train.py onepic")
    if config.image and not config.mask:
        raise InputError("--image: with --source it needs --mask, black where --image is given")
    return open_picture(config.source), onepic.context_of(cut(config.lora[0])[0])


def read_prompts(config):
    """All prompts; those that this process draws are every WORLD_SIZE-th."""
    prompts = list(config.prompt)
    if config.prompts:
        try:
            lines = Path(config.prompts).read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise InputError(f"--prompts {config.prompts}: cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise InputError(f"--prompts {config.prompts}: is not UTF-8; save it as UTF-8") from error
        prompts += [line.strip() for line in lines if line.strip()]
    try:
        "".join([*prompts, config.negative or ""]).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"a prompt is not UTF-8 ({error.reason}); set the terminal to UTF-8") from error
    if not prompts:
        raise InputError('nothing to draw; give a prompt, e.g. python sample.py "a red cube"')
    return prompts


def choose(config, rank):
    """(device, dtype name) to draw with."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    name = config.device or best
    try:
        device = torch.device(f"cuda:{rank % torch.cuda.device_count()}" if name == "cuda" == best else name)
        torch.zeros(1, device=device).item()  # the meta device has no numbers
    except (RuntimeError, AssertionError, ImportError) as error:  # unknown, or PyTorch is built without it
        raise InputError(f"--device {name}: not available here; use {best}") from error
    if config.dtype:
        if device.type == "cpu" and (config.dtype == "fp16" or config.dtype == "bf16" and not computes_bf16(device)):
            warnings.warn(f"--dtype {config.dtype}: this CPU computes it many times slower than fp32; leave it out",
                          stacklevel=1)
        return device, config.dtype
    if device.type == "cuda":
        return device, "bf16" if computes_bf16(device) else "fp16"
    files = Path(config.model).rglob("*.safetensors") if Path(config.model).is_dir() else [Path(config.model)]
    large = sum(file.stat().st_size for file in files if file.exists()) > LARGE
    if device.type == "mps":
        return device, "fp16" if large else "fp32"
    return device, "bf16" if large and computes_bf16(device) else "fp32"


def place(config):
    """(where single pictures go, where grids go); the folder is made and must be writable before anything is drawn."""
    single = Path(config.out)
    if single.suffix.lower() != ".png":
        single /= "picture.png"
    if config.film and Path(config.film).suffix.lower() != ".png":
        raise InputError(f"--film {config.film}: must be the name of a .png file")
    for flag, name, path in (("out", config.out, single), ("film", config.film, Path(config.film or single))):
        writable(f"--{flag} {name}", path.parent)
    return single, single.with_name("grid.png" if single.name == "picture.png" else f"{single.stem}-grid.png")


def draw(config):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    device, dtype = choose(config, int(os.environ.get("LOCAL_RANK", 0)))
    prompts, (single, together) = read_prompts(config)[rank::world], place(config)
    image, mask, edit = (open_picture(name) if name else None for name in (config.image, config.mask, config.edit))
    control, (source, how) = open_controls(config), open_source(config)
    load = {"dtype": DTYPES[dtype], "device": device, "lazy": True, "check_hashes": config.verify, "cast": True}
    pipeline = Pipeline.load(config.model, vae=config.vae, **load)
    add_files(pipeline, config)
    refiner = Pipeline.load(config.refiner, **load) if config.refiner else None
    size = pair(config.size, "size", "x") or (how.size if how else None)
    size, sampler, grid = pipeline.plan(config.steps, config.n, size, config.sampler, image,
                                        1.0 if how else config.strength, mask, control, edit, config.image_guidance,
                                        refiner, config.graph)
    given = {"negative": config.negative, "steps": config.steps, "guidance": config.guidance, "size": size,
             "sampler": sampler, "mask": mask, "graph": config.graph,
             "original_size": pair(config.original_size, "original-size", "x"), "crop": pair(config.crop, "crop", ","),
             "target_size": pair(config.target_size, "target-size", "x")}
    whole, steps = size, functools.partial(
        pipeline.steps, image=image, strength=config.strength, refiner=refiner, control=control, edit=edit,
        image_guidance=config.image_guidance)
    if how:
        whole, steps = (2 * size[0], size[1]), functools.partial(
            onepic.steps, pipeline, source=source, how=how, target=image)
    for prompt in prompts:  # all of them, before the text encoders make room for the UNet
        for model in filter(None, (pipeline, refiner)):
            model.encode(how.said(prompt) if how else prompt, config.negative)

    for prompt in prompts:
        kept = {k: v for k, v in dataclasses.asdict(config).items() if k not in FORGET}
        kept |= {"prompt": prompt, "dtype": dtype, "sampler": sampler, "size": "{}x{}".format(*size)}
        pictures, frames = [], []
        while len(pictures) < config.n:
            seed, n = config.seed + len(pictures), min(config.n - len(pictures), pipeline.at_once(whole))
            drawing = steps(prompt, **given, seed=seed, n=n)
            for x, x0 in tqdm(drawing, prompt[:40], len(grid), disable=rank > 0, leave=False, mininterval=0):
                if config.film and not pictures:
                    frames.append(x0[:1])
            for picture in pipeline.decode(x):
                path = save_new(picture, single, kept | {"n": 1, "seed": config.seed + len(pictures)})
                pictures.append(picture)
        if config.n > 1:
            labels = [f"seed {config.seed + i}" for i in range(config.n)]
            path = save_new(labelled_grid(pictures, labels, title=prompt), together, kept)
        print(path)
        if config.film:
            film = pipeline.decode(torch.cat(frames))
            film = labelled_grid(film, [f"step {i + 1}" for i in range(len(film))], title=prompt)
            print(save_new(film, config.film, kept | {"n": 1}))
    return 0


def selftest(config):
    """Draw the same picture on the CPU in fp32 and on the device, and compare: devices can go wrong silently."""
    device, dtype = choose(config, 0)
    pictures = [Pipeline.load(config.model, *kind).generate("a red cube", steps=8, sampler="euler")[0]
                for kind in ((torch.float32, "cpu"), (DTYPES[dtype], device))]
    expected, found = (127.5 * to_tensor(picture) for picture in pictures)
    difference, limit = (expected - found).abs(), 0.5 if dtype == "fp32" else 4.0
    fine = difference.mean().item() <= limit and expected.std() > 1
    print(f"{device} in {dtype} against the CPU in fp32: grey levels differ by {difference.mean():.3f} on average, "
          f"{difference.max():.0f} at most: {'fine' if fine else f'WRONG, at most {limit} on average expected'}")
    return 0 if fine else 1


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *about, **more: f"sample.py: {message}\n"
    sys.exit(main())
