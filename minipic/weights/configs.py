"""config.json and scheduler_config.json of official files -> configs, and back.

`read_config(cls, values)` refuses what this code would not compute as the file means it: unknown
keys, unsupported values, wrong types, sizes that do not fit each other. `config_to_json(config)`
gives what diffusers and transformers read.
"""

import dataclasses
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minipic.common import InputError
from minipic.diffusion.schedule import SAMPLER_OF, Schedule
from minipic.models.clip import CLIPTextConfig, CLIPVisionConfig
from minipic.models.controlnet import ControlNetConfig
from minipic.models.nextdit import NextDiTConfig
from minipic.models.unet import SD15, EncoderConfig, UNetConfig
from minipic.models.vae import VAEConfig

# Keys that the networks here do not vary: the values that mean this code, or ... where the value
# changes no number.
UNET_FIXED = {
    "act_fn": ("silu",),
    "addition_embed_type": (None, "text_time"),
    "addition_embed_type_num_heads": ...,
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "upcast_attention": ...,  # asks for fp32 scores, which the attention kernels always keep
    # How the weights were averaged in training; SDXL-inpainting's file says so.
    "decay": ...,
    "inv_gamma": ...,
    "min_decay": ...,
    "optimization_step": ...,
    "power": ...,
    "use_ema_warmup": ...,
    "update_after_step": ...,
}
CONTROLNET_FIXED = UNET_FIXED | {
    "controlnet_conditioning_channel_order": ("rgb",),
    "global_pool_conditions": (False,),
}
NEXTDIT_FIXED = {
    "input_size": ...,
    "model_max_length": ...,
    "norm_type": ("rms",),
    "pred_sigma": (False,),
    "qk_norm": (True,),
    # How it was trained and averaged.
    "decay": ...,
    "forward_dtype": ...,
    "inv_gamma": ...,
    "min_decay": ...,
    "optimization_step": ...,
    "param_dtype": ...,
    "power": ...,
    "remat_attention": ...,
    "remat_block": ...,
    "remat_mlp": ...,
    "update_after_step": ...,
    "use_ema_warmup": ...,
}
VAE_FIXED = {
    "act_fn": ("silu",),
    "latents_mean": (None,),
    "latents_std": (None,),
    "mid_block_add_attention": (True,),
}
VAE_BLOCK_TYPES = {  # the only type of block, named once per level
    "down_block_types": "DownEncoderBlock2D",
    "up_block_types": "UpDecoderBlock2D",
}
CLIP_FIXED = {
    "attention_dropout": (0.0,),
    "dropout": (0.0,),
    "layer_norm_eps": (1e-5,),
    "num_channels": (3,),
    # transformers also writes many keys that change no number.
    "architectures": ...,
    "bos_token_id": ...,
    "chunk_size_feed_forward": ...,
    "dtype": ...,
    "eos_token_id": ...,
    "id2label": ...,
    "initializer_factor": ...,
    "initializer_range": ...,
    "is_encoder_decoder": ...,
    "label2id": ...,
    "model_type": ...,
    "output_attentions": ...,
    "output_hidden_states": ...,
    "pad_token_id": ...,
    "problem_type": ...,
    "return_dict": ...,
    "torch_dtype": ...,
    "transformers_version": ...,
}
SCHEDULE_FIXED = {
    "algorithm_type": ("dpmsolver++",),
    "clip_sample": (False,),
    "final_sigmas_type": ("zero",),
    "interpolation_type": ("linear",),
    "invert_sigmas": (False,),
    "lambda_min_clipped": (-float("inf"),),
    "shift_terminal": (None,),
    "sigma_max": (None,),
    "sigma_min": (None,),
    "solver_order": (2,),
    "solver_type": ("midpoint",),
    "stochastic_sampling": (False,),
    "thresholding": (False,),
    "timestep_type": ("discrete",),
    "trained_betas": (None,),
    "use_beta_sigmas": (False, None),
    "use_dynamic_shifting": (False,),
    "use_exponential_sigmas": (False, None),
    "use_flow_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "variance_type": (None,),
    # These act only together with a value refused above, or only in a sampler that is not here.
    "base_image_seq_len": ...,
    "base_shift": ...,
    "clip_sample_range": ...,
    "dynamic_thresholding_ratio": ...,
    "euler_at_final": ...,
    "flow_shift": ...,
    "lower_order_final": ...,
    "max_image_seq_len": ...,
    "max_shift": ...,
    "sample_max_value": ...,
    "skip_prk_steps": ...,
    "time_shift_type": ...,
}

# Of these, keys that only matter to the sampler that a scheduler is named after, and among them
# those that make another sampler of it.
SAMPLER_KEYS = (
    "algorithm_type", "clip_sample", "lambda_min_clipped", "sigma_max", "sigma_min", "solver_order",
    "solver_type", "stochastic_sampling", "thresholding", "variance_type")
VARIANT_KEYS = ("algorithm_type", "solver_order", "solver_type")


# Reading ------------------------------------------------------------------------------------------

def read_config(cls: type, values: dict, where: str | Path = "config.json") -> Any:
    """The config `cls` of a network, or the Schedule, from its parsed official JSON file.

    where: the file, for messages. Raises InputError naming it, the key, and what is wrong.
    """
    return READERS[cls](values, where)


def config_from_json(cls: type, values: dict, fixed: dict, where: str | Path) -> Any:
    """Fill the config dataclass `cls` from an official config.json.

    values: the parsed JSON. Keys with a leading underscore are notes of the program that wrote it.
    fixed: {key: tuple of the values that this code supports, or ... where the value changes
        no number}.
    where: the file, for messages.
    Raises InputError for an unknown key or an unsupported value: to ignore one would give silently
    wrong numbers.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    settings = {}
    for key, value in values.items():
        if isinstance(value, list):
            value = tuple(value)
        supported = fixed.get(key, ...)
        if supported is not ... and value not in supported:
            choices = ", ".join(map(repr, supported))
            shown = repr(value)[:80]  # it may have a thousand numbers
            raise InputError(f"{where}: {key}={shown} is not supported (supported: {choices})")
        if key in known:
            settings[key] = value
        elif key not in fixed and not key.startswith("_"):
            raise InputError(
                f"{where}: unknown key {key!r} for {cls.__name__}; "
                "remove it or use a supported model")
    try:
        return cls(**settings)
    except InputError as error:  # the config has checked itself
        raise InputError(f"{where}: {error}; fetch the file again or use another model") from None


def read_unet(values: dict, where: str | Path) -> UNetConfig:
    """Keys that the file lacks take diffusers' defaults, which are SD 1.5's, not SDXL's."""
    return config_from_json(UNetConfig, encoder_defaults(UNetConfig) | values, UNET_FIXED, where)


def read_controlnet(values: dict, where: str | Path) -> ControlNetConfig:
    """As read_unet."""
    defaults = encoder_defaults(ControlNetConfig)
    return config_from_json(ControlNetConfig, defaults | values, CONTROLNET_FIXED, where)


def encoder_defaults(cls: type[EncoderConfig]) -> dict:
    """diffusers' defaults for the keys of a UNet or ControlNet."""
    defaults = {}
    for field in dataclasses.fields(cls):
        defaults[field.name] = getattr(SD15, field.name, field.default)
    defaults["cross_attention_dim"] = 1280
    return defaults


def read_nextdit(values: dict, where: str | Path) -> NextDiTConfig:
    """Keys that the file lacks have the released model's values."""
    return config_from_json(NextDiTConfig, values, NEXTDIT_FIXED, where)


def read_vae(values: dict, where: str | Path) -> VAEConfig:
    """Keys that the file lacks take diffusers' defaults."""
    defaults = {
        "sample_size": 32,
        "block_out_channels": (64,),
        "layers_per_block": 1,
        "scaling_factor": 0.18215,  # SD 1.5's file lacks it
    }
    values = defaults | values
    widths = values["block_out_channels"]
    supported = dict(VAE_FIXED)
    for key, block_type in VAE_BLOCK_TYPES.items():
        supported[key] = ...  # VAEConfig refuses widths that are no list
        if isinstance(widths, (list, tuple)):
            supported[key] = ((block_type,) * len(widths),)
    return config_from_json(VAEConfig, values, supported, where)


def read_clip_text(values: dict, where: str | Path) -> CLIPTextConfig:
    """Keys that the file lacks take transformers' defaults, which are ViT-B/32's."""
    defaults = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "projection_dim": 512,
    }
    values = defaults | values
    values["with_projection"] = values.get("architectures") == ["CLIPTextModelWithProjection"]
    return config_from_json(CLIPTextConfig, values, CLIP_FIXED, where)


def read_clip_vision(values: dict, where: str | Path) -> CLIPVisionConfig:
    """Keys that the file lacks take transformers' defaults, which are ViT-B/32's."""
    defaults = {
        "patch_size": 32,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 512,
    }
    return config_from_json(CLIPVisionConfig, defaults | values, CLIP_FIXED, where)


def read_schedule(values: dict, where: str | Path) -> Schedule:
    """Keys that the file lacks take diffusers' defaults.

    A scheduler whose sampler is not here must say its betas. Only its noise levels are read, for
    another sampler to draw with.
    """
    name = values.get("_class_name")
    sampler = SAMPLER_OF.get(name) if isinstance(name, str) else None
    for key in VARIANT_KEYS:
        supported = SCHEDULE_FIXED[key]
        if sampler is not None and values.get(key, supported[0]) not in supported:
            name = f"{name}({key}={values[key]!r})"
            sampler = None
    if sampler is None:
        if not isinstance(name, str) or "beta_start" not in values:
            raise InputError(f"{where}: _class_name={name!r} is not supported "
                             f"(supported: {', '.join(SAMPLER_OF)}, and others with betas)")
        values = noise_levels(values)
    defaults = {
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "prediction_type": "flow" if sampler == "flow_euler" else "epsilon",
        "timestep_spacing": None,
        "steps_offset": 0,
        "set_alpha_to_one": True,
        "class_name": name,
    }
    return config_from_json(Schedule, defaults | values, SCHEDULE_FIXED, where)


def noise_levels(values: dict) -> dict:
    """The part of a scheduler_config.json that says nothing of its own sampler."""
    known = {field.name for field in dataclasses.fields(Schedule)} | SCHEDULE_FIXED.keys()
    kept = {}
    for key, value in values.items():
        if key in known and key not in SAMPLER_KEYS:
            kept[key] = value
    return kept


READERS = {
    UNetConfig: read_unet,
    ControlNetConfig: read_controlnet,
    NextDiTConfig: read_nextdit,
    VAEConfig: read_vae,
    CLIPTextConfig: read_clip_text,
    CLIPVisionConfig: read_clip_vision,
    Schedule: read_schedule,
}


# Writing ------------------------------------------------------------------------------------------

def config_to_json(config: Any) -> dict:
    """The JSON file of a config, as diffusers or transformers reads it."""
    return WRITERS[type(config)](config)


def write_unet(config: UNetConfig) -> dict:
    return {"_class_name": "UNet2DConditionModel", **asdict(config)}


def write_controlnet(config: ControlNetConfig) -> dict:
    return {"_class_name": "ControlNetModel", **asdict(config)}


def write_nextdit(config: NextDiTConfig) -> dict:
    return {"_class_name": "NextDiT", **asdict(config)}


def write_vae(config: VAEConfig) -> dict:
    values = {"_class_name": "AutoencoderKL", **asdict(config)}
    for key, block_type in VAE_BLOCK_TYPES.items():
        values[key] = (block_type,) * len(config.block_out_channels)
    return values


def write_clip_text(config: CLIPTextConfig) -> dict:
    values = asdict(config)
    projects = values.pop("with_projection")
    return {
        "architectures": ["CLIPTextModelWithProjection" if projects else "CLIPTextModel"],
        "model_type": "clip_text_model",
        **values,
        "attention_dropout": 0.0,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        # Wrong, as in the official files: with 2 transformers pools at the largest id, the end.
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def write_clip_vision(config: CLIPVisionConfig) -> dict:
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        **asdict(config),
        "num_channels": 3,
        "attention_dropout": 0.0,
        "layer_norm_eps": 1e-5,
    }


def write_schedule(schedule: Schedule) -> dict:
    if schedule.prediction_type == "flow":
        return {
            "_class_name": schedule.class_name,
            "num_train_timesteps": schedule.num_train_timesteps,
            "shift": schedule.shift,
        }
    name = schedule.class_name.partition("(")[0]  # without a variant, see read_schedule
    values = {"_class_name": name, **asdict(schedule)}
    del values["class_name"], values["shift"]
    if schedule.timestep_spacing is None:
        del values["timestep_spacing"]
    values["clip_sample"] = False  # diffusers' DDIM would clip by default
    values["trained_betas"] = None
    return values


WRITERS = {
    UNetConfig: write_unet,
    ControlNetConfig: write_controlnet,
    NextDiTConfig: write_nextdit,
    VAEConfig: write_vae,
    CLIPTextConfig: write_clip_text,
    CLIPVisionConfig: write_clip_vision,
    Schedule: write_schedule,
}
