"""Names of tensors: at full size against published tables, by values against other converters."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from single_files import (
    ldm_controlnet, ldm_vae, networks, old_vae, openclip, sgm_unet, single_file, tiny)

from minipic.models.clip import CLIPText, CLIPTextConfig
from minipic.models.controlnet import ControlNet
from minipic.weights import keys
from minipic.weights.parts import Part, build_empty
from minipic.weights.single_file import SINGLE_FILES, identify
from minipic.weights.configs import config_to_json

FACTS = Path(__file__).parents[2] / "shared" / "facts"


def facts(name):
    path = FACTS / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return json.loads(path.read_text())


def full_size(family):
    """(the networks of a family on the meta device, its parts)"""
    parts = SINGLE_FILES[family].parts
    return {name: build_empty(part.model, part.config) for name, part in parts.items()}, parts


def converted(part, tensors):
    """What a part makes of a file's {name: tensor}."""
    out = {}
    for name, x in tensors.items():
        short = name.removeprefix(part.prefix)
        if name.startswith(part.prefix) and not keys.IGNORED.fullmatch(short):
            for key, value in part.convert(short, x):
                assert key not in out
                out[key] = value
    return out


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def digest(tensors):
    """The first 16 hexadecimal digits of the sha256 of all names and shapes, in sorted lines."""
    lines = sorted(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def test_sdxl_names_and_shapes_at_full_size():
    """The official files' digests, in the diffusers and in the single-file layout."""
    models, parts = full_size("sdxl")
    whole = single_file("sdxl", models)
    ours = {name: digest(model.state_dict()) for name, model in models.items()}
    assert ours == {
        "unet": "9556a38d644b6b53", "vae": "600696bc94ffc80f", "text_encoder": "9602ce291879ca7b",
        "text_encoder_2": "cda6f69951a9c223"}
    unet = models["unet"]
    assert digest(sgm_unet(unet.state_dict(), unet.config)) == "d8427731b1d2b4b6"
    assert digest(ldm_vae(models["vae"].state_dict())) == "50f3b11a29b71571"
    assert digest(openclip(models["text_encoder_2"].state_dict())) == "a3f85b75a0fa03a1"
    assert len(whole) == 2515 and digest(whole) == "0a867b1ad801abb9"
    assert {name: digest(converted(part, whole)) for name, part in parts.items()} == ours
    assert [len(model.state_dict()) for model in models.values()] == [1680, 248, 196, 517]


@pytest.mark.parametrize("family, tensors, weights", [
    ("sdxl", 1680, 2_567_463_684), ("refiner", 1220, 2_259_526_660), ("sd15", 686, 859_520_964)])
def test_unet_at_full_size(family, tensors, weights):
    models, parts = full_size(family)
    state = models["unet"].state_dict()
    assert len(state) == tensors and sum(x.numel() for x in state.values()) == weights
    whole = single_file(family, models)
    assert identify({name: tuple(x.shape) for name, x in whole.items()}) == family
    assert {name: digest(converted(part, whole)) for name, part in parts.items()} == {
        name: digest(model.state_dict()) for name, model in models.items()}


def test_unet_names_equal_the_published_map():
    for old, new in facts("ldm_unet_map").items():
        assert keys.unet_name(old.removeprefix("model.diffusion_model.")) == new


def test_single_file_tables_give_the_diffusers_tables():
    whole = {}
    for name, shape in facts("singlefile_base_keys").items():
        whole[name] = torch.empty(shape, device="meta")
    tables = facts("diffusers_keys")
    for name, part in SINGLE_FILES["sdxl"].parts.items():
        table = tables[name.replace("text_encoder", "te").replace("_2", "2")]
        assert {key: list(x.shape) for key, x in converted(part, whole).items()} == table


@pytest.mark.parametrize("family", SINGLE_FILES)
def test_values_survive_the_single_file(family):
    parts = tiny(family)[0]
    models = networks(parts)
    whole = single_file(family, models)
    for name, part in parts.items():
        assert equal(converted(part, whole), models[name].state_dict())


def test_every_spelling_of_a_vae():
    state = networks(tiny("sdxl")[0])["vae"].state_dict()
    part = Part(None, None, convert=keys.vae)
    for spelling in (state, ldm_vae(state), old_vae(state)):
        assert equal(converted(part, spelling), state)
    assert "encoder.mid_block.attentions.0.query.weight" in old_vae(state)


@pytest.mark.parametrize("family", SINGLE_FILES)
def test_diffusers_converts_alike(family):
    peer = pytest.importorskip("diffusers.loaders.single_file_utils")
    parts = tiny(family)[0]
    models = networks(parts)
    whole = single_file(family, models)
    config = config_to_json(models["unet"].config) | {"class_embed_type": None}
    theirs = peer.convert_ldm_unet_checkpoint(dict(whole), config)
    assert equal(theirs, converted(parts["unet"], whole))
    theirs = peer.convert_ldm_vae_checkpoint(dict(whole), config_to_json(models["vae"].config))
    assert equal(theirs, converted(parts["vae"], whole))
    if "text_encoder_2" in parts:
        config = type("Model", (), {"config": models["text_encoder_2"].config})
        part = parts["text_encoder_2"]
        theirs = peer.convert_open_clip_checkpoint(config, dict(whole), part.prefix)
        assert equal(theirs, converted(part, whole))


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_a_control_net_in_both_spellings_and_as_diffusers_converts_it(family):
    unet = networks({"unet": tiny(family)[0]["unet"]}, torch.float32)["unet"]
    model = ControlNet.from_unet(unet)
    state = {name: torch.randn_like(x) for name, x in model.state_dict().items()}
    whole = ldm_controlnet(state, unet.config)
    part = Part(None, None, prefix="control_model.", convert=keys.controlnet)
    assert equal(converted(part, whole), state)
    assert equal(converted(Part(None, None, convert=keys.controlnet), state), state)
    peer = pytest.importorskip("diffusers.loaders.single_file_utils")
    theirs = peer.convert_controlnet_checkpoint(dict(whole), config_to_json(model.config))
    if family == "sdxl":  # whose added embedding diffusers does not look for
        for name in [name for name in state if name.startswith("add_embedding.")]:
            del state[name]
    assert equal(theirs, state)


def test_openclip_pools_as_its_own_tower():
    """The projection is square, so only values tell which way round it is."""
    golden = load_file(Path(__file__).parent / "goldens" / "openclip.safetensors")
    ids, pooled = golden.pop("golden.ids"), golden.pop("golden.pooled")
    config = CLIPTextConfig(32, 12, 16, 64, 2, 2, "gelu", 16, True)
    part = Part(CLIPText, config, convert=keys.openclip)
    model = build_empty(CLIPText, config)
    model.load_state_dict(converted(part, golden), strict=True, assign=True)
    torch.testing.assert_close(model(ids)[1], pooled, rtol=1e-5, atol=1e-6)
    model.text_projection.weight.data = model.text_projection.weight.data.T
    assert (model(ids)[1] - pooled).abs().max() > 0.1


@pytest.mark.parametrize("name", [
    "text_model.encoder.layers.0.mlp.fc1.weight", "text_model.final_layer_norm.bias",
    "text_projection.weight"])
def test_clip_with_and_without_its_prefix(name):
    x = torch.zeros(1)
    assert keys.clip(name, x) == [(name, x)] == keys.clip(name.removeprefix("text_model."), x)


@pytest.mark.parametrize("name, ignored", [
    ("text_model.embeddings.position_ids", True), ("position_ids.weight", False),
    ("logit_scale", True), ("denoiser.sigmas", True), ("denoiser.log_sigmas", True),
    ("model_ema.diffusion_modelinput_blocks00weight", True),
    ("betas", True), ("decoder.betas", False),
    ("loss.logvar", True), ("decoder.loss.logvar", False),
    ("text_projection", False), ("conditioner.embedders.0.text_projection", True),
    ("conditioner.embedders.0.transformer.text_projection.weight", True),
    ("conditioner.embedders.1.model.text_projection", False),
    ("conditioner.embedders.1.model.text_projection.weight", False)])
def test_what_is_ignored(name, ignored):
    assert bool(keys.IGNORED.fullmatch(name)) == ignored


@pytest.mark.parametrize("wrappers", [
    "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "module.module.", "base_model.model._orig_mod.",
    "_fsdp_wrapped_module._checkpoint_wrapped_module."])
def test_wrappers_are_left_out_wherever_they_stand(wrappers):
    for start in ("", "model.diffusion_model.", "unet.", "down_blocks.0."):
        assert keys.unwrapped(f"{start}{wrappers}conv_in.bias") == f"{start}conv_in.bias"
    assert keys.unwrapped("motion_module.my_orig_mod.x") == "motion_module.my_orig_mod.x"


def unet_file(channels=4, width=2048):
    to_k = "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    return {"model.diffusion_model.input_blocks.0.0.weight": (320, channels, 3, 3),
            f"model.diffusion_model.{to_k}": (640, width)}


A_TO_K = "text_encoder.encoder.layers.0.self_attn.k_proj.lora_linear_layer.down.weight"
A_TO_Q = "unet.mid_block.attentions.0.attn1.processor.to_q_lora.down.weight"
HINT = {"input_hint_block.0.weight": (16, 3, 3, 3)}
CONV_IN = {"conv_in.weight": (320, 4, 3, 3)}


@pytest.mark.parametrize("shapes, what", [
    (unet_file(), "sdxl"),
    (unet_file(channels=9), "sdxl"),
    (unet_file(width=1280), "refiner"),
    (unet_file(width=768), "sd15"),
    (unet_file(channels=8, width=768), "sd15"),
    (unet_file(width=1024), "a Stable Diffusion 2 model"),
    (unet_file() | {"model.diffusion_model.out.2.weight": (4, 320, 3, 3)},  # without the middle's transformer
     "a distilled model whose UNet has fewer blocks, such as SSD-1B"),
    (unet_file(channels=5), "5 input channels"),
    (unet_file() | {"edm_mean": (1, 4, 1, 1)}, "a Playground 2.5 model"),
    ({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": (4, 640)}, "a LoRA"),
    ({"unet.down_blocks.1.attentions.0.proj_in.lora_A.weight": (4, 640)}, "a LoRA"),
    ({"unet.mid_block.attentions.0.proj_in.lora.down.weight": (4, 640)}, "a LoRA"),
    ({A_TO_K: (4, 768)}, "a LoRA"),
    ({A_TO_Q: (4, 640)}, "a LoRA"),
    ({"lora_unet_mid_block.hada_w1_a": (4, 4)}, "a LoHa"),
    ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (4, 4)}, "a LoRA"),
    ({"control_model.input_hint_block.0.weight": (16, 3, 3, 3)}, "a ControlNet"),
    ({"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)} | CONV_IN, "a ControlNet"),
    (HINT | {"time_embed.0.weight": (1280, 320)}, "a ControlNet"),
    ({"lora_controlnet": ()} | HINT, "a Control-LoRA"),
    ({"task_embedding": (6, 320), "controlnet_mid_block.bias": (1280,)}, "a union ControlNet"),
    ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "a textual inversion"),
    ({"<cat>": (1, 768)}, "a textual inversion"),
    ({"model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight": (8, 8)},
     "a Stable Diffusion 3 model"),
    ({"double_blocks.0.img_attn.norm.key_norm.scale": (128,)}, "a Flux model"),
    ({"first_stage_model.encoder.conv_in.weight": (1,),
      "first_stage_model.decoder.conv_in.weight": (1,)}, "vae"),
    (CONV_IN, "a UNet alone"),
    ({"input_blocks.0.0.weight": (320, 4, 3, 3)}, "a UNet alone"),
    ({"adapter.body.0.in_conv.weight": (1,)} | CONV_IN, "a T2I-Adapter"),
    ({"body.0.block1.weight": (1,)} | CONV_IN, "a T2I-Adapter"),
    ({"image_proj.proj.weight": (1,), "ip_adapter.1.to_k_ip.weight": (1,)}, "an IP-Adapter"),
    (unet_file() | {"edm_vpred.sigma_max": ()}, "a CosXL model"),
    ({"model.diffusion_model.clip_txt_mapper.weight": (1,)}, "a Stable Cascade model"),
    ({"adaln_single.linear.weight": (1,)}, "a diffusion transformer"),
    ({"model.diffusion_model.cap_embedder.0.weight": (1,)}, "a diffusion transformer"),
    ({"encoder.block.0.layer.0.SelfAttention.k.weight": (1,)}, "a T5 text encoder"),
    ({"vision_model.embeddings.class_embedding": (1,)}, "a CLIP image encoder"),
    ({"model.1.sub.0.RDB1.conv1.0.weight": (1,)}, "an upscaler"),
    (unet_file() | {"model.diffusion_model.scaled_fp8": (0,)}, "a model with scaled 8-bit weights"),
    (unet_file() | {"model.diffusion_model.out.2.weight.absmax": (1,)}, "a model with 4-bit weights"),
    ({"text_model.embeddings.token_embedding.weight": (49408, 768), "x": (1,), "y": (1,)},
     "a text encoder alone"),
    ({"layer.0.weight": (3, 3, 3)}, "no known model (its first tensor is 'layer.0.weight')"),
    ({}, "no known model")])
def test_what_a_file_is(shapes, what):
    assert what in identify(shapes)
