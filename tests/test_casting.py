"""Layerwise casting: the numbers of weights widened beforehand, forward, backward, under LoRAs and in whole drawings."""

import pytest
import torch
from tiny import PROMPT, build
from torch import nn

import train
from minipic import common
from minipic.kernels import casting
from minipic.layers import attention, lora
from minipic.pipeline import Pipeline
from minipic.weights import read_weights, save_weights
from minipic.weights.layouts import load_part, open_part

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Every Linear counts as large, and is widened in pieces of which the last one is shorter."""
    monkeypatch.setattr(casting, "LARGE", 1)
    monkeypatch.setattr(casting, "ROWS", 3)


def layers(dtype, bias=True):
    """A cast layer, and the one that it stands for."""
    torch.manual_seed(0)
    wide = nn.Linear(12, 10, bias)
    wide.weight.data = wide.weight.data.to(dtype).float()
    cast = nn.Sequential(nn.Linear(12, 10, bias))
    assert casting.install(cast) == {"0.weight"}
    cast[0].load_state_dict({name: x.to(dtype) if name == "weight" else x for name, x in wide.state_dict().items()},
                            assign=True)
    return cast[0].requires_grad_(False), wide.requires_grad_(False)


def given(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32).requires_grad_()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_is_the_wide_layer_and_keeps_no_wide_weight(dtype, bias):
    cast, wide = layers(dtype, bias)
    for x in (given(5, 12), given(2, 5, 12), given(2, 12, 5).transpose(1, 2)):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
            found = cast(x)
        assert [tensor.dtype for tensor in kept] == [dtype]
        weights = torch.randn_like(found)
        back, = torch.autograd.grad((found * weights).sum(), x)
        expected = wide(x)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(back, torch.autograd.grad((expected * weights).sum(), x)[0], rtol=1e-6, atol=1e-6)


def test_a_weight_that_trains_gets_its_gradient():
    cast, wide = layers(torch.bfloat16)
    for layer in (cast, wide):
        layer.requires_grad_(True)(given(5, 12)).square().sum().backward()
    torch.testing.assert_close(cast.weight.grad.float(), wide.weight.grad, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("given_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_makes_of_it_what_it_makes_of_the_wide_layer(dtype, given_dtype):
    """Bit for bit; also for a LoRA around it, and for x that autocast has made bf16 before."""
    for with_lora in (False, True):
        found = []
        for layer in layers(dtype):
            model = nn.Sequential(layer)
            if with_lora:
                lora.add(model, "0", "x", given(2, 12).detach(), given(10, 2).detach())
            x = given(5, 12).detach().to(given_dtype).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                out = model(x)
            found.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), x)])
        assert found[0][0].dtype == torch.bfloat16 or with_lora
        assert all(one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(*found))


def test_is_a_linear_where_nothing_is_to_be_widened():
    cast, wide = layers(torch.bfloat16)
    x = given(5, 12).bfloat16()
    assert torch.equal(cast.bfloat16()(x), wide.bfloat16()(x))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_lora_learns_beside_it(dtype):
    found = []
    for layer in layers(dtype):
        model = nn.Sequential(layer)
        torch.manual_seed(2)
        a, b = lora.inject(model, rank=2, match="0")
        b.data.normal_()
        out = model(given(5, 12))
        found.append([out, *torch.autograd.grad(out.square().sum(), [a, b])])
        assert {a.dtype, b.dtype} == {torch.float32}
    for cast, wide in zip(*found):
        torch.testing.assert_close(cast, wide, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_draws_the_same_from_half_the_memory(kind, dtype, tmp_path):
    build(kind).save(tmp_path, dtype)
    plain, cast = Pipeline.load(tmp_path), Pipeline.load(tmp_path, cast=True)
    large = {f"{name}.weight" for name, module in cast.named_modules() if isinstance(module, nn.Linear)}
    assert {name: p.dtype for name, p in cast.named_parameters()} == {
        name: dtype if name in large else torch.float32 for name, _ in plain.named_parameters()}
    lazy = Pipeline.load(tmp_path, lazy=True, cast=True)
    expected, *found = (list(pipeline.latents(PROMPT, steps=2))[-1] for pipeline in (plain, cast, lazy))
    for x in found:
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-4)
    cast.save(tmp_path / "again", dtype)
    assert all(torch.equal(a, b) for a, b in zip(Pipeline.load(tmp_path / "again").state_dict().values(),
                                                 plain.state_dict().values()))


@pytest.mark.slow
@pytest.mark.parametrize("capabilities", [
    ("avx512_bf16",), pytest.param((), marks=pytest.mark.slow),
    pytest.param(("avx512_bf16", "amx_tile"), marks=pytest.mark.slow)], ids=lambda c: "+".join(c) or "neither")
def test_a_lora_trains_the_same_on_it(capabilities, tmp_path, monkeypatch):
    """On every kind of CPU: those with bf16 encode the pictures under autocast, each attends in its own way."""
    for module in (common, attention):
        monkeypatch.setattr(module, "cpu_has", capabilities.__contains__)
    build(folder=tmp_path / "model").save(tmp_path / "model", torch.float16)
    files, backward, seen = [], casting.Product.backward, []
    monkeypatch.setattr(casting.Product, "backward", lambda ctx, grad: (seen.append(name), backward(ctx, grad))[1])
    for name, large in (("cast", 1), ("plain", 1 << 60)):
        monkeypatch.setattr(casting, "LARGE", large)
        assert train.main(["t2i", "--model", str(tmp_path / "model"), "--lora-rank", "2", "--steps", "3", "--batch", "2",
                           "--scenes", "8", "--sample-every", "0", "--precision", "fp32", "--gradient-checkpointing",
                           "--lr", "1e-2", "--warmup", "1", "--out", str(tmp_path / name)]) == 0
        files.append(read_weights(tmp_path / name / "model" / "lora.safetensors"))
    assert set(seen) == {"cast"}
    learnt = sum(x.abs().sum() for name, x in files[0].items() if "lora_B" in name)  # it began at 0
    assert learnt > 1
    assert sum((x - files[1][name]).abs().sum() for name, x in files[0].items()) < 0.01 * learnt


@pytest.mark.slow
def test_a_lora_from_a_file_computes_in_fp32(tmp_path):
    build(folder=tmp_path).save(tmp_path, torch.float16)
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
    save_weights({f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(32, 2) / 30},
                 tmp_path / "lora.safetensors")
    plain, cast = (Pipeline.load(tmp_path, cast=cast, lora=tmp_path / "lora.safetensors") for cast in (False, True))
    assert {p.dtype for name, p in cast.named_parameters() if "lora_" in name} == {torch.float32}
    one, other, without = (list(pipeline.latents(PROMPT, steps=2))[-1] for pipeline in (
        plain, cast, Pipeline.load(tmp_path)))
    torch.testing.assert_close(other, one, rtol=0, atol=1e-4)
    assert (one - without).abs().max() > 0.01


def test_only_fp32_and_only_files_in_16_bits_are_cast(tmp_path):
    build(folder=tmp_path / "wide")
    part = open_part(tmp_path / "wide" / "unet", "unet")
    assert {p.dtype for p in load_part(part, torch.float32, cast=True).parameters()} == {torch.float32}
    assert {p.dtype for p in load_part(part, torch.bfloat16, cast=True).parameters()} == {torch.bfloat16}
