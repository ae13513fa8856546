"""Runs whose rollouts come from servers that die, lie and dawdle: they end with the weights of an undisturbed
run, or stop with a message that says what to do.

Servers compute in fp64: which tokens are drawn then does not depend on who shares a batch, and equal weights
mean equal to the last bit.
"""

import os
import random
import subprocess
import sys
import time

import pytest

from pact_fast.rollout import RolloutError
from pact_fast.train.trainer import Trainer
from tests.helpers.runs import config, curve, same_weights, tiny_model, weights, words
from tests.helpers.servers import ROOT, Misbehaving, ServerProcess, restart_after, spoil

REPEATS = int(os.environ.get("PACT_FAULTS", "3"))
SHORT = {"train__max_steps": 4, "eval__every": 2, "rollout__engine": "http", "rollout__retry_timeout": 120}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def server(root):
    server = ServerProcess(tiny_model(), root)
    yield server
    server.close()


def run(run_dir, *urls, **changes):
    trainer = Trainer(config(run_dir, rollout__servers=list(urls), **(SHORT | changes)))
    try:
        trainer.train()
    finally:
        trainer.env.close()
        trainer.engine.close()
    return trainer


@pytest.fixture(scope="module")
def undisturbed(root, server):
    run_dir = root / "undisturbed"
    proxy = Misbehaving(server.url, None, share=0.0)
    run(run_dir, proxy.url)
    proxy.close()
    (run_dir / "completions").write_text(str(proxy.calls.count("/v1/completions")))
    return run_dir


def same(run_dir, undisturbed):
    assert same_weights(weights(run_dir), weights(undisturbed))
    gauges = ("pact/logprob_mismatch", "pact/logprob_mismatch_max")  # the last bits of fp32 scores by packs
    for ours, theirs in zip(curve(run_dir), curve(undisturbed), strict=True):
        assert {k: v for k, v in ours.items() if k not in gauges} == {
            k: v for k, v in theirs.items() if k not in gauges
        }


def test_rollouts_from_a_server_train_to_the_weights_of_rollouts_in_process(root, undisturbed):
    run_dir = root / "in-process"
    trainer = Trainer(config(run_dir, **(SHORT | {"rollout__engine": "in_process"})))
    trainer.train()
    trainer.env.close()
    ours, theirs = weights(run_dir), weights(undisturbed)
    worst = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    print(f"hf against http: largest difference of a weight {worst:.1e}")
    assert worst < 1e-5
    gaps = [
        row["pact/logprob_mismatch_max"] for row in curve(undisturbed) if "pact/logprob_mismatch_max" in row
    ]
    assert gaps
    assert max(gaps) < 1e-4


def slow(status, answer, handler):
    time.sleep(1.5)
    return status, answer


def broken(status, answer, handler):
    return 500, {"error": {"message": "injected", "type": "test", "code": 500}}


FAULTS = {
    "slow": slow,
    "500": broken,
    "hang-up": lambda status, answer, handler: None,
    "short": spoil(token_ids=lambda ids: ids[:-1]),
    "stale": spoil(weight_versions=lambda versions: ["before", "before"]),
}


@pytest.mark.faults
@pytest.mark.timeout(300 + 60 * REPEATS)
@pytest.mark.parametrize("name", FAULTS)
def test_a_server_that_fails_now_and_then_costs_time_only(root, server, undisturbed, name):
    survived = faults = retries = 0
    for attempt in range(REPEATS):
        proxy, run_dir = (
            Misbehaving(server.url, FAULTS[name], share=0.1, seed=None),
            root / f"{name}-{attempt}",
        )
        # A slow answer is given up before it comes, and asked for again.
        trainer = run(run_dir, proxy.url, rollout__request_timeout=1.0 if name == "slow" else 60.0)
        assert trainer.engine.retries >= proxy.done
        faults, retries = faults + proxy.done, retries + trainer.engine.retries
        proxy.close()
        same(run_dir, undisturbed)
        survived += 1
    print(f"{name}: {survived} of {REPEATS} survived; {faults} faults, {retries} tries more")
    assert faults >= 3


@pytest.mark.faults
@pytest.mark.timeout(300 + 60 * REPEATS)
def test_kill_9_of_a_server_at_random_moments_loses_nothing(root, undisturbed):
    """The one server there is dies while it serves, and comes back with the weights it began with."""
    rng, survived, in_flight = random.Random(), 0, 0
    victim = ServerProcess(tiny_model(), root)
    whole = int((undisturbed / "completions").read_text())
    for attempt in range(REPEATS):
        proxy = Misbehaving(victim.url, None, share=0.0)
        after = rng.randrange(1, whole)
        killer = restart_after(victim, proxy, after)
        trainer = run(root / f"kill-{attempt}", proxy.url)
        killer.join()
        in_flight += trainer.engine.retries > 0
        same(root / f"kill-{attempt}", undisturbed)
        survived += 1
        proxy.close()
    victim.close()
    print(
        f"kill -9 of the rollout server: {survived} of {REPEATS} survived; {in_flight} hit a call under way"
    )
    assert in_flight > 0


def test_without_any_server_the_run_stops_saved_says_what_to_do_and_goes_on(root, undisturbed):
    run_dir = root / "stopped"
    victim = ServerProcess(tiny_model(), root)
    trainer = Trainer(
        config(run_dir, rollout__servers=[victim.url], **(SHORT | {"rollout__retry_timeout": 0.5}))
    )
    real = trainer.rollout

    def rollout(records, step):
        if step == 2:
            victim.kill()
        return real(records, step)

    trainer.rollout = rollout
    with pytest.raises(RolloutError, match=r"no server of .* gave an answer .*pact-fast serve.*--resume"):
        trainer.train()
    trainer.env.close()
    trainer.engine.close()
    assert trainer.checkpoints.latest().name == "step-000002"
    victim.start()
    run(run_dir, victim.url, checkpoint__resume=True)
    victim.close()
    same(run_dir, undisturbed)


BACKWARDS = """
import sys, time
real, begin = time.time, time.time()
time.time = lambda: begin - 100 * (real() - begin)  # a clock that runs backwards
from pact_fast.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_clock_going_backwards_changes_nothing(root, undisturbed):
    command = (sys.executable, "-c", BACKWARDS)
    server = ServerProcess(tiny_model(), root, prefix=command)
    run_dir = root / "backwards"
    changes = SHORT | {"rollout__servers": [server.url]}
    done = subprocess.run(
        [*command, "train", *words(run_dir, **changes)],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    server.close()
    assert done.returncode == 0, done.stderr
    same(run_dir, undisturbed)


def test_the_command_line_tells_what_stopped_it(root):
    changes = SHORT | {"rollout__servers": ["http://127.0.0.1:9"], "rollout__retry_timeout": 0.1}
    done = subprocess.run(
        [sys.executable, "-m", "pact_fast.cli", "train", *words(root / "nobody", **changes)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 1
    assert "stopped: weights 000000-" in done.stderr
    assert "Start them (pact-fast serve, or vLLM) and go on with --resume" in done.stderr
