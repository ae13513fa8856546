#!/usr/bin/env bash
# What only a GPU can show, in one command and without a network: `make gpu`, or one part: bash bench/gpu.sh PART...
#   setup    environment on the machine's own torch and triton, native parts built if nvcc is there
#   tests    the GPU tests and the kernel tests, compiled instead of interpreted
#   bench    the ops beside their peers: CSV rows and a plot in bench/results/
#   tree     attention, training step and scoring pass of token trees (all lengths: python bench/tree.py)
#   summary  the targets, from those rows, to bench/results/summary.txt
# Each part has a time limit, and so has the whole: 8 minutes ($TOTAL_LIMIT seconds). Peers that are not installed are left out with the
# reason; wheels of them in $PACT_FAST_WHEELS (a folder) are installed without dependencies.
# DRY_RUN=1: every command on the CPU, in .venv, one round of each, tests only collected, rows into a temporary folder:
# shows that the script goes through, and claims nothing.
set -uo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV_GPU:-.venv-gpu}
SECONDS_PER_CASE=${SECONDS_PER_CASE:-1}
OUT=bench/results
ONLY=()  # what a dry run adds to pytest
if [ -n "${DRY_RUN:-}" ]; then
    VENV=${VENV_GPU:-.venv} SECONDS_PER_CASE=0 OUT=$(mktemp -d) ONLY=(--collect-only)
    TOTAL_LIMIT=${TOTAL_LIMIT:-3600} BENCH_LIMIT=900 OTHERS_LIMIT=900 TREE_LIMIT=900 TREE_MODEL_LIMIT=1800
fi
PY=$VENV/bin/python
unset TRITON_INTERPRET
export TRITON_DEFAULT_FP_FUSION=${TRITON_DEFAULT_FP_FUSION:-1}

# Seconds for a step: its own limit, or what is left of the whole, so that 8 minutes are never passed.
end=$((SECONDS + ${TOTAL_LIMIT:-470}))
limit() {
    local left=$((end - SECONDS))
    echo $((left < 1 ? 1 : left < $1 ? left : $1))
}

fail() { echo "gpu.sh: $*" >&2; exit 1; }

part_setup() {
    [ -n "${DRY_RUN:-}" ] && { "$PY" -c 'import pact_fast, torch; print("dry run on torch", torch.__version__)'; return; }
    command -v nvidia-smi >/dev/null && nvidia-smi -L || fail "no GPU is visible (nvidia-smi): run this on a machine with one"
    [ -x "$PY" ] || python3 -m venv --system-site-packages "$VENV" || fail "python3 -m venv failed"
    timeout "$(limit 60)" "$PY" -m pip install -q --no-index --no-deps --no-build-isolation -e . ||
        { echo "gpu.sh: no editable install, using the folder as it is" >&2
          timeout "$(limit 60)" "$PY" setup.py -q build_ext --inplace || echo "gpu.sh: native parts were not built" >&2; }
    if [ -n "${PACT_FAST_WHEELS:-}" ]; then
        "$PY" -m pip install -q --no-index --no-deps "$PACT_FAST_WHEELS"/*.whl || echo "gpu.sh: some wheels failed" >&2
    fi
    "$PY" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__, torch.cuda.get_device_name())' ||
        fail "this python has no torch with CUDA and triton"
}

part_tests() {
    timeout "$(limit "${TESTS_LIMIT:-110}")" "$PY" -m pytest -q -x -p no:cacheprovider "${ONLY[@]}" -m gpu tests || return 1
    timeout "$(limit "${KERNEL_TESTS_LIMIT:-60}")" "$PY" -m pytest -q -x -p no:cacheprovider "${ONLY[@]}" tests/ops/test_head_kernels.py \
        tests/tree/test_tree_attention.py
}

part_bench() {
    local status=0
    timeout "$(limit "${BENCH_LIMIT:-90}")" "$PY" -m pact_fast.bench_cli --shapes main --seconds "$SECONDS_PER_CASE" --out "$OUT" || status=$?
    timeout "$(limit "${OTHERS_LIMIT:-50}")" "$PY" -m pact_fast.bench_cli --shapes others --seconds "$SECONDS_PER_CASE" --out "$OUT" || status=$?
    return $status
}

part_tree() {
    local status=0 TREE=(--main-shape --seconds "$SECONDS_PER_CASE" --out "$OUT")
    [ -z "${DRY_RUN:-}" ] || TREE+=(--rounds 1)
    timeout "$(limit "${TREE_LIMIT:-50}")" "$PY" bench/tree.py attention packer "${TREE[@]}" || status=$?
    timeout "$(limit "${TREE_MODEL_LIMIT:-60}")" "$PY" bench/tree.py model "${TREE[@]}" || status=$?
    return $status
}

part_summary() {
    "$PY" -m pact_fast.bench_cli --targets --out "$OUT" | tee "$OUT/summary.txt"
}

status=0
for part in "${@:-setup tests bench tree summary}"; do
    for name in $part; do
        echo "== $name"
        declare -F "part_$name" >/dev/null || fail "unknown part '$name': setup, tests, bench, tree, summary"
        [ "$name" = setup ] || [ -x "$PY" ] || fail "there is no $PY: run 'bash bench/gpu.sh setup' first"
        if ! "part_$name"; then
            status=1
            echo "gpu.sh: $name failed or ran out of time" >&2
            [ "$name" = tests ] && fail "no speed is reported on a red test gate; run 'bash bench/gpu.sh bench' to time anyway"
        fi
    done
done
exit $status
