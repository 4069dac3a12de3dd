"""The VAE: keys and shapes of the official file, values and gradients of diffusers', configs, scaling."""

import dataclasses
import json
from pathlib import Path

import peers
import pytest
import torch

from minipic.common import InputError, ParameterError
from minipic.models.vae import SD15_VAE, SDXL_VAE, VAE, VAEConfig
from minipic.weights.configs import config_to_json, read_config
from minipic.weights.layouts import load_part, open_part
from minipic.world.scene import render, sample_scene

OLD_FILE = {  # vae/config.json as the first files had it: keys that came later are missing
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3,
    "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4}


def meta(config):
    with torch.device("meta"):
        return VAE(config)


def test_full_size_keys_and_shapes():
    assert peers.key_table(meta(SDXL_VAE)) == (248, 83_653_863, "600696bc94ffc80f")


@pytest.mark.parametrize("config", [SDXL_VAE, dataclasses.replace(
    SDXL_VAE, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)])
def test_full_size_keys_and_shapes_are_those_of_diffusers(config):
    pytest.importorskip("diffusers")
    with torch.device("meta"):
        expected = peers.build_peer(config)
    assert peers.key_table(meta(config)) == peers.key_table(expected)


@pytest.mark.parametrize("name", peers.VAES)
def test_golden(name):
    peers.check_golden("vae", name)


@pytest.mark.parametrize("name", peers.VAES)
def test_diffusers(name):
    pytest.importorskip("diffusers")
    peers.check_peer("vae", name, 2e-5)


@torch.no_grad()
def test_a_picture_that_does_not_divide_by_the_factor_encodes_as_in_diffusers():
    pytest.importorskip("diffusers")
    (outputs, model, given), (peer_outputs, peer, _) = peers.ours("vae", "sdxl"), peers.peer("vae", "sdxl")
    given = {"image": peers.numbers((1, 3, 22, 25), 3).float(), "z": peers.numbers((1, 4, 3, 2), 4).float()}
    found, expected = outputs(model, **given), peer_outputs(peer, **given)
    assert max(peers.distance(found[key], expected[key]) for key in expected) <= 2e-5


@torch.no_grad()
def test_log_variance_stays_between_the_bounds():
    _, model, given = peers.ours("vae", "sdxl")
    model.quant_conv.bias[4:] = torch.tensor([1e3, -1e3, 1.0, 1.0])
    _, logvar = model.encode(given["image"].float())
    assert (logvar[:, 0] == 20).all() and (logvar[:, 1] == -30).all() and (logvar[:, 2:].abs() < 20).all()


@pytest.mark.slow
@torch.no_grad()
def test_tiles_are_near_to_the_whole():
    """On pictures of seven times the size the shipped VAE was trained for. Where one tile holds all, it is the whole;
    elsewhere GroupNorm differs, on average by less than in diffusers' tiles, which also attend to themselves alone."""
    vae = load_part(open_part(Path(__file__).parents[1] / "weights" / "tiny" / "vae", "vae"), torch.float32)
    z = vae.encode(render([sample_scene(0, i) for i in range(2)], (192, 160), truth=False).rgb)[0]
    whole, tiled = vae.decode(z), vae.decode_tiles(z, side=32, overlap=8)
    small = z[:1, :, :30, :32]
    assert torch.allclose(vae.decode_tiles(small, side=32, overlap=8), vae.decode(small), atol=1e-6)
    error = (tiled - whole).abs()
    assert tiled.shape == whole.shape and error.mean() < 0.02 and error.max() < 0.25
    columns = error.mean((0, 1, 2))[1:-1]  # no seam: the error is spread out
    assert columns.max() < 3 * columns.mean()

    pytest.importorskip("diffusers")
    peer = peers.build_peer(vae.config).eval()
    peer.load_state_dict(vae.state_dict())
    peer.enable_tiling()
    peer.tile_latent_min_size, peer.tile_sample_min_size = 32, 32 * vae.config.factor
    assert error.mean() < (peer.decode(z).sample - whole).abs().mean()


def test_scale_is_the_shift_then_the_factor():
    model, z = VAE(peers.VAES["flux"]), peers.numbers((2, 16, 3, 3), 1)
    assert torch.allclose(model.scale(z), (z - 0.1159) * 0.3611)
    assert torch.allclose(model.unscale(model.scale(z)), z)
    assert torch.allclose(meta(SDXL_VAE).scale(z), z * 0.13025)


def test_factor_is_pixels_per_latent_pixel():
    assert (SDXL_VAE.factor, peers.VAES["sdxl"].factor, peers.VAES["flux"].factor) == (8, 4, 2)


def test_official_config_is_the_preset():
    path = peers.OFFICIAL / "vae" / "config.json"
    if not path.exists():
        pytest.skip("the official config.json is not here")
    assert read_config(VAEConfig, json.loads(path.read_text())) == SDXL_VAE == VAEConfig()


def test_old_config_is_the_preset():
    assert read_config(VAEConfig, OLD_FILE) == SD15_VAE


def test_missing_keys_take_the_defaults_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        expected = diffusers.AutoencoderKL()
    config = read_config(VAEConfig, {})
    assert peers.key_table(meta(config)) == peers.key_table(expected)
    assert config.scaling_factor == expected.config.scaling_factor


@pytest.mark.parametrize("config", [SDXL_VAE, SD15_VAE, *peers.VAES.values()])
def test_config_survives_json(config):
    assert read_config(VAEConfig, json.loads(json.dumps(config_to_json(config)))) == config


@pytest.mark.parametrize("name", peers.VAES)
def test_config_that_diffusers_writes_is_read(name):
    pytest.importorskip("diffusers")
    written = json.loads(peers.build_peer(peers.VAES[name]).to_json_string())
    assert read_config(VAEConfig, written) == peers.VAES[name]


@pytest.mark.parametrize("change, words", [
    ({"colour": "red"}, "colour"), ({"act_fn": "relu"}, "act_fn"), ({"latents_mean": [0.1] * 4}, "latents_mean"),
    ({"mid_block_add_attention": False}, "mid_block_add_attention"), ({"latent_channels": 0}, "latent_channels: 0"),
    ({"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "AttnDownEncoderBlock2D"),
    ({"up_block_types": ["UpDecoderBlock2D"] * 3}, "up_block_types")])
def test_what_the_network_cannot_be_is_refused_by_name(change, words):
    with pytest.raises(InputError, match=f"some/config.json.*{words}"):
        read_config(VAEConfig, OLD_FILE | change, "some/config.json")


@pytest.mark.parametrize("change, words", [
    ({"latent_channels": "4"}, "latent_channels: '4' is of the wrong type; expected int"),
    ({"force_upcast": 1}, "force_upcast: 1 is of the wrong type"),
    ({"block_out_channels": [64]}, r"block_out_channels: \[64\] is of the wrong type"),
    ({"layers_per_block": 0}, "layers_per_block: 0 is out of range"),
    ({"layers_per_block": 10**9}, "layers_per_block: 1000000000 is out of range"),
    ({"block_out_channels": (64, -64)}, "block_out_channels: .* is out of range"),
    ({"block_out_channels": ()}, "block_out_channels: must name 1 to 16 levels"),
    ({"block_out_channels": (32,) * 17}, "block_out_channels: must name 1 to 16 levels"),
    ({"norm_num_groups": 24}, "norm_num_groups: 24 does not divide 128 channels"),
    ({"scaling_factor": 0.0}, "scaling_factor: 0.0 is out of range"),
    ({"scaling_factor": float("nan")}, "scaling_factor: nan is out of range"),
    ({"shift_factor": float("inf")}, "shift_factor: inf is out of range")])
def test_a_config_checks_itself(change, words):
    with pytest.raises(ParameterError, match=f"^{words}"):
        VAEConfig(**change)
