"""Flash attention in Triton: interpreted against float64 where there is no GPU, on the device where there is one.

The interpreter shows that the arithmetic and the masks are right. It knows nothing of registers, shared memory and
tensor cores, so the same kernels are also compiled for sm_90 without a GPU, and the assembler is asked.
"""

import os
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import GPU

triton = pytest.importorskip("triton")

from minipic.kernels import flash_attention  # noqa: E402
from minipic.layers.attention import attention  # noqa: E402

FLASH = partial(attention, backend="flash")
DEVICE = "cuda" if GPU else "cpu"
# B, N, M, heads, d: one query, CLIP's 77 keys, more keys than a block, lengths that no block divides
SHAPES = [(2, 1, 77, 3, 32), (1, 77, 77, 2, 64), (1, 130, 100, 1, 64), (1, 100, 200, 2, 32), (1, 33, 150, 1, 128),
          (1, 64, 128, 1, 64)] + [(2, 1024, 1024, 10, 64), (2, 4096, 77, 10, 64), (1, 1000, 4096, 5, 64)] * GPU
TOLERANCE = {torch.float32: 4e-6 if GPU else 2e-6,  # a GPU's exp2 is off by up to two units in the last place
             torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def bf16_dot(monkeypatch):
    """The interpreter keeps bf16 as bit patterns and multiplies those: give its dot the numbers instead."""
    if GPU:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    dot = InterpreterBuilder.create_dot

    def number(x):
        if x.dtype.scalar.name != "bf16":
            return x
        return TensorHandle((x.data.astype("uint32") << 16).view("float32"), triton.language.float32)
    monkeypatch.setattr(InterpreterBuilder, "create_dot",
                        lambda self, a, b, *rest: dot(self, number(a), number(b), *rest))


def inputs(b, n, m, heads, d, dtype):
    """q, k, v in the layouts that the networks have: q a slice of a fused projection, v with heads before tokens."""
    generator = torch.Generator().manual_seed(n * m)
    q = torch.randn(b, n, 3 * heads, d, generator=generator)[:, :, heads:2 * heads]
    k = torch.randn(b, m, heads, d, generator=generator)
    v = torch.randn(b, heads, m, d, generator=generator).transpose(1, 2)
    grad = torch.randn(b, heads, n, d, generator=generator).transpose(1, 2)
    return [x.to(DEVICE, dtype) for x in (q, k, v, grad)]


def values_and_gradients(function, q, k, v, grad):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flash_attention_is_the_formula(shape, dtype):
    arguments = inputs(*shape, dtype)
    expected = values_and_gradients(lambda *x: attention(*x, backend="naive"), *(x.double() for x in arguments))
    for one, other in zip(values_and_gradients(FLASH, *arguments), expected):
        assert one.dtype == dtype and one.shape == other.shape
        assert (one.double() - other).abs().max() <= TOLERANCE[dtype] * other.abs().max()


def test_every_number_is_written_and_none_beyond(monkeypatch):
    """Outputs start as NaN; a guard of one row behind each must stay NaN."""
    q, k, v, grad = inputs(1, 70, 90, 2, 32, torch.float32)
    made = []

    def poisoned(x, memory_format=None):
        store = torch.full((x.numel() + 64,), float("nan"), device=x.device, dtype=x.dtype)
        made.append(store)
        return store[:x.numel()].view(x.shape)
    monkeypatch.setattr(torch, "empty_like", poisoned)
    results = values_and_gradients(FLASH, q, k, v, grad)
    assert len(made) == 5 and all(result.isfinite().all() for result in results)
    assert all(store[-64:].isnan().all() for store in made)


def test_large_scores_neither_overflow_nor_leak():
    """Scores of -300: exp2 of them times a padding key would be infinite, if padding were not masked."""
    q, k, v, grad = inputs(1, 40, 70, 1, 32, torch.float32)
    q, k = q.abs() * 20, -k.abs() * 20
    expected = values_and_gradients(lambda *x: attention(*x, backend="naive"), *(x.double() for x in (q, k, v, grad)))
    for one, other in zip(values_and_gradients(FLASH, q, k, v, grad), expected):
        assert (one.double() - other).abs().max() <= 1e-4 * other.abs().max().clamp_min(1e-3)


def test_same_bits_every_time():
    arguments = inputs(1, 100, 90, 2, 32, torch.float16)
    first = values_and_gradients(FLASH, *arguments)
    for one, other in zip(first, values_and_gradients(FLASH, *arguments)):
        assert torch.equal(one, other)


# Compiled without a GPU -------------------------------------------------------------------------------------------

COMPILE = '''
import sys, torch, triton
from collections import namedtuple
from triton.backends.compiler import GPUTarget
from minipic.kernels import flash_attention
Like = namedtuple("Like", "shape dtype")
for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
    for d in flash_attention.HEAD_DIMS:
        for n, m in ((4096, 4096), (1024, 77), (1000, 1000))[:3 if (d, name) == (64, "bf16") else 1]:
            for kind in ("forward", "keys", "queries"):
                kernel = getattr(flash_attention, kind + "_kernel")
                q, k = Like((2, n, 10, d), dtype), Like((2, m, 10, d), dtype)
                blocks = flash_attention.choose_blocks(kind, q, k)
                fixed = {"HEAD_DIM": d, "BLOCK_Q": blocks.queries, "BLOCK_K": blocks.keys,
                         "PRECISION": flash_attention.precision(q)}
                fixed |= {"EVEN": (n % blocks.queries if kind == "keys" else m % blocks.keys) == 0}
                fixed |= {"ONE_BLOCK": m <= blocks.keys} if kind == "forward" else {}
                kinds = {"lse": "*fp32", "delta": "*fp32", "scale": "fp32"} | dict.fromkeys(fixed, "constexpr")
                kinds |= dict.fromkeys(("q", "k", "v", "out", "grad", "dq", "dk", "dv"), "*" + name)
                names = kernel.arg_names
                compiled = triton.compile(
                    triton.compiler.ASTSource(
                        kernel, {arg: kinds.get(arg, "i32") for arg in names},
                        {(names.index(arg),): value for arg, value in fixed.items()},
                        {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(names)
                         if arg not in fixed and arg not in ("scale", "n", "m", "heads")}),
                    target=GPUTarget("cuda", 90, 32), options={"num_warps": blocks.warps, "num_stages": blocks.stages})
                path = f"{sys.argv[1]}/{name}-{d}-{n}-{m}-{kind}-{compiled.metadata.shared}.ptx"
                open(path, "w").write(compiled.asm["ptx"])
'''


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="the kernels themselves run here")
def test_kernels_compile_for_sm_90_without_spills(tmp_path):
    """In a process of its own: here the kernels are decorated for the interpreter."""
    pytest.importorskip("triton", "3.3")  # before, the compiler was called otherwise
    subprocess.run([sys.executable, "-c", COMPILE, tmp_path], check=True,
                   env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)})
    files = sorted(tmp_path.glob("*.ptx"))
    assert len(files) == (2 * 3 + 2) * 3
    for file in files:
        said = subprocess.run([triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", file, "-o", os.devnull],
                              capture_output=True, text=True, check=True).stderr
        assert re.findall(r"(\d+) bytes spill", said) == ["0", "0"], file.name
        assert int(file.stem.split("-")[-1]) <= 227 * 1024, file.name
        assert ("wgmma.mma_async" in file.read_text()) == file.name.startswith("bf16"), file.name
