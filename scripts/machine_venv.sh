#!/usr/bin/env bash
# Makes the virtual environment DIR on the packages of this machine's python3, its torch and triton above all. Wheels in
# $PACT_FAST_WHEELS (a folder) are installed without dependencies.
set -euo pipefail
dir=$1
if [ ! -x "$dir/bin/python" ]; then
    # Without ensurepip or with: the machine's own pip serves, and no bundled setuptools may hide the machine's.
    python3 -m venv --system-site-packages --without-pip "$dir"
fi
# That shows the packages of the base interpreter alone; where python3 is in an environment itself, its own are added.
if ! "$dir/bin/python" -c 'import torch' 2>/dev/null; then
    own=$("$dir/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    python3 -c 'import sys; print(*(p for p in sys.path if p.endswith(("site-packages", "dist-packages"))), sep="\n")' \
        > "$own/machine.pth"
fi
if ! "$dir/bin/python" -c 'import pip' 2>/dev/null; then
    "$dir/bin/python" -m ensurepip >/dev/null || echo "no pip: nothing can be installed into $dir" >&2
fi
if [ -n "${PACT_FAST_WHEELS:-}" ]; then
    "$dir/bin/python" -m pip install -q --no-index --no-deps "$PACT_FAST_WHEELS"/*.whl || echo "some wheels failed" >&2
fi
