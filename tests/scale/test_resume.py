"""A run that is stopped, killed or damaged goes on as if nothing had happened: same weights, same curves."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pact_fast.train.checkpoint import Checkpointer
from pact_fast.train.preemption import Preempted, StopSignal
from pact_fast.train.trainer import Trainer
from tests.helpers.runs import config, curve, same_weights, weights, words

HERE = Path(__file__).parent


def run(run_dir, **changes):
    trainer = Trainer(config(run_dir, **changes))
    try:
        return trainer.train()
    finally:
        trainer.env.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    run(run_dir)
    return run_dir


def stop_after(trainer, steps, *, during_rollout):
    """Sends this process SIGTERM in (or right after) the rollouts of the step after `steps`."""
    real, calls = trainer.rollout, []

    def rollout(records, step):
        calls.append(step)
        if len(calls) == steps + 1 and during_rollout:
            os.kill(os.getpid(), signal.SIGTERM)
        out = real(records, step)
        if len(calls) == steps + 1 and not during_rollout:
            trainer.stop.requested = True  # as if it had come later in the step
        return out

    trainer.rollout = rollout


@pytest.mark.parametrize(("steps", "during_rollout"), [(0, True), (3, True), (3, False), (5, False)])
def test_sigterm_saves_and_the_run_goes_on_bit_for_bit(tmp_path, undisturbed, steps, during_rollout):
    run_dir = tmp_path / "run"
    trainer = Trainer(config(run_dir))
    stop_after(trainer, steps, during_rollout=during_rollout)
    with pytest.raises(Preempted):
        trainer.train()
    trainer.env.close()
    done = steps + (not during_rollout)
    assert trainer.checkpoints.latest().name == f"step-{done:06d}"
    run(run_dir, checkpoint__resume=True)
    assert same_weights(weights(run_dir), weights(undisturbed))
    assert curve(run_dir) == curve(undisturbed)


def test_resume_without_a_checkpoint_starts_and_after_the_last_step_only_scores(tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    first = run(run_dir, checkpoint__resume=True)
    assert same_weights(weights(run_dir), weights(undisturbed))
    again = run(run_dir, checkpoint__resume=True)
    assert again["final"] == first["final"]
    assert curve(run_dir) == curve(undisturbed)


def test_base_scores_and_counters_outlive_a_resume(tmp_path):
    run_dir = tmp_path / "run"
    trainer = Trainer(config(run_dir, eval__score_base=True, checkpoint__every=0))
    stop_after(trainer, 2, during_rollout=True)
    with pytest.raises(Preempted):
        trainer.train()
    trainer.env.close()
    resumed = Trainer(config(run_dir, eval__score_base=True, checkpoint__resume=True))
    start, base = resumed.resume()
    resumed.env.close()
    assert start == 2
    assert base["validation"]["greedy"]["tasks"] == 2
    assert resumed.tokens_trained == trainer.tokens_trained > 0


def test_a_damaged_newest_checkpoint_costs_its_steps_and_nothing_else(tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    trainer = Trainer(config(run_dir, checkpoint__keep_last=5))
    stop_after(trainer, 5, during_rollout=True)
    with pytest.raises(Preempted):
        trainer.train()
    trainer.env.close()
    newest = Checkpointer(run_dir / "checkpoints").paths()[-1]
    shard = next(newest.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.warns(UserWarning, match="damaged checkpoint passed over"):
        run(run_dir, checkpoint__resume=True, checkpoint__keep_last=5)
    assert same_weights(weights(run_dir), weights(undisturbed))
    assert curve(run_dir) == curve(undisturbed)


def test_a_changed_option_is_told_at_resume(tmp_path, capsys):
    run_dir = tmp_path / "run"
    trainer = Trainer(config(run_dir))
    trainer.checkpoint(2, None, wait=True)
    trainer.env.close()
    other = Trainer(config(run_dir, train__learning_rate=0.5, checkpoint__every=9, run__seed=4))
    assert other.resume()[0] == 2
    other.env.close()
    told = capsys.readouterr().out
    assert "another train.learning_rate: 0.5" in told
    assert "another run.seed: 4" in told
    assert "checkpoint" not in told.replace("the checkpoint's", "")


@pytest.mark.timeout(1800)
def test_the_command_line_exits_0_on_sigterm_within_30_seconds_and_resumes(tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "pact_fast.cli", "train", *words(run_dir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and not (run_dir / "metrics.jsonl").exists():
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert time.monotonic() - begin < 30
    assert "go on with --resume" in output
    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=900)
    assert resumed.returncode == 0, resumed.stderr
    assert same_weights(weights(run_dir), weights(undisturbed))
    assert curve(run_dir) == curve(undisturbed)
    assert json.loads((run_dir / "summary.json").read_text())["final"]


def test_a_signal_in_an_interruptible_phase_leaves_it_and_in_any_other_is_kept():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(Preempted), stop.interruptible():
            raise AssertionError("must not be entered")
    with StopSignal() as stop:
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        begin = time.monotonic()
        with pytest.raises(Preempted), stop.interruptible():
            time.sleep(10)
        assert time.monotonic() - begin < 5
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
