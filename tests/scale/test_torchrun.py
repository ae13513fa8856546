"""The real command: `torchrun --nproc_per_node 2 -m pact_fast train`, stopped by SIGTERM and resumed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pact_fast.train.trainer import Trainer
from tests.helpers.runs import config, weights, words

ROOT = Path(__file__).parent.parent.parent
STEPS = int(os.environ.get("PACT_SCALE_STEPS", "4"))
LIMIT = 1800  # seconds; two interpreters at once on a machine that does much else
# Small packs: several an update, so that gradients accumulate.
CHANGES = {
    "train__max_steps": STEPS,
    "train__token_budget": 900,
    "eval__every": 0,
    "eval__validation_tasks": 1,
}


def torchrun(run_dir, *more):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command = [*launch, "-m", "pact_fast", "train", *words(run_dir, **CHANGES), *more]
    places = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=places)


@pytest.mark.timeout(3 * LIMIT)
def test_torchrun_trains_to_the_weights_of_one_process_also_when_stopped_and_resumed(tmp_path):
    one = Trainer(config(tmp_path / "one", **CHANGES))
    one.train()
    one.env.close()

    two = tmp_path / "two"
    process = torchrun(two)
    deadline = time.monotonic() + LIMIT
    rows = two / "metrics.jsonl"
    while process.poll() is None and not (rows.exists() and rows.read_text()):
        assert time.monotonic() < deadline, "no step was made"
        time.sleep(0.05)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)  # what a scheduler sends: torchrun hands it on to the ranks
    first = process.communicate(timeout=LIMIT)[0]
    assert list(two.glob("checkpoints/step-*")), first
    print(f"SIGTERM to torchrun: all ranks ended after {time.monotonic() - begin:.1f} s")
    assert "saved in" in first or (two / "summary.json").exists(), first

    process = torchrun(two, "--resume")
    second = process.communicate(timeout=LIMIT)[0]
    assert process.returncode == 0, second
    assert second.count("next: pact-fast eval") == 1, "one rank talks"
    ours, theirs = weights(tmp_path / "one"), weights(two)
    worst = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    print(f"torchrun --nproc_per_node 2, {STEPS} steps, against one process: largest difference {worst:.1e}")
    assert worst < 1e-5
