"""Memory of the programs with SDXL base at full size, on a CPU. Writes memory.json beside.

    python tests/benchmarks/memory.py --folder DIR --tokenizers SDXL

7 GB of random weights in fp16 go to DIR, made once; SDXL is a folder with SDXL's tokenizer/ and tokenizer_2/.

Each case is a whole command in a process of its own. `own` is the peak of the memory that the process fills, `mapped`
that of files whose pages the system may drop and read again where memory is short (Linux).
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from loading import prepare
from record import record

from minipic.image import to_pictures

ROOT = Path(__file__).parents[2]
DRAW = ["sample.py", "a photo of a cat", "--n", "1", "--steps", "1", "--size", "512x512"]
LORA = ["train.py", "t2i", "--data", "{photos}", "--lora-rank", "16", "--lr", "1e-4", "--resolution", "512", "--batch", "1",
        "--gradient-checkpointing", "--steps", "1", "--sample-every", "0"]
CASES = {  # command, the flag of its arithmetic
    "draw 512x512": (DRAW, "--dtype"),
    "train a LoRA on 512x512": (LORA, "--precision"),
}


def peaks_of(command: list[str]) -> dict:
    """Run a command; the peaks of its memory in GB, and its seconds."""
    peaks = {"RssAnon": 0, "RssFile": 0}
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:  # it has just ended
            continue
        for name in peaks:
            match = re.search(rf"{name}:\s+(\d+)", status)
            if match:
                peaks[name] = max(peaks[name], int(match[1]) * 1024)
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return {"own GB": peaks["RssAnon"] / 1e9, "mapped GB": peaks["RssFile"] / 1e9, "seconds": time.perf_counter() - start}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the weights are written, or were before")
    parser.add_argument("--tokenizers", type=Path, required=True, help="a folder with SDXL's two tokenizers")
    chosen = parser.parse_args()
    prepare(chosen.folder)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(chosen.tokenizers / name, chosen.folder / "diffusers" / name, dirs_exist_ok=True)
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        photos = Path(scratch, "photos")
        photos.mkdir()
        to_pictures(torch.rand(1, 3, 512, 512) * 2 - 1)[0].save(photos / "cat.png")
        (photos / "cat.txt").write_text("a photo of a cat")
        for case, (command, flag) in CASES.items():
            for kind in ("bf16", "fp32"):
                words = [word.format(photos=photos) for word in command]
                out = str(Path(scratch, f"{len(results)}"))
                words += ["--model", str(chosen.folder / "diffusers"), flag, kind, "--out", out]
                results[f"{case}, {kind}"] = peaks_of(words)
                print(case, kind, results[f"{case}, {kind}"], flush=True)
    print(record("memory", results, command="python tests/benchmarks/memory.py --folder DIR --tokenizers SDXL"))


if __name__ == "__main__":
    main()
