#!/usr/bin/env bash
# A step of the UNet, the VAE and a whole picture of 1024x1024 beside diffusers.
source "$(dirname "$0")/setup.sh"
cases="sdxl-1024-bf16 tiny-64-bf16"
[ "$TOY" ] && cases="tiny-64-fp32"
rounds=$([ "$TOY" ] && echo 1 || echo 20)
step 200 python tests/benchmarks/unet_step.py $cases --rounds "$rounds"
step 90 python tests/benchmarks/vae.py $cases --rounds "$rounds"
step 200 python tests/benchmarks/picture.py $cases --rounds "$([ "$TOY" ] && echo 1 || echo 3)"
keep
