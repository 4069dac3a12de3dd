"""One LoRA training step of the UNet beside diffusers': time and peak memory. Writes train_step.json beside,
on a GPU train_step-gpu.json.

    python tests/benchmarks/train_step.py [sdxl-512-bf16 tiny-64-fp32 ...] [--batch 4] [--rounds 30]

With one sample and with --batch. Rank 8 on every attention projection, AdamW, activations recomputed in the backward pass, latents and text at hand. Both
networks carry the same LoRA layers, minipic's, so that the networks and their checkpointing are what is compared.
The peak is the whole process's on a CPU, of the tensors on a GPU: weights of 16 bits are 5.1 GB of it at full size.
"""

import re
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from side_by_side import GPU, Case, compare, flops, options, peer_of, record_here, unet_inputs, with_kernels

from minipic.layers import lora

CASES = "tiny-64-bf16 sdxl-1024-bf16" if GPU else "tiny-64-fp32 sdxl-512-bf16"


def peak(work):
    """The most memory in use during work(), in GB."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / 1e9
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    work()
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


def trainer(model, predict, target):
    """A training step of the LoRA that `model` gets; returns the loss."""
    torch.manual_seed(0)
    trained = lora.inject(model, rank=8)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step():
        loss = F.mse_loss(predict(model).float(), target.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()
    return step


def run(case: Case, batch, rounds):
    unet = case.network("unet")
    given = unet_inputs(unet, case, batch)
    peer, target = peer_of(unet).train(), torch.randn_like(given["x"])
    added = {"text_embeds": given["pooled"], "time_ids": given["size_ids"]}
    peer.enable_gradient_checkpointing()
    unet.enable_gradient_checkpointing()
    works = {"diffusers": trainer(peer, lambda model: model(given["x"], given["t"], given["context"],
                                                            added_cond_kwargs=added).sample, target),
             "minipic": trainer(unet, lambda model: model(**given), target)}
    if GPU:
        works["minipic, flash attention"] = with_kernels(works["minipic"], norms="plain")
    losses = {name: work().item() for name, work in works.items()}  # before anything is learnt
    assert abs(losses["minipic"] / losses["diffusers"] - 1) < (1e-4 if case.kind == "fp32" else 2e-2), losses

    def once(meta):
        meta.enable_gradient_checkpointing()
        away = {name: value.to("meta") for name, value in given.items()}
        trainer(meta, lambda model: model(**away), target.to("meta"))()
    extra = {name: {"peak GB": peak(work)} for name, work in works.items()}
    count = flops(unet, once)
    return compare(f"LoRA step, {case}, batch {batch}", works, count, case.kind, rounds, extra)


def main():
    chosen = options(__doc__, CASES, batch=4 if GPU else 1)
    results = {}
    for case, batch in product(chosen.cases, sorted({1, chosen.batch})):
        results[f"{case}, batch {batch}"] = run(case, batch, chosen.rounds)
    print(record_here("train_step", results, rounds=chosen.rounds))


if __name__ == "__main__":
    main()
