# Sourced by the numbered scripts: the peers from .wheels, the output folder, and a trial run with TOY=1.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OUT=${OUT:-gpu-out} TOY=${TOY:-} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT"
OUT=$(realpath "$OUT")
if [ -d .wheels ]; then
    python -m pip install --quiet --no-index --no-deps --find-links .wheels .wheels/*.whl
fi
python - <<'PYTHON' | tee "$OUT/machine.txt"
import torch
print("PyTorch", torch.__version__, "on", torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU")
PYTHON
failed=0

step() {  # step SECONDS COMMAND...: run it, for at most so long, and go on; its output also goes to a file
    local seconds=$1 name
    shift
    name=$(printf '%s\n' "$@" | grep -m1 -o '[a-z_]*\.py$' || echo tests)-$((++steps))
    echo "== $*"
    timeout "$seconds" "$@" 2>&1 | tee "$OUT/$name.log"
    local code=${PIPESTATUS[0]}
    [ "$code" = 0 ] || { echo "== exit code $code: $*" | tee -a "$OUT/failed.txt"; failed=1; }
}
steps=0

keep() {  # the JSON files that the benchmarks wrote
    mkdir -p "$OUT/benchmarks"
    find tests/benchmarks -name '*.json' -newer "$OUT/machine.txt" -exec cp {} "$OUT/benchmarks/" \;
    exit "$failed"
}
