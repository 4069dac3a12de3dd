"""Specialist Diffusion on SDXL at its full size: a LoRA's step with and without the content loss.

    python tests/benchmarks/specialist_sdxl.py [--side 512]

Weights are random, in bf16; CLIP's vision tower is ViT-L/14. The content loss takes its gradient
through the second of two steps of a drawing with guidance. Prints peak memory and processor
seconds, and writes them to specialist_sdxl.json (Linux).
"""

import argparse
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

from record import record  # noqa: E402
from train_step import peak  # noqa: E402

from minipic.layers import lora  # noqa: E402
from minipic.models.clip import CLIPVision, CLIPVisionConfig  # noqa: E402
from minipic.papers import specialist  # noqa: E402
from minipic.pipeline import Pipeline  # noqa: E402
from minipic.text import Tokenizer  # noqa: E402
from minipic.weights.image_encoder import CLIP_MEAN, CLIP_STD, ImageEncoder  # noqa: E402
from minipic.weights.layouts import build_empty  # noqa: E402
from minipic.weights.single_file import SINGLE_FILES  # noqa: E402


def random_network(model, config) -> torch.nn.Module:
    """A network with random weights in bf16 that keep numbers near 1; without gradients."""
    network = build_empty(model, config).to(torch.bfloat16).to_empty(device="cpu")
    for name, param in network.named_parameters():
        if param.ndim > 1:
            param.data.normal_(std=param[0].numel() ** -0.5)
        else:
            param.data.fill_(name.endswith("weight"))
    return network.requires_grad_(False)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512, help="of the picture, in pixels")
    side = parser.parse_args().side
    torch.manual_seed(0)
    torch.set_num_threads(1)
    parts = SINGLE_FILES["sdxl"].parts.items()
    networks = {name: random_network(part.model, part.config) for name, part in parts}
    tokenizers = {name: Tokenizer(ROOT / "weights" / "tiny" / name)
                  for name in ("tokenizer", "tokenizer_2")}
    pipeline = Pipeline(**networks, **tokenizers)
    vision = random_network(CLIPVision, CLIPVisionConfig())
    pipeline.image_encoder = ImageEncoder(vision, CLIP_MEAN, CLIP_STD)

    params = lora.inject(pipeline.unet, 16, match=specialist.BLOCK_LAYERS)
    pipeline.unet.enable_gradient_checkpointing()
    pipeline.unet.train()
    specialist.CONTENT_STEPS = 2
    latent = (1, 4, side // 8, side // 8)
    batch = {
        "x0": torch.randn(latent), "noise": torch.randn(latent), "t": torch.tensor([501]),
        "size_ids": torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32),
        "captions": ["a cat in the style of mosaic"]}
    content = {"content_image": torch.rand(3, side, side) * 2 - 1, "content_caption": "a cat",
               "content_seed": 1}
    config = specialist.Settings(content="grad", lora_rank=16)
    results = {"side": side, "trained": sum(param.numel() for param in params)}
    for name, given in (("without", batch), ("with the content loss", batch | content)):
        optimizer = torch.optim.AdamW(params, 1e-4)

        def step():
            with torch.autocast("cpu", torch.bfloat16):
                loss, logged = specialist.loss(pipeline, given, config)
            loss.backward()
            optimizer.step()
            print(loss.item(), logged)

        start = time.process_time()
        results[name] = {"peak GB": peak(step)}
        results[name]["processor seconds"] = time.process_time() - start
        print(name, results[name], flush=True)
        optimizer.zero_grad()
    print(record("specialist_sdxl", results))


if __name__ == "__main__":
    main()
