#!/usr/bin/env bash
# Your own tools from records to a trained model: write the tasks, check them, train a few steps.
#   bash examples/own_tools/run.sh
set -euo pipefail
cd "$(dirname "$0")"
python make_tasks.py tasks.jsonl
pact-fast data check tasks.jsonl --tokenizer toolbox-base
pact-fast train train.yaml "$@"
