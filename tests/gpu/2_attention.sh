#!/usr/bin/env bash
# Our attention beside PyTorch's kernels at SDXL's shapes, then every setting of its kernels.
source "$(dirname "$0")/setup.sh"
if [ "$TOY" ]; then
    TRITON_INTERPRET=1 step 300 python tests/benchmarks/attention_sweep.py --toy --rounds 1
else
    step 120 python tests/benchmarks/attention.py
    step 400 python tests/benchmarks/attention_sweep.py --minutes 6
fi
keep
