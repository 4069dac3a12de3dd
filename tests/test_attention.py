"""attention(): the backends against the formula written out in float64."""

import math
from contextlib import nullcontext
from unittest import mock

import peers
import pytest
import torch

from minipic.common import InputError
from minipic.layers.attention import Attention, attention, choose_backend, safe_kernels


def formula(q, k, v, causal):
    """Row by row, softmax(q k^T / sqrt(d)) v."""
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for n in range(q.shape[1]):
            for h in range(q.shape[2]):
                seen = n + 1 if causal else k.shape[1]
                weights = (k[b, :seen, h] @ q[b, n, h] / math.sqrt(q.shape[3])).exp()
                out[b, n, h] = weights / weights.sum() @ v[b, :seen, h]
    return out


def qkv(n, m, dtype):
    return [peers.numbers((2, size, 3, 8), seed).to(dtype).requires_grad_() for seed, size in enumerate((n, m, m))]


@pytest.mark.parametrize("backend", ["sdpa", "naive", "chunked", None])
@pytest.mark.parametrize("n, m, causal", [(7, 7, False), (7, 7, True), (5, 9, False), (9, 1, False), (130, 130, True)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_is_the_formula(backend, n, m, causal, dtype, tolerance):
    q, k, v = qkv(n, m, dtype)
    out = attention(q, k, v, causal=causal, backend=backend)
    assert out.shape == q.shape and out.dtype == dtype
    with torch.no_grad():
        assert peers.distance(out.double(), formula(q.double(), k.double(), v.double(), causal)) < tolerance


@pytest.mark.parametrize("has, learns, dtype, expected, few", [
    ("amx", False, torch.bfloat16, "sdpa", "sdpa"), ("avx512_bf16", False, torch.bfloat16, "chunked", "chunked"),
    ("avx512_bf16", False, torch.float32, "sdpa", "sdpa"), ("avx512_bf16", True, torch.bfloat16, "sdpa", "naive"),
    ("neither", False, torch.bfloat16, "sdpa", "sdpa"), ("neither", True, torch.bfloat16, "sdpa", "sdpa")])
def test_the_default_on_a_cpu(has, learns, dtype, expected, few, monkeypatch):
    """Products in bf16 take up to 35 times as long where the CPU has no instructions for them."""
    for name in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name.startswith(has))
    k = torch.ones(1, 300, 1, 8, dtype=dtype, requires_grad=learns)
    assert choose_backend(k, k) == expected and choose_backend(k, k[:, :77]) == few


def test_cudnns_kernel_does_not_train():
    """Its gradients were NaN on an H100."""
    assert torch.backends.cuda.cudnn_sdp_enabled()
    for is_cuda, trains in ((False, True), (True, False)):
        with safe_kernels(is_cuda, trains):
            assert torch.backends.cuda.cudnn_sdp_enabled()
    with safe_kernels(is_cuda=True, trains=True):
        assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
    asked = []
    with mock.patch("minipic.layers.attention.safe_kernels", lambda *about: asked.append(about) or nullcontext()):
        q, k, v = qkv(3, 4, torch.float32)
        attention(q, k, v, backend="sdpa")
        with torch.no_grad():
            attention(q, k, v, backend="sdpa")
        attention(q.detach(), k.detach(), v.detach(), backend="sdpa")
    assert asked == [(False, True), (False, False), (False, False)]


@pytest.mark.parametrize("causal", [False, True])
def test_backends_have_the_same_gradients(causal):
    def gradients(backend):
        given = qkv(131, 131, torch.float64)
        out = attention(*given, causal=causal, backend=backend)
        return torch.autograd.grad((out * peers.numbers(out.shape, 5)).sum(), given)

    for first, *others in zip(*map(gradients, ("naive", "sdpa", "chunked", None))):
        assert all(peers.distance(first, other) < 1e-12 for other in others)


@torch.no_grad()
@pytest.mark.parametrize("n, m", [(5, 9), (700, 700), (1100, 1000)])  # parts: all at once, one for each head, also of queries
@pytest.mark.parametrize("extra", ["", "causal", "mask", "softcap", "autocast"])
def test_parts_that_share_their_memory_are_the_formula(n, m, extra):
    if extra == "causal":
        m = n
    q, k, v = (x.detach() for x in qkv(n, m, torch.float64))
    mask = torch.arange(m).remainder(3).bool()[None].repeat(2, 1) if extra == "mask" else None
    given = {"mask": mask, "softcap": 2.0 if extra == "softcap" else 0.0, "causal": extra == "causal"}
    expected = attention(q, k, v, backend="naive", **given)
    if extra == "autocast":
        q = q.bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            out = attention(q, k.bfloat16(), v.bfloat16(), backend="chunked").double()
        assert peers.distance(out, expected) < 4e-2
    else:
        assert peers.distance(attention(q, k, v, backend="chunked", **given), expected) < 1e-12


@torch.no_grad()
def test_module_is_heads_of_projections_side_by_side():
    module = peers.fill(Attention(12, 10, heads=3, head_dim=4, qkv_bias=True)).double()
    x, context = peers.numbers((2, 5, 12), 1), peers.numbers((2, 6, 10), 2)
    q, k, v = module.to_q(x), module.to_k(context), module.to_v(context)
    heads = [attention(*(t[..., None, 4 * i:4 * i + 4] for t in (q, k, v)))[..., 0, :] for i in range(3)]
    assert peers.distance(module(x, context), module.to_out(torch.cat(heads, dim=-1))) < 1e-12


def test_unknown_backend_is_refused_by_name():
    with pytest.raises(InputError, match="'cudnn'"):
        attention(*qkv(2, 2, torch.float32), backend="cudnn")


def test_triton_says_what_it_cannot_do():
    pytest.importorskip("triton")
    with pytest.raises(InputError, match="head dims .*not 8; use 'sdpa'"):
        attention(*qkv(2, 2, torch.float32), backend="flash")
