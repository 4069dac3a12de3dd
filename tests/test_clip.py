"""CLIP: keys and shapes of the official files, values and gradients of transformers', pooling, the contrastive loss."""

import dataclasses
import json

import peers
import pytest
import torch

from minipic.common import InputError, ParameterError
from minipic.models.clip import (
    CLIP_L, OPENCLIP_BIGG, CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig, contrastive_loss)
from minipic.weights.configs import config_to_json, read_config

SD2 = dataclasses.replace(CLIP_L, hidden_size=1024, intermediate_size=4096, num_attention_heads=16, hidden_act="gelu",
                          num_hidden_layers=23, projection_dim=512)
MODELS = {CLIPTextConfig: CLIPText, CLIPVisionConfig: CLIPVision}
CASES = [("text", name) for name in peers.TEXTS] + [("vision", name) for name in peers.VISIONS]
CONFIGS = [CLIP_L, OPENCLIP_BIGG, SD2, CLIPVisionConfig(), *peers.TEXTS.values(), *peers.VISIONS.values()]


def meta(config):
    with torch.device("meta"):
        return MODELS[type(config)](config)


@pytest.mark.parametrize("config, table", [
    (CLIP_L, (196, 123_060_480, "9602ce291879ca7b")), (OPENCLIP_BIGG, (517, 694_659_840, "cda6f69951a9c223"))])
def test_full_size_keys_and_shapes(config, table):
    assert peers.key_table(meta(config)) == table


@pytest.mark.parametrize("config", [CLIP_L, OPENCLIP_BIGG, SD2, CLIPVisionConfig()])
def test_full_size_keys_and_shapes_are_those_of_transformers(config):
    pytest.importorskip("transformers")
    with torch.device("meta"):
        expected = peers.build_peer(config)
    assert peers.key_table(meta(config)) == peers.key_table(expected)


@pytest.mark.parametrize("kind, name", CASES)
def test_golden(kind, name):
    peers.check_golden(kind, name)


@pytest.mark.parametrize("kind, name", CASES)
def test_transformers(kind, name):
    pytest.importorskip("transformers")
    peers.check_peer(kind, name, 1e-6)


@torch.no_grad()
def test_pooled_is_the_first_end_token_whatever_its_padding():
    _, model, _ = peers.ours("text", "gelu_projected")
    ids = torch.tensor([[58, 5, 6, 59]])
    expected = model(ids)[1]
    for padding in ([59, 59, 59], [0, 0, 0], [1, 2, 3]):
        assert peers.distance(model(torch.cat([ids, torch.tensor([padding])], dim=1))[1], expected) < 1e-6


@torch.no_grad()
def test_added_tokens_do_not_take_the_pooled_place():
    _, model, _ = peers.ours("text", "quick_gelu")
    table = model.text_model.embeddings.token_embedding
    expected = model(torch.tensor([[58, 5, 6, 59, 59]]))[1]
    table.weight.data = torch.cat([table.weight, table.weight[5:6]])  # token 60 means what token 5 means
    assert peers.distance(model(torch.tensor([[58, 60, 6, 59, 59]]))[1], expected) < 1e-6


@torch.no_grad()
def test_a_token_sees_no_later_one():
    _, model, given = peers.ours("text", "quick_gelu")
    states, changed = model(given["ids"])[0], model(given["ids"].index_fill(1, torch.tensor([6]), 11))[0]
    for a, b in zip(states, changed):
        assert torch.equal(a[:, :6], b[:, :6]) and not torch.equal(a[:, 6], b[:, 6])


def test_contrastive_loss_is_the_mean_of_both_cross_entropies():
    images, texts, scale = peers.numbers((5, 8), 1), peers.numbers((5, 8), 2), torch.tensor(1.7).double()
    unit = [x / (x ** 2).sum(1, keepdim=True) ** 0.5 for x in (images, texts)]
    chances = (scale.exp() * unit[0] @ unit[1].T).exp()  # [picture, text]
    right = chances.diagonal()
    expected = -((right / chances.sum(1)).log().mean() + (right / chances.sum(0)).log().mean()) / 2
    assert peers.distance(contrastive_loss(images, texts, scale), expected) < 1e-12


def test_contrastive_loss_and_gradients_of_transformers():
    transformers = pytest.importorskip("transformers")
    _, text, given = peers.ours("text", "gelu_projected", torch.float64)
    _, vision, pictures = peers.ours("vision", "gelu", torch.float64)
    images = pictures["images"][[0, 1, 0]] + peers.numbers((3, 3, 20, 20), 5)
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    loss = contrastive_loss(vision(images)[1], text(given["ids"])[1], scale)
    loss.backward()

    both = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=config_to_json(text.config), vision_config=config_to_json(vision.config), projection_dim=24)).double()
    both.load_state_dict(text.state_dict() | vision.state_dict() | {"logit_scale": scale.detach()})
    expected = both(input_ids=given["ids"], pixel_values=images, return_loss=True).loss
    expected.backward()
    assert peers.distance(loss, expected) < 1e-12
    assert peers.distance(scale.grad, both.logit_scale.grad) < 1e-9
    for model in (text, vision):
        for name, p in model.named_parameters():
            if "k_proj.bias" not in name:  # these have no gradient but noise
                assert peers.distance(p.grad, both.get_parameter(name).grad) < 1e-9, name


@pytest.mark.parametrize("folder, preset", [("text_encoder", CLIP_L), ("text_encoder_2", OPENCLIP_BIGG)])
def test_official_config_is_the_preset(folder, preset):
    path = peers.OFFICIAL / folder / "config.json"
    if not path.exists():
        pytest.skip("the official config.json is not here")
    assert read_config(CLIPTextConfig, json.loads(path.read_text())) == preset


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{type(c).__name__}-{c.hidden_size}-{c.hidden_act}")
def test_config_survives_json(config):
    assert read_config(type(config), json.loads(json.dumps(config_to_json(config)))) == config


@pytest.mark.parametrize("config", [CLIP_L, OPENCLIP_BIGG, CLIPVisionConfig()])
def test_config_that_transformers_writes_is_read(config):
    pytest.importorskip("transformers")
    with torch.device("meta"):
        written = peers.build_peer(config).config.to_json_string()
    assert read_config(type(config), json.loads(written)) == config


@pytest.mark.parametrize("ours, theirs", [(CLIPTextConfig, "CLIPTextConfig"), (CLIPVisionConfig, "CLIPVisionConfig")])
def test_missing_keys_take_the_defaults_of_transformers(ours, theirs):
    transformers = pytest.importorskip("transformers")
    config, expected = read_config(ours, {}), getattr(transformers, theirs)()
    for field in dataclasses.fields(ours):
        assert field.name == "with_projection" or getattr(config, field.name) == getattr(expected, field.name), field


@pytest.mark.parametrize("change, words", [
    ({"colour": "red"}, "colour"), ({"hidden_act": "relu"}, "hidden_act: 'relu'"), ({"dropout": 0.1}, "dropout"),
    ({"layer_norm_eps": 1e-6}, "layer_norm_eps"), ({"num_attention_heads": 7}, "num_attention_heads: 7 heads")])
@pytest.mark.parametrize("config", [CLIP_L, CLIPVisionConfig()])
def test_what_the_network_cannot_be_is_refused_by_name(config, change, words):
    with pytest.raises(InputError, match=f"some/config.json.*{words}"):
        read_config(type(config), config_to_json(config) | change, "some/config.json")


@pytest.mark.parametrize("preset, change, words", [
    (CLIP_L, {"hidden_size": 768.0}, "hidden_size: 768.0 is of the wrong type; expected int"),
    (CLIP_L, {"with_projection": "yes"}, "with_projection: 'yes' is of the wrong type"),
    (CLIP_L, {"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 is out of range"),
    (CLIP_L, {"vocab_size": 0}, "vocab_size: 0 is out of range"),
    (CLIP_L, {"max_position_embeddings": -1}, "max_position_embeddings: -1 is out of range"),
    (CLIP_L, {"num_attention_heads": 5}, "num_attention_heads: 5 heads do not divide hidden_size 768"),
    (CLIP_L, {"hidden_act": "relu"}, "hidden_act: 'relu' is not supported; use quick_gelu or gelu"),
    (CLIPVisionConfig(), {"image_size": float("nan")}, "image_size: nan is of the wrong type"),
    (CLIPVisionConfig(), {"image_size": 1 << 40}, "image_size: 1099511627776 is out of range"),
    (CLIPVisionConfig(), {"patch_size": 15}, "patch_size: 15 does not divide image_size 224"),
    (CLIPVisionConfig(), {"num_attention_heads": 0}, "num_attention_heads: 0 is out of range"),
    (CLIPVisionConfig(), {"hidden_act": "silu"}, "hidden_act: 'silu' is not supported")])
def test_a_config_checks_itself(preset, change, words):
    with pytest.raises(ParameterError, match=f"^{words}"):
        dataclasses.replace(preset, **change)
