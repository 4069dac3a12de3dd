"""Settings from the command line: every field of a dataclass is a flag, with its line of --help."""

import argparse
import dataclasses
import difflib
import re
import typing
from collections.abc import Callable
from typing import Any

from minipic.common import InputError, ParameterError, flag_of, has_type

GENERAL = "general"
LARGEST_NUMBER = 2**63  # numbers stay below it: they must fit 64 bits
FEW_CHOICES = 4         # so many choices stand beside a flag in --help

# What people type who know diffusers, AUTOMATIC1111's web UI, kohya's scripts, or the earlier names
# of flags here: {field: those words}.
OTHER_WORDS = {
    "guidance": "cfg cfg_scale guidance_scale scale",
    "steps": "num_inference_steps sampling_steps ddim_steps max_train_steps max_steps iterations",
    "size": "height width resolution image_size h w",
    "n": "num_images num_images_per_prompt batch_count batch_size n_samples num_samples n_iter",
    "negative": "negative_prompt neg",
    "prompts": "prompt_file prompts_file from_file",
    "seed": "manual_seed generator",
    "model": "ckpt ckpt_path checkpoint model_path model_id pretrained_model_name_or_path sd_model",
    "sampler": "scheduler sampler_name sampling_method",
    "spacing": "timestep_spacing sgm_uniform trailing",
    "prediction": "prediction_type v_pred v_prediction v_parameterization",
    "karras": "use_karras_sigmas karras_sigmas",
    "image": "init_image init_img input_image img2img",
    "strength": "denoising_strength denoise",
    "mask": "mask_image",
    "vae": "vae_path pretrained_vae_model_name_or_path",
    "lora": "lora_path lora_scale lora_weights network_weights",
    "embedding": "textual_inversion ti",
    "control": "control_image controlnet_image",
    "control_scale": "controlnet_conditioning_scale conditioning_scale control_weight",
    "image_guidance": "image_guidance_scale image_cfg_scale",
    "crop": "crops_coords_top_left",
    "dtype": "half fp16 bf16 torch_dtype precision variant",
    "out": "output output_dir outdir output_path outpath save_path logging_dir",
    "lr": "learning_rate unet_lr",
    "batch": "batch_size train_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps accumulate",
    "gradient_checkpointing": "checkpointing",
    "lr_schedule": "lr_scheduler schedule",
    "warmup": "lr_warmup_steps warmup_steps",
    "max_grad_norm": "clip gradient_clip",
    "precision": "mixed_precision fp16 bf16 full_bf16 full_fp16",
    "ema": "use_ema ema_decay",
    "train_text": "train_text_encoder",
    "save_every": "checkpointing_steps save_every_n_steps",
    "keep": "checkpoints_total_limit save_last_n_steps",
    "sample_every": "sample_every_n_steps validation_steps",
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
        default: Any, help: str | None = None, choices: tuple | None = None,
        group: str | None = None, limit: int | None = None) -> Any:
    """A field of a settings dataclass.

    help: what `--help` says of it, and `group` the heading there. choices: the values allowed
        (None: any of its type). limit: numbers stay below it; LARGEST_NUMBER if left out.
        A subclass that only changes the default leaves all four out and inherits them.
    """
    metadata = {"help": help, "choices": choices, "group": group, "limit": limit}
    return dataclasses.field(default=default, metadata=metadata)


def from_argv(
        cls: type, argv: list[str], program: str, positional: tuple[str, ...] = ()) -> Any:
    """Fill the dataclass `cls` from a command line, see `parse_argv`.

    Raises ParameterError for a text that is empty or not in UTF-8 too.
    """
    given = parse_argv(cls, argv, program, positional)
    for name, value in given.items():
        if value == "":  # as from a variable of the shell that is not set
            raise ParameterError(name, "is empty; name a value or leave it out")
        if re.search("[\ud800-\udfff]", str(value)):  # what Python makes of other bytes
            raise ParameterError(name, f"{value} is not UTF-8; choose another name or text")
    return cls(**given)


def parse_argv(
        cls: type, argv: list[str], program: str, positional: tuple[str, ...] = ()) -> dict:
    """The settings that a command line gives, {field: value}.

    Every field of the dataclass `cls` is a flag (underscores become dashes): `--steps 500`,
    `--steps=500`, `--graph` / `--no-graph`. The flag of a tuple is given once for each value.
    positional: fields that are given without a flag.
    Raises InputError for an unknown flag, with the nearest right one, or for a value of the wrong
    type.
    """
    parser = build_parser(cls, program, positional)
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
        cls: type, program: str, positional: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    """The argparse parser for a settings dataclass, its flags under their groups.

    `cls.GROUPS` may give the order of the groups.
    """
    parser = _Parser(
        prog=program, description=cls.__doc__, allow_abbrev=False, add_help=False,
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


def describe_field(cls: type, name: str) -> dict:
    """help, choices, group and limit of a field; what the class does not say is inherited."""
    about = {"help": None, "choices": None, "group": None, "limit": None}
    for ancestor in reversed(cls.__mro__):
        field = ancestor.__dict__.get("__dataclass_fields__", {}).get(name)
        if field is not None:
            about |= {key: value for key, value in field.metadata.items() if value is not None}
    return about


def add_flag(
        group: argparse._ArgumentGroup, field: dataclasses.Field, about: dict, is_positional: bool):
    """One field as an argument of an argparse group."""
    kind = field.type
    many = typing.get_origin(kind) is tuple
    if many:
        kind = typing.get_args(kind)[0]
    help_text = about["help"] or ""
    choices = about["choices"] or ()
    if len(choices) > FEW_CHOICES:  # too many for the flag's column
        help_text += f": {', '.join(choices)}"
    if kind is not bool and not many and field.default not in (None, ""):
        help_text += f" [{field.default}]"
    options = {"help": help_text.replace("%", "%%"), "default": None}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
        if field.default is False:
            options["action"] = _Switch
    else:
        options["type"] = kind if kind is str else finite(kind, about["limit"] or LARGEST_NUMBER)
        options["choices"] = about["choices"]
        options["metavar"] = {int: "N", float: "X", str: "TEXT"}[kind]
        if choices:
            options["metavar"] = "|".join(choices) if len(choices) <= FEW_CHOICES else "NAME"
    if is_positional:
        options |= {"nargs": "*", "metavar": field.name} if many else {}
        group.add_argument(field.name, **options)
        return
    if many:
        options["action"] = "append"
    group.add_argument(flag_of(field.name), dest=field.name, **options)


def finite(kind: type, limit: int = LARGEST_NUMBER) -> Callable[[str], int | float]:
    """A reader of numbers for argparse: `int` or `float`, below `limit`.

    It raises ValueError for NaN and infinity too.
    """
    def read(text):
        value = kind(text)
        if kind is int and abs(value) >= limit:
            raise argparse.ArgumentTypeError(f"{text} is too large; choose below {limit}")
        if not abs(value) < limit:
            raise ValueError
        return value

    read.__name__ = kind.__name__  # argparse names the type in its message
    return read


def find_flag(flag: str, argv: list[str]) -> str | None:
    """The last value of a flag that decides which other flags there are."""
    value = None
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            value = argv[i + 1]
        if word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return value


def flag_accepts(field: dataclasses.Field, value: Any) -> bool:
    """Whether the command line accepts a value for this field: its type, choices and size."""
    if not has_type(value, field.type):
        return False
    choices = field.metadata.get("choices")
    limit = field.metadata.get("limit") or LARGEST_NUMBER
    for item in value if isinstance(value, tuple) else (value,):
        if choices and item not in choices:
            return False
        # Written so that it is also false of NaN, which is neither smaller nor larger.
        if isinstance(item, (int, float)) and not abs(item) < limit:
            return False
    return True


def unknown_flag(flag: str, cls: type, positional: tuple[str, ...]) -> str:
    """What to say of a flag that does not exist."""
    if not flag.startswith("-"):
        return f"{flag!r}: what is this? A value belongs after its flag; --help lists every flag"
    word = re.sub("=.*", "", flag).lstrip("-").replace("-", "_").lower()
    if word in positional:
        return f'{flag}: the {word} is given without a flag, in quotes: "..."'
    names = [field.name for field in dataclasses.fields(cls) if field.name not in positional]
    prefix = ""
    if word.startswith("no_"):  # never suggest the opposite of what was meant
        names = [field.name for field in dataclasses.fields(cls) if field.type is bool]
        prefix, word = "no_", word.removeprefix("no_")
    nearest = [name for name in names if word in OTHER_WORDS.get(name, "").split()]
    if not nearest:
        nearest = difflib.get_close_matches(word, names, n=1, cutoff=0.75)
    if not nearest:
        return f"{flag}: no such flag; --help lists every flag"
    suggestion = flag_of(prefix + nearest[0])
    return f"{flag}: no such flag; did you mean {suggestion}? --help lists every flag"


class _Switch(argparse.BooleanOptionalAction):
    """--X and --no-X for what is off by default; --help shows --X only."""


class _HelpFormatter(argparse.HelpFormatter):
    """Help for a terminal of 80 columns: flags in a narrow column, so that descriptions fit."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26, width=80)

    def _format_action_invocation(self, action):
        if isinstance(action, _Switch):
            return action.option_strings[0]
        return super()._format_action_invocation(action)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message.removeprefix('argument ')}; --help lists every flag")
