"""Several ranks that sample from one `pact-fast serve`: they train to the weights of one process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.runs import adapters, curve, same_weights, tiny_model, weights, words
from tests.helpers.servers import ROOT, ServerProcess

TOTAL = int(os.environ.get("PACT_SCALE_STEPS", "5"))
LIMIT = 900  # seconds; two interpreters at once on a machine that does much else
# Small packs: several an update, and on two ranks an odd number now and then. Three prompts for two ranks.
CHANGES = {
    "train__max_steps": TOTAL,
    "train__prompts_per_step": 3,
    "train__token_budget": 900,
    "eval__every": 4,
    "rollout__engine": "http",
    "checkpoint__every": 0,
}
AHEAD = CHANGES | {"rollout__overlap": True, "objective__importance_ratio_cap": 2.0}

LORA = {"lora__rank": 4, "train__learning_rate": 0.01, "train__max_steps": 3}
HALF = {"distributed__compute_dtype": "bfloat16", "train__max_steps": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def url(root):
    server = ServerProcess(tiny_model(), root, max_rows=1)
    yield server.url
    server.close()


@pytest.fixture(scope="module")
def runs(root, url):
    """Folder of each run, by name; all in one interpreter."""
    where = {"model__path": str(tiny_model()), "rollout__servers": [url]}
    jobs = {
        "one": {"size": 1, "changes": CHANGES | where},
        "two": {"size": 2, "changes": CHANGES | where},
        "one ahead": {"size": 1, "changes": AHEAD | where},
        "two ahead": {"size": 2, "changes": AHEAD | where},
        "one adapted": {"size": 1, "changes": AHEAD | LORA | where},
        "two adapted": {"size": 2, "changes": AHEAD | LORA | where},
        "two in bf16": {"size": 2, "changes": AHEAD | HALF | where},
    }
    listed = [job | {"run_dir": str(root / name.replace(" ", "-"))} for name, job in jobs.items()]
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.ranks", json.dumps(listed)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    for job, codes in zip(listed, json.loads(done.stdout), strict=True):
        log = Path(f"{job['run_dir']}.rank0.log").read_text()
        assert set(codes) == {0}, log[-3000:]
    return {name: Path(job["run_dir"]) for name, job in zip(jobs, listed, strict=True)}


@pytest.mark.timeout(LIMIT + 60)
@pytest.mark.parametrize("ahead", ["", " ahead"])
def test_two_ranks_on_a_server_train_to_the_weights_of_one_process(runs, ahead):
    one, two = (runs[f"{name}{ahead}"] for name in ("one", "two"))
    ours, theirs = weights(one), weights(two)
    worst = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    print(f"2 ranks on a server{ahead}, {TOTAL} steps, against one process: largest difference {worst:.1e}")
    assert worst < 1e-5
    for mine, other in zip(curve(one), curve(two), strict=True):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            # Packs cut elsewhere repeat other prefixes: tokens are counted as packed.
            if isinstance(value, float) and name != "num_tokens":
                assert other[name] == pytest.approx(value, abs=5e-5), name


def test_adapters_on_two_ranks_and_a_server_train_to_those_of_one_process(runs):
    ours, theirs = adapters(runs["one adapted"]), adapters(runs["two adapted"])
    worst = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    print(f"LoRA, 2 ranks on a server, against one process: largest difference {worst:.1e}")
    assert worst < 1e-5
    assert max(float(t.abs().max()) for name, t in ours.items() if "lora_B" in name) > 1e-3


def test_ranks_that_compute_in_bf16_take_a_server_for_what_it_is(runs):
    gaps = [row["pact/logprob_mismatch_max"] for row in curve(runs["two in bf16"]) if "loss" in row]
    assert 1e-3 < gaps[0] < 0.5


def test_one_step_ahead_trains_otherwise(runs):
    ours, theirs = weights(runs["one"]), weights(runs["one ahead"])
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) > 1e-4
    stale = [row["pact/staleness"] for row in curve(runs["two ahead"]) if "loss" in row]
    assert stale == [0, 2, 2, 2, 0, *[2 * (step % 4 > 0) for step in range(5, TOTAL)]]


@pytest.mark.timeout(2 * LIMIT)
def test_torchrun_is_stopped_one_step_ahead_and_goes_on_bit_for_bit(runs, root, url):
    run_dir = root / "torchrun"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command = [*launch, "-m", "pact_fast", "train", *words(run_dir, rollout__servers=[url], **AHEAD)]
    places = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=places
    )
    rows, deadline = run_dir / "metrics.jsonl", time.monotonic() + LIMIT
    while process.poll() is None and not (rows.exists() and rows.read_text()):
        assert time.monotonic() < deadline, "no step was made"
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    first = process.communicate(timeout=LIMIT)[0]
    states = sorted(run_dir.glob("checkpoints/step-*/state.json"))
    assert states, first
    noted = json.loads(states[-1].read_text())["state"]["ahead"]
    print(f"stopped in {states[-1].parent.name}, rollouts of weights {noted} under way")
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=LIMIT, env=places)
    assert done.returncode == 0, done.stderr
    assert same_weights(weights(run_dir), weights(runs["two ahead"]))
    assert curve(run_dir) == curve(runs["two ahead"])
