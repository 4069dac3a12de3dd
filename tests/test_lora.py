"""LoRA: the layer's identities, files in every spelling, and what PEFT and diffusers make of ours."""

import json
import shutil

import numpy as np
import peers
import pytest
import torch
import torch.nn as nn
from tiny import build, folder

import sample
from minipic.common import InputError, ParameterError
from minipic.diffusion.schedule import Schedule
from minipic.image import open_picture
from minipic.layers import lora
from minipic.layers.swap import swap
from minipic.models.unet import SD15, SDXL_BASE, SDXL_REFINER, UNet
from minipic.pipeline import Pipeline
from minipic.training.optimizer import build_optimizer
from minipic.training.settings import TrainSettings
from minipic.weights import keys, load_lora, read_weights, save_lora, save_weights
from minipic.weights.configs import config_to_json
from minipic.weights.files import read_header
from minipic.weights.lora import compile_patterns


def numbers(shape, seed):
    return peers.numbers(shape, seed).float()


X = numbers((2, 5, 12), 1)


def small():
    """A Linear, a strided convolution and a Linear that the pattern ".*to_q|conv" leaves alone."""
    return peers.fill(nn.ModuleDict({"to_q": nn.Linear(12, 8), "to_k": nn.Linear(12, 8),
                                     "conv": nn.Conv2d(3, 6, 3, stride=2, padding=1)}))


def randomize(model, seed=0):
    """B away from zero, so that a LoRA does something."""
    for i, module in enumerate(lora.layers(model).values()):
        module.lora_B.weight.data = 0.1 * numbers(module.lora_B.weight.shape, seed + i)
    return model


def test_swap_replaces_by_name_and_leaves_what_is_inside():
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)))
    built = swap(model, lambda name, module: name in ("0", "1", "1.0"), lambda name, module: nn.Identity())
    assert list(built) == ["0", "1"] and model[0] is built["0"] and isinstance(model[1], nn.Identity)


def test_nothing_changes_at_first_and_only_the_lora_learns():
    model, before = small(), small()
    params = lora.inject(model, rank=4, match=".*to_q|conv")
    picture = numbers((1, 3, 8, 8), 2)
    for name, x in (("to_q", X), ("conv", picture)):
        assert torch.equal(model[name](x), before[name](x))
    (model["to_q"](X).sum() + model["to_k"](X).sum() + model["conv"](picture).sum()).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {f"{layer}.lora_{x}.weight" for layer in ("to_q", "conv") for x in "AB"}
    assert {id(p) for p in params} == {id(model.get_parameter(name)) for name in trained}
    assert {name for name in model.state_dict() if "lora" not in name} == set(before.state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_takes_the_place_of_the_old_one_and_shares_its_weights(training):
    model = small().train(training)
    old = dict(model)
    random_state = torch.get_rng_state()
    for name, shape in (("to_q", (2, 12)), ("conv", (2, 3, 3, 3))):
        lora.add(model, name, "first", numbers(shape, 1), numbers((len(old[name].weight), 2), 2))
        layer = model[name]
        assert isinstance(layer, type(old[name])) and layer is not old[name] and layer.training == training
        assert layer.weight is old[name].weight and layer.bias is old[name].bias
        assert vars(layer).items() >= {key: x for key, x in vars(old[name]).items() if key[0] != "_"}.items()
        lora.add(model, name, "second", numbers(shape, 3), numbers((len(old[name].weight), 2), 4))
        assert model[name] is layer and list(layer.scalings) == ["first", "second"]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert list(model) == list(old) and type(old["to_q"]) is nn.Linear and model["to_k"] is old["to_k"]


@torch.no_grad()
def test_is_the_formula_for_several_at_once_with_scales():
    model = small()
    lora.inject(model, rank=4, alpha=2, match=".*to_q|conv")
    lora.inject(model, rank=3, match=".*to_q|conv", name="other")
    randomize(model)
    lora.set_scale(model, 0.5)
    lora.set_scale(model, -2.0, "other")
    layer = model["to_q"]
    (a, a2), (b, b2) = layer.lora_A.weight.split([4, 3]), layer.lora_B.weight.split([4, 3], dim=1)
    expected = X @ (layer.weight + 0.5 * 0.5 * b @ a - 2 * b2 @ a2).T + layer.bias
    torch.testing.assert_close(layer(X), expected, rtol=1e-5, atol=1e-6)
    picture, conv = numbers((1, 3, 8, 8), 2), model["conv"]
    expected = nn.functional.conv2d(picture, conv.weight + conv.delta(), conv.bias, 2, 1)
    torch.testing.assert_close(conv(picture), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_merged_equals_beside_and_unmerged_is_the_same_bits():
    model = small()
    lora.inject(model, rank=4, match=".*to_q|conv")
    randomize(model)
    before, weight = model["to_q"](X), model["to_q"].weight.clone()
    lora.merge(model)
    torch.testing.assert_close(model["to_q"](X), before, rtol=1e-5, atol=1e-6)
    assert not torch.equal(model["to_q"].weight, weight)
    lora.set_scale(model, 0.0)
    assert torch.equal(model["to_q"].weight, weight)
    lora.set_scale(model, 1.0)
    torch.testing.assert_close(model["to_q"](X), before, rtol=1e-5, atol=1e-6)
    lora.unmerge(model)
    assert torch.equal(model["to_q"].weight, weight) and torch.equal(model["to_q"](X), before)


def test_no_such_layer_is_an_error():
    with pytest.raises(InputError, match="match: no Linear or Conv2d of this ModuleDict has a path like 'nothing'"):
        lora.inject(small(), rank=4, match="nothing")
    model = small()
    with pytest.raises(InputError, match="rank: choose 1 or more, not 0"):
        lora.inject(model, rank=0, match=".*to_q")
    lora.inject(model, rank=4, match=".*to_q")
    before = lora.lora_state_dict(model)
    with pytest.raises(InputError, match="name: there is a LoRA called 'default' already"):
        lora.inject(model, rank=4, match=".*to_q")
    lora.merge(model)
    with pytest.raises(InputError, match="its LoRAs are merged; unmerge them"):
        lora.inject(model, rank=4, match=".*to_q", name="other")
    lora.unmerge(model)
    assert all(torch.equal(x, before[name]) for name, x in lora.lora_state_dict(model).items())


@pytest.mark.parametrize("config", [SDXL_BASE, SDXL_REFINER, SD15])
def test_sgm_names_go_there_and_back(config):
    with torch.device("meta"):
        names = [name for name in UNet(config).state_dict()]
    assert [keys.unet_name(keys.sgm_name(name)) for name in names] == names
    assert len({keys.sgm_name(name).replace(".", "_") for name in names}) == len(names)


# Files ------------------------------------------------------------------------------------------------------------

UNET, TEXT = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0", "encoder.layers.0.self_attn.q_proj"
FLAT = UNET.replace(".", "_"), TEXT.replace(".", "_")
SPELLINGS = {
    "kohya, sgm blocks": (f"lora_unet_{keys.sgm_name(UNET).replace('.', '_')}", f"lora_te1_text_model_{FLAT[1]}",
                          ".lora_down.weight", ".lora_up.weight", ".alpha"),
    "kohya, diffusers blocks": (f"lora_unet_{FLAT[0]}", f"lora_te_text_model_{FLAT[1]}",
                                ".lora_down.weight", ".lora_up.weight", ".alpha"),
    "diffusers": (f"unet.{UNET}", f"text_encoder.{TEXT}", (".lora.down.weight", ".lora_linear_layer.down.weight"),
                  (".lora.up.weight", ".lora_linear_layer.up.weight"), None),
    "diffusers, older": (f"unet.{UNET.replace('to_out.0', 'processor.to_out')}", f"text_encoder.text_model.{TEXT}",
                         "_lora.down.weight", "_lora.up.weight", None),
    "diffusers, oldest": (f"unet.{UNET.replace('to_out.0', 'processor.to_out')}",
                          f"text_encoder.text_model.{TEXT.replace('q_proj', 'to_q')}",
                          "_lora.down.weight", "_lora.up.weight", None),
    "PEFT": (f"unet.{UNET}", f"text_encoder.text_model.{TEXT}", ".lora_A.weight", ".lora_B.weight", None),
    "PEFT, named": (f"base_model.model.{UNET}", f"base_model.model.text_model.{TEXT}", ".lora_A.default.weight",
                    ".lora_B.default.weight", None),
    "PEFT, numbered": (f"unet.{UNET}", f"text_encoder.text_model.{TEXT}", ".lora_A.default_0.weight",
                       ".lora_B.default_0.weight", None),
    "PEFT, a name of one's own": (UNET, f"text_model.{TEXT}", ".lora_A.my_style.weight",
                                  ".lora_B.my_style.weight", None),
    "PEFT, newer transformers": (f"base_model.model.{UNET}", f"base_model.model.{TEXT}", ".lora_A.weight",
                                 ".lora_B.weight", None),
    "PEFT, in a part": (f"unet.base_model.model.{UNET}", f"text_encoder.base_model.model.text_model.{TEXT}",
                        ".lora_A.weight", ".lora_B.weight", None),
    "compiled": (f"unet._orig_mod.{UNET}", f"base_model.model._orig_mod.text_model.{TEXT}", ".lora_A.weight",
                 ".lora_B.weight", None),
    "compiled, kohya": (f"lora_unet__orig_mod_{FLAT[0]}", f"lora_te1__orig_mod_text_model_{FLAT[1]}",
                        ".lora_down.weight", ".lora_up.weight", ".alpha"),
    "FSDP": (f"unet._fsdp_wrapped_module.{UNET.replace('blocks.0.', 'blocks.0._checkpoint_wrapped_module.')}",
             f"text_encoder.module._orig_mod.module.text_model.{TEXT}", ".lora_A.weight", ".lora_B.weight", None),
    "diffusers, twice": (f"unet.unet.{UNET}", f"text_encoder.text_model.{TEXT}", ".lora_A.weight", ".lora_B.weight",
                         None),
    "a model's prefix": (f"model.diffusion_model.{keys.sgm_name(UNET)}", f"lora_te1_text_model_{FLAT[1]}",
                         ".lora_down.weight", ".lora_up.weight", ".alpha"),
    "several GPUs": (f"module.unet.{UNET}", f"text_encoder.module._orig_mod.text_model.{TEXT}", ".lora_A.weight",
                     ".lora_B.weight", None),
    "SimpleTuner": (f"lycoris_{FLAT[0]}", f"lora_te1_text_model_{FLAT[1]}", ".lora_down.weight", ".lora_up.weight",
                    ".alpha"),
    "ComfyUI": (f"diffusion_model.{keys.sgm_name(UNET)}", f"text_encoders.clip_l.transformer.text_model.{TEXT}",
                ".lora_down.weight", ".lora_up.weight", ".alpha"),
    "OneTrainer": (f"unet.{keys.sgm_name(UNET)}", f"clip_l.text_model.{TEXT}", ".lora_down.weight", ".lora_up.weight",
                   ".alpha"),
}


def written(path, spelling, alpha=4.0):
    """A LoRA of one UNet layer and one text layer in a spelling; where that has no alpha, it is the rank, 4."""
    unet, text, down, up, alphas = SPELLINGS[spelling]
    pick = lambda end, i: end if isinstance(end, str) else end[i]
    tensors = {}
    for i, (name, width) in enumerate(((unet, 32), (text, 16))):
        tensors[name + pick(down, i)] = numbers((4, width), i)
        tensors[name + pick(up, i)] = numbers((width, 4), i + 7)
        if alphas:
            tensors[name + alphas] = torch.tensor(alpha)
    save_weights(tensors, path)
    return path


@pytest.fixture(scope="module")
def pipeline():
    return build()


def parts(pipeline):
    return {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder, "text_encoder_2": pipeline.text_encoder_2}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_lora(spelling, tmp_path, pipeline):
    found = load_lora(written(tmp_path / "x.safetensors", spelling), parts(pipeline))
    assert {part: list(layers) for part, layers in found.items()} == {
        "unet": [UNET], "text_encoder": [f"text_model.{TEXT}"]}
    for i, (a, b, alpha) in enumerate((found["unet"][UNET], found["text_encoder"][f"text_model.{TEXT}"])):
        assert alpha == 4 and torch.equal(a, numbers(a.shape, i)) and torch.equal(b, numbers(b.shape, i + 7))


def test_kohya_and_peft_files_of_ours_come_back(tmp_path, pipeline):
    unet = build().unet
    lora.inject(unet, rank=4, alpha=2)
    state = lora.lora_state_dict(randomize(unet))
    for kohya in (True, False):
        save_lora({"unet": state}, tmp_path / "ours.safetensors", {"about": "a test"}, kohya)
        found = load_lora(tmp_path / "ours.safetensors", parts(pipeline))["unet"]
        told = {"about": "a test"} | ({"ss_network_module": "networks.lora", "ss_network_dim": "4",
                                       "ss_network_alpha": "2.0"} if kohya else {})
        assert told.items() <= read_header(tmp_path / "ours.safetensors")[1].items()
        assert len(found) == len(lora.layers(unet)) > 0
        for name, (a, b, alpha) in found.items():
            layer = unet.get_submodule(name)
            assert torch.equal(b * (alpha / len(a)) @ a, layer.delta())


@pytest.mark.parametrize("change, words", [
    (lambda t: t | {"lora_unet_nowhere.lora_up.weight": torch.ones(4, 4)},
     "1 of 7 tensors fit no part.*lora_unet_nowhere"),
    (lambda t: t | {next(iter(t)).partition(".")[0] + ".dora_scale": torch.ones(4)}, "is a DoRA .*dora_scale"),
    (lambda t: {k: v.new_ones(()) if "down" in k else v for k, v in t.items()}, "does not fit"),
    (lambda t: {k: v.new_empty(0, 4) if "up" in k else v for k, v in t.items()}, "does not fit"),
    (lambda t: t | {f"unet.{UNET}.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}, "is there in two spellings"),
    (lambda t: {k: v[:, :3] if "down" in k else v for k, v in t.items()}, r"does not fit its weight \["),
    (lambda t: {k: v for k, v in t.items() if "up" not in k}, "does not fit"),
    (lambda t: {"x": torch.ones(2)}, "1 of 1 tensors fit no part"),
    (lambda t: {f"text_encoder.text_model.embeddings.token_embedding.lora_{x}.weight": torch.ones(4, 4) for x in "AB"},
     "2 of 2 tensors fit no part.*token_embedding"),
    (lambda t: t | {f"lora_unet_{FLAT[0].replace('to_out_0', 'to_k')}.{end}": torch.ones(()) for end in ("hada_w1_a", "alpha")},
     "is a LoHa .*hada_w1_a"),
    (lambda t: t | {f"lora_te1_text_projection.lora_{x}.weight": torch.ones(4, 4) for x in ("down", "up")},
     "2 of 8 tensors fit no part.*text_projection"),
    (lambda t: {k: torch.ones(2) if "alpha" in k else v for k, v in t.items()}, "its alpha is damaged"),
    (lambda t: {k: v if "alpha" in k else v.to(torch.int8) for k, v in t.items()}, "is stored in whole numbers"),
])
def test_what_does_not_fit_is_refused_by_name(change, words, tmp_path, pipeline):
    path = written(tmp_path / "x.safetensors", "kohya, sgm blocks")
    save_weights(change({name: x.clone() for name, x in read_weights(path).items()}), path)
    with pytest.raises(InputError, match=words):
        load_lora(path, parts(pipeline))


def test_alpha_may_stand_in_the_header(tmp_path, pipeline):
    path = written(tmp_path / "x.safetensors", "PEFT")
    module = f"text_model.{TEXT}"
    noted = {"unet.lora_alpha": 2, "text_encoder.lora_alpha": 3, "text_encoder.alpha_pattern": {module: 5}}
    tensors = {name: x.clone() for name, x in read_weights(path).items()}
    save_weights(tensors, path, {"lora_adapter_metadata": json.dumps(noted)})
    found = load_lora(path, parts(pipeline))
    assert found["unet"][UNET][2] == 2 and found["text_encoder"][module][2] == 5
    for damaged in ('{', '"x"', '{"unet.lora_alpha": null}', '{"unet.lora_alpha": 1e300}',
                    '{"unet.lora_alpha": "x"}', '{"unet.alpha_pattern": [1]}', '{"unet.lora_alpha": NaN}',
                    '{"unet.alpha_pattern": {"(": 3}}', "[" * 100_000, f'{{"unet.lora_alpha": {10**400}}}'):
        save_weights(tensors, path, {"lora_adapter_metadata": damaged})
        with pytest.raises(InputError, match="lora_adapter_metadata is damaged"):
            load_lora(path, parts(pipeline))


def test_the_rest_is_used_when_asked(tmp_path, pipeline):
    path = written(tmp_path / "x.safetensors", "kohya, sgm blocks")
    loha = f"lora_unet_{FLAT[0].replace('to_out_0', 'to_k')}"  # a layer that this model has
    save_weights(read_weights(path) | {"lora_unet_nowhere.lora_up.weight": torch.ones(4, 4),
                                       f"{loha}.hada_w1_a": torch.ones(4, 4), f"{loha}.alpha": torch.tensor(4.0)}, path)
    with pytest.warns(UserWarning, match="x.safetensors: 3 tensors are left out: .*hada_w1_a.*lora_unet_nowhere"):
        assert set(load_lora(path, parts(pipeline), allow_partial=True)) == {"unet", "text_encoder"}
    save_weights(read_weights(path) | {f"unet.{UNET}.lora_magnitude_vector": torch.ones(4)}, path)
    with pytest.raises(InputError, match="is a DoRA"):  # without its scales it would be another change
        load_lora(path, parts(pipeline), allow_partial=True)


def drawn(pipeline):
    """The latents of a picture."""
    return list(pipeline.latents("a small red sphere!", steps=2))[-1]


@pytest.mark.slow
def test_pipeline_draws_with_loras_and_without_again(tmp_path):
    folder = tmp_path / "model"
    model = build(folder=folder)  # loaded, as those that it is compared with: a copy's memory is laid out otherwise
    path, draw = written(tmp_path / "x.safetensors", "PEFT"), drawn
    plain = draw(model)
    model.add_lora(path, 0.5)
    with_lora = draw(model)
    assert not torch.equal(with_lora, plain)
    model.set_lora_scale(path, 0.0)
    assert torch.equal(draw(model), plain)
    with pytest.raises(InputError, match="given twice"):
        model.add_lora(path)
    with pytest.raises(InputError, match="has LoRAs"):
        model.save(tmp_path / "out")
    for lazy in (False, True):
        assert torch.equal(draw(Pipeline.load(folder, lazy=lazy, lora=[(path, 0.5)])), with_lora)
        later = Pipeline.load(folder, lazy=lazy)
        assert torch.equal(draw(later), plain)
        later.add_lora(path, 0.5)
        with pytest.raises(InputError, match="has LoRAs"):
            later.save(tmp_path / "out")
        assert torch.equal(draw(later), with_lora)
    assert torch.equal(draw(Pipeline.load(folder, lora=path)), draw(Pipeline.load(folder, lora=[path])))
    one_pair, list_of_pairs = (path, 0.5), [(path, 0.5)]
    assert torch.equal(draw(Pipeline.load(folder, lora=one_pair)), draw(Pipeline.load(folder, lora=list_of_pairs)))


# Peers ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kohya", [False, True])
@pytest.mark.parametrize("part, kind, name, output", [("unet", "unet", "sdxl", "prediction"),
                                                      ("text_encoder", "text", "quick_gelu", "last")])
def test_diffusers_draws_the_same_with_our_files(part, kind, name, output, kohya, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    outputs, model, given = peers.ours(kind, name)
    peer_outputs, other, theirs = peers.peer(kind, name)
    given, theirs = ({key: x.float() if kind == "unet" else x for key, x in values.items()} for values in (given, theirs))
    lora.inject(model, rank=4, alpha=8)
    save_lora({part: lora.lora_state_dict(randomize(model))}, tmp_path / "ours.safetensors", kohya=kohya)
    plain, pipeline = peer_outputs(other, **theirs)[output], diffusers.StableDiffusionXLPipeline
    if part == "unet":
        state, alphas = pipeline.lora_state_dict(tmp_path / "ours.safetensors", unet_config=other.config)[:2]
        pipeline.load_lora_into_unet(state, alphas, other)
    else:
        state, alphas = pipeline.lora_state_dict(tmp_path / "ours.safetensors")[:2]
        pipeline.load_lora_into_text_encoder(state, alphas, other, prefix=part)
    expected = peer_outputs(other, **theirs)[output]
    assert peers.distance(plain, expected) > 1e-3
    assert peers.distance(outputs(model, **given)[output], expected) <= 1e-6


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("more", [{}, {"alpha_pattern": {"to_q": 9, "attn2.to_k": 5}}, {"use_rslora": True}])
def test_diffusers_files_with_alpha_in_the_header_draw_the_same(more, tmp_path):
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    _, unet, given = peers.ours("unet", "sdxl")
    _, other, theirs = peers.peer("unet", "sdxl")
    given, theirs = ({key: x.float() for key, x in values.items()} for values in (given, theirs))
    torch.manual_seed(0)  # of PEFT's weights
    other.add_adapter(peft.LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_k"], init_lora_weights=False,
                                      **more))
    diffusers.StableDiffusionXLPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=peft.get_peft_model_state_dict(other),
        unet_lora_adapter_metadata=other.peft_config["default"].to_dict())
    found = load_lora(tmp_path / "pytorch_lora_weights.safetensors", {"unet": unet})["unet"]
    outputs, peer_outputs = peers.ours("unet", "sdxl")[0], peers.peer("unet", "sdxl")[0]
    plain = outputs(unet, **given)["prediction"]
    for name, (a, b, alpha) in found.items():
        lora.add(unet, name, "x", a, b, alpha)
    expected = peer_outputs(other, **theirs)["prediction"]
    assert peers.distance(plain, expected) > 1e-3
    assert peers.distance(outputs(unet, **given)["prediction"], expected) <= 1e-6
    other.save_lora_adapter(tmp_path / "alone")  # of one network: its settings have no part before them
    alone = load_lora(tmp_path / "alone", {"unet": peers.ours("unet", "sdxl")[1]})["unet"]
    assert alone.keys() == found.keys()
    assert all(alone[name][2] == found[name][2] for name in found)


@pytest.mark.slow
def test_ten_steps_of_training_are_those_of_diffusers_and_peft(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    config = TrainSettings(lr=1e-3)
    _, unet, given = peers.ours("unet", "sdxl")
    _, other, _ = peers.peer("unet", "sdxl")
    given = {key: x.double() for key, x in given.items() if key not in ("x", "t")}
    params = lora.inject(unet, rank=4, alpha=4)
    save_lora({"unet": lora.lora_state_dict(unet)}, tmp_path / "start.safetensors")
    state, alphas = diffusers.StableDiffusionXLPipeline.lora_state_dict(tmp_path / "start.safetensors")[:2]
    diffusers.StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, other)
    unet.double(), other.double()  # in fp32 Adam would blow up the rounding of gradients that are nearly zero
    theirs = {name.replace(".default_0", ""): p for name, p in other.named_parameters() if "lora_" in name}
    for p in theirs.values():
        p.requires_grad_()
    ours = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    assert {id(p) for p in ours.values()} == {id(p) for p in params} and ours.keys() == theirs.keys()
    optimizers = build_optimizer(ours, config, {}), torch.optim.AdamW(theirs.values(), lr=config.lr)
    schedule, ddpm = Schedule(), diffusers.DDPMScheduler.from_config(config_to_json(Schedule()))
    for step in range(10):
        x0, noise = (peers.numbers((2, 4, 10, 14), 10 * step + i) for i in (1, 2))
        t = torch.tensor([99 * step, 999 - 37 * step])
        loss = schedule.objective.loss(lambda x, t: unet(x, t, **given), x0, noise, t).mean()
        peer = other(ddpm.add_noise(x0, noise, t), t, given["context"], added_cond_kwargs={
            "text_embeds": given["pooled"], "time_ids": given["size_ids"]}).sample
        peer_loss = nn.functional.mse_loss(peer, noise)
        torch.testing.assert_close(loss, peer_loss, rtol=1e-6, atol=0)
        for optimizer, value in zip(optimizers, (loss, peer_loss)):
            optimizer.zero_grad(), value.backward(), optimizer.step()
    for name, p in ours.items():
        assert (p - theirs[name]).abs().max() <= 1e-6, name
    assert all(p.abs().max() > 1e-3 for name, p in ours.items() if "lora_B" in name)


def network_outputs(kind, name):
    """(outputs of a network, our network, its inputs), (the same of the peer's), in float32."""
    def in_float32(outputs, model, given):
        given = {key: x.float() if x.is_floating_point() else x for key, x in given.items()}
        return outputs, model, given
    return in_float32(*peers.ours(kind, name)), in_float32(*peers.peer(kind, name))


SETTINGS = {  # what PEFT's folder can say of alphas, besides r=4 and lora_alpha=16
    "alpha": {},
    "patterns": {"rank_pattern": {r"attn1.*to_q": 2, r"(k|v)_proj": 2}, "alpha_pattern": {
        r"down_blocks\.\d+\..*to_q": 9, r"attn2\.to_(q|k)": 5, r"layers\.\d\.self_attn\.q_proj": 5, r"to_\w": 3}},
    "rslora": {"use_rslora": True},
}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("part, kind, name, output, targets", [
    ("unet", "unet", "sdxl", "prediction", ["to_q", "to_k"]),
    ("text_encoder", "text", "quick_gelu", "last", ["q_proj", "k_proj"])])
def test_a_folder_of_peft_is_read_with_its_settings(part, kind, name, output, targets, settings, tmp_path):
    peft = pytest.importorskip("peft")
    (outputs, model, given), (peer_outputs, other, theirs) = network_outputs(kind, name)
    torch.manual_seed(0)  # of PEFT's weights
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False, **SETTINGS[settings])
    peft.get_peft_model(other, config).save_pretrained(tmp_path / "peft")
    _, other, _ = peers.peer(kind, name)
    wrapped = peft.PeftModel.from_pretrained(other, tmp_path / "peft")  # which sorts the patterns
    plain, expected = outputs(model, **given)[output], peer_outputs(other, **theirs)[output]
    assert peers.distance(plain, expected) > 1e-2
    file = tmp_path / "renamed" / "style.safetensors"
    shutil.copytree(tmp_path / "peft", file.parent)
    (file.parent / "adapter_model.safetensors").rename(file)
    for path in (tmp_path / "peft", tmp_path / "peft" / "adapter_model.safetensors", file):
        found = load_lora(path, {part: model})[part]
        assert len(found) == sum("lora_A" in name for name in wrapped.state_dict())
        _, fresh, _ = peers.ours(kind, name)
        for layer, (a, b, alpha) in found.items():
            lora.add(fresh, layer, "x", a, b, alpha)
        assert peers.distance(outputs(fresh, **given)[output], expected) <= 1e-6


def test_a_folder_of_peft_for_the_second_text_encoder_is_told_by_its_widths(tmp_path, pipeline):
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    names = {x: f"base_model.model.{layer}.lora_{x}.weight" for x in "AB"}
    for part, width in (("text_encoder", 16), ("text_encoder_2", 24)):
        save_weights({names["A"]: torch.ones(2, width), names["B"]: torch.ones(width, 2)}, tmp_path / "x.safetensors")
        assert {name: list(found) for name, found in load_lora(tmp_path, parts(pipeline)).items()} == {part: [layer]}


def peft_folder(folder, **settings):
    """A file of PEFT's for one layer, of rank 4, with these settings beside it."""
    names = [f"base_model.model.{UNET}.lora_{x}.weight" for x in "AB"]
    save_weights({names[0]: numbers((4, 32), 1), names[1]: numbers((32, 4), 2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4} | settings))
    return folder


@pytest.mark.parametrize("key, value", [
    ("use_dora", True), ("bias", "all"), ("bias", "lora_only"), ("modules_to_save", ["conv_in"]), ("lora_bias", True),
    ("fan_in_fan_out", True), ("init_lora_weights", "pissa"), ("init_lora_weights", "olora"), ("peft_type", "LOHA"),
    ("peft_type", "ADALORA"), ("layer_replication", [[0, 2]]), ("trainable_token_indices", [3]),
    ("target_parameters", ["weight"]), ("alora_invocation_tokens", [1]), ("use_qalora", True),
    ("use_rslora", "false")])
def test_what_peft_can_do_and_this_cannot_is_refused_by_name(key, value, tmp_path, pipeline):
    peft_folder(tmp_path, **{key: value})
    with pytest.raises(InputError, match=f"adapter_config.json: {key} is .*not supported"):
        load_lora(tmp_path, parts(pipeline))
    noted = json.dumps({f"unet.{key}": value})
    save_weights(read_weights(tmp_path / "adapter_model.safetensors"), tmp_path / "x.safetensors",
                 {"lora_adapter_metadata": noted})
    with pytest.raises(InputError, match=f"x.safetensors: the header's lora_adapter_metadata: {key} is"):
        load_lora(tmp_path / "x.safetensors", parts(pipeline))


def test_settings_of_another_file_are_refused(tmp_path, pipeline):
    models = parts(pipeline)
    for settings, words in (
            ({"r": 8}, "has rank 4, but 8 by .*adapter_config.json"),
            ({"rank_pattern": {"to_out.0": 2}}, "has rank 4, but 2 by"),
            ({"lora_alpha": "much"}, "adapter_config.json is damaged"),
            ({"alpha_pattern": [3]}, "adapter_config.json is damaged"),
            ({"alpha_pattern": {"(a+)+$": 3}}, "its pattern .* repeats or chooses too much")):
        with pytest.raises(InputError, match=words):
            load_lora(peft_folder(tmp_path, **settings), models)
    peft_folder(tmp_path, lora_alpha=16)
    assert load_lora(tmp_path, models)["unet"][UNET][2] == 16
    assert load_lora(peft_folder(tmp_path), models)["unet"][UNET][2] == 8  # PEFT's default
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(InputError, match="adapter_config.json: is not valid JSON"):
        load_lora(tmp_path, models)
    written(tmp_path / "adapter_model.safetensors", "kohya, sgm blocks")  # has alphas, and needs no settings
    assert load_lora(tmp_path, models)["unet"][UNET][2] == 4


def test_a_folder_holds_one_lora(tmp_path, pipeline):
    with pytest.raises(InputError, match="has 0 LoRAs in .safetensors instead of one"):
        load_lora(tmp_path, parts(pipeline))
    written(tmp_path / "lora.safetensors", "PEFT")  # as train.py names it
    assert set(load_lora(tmp_path, parts(pipeline))) == {"unet", "text_encoder"}
    written(tmp_path / "second.safetensors", "PEFT")
    with pytest.raises(InputError, match="has 2 LoRAs"):
        load_lora(tmp_path, parts(pipeline))
    written(tmp_path / "pytorch_lora_weights.safetensors", "PEFT")
    assert set(load_lora(tmp_path, parts(pipeline))) == {"unet", "text_encoder"}


@pytest.mark.parametrize("pattern", [
    "to_q", "attn1.to_q", r"attn[12]\.to_q", ".*", ".*to_q", r".*\.to_[qk]", r"\d+", r"blocks\.\d+\.attn1.*",
    "to_(q|k)", "(attn1|ff).*", "^down.*", "^to_q", "to_q$", "to_k|to_q", r"(down|up)_blocks?\.1.+", "attn1", "", r"\w+", r"\w+_q",
    r"[^.]+", r"to_out\.0", "to_out", r"0\.attn\d{1}\.to_(?:q|v)"])
def test_patterns_fit_the_names_that_they_fit_in_peft(pattern):
    other = pytest.importorskip("peft.utils.other")
    names = [f"{start}.transformer_blocks.{i}.attn{j}.{end}" for start in ("down_blocks.1.attentions.0", "mid_block.0")
             for i in (0, 10) for j in (1, 2) for end in ("to_q", "to_k", "to_out.0")]
    compiled, = compile_patterns((pattern,))
    for name in names:
        found = other.get_pattern_key([pattern], name) == pattern
        assert (compiled.fullmatch(name) is not None) == found, name


# More than a LoRA -------------------------------------------------------------------------------------------------

CONV = "mid_block.resnets.0.conv1"


@torch.no_grad()
def test_a_convolution_between_a_and_b_is_one_convolution_more(tmp_path, pipeline):
    conv = pipeline.unet.get_submodule(CONV)
    width = conv.in_channels
    down, mid, up = numbers((4, width, 1, 1), 1), numbers((4, 4, 3, 3), 2), numbers((width, 4, 1, 1), 3)
    name = f"lora_unet_{CONV.replace('.', '_')}"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid, f"{name}.lora_up.weight": up,
               f"{name}.alpha": torch.tensor(2.0)}
    save_weights(tensors, tmp_path / "x.safetensors")
    a, b, alpha = load_lora(tmp_path / "x.safetensors", parts(pipeline))["unet"][CONV]
    x = numbers((1, width, 8, 8), 4)
    conv2d = nn.functional.conv2d
    expected = conv(x) + 0.5 * conv2d(conv2d(conv2d(x, down), mid, padding=1), up)
    model = build().unet
    lora.add(model, CONV, "x", a, b, alpha)
    torch.testing.assert_close(model.get_submodule(CONV)(x), expected, rtol=1e-4, atol=1e-4)
    for wrong in (mid[:3], mid[:, :3], mid[..., :1], mid.flatten(1)):
        save_weights(tensors | {f"{name}.lora_mid.weight": wrong.contiguous()}, tmp_path / "x.safetensors")
        with pytest.raises(InputError, match="does not fit its weight"):
            load_lora(tmp_path / "x.safetensors", parts(pipeline))


NORM, TEXT_NORM = "down_blocks.1.attentions.0.transformer_blocks.0.norm1", "text_model.encoder.layers.0.layer_norm1"
DIFFERENCES = {  # name in a file: (part, parameter)
    f"diffusion_model.{keys.sgm_name(UNET)}.diff": ("unet", f"{UNET}.weight"),
    f"diffusion_model.{keys.sgm_name(UNET)}.diff_b": ("unet", f"{UNET}.bias"),
    f"lora_unet_{NORM.replace('.', '_')}.w_norm": ("unet", f"{NORM}.weight"),
    f"lora_unet_{NORM.replace('.', '_')}.b_norm": ("unet", f"{NORM}.bias"),
    "unet.conv_norm_out.diff": ("unet", "conv_norm_out.weight"),
    f"lora_unet_{CONV.replace('.', '_')}.diff": ("unet", f"{CONV}.weight"),
    f"text_encoders.clip_g.transformer.{TEXT_NORM}.diff": ("text_encoder_2", f"{TEXT_NORM}.weight")}


def with_differences(path, pipeline, seed=0):
    """A LoRA of one layer with whole differences -> {(part, parameter): its difference}."""
    tensors = dict(read_weights(written(path, "PEFT")))
    differences = {}
    for i, (name, (part, parameter)) in enumerate(DIFFERENCES.items()):
        shape = getattr(pipeline, part).get_parameter(parameter).shape
        differences[part, parameter] = tensors[name] = numbers(shape, seed + i)
    save_weights(tensors, path)
    return differences


def parameters(pipeline):
    return {name: p.detach().clone() for name, p in pipeline.named_parameters() if "lora_" not in name}


@torch.no_grad()
def test_whole_differences_are_added_at_a_scale_and_taken_away_to_the_bit(tmp_path):
    model = build()
    model.unet.conv_norm_out.weight[0] = -0.0
    before = parameters(model)
    plain = drawn(model)
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    one, two = with_differences(first, model), with_differences(second, model, seed=20)
    model.add_lora(first, 0.5)
    model.add_lora(second)
    model.set_lora_scale(second, -2)
    for name, p in parameters(model).items():
        part, _, parameter = name.partition(".")
        change = 0.5 * one[part, parameter] - 2 * two[part, parameter] if (part, parameter) in one else 0
        torch.testing.assert_close(p, before[name] + change, rtol=1e-6, atol=1e-6)
    both = drawn(model)
    assert not torch.equal(both, plain)

    changed = parameters(model)  # and merging beside them changes nothing of this
    model.set_lora_scale(first, 0.0)
    only_second = drawn(model)
    lora.merge(model.unet)
    torch.testing.assert_close(drawn(model), only_second, rtol=1e-3, atol=1e-3)
    model.set_lora_scale(first, 0.5)
    torch.testing.assert_close(drawn(model), both, rtol=1e-3, atol=1e-3)
    assert (both - only_second).abs().max() > 0.1
    lora.unmerge(model.unet)
    assert all(torch.equal(p, changed[name]) for name, p in parameters(model).items())
    for path in (first, second):
        model.set_lora_scale(path, 0)
    for name, p in parameters(model).items():
        assert torch.equal(p.view(torch.int32), before[name].view(torch.int32)), name
    assert torch.equal(drawn(model), plain)

    folder = tmp_path / "model"
    model = build(folder=folder)
    plain = drawn(model)
    model.add_lora(first, 0.5)
    model.add_lora(second, -2)
    both = drawn(model)
    for lazy in (False, True):
        later = Pipeline.load(folder, lazy=lazy, lora=[(first, 0.5), (second, -2)])
        assert torch.equal(drawn(later), both)
        assert ("text_encoder_2" in later.originals) != lazy  # whose memory was given back
        later.set_lora_scale(first, 0)
        later.set_lora_scale(second, 0)
        assert torch.equal(drawn(later), plain)


@pytest.mark.parametrize("name, shape, words", [
    (f"unet.{NORM}.diff", (3,), "does not fit its weight"), (f"unet.{NORM}.diff_b", (), "does not fit its bias"),
    (f"unet.{UNET.replace('to_out.0', 'to_q')}.diff_b", (32,), "1 of 5 tensors fit no part"),  # it has no bias
    ("unet.nowhere.diff", (3,), "1 of 5 tensors fit no part")])
def test_a_whole_difference_that_does_not_fit_is_refused(name, shape, words, tmp_path, pipeline):
    path = written(tmp_path / "x.safetensors", "PEFT")
    save_weights(read_weights(path) | {name: torch.ones(shape)}, path)
    with pytest.raises(InputError, match=words):
        build().add_lora(path)


def test_load_lora_alone_refuses_what_it_cannot_return(tmp_path, pipeline):
    with_differences(tmp_path / "x.safetensors", pipeline)
    with pytest.raises(InputError, match="x.safetensors: holds whole differences or new words"):
        load_lora(tmp_path / "x.safetensors", parts(pipeline))


@pytest.mark.parametrize("names", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"),
                                   ("string_to_param.*", "clip_g")])
def test_words_in_a_lora_mean_their_vectors(names, tmp_path):
    vectors = {"text_encoder": numbers((2, 16), 1), "text_encoder_2": numbers((2, 24), 2)}
    path = written(tmp_path / "x.safetensors", "PEFT")
    plain = tmp_path / "plain.safetensors"
    shutil.copy(path, plain)
    bundled = {f"bundle_emb.zz.cat.{name}": x for name, x in zip(names, vectors.values())}
    save_weights(read_weights(path) | bundled, path)
    expected = build()
    expected.add_lora(plain)
    without = expected.encode("a zz.cat")
    expected.add_word("zz.cat", vectors)
    model = build()
    model.add_lora(path)
    assert torch.equal(model.encode("a zz.cat")[0].context, expected.encode("a zz.cat")[0].context)
    assert not torch.equal(model.encode("a zz.cat")[0].context, without[0].context)
    assert "zz.cat" in repr(model)


@pytest.mark.parametrize("more, words", [
    ({"bundle_emb.small.clip_l": (2, 16), "bundle_emb.small.clip_g": (2, 24)},
     "the word 'small': .*already is a token"),
    ({"bundle_emb.zz.clip_l": (2, 16)}, "the word 'zz': its vectors are as wide as"),
    ({"bundle_emb.zz.clip_l": (2, 768), "bundle_emb.zz.clip_g": (2, 1280)},
     "the word 'zz': its vectors are as wide as"),
    ({"bundle_emb.zz.clip_l": (2, 16), "bundle_emb.zz.clip_g": (3, 24)}, "is no textual inversion"),
    ({"bundle_emb.zz.t5": (2, 16)}, "1 of 5 tensors fit no part of this model .*bundle_emb.zz.t5"),
    ({"bundle_emb.z.clip_l": (1, 16), "bundle_emb.z.clip_g": (1, 24), "bundle_emb.small.clip_l": (1, 16),
      "bundle_emb.small.clip_g": (1, 24)}, "the word 'small'")])
def test_words_that_do_not_fit_are_refused_and_nothing_changes(more, words, tmp_path):
    path = written(tmp_path / "x.safetensors", "PEFT")
    save_weights(read_weights(path) | {name: torch.ones(shape) for name, shape in more.items()}, path)
    model = build()
    before = model.encode("a z small")[0].context
    with pytest.raises(InputError, match=f"x.safetensors.*{words}"):
        model.add_lora(path)
    assert not model.loras and not model.words and not list(lora.layers(model))
    assert torch.equal(model.encode("a z small")[0].context, before)


# Other kinds ------------------------------------------------------------------------------------------------------

def lora_names(module, width_in=4, width_out=4):
    return {f"{module}.lora_down.weight": (4, width_in), f"{module}.lora_up.weight": (width_out, 4)}


LAYER = f"lora_unet_{FLAT[0]}"
KINDS = {
    "a DoRA": lora_names(LAYER, 32, 32) | {f"{LAYER}.dora_scale": (32, 1)},
    "a DoRA .*magnitude": {f"unet.{UNET}.lora_magnitude_vector": (32,)},
    "a LoHa": {f"{LAYER}.hada_w1_a": (4, 4), f"{LAYER}.alpha": ()},
    "a LoKr": {f"{LAYER}.lokr_w1": (4, 4), f"{LAYER}.lokr_w2_a": (4, 4)},
    "a GLoRA": {f"{LAYER}.{x}.weight": (4, 4) for x in ("a1", "a2", "b1", "b2")},
    r"an \(IA\)3": {f"{LAYER}.weight": (4,), f"{LAYER}.on_input": ()},
    r"an \(IA\)3 .*ia3_l": {f"base_model.model.{UNET}.ia3_l": (4, 1)},
    "an OFT or BOFT": {f"{LAYER}.oft_blocks": (4, 4, 4), f"{LAYER}.alpha": ()},
    "an OFT or BOFT .*boft_R": {f"base_model.model.{UNET}.boft_R": (4, 4)},
    "an OFT or BOFT .*oft_diag": {f"{LAYER}.oft_diag": (4, 4)},
    "a LoRA with biases": {f"unet.{UNET}.lora_A.weight": (4, 32), f"unet.{UNET}.lora_B.weight": (32, 4),
                           f"unet.{UNET}.lora_B.bias": (32,)},
    "a ControlNet-LLLite": {"lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k.down.0.weight": (4, 4)},
    "an IP-Adapter": {"image_proj.proj.weight": (4, 4), "ip_adapter.1.to_k_ip.weight": (4, 4)},
    "a ControlNet": {"control_model.zero_convs.0.0.weight": (4, 4)},
    "a Control-LoRA": {"lora_controlnet": (), "input_blocks.1.0.in_layers.2.up": (4, 4)},
    "a textual inversion": {"clip_l": (2, 16), "clip_g": (2, 24)},
    "a T2I-Adapter": {"adapter.body.0.resnets.0.block1.weight": (4, 4)},
    "a T2I-Adapter .*in_conv": {"body.0.in_conv.weight": (4, 4)},
    "a LoRA for a video model": {"down_blocks.0.motion_modules.0.temporal_transformer.proj_in.lora_A.weight": (4, 4)},
    "a LoRA for a Flux model": lora_names("lora_unet_double_blocks_0_img_attn_proj"),
    "a LoRA for a Flux model .*single": {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (4, 4)},
    "a LoRA for a Stable Diffusion 3 model": lora_names("lora_unet_joint_blocks_0_x_block_attn_qkv"),
    "a LoRA for a Stable Diffusion 3 model .*add": {"transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight": (4, 4)},
    "a LoRA for a Stable Cascade model": lora_names("lora_prior_unet_down_blocks_0_0"),
    "a LoRA for a diffusion transformer": lora_names("diffusion_model.blocks.0.self_attn.q"),
    "a LoRA for a diffusion transformer .*lora_transformer": lora_names("lora_transformer_transformer_blocks_0_attn"),
    "a Flux model": {"double_blocks.0.img_attn.proj.weight": (4, 4)},
    "a whole model": {"model.diffusion_model.out.2.weight": (4, 4), "first_stage_model.quant_conv.weight": (4, 4)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_refused_by_their_name(kind, tmp_path, pipeline):
    save_weights({name: torch.ones(shape) for name, shape in KINDS[kind].items()}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=f"x.safetensors is {kind}.*; expected a LoRA made for this model"):
        load_lora(tmp_path / "x.safetensors", parts(pipeline))


@pytest.mark.parametrize("width, words", [
    (768, "a LoRA for Stable Diffusion 1.x: its text is 768 wide, this model's 40"),
    (1024, "a LoRA for Stable Diffusion 2.x"), (1280, "a LoRA for SDXL's refiner"),
    (2048, "a LoRA for SDXL: its text is 2048 wide"), (16, "a LoRA for another model: its text is 16 wide")])
def test_a_lora_for_another_family_is_named(width, words, tmp_path, pipeline):
    """Also where most of its names are those of this model: SD 1.5's text encoder is SDXL's first."""
    path = written(tmp_path / "x.safetensors", "kohya, diffusers blocks")
    layer = lora_names(f"lora_unet_{FLAT[0].replace('attn1_to_out_0', 'attn2_to_k')}", width, 32)
    save_weights(read_weights(path) | {name: torch.ones(shape) for name, shape in layer.items()}, path)
    for allow_partial in (False, True):
        with pytest.raises(InputError, match=f"x.safetensors is {words}"):
            load_lora(path, parts(pipeline), allow_partial)


def test_two_loras_in_a_file_are_refused(tmp_path, pipeline):
    for names in (("cat", "dog"), ("default", ""), ("default_0", "default_1")):
        tensors = {}
        for name in names:
            for x in "AB":
                end = f"lora_{x}.{name}.weight" if name else f"lora_{x}.weight"
                tensors[f"unet.{UNET}.{end}"] = torch.ones(4, 4)
        save_weights(tensors, tmp_path / "x.safetensors")
        first, second = sorted(names)
        for allow_partial in (False, True):
            with pytest.raises(InputError, match=f"holds 2 LoRAs, called '{first}', '{second}'; save the one to use"):
                load_lora(tmp_path / "x.safetensors", parts(pipeline), allow_partial)


ESCAPE = "\x1b[31m\x07\u202e"  # colours a terminal, rings its bell, writes from right to left


@pytest.mark.parametrize("names, settings", [
    ([f"lora_unet_{ESCAPE}.lora_up.weight"], None), ([f"lora_unet_{ESCAPE}.hada_w1_a"], None),
    ([f"unet.{UNET}.lora_{x}.{ESCAPE}{i}.weight" for x in "AB" for i in (1, 2)], None),
    ([f"bundle_emb.{ESCAPE}.clip_l"], None),
    ([f"unet.{UNET}.lora_{x}.weight" for x in "AB"], {"bias": ESCAPE}),
    ([f"unet.{UNET}.lora_{x}.weight" for x in "AB"], {"alpha_pattern": {ESCAPE: 3}}),
    ([f"unet.{UNET}.lora_{x}.weight" for x in "AB"], {"lora_alpha": ESCAPE})])
def test_a_terminal_obeys_nothing_in_a_file(names, settings, tmp_path):
    path = tmp_path / "x.safetensors"
    noted = {"lora_adapter_metadata": json.dumps({f"unet.{key}": x for key, x in settings.items()})} if settings else {}
    save_weights({name: torch.ones(32, 32) for name in names}, path, noted)
    with pytest.raises(InputError) as error:
        build().add_lora(path)
    assert "x.safetensors" in str(error.value) and str(error.value).isprintable()


def test_what_is_left_out_is_listed_printably(tmp_path):
    path = written(tmp_path / "x.safetensors", "PEFT")
    save_weights(read_weights(path) | {f"unet.{ESCAPE}.lora_A.weight": torch.ones(1)}, path)
    with pytest.warns(UserWarning, match="1 tensors are left out: 'unet") as caught:
        build().add_lora(path, allow_partial=True)
    assert str(caught[0].message).isprintable()


# Scales -----------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("scale", ["x", None, float("nan"), float("inf"), -float("inf"), 10**400, 1e300, True, [1], 1j])
def test_a_scale_that_is_no_number_changes_nothing(scale, tmp_path):
    path, model = written(tmp_path / "x.safetensors", "PEFT"), build()
    before = parameters(model)
    with pytest.raises(ParameterError, match="^scale: choose a number such as 0.8"):
        model.add_lora(path, scale)
    assert not model.loras and not lora.layers(model)
    model.add_lora(path, np.float32(0.5))
    with pytest.raises(ParameterError, match="^scale: choose a number such as 0.8"):
        model.set_lora_scale(path, scale)
    assert model.loras[str(path)][0] == 0.5
    with pytest.raises(ParameterError, match="^lora: expected"):
        Pipeline.load(folder(), lora=[(path, scale)])
    model.set_lora_scale(path, 0)
    assert all(torch.equal(p, before[name]) for name, p in parameters(model).items())


def test_an_unknown_lora_and_a_merged_model_are_one_sentence(tmp_path):
    path, model = written(tmp_path / "x.safetensors", "PEFT"), build()
    with pytest.raises(ParameterError, match=r"^path: 'nope' is no LoRA that was added \(added: none\)"):
        model.set_lora_scale("nope", 1)
    model.add_lora(path)
    with pytest.raises(ParameterError, match=r"'nope' is no LoRA that was added \(added: .*x.safetensors\)"):
        model.set_lora_scale("nope", 1)
    before = parameters(model)
    lora.merge(model.unet)
    with pytest.raises(InputError, match="y.safetensors cannot be added: the model's LoRAs are merged; unmerge them"):
        model.add_lora(written(tmp_path / "y.safetensors", "PEFT"))
    assert list(model.loras) == [str(path)]
    lora.unmerge(model.unet)
    assert all(torch.equal(p, before[name]) for name, p in parameters(model).items())
    model.add_lora(tmp_path / "y.safetensors")
    for add in (model.add_lora, model.add_embedding, model.add_controlnet):
        for wrong in (3, None, [str(path)]):
            with pytest.raises(InputError, match="is no file and no folder; give its path"):
                add(wrong)
    for wrong in (3, [3], [("a", 1, 2)], {"a": 1}):
        with pytest.raises(ParameterError, match="^lora: expected"):
            Pipeline.load(folder(), lora=wrong)


def test_sample_takes_a_folder_with_a_scale(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    written(tmp_path / "run" / "lora.safetensors", "PEFT")
    assert sample.split_file("run:0.5") == ("run", "0.5") and sample.split_file("run") == ("run", "")
    assert sample.split_file("nowhere:0.5") == ("nowhere:0.5", "")
    flags = ["a red cube", "--model", str(folder()), "--device", "cpu", "--n", "1", "--steps", "1", "--dtype", "fp32"]
    for name, lora_flag in (("file", "run/lora.safetensors:0.5"), ("folder", "run:0.5"), ("one", "run")):
        assert sample.main([*flags, "--lora", lora_flag, "--out", f"{name}.png"]) == 0
    pixels = [open_picture(f"{name}.png").tobytes() for name in ("file", "folder", "one")]
    assert pixels[0] == pixels[1] != pixels[2]
