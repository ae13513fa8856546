"""A worker that is killed from outside (out of memory, an operator) costs nothing but time."""

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from pact_fast.envs.sandbox.sandbox import Program, Sandbox, SandboxCall

REPEATS = int(os.environ.get("PACT_FAULTS", "4"))


def inner(pid):
    """The process that runs the tools: the only child of the one we started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else pid


@pytest.mark.faults
@pytest.mark.timeout(300 + 30 * REPEATS)
@pytest.mark.parametrize("which", ["outer", "inner"])
def test_kill_9_of_a_tool_worker_at_random_moments_changes_no_result(which):
    work = Program("import time\ndef tool(n):\n    time.sleep(0.002)\n    return n * n")
    rng, survived, killed = random.Random(), 0, 0
    for attempt in range(REPEATS):
        with Sandbox(workers=2, time_limit=60) as sandbox:
            sandbox.run([SandboxCall(work, "tool", {"n": 1})] * 2)
            delay = rng.uniform(0.0, 0.1)

            def kill(sandbox=sandbox, delay=delay):
                time.sleep(delay)
                pid = rng.choice(sandbox.workers).process.pid
                os.kill(pid if which == "outer" else inner(pid), signal.SIGKILL)

            thread = threading.Thread(target=kill)
            thread.start()
            results = sandbox.run([SandboxCall(work, "tool", {"n": n}) for n in range(80)])
            thread.join()
            assert [r.value for r in results] == [n * n for n in range(80)], (attempt, delay)
            killed += sandbox.restarts
        survived += 1
    print(f"kill -9 of a tool worker ({which}): {survived} of {REPEATS} survived, {killed} replaced")
    assert killed


def test_a_call_that_loses_its_worker_twice_gets_an_error():
    fatal = Program("import time\ndef tool():\n    time.sleep(30)")
    with Sandbox(workers=1, time_limit=60) as sandbox:
        stop = threading.Event()

        def kill():
            while not stop.wait(0.2):
                for worker in list(sandbox.workers):
                    if worker.pending:
                        os.kill(worker.process.pid, signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        try:
            (result,) = sandbox.run([SandboxCall(fatal, "tool", {})])
        finally:
            stop.set()
            thread.join()
        assert result.kind == "died"
        assert sandbox.restarts == 2
