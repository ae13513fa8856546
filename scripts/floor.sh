#!/usr/bin/env bash
# Makes the virtual environment DIR with the oldest versions that pyproject.toml admits (constraints-floor.txt).
set -euo pipefail
dir=$1
[ -x "$dir/bin/python" ] || python3 -m venv "$dir"
"$dir/bin/python" -m pip install -q --upgrade pip
"$dir/bin/python" -m pip install -q -c constraints-cpu.txt -c constraints-floor.txt torch triton
"$dir/bin/python" -m pip install -q -c constraints-cpu.txt -c constraints-floor.txt -e '.[triton,lora,test]'
