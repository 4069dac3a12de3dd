"""Settings from the command line: every field of a dataclass is a flag, with its line of --help."""

import argparse
import dataclasses
import difflib
import re
import typing
from collections.abc import Callable

from minipic.common import InputError, flag_of

GENERAL = "general"
LARGEST_NUMBER = 2**63  # numbers stay below it: they must fit 64 bits

# What people type who know diffusers, AUTOMATIC1111's web UI or kohya's scripts: our field -> their
# words.
OTHER_WORDS = {
    "guidance": "cfg cfg_scale guidance_scale scale",
    "steps": "num_inference_steps sampling_steps ddim_steps max_train_steps max_steps iterations",
    "size": "height width resolution image_size h w",
    "n": "num_images num_images_per_prompt batch_count n_samples num_samples",
    "negative": "negative_prompt neg",
    "model": "ckpt checkpoint model_path model_id pretrained_model_name_or_path sd_model",
    "sampler": "scheduler sampler_name sampling_method",
    "image": "init_image init_img input_image img2img",
    "strength": "denoising_strength denoise",
    "mask": "mask_image",
    "vae": "vae_path pretrained_vae_model_name_or_path",
    "lora": "lora_path lora_weights network_weights",
    "embedding": "textual_inversion ti",
    "control": "control_image controlnet_image",
    "control_scale": "controlnet_conditioning_scale conditioning_scale control_weight",
    "image_guidance": "image_guidance_scale image_cfg_scale",
    "crop": "crops_coords_top_left",
    "dtype": "half fp16 bf16 torch_dtype",
    "out": "output output_dir outdir output_path save_path logging_dir",
    "lr": "learning_rate",
    "batch": "batch_size train_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps accumulate",
    "gradient_checkpointing": "checkpointing",
    "lr_schedule": "lr_scheduler schedule",
    "warmup": "lr_warmup_steps warmup_steps",
    "max_grad_norm": "clip gradient_clip",
    "precision": "mixed_precision fp16 bf16",
    "save_every": "checkpointing_steps save_every_n_steps",
    "resume": "resume_from_checkpoint",
    "data": "train_data_dir instance_data_dir dataset dataset_name",
    "resolution": "size side image_size height width",
    "caption": "instance_prompt",
    "caption_dropout": "caption_dropout_rate proportion_empty_prompts drop "
                       "conditioning_dropout_prob",
    "min_snr": "snr_gamma min_snr_gamma",
    "lora_rank": "rank network_dim lora_dim",
    "lora_alpha": "network_alpha",
    "class_prompt": "prior",
    "num_class_images": "prior_pictures",
    "prior_loss_weight": "prior_weight",
    "word": "placeholder_token",
    "initializer_token": "like init_word",
    "num_vectors": "vectors",
}


def option(
        default, help: str | None = None, choices: tuple | None = None, group: str | None = None):
    """A field of a settings dataclass.

    help: what `--help` says of it, and `group` the heading there. choices: the values allowed
        (None: any of its type). A subclass that only changes the default leaves all three out and
        inherits them.
    """
    metadata = {"help": help, "choices": choices, "group": group}
    return dataclasses.field(default=default, metadata=metadata)


def from_argv(
        cls, argv: list[str], program: str, positional: tuple[str, ...] = (),
        epilog: str | None = None):
    """Fill the dataclass `cls` from a command line, see `parse_argv`."""
    return cls(**parse_argv(cls, argv, program, positional, epilog))


def parse_argv(
        cls, argv: list[str], program: str, positional: tuple[str, ...] = (),
        epilog: str | None = None) -> dict:
    """The settings that a command line gives, {field: value}.

    Every field of the dataclass `cls` is a flag (underscores become dashes): `--steps 500`,
    `--steps=500`, `--graph` / `--no-graph`. The flag of a tuple is given once for each value.
    positional: fields that are given without a flag.
    epilog: closes the help.
    Raises InputError for an unknown flag, with the nearest right one, or for a value of the wrong
    type.
    """
    parser = build_parser(cls, program, positional, epilog)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        raise InputError(unknown_flag(unknown[0], cls, positional))
    settings = {}
    for name, value in vars(namespace).items():
        if isinstance(value, list):
            value = tuple(value)
        if value not in (None, ()):  # a flag that was not given leaves the dataclass its default
            settings[name] = value
    return settings


def build_parser(
        cls, program: str, positional: tuple[str, ...] = (),
        epilog: str | None = None) -> argparse.ArgumentParser:
    """The argparse parser for a settings dataclass, its flags under their groups.

    `cls.GROUPS` may give the order of the groups.
    """
    parser = _Parser(
        prog=program, description=cls.__doc__, epilog=epilog, allow_abbrev=False, add_help=False,
        formatter_class=_HelpFormatter, usage=f"{program} [flags]")
    groups = {title: parser.add_argument_group(title) for title in getattr(cls, "GROUPS", ())}
    for field in dataclasses.fields(cls):
        about = describe_field(cls, field.name)
        title = about["group"] or GENERAL
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        add_flag(groups[title], field, about, field.name in positional)
    last = groups[list(groups)[-1]]
    last.add_argument("-h", "--help", action="help", help="show this")
    return parser


def describe_field(cls, name: str) -> dict:
    """help, choices and group of a field; what the class does not say is inherited."""
    about = {"help": None, "choices": None, "group": None}
    for ancestor in reversed(cls.__mro__):
        field = ancestor.__dict__.get("__dataclass_fields__", {}).get(name)
        if field is not None:
            about |= {key: value for key, value in field.metadata.items() if value is not None}
    return about


def add_flag(group, field, about: dict, is_positional: bool):
    """One field as an argument of an argparse group."""
    kind = field.type
    many = typing.get_origin(kind) is tuple
    if many:
        kind = typing.get_args(kind)[0]
    help_text = about["help"] or ""
    if kind is not bool and not many and field.default not in (None, ""):
        help_text += f" [{field.default}]"
    options = {"help": help_text.replace("%", "%%"), "default": None}
    if kind is bool:
        options["action"] = "store_true"
        if field.default is not False:
            options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = kind if kind is str else finite(kind)
        options["choices"] = about["choices"]
        options["metavar"] = {int: "N", float: "X", str: "TEXT"}[kind]
        if about["choices"]:
            options["metavar"] = "|".join(about["choices"]) if len(about["choices"]) < 5 else "NAME"
    if is_positional:
        options |= {"nargs": "*", "metavar": field.name} if many else {}
        group.add_argument(field.name, **options)
        return
    if many:
        options["action"] = "append"
    group.add_argument(flag_of(field.name), dest=field.name, **options)


def finite(kind: type) -> Callable[[str], int | float]:
    """A reader of numbers for argparse: `int` or `float`, but with limits.

    It raises ValueError for NaN, for infinity, and for numbers that do not fit 64 bits.
    """
    def read(text):
        value = kind(text)
        if not abs(value) < LARGEST_NUMBER:
            raise ValueError
        return value

    read.__name__ = kind.__name__  # argparse names the type in its message
    return read


def unknown_flag(flag: str, cls, positional: tuple[str, ...]) -> str:
    """What to say of a flag that does not exist."""
    if not flag.startswith("-"):
        return f"{flag!r}: what is this? A value belongs after its flag; --help lists every flag"
    word = re.sub("=.*", "", flag).lstrip("-").replace("-", "_").lower()
    if word in positional:
        return f'{flag}: the {word} is given without a flag, in quotes: "..."'
    fields = [field.name for field in dataclasses.fields(cls) if field.name not in positional]
    nearest = [name for name in fields if word in OTHER_WORDS.get(name, "").split()]
    if not nearest:
        nearest = difflib.get_close_matches(word, fields, n=1, cutoff=0.7)
    if not nearest:
        return f"{flag}: no such flag; --help lists every flag"
    return f"{flag}: no such flag; did you mean {flag_of(nearest[0])}? --help lists every flag"


class _HelpFormatter(argparse.HelpFormatter):
    """Help for a terminal of 80 columns: flags in a narrow column, so that descriptions fit."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=26, width=80)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message.removeprefix('argument ')}; --help lists every flag")
