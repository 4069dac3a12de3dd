"""What the benchmarks share: times of works in turn, networks beside diffusers' on the same weights, tables of both."""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "benchmarks")]
import peers  # noqa: E402
from record import record  # noqa: E402

from minipic.kernels import norm_backend  # noqa: E402
from minipic.layers import attention  # noqa: E402
from minipic.weights.layouts import build_empty, load_part, memory_format, open_part  # noqa: E402
from minipic.models.unet import SDXL_BASE, UNet  # noqa: E402
from minipic.models.vae import SDXL_VAE, VAE  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
FULL = {"unet": (UNet, SDXL_BASE), "vae": (VAE, SDXL_VAE)}


def measure(works, rounds, warm=2):
    """{name: seconds}, one call of each in turn, the first `warm` turns not counted: the median on a GPU (events), the
    smallest processor time on a CPU, where other programs run too."""
    times = {name: [] for name in works}
    for turn in range(rounds + warm):
        for name, work in works.items():
            if GPU:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record(), work(), end.record(), torch.cuda.synchronize()
                seconds = start.elapsed_time(end) / 1e3
            else:
                start = time.process_time()
                work()
                seconds = time.process_time() - start
            times[name] += [seconds] if turn >= warm else []
    return {name: statistics.median(values) if GPU else min(values) for name, values in times.items()}


class Case(NamedTuple):
    """One line of a benchmark, written sdxl-1024-bf16: whose network, the side of the picture in pixels, the type."""

    size: str
    side: int
    kind: str

    @classmethod
    def read(cls, text):
        size, side, kind = [*text.split("-"), "", ""][:3]
        if size not in ("tiny", "sdxl") or not side.isdigit() or kind not in DTYPES or len(text.split("-")) > 3:
            raise argparse.ArgumentTypeError(f"{text!r} is not like tiny-64-fp32 or sdxl-1024-bf16")
        return cls(size, int(side), kind)

    def __str__(self):
        return "-".join(map(str, self))

    def network(self, part):
        """The tiny network as shipped, or SDXL's in full size with random weights that keep numbers near 1."""
        if self.size == "tiny":
            return load_part(open_part(ROOT / "weights" / "tiny" / part, part), DTYPES[self.kind], DEVICE)
        model = build_empty(*FULL[part]).to(DTYPES[self.kind]).to_empty(device=DEVICE)
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.data.normal_(std=p[0].numel() ** -0.5)
            else:
                p.data.fill_(name.endswith("weight"))
        return model.to(memory_format=memory_format(DTYPES[self.kind]))


def options(doc, cases, rounds=30 if GPU else 5, compiles=False, **more):
    """The command line: which cases, how often, and whole numbers besides. The default is `cases`.

    compiles: whether the program compiles diffusers' network on a GPU, and so has --compile.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", type=Case.read, default=[Case.read(case) for case in cases.split()])
    for name, default in ({"rounds": rounds} | (more or {"batch": 2 if GPU else 1})).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    if compiles:
        parser.add_argument("--compile", choices=("off", *COMPILE_MODES), default="max-autotune", help="torch.compile of "
                            "diffusers' network on a GPU; the search of max-autotune takes minutes")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    return chosen


def peer_of(model):
    """diffusers' network of the same config on the same weights: no copies, but for convolutions' in plain order."""
    with torch.device("meta"):
        other = peers.build_peer(model.config)
    # contiguous() leaves the strides of 1x1 kernels, which would turn all that follows them channels-last
    plain = {name: x.clone(memory_format=torch.contiguous_format) if x.ndim == 4 else x
             for name, x in model.state_dict().items()}
    other.load_state_dict(plain, assign=True)
    return other.eval()


def unet_inputs(unet, case, batch):
    """x, t, context, pooled and size_ids of a step; batch 2 is one drawing, with and without its text."""
    config, side = unet.config, case.side // (4 if case.size == "tiny" else 8)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    shapes = {"x": (4, side, side), "context": (77, config.cross_attention_dim), "pooled": (pooled,)}
    made = {name: torch.randn(batch, *shape, device=DEVICE, dtype=DTYPES[case.kind]) for name, shape in shapes.items()}
    sizes = torch.tensor([case.side, case.side, 0, 0, case.side, case.side], device=DEVICE)
    return made | {"t": torch.full((batch,), 501.0, device=DEVICE), "size_ids": sizes.repeat(batch, 1)}


def with_kernels(work, norms="triton", attend="flash"):
    """The same work with these backends of the norms and, where ours can do it, of attention (None: as chosen)."""
    default = attention.choose_backend

    def choose_attention(q, k, hides_keys=False):
        return attend if attend and q.shape[-1] in (32, 64, 128) else default(q, k, hides_keys)

    def run():
        with (mock.patch.object(norm_backend, "choose_norm_backend", lambda x: norms),
              mock.patch.object(attention, "choose_backend", choose_attention)):
            return work()
    return run


def compiled(mode, other, *parts):
    """diffusers as its guide to speed has it: channels-last, fused projections, torch.compile of the network, or of its
    `parts`."""
    other.fuse_qkv_projections()
    other.to(memory_format=torch.channels_last)
    for part in parts or [other]:
        part.compile(mode=mode)
    return other


def record_here(name, results, **settings):
    """`record` as NAME.json, on a GPU as NAME-gpu.json."""
    return record(f"{name}-gpu" if GPU else name, results, **settings)


def flops(model, run):
    """Floating point operations of the matrix products and convolutions of run(a copy of the model without memory)."""
    with FlopCounterMode(display=False) as counter:
        run(build_empty(type(model), model.config).to(next(model.parameters()).dtype))
    return counter.get_total_flops()


def compare(title, works, count, kind, rounds, extra=None):
    """{name: {"ms", "speed over diffusers", "share of GEMM rate", ...}}; prints it. The first work is the peer's.

    `count`: floating point operations of one call. The rate is that of a large matrix product of the same dtype,
    measured in the same turns. `extra`: {name: {more columns}}.
    """
    n = 8192 if GPU else 1024
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=DTYPES[kind])
    seconds = measure(works | {"GEMM": lambda: a @ b}, rounds, warm=2 if GPU else 1)
    rate, first = 2 * n ** 3 / seconds.pop("GEMM"), next(iter(works))
    rows = {name: {"ms": 1e3 * t, f"speed over {first}": seconds[first] / t, "share of GEMM rate": count / t / rate,
                   **(extra or {}).get(name, {})} for name, t in seconds.items()}
    print(f"\n{title}: {count / 1e12:.4f} TFLOP, GEMM {rate / 1e12:.2f} TFLOP/s")
    for name, row in rows.items():
        print(f"  {name:24}" + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    return rows


def agree(works, tolerance):
    """Raises AssertionError unless every work gives the numbers of the first."""
    expected = None
    for name, work in works.items():
        out = work().float()
        expected = out if expected is None else expected
        error = ((out - expected).abs().max() / expected.abs().max()).item()
        assert error < tolerance, f"{name} is wrong by {error:.1e}"
