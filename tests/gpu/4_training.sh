#!/usr/bin/env bash
# A training step of a LoRA of SDXL, batch 1 and 4, beside diffusers' network; then the tiny model's samples a second, as trained and as a CUDA graph.
source "$(dirname "$0")/setup.sh"
if [ "$TOY" ]; then
    step 200 python tests/benchmarks/train_step.py tiny-64-fp32 --rounds 1
    step 200 python tests/benchmarks/tiny_step.py --batch 2 --rounds 1
    step 200 python train.py t2i --scenes 8 --batch 4 --steps 2 --sample-every 0 --out "$OUT/t2i"
else
    step 150 python tests/benchmarks/train_step.py sdxl-1024-bf16 --rounds 10
    step 90 python tests/benchmarks/tiny_step.py
    for batch in 64 512; do
        step 120 python train.py t2i --scenes 4096 --batch $batch --steps 120 --sample-every 0 --out "$OUT/t2i-$batch"
    done
fi
rm -rf "$OUT"/t2i*/model "$OUT"/t2i*/checkpoints
keep
