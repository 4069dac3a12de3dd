"""Names of tensors: from single-file checkpoints (sgm/LDM layout) and older files to the diffusers layout used here.

Each function takes one (name, tensor) of a file, its part's prefix cut off, and returns the (name, tensor) pairs of
this library's networks; it also works on meta tensors. Of about 2,500 tensors only three kinds change in value: the
VAE's attention (1x1 convolutions to matrices), OpenCLIP's q, k, v (stacked to separate) and its text projection
(transposed). Names that match nothing are returned as they are; the loader then reports them.
"""

import re

BLOCKS_A_LEVEL = 3  # sgm numbers UNet blocks through the levels: 2 resnets and a resampler, or 3 resnets on the way up
VAE_LEVELS = 4  # LDM numbers the decoder's levels from the picture, diffusers from the latent

# Tensors of official files that hold no weights of the networks: training leftovers, precomputed tables and marks.
SCHEDULE = ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
            "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
            "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2")
IGNORED = re.compile(r"(.*\.)?(position_ids|logit_scale)|denoiser\.sigmas|(model_ema|loss)\..*|v_pred|ztsnr|"
                     r"(cond_stage_model|conditioner\.embedders\.0)\.text_projection|" + "|".join(SCHEDULE))

UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}
UNET_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
CONTROLNET = {
    "input_hint_block.0": "controlnet_cond_embedding.conv_in",
    "input_hint_block.14": "controlnet_cond_embedding.conv_out",
    **{f"input_hint_block.{2 * i + 2}": f"controlnet_cond_embedding.blocks.{i}" for i in range(6)},
    **{f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(12)},
    "middle_block_out.0": "controlnet_mid_block"}
UNET_MIDDLE = ("resnets.0", "attentions.0", "resnets.1")
VAE_ATTENTION = {
    "norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0",  # LDM
    "query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers until 2023: SD 1.5
OPENCLIP = {
    "token_embedding": "embeddings.token_embedding", "positional_embedding": "embeddings.position_embedding.weight",
    "transformer.resblocks": "encoder.layers", "ln_final": "final_layer_norm"}
OPENCLIP_LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj"}


def swap_start(name, table):
    """Replace the start of `name` by the table's first entry that it begins with."""
    for old, new in table.items():
        if name == old or name.startswith(old + "."):
            return new + name[len(old):]
    return name


def unet(name, tensor):
    """A UNet, in sgm's names without `model.diffusion_model.` (input_blocks.4.1.norm ->
    down_blocks.1.attentions.0.norm) or in diffusers', which stay."""
    return [(unet_name(name), tensor)]


def unet_name(name):
    match = re.fullmatch(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.(.+)", name)
    if not match or name.startswith("input_blocks.0."):
        return swap_start(name, UNET_ENDS)
    area, index, rest = match[1], int(match[2]), match[3]
    if area == "middle_block":
        return f"mid_block.{UNET_MIDDLE[index]}.{swap_start(rest, UNET_RESNET)}" if index < 3 else name
    level, layer = divmod(index - 1 if area == "input_blocks" else index, BLOCKS_A_LEVEL)
    block = f"{'down' if area == 'input_blocks' else 'up'}_blocks.{level}"
    slot, _, inner = rest.partition(".")
    if slot == "0" and inner.startswith("op."):
        return f"{block}.downsamplers.0.conv.{inner[3:]}"
    if inner.startswith("conv."):  # slot 2 after an attention, 1 where the level has none
        return f"{block}.upsamplers.0.{inner}"
    part = {"0": "resnets", "1": "attentions"}.get(slot)
    return f"{block}.{part}.{layer}.{swap_start(inner, UNET_RESNET)}" if part else name


def controlnet(name, tensor):
    """A ControlNet in the LDM layout, without `control_model.`, or in diffusers'."""
    return unet(swap_start(name, CONTROLNET), tensor)


def sgm_name(name):
    """The inverse of `unet_name` for UNets of two resnets a level, as the official ones: LoRA files use either name."""
    match = re.fullmatch(r"(down|up|mid)_block(?:s\.(\d+))?\.(resnets|attentions|\w+samplers)\.(\d)\.(.+)", name)
    if not match:
        return swap_start(name, {new: old for old, new in UNET_ENDS.items()})
    area, level, kind, layer, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    rest = swap_start(rest, {new: old for old, new in UNET_RESNET.items()}) if kind == "resnets" else rest
    if area == "mid":
        return f"middle_block.{UNET_MIDDLE.index(f'{kind}.{layer}')}.{rest}"
    index = BLOCKS_A_LEVEL * level + (layer if "samplers" not in kind else BLOCKS_A_LEVEL - 1) + (area == "down")
    slot = {"resnets": "0", "attentions": "1", "downsamplers": "0", "upsamplers": "2"}[kind]
    rest = "op" + rest.removeprefix("conv") if kind == "downsamplers" else rest
    return f"{'input' if area == 'down' else 'output'}_blocks.{index}.{slot}.{rest}"


def vae(name, tensor):
    """A VAE in any of three spellings: LDM without `first_stage_model.`, diffusers, and diffusers until 2023."""
    name = re.sub(r"^((?:en|de)coder)\.norm_out\.", r"\1.conv_norm_out.", name)
    name = re.sub(r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", name)
    name = re.sub(r"\.down\.(\d+)\.", r".down_blocks.\1.", name)
    name = re.sub(r"\.up\.([0-3])\.", lambda m: f".up_blocks.{VAE_LEVELS - 1 - int(m[1])}.", name)
    name = re.sub(r"(blocks\.\d+)\.block\.", r"\1.resnets.", name)
    name = re.sub(r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv.", name)
    name = name.replace(".nin_shortcut.", ".conv_shortcut.")
    attention = re.fullmatch(r"(.+)\.mid(?:\.attn_1|_block\.attentions\.0)\.(.+)", name)
    if attention:
        name = f"{attention[1]}.mid_block.attentions.0.{swap_start(attention[2], VAE_ATTENTION)}"
        tensor = tensor[:, :, 0, 0] if tensor.shape[2:] == (1, 1) else tensor  # a 1x1 convolution is a matrix
    return [(name, tensor)]


def clip(name, tensor):
    """A text encoder with Hugging Face's names; newer writers leave `text_model.` out."""
    bare = name.startswith(("embeddings.", "encoder.", "final_layer_norm."))
    return [("text_model." + name if bare else name, tensor)]


def openclip(name, tensor):
    """OpenCLIP's text tower (SDXL's second encoder in single files): q, k, v split; the projection transposed."""
    if name == "text_projection" and tensor.ndim == 2:  # used as x @ P there, as a Linear's weight here
        return [("text_projection.weight", tensor.T.contiguous())]
    name = "text_model." + swap_start(name, OPENCLIP)
    layer = re.fullmatch(r"(text_model\.encoder\.layers\.\d+\.)(.+)", name)
    if not layer:
        return [(name, tensor)]
    stacked = re.fullmatch(r"attn\.in_proj_(weight|bias)", layer[2])
    if stacked and tensor.ndim:
        return [(f"{layer[1]}self_attn.{part}_proj.{stacked[1]}", x) for part, x in zip("qkv", tensor.chunk(3))]
    return [(layer[1] + swap_start(layer[2], OPENCLIP_LAYER), tensor)]


# Names of LoRA tensors: <network><module><end>, dots or underscores within the module.
LORA_NETWORKS = {  # start of the name: the part that it belongs to; the first that fits counts
    "lora_unet_": "unet", "lycoris_": "unet", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder", "unet.": "unet", "text_encoder.": "text_encoder", "text_encoder_2.": "text_encoder_2",
    "diffusion_model.": "unet", "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2", "base_model.model.text_model.": "text_encoder",
    "base_model.model.": "unet", "": "unet"}
LORA_KOHYA = {part: start for start, part in LORA_NETWORKS.items() if start in ("lora_unet_", "lora_te1_", "lora_te2_")}
LORA_ENDS = re.compile(r"(?:\.lora_linear_layer|[._]lora)?[._](?:lora_)?(down|up|A|B)(?:\.default)?\.weight|\.alpha")
LORA_ROLES = {"down": "A", "A": "A", "up": "B", "B": "B", None: "alpha"}


def lora(name):
    """The name of a LoRA tensor in any spelling -> (part, module with underscores, "A", "B" or "alpha"), or None."""
    start = next(start for start in LORA_NETWORKS if name.startswith(start))
    end = re.search(f"(?:{LORA_ENDS.pattern})$", name)
    if not end:
        return None
    module = name[len(start):end.start()].replace(".processor.", ".").replace(".", "_")
    module = re.sub(r"self_attn_to_(q|k|v|out)$", r"self_attn_\1_proj", module)  # older diffusers, text encoders
    return LORA_NETWORKS[start], re.sub(r"(attn\d_to_out)$", r"\1_0", module), LORA_ROLES[end[1]]


def lora_modules(part, names):
    """{a spelling with underscores: module} for the modules `names` of a part."""
    spellings = {name.replace(".", "_"): name for name in names}
    if part == "unet":
        return {sgm_name(name).replace(".", "_"): name for name in names} | spellings
    return {spelling.removeprefix("text_model_"): name for spelling, name in spellings.items()} | spellings


FOREIGN = (  # what it is, and a pattern that some tensor's name contains
    ("a LoRA", r"lora_(up|down|A|B)\b|lora(_linear_layer)?\.(up|down)\.|^lora_(unet|te)|hada_w1|lokr_w1|dora_scale"),
    ("a Control-LoRA", r"^lora_controlnet"),
    ("a union ControlNet", r"(^|\.)(task_embedding$|control_add_embedding\.)"),
    ("a ControlNet", r"^control_model\.|controlnet_(cond_embedding|down_blocks|mid_block)|^input_hint_block\."),
    ("an IP-Adapter", r"^(image_proj|ip_adapter)\."),
    ("a textual inversion", r"^(clip_[lg]|emb_params|string_to_param)$"),
    ("a Flux model", r"(^|\.)(double_blocks|single_blocks|single_transformer_blocks)\."),
    ("a Stable Diffusion 3 model", r"(^|\.)(joint_blocks|context_embedder)\."),
    ("a Playground 2.5 model", r"^edm_(mean|std)$"),
    ("a video model", r"(^|\.)(motion_modules|time_stack)\."),
)
CONTEXT_WIDTH = {2048: "sdxl", 1280: "refiner", 768: "sd15", 1024: "a Stable Diffusion 2 model"}


def foreign(names):
    """What kind of file, not a model of this library, has some of these tensors; None if none is known."""
    return next((what for what, pattern in FOREIGN if any(re.search(pattern, name) for name in names)), None)


def channels(shapes):
    """How many channels the UNet of a single file takes."""
    stem = shapes.get("model.diffusion_model.input_blocks.0.0.weight", ())
    return stem[1] if len(stem) == 4 else 4


def identify(shapes):
    """What a single file holds, from its {name: shape}: "sdxl" (base and Turbo, which differ in values only),
    "refiner", "sd15", "vae", or in words something else."""
    if what := foreign(shapes):
        return what
    contexts = [shape[1] for name, shape in shapes.items()
                if re.fullmatch(r"model\.diffusion_model\..*\.attn2\.to_k\.weight", name) and len(shape) == 2]
    if contexts:
        if channels(shapes) not in (4, 8, 9):
            return f"a model of {channels(shapes)} input channels instead of 4, 8 (instruct-pix2pix) or 9 (inpainting)"
        return CONTEXT_WIDTH.get(contexts[0], f"a model of unknown context width {contexts[0]}")
    bare = {name.removeprefix("first_stage_model.") for name in shapes}
    if {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= bare:
        return "vae"
    if "conv_in.weight" in shapes:
        return "a UNet alone"
    if any(name.endswith(("token_embedding.weight", "token_embedding")) for name in shapes):
        return "a text encoder alone"
    if 0 < len(shapes) <= 2 and all(len(shape) == 2 for shape in shapes.values()):
        return "a textual inversion"
    return f"no known model (its first tensor is {next(iter(shapes), None)!r})"
