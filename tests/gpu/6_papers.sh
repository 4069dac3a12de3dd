#!/usr/bin/env bash
# The papers' experiments, 6 processes at once on one GPU, the most important first. tests/gpu/papers.py --merge fills the tables.
source "$(dirname "$0")/setup.sh"
if [ "$TOY" ]; then
    step 400 python tests/gpu/papers.py --out "$OUT" --size toy --jobs 2 --seconds 360 --only mtu-n4-0 --only baselines-edges-1
else
    step 430 python tests/gpu/papers.py --out "$OUT" --seconds 380
fi
keep
