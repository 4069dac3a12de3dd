"""Files of ControlNets (arXiv 2302.05543): a diffusers folder, or a file in either layout."""

from dataclasses import fields
from pathlib import Path

from minipic.common import InputError, ParameterError
from minipic.models.controlnet import ControlNet, ControlNetConfig
from minipic.models.unet import EncoderConfig, UNetConfig
from minipic.weights import keys
from minipic.weights.folders import open_part
from minipic.weights.parts import Part, check_part, part_entries, prefix_in
from minipic.weights.single_file import identify_file

LDM_PREFIX = "control_model."  # begins the names of a file in the LDM layout


def open_controlnet(path: str | Path, unet: UNetConfig, factor: int, half: bool = False) -> Part:
    """A ControlNet for a UNet of this config. Reads no weights.

    factor: how many pixels of a picture are one of the VAE's latents along a side. half: prefer a
    folder's fp16 files where it has both. Raises InputError naming the path and what does not fit.
    """
    path = Path(path)
    if not path.is_dir():
        part = open_controlnet_file(path, unet)
        check_fits_model(part, path, unet, factor)
        return check_part(part)
    if (path / "model_index.json").exists():
        raise InputError(f"{path} is a whole model; expected a ControlNet's folder")
    part = open_part(path, "controlnet", half)
    check_fits_model(part, path, unet, factor)
    return part


def open_controlnet_file(path: Path, unet: UNetConfig) -> Part:
    """A ControlNet from a file, whose shapes say where its config differs from the UNet's."""
    entries, kind = identify_file(path)
    if kind != "a ControlNet":
        raise InputError(f"{path} is {kind}; expected an ordinary ControlNet")
    if "shuffle" in path.stem:  # it has an ordinary one's tensors: only its name says so
        raise InputError(
            f"{path} is one that averages over the picture, which is not supported; expected an "
            "ordinary ControlNet")
    prefix = prefix_in(entries, LDM_PREFIX)
    entries = part_entries(entries, prefix)
    shapes = {}
    for name, entry in entries.items():
        shapes[keys.controlnet_name(keys.unwrapped(name).removeprefix(prefix))] = entry.shape
    try:
        config = config_from_shapes(shapes, unet)
    except InputError as error:  # from the config, which checks itself and knows no file
        raise InputError(
            f"{path} does not fit this model ({error}); use a ControlNet that was made for it, or "
            "fetch the file again") from None
    return Part(ControlNet, config, {path: entries}, prefix, keys.controlnet)


def check_fits_model(part: Part, path: Path, unet: UNetConfig, factor: int):
    """InputError unless this ControlNet can steer the UNet, with pictures of the VAE's factor."""
    mismatch = find_mismatch(part.config, unet, factor)
    if mismatch is not None:
        raise InputError(f"{path}: {mismatch}; use a ControlNet that was made for this model")


def config_from_shapes(shapes: dict[str, tuple], unet: UNetConfig) -> ControlNetConfig:
    """The config of a file that has none: its shapes say where it differs from its UNet's config.

    shapes: {name: shape}. Raises ParameterError where no network for this UNet has them.
    """
    def count(start):
        """How many different numbers follow this start of a name."""
        names = [name[len(start):] for name in shapes if name.startswith(start)]
        return len({name.partition(".")[0] for name in names})

    def width(layer):
        """The channels that a convolution makes; 0, which no network has, if it is missing."""
        return (shapes.get(f"{layer}.bias") or (0,))[0]

    values = {field.name: getattr(unet, field.name) for field in fields(EncoderConfig)}
    values["in_channels"] = unet.out_channels  # x alone, also where the UNet sees a picture

    widths, types, depths = [], [], []
    for level in range(count("down_blocks.")):
        transformer = f"down_blocks.{level}.attentions.0."
        widths.append(width(f"down_blocks.{level}.resnets.0.conv1"))
        types.append("CrossAttnDownBlock2D" if count(transformer) else "DownBlock2D")
        depths.append(count(f"{transformer}transformer_blocks."))
    if len(widths) != len(unet.block_out_channels):  # then nothing else of the UNet's config fits
        raise ParameterError(
            "block_out_channels", f"{tuple(widths)} here and {unet.block_out_channels} in the UNet")
    if depths:
        # the middle has the last level's depth
        depths[-1] = count("mid_block.attentions.0.transformer_blocks.")
    values["block_out_channels"] = tuple(widths)
    values["down_block_types"] = tuple(types)
    values["transformer_layers_per_block"] = tuple(depths)

    for name, shape in shapes.items():
        if name.endswith("attn2.to_k.weight") and len(shape) == 2:
            values["cross_attention_dim"] = shape[1]
            break

    hint = "controlnet_cond_embedding."
    hint_widths = [width(f"{hint}conv_in")]
    for block in range(1, count(f"{hint}blocks."), 2):
        hint_widths.append(width(f"{hint}blocks.{block}"))
    values["conditioning_embedding_out_channels"] = tuple(hint_widths)
    return ControlNetConfig(**values)


def find_mismatch(config: ControlNetConfig, unet: UNetConfig, factor: int) -> str | None:
    """Why a ControlNet cannot steer a UNet with a VAE of `factor`, in words; None if it can."""
    if config.in_channels != unet.out_channels:
        return f"takes {config.in_channels} channels and the UNet makes {unet.out_channels}"
    for name in ("block_out_channels", "layers_per_block", "cross_attention_dim",
                 "addition_embed_type", "projection_class_embeddings_input_dim"):
        mine = getattr(config, name)
        theirs = getattr(unet, name)
        if mine != theirs:
            return f"has {name}={mine!r} and the UNet {theirs!r}"
    channels = config.conditioning_channels
    shrinks = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
    if (channels, shrinks) != (3, factor):
        return (f"takes {channels} channels of {shrinks} times the latents' size instead of 3 of "
                f"{factor} times")
    return None
