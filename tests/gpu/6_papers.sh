#!/usr/bin/env bash
# The papers' experiments at their GPU size. Each program keeps what is finished and goes on from there the next time.
source "$(dirname "$0")/setup.sh"
if [ "$TOY" ]; then
    step 300 python tests/benchmarks/mtu.py --size toy --seeds 1 --only untouched --out "$OUT/mtu.json" --runs "$OUT/mtu"
else
    step 130 python tests/benchmarks/mtu.py --size gpu
    step 130 python tests/benchmarks/indomain.py --size gpu
    step 130 python tests/benchmarks/specialist.py --size gpu
    step 130 python tests/benchmarks/baselines.py --only "ONE-PIC, interlaced, edges" --only "ONE-PIC, side, edges"
fi
keep
