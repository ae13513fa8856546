"""Rollouts one step ahead of training: of which weights they are, what corrects them, and that a run that is
stopped anywhere goes on bit for bit.

The server computes in fp64, a row at a time and without a cache: its log-probs, by which the correction
multiplies advantages, are then the same to the last bit in every run.
"""

import copy
import os
import random
import signal
import threading
import time
from collections import Counter
from contextlib import suppress

import pytest
import torch

from pact_fast.config import ConfigError, load_config
from pact_fast.metrics import read_metrics
from pact_fast.rollout import RolloutError
from pact_fast.train.preemption import Preempted
from pact_fast.train.step_metrics import update_metrics
from pact_fast.train.trainer import Trainer
from pact_fast.tree.scoring import sequence_logprobs
from tests.helpers.runs import config, curve, same_weights, tiny_model, weights
from tests.helpers.servers import Misbehaving, ServerProcess, restart_after

REPEATS = int(os.environ.get("PACT_FAULTS", "3"))
CAP = 1.05
CHANGES = {
    "train__max_steps": 7,
    "train__learning_rate": 0.01,
    "eval__every": 3,
    "checkpoint__every": 5,
    "checkpoint__keep_last": 9,
    "rollout__engine": "http",
    "rollout__overlap": True,
    "objective__importance_ratio_cap": CAP,
}
# Two updates a step. Steps 3 and 6 follow an evaluation, step 5 a checkpoint.
STALENESS = [0, 2, 2, 0, 2, 0, 0]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def server(root):
    server = ServerProcess(tiny_model(), root, max_rows=1)
    yield server
    server.close()


def make(run_dir, *urls, **changes):
    trainer = Trainer(config(run_dir, rollout__servers=list(urls), **(CHANGES | changes)))

    def advantages(rewards, turn_rewards, group):
        """An untrained model solves nothing: without these no advantage would differ from 0."""
        return [torch.full((len(turns),), 1.0 - i % group) for i, turns in enumerate(turn_rewards)]

    trainer.schedule.advantages = advantages
    return trainer


def run(trainer):
    try:
        trainer.train()
    finally:
        trainer.env.close()
        trainer.engine.close()


def check_same(run_dir, undisturbed):
    assert same_weights(weights(run_dir), weights(undisturbed))
    assert curve(run_dir) == curve(undisturbed)


class Watch:
    """What a run did: per step its weights before the update, its rollouts, samples before and after scoring;
    when the engine sampled and when the trainer trained."""

    def __init__(self, trainer):
        self.models, self.rollouts, self.scored, self.first_updates = {}, {}, {}, {}
        self.sampling, self.training = [], []
        rollout, score, update = trainer.rollout, trainer.score, trainer.update
        generate = trainer.engine.generate

        def watched_rollout(records, step):
            self.step = step
            self.models[step] = copy.deepcopy(trainer.model)
            self.rollouts[step] = rollout(records, step)
            return self.rollouts[step]

        def watched_score(mini_batches, records, old, gauge):
            before = [(s, s.advantages) for part in mini_batches for s in part if s.is_policy]
            begin = time.monotonic()
            row = score(mini_batches, records, old, gauge)
            self.training.append((self.step, begin, time.monotonic()))
            self.scored[self.step] = [(s, old, s.advantages) for s, old in before]
            return row

        def watched_update(samples, step):
            begin = time.monotonic()
            done = update(samples, step)
            self.training.append((step, begin, time.monotonic()))
            self.first_updates.setdefault(step, update_metrics([done]))
            return done

        def watched_generate(*arguments, **options):
            begin = time.monotonic()
            out = generate(*arguments, **options)
            self.sampling.append((threading.current_thread().name, begin, time.monotonic()))
            return out

        trainer.rollout, trainer.score, trainer.update = watched_rollout, watched_score, watched_update
        trainer.engine.generate = watched_generate


@pytest.fixture(scope="module")
def watched(root, server):
    trainer = make(root / "undisturbed", server.url)
    watch = Watch(trainer)
    run(trainer)
    return watch


@pytest.fixture(scope="module")
def undisturbed(root, watched):
    return root / "undisturbed"


def gap(model, rollouts):
    """Largest difference of a sampled token's log-prob between the engine and these weights."""
    sequences = [r.prompt.ids + r.token_ids for r in rollouts]
    with torch.no_grad():
        scores = sequence_logprobs(model.eval(), sequences, temperature=1.0, token_budget=8192)
    worst = 0.0
    for rollout, score in zip(rollouts, scores, strict=True):
        sampled = torch.tensor(rollout.sampled)
        there = score[len(rollout.prompt) - 1 :][sampled]
        worst = max(worst, float((there - torch.tensor(rollout.logprobs)[sampled]).abs().max()))
    return worst


def test_rollouts_are_of_the_weights_one_step_before_but_after_a_score_or_a_checkpoint(watched, undisturbed):
    rows = [row for row in curve(undisturbed) if "loss" in row]
    assert [row["pact/staleness"] for row in rows] == STALENESS
    for step, stale in enumerate(STALENESS):
        own, before = (gap(watched.models[s], watched.rollouts[step]) for s in (step, max(step - 1, 0)))
        assert (before if stale else own) < 1e-4
        assert not stale or own > 1e-3
    gaps = [row["pact/logprob_mismatch_max"] for row in rows]
    assert all((value > 1e-3) == (stale > 0) for value, stale in zip(gaps, STALENESS, strict=True))


def test_the_next_step_is_sampled_while_this_one_is_trained(watched):
    ahead = [(begin, end) for thread, begin, end in watched.sampling if thread == "overlap"]
    assert len(ahead) < len(watched.sampling)
    for step in (i - 1 for i, stale in enumerate(STALENESS) if stale):
        times = [(begin, end) for s, begin, end in watched.training if s == step]
        both = [(a, b) for a in ahead for b in times if a[0] < b[1] and b[0] < a[1]]
        assert both, f"nothing was sampled while step {step} was trained"


def test_the_correction_weighs_what_older_weights_drew(watched, undisturbed):
    rows = [row for row in curve(undisturbed) if "loss" in row]
    for step, stale in enumerate(STALENESS):
        weights = []
        for sample, before, after in watched.scored[step]:
            live = (sample.policy_weight != 0) & (before != 0)
            weights.append((after / before)[live])
            if sample.prompt_only:  # the trainer's own log-probs, of the weights that are trained, stand here
                ratio = (sample.old_logprobs - sample.engine_logprobs).exp().clamp(max=CAP)
                assert torch.allclose(weights[-1], ratio[live], atol=1e-4)
        weight = torch.cat(weights)
        assert float(weight.max()) <= CAP + 1e-6
        assert (float((weight - 1).abs().max()) > 1e-3) == (stale > 0)
        assert (abs(rows[step]["pact/is_correction"] - 1) > 1e-5) == (stale > 0)
        first = watched.first_updates[step]
        assert abs(first["pact/ppo_kl"]) < 1e-6, "the ratio's old log-probs are those of the current weights"
        assert first["clip_ratio"] == 0


def test_two_runs_are_equal_bit_for_bit(root, server, undisturbed):
    run(make(root / "again", server.url))
    check_same(root / "again", undisturbed)


def test_an_evaluation_under_way_gives_up_what_was_begun_and_the_step_is_sampled_alike(
    root, server, undisturbed
):
    trainer = make(root / "by-hand", server.url)
    trainer.train_step(0)
    trainer.evaluate("validation", 2)  # publishes other weights
    row = trainer.train_step(1)
    trainer.overlap.stop()
    trainer.env.close()
    trainer.engine.close()
    want = next(row for row in curve(undisturbed) if row["step"] == 1)
    assert {name: row[name] for name in want if name != "step"} == {
        k: v for k, v in want.items() if k != "step"
    }


def interrupt(trainer, step, where):
    """SIGTERM in a run: while the rollouts of `step` are waited for, in its update, or while weights are on
    their way to the server."""
    target, name = {
        "wait": (trainer.overlap, "take"),
        "update": (trainer, "update"),
        "publish": (trainer.overlap, "start"),
    }[where]
    real = getattr(target, name)

    def stopping(*arguments):
        if step in arguments or (where == "publish" and arguments == (step + 1,)):
            if where == "publish":
                threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGTERM)).start()
            else:
                os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    setattr(target, name, stopping)


@pytest.mark.parametrize(
    ("step", "where"),
    [(1, "wait"), (2, "publish"), (0, "update"), (3, "update"), (4, "wait")],
)
def test_sigterm_saves_and_the_run_goes_on_bit_for_bit(root, server, undisturbed, tmp_path, step, where):
    run_dir = root / tmp_path.name
    trainer = make(run_dir, server.url)
    interrupt(trainer, step, where)
    with pytest.raises(Preempted):
        run(trainer)
    run(make(run_dir, server.url, checkpoint__resume=True))
    check_same(run_dir, undisturbed)


@pytest.mark.faults
@pytest.mark.timeout(300 + 60 * REPEATS)
def test_sigterm_at_random_moments_loses_nothing(root, server, undisturbed):
    rng, survived, saved = random.Random(), 0, Counter()
    whole = read_metrics(undisturbed)[-1]["time"]
    for attempt in range(REPEATS):
        run_dir = root / f"sigterm-{attempt}"
        trainer = make(run_dir, server.url)
        timer = threading.Timer(rng.uniform(0, whole), os.kill, (os.getpid(), signal.SIGTERM))
        with trainer.stop, suppress(Preempted):
            timer.start()
            run(trainer)
            timer.cancel()  # the run has ended before
            timer.join()
        saved.update([trainer.checkpoints.latest().name])
        run(make(run_dir, server.url, checkpoint__resume=True))
        check_same(run_dir, undisturbed)
        survived += 1
    print(f"SIGTERM, one step ahead: {survived} of {REPEATS} survived; {dict(saved)}")


def test_a_run_killed_after_a_resume_goes_on_from_the_same_checkpoint_once_more(root, server, undisturbed):
    run_dir = root / "twice"
    trainer = make(run_dir, server.url)
    interrupt(trainer, 1, "update")
    with pytest.raises(Preempted):
        run(trainer)
    assert trainer.checkpoints.latest().name == "step-000002"

    class Killed(BaseException):
        pass

    def killed(samples, step):
        if step == 4:
            raise Killed
        return update(samples, step)

    trainer = make(run_dir, server.url, checkpoint__resume=True)
    update, trainer.update = trainer.update, killed
    with pytest.raises(Killed):  # nothing is saved on the way out
        run(trainer)
    run(make(run_dir, server.url, checkpoint__resume=True))
    check_same(run_dir, undisturbed)
    # The newest version, the one before and the one that the checkpoint names.
    assert len(list((run_dir / "weights").iterdir())) <= 3


def test_without_the_weights_that_began_the_rollouts_a_resume_says_so(root, server):
    run_dir = root / "pruned"
    trainer = make(run_dir, server.url)
    interrupt(trainer, 0, "update")
    with pytest.raises(Preempted):
        run(trainer)
    for path in (run_dir / "weights").iterdir():
        path.rename(run_dir / "gone")
    with pytest.warns(UserWarning, match=r"step 1: the weights .* are no longer in .*weights"):
        run(make(run_dir, server.url, checkpoint__resume=True))
    assert [row["pact/staleness"] for row in curve(run_dir) if "loss" in row] == [0, 0, *STALENESS[2:]]


def test_without_any_server_the_run_stops_saved_and_goes_on_bit_for_bit(root, undisturbed):
    run_dir = root / "no-server"
    victim = ServerProcess(tiny_model(), root, max_rows=1)
    trainer = make(run_dir, victim.url, rollout__retry_timeout=0.5)
    update = trainer.update

    def killing(samples, step):
        if step == 1 and victim.process.poll() is None:
            victim.kill()
        return update(samples, step)

    trainer.update = killing
    with pytest.raises(RolloutError, match=r"no server of .* gave an answer .*--resume"):
        run(trainer)
    assert trainer.checkpoints.latest().name == "step-000002"
    victim.start()
    run(make(run_dir, victim.url, checkpoint__resume=True))
    victim.close()
    check_same(run_dir, undisturbed)


@pytest.mark.faults
@pytest.mark.timeout(300 + 60 * REPEATS)
def test_kill_9_of_a_server_at_random_moments_loses_nothing(root, server, undisturbed):
    rng, survived, hit = random.Random(), 0, 0
    proxy = Misbehaving(server.url, None, share=0.0)
    run(make(root / "counted", proxy.url))
    whole = proxy.calls.count("/v1/completions")
    proxy.close()
    victim = ServerProcess(tiny_model(), root, max_rows=1)
    for attempt in range(REPEATS):
        proxy, after = Misbehaving(victim.url, None, share=0.0), rng.randrange(1, whole)
        killer = restart_after(victim, proxy, after)
        trainer = make(root / f"kill-{attempt}", proxy.url)
        run(trainer)
        killer.join()
        hit += trainer.engine.retries > 0
        check_same(root / f"kill-{attempt}", undisturbed)
        survived += 1
        proxy.close()
    victim.close()
    print(
        f"kill -9 of the rollout server, one step ahead: {survived} of {REPEATS} survived; {hit} hit a call"
    )


def test_what_cannot_be_is_refused_with_the_way_out(tmp_path):
    ahead = {"rollout__overlap": True, "objective__importance_ratio_cap": 2.0}
    with pytest.raises(ConfigError, match=r"overlap=true needs rollout.engine=http, not 'in_process'"):
        Trainer(config(tmp_path / "run", **ahead))
    words = ["--rollout.overlap", "true", "--rollout.engine", "http", "--rollout.servers", "[http://x:1]"]
    with pytest.raises(ConfigError, match=r"importance_ratio_cap=None .*ratio_denominator=rollout"):
        load_config(None, words)
    assert load_config(None, [*words, "--objective.ratio_denominator", "rollout"]).rollout.overlap


def test_a_resume_with_other_breaks_says_so(root, server, capsys):
    run_dir = root / "breaks"
    trainer = make(run_dir, server.url)
    trainer.checkpoint(2, None, wait=True)
    other = make(run_dir, server.url, checkpoint__every=4, checkpoint__resume=True)
    assert other.resume()[0] == 2
    for each in (trainer, other):
        each.env.close()
        each.engine.close()
    assert "resumed with another checkpoint.every: 4, the checkpoint's is 5" in capsys.readouterr().out
