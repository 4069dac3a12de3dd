"""Writes pipeline.safetensors: diffusers' final latents of the first picture of every case in tests/test_pipeline.py.

    python tests/goldens/make_pipeline.py      (needs tests/requirements.txt)
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
from test_pipeline import GOLDEN_CASES, GOLDENS, diffusers_latents  # noqa: E402

if __name__ == "__main__":
    latents = {case: diffusers_latents(case)[:1].to(torch.float32).contiguous() for case in GOLDEN_CASES}
    save_file(latents, GOLDENS)
