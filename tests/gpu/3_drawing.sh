#!/usr/bin/env bash
# A step of the UNet, the VAE and a whole picture of 1024x1024 beside diffusers.
source "$(dirname "$0")/setup.sh"
cases="sdxl-1024-bf16 tiny-64-bf16"
[ "$TOY" ] && cases="tiny-64-fp32"
rounds=$([ "$TOY" ] && echo 1 || echo 20)
mode=${COMPILE:-default}  # "max-autotune" searches longer than this script has
step 260 python tests/benchmarks/unet_step.py $cases --rounds "$rounds" --compile "$mode"
step 60 python tests/benchmarks/vae.py $cases --rounds "$rounds" --compile off
step 90 python tests/benchmarks/picture.py $cases --rounds "$([ "$TOY" ] && echo 1 || echo 3)" --compile off
keep
