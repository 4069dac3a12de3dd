"""SDXL's UNet on a CPU from a file in 16 bits: memory and time of the ways there are. Writes casting.json beside.

    python tests/benchmarks/casting.py --folder DIR [--resolution 512]      5 GB of random weights go to DIR, made once

Each way in a process of its own, one thread: load, one step of one row of text, and one more, which is timed. `own` is
the peak of the memory that the process itself fills, `mapped` that of the weights' file, whose pages the system may
drop and read again where memory is short (Linux). diffusers' layerwise casting stores fp16 and computes in fp32.
"""

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from loading import write_random
from record import record
from side_by_side import Case, unet_inputs

from minipic.weights import layouts
from minipic.models.unet import SDXL_BASE, UNet
from minipic.weights.files import write_json
from minipic.weights.configs import config_to_json

WAYS = ("diffusers fp32", "diffusers bf16", "diffusers layerwise casting", "minipic fp32", "minipic cast")


def prepare(folder):
    """The UNet of SDXL base as a diffusers folder has it; what is there already stays."""
    model = layouts.build_empty(UNet, SDXL_BASE).half()
    write_random(folder / "diffusion_pytorch_model.safetensors", model.state_dict())
    write_json(config_to_json(model.config), folder / "config.json")


def load(way, folder):
    """A function of unet_inputs' names that runs the network."""
    if way.startswith("minipic"):
        return layouts.load_part(layouts.open_part(folder, "unet"), torch.float32, cast=way.endswith("cast"))
    from diffusers import UNet2DConditionModel
    dtype = torch.bfloat16 if way.endswith("bf16") else torch.float32
    peer = UNet2DConditionModel.from_pretrained(folder, torch_dtype=dtype).eval()
    if way.endswith("casting"):
        peer.enable_layerwise_casting(torch.float16, torch.float32)
    return lambda x, t, context, pooled, size_ids: peer(
        x, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": size_ids}).sample


@torch.no_grad()
def measure(way, folder, side):
    """One way, once, in this process."""
    torch.set_num_threads(1)
    kind, peaks, over = "bf16" if way.endswith("bf16") else "fp32", {"RssAnon": 0, "RssFile": 0}, threading.Event()

    def watch():
        while not over.wait(0.02):
            status = Path("/proc/self/status").read_text()
            for name, peak in peaks.items():
                peaks[name] = max(peak, int(re.search(rf"{name}:\s+(\d+)", status)[1]) * 1024)
    watcher = threading.Thread(target=watch, daemon=True)
    torch.manual_seed(0)
    given = unet_inputs(layouts.build_empty(UNet, SDXL_BASE), Case("sdxl", side, kind), 1)
    watcher.start()
    start = time.process_time()
    run = load(way, folder)
    run(**given)
    first, start = time.process_time() - start, time.process_time()
    out = run(**given)
    seconds = time.process_time() - start
    over.set()
    return {"load and first step s": first, "a step s": seconds, "own GB": peaks["RssAnon"] / 1e9,
            "mapped GB": peaks["RssFile"] / 1e9, "output": out.float().flatten()[:4096].tolist()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the weights are written, or were before")
    parser.add_argument("--resolution", type=int, default=512, help="of the picture, in pixels")
    parser.add_argument("--way", help="only this one, in this process")
    chosen = parser.parse_args()
    if chosen.way:
        return print(json.dumps(measure(chosen.way, chosen.folder, chosen.resolution)))
    prepare(chosen.folder)
    torch.set_num_threads(1)  # as the runs have, for the record
    results = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--folder", str(chosen.folder), "--resolution", str(chosen.resolution), "--way", way]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        out, results[way] = torch.tensor(row.pop("output")), row
        exact = out if way == "diffusers fp32" else exact
        row["error"] = ((out - exact).abs().max() / exact.abs().max()).item()
        print(f"{way:28}", *(f"{name} {value:.3g}  " for name, value in row.items()), flush=True)
    print(record("casting", results, command=f"python tests/benchmarks/casting.py --folder DIR --resolution {chosen.resolution}"))


if __name__ == "__main__":
    main()
