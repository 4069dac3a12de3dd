"""The UNet: keys and shapes of every official family, values and gradients of diffusers', configs, checkpointing."""

import dataclasses
import json

import peers
import pytest
import torch

from minipic.common import InputError, ParameterError
from minipic.models.unet import SD15, SDXL_BASE, SDXL_REFINER, UNet, UNetConfig, timestep_embedding
from minipic.weights.configs import config_to_json, read_config

SD21 = dataclasses.replace(SD15, sample_size=96, attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024,
                           use_linear_projection=True)
FAMILIES = {"base": SDXL_BASE, "refiner": SDXL_REFINER, "sd15": SD15, "sd21": SD21}
OLD_FILE = {  # unet/config.json as the first files had it: keys that came later are missing
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "downsample_padding": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-5, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}


def meta(config):
    with torch.device("meta"):
        return UNet(config)


@pytest.mark.parametrize("family, tensors, parameters, digest", [
    ("base", 1680, 2_567_463_684, "9556a38d644b6b53"), ("refiner", 1220, 2_259_526_660, None),
    ("sd15", 686, 859_520_964, None), ("sd21", 686, 865_910_724, None)])
def test_full_size_keys_and_shapes(family, tensors, parameters, digest):
    found = peers.key_table(meta(FAMILIES[family]))
    assert found[:2] == (tensors, parameters) and digest in (None, found[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_full_size_keys_and_shapes_are_those_of_diffusers(family):
    pytest.importorskip("diffusers")
    with torch.device("meta"):
        expected = peers.build_peer(FAMILIES[family])
    assert peers.key_table(meta(FAMILIES[family])) == peers.key_table(expected)


@pytest.mark.parametrize("name", peers.UNETS)
def test_golden(name):
    peers.check_golden("unet", name)


@pytest.mark.parametrize("name", peers.UNETS)
def test_diffusers(name):
    pytest.importorskip("diffusers")
    peers.check_peer("unet", name, 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("t", [999, 981.5, torch.tensor(1), torch.tensor([958.25, 0.0])], ids=str)
def test_diffusers_at_real_times_and_sizes(t):
    pytest.importorskip("diffusers")
    sizes = torch.tensor([[1024, 1024, 0, 0, 1024, 1024], [768, 1344, 256, 0, 1536, 640]])
    (outputs, model, given), (peer_outputs, peer, _) = peers.ours("unet", "sdxl"), peers.peer("unet", "sdxl")
    given = {k: v.float() for k, v in given.items()} | {"t": t, "size_ids": sizes}
    assert peers.distance(outputs(model, **given)["prediction"], peer_outputs(peer, **given)["prediction"]) <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name", peers.UNETS)
def test_text_read_once_gives_the_same_bits(name):
    _, model, given = peers.ours("unet", name)
    given = {key: value.float() for key, value in given.items()}
    assert torch.equal(model(**given | {"context": model.text_keys_values(given["context"])}), model(**given))


@torch.no_grad()
def test_one_time_may_be_a_number_or_one_for_each_picture():
    outputs, model, given = peers.ours("unet", "sd15")
    given = {k: v.float() for k, v in given.items()}
    expected = outputs(model, **given | {"t": torch.tensor([7.0, 7.0])})["prediction"]
    for t in (7, 7.0, torch.tensor(7), torch.tensor([7.0])):
        assert torch.equal(outputs(model, **given | {"t": t})["prediction"], expected)


def test_timestep_embedding_is_cosines_then_sines():
    t = torch.tensor([0.0, 0.25, 17.0, 999.0])
    angles = t.double()[:, None] * torch.tensor([10000 ** (-i / 5) for i in range(5)], dtype=torch.float64)
    expected = torch.cat([angles.cos(), angles.sin()], dim=1)
    assert (timestep_embedding(t, 10) - expected).abs().max() < 2e-4  # float32 angles near 999
    assert (timestep_embedding(t[:2], 10) - expected[:2]).abs().max() < 1e-6


@torch.no_grad()
def test_bfloat16_is_float32_rounded():
    outputs, model, given = peers.ours("unet", "sdxl")
    given = {k: v.float() for k, v in given.items()}
    expected = outputs(model, **given)["prediction"]
    half = {k: v if k == "t" else v.bfloat16() for k, v in given.items()}
    found = outputs(model.bfloat16(), **half)["prediction"]
    assert found.dtype == torch.bfloat16 and (found - expected).norm() / expected.norm() < 0.05


def test_checkpointing_computes_blocks_again_and_gives_the_same_gradients():
    calls = []

    def gradients(checkpointing):
        outputs, model, given = peers.ours("unet", "sdxl")
        model.enable_gradient_checkpointing(checkpointing)
        model.down_blocks[1].attentions[0].register_forward_pre_hook(lambda *_: calls.append(checkpointing))
        return peers.run(outputs, model, given)[1]

    plain, saved = gradients(False), gradients(True)
    assert all(torch.equal(plain[key], saved[key]) for key in plain)
    assert calls.count(False) == 2 and calls.count(True) == 3  # each runs without gradients, then with


def test_official_config_is_the_preset():
    path = peers.OFFICIAL / "unet" / "config.json"
    if not path.exists():
        pytest.skip("the official config.json is not here")
    assert read_config(UNetConfig, json.loads(path.read_text())) == SDXL_BASE == UNetConfig()


def test_old_config_is_the_preset():
    assert read_config(UNetConfig, OLD_FILE) == SD15
    assert read_config(UNetConfig, OLD_FILE | {
        "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True,
        "dual_cross_attention": False, "only_cross_attention": False, "num_class_embeds": None,
        "upcast_attention": True, "sample_size": 96}) == SD21


def test_missing_keys_take_the_defaults_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        expected = diffusers.UNet2DConditionModel()
    config = read_config(UNetConfig, {})
    assert peers.key_table(meta(config)) == peers.key_table(expected)
    assert config.per_level(config.attention_head_dim) == (expected.config.attention_head_dim,) * 4


@pytest.mark.parametrize("config", [*FAMILIES.values(), *peers.UNETS.values()])
def test_config_survives_json(config):
    assert read_config(UNetConfig, json.loads(json.dumps(config_to_json(config)))) == config


@pytest.mark.parametrize("name", peers.UNETS)
def test_config_that_diffusers_writes_is_read(name):
    pytest.importorskip("diffusers")
    written = json.loads(peers.build_peer(peers.UNETS[name]).to_json_string())
    assert read_config(UNetConfig, written) == peers.UNETS[name]


@pytest.mark.parametrize("change, words", [
    ({"colour": "red"}, "colour"), ({"act_fn": "relu"}, "act_fn"), ({"dropout": 0.1}, "dropout"),
    ({"class_embed_type": "timestep"}, "class_embed_type"), ({"num_class_embeds": 10}, "num_class_embeds"),
    ({"time_cond_proj_dim": 256}, "time_cond_proj_dim"), ({"resnet_time_scale_shift": "scale_shift"}, "scale_shift"),
    ({"addition_embed_type": "image"}, "addition_embed_type"), ({"mid_block_type": None}, "mid_block_type"),
    ({"down_block_types": ["AttnDownBlock2D"] + ["DownBlock2D"] * 3}, "AttnDownBlock2D"),
    ({"up_block_types": ["DownBlock2D"] + ["UpBlock2D"] * 3}, "'DownBlock2D'")])
def test_what_the_network_cannot_be_is_refused_by_name(change, words):
    with pytest.raises(InputError, match=f"some/config.json.*{words}"):
        read_config(UNetConfig, OLD_FILE | change, "some/config.json")


@pytest.mark.parametrize("change, words", [
    ({"in_channels": 4.0}, "in_channels: 4.0 is of the wrong type; expected int"),
    ({"layers_per_block": 10**9}, "layers_per_block: 1000000000 is out of range"),
    ({"attention_head_dim": (5, 10, 0)}, "attention_head_dim: .* is out of range"),
    ({"norm_eps": float("nan")}, "norm_eps: nan is out of range"),
    ({"block_out_channels": ()}, "block_out_channels: must name 1 to 8 levels"),
    ({"block_out_channels": (320,) * 9}, "block_out_channels: must name 1 to 8 levels"),
    ({"layers_per_block": 64, "transformer_layers_per_block": 2}, "transformer_layers_per_block: asks for 384 blocks"),
    ({"addition_embed_type": "image"}, "addition_embed_type: 'image' is not supported; use 'text_time' or None"),
    ({"addition_time_embed_dim": 255}, "addition_time_embed_dim: 255 is odd"),
    ({"projection_class_embeddings_input_dim": 1280},
     "projection_class_embeddings_input_dim: 1280 has no room for a pooled text besides five size ids of 256"),
    ({"attention_head_dim": (5, 10)}, "attention_head_dim: must have 3 values"),
    ({"attention_head_dim": 7}, "attention_head_dim: 7 heads do not divide 320 channels"),
    ({"norm_num_groups": 33}, "norm_num_groups: 33 does not divide 320 channels"),
    ({"up_block_types": ("UpBlock2D", "UpBlock2D", "DownBlock2D")}, "up_block_types: .*'DownBlock2D' is not supported"),
    ({"addition_time_embed_dim": None}, "addition_time_embed_dim: is needed")])
def test_a_config_checks_itself(change, words):
    with pytest.raises(ParameterError, match=f"^{words}"):
        UNetConfig(**change)
