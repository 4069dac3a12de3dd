#!/usr/bin/env bash
# Every test that uses a GPU where there is one, a drawing on it against the CPU, and one process of FSDP and of DDP on NCCL.
source "$(dirname "$0")/setup.sh"
tests="tests/test_attention.py tests/test_kernels.py tests/test_fused.py tests/test_graph.py tests/test_casting.py tests/test_gpu_training.py"
[ "$TOY" ] && tests="tests/test_attention.py -k naive"
step 240 python -m pytest -q -rs -p no:cacheprovider --junitxml="$OUT/check.xml" $tests -m "slow or not slow"
step 60 python sample.py "a red cube" --selftest
for way in "" --fsdp; do
    step 60 torchrun --standalone --nproc_per_node=1 train.py t2i --scenes 64 --batch 16 --steps 3 --warmup 0 $way \
        --out "$OUT/run$way" --save "$OUT/run$way/model"
done
rm -rf "$OUT"/run*/model "$OUT"/run*/checkpoints
python tests/gpu/collect.py --check "$OUT" || failed=1
keep
