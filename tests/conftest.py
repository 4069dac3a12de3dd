"""Settings of the whole suite: tests import minipic from this checkout, and no peer asks the network for a file.

Only the tests of what a GPU is for use one, the modules that know `GPU`; without one Triton interprets the kernels. All
others expect a CPU's numbers, often to the last bit.
"""

import functools
import os
import sys
from pathlib import Path

import pytest

# Networks this small gain nothing from threads, which wait for each other many times as long on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch  # noqa: E402 - reads it

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"
GPU = torch.cuda.is_available()
if GPU:
    torch.cuda.init()
    torch.cuda.device_count()  # from now on it is remembered; Triton asks
    torch.backends.cudnn.allow_tf32 = False  # the default, convolutions of 10 bits, differs by more than kernels may
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of the processes that tests start
else:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, whose own functions are decorated then
torch.cuda.is_available = torch.backends.mps.is_available = functools.cache(lambda: False)  # PyTorch unwraps them


@pytest.fixture(autouse=True)
def gpu(request, monkeypatch):
    if getattr(request.module, "GPU", False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; run by `python -m pytest -m slow`")


def pytest_collection_modifyitems(config, items):
    if config.getoption("-m"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
