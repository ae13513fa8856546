"""Policy under DistributedDataParallel, in two gloo processes: gradients are exchanged, or it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="replicas with adapters need peft: pip install 'pact-fast[lora]'")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.replicas", str(tmp_path_factory.mktemp("replicas"))],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["plain", "tied", "lora", "checkpointed"])
def test_gradients_are_the_mean_over_the_ranks(found, kind):
    gaps = found[kind]
    assert gaps["size"] > 0.1
    assert gaps["between ranks"] == 0.0
    assert gaps["from the mean"] < 1e-4 * gaps["size"]


def test_the_wrapped_model_stays_what_it_was(found):
    assert found["plain forward"][:2] == [1, 2]


def test_the_module_inside_is_refused_where_gradients_are_to_be_exchanged(found):
    for use in ("module", "inner"):
        assert "inside of a DistributedDataParallel" in found[use]
        assert "Policy(ddp)" in found[use]
    assert found["scored"] == found["no_sync"] == "nothing was raised"


def test_unused_parameters_that_would_hide_the_head_are_refused(found):
    assert "find_unused_parameters=False" in found["find_unused"]
