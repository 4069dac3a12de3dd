#!/usr/bin/env bash
# With a network: fetch what a machine with PyTorch for CUDA lacks into .wheels (the peers and small packages; no torch,
# no triton, whose builds must be the machine's own).
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p .wheels
grep -v -e '^torch' -e '^triton' requirements.txt tests/requirements.txt -h | sed 's/ *#.*//' > .wheels/requirements.txt
python -m pip download --quiet --no-deps --dest .wheels -r .wheels/requirements.txt
python -m pip download --quiet --no-deps --dest .wheels importlib_metadata zipp
ls .wheels
