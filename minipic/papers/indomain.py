"""In-domain generation (arXiv 2312.08195): pictures alone teach a domain, prompts keep their power.

From the paper and its code: a copy of the UNet, in which attention to the text is a constant, is
trained on pictures of one domain without captions. Three predictions are combined in every step,
with weights that stay the same (its default is 2.5 for both):

    eps = eps_u + w_d (eps_d - eps_u) + w_c (eps_c - eps_u)

eps_u is the untouched model's for the null text, eps_d that of the copy, eps_c the untouched or a
customised model's for a prompt. The factors of the three add up to 1, so v combines alike.

Inferred: averaging the constant over timesteps (the code has one); SDXL, whose null text is zeros,
so that the constant is exact, and whose pooled text and sizes become constants too; editing by
starting from a noised picture; a ControlNet acts on eps_c alone; text to 3-D. Unlike the code we do
not flip pictures, and our weights are 2 and 3.

Measured (RESULTS.md; three seeds, 400 steps): mosaics drawn with weights 2 and 3 have .77 of the
captions right at a style distance of .37 (Frechet 61), those of a UNet fine-tuned on one caption
.65 at .40 (70); the untouched model has .81 at .42, and .54 with words for the style.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from PIL import Image
from torch import nn

from minipic.common import InputError, ParameterError
from minipic.diffusion.guidance import combine
from minipic.draw_settings import DrawSettings, nth_seed
from minipic.figures import image_grid
from minipic.kernels import casting
from minipic.latents import LatentData, load_pipeline, picture_size, read_photos
from minipic.layers import lora
from minipic.layers.nulltext import NullTextUNet, capture, zero_text_vectors
from minipic.models.unet import UNet
from minipic.papers.distillation import distill, turntable
from minipic.pipeline import Pipeline
from minipic.text import Conditioning
from minipic.training.flags import option
from minipic.training.processes import say
from minipic.training.settings import DATA, LORA, PairSettings, PhotoSettings
from minipic.weights import read_weights, save_weights
from minipic.weights.files import read_header
from minipic.weights.layouts import build_empty, memory_format
from minipic.weights.networks import TEXT_ENCODERS
from minipic.world.pictures import CHUNK, PairPicture, to_uint8
from minipic.world.scene import render, sample_scene
from minipic.world.styles import STYLES

UNCONDITIONAL = True  # a drawing needs no prompt
BLOCK_LAYERS = r"(down|mid|up)_block.*"  # get a LoRA: a domain is in the convolutions too
CAPTURE_STEPS = 5  # timesteps at which the null text's constant is measured


@dataclass
class Settings(PairSettings, PhotoSettings):
    """Teach a copy of a model a domain, from pictures without captions.

    The pictures are those of a folder (--data) or the world's in another style (--domain).
    """

    data: str = option("", "folder of pictures; the world if left out")
    domain: str = option("mosaic", "style of the world's pictures", tuple(STYLES), group=DATA)
    scenes: int = option(3000, "different pictures of the world", group=DATA)
    lora_rank: int = option(
        0, "train a LoRA of this rank, a small file; 0: all weights of the copy", group=LORA)
    steps: int = option(1500)
    batch: int = option(16)
    lr: float = option(2e-4)

    # No flags: captions are neither read nor trained on.
    caption: ClassVar[None] = None
    caption_dropout: ClassVar[float] = 1.0

    MINIMUM = PairSettings.MINIMUM | {"lora_rank": 0}


# The null-text UNet -------------------------------------------------------------------------------

def share_weights(unet: UNet) -> UNet:
    """A second UNet with the same weights in memory, but without the LoRAs of the first."""
    second = build_empty(UNet, unet.config)
    casting.install(second)  # some of the weights may be in 16 bits
    weights = unet.state_dict(keep_vars=True)
    state = {name: weights[name] for name in second.state_dict()}
    second.load_state_dict(state, strict=True, assign=True)
    return second.eval()


@torch.no_grad()
def null_text_unet(pipeline: Pipeline, size: tuple[int, int]) -> tuple[NullTextUNet, float]:
    """(a pipeline's null-text UNet, which shares its weights; its relative error).

    size: (width, height), for SDXL's size ids.

    A null text of zeros is a constant exactly, and the error is 0. Any other is read while a
    picture is drawn from it; the error is that of the predictions on the way.
    """
    visited = []  # (x, t, prediction)

    def network(x, t, *text):
        prediction = pipeline.unet(x, t, *text)
        visited.append((x, t, prediction))
        return prediction

    def draw_without_text():
        settings = DrawSettings("", steps=CAPTURE_STEPS, guidance=1.0, size=size, graph=False)
        for _ in pipeline.denoise(pipeline.prepare(settings), network):
            pass

    if pipeline.zeros_for_empty_prompt:
        vectors = zero_text_vectors(pipeline.unet)
    else:
        vectors = capture(pipeline.unet, draw_without_text)
    domain = NullTextUNet(share_weights(pipeline.unet), vectors)
    if pipeline.is_sdxl:
        _, null = pipeline.encode("")
        size_ids, _ = pipeline.negative_and_positive_size_ids(size, (0, 0), size)
        domain.pooled = null.pooled.float()
        domain.size_ids = size_ids.long().to(pipeline.device)

    errors = [0.0]
    for x, t, prediction in visited:
        errors.append(((domain(x, t) - prediction).norm() / prediction.norm()).item())
    return domain, max(errors)


# Training -----------------------------------------------------------------------------------------

class DomainModel(nn.Module):
    """What is trained: `domain`, a null-text UNet, beside the pipeline that it starts from."""

    def __init__(self, pipeline: Pipeline, domain: NullTextUNet):
        super().__init__()
        self.pipeline = pipeline
        self.domain = domain


def build(config: Settings) -> DomainModel:
    """The frozen pipeline, and its null-text UNet. Without a LoRA all of that trains, in fp32."""
    pipeline = load_pipeline(config, frozen=True)
    size = (config.resolution, config.resolution) if config.resolution else pipeline.size
    domain, error = null_text_unet(pipeline, size)
    say(f"the null text as a constant: predictions differ by {100 * error:.1f} % at most")
    if not config.lora_rank:
        domain = copy.deepcopy(domain).float()
    return DomainModel(pipeline, domain)


def setup(model: DomainModel, config: Settings) -> list[nn.Parameter]:
    if config.lora_rank:
        return lora.inject(model.domain.unet, config.lora_rank, match=BLOCK_LAYERS)
    return list(model.domain.parameters())


def data(model: DomainModel, config: Settings) -> LatentData:
    """Latents of the pictures of --data, or of the world in the style of --domain."""
    if config.data:
        pictures = read_photos(model.pipeline, config, config.data)
    else:
        pictures = pictures_in_style(model.pipeline, config)
    return LatentData(model.pipeline, pictures, config)


def pictures_in_style(pipeline: Pipeline, config: Settings) -> list[PairPicture]:
    """Scenes of the world as they look in the style of config.domain."""
    size = picture_size(pipeline, config)
    shade, _ = STYLES[config.domain]
    pictures = []
    for start in range(0, config.scenes, CHUNK):
        numbers = range(start, min(start + CHUNK, config.scenes))
        scenes = [sample_scene(config.seed, i) for i in numbers]
        images = render(scenes, size, truth=False, shade=shade).rgb
        for image in to_uint8(images):
            pictures.append(PairPicture(image, image, ""))
    return pictures


def loss(model: DomainModel, batch: dict, config: Settings) -> torch.Tensor:
    """The error of the null-text UNet; no text is read."""
    objective = model.pipeline.schedule.objective
    timesteps = batch["t"].cpu()
    losses = objective.loss(
        model.domain, batch["x0"], batch["noise"], timesteps, config.min_snr or None,
        config.balanced)
    return losses.mean()


def sample(model: DomainModel, config: Settings, data: LatentData) -> Image.Image:
    """Four pictures of the domain, and four in which a prompt says what to draw."""
    pipeline = model.pipeline
    adapter = Adapter(domain=model.domain)
    pictures = []
    labels = []
    for prompt in ("", "a large red cube"):
        # The copy's weights may be in fp32, the UNet's in bf16.
        in_bf16 = config.precision == "bf16"
        with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=in_bf16):
            pictures += draw(pipeline, adapter, DrawSettings(prompt, steps=20, n=4))
        labels += [prompt or "no prompt"] * 4
    return image_grid(pictures, labels, columns=4)


def export(model: DomainModel, folder: Path, config: Settings, data: LatentData):
    """What the null-text UNet has of its own: the constants, and all weights or a LoRA."""
    constants = dict(model.domain.named_buffers())
    tensors = {}
    for name, tensor in model.domain.own_state_dict().items():
        tensors[name] = tensor if name in constants else tensor.half()
    metadata = {"paper": "indomain", "prediction": model.pipeline.schedule.prediction_type}
    save_weights(tensors, folder / "domain.safetensors", metadata)


# Drawing ------------------------------------------------------------------------------------------

@dataclass
class DrawOptions:
    """The weights of the predictions, and other models and prompts to take them from."""

    domain_guidance: float = option(2.0, "w_d: how much to follow the domain")
    control_guidance: float = option(3.0, "w_c: how much to follow the prompt")
    guide: tuple[str, ...] = option(
        (), 'one more prompt and its weight, "fog:-1.5", once for each')
    control_model: str = option(
        None, "a customised model for the prompt's prediction: a folder or file")
    control_everywhere: bool = option(
        False, "let ControlNets act on the prediction without text too")


@dataclass
class Adapter:
    """A trained domain. Its network is made of the file's tensors when it is first needed."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    domain: NullTextUNet | None = None
    control_models: dict[str, Pipeline] = field(default_factory=dict)


class Term(NamedTuple):
    """One prediction that guidance combines: whose, for which text, with which weight."""

    network: nn.Module
    text: Conditioning
    weight: float = 0.0
    sees_control: bool = False  # whether a ControlNet's residuals go into it


def load_adapter(pipeline: Pipeline, path: Path) -> Adapter:
    """The domain of a file. InputError where it is damaged or was trained for another model."""
    _, metadata = read_header(path)
    prediction = metadata.get("prediction")
    if prediction != pipeline.schedule.prediction_type:
        raise InputError(
            f"{path} was trained to predict {prediction}, and this model predicts "
            f"{pipeline.schedule.prediction_type}; draw with the model that it was trained for")
    tensors = read_weights(path)
    expected = empty_domain(pipeline, tensors).own_state_dict()
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    expected_shapes = {name: tensor.shape for name, tensor in expected.items()}
    misfits = sorted({name for name, _ in shapes.items() ^ expected_shapes.items()})
    if misfits:
        raise InputError(
            f"{path} was trained for another model: {len(misfits)} tensors do not fit this one, "
            f"the first is {misfits[0]!r}; draw with the model that it was trained for")
    return Adapter(tensors)


def empty_domain(pipeline: Pipeline, tensors: dict[str, torch.Tensor]) -> NullTextUNet:
    """A null-text UNet that these tensors of a file fit; all else it shares with the pipeline."""
    domain = NullTextUNet(share_weights(pipeline.unet), zero_text_vectors(pipeline.unet))
    if pipeline.is_sdxl:
        domain.pooled = torch.zeros(1, pipeline.text_encoder_2.config.projection_dim)
        domain.size_ids = torch.zeros(1, 6, dtype=torch.long)
    ranks = [len(tensor) for name, tensor in tensors.items() if "lora_A" in name]
    rank = max(ranks, default=0)  # all layers have the same
    if rank:
        lora.inject(domain.unet, rank, match=BLOCK_LAYERS)
    return domain


def build_domain(pipeline: Pipeline, adapter: Adapter) -> NullTextUNet:
    """The null-text UNet of an adapter, beside the pipeline's UNet, which is in memory."""
    domain = empty_domain(pipeline, adapter.tensors)
    weight = next(pipeline.unet.parameters())
    state = domain.state_dict(keep_vars=True)
    for name, tensor in adapter.tensors.items():
        dtype = weight.dtype if tensor.is_floating_point() else tensor.dtype
        order = memory_format(dtype) if tensor.ndim == 4 else torch.preserve_format
        state[name] = tensor.to(weight.device, dtype, memory_format=order)
    domain.load_state_dict(state, strict=True, assign=True)
    return domain.eval()


def tasks(path: Path) -> tuple[str, ...]:
    """What can be asked for besides pictures: an object in three dimensions."""
    return ("3d",)


def prompt_for(adapter: Adapter, prompt: str, task: str | None = None) -> str:
    """The prompt as it is: the domain needs no word."""
    return prompt


def plan(
        pipeline: Pipeline, adapter: Adapter, settings: DrawSettings, sources: list[Image.Image],
        task: str | None = None, options: DrawOptions | None = None,
        ) -> tuple[DrawSettings, tuple[int, int]]:
    """Check what is asked for."""
    options = options or DrawOptions()
    if pipeline.extra_input:
        raise ParameterError(
            "model", "its UNet sees a picture besides the one that it draws; use an ordinary model")
    if sources:
        raise ParameterError("source", "this adapter takes none; a picture to change is the image")
    if task not in (None, "3d"):
        raise ParameterError("task", f"{task!r}: a domain is drawn, or makes an object with 3d")
    if task == "3d" and (settings.image or settings.control):
        raise ParameterError("task", "3d follows only prompts; leave out pictures")
    for name in ("refiner", "edit", "guidance_rescale"):
        if getattr(settings, name):
            raise ParameterError(name, "does not go with the adapter of a domain; leave it out")
    if settings.guidance != DrawSettings.guidance:
        raise ParameterError(
            "guidance", "this adapter has two, domain_guidance and control_guidance; give those")
    for name in ("domain_guidance", "control_guidance"):
        if not math.isfinite(getattr(options, name)):
            raise ParameterError(name, f"must be a number, not {getattr(options, name)}")
    read_guides(options)
    control_model(pipeline, adapter, options)
    settings, _ = pipeline.plan(settings)
    return settings, settings.size


def read_guides(options: DrawOptions) -> list[tuple[str, float]]:
    """[(prompt, weight), ...] of the option `guide`."""
    guides = []
    for text in options.guide:
        prompt, _, number = text.rpartition(":")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not prompt or not math.isfinite(weight):
            raise ParameterError(
                "guide", f'{text!r}: expected a prompt and its weight, such as "fog:-1.5"')
        guides.append((prompt, weight))
    return guides


def control_model(pipeline: Pipeline, adapter: Adapter, options: DrawOptions) -> Pipeline:
    """The model of eps_c: the pipeline itself, or another one of the same latents and noise."""
    path = options.control_model
    if path is None:
        return pipeline
    if path not in adapter.control_models:
        model = Pipeline.load(path, pipeline.dtype, pipeline.device, lazy=True)
        mine, theirs = pipeline.schedule, model.schedule
        same_noise = torch.equal(mine.table, theirs.table)
        same_prediction = mine.prediction_type == theirs.prediction_type
        same_channels = pipeline.unet.config.in_channels == model.unet.config.in_channels
        if not (same_noise and same_prediction and same_channels):
            raise ParameterError(
                "control_model", f"{path} has other latents or another noise schedule than this "
                "model; give one that was made from it")
        adapter.control_models[path] = model
    return adapter.control_models[path]


def encode(
        pipeline: Pipeline, settings: DrawSettings,
        prompt: str) -> tuple[Conditioning, Conditioning]:
    """(a prompt's text, the null text or the negative prompt's), which is that of no prompt too."""
    cond, uncond = pipeline.encode(prompt, settings.negative)
    stage = pipeline.stage(settings, None, cond, uncond)  # adds SDXL's size ids
    text = stage.cond if prompt else stage.uncond
    return text, stage.uncond


def guidance_terms(
        pipeline: Pipeline, adapter: Adapter, settings: DrawSettings,
        options: DrawOptions) -> list[Term]:
    """eps_u, and what is followed besides: eps_d, eps_c, and the prompts of `guide`."""
    customised = control_model(pipeline, adapter, options)
    control, null = encode(pipeline, settings, settings.prompt)
    if customised is not pipeline:
        control, _ = encode(customised, settings, settings.prompt)
    guides = []
    for prompt, weight in read_guides(options):
        text, _ = encode(customised, settings, prompt)
        guides.append((text, weight))

    # From here on the UNets are needed, and the text encoders no more.
    for model in (pipeline, customised):
        model.free(*TEXT_ENCODERS)
        model.fetch("unet")
    if adapter.domain is None:
        adapter.domain = build_domain(pipeline, adapter)
    # A LoRA that was added customises eps_c. The other predictions are the model's without it.
    prior = share_weights(pipeline.unet) if pipeline.loras else pipeline.unet

    terms = [
        Term(prior, null, sees_control=options.control_everywhere),
        Term(adapter.domain, Conditioning(None), options.domain_guidance)]
    if settings.prompt or settings.control or customised.unet is not prior:
        terms.append(Term(customised.unet, control, options.control_guidance, sees_control=True))
    for text, weight in guides:
        terms.append(Term(customised.unet, text, weight))
    return terms


def multi_guidance(terms: list[Term], n: int) -> Callable:
    """A network for Pipeline.denoise: eps_0 + the sum of w_i (eps_i - eps_0), for n pictures.

    eps_0 is the first term's, whose weight has no meaning. Terms of weight 0 are left out. Terms of
    one network, with texts of one length, are one batch.
    """
    first, *others = terms
    followed = [term for term in others if term.weight]
    batches = {}
    for term in (first, *followed):
        context = term.text.context
        length = None if context is None else context.shape[1]
        batches.setdefault((term.network, length), []).append(term)
    prepared = []  # (network, its terms, their texts)
    for (network, _), members in batches.items():
        rows = text_rows(network, [term.text for term in members], n)
        prepared.append((network, members, rows))

    def predict(x, t, context, pooled, size_ids, residuals):
        predictions = {}
        for network, members, text in prepared:
            inputs = torch.cat([x] * len(members))
            added = residual_rows(residuals, [term.sees_control for term in members])
            rows = network(inputs, t, *text, added).float()
            for term, prediction in zip(members, rows.chunk(len(members))):
                predictions[id(term)] = prediction
        pairs = [(term.weight, predictions[id(term)]) for term in followed]
        return combine(predictions[id(first)], pairs)

    return predict


def text_rows(network: nn.Module, texts: list[Conditioning], n: int) -> Conditioning:
    """Texts of one row -> n rows of each, as this network takes them."""
    if texts[0].context is None:
        return Conditioning(None)
    weight = next(network.parameters())
    context = torch.cat([text.context for text in texts]).to(weight).repeat_interleave(n, dim=0)
    keys_values = network.text_keys_values(context)  # the same in every step
    if texts[0].pooled is None:
        return Conditioning(keys_values)
    pooled = torch.cat([text.pooled for text in texts]).to(weight)
    ids = torch.cat([text.size_ids for text in texts]).to(weight.device)
    return Conditioning(
        keys_values, pooled.repeat_interleave(n, dim=0), ids.repeat_interleave(n, dim=0))


def residual_rows(residuals: list | None, sees_control: list[bool]) -> list | None:
    """A ControlNet's residuals [n,...] -> n rows for each term, zeros where it does not see it."""
    if residuals is None or not any(sees_control):
        return None
    all_rows = []
    for residual in residuals:
        hidden = torch.zeros_like(residual)
        shown = [residual if sees else hidden for sees in sees_control]
        all_rows.append(torch.cat(shown))
    return all_rows


@torch.no_grad()
def draw(
        pipeline: Pipeline, adapter: Adapter, settings: DrawSettings,
        sources: list[Image.Image] = (), task: str | None = None,
        options: DrawOptions | None = None,
        on_step: Callable | None = None) -> list[Image.Image]:
    """Draw in the domain -> a list of settings.n PIL pictures. Without a prompt, anything of it.

    task "3d": each is a turntable of an object, for which ten views are learned from a step.
    """
    options = options or DrawOptions()
    settings, _ = plan(pipeline, adapter, settings, sources, task, options)
    terms = guidance_terms(pipeline, adapter, settings, options)
    if task == "3d":
        width, height = settings.size
        size = height, width
        network = multi_guidance(terms, 1)
        pictures = []
        for i in range(settings.n):
            seed = nth_seed(settings.seed, i)
            field = distill(pipeline, network, size, 10 * settings.steps, seed, on_step)
            pictures.append(turntable(field, size))
        return pictures

    # Guidance is off: the pipeline asks for one prediction, which is combined from several.
    drawing = pipeline.prepare(replace(settings, guidance=1.0))
    for x, x0 in pipeline.denoise(drawing, multi_guidance(terms, settings.n)):
        if on_step is not None:
            on_step(x, x0)
    return pipeline.decode(x)
