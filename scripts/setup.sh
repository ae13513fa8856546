#!/usr/bin/env bash
# Makes the virtual environment DIR: the pinned CPU torch where no GPU is seen, the machine's own torch where one is.
set -euo pipefail
dir=$1 gpu=${2:-}
if [ -n "$gpu" ] && python3 -c 'import torch' 2>/dev/null; then
    bash scripts/machine_venv.sh "$dir"
    "$dir/bin/python" -m pip install -q -e '.[test,check,lora]' || {
        echo "no package index: installing without dependencies, on the packages that are here" >&2
        "$dir/bin/python" -m pip install -q --no-deps --no-build-isolation -e .
    }
elif [ -n "$gpu" ]; then
    [ -x "$dir/bin/python" ] || python3 -m venv "$dir"
    "$dir/bin/python" -m pip install -q -e '.[test,check,lora,bench]'
else
    [ -x "$dir/bin/python" ] || python3 -m venv "$dir"
    "$dir/bin/python" -m pip install -q --upgrade pip
    "$dir/bin/python" -m pip install -q -c constraints-cpu.txt torch triton
    "$dir/bin/python" -m pip install -q -c constraints-cpu.txt -e '.[triton,lora,bfcl,ftrl,bench,test,check]'
    "$dir/bin/python" -m pip install -q --no-deps bfcl-eval==2026.3.23 ||
        echo "bfcl-eval could not be installed: env bfcl and its tests are left out" >&2
    "$dir/bin/python" scripts/qwen3_tokenizer.py ||
        echo "the tests over the Qwen3 tokenizer are left out" >&2
fi
