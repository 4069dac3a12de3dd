"""Single-file checkpoints for the tests, written from networks: the reverse of weights/keys.py.

The names are found by walking the blocks in the order in which sgm numbers them, rather than by
arithmetic on the numbers.
"""

import dataclasses

import torch

from minipic.models.clip import CLIPTextConfig
from minipic.models.vae import VAEConfig
from minipic.weights.single_file import SINGLE_FILES

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
VAE_ATTENTION = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_blocks(config):
    """{start of a diffusers name: start of its sgm name} of a whole UNet."""
    starts = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2"}
    n = 1
    for level in range(len(config.block_out_channels)):
        for layer in range(config.layers_per_block):
            starts[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{n}.0"
            starts[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{n}.1"
            n += 1
        starts[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
        n += 1
    n = 0
    for level, kind in enumerate(config.up_block_types):
        for layer in range(config.layers_per_block + 1):
            starts[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{n}.0"
            starts[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{n}.1"
            n += 1
        slot = 2 if kind.startswith("Cross") else 1
        starts[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{n - 1}.{slot}"
    return starts


def sgm_unet(state, config):
    """{diffusers name: x} of a UNet with `config` -> {sgm name: x}."""
    starts = unet_blocks(config)
    out = {}
    for name, x in state.items():
        start = next(s for s in starts if name.startswith(s + "."))
        inner = name[len(start) + 1:]
        if ".resnets." in start:
            head, _, tail = inner.partition(".")
            inner = f"{RESNET[head]}.{tail}"
        out[f"{starts[start]}.{inner}"] = x
    return out


def ldm_controlnet(state, config):
    """The names of SD 1.5's official ControlNets for one that belongs to a UNet with `config`."""
    slots = ["conv_in", *(f"blocks.{i}" for i in range(6)), "conv_out"]
    starts = {"controlnet_mid_block": "middle_block_out.0"}
    for i, slot in enumerate(slots):
        starts[f"controlnet_cond_embedding.{slot}"] = f"input_hint_block.{2 * i}"
    for i in range(12):
        starts[f"controlnet_down_blocks.{i}"] = f"zero_convs.{i}.0"
    own = {name: x for name, x in state.items() if name.startswith("controlnet_")}
    out = sgm_unet({name: x for name, x in state.items() if name not in own}, config)
    for name, x in own.items():
        start, _, end = name.rpartition(".")
        out[f"{starts[start]}.{end}"] = x
    return {f"control_model.{name}": x for name, x in out.items()}


def ldm_vae(state, levels=4):
    """diffusers names -> LDM names, attention matrices -> 1x1 convolutions."""
    starts = {
        "encoder.conv_norm_out": "encoder.norm_out", "decoder.conv_norm_out": "decoder.norm_out"}
    for half, way, resnets in (("encoder", "down", 2), ("decoder", "up", 3)):
        for i in (0, 1):
            starts[f"{half}.mid_block.resnets.{i}"] = f"{half}.mid.block_{i + 1}"
        for new, old in VAE_ATTENTION.items():
            starts[f"{half}.mid_block.attentions.0.{new}"] = f"{half}.mid.attn_1.{old}"
        for level in range(levels):
            theirs = level if way == "down" else levels - 1 - level
            starts[f"{half}.{way}_blocks.{level}.{way}samplers.0.conv"] = (
                f"{half}.{way}.{theirs}.{way}sample.conv")
            for i in range(resnets):
                starts[f"{half}.{way}_blocks.{level}.resnets.{i}"] = (
                    f"{half}.{way}.{theirs}.block.{i}")
    out = {}
    for name, x in state.items():
        start = next((s for s in starts if name.startswith(s + ".")), "")
        new = starts.get(start, "") + name[len(start):]
        if ".attn_1." in new and x.ndim == 2:
            x = x[:, :, None, None]
        out[new.replace("conv_shortcut", "nin_shortcut")] = x
    return out


def old_vae(state):
    """The diffusers names that SD 1.5's official VAE still has."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    out = {}
    for name, x in state.items():
        start, middle, end = name.partition(".attentions.0.")
        for part in old:
            if end.startswith(part + "."):
                name = start + middle + old[part] + end[len(part):]
        out[name] = x
    return out


def openclip(state):
    """A text tower under OpenCLIP's names: q, k and v stacked, the projection transposed."""
    out = {"logit_scale": torch.tensor(4.6)}
    replacements = {
        "embeddings.token_embedding": "token_embedding",
        "final_layer_norm": "ln_final",
        "embeddings.position_embedding.weight": "positional_embedding",
        "layer_norm": "ln_",
        "encoder.layers": "transformer.resblocks",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn": "attn",
        "text_projection.weight": "text_projection"}
    for name, x in state.items():
        name = name.removeprefix("text_model.")
        for new, old in replacements.items():
            name = name.replace(new, old)
        if name == "text_projection":
            out[name] = x.T.contiguous()
        elif ".q_proj." in name:
            layer = "text_model.encoder.layers." + name.split(".")[2]
            kind = name.rsplit(".", 1)[1]
            stack = [state[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            out[name.replace("q_proj.", "in_proj_")] = torch.cat(stack)
        elif ".k_proj." not in name and ".v_proj." not in name:
            out[name] = x
    return out


def position_ids(state):
    ids = torch.arange(77, device=next(iter(state.values())).device)
    return state | {"text_model.embeddings.position_ids": ids[None]}


def single_file(family, networks):
    """{name: tensor} of a single file of "sdxl", "refiner" or "sd15" that holds these networks."""
    out = {}
    for name, part in SINGLE_FILES[family].parts.items():
        state = networks[name].state_dict()
        if name == "unet":
            state = sgm_unet(state, networks[name].config)
        elif name == "vae":
            state = ldm_vae(state)
        elif name == "text_encoder":
            state = position_ids(state)
        else:
            state = openclip(state)
        out |= {part.prefix + key: x for key, x in state.items()}
    if family == "sd15":
        out |= {"model_ema.decay": torch.tensor(1.0), "betas": torch.rand(10)}
    return out


def tiny(family):
    """(parts, index, scheduler) of a family, like SINGLE_FILES[family] with small configs."""
    source = SINGLE_FILES[family]
    unet = source.parts["unet"].config
    levels = len(unet.block_out_channels)
    sdxl = family != "sd15"
    pooled = 24
    size_ids = 6 if family == "sdxl" else 5
    text = CLIPTextConfig(64, 77, 16, 32, 2, 2)
    small = {
        "unet": dataclasses.replace(
            unet, block_out_channels=(16, 32, 32, 32)[:levels], attention_head_dim=2,
            norm_num_groups=4, transformer_layers_per_block=(1, 2, 2, 1)[:levels],
            cross_attention_dim=40 if family == "sdxl" else pooled,
            addition_time_embed_dim=8 if sdxl else None,
            projection_class_embeddings_input_dim=pooled + 8 * size_ids if sdxl else None),
        "vae": VAEConfig(block_out_channels=(8, 8, 16, 16), norm_num_groups=4),
        "text_encoder": text if sdxl else dataclasses.replace(text, hidden_size=pooled),
        "text_encoder_2": CLIPTextConfig(64, 77, pooled, 32, 2, 2, "gelu", pooled, True)}
    parts = {}
    for name, part in source.parts.items():
        parts[name] = dataclasses.replace(part, config=small[name])
    return parts, source.index, source.scheduler


def networks(parts, dtype=torch.float16):
    """The networks of these parts with random weights.

    Every value differs, so that no two names can be swapped unseen.
    """
    torch.manual_seed(0)
    out = {name: part.model(part.config) for name, part in parts.items()}
    for network in out.values():
        for p in network.parameters():
            p.data = torch.randn(p.shape).to(dtype)
    return out
