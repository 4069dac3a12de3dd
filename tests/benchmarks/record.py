"""Writes what a benchmark measured to a JSON beside it, with all that is needed to measure it again."""

import json
import platform
import shlex
import sys
import time
from pathlib import Path

import torch


def processor():
    """The CPU's name."""
    lines = open("/proc/cpuinfo") if Path("/proc/cpuinfo").exists() else ()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def device():
    """Where the experiments train and draw: "cuda" or "cpu". All scores are computed on the CPU, in fp32."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def hardware():
    """What a row of a table was made on: other rows of the same file may come from another machine."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": processor(), "gpu": gpu}


def machine():
    """What a measurement depends on besides its command: date, hardware, versions."""
    return {"date": time.strftime("%Y-%m-%d"), **hardware(), "threads": torch.get_num_threads(),
            "python": platform.python_version(), "torch": torch.__version__}


def record(name, results, **settings):
    """tests/benchmarks/NAME.json, or the file that a whole path without .json names: command, date, hardware, versions,
    settings (seeds among them) and results."""
    path = Path(__file__).parent / f"{name}.json"
    command = shlex.join(["python", "tests/benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]])
    values = {"command": command, **machine(), **settings, "results": results}
    part = path.with_suffix(".tmp")
    part.write_text(json.dumps(values, indent=2) + "\n")
    part.replace(path)
    return path
