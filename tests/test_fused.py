"""Fused norms and gates: the Triton kernels against their plain twins in float64.

In Triton's interpreter where there is no GPU; and compiled for sm_90, for the interpreter knows nothing of registers.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import peers
import pytest
import torch
import torch.nn as nn
from conftest import GPU

from minipic.common import InputError
from minipic.kernels import norm_backend
from minipic.layers import attention
from minipic.layers.blocks import add_norm, geglu, group_norm, layer_norm
from minipic.models.unet import UNet, UNetConfig
from minipic.models.vae import VAE, VAEConfig
from minipic.weights.layouts import load_part, open_part

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
LAYOUTS = {
    "contiguous": lambda x: x, "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "some channels of more": lambda x: torch.cat([x, x], dim=1)[:, :x.shape[1]],
    "tokens": lambda x: x.flatten(2).mT.contiguous().mT.unflatten(2, x.shape[2:])}  # as a transformer returns pixels
# shape, groups: more pixels and channels than a tile; groups of one channel; one pixel; more tiles than one read
GROUP_NORMS = [((2, 70, 9, 8), 2), ((1, 5, 3, 3), 5), ((2, 6, 1, 1), 1), ((1, 2, 51, 43), 2)]
GROUP_NORMS += [((2, 320, 128, 128), 32), ((2, 2560, 32, 32), 32)] * GPU


def numbers(*shape, seed=0, dtype=torch.float32):
    return (1 + 2 * peers.numbers(shape, seed)).to(DEVICE, dtype)


def norm_of(module, dtype):
    """The module with numbers for its parameters."""
    return peers.fill(module).to(DEVICE, dtype)


@torch.no_grad()
def check(run, x, norm=None, tolerance=None):
    """Kernel and plain version agree, the latter computing in float64 with the same rounded numbers."""
    pytest.importorskip("triton")
    if norm is None:
        found, expected = run(x, backend="triton"), run(x.double(), backend="plain")
    else:
        found = run(x, norm, backend="triton")
        expected = run(x.double(), norm.double(), backend="plain")
    assert found.dtype == x.dtype and found.shape == expected.shape
    error = (found.double() - expected).abs().max()
    assert error <= (tolerance or TOLERANCE[x.dtype]) * expected.abs().max()
    return found


def with_silu(x, norm, backend):
    return group_norm(x, norm, silu=True, backend=backend)


def of_sum(x, norm, backend):
    """x [2,...,D] holds both that are added."""
    return torch.stack(add_norm(*x, norm, backend=backend))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape, groups", GROUP_NORMS, ids=str)
def test_group_norm(shape, groups, layout):
    x = LAYOUTS[layout](numbers(*shape))
    run = group_norm if layout == "tokens" else with_silu
    out = check(run, x, norm_of(nn.GroupNorm(groups, shape[1]), x.dtype))
    for order in (torch.contiguous_format, torch.channels_last):
        same_order = x.is_contiguous(memory_format=order) == out.is_contiguous(memory_format=order)
        assert same_order or layout == "some channels of more"


@pytest.mark.parametrize("shape", [(3, 7, 96), (1, 3), (37, 100)] + [(2, 4096, 640)] * GPU, ids=str)
def test_layer_norm(shape):
    x = numbers(*shape)
    check(layer_norm, x, norm_of(nn.LayerNorm(shape[-1]), x.dtype), 1e-5)
    check(of_sum, torch.stack([x, x.flip(0)]), norm_of(nn.LayerNorm(shape[-1]), x.dtype), 1e-5)
    check(of_sum, numbers(*shape, 2).movedim(-1, 0), norm_of(nn.LayerNorm(shape[-1]), x.dtype), 1e-5)  # not contiguous


@pytest.mark.parametrize("shape", [(2, 3, 24), (5, 2), (1, 2, 2 * 1030)] + [(2, 4096, 5120)] * GPU, ids=str)
def test_geglu(shape):
    check(geglu, numbers(*shape))
    check(geglu, numbers(*shape[::-1]).permute(*reversed(range(len(shape)))))  # not contiguous


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits(dtype):
    x = numbers(2, 12, 5, 7, dtype=dtype)
    check(with_silu, x, norm_of(nn.GroupNorm(3, 12), dtype))
    check(layer_norm, numbers(9, 20, dtype=dtype), norm_of(nn.LayerNorm(20), dtype))
    check(of_sum, numbers(2, 9, 20, dtype=dtype), norm_of(nn.LayerNorm(20), dtype))
    check(geglu, numbers(9, 20, dtype=dtype))


@torch.no_grad()
def test_moments_of_numbers_far_from_zero():
    """E[x^2] - E[x]^2 would lose the variance: of 1000 +- 2, and of channels at -1000 and 1000."""
    pytest.importorskip("triton")
    x = 1000 + numbers(1, 4, 9, 11)
    found, expected = (group_norm(y, norm_of(nn.GroupNorm(2, 4), y.dtype), backend=backend)
                       for y, backend in ((x, "triton"), (x.double(), "plain")))
    assert peers.distance(found.double(), expected) < 5e-4
    rows = 1000 + numbers(3, 50)
    found, expected = (layer_norm(y, norm_of(nn.LayerNorm(50), y.dtype), backend=backend)
                       for y, backend in ((rows, "triton"), (rows.double(), "plain")))
    assert peers.distance(found.double(), expected) < 5e-4


def test_every_number_is_written_and_none_beyond(monkeypatch):
    """Whatever is allocated starts as NaN, with a guard behind it that must stay NaN."""
    pytest.importorskip("triton")
    empty_like, new_empty, made = torch.empty_like, torch.Tensor.new_empty, []

    def poisoned(x, shape, stride, dtype):
        made.append(torch.full((torch.Size(shape).numel() + 64,), float("nan"), dtype=dtype, device=x.device))
        return made[-1].as_strided(shape, stride)

    def poisoned_new(x, *shape, **how):
        if "device" in how:  # the interpreter's own
            return new_empty(x, *shape, **how)
        return poisoned(x, shape, torch.zeros(shape).stride(), how["dtype"])
    monkeypatch.setattr(torch, "empty_like", lambda x, **how: poisoned(
        x, x.shape, empty_like(x, **how).stride(), x.dtype))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_new)
    for layout in ("contiguous", "channels-last"):
        x = LAYOUTS[layout](numbers(2, 66, 5, 13))
        check(with_silu, x, norm_of(nn.GroupNorm(2, 66), x.dtype))
    check(layer_norm, numbers(19, 37), norm_of(nn.LayerNorm(37), torch.float32), 1e-5)
    check(of_sum, numbers(2, 19, 37), norm_of(nn.LayerNorm(37), torch.float32), 1e-5)
    check(geglu, numbers(3, 2, 2060))
    assert len(made) == 2 * 3 + 1 + 2 + 1
    assert all(store[-64:].isnan().all() and store[:-64].isfinite().all() for store in made)


def test_gradients_are_refused_in_one_sentence():
    pytest.importorskip("triton")
    x, norm = numbers(3, 8), norm_of(nn.LayerNorm(8), torch.float32)
    picture, group = numbers(1, 8, 2, 2), norm_of(nn.GroupNorm(2, 8), torch.float32)
    for call in (lambda: layer_norm(x, norm, backend="triton"), lambda: add_norm(x, x, norm, backend="triton"),
                 lambda: group_norm(picture, group, backend="triton"),
                 lambda: geglu(x.clone().requires_grad_(), backend="triton")):
        with pytest.raises(InputError, match="norm backend 'triton' has no backward pass; use 'plain' to train"):
            call()
        with torch.no_grad():
            call()
    layer_norm(x, norm.requires_grad_(False), backend="triton")  # nothing here wants a gradient


def test_plain_versions_have_the_gradients_of_finite_differences():
    for run, x, norm in ((with_silu, numbers(2, 4, 2, 3).double(), nn.GroupNorm(2, 4).double()),
                         (layer_norm, numbers(3, 5).double(), nn.LayerNorm(5).double()),
                         (of_sum, numbers(2, 3, 5).double(), nn.LayerNorm(5).double())):
        norm = peers.fill(norm).to(DEVICE)
        assert torch.autograd.gradcheck(lambda x, *_: run(x, norm, backend="plain"),
                                        (x.requires_grad_(), *norm.parameters()))
    assert torch.autograd.gradcheck(geglu, numbers(3, 8).double().requires_grad_())


def network(name, dtype):
    """A model, what it is asked (tests/peers.py) and its inputs: a UNet and a VAE as small as they come, and the UNet of
    the tiny model."""
    if name == "vae":
        vae = VAE(VAEConfig(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2))
        return peers.fill(vae).to(DEVICE), peers.vae_outputs, {"image": numbers(1, 3, 8, 8), "z": numbers(1, 4, 4, 4)}
    if name == "tiny":
        unet, size = load_part(open_part(ROOT / "weights" / "tiny" / "unet", "unet"), dtype, DEVICE), (2, 4, 16, 16)
    else:
        unet, size = UNet(UNetConfig(
            block_out_channels=(8, 32), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(0, 1),
            attention_head_dim=(1, 1), layers_per_block=1, cross_attention_dim=6, norm_num_groups=2,
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=20 + 6 * 8)), (1, 4, 6, 4)
        peers.fill(unet).to(DEVICE)
    config, (b, *_) = unet.config, size
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return unet, peers.unet_outputs, {
        "x": numbers(*size, dtype=dtype), "t": torch.tensor(3.0), "pooled": numbers(b, pooled, dtype=dtype),
        "context": numbers(b, 3 if name == "unet" else 77, config.cross_attention_dim, dtype=dtype),
        "size_ids": torch.zeros(b, 6, device=DEVICE)}


@torch.no_grad()
@pytest.mark.parametrize("name, dtype", [("unet", torch.float32), ("vae", torch.float32)] + GPU * [
    ("tiny", dtype) for dtype in TOLERANCE], ids=str)
def test_whole_networks_use_the_kernels_and_give_the_same_numbers(name, dtype, monkeypatch):
    pytest.importorskip("triton")
    model, outputs, given = network(name, dtype)

    def results():
        return torch.cat([value.flatten() for value in outputs(model, **given).values()])
    expected = results()
    monkeypatch.setattr(norm_backend, "choose_norm_backend", lambda x: "triton")
    monkeypatch.setattr(attention, "choose_backend", lambda q, k, hides_keys=False: "sdpa" if name == "vae" else "flash")
    for module in (nn.GroupNorm, nn.LayerNorm):
        monkeypatch.setattr(module, "forward", None)
    tolerance = {torch.float32: 1e-5}.get(dtype, 4 * TOLERANCE[dtype])  # the plain networks round too
    assert peers.distance(results(), expected) < tolerance


def test_unknown_backend_is_refused_by_name():
    with pytest.raises(InputError, match="'cuda'"):
        geglu(numbers(2, 4), backend="cuda")


def test_triton_backend_needs_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "minipic.kernels.norms", None)
    monkeypatch.delattr("minipic.kernels.norms", raising=False)
    with pytest.raises(InputError, match="needs the triton package"):
        geglu(numbers(2, 4), backend="triton")


# Compiled without a GPU -------------------------------------------------------------------------------------------

COMPILE = '''
import sys, triton
from triton.backends.compiler import GPUTarget
from minipic.kernels import norms
TABLES = dict.fromkeys("means squares factors shifts".split(), "*fp32")
ORDERS = {"channels": {"stride_c": 1}, "pixels": {"stride_p": 1}}  # which of them lie side by side
TILE = {"PIXELS": norms.PIXELS, "CHANNELS": norms.CHANNELS}
combine = {"PIXELS": norms.PIXELS, "GROUP": 10, "WIDTH": 16, "TILES": 32}
kernels = [("moments", TILE | order) for order in ORDERS.values()] + [("combine", combine)]
kernels += [("apply", TILE | order | {"SILU": True}) for order in ORDERS.values()]
kernels += [("layer_norm", {"WIDTH": 2048, "ADD": add}) for add in (False, True)]
kernels += [("geglu", {"SPAN": norms.SPAN})]
for i, (name, fixed) in enumerate(kernels):
    kernel = getattr(norms, name + "_kernel")
    kinds = dict.fromkeys("x y added weight bias total".split(), "*bf16") | {"eps": "fp32"} | TABLES
    kinds |= dict.fromkeys(fixed, "constexpr")
    names = kernel.arg_names
    compiled = triton.compile(
        triton.compiler.ASTSource(
            kernel, {arg: kinds.get(arg, "i32") for arg in names},
            {(names.index(arg),): value for arg, value in fixed.items()},
            {(place,): [["tt.divisibility", 16]] for place, arg in enumerate(names)
             if arg not in fixed and arg not in ("eps", "tiles")}),
        target=GPUTarget("cuda", 90, 32))
    open(f"{sys.argv[1]}/{name}-{i}.ptx", "w").write(compiled.asm["ptx"])
'''


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="the kernels themselves run here")
def test_kernels_compile_for_sm_90_without_spills(tmp_path):
    """In a process of its own: here the kernels are decorated for the interpreter. All read 16 bytes at a time."""
    triton = pytest.importorskip("triton", "3.3")  # before, the compiler was called otherwise
    subprocess.run([sys.executable, "-c", COMPILE, tmp_path], check=True,
                   env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)})
    files = sorted(tmp_path.glob("*.ptx"))
    assert len(files) == 8
    for file in files:
        said = subprocess.run([triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", file, "-o", os.devnull],
                              capture_output=True, text=True, check=True).stderr
        assert re.findall(r"(\d+) bytes spill", said) == ["0", "0"], file.name
        assert "combine" in file.name or re.search(r"ld\.global\S*\.v4\.b32", file.read_text()), file.name
