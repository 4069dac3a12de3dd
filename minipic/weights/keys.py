"""Names of tensors: from single-file checkpoints and from older files to the names used here.

The networks here have the names of diffusers' folders. Single files are written in the sgm/LDM
layout. `unet`, `controlnet`, `vae`, `clip` and `openclip` each take one (name, tensor) of a file,
without the prefix of its part, and return a list of (name, tensor) of the network here. They work
on meta tensors too. Of about 2,500 tensors only three kinds change in value: the VAE's attention
(1x1 convolutions become matrices), OpenCLIP's q, k and v (stacked there, separate here) and its
text projection (transposed). A name that matches nothing is returned as it is; the loader then
reports it.
"""

import re
from collections.abc import Iterable

import torch

Renamed = list[tuple[str, torch.Tensor]]

# sgm numbers the blocks of a UNet through its levels. On the way down a level has 2 resnets and a
# downsampler, on the way up 3 resnets, the last with the upsampler.
BLOCKS_PER_LEVEL = 3
LONGEST_NAME = 100  # characters of a name in a message
VAE_LEVELS = 4  # LDM numbers the decoder's levels from the picture, diffusers from the latent

# Tensors of official files that are no weights of the networks: leftovers of training, precomputed
# tables, and marks of the kind of prediction.
NOISE_SCHEDULE = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped",
    "posterior_mean_coef1", "posterior_mean_coef2")
IGNORED = re.compile(
    r"(.*\.)?(position_ids|logit_scale)|denoiser\.(log_)?sigmas|(model_ema|loss)\..*|v_pred|ztsnr|"
    # The projection of SDXL's first encoder is not used. ComfyUI saves it.
    r"(cond_stage_model|conditioner\.embedders\.0)\.(transformer\.)?text_projection(\.weight)?|" +
    "|".join(NOISE_SCHEDULE))
# What torch.compile, DistributedDataParallel, PEFT, FSDP and activation checkpointing put before
# the names of the network inside, in any order and number.
WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|module|base_model\.model|_fsdp_wrapped_module|"
    r"_checkpoint_wrapped_module)\.")

# Tables {start of a name in the file: start of the name here}; a start ends where a dot follows.
UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out"}
UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut"}
UNET_MIDDLE = ("resnets.0", "attentions.0", "resnets.1")  # middle_block.0, .1 and .2
CONTROLNET = {
    "input_hint_block.0": "controlnet_cond_embedding.conv_in",
    "input_hint_block.14": "controlnet_cond_embedding.conv_out",
    **{f"input_hint_block.{2 * i + 2}": f"controlnet_cond_embedding.blocks.{i}" for i in range(6)},
    **{f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(12)},
    "middle_block_out.0": "controlnet_mid_block"}
VAE_ATTENTION = {
    # LDM
    "norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0",
    # diffusers until 2023: SD 1.5's official file
    "query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OPENCLIP = {
    "token_embedding": "embeddings.token_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "transformer.resblocks": "encoder.layers",
    "ln_final": "final_layer_norm"}
OPENCLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj"}


def replace_start(name: str, table: dict[str, str]) -> str:
    """Replace the start of a name by the table's first entry that it begins with.

    replace_start("out.0.bias", UNET_ENDS) -> "conv_norm_out.bias"
    """
    for old, new in table.items():
        if name == old or name.startswith(old + "."):
            return new + name[len(old):]
    return name


def unwrapped(name: str) -> str:
    """"module._orig_mod.conv_in.bias" -> "conv_in.bias"."""
    return WRAPPERS.sub("", name)


def first_names(names: list[str], most: int = 3) -> str:
    """The first few of the names, for a message."""
    dots = ", ..." if len(names) > most else ""
    return ", ".join(name[:LONGEST_NAME] for name in names[:most]) + dots


# UNet and ControlNet ----------------------------------------------------------------------------


def unet(name: str, tensor: torch.Tensor) -> Renamed:
    """A UNet, in sgm's names without "model.diffusion_model." or in diffusers' names."""
    return [(unet_name(name), tensor)]


def controlnet(name: str, tensor: torch.Tensor) -> Renamed:
    """A ControlNet, in LDM's names without "control_model." or in diffusers' names."""
    return [(controlnet_name(name), tensor)]


def controlnet_name(name: str) -> str:
    """As `unet_name`, of a ControlNet: "zero_convs.0.0.bias" -> "controlnet_down_blocks.0.bias"."""
    return unet_name(replace_start(name, CONTROLNET))


def unet_name(name: str) -> str:
    """A UNet's name in sgm's layout -> the name here. A name of diffusers is returned as it is.

    "input_blocks.4.1.norm.bias" -> "down_blocks.1.attentions.0.norm.bias": input block 0 is
    conv_in, blocks 1 to 3 are level 0, and block 4 begins level 1. In a block, slot 0 is the resnet
    and slot 1 the transformer.
    """
    match = re.fullmatch(r"(input_blocks|middle_block|output_blocks)\.(\d{1,4})\.(.+)", name)
    if not match or name.startswith("input_blocks.0."):
        return replace_start(name, UNET_ENDS)
    area = match[1]
    index = int(match[2])
    rest = match[3]

    if area == "middle_block":
        if index >= len(UNET_MIDDLE):
            return name
        return f"mid_block.{UNET_MIDDLE[index]}.{replace_start(rest, UNET_RESNET)}"
    if area == "input_blocks":
        level, layer = divmod(index - 1, BLOCKS_PER_LEVEL)
        block = f"down_blocks.{level}"
    else:
        level, layer = divmod(index, BLOCKS_PER_LEVEL)
        block = f"up_blocks.{level}"

    slot, _, inner = rest.partition(".")
    if slot == "0" and inner.startswith("op."):
        return f"{block}.downsamplers.0.conv.{inner.removeprefix('op.')}"
    if inner.startswith("conv."):  # slot 2 after an attention, 1 where the level has none
        return f"{block}.upsamplers.0.{inner}"
    if slot == "0":
        return f"{block}.resnets.{layer}.{replace_start(inner, UNET_RESNET)}"
    if slot == "1":
        return f"{block}.attentions.{layer}.{inner}"
    return name


def sgm_name(name: str) -> str:
    """The inverse of `unet_name`, for UNets of two resnets per level, as all official ones are.

    "down_blocks.1.attentions.0.norm.bias" -> "input_blocks.4.1.norm.bias". LoRA files use either.
    """
    match = re.fullmatch(
        r"(down|up|mid)_block(?:s\.(\d+))?\.(resnets|attentions|\w+samplers)\.(\d)\.(.+)", name)
    if not match:
        return replace_start(name, inverse(UNET_ENDS))
    area, level, kind, layer, rest = match.groups()
    if kind == "resnets":
        rest = replace_start(rest, inverse(UNET_RESNET))
    if area == "mid":
        return f"middle_block.{UNET_MIDDLE.index(f'{kind}.{layer}')}.{rest}"

    first = BLOCKS_PER_LEVEL * int(level)  # of the level's blocks
    last = first + BLOCKS_PER_LEVEL - 1
    if kind == "downsamplers":
        return f"input_blocks.{last + 1}.0.op{rest.removeprefix('conv')}"
    if kind == "upsamplers":
        return f"output_blocks.{last}.2.{rest}"
    slot = 0 if kind == "resnets" else 1
    if area == "down":
        return f"input_blocks.{first + int(layer) + 1}.{slot}.{rest}"
    return f"output_blocks.{first + int(layer)}.{slot}.{rest}"


def inverse(table: dict[str, str]) -> dict[str, str]:
    return {new: old for old, new in table.items()}


# VAE --------------------------------------------------------------------------------------------


def vae(name: str, tensor: torch.Tensor) -> Renamed:
    """A VAE in LDM's names without "first_stage_model.", diffusers', or diffusers' until 2023.

    "decoder.up.3.block.0.norm1.bias" -> "decoder.up_blocks.0.resnets.0.norm1.bias"
    """
    # encoder.norm_out -> encoder.conv_norm_out
    name = re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", name)
    # mid.block_1 -> mid_block.resnets.0
    name = re.sub(r"\.mid\.block_1\.", ".mid_block.resnets.0.", name)
    name = re.sub(r"\.mid\.block_2\.", ".mid_block.resnets.1.", name)
    # down.0 -> down_blocks.0, and up.0 -> up_blocks.3: the way up is numbered from its other end
    name = re.sub(r"\.down\.(\d+)\.", r".down_blocks.\1.", name)
    for level in range(VAE_LEVELS):
        name = name.replace(f".up.{level}.", f".up_blocks.{VAE_LEVELS - 1 - level}.")
    # blocks.0.block.1 -> blocks.0.resnets.1
    name = re.sub(r"(blocks\.\d+)\.block\.", r"\1.resnets.", name)
    # downsample.conv -> downsamplers.0.conv
    name = re.sub(r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv.", name)
    name = name.replace(".nin_shortcut.", ".conv_shortcut.")

    # mid.attn_1.q -> mid_block.attentions.0.to_q
    attention = re.fullmatch(r"(.+)\.mid(?:\.attn_1|_block\.attentions\.0)\.(.+)", name)
    if attention:
        half, inner = attention.groups()
        name = f"{half}.mid_block.attentions.0.{replace_start(inner, VAE_ATTENTION)}"
        if tensor.shape[2:] == (1, 1):  # a 1x1 convolution [out, in, 1, 1] is a matrix
            tensor = tensor[:, :, 0, 0]
    return [(name, tensor)]


# Text encoders ----------------------------------------------------------------------------------


def clip(name: str, tensor: torch.Tensor) -> Renamed:
    """A text encoder with Hugging Face's names. Newer writers leave "text_model." out.

    "final_layer_norm.bias" -> "text_model.final_layer_norm.bias"
    """
    if name.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
        name = "text_model." + name
    return [(name, tensor)]


def openclip(name: str, tensor: torch.Tensor) -> Renamed:
    """OpenCLIP's text tower, SDXL's second encoder in single files.

    "transformer.resblocks.0.ln_1.bias" -> "text_model.encoder.layers.0.layer_norm1.bias"
    """
    if name == "text_projection" and tensor.ndim == 2:
        # used as x @ P there and as the weight of a Linear, x @ W.T, here
        return [("text_projection.weight", tensor.T.contiguous())]
    if name == "text_projection.weight":  # as diffusers' converter writes it: a Linear's already
        return [(name, tensor)]
    name = "text_model." + replace_start(name, OPENCLIP)
    in_layer = re.fullmatch(r"(text_model\.encoder\.layers\.\d+\.)(.+)", name)
    if not in_layer:
        return [(name, tensor)]

    layer, inner = in_layer.groups()
    if inner in ("attn.in_proj_weight", "attn.in_proj_bias") and tensor.ndim > 0:
        kind = inner.removeprefix("attn.in_proj_")
        thirds = tensor.chunk(3)  # fewer where a damaged file has fewer rows
        return [(f"{layer}self_attn.{x}_proj.{kind}", rows) for x, rows in zip("qkv", thirds)]
    return [(layer + replace_start(inner, OPENCLIP_LAYER), tensor)]


# Networks with one layout ------------------------------------------------------------------------


def unchanged(name: str, tensor: torch.Tensor) -> Renamed:
    """A network whose files have only ever had the names that it has here."""
    return [(name, tensor)]


# Files of other kinds ---------------------------------------------------------------------------

LORA = r"lora_(up|down|A|B)\b|lora(_linear_layer)?\.(up|down)\.|^lora_(unet|te)"
FOREIGN_KINDS = {  # what a file is: a pattern that is in the name of one of its tensors
    # Other ways to change the layers of a network, which look like LoRAs
    "a DoRA": r"dora_scale|lora_magnitude_vector",
    "a LoHa": r"hada_(w|t)\d",
    "a LoKr": r"lokr_(w|t)\d",
    "a GLoRA": r"\.[ab][12]\.weight$",
    "an (IA)3": r"\bia3_l|\.on_input$",
    "an OFT or BOFT": r"\bb?oft_",
    "a LoRA with biases of its own": r"lora_B\.([^.]+\.)?bias$",
    "a LoRA": LORA,
    # Networks beside the UNet, and words
    "a ControlNet-LLLite": r"^lllite_",
    "a Control-LoRA": r"^lora_controlnet",
    "a union ControlNet": r"(^|\.)(task_embedding$|control_add_embedding\.)",
    "a ControlNet": (
        r"^control_model\.|controlnet_(cond_embedding|down_blocks|mid_block)|^input_hint_block\."),
    "an IP-Adapter": r"^(image_proj|ip_adapter)\.",
    "a T2I-Adapter": r"^(adapter\.)?body\.\d+\.(block\d|in_conv|resnets)\b",
    "a textual inversion": r"^(clip_[lg]|emb_params|string_to_param)$",
    # Models of other families, in the names of a model or of a LoRA for it
    "a Flux model": r"(^|[._])(double_blocks|single_blocks|single_transformer_blocks)[._]",
    "a Stable Diffusion 3 model": (
        r"(^|[._])(joint_blocks|context_embedder)[._]|attn\.add_[qkv]_proj"),
    "a Playground 2.5 model": r"^edm_(mean|std)$",
    "a CosXL model": r"^edm_vpred\.",
    "a video model": r"(^|[._])(motion_modules?|time_stack)[._]",
    "a Stable Cascade model": r"(^|\.)(clip_txt_mapper|effnet_mapper)\.|^lora_prior_",
    "a diffusion transformer": (
        r"(^|\.)(x_embedder|cap_embedder|caption_projection|adaln_single|patchify_proj|txt_norm|"
        r"text_embedding\.0)\b|"
        r"(^|\.)(lora_unet_|transformer\.|lora_transformer_|diffusion_model\.)"
        r"(transformer_)?(blocks|layers)[._]"),
    "a T5 text encoder": r"\.SelfAttention\.",
    "a CLIP image encoder": r"^vision_model\.",
    "an upscaler": r"\b(rdb|RDB)\d\.",
    "a model with scaled 8-bit weights": r"(^|\.)(scaled_fp8|scale_weight|weight_scale)$",
    "a model with 4-bit weights": r"\.(absmax|quant_map|qweight)$",
}


def foreign_kind(names: Iterable[str], besides: str = "") -> tuple[str, str] | None:
    """(what kind of file has some of these tensors, the first such name); None where none is known.

    besides: a kind that is not looked for.
    """
    names = list(names)
    for kind, pattern in FOREIGN_KINDS.items():
        for name in names:
            if kind != besides and re.search(pattern, name):
                return kind, name
    return None
