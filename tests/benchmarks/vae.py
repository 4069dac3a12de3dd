"""The VAE beside diffusers': pictures to latents and back. Writes vae.json beside,
on a GPU vae-gpu.json.

    python tests/benchmarks/vae.py [sdxl-512-bf16 tiny-64-fp32 ...] [--batch 1] [--rounds 30]

On a CPU both run as they come. On a GPU diffusers also compiled, minipic also as one CUDA graph, as it draws there, and
that with other kernels.
"""

import torch
from side_by_side import DEVICE, DTYPES, GPU, Case, agree, compare, compiled, flops, options, peer_of, record_here, \
    with_kernels

from minipic.kernels.cuda_graph import graphed

CASES = "tiny-64-bf16 sdxl-1024-bf16" if GPU else "tiny-64-fp32 sdxl-512-bf16 sdxl-512-fp32"


@torch.no_grad()
def run(case: Case, batch, rounds, mode):
    vae = case.network("vae")
    peer, tolerance = peer_of(vae), 1e-4 if case.kind == "fp32" else 5e-2
    image = torch.randn(batch, 3, case.side, case.side, device=DEVICE, dtype=DTYPES[case.kind]).clamp(-1, 1)
    z = vae.encode(image)[0].contiguous()  # the order of x decides how diffusers' network computes
    works = {"decode": {"diffusers": lambda: peer.decode(z).sample, "minipic": lambda: vae.decode(z)},
             "encode": {"diffusers": lambda: peer.encode(image).latent_dist.mean,
                        "minipic": lambda: vae.encode(image)[0]}}
    if GPU:
        if mode != "off":
            fast = peer_of(vae)
            compiled(mode, fast, fast.encoder, fast.decoder)
            works["decode"]["diffusers compiled"] = lambda: fast.decode(z).sample
            works["encode"]["diffusers compiled"] = lambda: fast.encode(image).latent_dist.mean
        for each in works.values():
            each["minipic, fused norms"] = with_kernels(each["minipic"], attend=None)
            each["minipic graph"] = graphed(each["minipic"])
    rows = {}
    for name, each in works.items():
        agree(each, tolerance)
        given = {"decode": z, "encode": image}[name].to("meta")
        count = flops(vae, lambda meta: getattr(meta, name)(given))
        rows[name] = compare(f"VAE {name}, {case}, batch {batch}", each, count, case.kind, rounds)
    return rows


def main():
    chosen = options(__doc__, CASES, compiles=True)
    results = {}
    for case in chosen.cases:
        for name, rows in run(case, chosen.batch, chosen.rounds, chosen.compile).items():
            results[f"{name}, {case}, batch {chosen.batch}"] = rows
    print(record_here("vae", results, rounds=chosen.rounds, compile=chosen.compile))


if __name__ == "__main__":
    main()
