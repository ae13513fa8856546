#!/usr/bin/env bash
# What only a GPU can show, in one command and without a network: `make gpu`, or one part: bash bench/gpu.sh PART...
#   setup    environment on the machine's own torch and triton, native part built if a C++ compiler is there
#   rollout  rollouts first of all: their tests, then tokens/s and the share of the memory floor at the main shapes
#   tests    the GPU tests and the kernel tests, compiled instead of interpreted
#   decode   the same of the rollout engine's kernels, and their times
#   bench    the ops beside their peers at the main shape: CSV rows and a plot in bench/results/
#   tree     attention, training step and scoring pass of token trees (all lengths: python -m bench tree)
#   trainer  a step of the trainer on the bundled environment, where its packages are there
#   others   the ops at their other shapes, as many as the time allows
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
HEAD_OPS=(--op linear_cross_entropy --op linear_logprob --op linear_pact_loss)
DECODE_OPS=(--op shared_prefix_attention --op extend_attention --op sample)
ONLY=()  # what a dry run adds to pytest
if [ -n "${DRY_RUN:-}" ]; then
    VENV=${VENV_GPU:-.venv} SECONDS_PER_CASE=0 OUT=$(mktemp -d) ONLY=(--collect-only) TREE_ROUNDS=1
    TOTAL_LIMIT=${TOTAL_LIMIT:-3600} BENCH_LIMIT=900 DECODE_BENCH_LIMIT=900 OTHERS_LIMIT=900 TREE_LIMIT=900 TREE_MODEL_LIMIT=1800
fi
PY=$(realpath -ms "$VENV")/bin/python
unset TRITON_INTERPRET
export TRITON_DEFAULT_FP_FUSION=${TRITON_DEFAULT_FP_FUSION:-1}

# within SECONDS COMMAND: no longer than that, nor than what is left of the whole, so that 8 minutes are never passed.
# A process that does not end when asked to is killed 10 seconds later.
end=$((SECONDS + ${TOTAL_LIMIT:-460}))
within() {
    local left=$((end - SECONDS)) most=$1
    shift
    timeout -k 10 $((left < 1 ? 1 : left < most ? left : most)) "$@"
}

fail() { echo "gpu.sh: $*" >&2; exit 1; }

# Without an editable install everything runs from this folder. From another folder setup.py does not read
# pyproject.toml, which setuptools older than 77 (torch's index has 70) refuses.
build_in_place() {
    local root=$PWD elsewhere
    elsewhere=$(mktemp -d)
    echo "gpu.sh: no editable install, using the folder as it is" >&2
    (cd "$elsewhere" && within 60 "$PY" "$root/setup.py" -q build_ext --build-lib "$root" --build-temp .) ||
        echo "gpu.sh: native parts were not built" >&2
}

part_setup() {
    [ -n "${DRY_RUN:-}" ] && { "$PY" -c 'import pact_fast, torch; print("dry run on torch", torch.__version__)'; return; }
    command -v nvidia-smi >/dev/null && nvidia-smi -L || fail "no GPU is visible (nvidia-smi): run this on a machine with one"
    bash scripts/machine_venv.sh "$VENV" || fail "python3 -m venv failed"
    within 60 "$PY" -m pip install -q --no-index --no-deps --no-build-isolation -e . || build_in_place
    "$PY" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__, torch.cuda.get_device_name())' ||
        fail "this python has no torch with CUDA and triton"
}

# By name: all other files would be imported too, and need packages that a machine for inference or training may lack.
part_tests() {
    within "${TESTS_LIMIT:-150}" "$PY" -m pytest -q -p no:cacheprovider "${ONLY[@]}" tests/ops/test_head_gpu.py \
        tests/ops/test_head_kernels.py tests/tree/test_tree_kernels.py
}

# Some hundred kernels are compiled for the tests.
part_decode() {
    if_time_allows "${DECODE_LIMIT:-110}" "$PY" -m pytest -q -p no:cacheprovider "${ONLY[@]}" tests/ops/test_decode_kernels.py ||
        return 1
    within "${DECODE_BENCH_LIMIT:-45}" "$PY" -m bench ops "${DECODE_OPS[@]}" --seconds "$SECONDS_PER_CASE" --out "$OUT"
}

# DESIGN's targets: 14,000 tokens/s at 64 rows and 20,000 at 256 (prompt 3,000 shared by 8, 512 new), 60,000 of the
# 135M shape. A bench without its test beside it would claim a speed of wrong tokens.
part_rollout() {
    local rounds=${ROLLOUT_ROUNDS:-2} status=0
    within "${ROLLOUT_TESTS_LIMIT:-90}" "$PY" -m pytest -q -p no:cacheprovider "${ONLY[@]}" tests/train/test_engine_kernels.py || return 1
    if [ -n "${DRY_RUN:-}" ]; then
        within 120 "$PY" -m bench rollout --provider pact_fast --rows 8 --new 8 --rounds 1 --out "$OUT"
        return
    fi
    within "${ROLLOUT_LIMIT:-120}" "$PY" -m bench rollout --model qwen3-1.7b --provider pact_fast --rows 64,256 --prompt 3000 --new 512 --rounds "$rounds" --out "$OUT" || status=$?
    within "${ROLLOUT_LIMIT:-60}" "$PY" -m bench rollout --model smollm2-135m --provider pact_fast --rows 256 --prompt 500 --new 512 --rounds "$rounds" --out "$OUT" || status=$?
    return $status
}

# The loss comes last: a peer of it goes through torch.compile, whose time is not ours to bound.
part_bench() {
    within "${BENCH_LIMIT:-120}" "$PY" -m bench ops "${HEAD_OPS[@]}" --shapes main --seconds "$SECONDS_PER_CASE" --out "$OUT"
}

part_tree() {
    local status=0 TREE=(--main-shape --seconds "$SECONDS_PER_CASE" --out "$OUT" --rounds "${TREE_ROUNDS:-3}")
    within "${TREE_LIMIT:-90}" "$PY" -m bench tree attention packer "${TREE[@]}" || status=$?
    within "${TREE_MODEL_LIMIT:-90}" "$PY" -m bench tree model "${TREE[@]}" || status=$?
    return $status
}

# As `within`, for what comes last: running out of time is said, and is no failure.
if_time_allows() {
    local status=0
    within "$@" || status=$?
    case $status in 124 | 137) echo "gpu.sh: cut short: no time is left" >&2; status=0 ;; esac
    return $status
}

part_trainer() {
    "$PY" -c 'import pact_fast.train.trainer' || { echo "gpu.sh: left out: the trainer needs that package"; return 0; }
    if_time_allows "${TRAINER_LIMIT:-60}" "$PY" -m pytest -q -p no:cacheprovider "${ONLY[@]}" -m gpu tests/train/test_trainer.py
}

part_others() {
    if_time_allows "${OTHERS_LIMIT:-120}" "$PY" -m bench ops "${HEAD_OPS[@]}" --shapes others --seconds "$SECONDS_PER_CASE" --out "$OUT"
}

part_summary() {
    "$PY" -m bench ops --targets --out "$OUT" | tee "$OUT/summary.txt"
}

status=0
for part in "${@:-setup rollout tests decode bench tree trainer others summary}"; do
    for name in $part; do
        echo "== $name"
        declare -F "part_$name" >/dev/null || fail "unknown part '$name': setup, rollout, tests, decode, bench, tree, trainer, others, summary"
        [ "$name" = setup ] || [ -x "$PY" ] || fail "there is no $PY: run 'bash bench/gpu.sh setup' first"
        if ! "part_$name"; then
            status=1
            echo "gpu.sh: $name failed or ran out of time" >&2
            [ "$name" = tests ] && fail "no speed is reported on a red test gate; run 'bash bench/gpu.sh bench' to time anyway"
        fi
    done
done
exit $status
