"""One step of the UNet beside diffusers'. Writes unet_step.json beside.

    python tests/benchmarks/unet_step.py [sdxl-512-bf16 tiny-64-fp32 ...] [--batch 2] [--rounds 30]

The text is read once a drawing, so that its keys and values are no part of minipic's step; diffusers has no such place.
On a CPU both run as they come. On a GPU diffusers also compiled, minipic also as one CUDA graph, as it draws there, and
that with other kernels. Writes unet_step-gpu.json there.
"""

import torch
from side_by_side import GPU, Case, agree, compare, compiled, flops, options, peer_of, record_here, unet_inputs, \
    with_kernels

from minipic.kernels.cuda_graph import graphed

CASES = "tiny-64-bf16 sdxl-1024-bf16" if GPU else "tiny-64-fp32 sdxl-512-bf16 sdxl-1024-bf16 sdxl-512-fp32"


@torch.no_grad()
def run(case: Case, batch, rounds, mode):
    unet = case.network("unet")
    given = unet_inputs(unet, case, batch)
    read = unet.text_keys_values(given["context"])
    x, t, rest = given["x"], given["t"], (given["pooled"], given["size_ids"])
    peer, added = peer_of(unet), {"text_embeds": rest[0], "time_ids": rest[1]}
    works = {"diffusers": lambda: peer(x, t, given["context"], added_cond_kwargs=added).sample,
             "minipic": lambda: unet(x, t, read, *rest)}
    if GPU:
        if mode != "off":
            fast = compiled(mode, peer_of(unet))
            works["diffusers compiled"] = lambda: fast(x, t, given["context"], added_cond_kwargs=added).sample
        works["minipic graph"] = graphed(works["minipic"])
        works["minipic graph, plain norms"] = graphed(with_kernels(works["minipic"], "plain", None))
        works["minipic graph, PyTorch's attention"] = graphed(with_kernels(works["minipic"], attend="sdpa"))
    agree(works, 1e-4 if case.kind == "fp32" else 5e-2)
    count = flops(unet, lambda meta: meta(x.to("meta"), t.to("meta"), given["context"].to("meta"),
                                          *(value.to("meta") for value in rest)))
    return compare(f"UNet step, {case}, batch {batch}", works, count, case.kind, rounds)


def main():
    chosen = options(__doc__, CASES, compiles=True, batch=2 if GPU else 1)
    results = {}
    for case in chosen.cases:
        results[f"{case}, batch {chosen.batch}"] = run(case, chosen.batch, chosen.rounds, chosen.compile)
    print(record_here("unet_step", results, rounds=chosen.rounds, compile=chosen.compile))


if __name__ == "__main__":
    main()
