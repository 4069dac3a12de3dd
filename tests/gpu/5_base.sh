#!/usr/bin/env bash
# All weights from nothing. The work folder is packed in parts of 15 MB; given back as gpu-out/parts, the next run goes on.
source "$(dirname "$0")/setup.sh"
size=$([ "$TOY" ] && echo toy || echo gpu)
python tests/gpu/collect.py --unpack "$OUT" runs/make
step "${SECONDS_OF_TRAINING:-480}" python weights/make.py --size "$size"
python tests/gpu/collect.py --pack runs/make "$OUT"
keep
