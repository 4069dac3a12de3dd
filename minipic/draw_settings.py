"""What to draw: the settings of a drawing, checked by themselves and against the model."""

import math
import warnings
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from PIL import Image

from minipic.common import ParameterError
from minipic.diffusion.samplers import SAMPLERS
from minipic.image import to_control, to_mask, to_rgb
from minipic.weights.networks import Networks

SEEDS = 2**64  # seeds are smaller, as PyTorch's are
RANGES = {  # field: its smallest and largest value, and of a pair that of both numbers
    "seed": (0, SEEDS - 1),
    "guidance": (-1000, 1000),
    "image_guidance": (-1000, 1000),
    "high_noise_frac": (0, 1),
    "guidance_rescale": (0, 1),
    "original_size": (1, 100_000),
    "crop": (0, 100_000),
    "target_size": (1, 100_000)}


@dataclass
class DrawSettings:
    """All that decides a drawing, besides the model. `Pipeline.generate` describes each."""

    prompt: str
    negative: str | None = None
    steps: int = 30
    guidance: float = 5.0
    seed: int = 0
    n: int = 1
    size: tuple[int, int] | int | None = None
    sampler: str | None = None
    image: Image.Image | None = None
    strength: float = 0.75
    mask: Image.Image | None = None
    control: tuple[tuple[Image.Image, float], ...] = ()
    edit: Image.Image | None = None
    image_guidance: float = 1.5
    refiner: Networks | None = None  # a Pipeline
    high_noise_frac: float = 0.8
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    guidance_rescale: float = 0.0
    graph: bool | None = None

    def __post_init__(self):
        self.check_types()
        if isinstance(self.size, Integral):
            self.size = (self.size, self.size)
        if self.image is not None:
            self.image = to_rgb(self.image)
        if self.mask is not None:
            self.mask = to_mask(self.mask)
        if self.edit is not None:
            self.edit = to_rgb(self.edit)
        self.control = tuple((to_control(picture), scale) for picture, scale in self.control)

    def check_types(self):
        """ParameterError for a value of the wrong type."""
        if not isinstance(self.prompt, str):
            raise ParameterError(
                "prompt",
                f"expected one text, not {self.prompt!r}; call generate once for each prompt")
        if self.negative is not None and not isinstance(self.negative, str):
            raise ParameterError("negative", f"expected a text or None, not {self.negative!r}")
        for name in ("steps", "seed", "n"):
            if not is_whole(getattr(self, name)):
                raise ParameterError(name, f"expected a whole number, not {getattr(self, name)!r}")
        for name in (
                "guidance", "strength", "image_guidance", "high_noise_frac", "guidance_rescale"):
            value = getattr(self, name)
            if not is_number(value):
                raise ParameterError(name, f"expected a number, not {value!r}")
        for name in ("size", "original_size", "crop", "target_size"):
            value = getattr(self, name)
            may_be_left_out = value is None and name != "crop"
            is_square = is_whole(value) and name == "size"
            if not (may_be_left_out or is_square or is_pair(value)):
                raise ParameterError(
                    name, f"expected two whole numbers such as (64, 64), not {value!r}")
        if not isinstance(self.sampler, str | None):
            raise ParameterError("sampler", f"expected a name, not {self.sampler!r}")
        if not isinstance(self.graph, bool | None):
            raise ParameterError("graph", f"expected True, False or None, not {self.graph!r}")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            for number in value if isinstance(value, (tuple, list)) else [value]:
                if number is not None and not low <= number <= high:
                    raise ParameterError(name, f"choose {low} to {high}, not {number}")
        for name in ("image", "mask", "edit"):
            if getattr(self, name) is not None:
                check_picture(name, getattr(self, name))
        if not isinstance(self.control, (tuple, list)):
            raise ParameterError(
                "control", "expected a list of (picture, scale), one for each ControlNet")
        for item in self.control:
            has_two_parts = isinstance(item, (tuple, list)) and len(item) == 2
            if not has_two_parts or not is_number(item[1]):
                raise ParameterError(
                    "control", "expected (picture, scale) for each ControlNet; 1 is as trained")
            check_picture("control", item[0])


def is_whole(value: Any) -> bool:
    """Whether this is a whole number, which True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether this is a finite number."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_pair(value: Any) -> bool:
    """Whether this is a tuple or list of two whole numbers."""
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(is_whole, value))


def check_picture(name: str, picture: Any):
    """ParameterError, with the parameter's name, for what is not a PIL picture."""
    if not isinstance(picture, Image.Image):
        kind = type(picture).__name__
        raise ParameterError(
            name, f"expected a PIL picture, not {kind}; open a file with PIL.Image.open")


def nth_seed(seed: int, i: int) -> int:
    """The seed of picture i: seed + i. After the largest seed comes 0."""
    return (int(seed) + i) % SEEDS


def choose_size(settings: DrawSettings, model_size: tuple[int, int]) -> tuple[int, int]:
    """The (width, height) to draw; it warns where a given picture loses pixels by it.

    Without `size` it is that of the first given picture, or of the model where there is none. A
    model draws badly what is much larger than it was trained for, and memory grows with it: a
    picture of more pixels than the model's size has is scaled down to so many.
    """
    given = given_pictures(settings)
    size = settings.size
    if size is None and given:
        name, picture = given[0]
        size = fit_size(picture.size, model_size)
        if size[0] < picture.width - 8:
            warnings.warn(
                f"the {name} of {format_size(picture.size)} pixels is drawn as "
                f"{format_size(size)}, about as many as the model was trained for; name a size "
                "to change that", stacklevel=2)
    elif size is None:
        size = model_size
    if any(side < 8 or side % 8 for side in size):
        raise ParameterError(
            "size", f"{format_size(size)}: width and height must be multiples of 8, at least 8")
    for name, picture in given:
        warn_if_cut(name, picture, size)
    return size


def given_pictures(settings: DrawSettings) -> list[tuple[str, Image.Image]]:
    """[(name, picture), ...] of the pictures to start from or to follow."""
    given = [("image", settings.image), ("edit", settings.edit)]
    for picture, _ in settings.control:
        given.append(("control", picture))
    return [(name, picture) for name, picture in given if picture is not None]


def fit_size(size: tuple[int, int], model_size: tuple[int, int]) -> tuple[int, int]:
    """A picture's (width, height), scaled down to the model's area, in multiples of 8."""
    width, height = size
    scale = min(1.0, math.sqrt(model_size[0] * model_size[1] / (width * height)))
    return max(8, int(scale * width) // 8 * 8), max(8, int(scale * height) // 8 * 8)


def warn_if_cut(name: str, picture: Image.Image, size: tuple[int, int]):
    """Warn of a picture of another shape than `size`, whose edges `resize_and_crop` cuts off."""
    scale = max(size[0] / picture.width, size[1] / picture.height)
    cut_off = max(scale * picture.width - size[0], scale * picture.height - size[1])
    if cut_off >= 8:  # less is rounding to multiples of 8
        warnings.warn(
            f"the {name} of {format_size(picture.size)} pixels has another shape than the "
            f"{format_size(size)} that are drawn; what sticks out of the middle is cut off",
            stacklevel=2)


def format_size(size: tuple[int, int]) -> str:
    """(64, 48) -> "64x48"."""
    return "x".join(map(str, size))


def check_against_model(settings: DrawSettings, pipeline: Networks):
    """ParameterError for settings that do not fit each other or this model, a Pipeline."""
    sampler = settings.sampler
    refiner = settings.refiner
    image = settings.image
    mask = settings.mask
    edit = settings.edit
    control = settings.control
    controlnets = pipeline.controlnets
    if sampler is not None and sampler not in SAMPLERS:
        raise ParameterError(
            "sampler", f"{sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    if settings.n < 1:
        raise ParameterError("n", f"choose 1 or more pictures, not {settings.n}")
    if mask is not None and image is None:
        raise ParameterError(
            "mask", "needs an image, the picture to keep where the mask is black")
    if mask is not None and mask.size != image.size:
        raise ParameterError(
            "mask", f"has {mask.width}x{mask.height} pixels and the image "
            f"{image.width}x{image.height}; make both the same size")
    if control and not controlnets:
        raise ParameterError("control", "needs a ControlNet that was trained on such pictures")
    if control and len(control) != len(controlnets):
        raise ParameterError(
            "control", f"{len(control)} for {len(controlnets)} ControlNets; "
            "give one for each")
    for _, scale in control:
        if not 0 <= scale < math.inf:
            raise ParameterError(
                "control", f"the scale must be 0 (off) to about 2, not {scale}; "
                "1 is as trained")
    if edit is not None and pipeline.extra_input != "edit":
        raise ParameterError(
            "edit", "this model was not trained to edit pictures; "
            "train.py edit makes one that is")
    if edit is None and pipeline.extra_input == "edit":
        raise ParameterError(
            "edit", "this model edits pictures; name one, and say in the prompt what to change")
    if mask is None and pipeline.extra_input == "mask":
        raise ParameterError(
            "mask", "this model fills in parts of pictures; "
            "give an image and the mask of the part")
    for name, default in (("original_size", None), ("crop", (0, 0)), ("target_size", None)):
        if getattr(settings, name) != default and not pipeline.is_sdxl:
            raise ParameterError(name, "is for SDXL, and this model is none; leave it out")
    if settings.image_guidance < 0:
        raise ParameterError(
            "image_guidance", f"choose 1 (off) to about 2, not {settings.image_guidance}")
    if settings.graph and pipeline.device.type != "cuda":
        raise ParameterError(
            "graph", f"is for NVIDIA's GPUs, and this draws on {pipeline.device.type}; "
            "leave it out")
    if refiner is not None and not isinstance(refiner, Networks):
        raise ParameterError("refiner", f"expected a Pipeline, not {refiner!r}; use Pipeline.load")
    if refiner is not None and refiner.extra_input:
        raise ParameterError(
            "refiner", "its UNet sees a picture besides the one that it draws; "
            "use an ordinary model")
