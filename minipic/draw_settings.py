"""What to draw: the settings of a drawing, checked by themselves and against the model."""

import math
from dataclasses import dataclass
from numbers import Integral, Real

from PIL import Image

from minipic.common import ParameterError
from minipic.diffusion.samplers import SAMPLERS
from minipic.image import to_rgb


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
    refiner: object = None  # a Pipeline
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
        if self.edit is not None:
            self.edit = to_rgb(self.edit)
        self.control = tuple((to_rgb(picture), scale) for picture, scale in self.control)

    def check_types(self):
        """ParameterError for a value of the wrong type."""
        if not isinstance(self.prompt, str):
            raise ParameterError(
                "prompt", f"{self.prompt!r} must be one text; call generate once for each prompt")
        if self.negative is not None and not isinstance(self.negative, str):
            raise ParameterError("negative", f"expected a text or None, not {self.negative!r}")
        for name in ("steps", "seed", "n"):
            if not isinstance(getattr(self, name), Integral):
                raise ParameterError(name, f"expected a whole number, not {getattr(self, name)!r}")
        for name in (
                "guidance", "strength", "image_guidance", "high_noise_frac", "guidance_rescale"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not math.isfinite(value):
                raise ParameterError(name, f"expected a number, not {value!r}")
        for name in ("size", "original_size", "crop", "target_size"):
            value = getattr(self, name)
            may_be_left_out = value is None and name != "crop"
            is_square = isinstance(value, Integral) and name == "size"
            if not (may_be_left_out or is_square or is_pair(value)):
                raise ParameterError(
                    name, f"expected two whole numbers such as (64, 64), not {value!r}")
        for name in ("image", "mask", "edit"):
            if getattr(self, name) is not None:
                check_picture(name, getattr(self, name))
        if not isinstance(self.control, (tuple, list)):
            raise ParameterError(
                "control", "expected a list of (picture, scale), one for each ControlNet")
        for item in self.control:
            has_two_parts = isinstance(item, (tuple, list)) and len(item) == 2
            if not has_two_parts or not isinstance(item[1], Real):
                raise ParameterError(
                    "control", "expected (picture, scale) for each ControlNet; 1 is as trained")
            check_picture("control", item[0])


def is_pair(value) -> bool:
    """Whether this is a tuple or list of two whole numbers."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return False
    return all(isinstance(x, Integral) for x in value)


def check_picture(name: str, picture):
    """ParameterError, with the parameter's name, for what is not a PIL picture."""
    if not isinstance(picture, Image.Image):
        kind = type(picture).__name__
        raise ParameterError(
            name, f"expected a PIL picture, not {kind}; open a file with PIL.Image.open")


def check_against_model(settings: DrawSettings, pipeline):
    """ParameterError for settings that do not fit each other or this model."""
    sampler, refiner = settings.sampler, settings.refiner
    image, mask, edit = settings.image, settings.mask, settings.edit
    control, controlnets = settings.control, pipeline.controlnets
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
    if settings.image_guidance < 0:
        raise ParameterError(
            "image_guidance", f"choose 1 (off) to about 2, not {settings.image_guidance}")
    if settings.graph and pipeline.device.type != "cuda":
        raise ParameterError(
            "graph", f"is for NVIDIA's GPUs, and this draws on {pipeline.device.type}; "
            "leave it out")
    if refiner is not None and not isinstance(refiner, type(pipeline)):
        raise ParameterError("refiner", f"expected a Pipeline, not {refiner!r}; use Pipeline.load")
    if refiner is not None and refiner.extra_input:
        raise ParameterError(
            "refiner", "its UNet sees a picture besides the one that it draws; "
            "use an ordinary model")
