"""Write models_*.safetensors: what diffusers' and transformers' models give, in float64, for the cases of ../peers.py.

    python tests/goldens/make_models.py
"""

import sys
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
import peers  # noqa: E402

versions = {"diffusers": diffusers.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
for kind, cases in peers.CASES.items():
    tensors = {}
    for name in cases:
        outputs, gradients = peers.run(*peers.peer(kind, name, torch.float64))
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in outputs.items()}
        tensors[f"{name}.gradients"] = peers.summary(gradients)
    path = peers.GOLDENS / f"models_{kind}.safetensors"
    save_file(tensors, path, metadata=versions)
    print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size / 1000:.0f} kB")
