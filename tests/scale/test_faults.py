"""Faults that must lose nothing (tests/helpers/faults.py). With PACT_FAULTS=20 each comes twenty times."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REPEATS = int(os.environ.get("PACT_FAULTS", "3"))
LIMIT = 300 + 300 * REPEATS
pytestmark = [pytest.mark.faults, pytest.mark.timeout(LIMIT + 60)]  # the first test waits for all
SCENARIOS = (
    *(
        "clock",
        "damage",
        "disk_full",
        "folders",
        "kill",
        "kill_rank",
        "last_save",
        "nan",
        "sigterm",
        "tool_worker",
    ),
    "two_processes",
)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    command = [
        sys.executable,
        "-m",
        "tests.helpers.faults",
        str(tmp_path_factory.mktemp("faults")),
        str(REPEATS),
    ]
    places = os.environ | {"PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=LIMIT, env=places)
    assert done.returncode == 0
    return json.loads(done.stdout.splitlines()[-1])


def test_every_scenario_is_run(outcome):
    assert tuple(sorted(outcome)) == SCENARIOS


@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_lost_after(outcome, name):
    found = outcome[name]
    print(f"{name}: {found['survived']} of {found['of']} survived; {found['seen']}")
    assert found["error"] is None, found["error"]
    assert found["survived"] == found["of"] == REPEATS
