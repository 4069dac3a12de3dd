"""NextDiT: the released model's keys and shapes, the official program's values and gradients, identities, configs.

The goldens were made by running the official program (github.com/lehduong/OneDiffusion @ 6a64303). Those of whole
networks are larger than the repository should be, and are looked for beside it.
"""

import json
from dataclasses import replace
from pathlib import Path

import peers
import pytest
import torch
from safetensors.torch import load_file, save_file

from minipic.common import InputError, ParameterError
from minipic.layers.attention import attention
from minipic.models.nextdit import NextDiT, NextDiTConfig, rotate, rotations
from minipic.models.unet import timestep_embedding
from minipic.weights.configs import config_to_json, read_config
from minipic.weights.layouts import load_part, open_part, save_part

GOLDEN = load_file(peers.GOLDENS / "onediffusion.safetensors")
LARGE = Path(__file__).parents[2] / "shared" / "golden" / "onediffusion"
large = pytest.mark.skipif(not LARGE.exists(), reason="the large goldens are not here")

TINY = NextDiTConfig(
    in_channels=4, hidden_size=48, depth=2, num_heads=4, num_kv_heads=2, multiple_of=16, caption_channels=20,
    rotary_max_length=8, softcap=0.0)
# config.json of the released model, with what its training left there.
OFFICIAL = {
    "_class_name": "NextDiT", "_diffusers_version": "0.30.0", "_name_or_path": "a/folder", "caption_channels": 2048,
    "decay": 0.9999, "depth": 16, "ffn_dim_multiplier": None, "forward_dtype": "bfloat16", "hidden_size": 3840,
    "in_channels": 16, "input_size": [1, 96, 96], "inv_gamma": 1.0, "min_decay": 0.0, "model_max_length": 512,
    "multiple_of": 256, "norm_eps": 1e-5, "norm_type": "rms", "num_heads": 32, "num_kv_heads": 8,
    "optimization_step": 8000, "param_dtype": "float32", "patch_size": [1, 2, 2], "power": 0.6667, "pred_sigma": False,
    "qk_norm": True, "remat_attention": "", "remat_block": "", "remat_mlp": "", "rotary_max_length": 128,
    "rotary_max_length_t": None, "update_after_step": 0, "use_ema_warmup": False}


def given(config=TINY, frames=3, side=8, words=6, seed=0, dtype=torch.float32):
    """x, t, text and mask of two samples; the second text is shorter."""
    x = peers.numbers((2, frames, config.in_channels, side, side), seed).to(dtype)
    t = torch.tensor([[10.0, 990.0, 400.5, 0.0], [500.0, 0.0, 75.0, 3.0]])[:, :frames]
    text = peers.numbers((2, words, config.caption_channels), seed + 1).to(dtype)
    mask = torch.arange(words) < torch.tensor([[words], [words - 2]])
    return x, t, text, mask


def network(config=TINY, dtype=torch.float32):
    return peers.fill(NextDiT(config)).to(dtype).eval()


# The official program -----------------------------------------------------------------------------

def test_keys_and_shapes_of_the_released_model():
    with torch.device("meta"):
        model = NextDiT(NextDiTConfig())
    assert peers.key_table(model) == (382, 2_800_389_184, "527d014e19992d9c")
    if LARGE.exists():
        expected = json.loads((LARGE / "full_keys_shapes.json").read_text())["shapes"]
        assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == expected


@pytest.mark.parametrize("hidden, depth, heads, kv, text, channels, parameters", [
    (192, 8, 4, 2, 128, 4, 4_794_608), (288, 8, 6, 2, 192, 4, 10_360_672), (288, 12, 6, 2, 192, 4, 15_388_024),
    (384, 8, 8, 2, 256, 16, 18_077_184)])
def test_sizes_of_small_ones(hidden, depth, heads, kv, text, channels, parameters):
    config = NextDiTConfig(
        in_channels=channels, hidden_size=hidden, depth=depth, num_heads=heads, num_kv_heads=kv, multiple_of=256,
        caption_channels=text)
    with torch.device("meta"):
        assert sum(p.numel() for p in NextDiT(config).parameters()) == parameters


def official(softcap=0.0):
    """The small model of the goldens."""
    values = json.loads((LARGE / "model_config.json").read_text())
    model = NextDiT(replace(read_config(NextDiTConfig, values), softcap=softcap))
    model.load_state_dict(load_file(LARGE / "model_weights.safetensors"), strict=True)
    return model.eval()


def as_official(t):
    """The official program has a t for each number of a latent, and averages the 64 of a token. That is not exact."""
    return t[..., None].expand(*t.shape, 64).contiguous().mean(-1)


def official_case(name):
    cases = load_file(LARGE / "model_cases.safetensors")
    source = {"E": "D", "G_bf16": "B"}.get(name, name)
    x, t, text = (cases[f"{source}.{part}"] for part in ("x", "t", "y"))
    if name == "A":  # one frame, without a dimension for frames
        x, t = x[:, None], t[:, None]
    return (x, as_official(t), text, cases.get(f"{name}.mask", cases[f"{source}.mask"])), cases[f"{name}.out"]


@large
@torch.no_grad()
@pytest.mark.parametrize("name", ["A", "B", "B_softcap30", "C", "D", "E", "F_ntk", "F_linear"])
def test_values_are_the_official_ones(name):
    """Measured: D is equal to the last bit, the others differ by 3e-5 at most, where outputs reach 5.6."""
    model = official(softcap=30.0 if name == "B_softcap30" else 0.0)
    inputs, expected = official_case(name)
    scale = (1.5, 300.0) if name[0] == "F" else ()
    torch.testing.assert_close(model(*inputs, *scale), expected, atol=5e-5, rtol=0)


@large
@torch.no_grad()
def test_values_in_bf16():
    (x, t, text, mask), expected = official_case("G_bf16")
    model = official(softcap=30.0).bfloat16()
    out = model(x.bfloat16(), t, text.bfloat16(), mask)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).square().mean().sqrt() < 0.06  # bf16 and fp32 of the official program: 0.055


@large
@pytest.mark.parametrize("name", ["B", "D"])
def test_gradients_are_the_official_ones(name):
    model = official()
    (x, t, text, mask), _ = official_case(name)
    x.requires_grad_(), text.requires_grad_()
    goldens = load_file(LARGE / f"grads_case{name}.safetensors")
    loss = (model(x, t, text, mask) - goldens[f"{name}.target"]).square().mean()
    loss.backward()
    torch.testing.assert_close(loss.detach(), goldens[f"{name}.loss"].reshape(()), rtol=1e-5, atol=0)
    found = {"x": x.grad, "y": text.grad} | {key: p.grad for key, p in model.named_parameters()}
    checked = 0
    for key, expected in goldens.items():
        key = key.removeprefix(f"{name}.grad.")
        if key in found and not key.endswith("ky_norm.bias"):  # which has no effect, so its gradient is rounding
            scale = expected.abs().max().item()
            torch.testing.assert_close(found[key].reshape(expected.shape), expected, rtol=0, atol=1e-4 * scale)
            checked += 1
    norms = json.loads((LARGE / f"grad_norms_case{name}.json").read_text())
    for key, norm in norms.items():
        if not key.endswith("ky_norm.bias"):
            assert found[key].norm().item() == pytest.approx(norm, rel=1e-4)
    assert checked == 28 and len(norms) == 83


@pytest.mark.parametrize("table, scale", [
    ("hd24", {}), ("hd24_ntk_x1.5", {"scale_factor": 1.5}), ("hd24_linear_x1.5", {"scale_factor": 1.5, "linear": True}),
    ("hd120", {})])
def test_rotations_are_the_official_ones(table, scale):
    places = GOLDEN[f"rope.{table}.pos_thw"]
    counts = (places.max(0).values + 1).tolist()
    head_dim = int(table.split("_")[0].removeprefix("hd"))
    found = rotations(*counts, head_dim, **scale).view(*counts, -1)[tuple(places.T)]
    torch.testing.assert_close(found.real, GOLDEN[f"rope.{table}.cos"], rtol=0, atol=2e-7)
    torch.testing.assert_close(found.imag, GOLDEN[f"rope.{table}.sin"], rtol=0, atol=2e-7)


def test_rotation_of_queries_and_keys_is_the_official_one():
    places = GOLDEN["rope.apply.pos_thw"]
    counts = (places.max(0).values + 1).tolist()
    rotation = rotations(*counts, 24).view(*counts, -1)[tuple(places.T)]
    for name in ("q", "k"):
        found = rotate(GOLDEN[f"rope.apply.{name}"], rotation)
        torch.testing.assert_close(found, GOLDEN[f"rope.apply.{name}_out"], rtol=0, atol=1e-6)


def test_patches_and_sinusoids_are_the_official_ones():
    model = NextDiT(replace(TINY, in_channels=16))
    x = GOLDEN["embedders.patch.x"]
    tokens = model.patchify(x)
    assert torch.equal(tokens.flatten(1, 2), GOLDEN["embedders.patch.tokens"])
    assert torch.equal(model.unpatchify(tokens, x.shape[3] // 2, x.shape[4] // 2), x)
    t = GOLDEN["embedders.t"][0]
    torch.testing.assert_close(timestep_embedding(t, 256), GOLDEN["embedders.sinusoid_256"][0], rtol=0, atol=1e-4)


# Identities ---------------------------------------------------------------------------------------

@torch.no_grad()
def test_a_new_network_predicts_nothing_and_its_blocks_do_nothing():
    model = NextDiT(TINY)
    assert not model(*given()).any()
    h = peers.numbers((2, 3, 16, 48), 0).float()
    rotation = rotations(3, 4, 4, 12)
    text, mask = given()[2:]
    assert torch.equal(model.layers[0](h, text, mask, rotation, torch.randn(2, 3, 1, 48)), h)


@torch.no_grad()
def test_padding_of_the_text_has_no_effect():
    model = network(dtype=torch.float64)
    x, t, text, mask = given(dtype=torch.float64)
    expected = model(x, t, text, mask)
    longer = torch.cat([text, 50 * torch.ones(2, 3, 20)], dim=1)
    longer[~torch.cat([mask, torch.zeros(2, 3).bool()], dim=1)] = 7.0
    mask = torch.cat([mask, torch.zeros(2, 3).bool()], dim=1)
    torch.testing.assert_close(model(x, t, longer, mask), expected, rtol=0, atol=1e-10)
    assert not torch.allclose(model(x, t, longer, torch.ones_like(mask)), expected)


@torch.no_grad()
def test_with_closed_gates_the_text_acts_through_its_mean_alone():
    model = network(dtype=torch.float64)
    for block in model.layers:
        block.attention.gate.zero_()
    x, t, text, mask = given(dtype=torch.float64)
    mask = torch.ones_like(mask)
    expected = model(x, t, text, mask)
    mean = text.mean(1, keepdim=True).expand_as(text)
    torch.testing.assert_close(model(x, t, mean, mask), expected, rtol=0, atol=1e-9)
    model.layers[0].attention.gate.fill_(1.0)
    assert not torch.allclose(model(x, t, mean, mask), model(x, t, text, mask))


@torch.no_grad()
def test_frames_know_each_other_and_their_own_noise_level():
    model = network()
    x, t, text, mask = given()
    out = model(x, t, text, mask)
    for changed in (torch.stack([x[:, 1], x[:, 0], x[:, 2]], 1), x + torch.eye(3)[1][None, :, None, None, None]):
        assert (model(changed, t, text, mask)[:, 2] - out[:, 2]).abs().max() > 1e-3
    later = t.clone()
    later[:, 1] += 100
    assert (model(x, later, text, mask) - out).abs().amax((0, 2, 3, 4)).min() > 1e-4


def test_places_matter_only_by_their_differences():
    q, k = (peers.numbers((1, 1, 1, 24), seed).float() for seed in (1, 2))
    turn = rotations(6, 6, 6, 24).view(6, 6, 6, 12)

    def score(a, b):
        return (rotate(q, turn[a][None]) * rotate(k, turn[b][None])).sum()

    torch.testing.assert_close(score((1, 2, 3), (0, 4, 1)), score((3, 3, 4), (2, 5, 2)))
    assert (score((1, 2, 3), (0, 4, 1)) - score((1, 2, 3), (0, 4, 2))).abs() > 1e-3
    assert torch.equal(rotate(q, turn[0, 0, 0][None]), q)


@torch.no_grad()
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_frames_and_text_share_keys_in_different_orders(kv):
    """Query h reads key h // n of the frames and h % kv of the text: the same where kv is 1 or all."""
    config = replace(TINY, num_kv_heads=kv)
    layer = network(config).layers[0].attention
    x, _, text, mask = given(config)
    tokens = peers.numbers((2, 6, 48), 5).float()
    rotation = torch.ones(6, 6, dtype=torch.complex64)
    q, k, v = layer.q_norm(layer.wq(tokens)), layer.k_norm(layer.wk(tokens)), layer.wv(tokens)
    text_k, text_v = layer.ky_norm(layer.wk_y(text)), layer.wv_y(text)
    outputs = []
    for head in range(4):
        own, other = head // (4 // kv), head % kv
        heads = [tensor[..., 12 * i:12 * i + 12] for tensor, i in (
            (q, head), (k, own), (v, own), (text_k, other), (text_v, other))]
        scores = heads[0] @ heads[1].mT / 12**0.5
        text_scores = (heads[0] @ heads[3].mT / 12**0.5).masked_fill(~mask[:, None], -torch.inf)
        outputs.append(
            scores.softmax(-1) @ heads[2] + layer.gate[head].tanh() * (text_scores.softmax(-1) @ heads[4]))
    expected = layer.wo(torch.cat(outputs, dim=-1))
    torch.testing.assert_close(layer(tokens, text, mask, rotation), expected, rtol=1e-4, atol=1e-5)


def test_checkpointing_changes_no_gradient():
    found = []
    for on in (False, True):
        model = network(dtype=torch.float64).train()
        model.enable_gradient_checkpointing(on)
        model(*given(dtype=torch.float64)).square().mean().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@torch.no_grad()
@pytest.mark.parametrize("backend", ["naive", "chunked", "sdpa"])
def test_attention_with_a_mask_and_a_softcap_is_the_formula(backend):
    q, k, v = (peers.numbers((2, n, 3, 8), seed).float() for seed, n in ((0, 5), (1, 7), (2, 7)))
    mask = torch.arange(7) < torch.tensor([[4], [0]])
    softcap = 0.0 if backend == "sdpa" else 2.0
    scores = torch.einsum("bnhd,bmhd->bhnm", 3 * q, k) / 8**0.5
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    weights = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1).nan_to_num(0)
    expected = torch.einsum("bhnm,bmhd->bnhd", weights, v)
    found = attention(3 * q, k, v, backend=backend, mask=mask, softcap=softcap)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not found[1].any()  # it sees no key
    if softcap:
        torch.testing.assert_close(attention(3 * q, k, v, mask=mask, softcap=softcap), expected, rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(InputError, match="'sdpa' has no softcap"):
            attention(q, k, v, backend="sdpa", softcap=1.0)


# Configs and files --------------------------------------------------------------------------------

@pytest.mark.parametrize("change, key", [
    ({"num_heads": 5}, "num_heads"), ({"num_heads": 6, "num_kv_heads": 3}, "num_heads"), ({"num_kv_heads": 3}, "num_kv_heads"),
    ({"patch_size": (2, 2, 2)}, "patch_size"), ({"patch_size": (1, 2, 4)}, "patch_size"), ({"depth": 0}, "depth"),
    ({"hidden_size": 48.0}, "hidden_size"), ({"softcap": -1.0}, "softcap"), ({"num_kv_heads": None}, "num_kv_heads")])
def test_a_config_checks_itself(change, key):
    with pytest.raises(ParameterError) as error:
        replace(TINY, **change)
    assert error.value.parameter == key


def test_official_config_is_read_and_ours_comes_back():
    assert read_config(NextDiTConfig, OFFICIAL) == NextDiTConfig()
    assert read_config(NextDiTConfig, json.loads(json.dumps(config_to_json(TINY)))) == TINY
    for key, value in (("norm_type", "layer"), ("pred_sigma", True), ("qk_norm", False), ("experts", 4)):
        with pytest.raises(InputError, match=key):
            read_config(NextDiTConfig, OFFICIAL | {key: value})


@pytest.mark.parametrize("sizes, message", [
    ((9, 8, 8), "9 frames are more than 8"), ((1, 7, 8), "7x8 is not cut into patches of 2"),
    ((1, 8, 18), "8x18 is more than 16 a side")])
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    frames, height, width = sizes
    x = torch.zeros(1, frames, 4, height, width)
    with pytest.raises(ParameterError, match=message):
        network()(x, torch.zeros(1, frames), torch.zeros(1, 1, 20), torch.ones(1, 1))


def test_the_official_folder_loads_whole_or_in_shards(tmp_path):
    model = network()
    values = config_to_json(TINY) | {key: OFFICIAL[key] for key in ("input_size", "forward_dtype", "decay")}
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    stem = "diffusion_pytorch_model"
    for folder, parts in (("whole", 1), ("shards", 2)):
        path = tmp_path / folder / "transformer"
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(values))
        files = {}
        for i in range(parts):
            name = f"{stem}.safetensors" if parts == 1 else f"{stem}-0000{i + 1}-of-00002.safetensors"
            own = {key: state[key] for key in list(state)[i::parts]}
            save_file(own, path / name)
            files |= dict.fromkeys(own, name)
        if parts > 1:
            (path / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        loaded = load_part(open_part(path, "transformer"), torch.float32)
        assert all(torch.equal(tensor, state[name].float()) for name, tensor in loaded.state_dict().items())
    save_part(model, tmp_path / "ours")
    again = load_part(open_part(tmp_path / "ours", "transformer"))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))


def test_a_folder_of_another_model_is_refused(tmp_path):
    save_part(network(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(replace(TINY, depth=1))))
    with pytest.raises(InputError, match="does not fit a NextDiT with its config: 23 unexpected"):
        open_part(tmp_path, "transformer")
