"""LoRA: the layer's identities, files in every spelling, and what PEFT and diffusers make of ours."""

import json

import peers
import pytest
import torch
import torch.nn as nn
from tiny import build

from minipic.common import InputError
from minipic.diffusion.schedule import Schedule
from minipic.layers import lora
from minipic.layers.swap import swap
from minipic.models.unet import SD15, SDXL_BASE, SDXL_REFINER, UNet
from minipic.pipeline import Pipeline
from minipic.training.optimizer import build_optimizer
from minipic.training.settings import TrainSettings
from minipic.weights import keys, load_lora, read_weights, save_lora, save_weights
from minipic.weights.configs import config_to_json
from minipic.weights.files import read_header


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
    "SimpleTuner": (f"lycoris_{FLAT[0]}", f"lora_te1_text_model_{FLAT[1]}", ".lora_down.weight", ".lora_up.weight",
                    ".alpha"),
    "ComfyUI": (f"diffusion_model.{keys.sgm_name(UNET)}", f"text_encoders.clip_l.transformer.text_model.{TEXT}",
                ".lora_down.weight", ".lora_up.weight", ".alpha"),
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
     "2 of 8 tensors, of a LoHa or LoKr, fit no part.*hada_w1_a"),
    (lambda t: t | {f"lora_te1_text_projection.lora_{x}.weight": torch.ones(4, 4) for x in ("down", "up")},
     "2 of 8 tensors fit no part.*text_projection"),
    (lambda t: {k: torch.ones(2) if "alpha" in k else v for k, v in t.items()}, "an alpha or the header's"),
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
    for damaged in ('{', '{"unet.lora_alpha": "x"}', '{"unet.alpha_pattern": [1]}', '{"unet.lora_alpha": NaN}',
                    '{"unet.alpha_pattern": {"(": 3}}', "[" * 100_000, f'{{"unet.lora_alpha": {10**400}}}'):
        save_weights(tensors, path, {"lora_adapter_metadata": damaged})
        with pytest.raises(InputError, match="lora_adapter_metadata is damaged"):
            load_lora(path, parts(pipeline))


def test_the_rest_is_used_when_asked(tmp_path, pipeline):
    path = written(tmp_path / "x.safetensors", "kohya, sgm blocks")
    loha = f"lora_unet_{FLAT[0].replace('to_out_0', 'to_k')}"  # a layer that this model has
    save_weights(read_weights(path) | {"lora_unet_nowhere.lora_up.weight": torch.ones(4, 4),
                                       f"{loha}.hada_w1_a": torch.ones(4, 4), f"{loha}.alpha": torch.tensor(4.0)}, path)
    assert set(load_lora(path, parts(pipeline), partial=True)) == {"unet", "text_encoder"}
    save_weights(read_weights(path) | {f"unet.{UNET}.lora_magnitude_vector": torch.ones(4)}, path)
    with pytest.raises(InputError, match="is a DoRA"):  # without its scales it would be another change
        load_lora(path, parts(pipeline), partial=True)


def test_pipeline_draws_with_loras_and_without_again(tmp_path):
    model, path = build(), written(tmp_path / "x.safetensors", "PEFT")
    draw = lambda pipeline: list(pipeline.latents("a small red sphere!", steps=2))[-1]
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
    folder = tmp_path / "model"
    build(folder=folder)
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
