"""In-domain generation at full size with random weights: memory and time. Writes indomain_memory.json beside.

    python tests/benchmarks/indomain_memory.py [--only sd15-draw ...]

The UNets of SD 1.5 and of SDXL alone, at 512x512 pixels, without VAE and text encoders. Drawing is one step of three
predictions, by a domain with weights of its own; a training step, of a LoRA or of all weights, recomputes activations.
Each case is a process of its own; `own GB` is the peak of the memory that it fills (Linux).
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

from memory import peaks_of  # noqa: E402
from record import record  # noqa: E402

from minipic.layers import lora  # noqa: E402
from minipic.layers.nulltext import NullTextUNet, zero_text_vectors  # noqa: E402
from minipic.models.unet import SD15, SDXL_BASE, UNet  # noqa: E402
from minipic.papers.indomain import BLOCK_LAYERS, Term, multi_guidance, share_weights  # noqa: E402
from minipic.text import Conditioning  # noqa: E402
from minipic.weights.layouts import build_empty  # noqa: E402

CONFIGS = {"sd15": SD15, "sdxl": SDXL_BASE}
CASES = [f"{model}-{work}" for model in CONFIGS for work in ("draw", "lora", "full")]


def build(config) -> tuple[UNet, NullTextUNet]:
    """A UNet with random weights in bf16, and a null-text UNet that shares them."""
    unet = build_empty(UNet, config).to(torch.bfloat16).to_empty(device="cpu")
    for param in unet.parameters():
        torch.nn.init.uniform_(param.data, -0.02, 0.02)
    text = text_of(config)
    return unet, NullTextUNet(share_weights(unet), zero_text_vectors(unet), text.pooled, text.size_ids)


def text_of(config) -> Conditioning:
    context = torch.randn(1, 77, config.cross_attention_dim)
    if config.addition_embed_type is None:
        return Conditioning(context)
    return Conditioning(context, torch.randn(1, 1280), torch.tensor([[512, 512, 0, 0, 512, 512]]))


def work(case: str) -> dict:
    """Do it once; the number of trained weights, and the seconds."""
    name, _, what = case.partition("-")
    config = CONFIGS[name]
    unet, domain = build(config)
    x, t = torch.randn(1, 4, 64, 64), torch.tensor([500])
    if what == "draw":
        domain = copy.deepcopy(domain)
        terms = [Term(unet, text_of(config)), Term(domain, Conditioning(None), 2.0), Term(unet, text_of(config), 3.0)]
        start = time.perf_counter()
        with torch.no_grad():
            eps = multi_guidance(terms, 1)(x.bfloat16(), t, None, None, None, None)
        assert eps.isfinite().all()
        return {"seconds": time.perf_counter() - start}
    if what == "full":
        domain = copy.deepcopy(domain).float()
        params = list(domain.parameters())
    else:
        params = lora.inject(domain.unet, 16, match=BLOCK_LAYERS)
    domain.unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(params, 1e-5, fused=True)
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        loss = (domain(x, t).float() - torch.randn_like(x)).square().mean()
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    return {"seconds": time.perf_counter() - start, "trained": sum(param.numel() for param in params)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=CASES, metavar="CASE", help="; ".join(CASES))
    parser.add_argument("--inside", type=Path, help="a JSON to write: do the one case in this process")
    options = parser.parse_args()
    if options.inside:
        options.inside.write_text(json.dumps(work(options.only[0])))
        return
    path = Path(__file__).with_suffix(".json")
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    for case in options.only or CASES:
        found = path.with_suffix(".part")
        peaks = peaks_of([str(Path(__file__)), "--only", case, "--inside", str(found)])
        results[case] = {"own GB": peaks["own GB"], **json.loads(found.read_text())}
        found.unlink()
        print(case, results[case], flush=True)
        record("indomain_memory", results)


if __name__ == "__main__":
    main()
