"""Time and memory of loading full-size SDXL.

    python tests/benchmarks/loading.py --folder DIR    # 14 GB, made once

Writes random fp16 weights in the official layouts (a diffusers folder and a single file), then
loads them, each case in its own process. Prints the peak memory beyond the weights, and the time as
a ratio to the safetensors library alone. `load_file` only maps a file: no byte is read until it is
used. So "safetensors" is load_file and one copy of each tensor, or one conversion where minipic
converts, and "mapped" is load_file and the cheapest pass over every byte. CPU seconds are given
beside the clock's for machines that are busy with other work.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from single_files import single_file  # noqa: E402

from minipic.weights.files import write_json  # noqa: E402
from minipic.weights.folders import KINDS  # noqa: E402
from minipic.weights.layouts import build_empty, load_part, open_model  # noqa: E402
from minipic.weights.single_file import SINGLE_FILES  # noqa: E402
from minipic.weights.configs import config_to_json

NAMES = {torch.float16: "F16", torch.int64: "I64", torch.float32: "F32"}
CASES = ["safetensors", "mapped", "minipic", "safetensors to bf16", "minipic to bf16"]


def write_random(path, tensors):
    """A safetensors file of tensors like these, which may be on the meta device, of small noise."""
    if path.exists():
        return
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, x in tensors.items():
        place = [position, position + x.nbytes]
        header[name] = {
            "dtype": NAMES[x.dtype], "shape": list(x.shape), "data_offsets": place}
        position = place[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes, as usual
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02
    noise = noise.half().numpy().tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".tmp"), "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while position > 0:
            position -= file.write(noise[:position])
    path.with_name(path.name + ".tmp").rename(path)


def prepare(folder):
    """Both layouts of SDXL base under `folder`; what is there already stays."""
    sdxl = SINGLE_FILES["sdxl"]
    models = {}
    for name, part in sdxl.parts.items():
        models[name] = build_empty(part.model, part.config).half()
    write_random(folder / "single.safetensors", single_file("sdxl", models))
    listed = {}
    for name, model in models.items():
        values = config_to_json(model.config)
        weights = f"{KINDS[name].stem}.safetensors"
        write_random(folder / "diffusers" / name / weights, model.state_dict())
        write_json(values, folder / "diffusers" / name / "config.json")
        listed[name] = ["", values.get("_class_name") or values["architectures"][0]]
    write_json(sdxl.scheduler, folder / "diffusers" / "scheduler" / "scheduler_config.json")
    write_json(sdxl.index | listed, folder / "diffusers" / "model_index.json")


def rss():
    """Bytes of memory that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(case, path):
    """One case, once, in this process: seconds, bytes of weights, and peak bytes beyond them."""
    torch.set_num_threads(1)
    torch.zeros(4).half().bfloat16()
    before, clock, cpu = rss(), time.perf_counter(), time.process_time()
    dtype = torch.bfloat16 if case.endswith("bf16") else None
    if case.startswith("minipic"):
        kept = []
        for part in open_model(path).parts.values():
            kept += load_part(part, dtype).state_dict().values()
    else:
        files = [path] if path.is_file() else sorted(path.glob("*/*.safetensors"))
        kept = [x for file in files for x in load_file(file).values()]
        for i, x in enumerate(kept):
            if case == "mapped":
                (x.view(torch.int16) if x.ndim else x).max()
            else:
                kept[i] = x.to(dtype) if dtype else x.clone()
    seconds = time.perf_counter() - clock
    cpu_seconds = time.process_time() - cpu
    size = sum(x.nbytes for x in kept)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "weights": size,
            "beyond_weights": rss() - before - size}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the weights are written, or were before")
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs of each case in turn; the fastest counts")
    parser.add_argument(
        "--case", nargs=2, help="only this case of this layout, once, in this process")
    arguments = parser.parse_args()
    if arguments.case:
        case, layout = arguments.case
        print(json.dumps(measure(case, arguments.folder / layout)))
        return
    prepare(arguments.folder)
    results = {}
    for layout in ("diffusers", "single.safetensors"):
        best = results[layout] = {}
        for case in CASES * arguments.repeats:
            command = [sys.executable, __file__, "--folder", str(arguments.folder),
                       "--case", case, layout]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            run = json.loads(run.stdout)
            old = best.get(case, run)
            best[case] = {}
            for key in run:  # the least time, the most memory
                choose = min if "seconds" in key else max
                best[case][key] = choose(run[key], old[key])
        for case, row in best.items():
            base = best["safetensors to bf16" if case.endswith("bf16") else "safetensors"]
            row["ratio"] = round(row["seconds"] / base["seconds"], 3)
            row["cpu_ratio"] = round(row["cpu_seconds"] / base["cpu_seconds"], 3)
            print(
                f"{layout:18} {case:19} {row['seconds']:6.2f} s ({row['cpu_seconds']:5.2f} s CPU), "
                f"ratio {row['ratio']:.2f} ({row['cpu_ratio']:.2f}), "
                f"{row['weights'] / 1e9:.2f} GB + {row['beyond_weights'] / 1e9:.2f} GB")
    about = {
        "command": "python tests/benchmarks/loading.py --folder DIR",
        "date": str(date.today()), "machine": f"{platform.machine()}, 1 thread",
        "repeats": arguments.repeats, "torch": torch.__version__,
        "safetensors": safetensors.__version__}
    write_json(about | {"results": results}, Path(__file__).with_suffix(".json"))


if __name__ == "__main__":
    main()
