#!/usr/bin/env bash
# What only a GPU can show, in one command, in 10 minutes and without a network: `make gpu`, or one part: bash bench/gpu.sh PART...
#   setup      environment on the machine's own torch and triton, native parts built if a compiler is there
#   tests      the GPU tests and the kernel tests, compiled instead of interpreted; a process a file, side by side
#   rollout    rollouts: their tests, then tokens/s and the share of the memory floor at the main shapes
#   attention  tree attention beside its peers at the main shape
#   loss       the LM-head ops beside their peers at the main shape
#   step       training step and scoring of token trees at the main lengths
#   streaming  a step on a tree over the budget
#   decode     the rollout engine's kernels: their tests (some hundred are compiled), then their times
#   trainer    a step of the trainer on the bundled environment, where its packages are there
#   tiles      candidates of the Triton tree attention's tiles
#   others     everything at its other shapes, as much as the time allows
#   summary    targets, values, met or missed, peers: from the rows, to bench/results/summary.txt
# In order of need. Every row is in bench/results/<gpu>.csv when it is measured. A part that fails or runs out of time never stops the
# rest. A second call goes on where the first ended: parts that were done at this commit are left out, and of the others what has
# rows already; AGAIN=1 does all anew. Red tests do not stop the rows, but the summary then claims nothing.
# Peers that are not installed are left out with the reason; wheels of them in $PACT_FAST_WHEELS (a folder) are installed without
# dependencies. The whole keeps to $TOTAL_LIMIT seconds (580).
# DRY_RUN=1: every command on the CPU, in .venv, one round of each, tests only collected, rows into a temporary folder ($OUT, if given):
# shows that the script goes through, and claims nothing.
set -uo pipefail
cd "$(dirname "$0")/.."

PARTS=(setup tests rollout attention loss step streaming decode trainer tiles others summary)
VENV=${VENV_GPU:-.venv-gpu}
SECONDS_PER_CASE=${SECONDS_PER_CASE:-1} ROUNDS=${ROUNDS:-3}
OUT=${OUT:-bench/results}
HEAD_OPS=(--op linear_pact_loss --op linear_logprob --op linear_cross_entropy)  # the last has peers that compile for long
DECODE_OPS=(--op shared_prefix_attention --op extend_attention --op sample)
ONLY=()  # what a dry run adds to pytest
if [ -n "${DRY_RUN:-}" ]; then
    VENV=${VENV_GPU:-.venv} SECONDS_PER_CASE=0 ROUNDS=1 ONLY=(--collect-only)
    [ "$OUT" = bench/results ] && OUT=$(mktemp -d)
    TOTAL_LIMIT=${TOTAL_LIMIT:-3600} SCALE=10
fi
PY=$(realpath -ms "$VENV")/bin/python
DONE=$OUT/.gpu-$(git rev-parse --short HEAD 2>/dev/null || echo none)
unset TRITON_INTERPRET
export TRITON_DEFAULT_FP_FUSION=${TRITON_DEFAULT_FP_FUSION:-1}

# within SECONDS COMMAND: no longer than that, nor than what is left of the whole. A process that does not end when asked to is killed
# 10 seconds later.
end=$((SECONDS + ${TOTAL_LIMIT:-580}))
within() {
    local left=$((end - SECONDS)) most=$(($1 * ${SCALE:-1}))
    shift
    timeout -k 10 $((left < 1 ? 1 : left < most ? left : most)) "$@"
}

say() { echo "gpu.sh: $*" >&2; }

bench() { # bench SECONDS COMMAND...: rows of a bench that are not there yet
    local most=$1
    shift
    within "$most" "$PY" -m bench "$@" --seconds "$SECONDS_PER_CASE" --rounds "$ROUNDS" --out "$OUT" --resume
}

# Without an editable install everything runs from this folder. From another folder setup.py does not read
# pyproject.toml, which setuptools older than 77 (torch's index has 70) refuses.
build_in_place() {
    local root=$PWD elsewhere
    elsewhere=$(mktemp -d)
    say "no editable install, using the folder as it is"
    (cd "$elsewhere" && within 60 "$PY" "$root/setup.py" -q build_ext --build-lib "$root" --build-temp .) ||
        say "native parts were not built"
}

part_setup() {
    [ -n "${DRY_RUN:-}" ] && { "$PY" -c 'import pact_fast, torch; print("dry run on torch", torch.__version__)'; return; }
    command -v nvidia-smi >/dev/null && nvidia-smi -L || { say "no GPU is visible (nvidia-smi): run this on a machine with one"; return 1; }
    bash scripts/machine_venv.sh "$VENV" || { say "python3 -m venv failed"; return 1; }
    within 60 "$PY" -m pip install -q --no-index --no-deps --no-build-isolation -e . || build_in_place
    "$PY" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__, torch.cuda.get_device_name())' ||
        { say "this python has no torch with CUDA and triton"; return 1; }
}

# By name: all other files would be imported too, and need packages that a machine for inference or training may lack.
part_tests() {
    local file status=0 pids=() logs
    logs=$(mktemp -d)
    for file in tests/ops/test_head_gpu.py tests/ops/test_head_kernels.py tests/tree/test_tree_kernels.py tests/tree/test_fa4.py \
        tests/tree/test_policy.py; do
        local mark=()
        [ "$file" = tests/tree/test_policy.py ] && mark=(-m gpu)
        within "${TESTS_LIMIT:-150}" "$PY" -m pytest -q -p no:cacheprovider "${ONLY[@]}" "${mark[@]}" "$file" \
            >"$logs/$(basename "$file").log" 2>&1 &
        pids+=($!)
    done
    for file in "${pids[@]}"; do wait "$file" || status=1; done
    for file in "$logs"/*.log; do echo "-- $(basename "$file")"; tail -n 15 "$file"; done
    [ -n "${DRY_RUN:-}" ] && return $status  # collected alone: no result
    mkdir -p "$DONE" && { [ $status = 0 ] && echo green || echo red; } >"$DONE/tests.result"
    return $status
}

part_attention() { bench 90 ops --op tree_attention --shapes main; }
part_loss() { bench 120 ops "${HEAD_OPS[@]}" --shapes main; }
part_step() { bench 90 tree model --main-shape; }
part_streaming() { bench 60 tree streaming --main-shape; }
part_others() { bench 300 ops --shapes others; }

part_tiles() {
    [ -n "${DRY_RUN:-}" ] && { "$PY" -m bench tiles --help >/dev/null; return; }
    within 90 "$PY" -m bench tiles --head-dim 128 64 --seconds "$SECONDS_PER_CASE" --rounds "$ROUNDS" --out "$OUT"
}

# Targets: 14,000 tokens/s at 64 rows and 20,000 at 256 (prompt 3,000 shared by 8, 512 new), 60,000 of the 135M shape. A
# bench without its test beside it would claim a speed of wrong tokens.
part_rollout() {
    local status=0
    within "${ROLLOUT_TESTS_LIMIT:-90}" "$PY" -m pytest -q -p no:cacheprovider "${ONLY[@]}" tests/train/test_engine_kernels.py || return 1
    if [ -n "${DRY_RUN:-}" ]; then
        within 120 "$PY" -m bench rollout --provider pact_fast --rows 8 --new 8 --rounds 1 --out "$OUT"
        return
    fi
    within "${ROLLOUT_LIMIT:-100}" "$PY" -m bench rollout --model qwen3-1.7b --provider pact_fast --rows 64,256 --prompt 3000 --new 512 \
        --rounds "$ROUNDS" --out "$OUT" || status=$?
    within "${ROLLOUT_LIMIT:-50}" "$PY" -m bench rollout --model smollm2-135m --provider pact_fast --rows 256 --prompt 500 --new 512 \
        --rounds "$ROUNDS" --out "$OUT" || status=$?
    return $status
}

part_decode() {
    within "${DECODE_LIMIT:-110}" "$PY" -m pytest -q -p no:cacheprovider "${ONLY[@]}" tests/ops/test_decode_kernels.py || return $?
    bench 45 ops "${DECODE_OPS[@]}"
}

part_trainer() {
    "$PY" -c 'import pact_fast.train.trainer' || { say "left out: the trainer needs that package"; return 0; }
    within "${TRAINER_LIMIT:-60}" "$PY" -m pytest -q -p no:cacheprovider "${ONLY[@]}" -m gpu tests/train/test_trainer.py
}

part_summary() {
    local tests="not run"
    [ -f "$DONE/tests.result" ] && tests=$(cat "$DONE/tests.result")
    "$PY" -m bench ops --targets --tests "$tests" --out "$OUT" | tee "$OUT/summary.txt"
}

run_part() { # status of a part; 0 at once where it is done
    local name=$1 begin=$SECONDS status=0
    echo "== $name"
    if [ -z "${AGAIN:-}" ] && [ -e "$DONE/$name" ] && [ "$name" != summary ]; then
        echo "done before at this commit (AGAIN=1 does it anew)"
        return 0
    fi
    "part_$name" || status=$?
    case $status in
    0) mkdir -p "$DONE" && [ "$name" = summary ] || touch "$DONE/$name" ;;
    124 | 137) say "$name was cut short after $((SECONDS - begin)) s; the next call goes on with it" ;;
    *) say "$name failed (status $status); the rest goes on" ;;
    esac
    return $status
}

wanted=("$@")
[ ${#wanted[@]} = 0 ] && wanted=("${PARTS[@]}")
for name in "${wanted[@]}"; do
    declare -F "part_$name" >/dev/null || { say "unknown part '$name': ${PARTS[*]}"; exit 2; }
done
mkdir -p "$OUT"
status=0
for name in "${wanted[@]}"; do
    if [ "$name" != setup ] && [ ! -x "$PY" ]; then
        say "there is no $PY: run 'bash bench/gpu.sh setup' first"
        exit 1
    fi
    [ "$name" != summary ] && [ "$name" != setup ] && [ $SECONDS -ge $end ] && { say "no time is left for $name: call again"; status=1; continue; }
    run_part "$name" || status=1
done
exit $status
