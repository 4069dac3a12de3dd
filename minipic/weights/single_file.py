"""Single-file checkpoints: all networks of a model in one .safetensors file, in the sgm/LDM layout.

A file says nothing of its configs. It is recognised by the names and shapes of its tensors as one
of a few known families; the files of a family differ in their values only.
"""

import re
from dataclasses import replace
from pathlib import Path

from minipic.common import InputError
from minipic.models.clip import CLIP_L, OPENCLIP_BIGG, CLIPText
from minipic.models.unet import SD15, SDXL_BASE, SDXL_REFINER, UNet
from minipic.models.vae import SD15_VAE, SDXL_VAE, VAE
from minipic.weights import keys
from minipic.weights.files import Entry, read_header
from minipic.weights.parts import Part, Source, check_part, part_entries

Shapes = dict[str, tuple[int, ...]]  # {name: shape} of the tensors of a file

UNET = Part(UNet, SDXL_BASE, prefix="model.diffusion_model.", convert=keys.unet)
FIRST_STAGE = Part(VAE, SDXL_VAE, prefix="first_stage_model.", convert=keys.vae)
SDXL_SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085,
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon",
    "timestep_spacing": "leading", "steps_offset": 1}

SDXL = Source(  # base, Turbo and everything trained from them
    parts={
        "unet": UNET,
        "vae": FIRST_STAGE,
        "text_encoder": Part(
            CLIPText, CLIP_L, prefix="conditioner.embedders.0.transformer.", convert=keys.clip),
        "text_encoder_2": Part(
            CLIPText, OPENCLIP_BIGG, prefix="conditioner.embedders.1.model.",
            convert=keys.openclip)},
    index={"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True},
    scheduler=SDXL_SCHEDULER)
REFINER = Source(
    parts={
        "unet": replace(UNET, config=SDXL_REFINER),
        "vae": FIRST_STAGE,
        "text_encoder_2": Part(
            CLIPText, OPENCLIP_BIGG, prefix="conditioner.embedders.0.model.",
            convert=keys.openclip)},
    index={
        "_class_name": "StableDiffusionXLImg2ImgPipeline", "force_zeros_for_empty_prompt": False,
        "requires_aesthetics_score": True},
    scheduler=SDXL_SCHEDULER)
STABLE_DIFFUSION_15 = Source(
    parts={
        "unet": replace(UNET, config=SD15),
        "vae": replace(FIRST_STAGE, config=SD15_VAE),
        "text_encoder": Part(
            CLIPText, CLIP_L, prefix="cond_stage_model.transformer.", convert=keys.clip)},
    index={
        "_class_name": "StableDiffusionPipeline", "requires_safety_checker": False,
        "safety_checker": [None, None], "feature_extractor": [None, None]},
    scheduler=SDXL_SCHEDULER | {"_class_name": "PNDMScheduler"})
SINGLE_FILES = {"sdxl": SDXL, "refiner": REFINER, "sd15": STABLE_DIFFUSION_15}

# The width of the text that the UNet attends to: the family.
CONTEXT_WIDTHS = {
    2048: "sdxl", 1280: "refiner", 768: "sd15", 1024: "a Stable Diffusion 2 model"}
# What the metadata may say of the prediction, in the words of ModelSpec (kohya's scripts write it)
# and of ComfyUI.
PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
PREDICTIONS = {
    "epsilon": "epsilon", "eps": "epsilon",
    "v": "v_prediction", "v_pred": "v_prediction", "v_prediction": "v_prediction"}
# Models that draw in a few steps must begin in pure noise.
FEW_STEP_MODELS = re.compile(r"turbo|lightning|hyper-?sd|dmd2|\blcm\b", re.IGNORECASE)
# UNets that take more than a latent's 4 channels: what diffusers calls their pipelines.
WIDER = {8: "InstructPix2Pix", 9: "Inpaint"}


def open_single_file(path: Path) -> Source:
    """A single-file checkpoint: SDXL base, Turbo, refiner or SD 1.5. Reads the header only."""
    _, kind = identify_file(path)
    if kind in SINGLE_FILES:
        family = SINGLE_FILES[kind]
        return from_single_file(path, family.parts, family.index, family.scheduler)
    if kind == "vae":
        kind = "a VAE alone (give it as the vae of a model)"
    raise InputError(
        f"{path} is {kind}; expected a single-file SDXL base, Turbo, refiner or SD 1.5 model, or a "
        "diffusers folder")


def from_single_file(path: Path, parts: dict[str, Part], index: dict, scheduler: dict) -> Source:
    """The parts of a file of a known family. Every tensor must belong to one of them or be ignored.

    parts, index, scheduler: the family's, as in SINGLE_FILES.
    """
    path = Path(path)
    entries, metadata = read_header(path)
    scheduler = scheduler | marked_schedule(path, entries, metadata)

    channels = unet_channels(shapes_of(entries))
    if channels in WIDER:
        unet = parts["unet"]
        config = replace(unet.config, in_channels=channels)
        parts = parts | {"unet": replace(unet, config=config)}
        pipeline = index["_class_name"].replace("Pipeline", f"{WIDER[channels]}Pipeline")
        index = index | {"_class_name": pipeline}

    prefixes = tuple(part.prefix for part in parts.values())
    unexpected = []
    for name in entries:
        name = keys.unwrapped(name)
        if not name.startswith(prefixes) and not keys.IGNORED.fullmatch(name):
            unexpected.append(name)
    if unexpected:
        names = keys.first_names(unexpected)
        raise InputError(f"{path} holds {len(unexpected)} unexpected tensors: {names}")

    filled = {}
    for name, part in parts.items():
        own = part_entries(entries, part.prefix)
        part = replace(part, files={path: own})
        if not own and name != "vae":
            raise InputError(
                f"{path} holds no {name}: it is a UNet alone or a merge without text encoders; "
                "get the whole model")
        # Some files leave the VAE out, for a user has one anyway.
        filled[name] = check_part(part) if own else part
    return Source(filled, index, scheduler)


def marked_schedule(path: Path, entries: dict[str, Entry], metadata: dict[str, str]) -> dict:
    """What a single file says of its noise schedule, in the words of scheduler_config.json.

    Most say nothing: `Schedule.override` is for what a user knows of them.
    """
    marks = {}
    for key in PREDICTION_KEYS:
        if key in metadata:
            prediction = PREDICTIONS.get(metadata[key].lower())
            if prediction is None:
                raise InputError(
                    f"{path}: its {key} is {metadata[key]!r}, which is not supported (supported: "
                    f"{', '.join(PREDICTIONS)})")
            marks["prediction_type"] = prediction
    about = metadata.get("modelspec.architecture", ""), metadata.get("modelspec.title", "")
    title = " ".join(about)
    if FEW_STEP_MODELS.search(title):
        marks["timestep_spacing"] = "trailing"
    # Empty tensors, which ComfyUI and AUTOMATIC1111's web UI look for
    if "v_pred" in entries:
        marks["prediction_type"] = "v_prediction"
    if "ztsnr" in entries:
        marks |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return marks


# What a file holds ------------------------------------------------------------------------------


def identify_file(path: Path) -> tuple[dict[str, Entry], str]:
    """(the header's entries of a single file, what it holds: see `identify`)."""
    entries, _ = read_header(path)
    return entries, identify(shapes_of(entries))


def shapes_of(entries: dict[str, Entry]) -> Shapes:
    return {keys.unwrapped(name): entry.shape for name, entry in entries.items()}


def identify(shapes: Shapes) -> str:
    """What a single file holds: a key of SINGLE_FILES, "vae", or something else, in words."""
    foreign = keys.foreign_kind(shapes)
    if foreign is not None:
        return foreign[0]

    width = context_width(shapes)
    if width is not None:
        channels = unet_channels(shapes)
        if channels not in (4, *WIDER):
            return (f"a model of {channels} input channels instead of 4, 8 (instruct-pix2pix) or 9 "
                    "(inpainting)")
        has_middle = any("middle_block.1." in name for name in shapes)
        if "model.diffusion_model.out.2.weight" in shapes and not has_middle:
            return "a distilled model whose UNet has fewer blocks, such as SSD-1B"
        return CONTEXT_WIDTHS.get(width, f"a model of unknown context width {width}")

    names = {name.removeprefix(FIRST_STAGE.prefix) for name in shapes}
    if "encoder.conv_in.weight" in names and "decoder.conv_in.weight" in names:
        return "vae"
    if "conv_in.weight" in shapes or "input_blocks.0.0.weight" in shapes:
        return "a UNet alone"
    if any(name.endswith(("token_embedding.weight", "token_embedding")) for name in shapes):
        return "a text encoder alone"
    if len(shapes) in (1, 2) and all(len(shape) == 2 for shape in shapes.values()):
        return "a textual inversion"
    return f"no known model (its first tensor is {next(iter(shapes), None)!r})"


def context_width(shapes: Shapes) -> int | None:
    """The width of the text that the UNet in a file attends to; None where there is no UNet."""
    for name, shape in shapes.items():
        if re.fullmatch(r"model\.diffusion_model\..*\.attn2\.to_k\.weight", name):
            if len(shape) == 2:
                return shape[1]
    return None


def unet_channels(shapes: Shapes) -> int:
    """How many channels the UNet of a single file takes."""
    shape = shapes.get("model.diffusion_model.input_blocks.0.0.weight", ())
    return shape[1] if len(shape) == 4 else 4
