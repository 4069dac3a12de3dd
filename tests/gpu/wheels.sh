#!/usr/bin/env bash
# With a network: fetch diffusers, which a machine with PyTorch for CUDA and transformers lacks, into .wheels. All of it
# is plain Python, so that the machine's version of Python does not matter.
set -euo pipefail
cd "$(dirname "$0")/../.."
rm -rf .wheels
peer=$(grep -o -e "^diffusers==[0-9.]*" tests/requirements.txt)
python -m pip download --quiet --no-deps --dest .wheels "$peer"
python -m pip download --quiet --dest .wheels importlib_metadata
ls .wheels
