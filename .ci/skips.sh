#!/usr/bin/env bash
# skips.sh FILE: prints the skipped tests of FILE, "test: reason" a line; fails where expected-skips.txt lacks a reason.
set -euo pipefail
expected=$(dirname "$0")/expected-skips.txt
echo "== skipped: $(sort -u "$1" | wc -l)"
sort -u "$1"
if unexpected=$(sort -u "$1" | grep -vEf <(grep -v -e '^#' -e '^$' "$expected")); then
    printf '== not expected (mend the machine, or name the reason in %s):\n%s\n' "$expected" "$unexpected" >&2
    exit 1
fi
