"""Settings of the whole suite: tests import minipic from this checkout, and no peer asks the network for a file;
without a GPU Triton interprets its kernels."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, whose own functions are decorated then
