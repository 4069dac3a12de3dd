"""A whole picture beside diffusers' pipeline, from encoded text to pixels. Writes picture.json beside,
on a GPU picture-gpu.json.

    python tests/benchmarks/picture.py [tiny-64-fp32 sdxl-1024-bf16 ...] [--steps 30] [--rounds 5]

Euler, guidance 5, one picture. The text encoders, some 1 % of the work, are left out: both are given the same numbers
for what they say. On a CPU both run as they come. On a GPU diffusers also compiled, minipic also with each step as one
CUDA graph, as it draws there.
"""

import json
from dataclasses import replace
from functools import partial

import torch
from side_by_side import GPU, ROOT, Case, agree, compare, compiled, flops, options, peer_of, record_here, unet_inputs

from minipic.diffusion.schedule import Schedule
from minipic.image import to_tensor
from minipic.weights.layouts import build_empty
from minipic.models.clip import OPENCLIP_BIGG, CLIPText
from minipic.pipeline import Pipeline
from minipic.text import Conditioning
from minipic.weights.configs import config_to_json, read_config

CASES = "tiny-64-bf16 sdxl-1024-bf16" if GPU else "tiny-64-fp32"


def schedule_of(case):
    folder = ROOT / "weights" / "tiny" / "scheduler" / "scheduler_config.json"
    return read_config(Schedule, json.loads(folder.read_text())) if case.size == "tiny" else Schedule()


def minipic(unet, vae, schedule, texts, settings):
    """A function (steps, graph) -> the picture [3,H,W]."""
    config = unet.config  # a text encoder's width tells base models from refiners, so one without weights is there
    width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    encoder = build_empty(CLIPText, replace(OPENCLIP_BIGG, projection_dim=width))
    pipeline = Pipeline(unet, vae, None, encoder, schedule=schedule)
    pipeline.encode = lambda prompt, negative: texts

    def draw(steps=settings["steps"], graph=False):
        return to_tensor(pipeline.generate("", graph=graph, **settings | {"steps": steps})[0])
    return draw


def diffusers(unet, vae, schedule, texts, settings):
    """The same with its pipeline, a function of steps; the UNet's and the VAE's own decoder may be compiled before."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    pipeline = StableDiffusionXLPipeline(
        vae=vae, unet=unet, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
        scheduler=EulerDiscreteScheduler.from_config(config_to_json(schedule)), add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    cond, uncond = texts
    told = {"prompt_embeds": cond.context, "pooled_prompt_embeds": cond.pooled,
            "negative_prompt_embeds": uncond.context, "negative_pooled_prompt_embeds": uncond.pooled,
            "guidance_scale": settings["guidance"], "width": settings["size"][0], "height": settings["size"][1]}

    def draw(steps=settings["steps"]):
        generator = torch.Generator().manual_seed(settings["seed"])
        return to_tensor(pipeline(**told, num_inference_steps=steps, generator=generator).images[0])
    return draw


def run(case: Case, steps, rounds, mode):
    unet, vae, schedule = case.network("unet"), case.network("vae"), schedule_of(case)
    given = unet_inputs(unet, case, 1)
    texts = [Conditioning(share * given["context"], share * given["pooled"]) for share in (1, 0)]
    settings = {"steps": steps, "guidance": 5.0, "seed": 0, "size": (case.side, case.side), "sampler": "euler"}
    draw = minipic(unet, vae, schedule, texts, settings)
    works = {"diffusers": diffusers(peer_of(unet), peer_of(vae), schedule, texts, settings), "minipic": draw}
    if GPU:
        if mode != "off":
            fast, decoder = compiled(mode, peer_of(unet)), peer_of(vae)
            compiled(mode, decoder, decoder.decoder)
            works["diffusers compiled"] = diffusers(fast, decoder, schedule, texts, settings)
        works["minipic graph"] = partial(draw, graph=True)
    # Of one step: through many steps of a network of random weights, differences of rounding grow without bound.
    agree({name: partial(work, steps=1) for name, work in works.items()}, 2e-2 if case.kind == "fp32" else 0.2)
    meta = {name: torch.cat([x, x]).to("meta") for name, x in given.items()}
    count = steps * flops(unet, lambda unet: unet(**meta)) + flops(vae, lambda vae: vae.decode(given["x"].to("meta")))
    return compare(f"{case}, {steps} steps", works, count, case.kind, rounds)


def main():
    chosen = options(__doc__, CASES, compiles=True, steps=30, rounds=5)
    results = {}
    for case in chosen.cases:
        results[f"{case}, {chosen.steps} steps"] = run(case, chosen.steps, chosen.rounds, chosen.compile)
    print(record_here("picture", results, rounds=chosen.rounds, compile=chosen.compile))


if __name__ == "__main__":
    main()
