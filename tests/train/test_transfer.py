"""The gauge of transfer: gradients under c and under x, taken once more here, parameter by parameter."""

import pytest
import torch

from pact_fast.train.transfer import context_transfer
from pact_fast.tree.scoring import sequence_logprobs
from tests.helpers.trainer_steps import step_samples


def direct_gradient(trainer, samples, records, *, under, keep):
    """- sum w A grad log pi(y | context), token by token; keep(gain, advantage) chooses tokens."""
    trainer.model.zero_grad()
    for sample in samples:
        of = records[sample.record_id]
        x, c = trainer.builder.prompt(of).ids, trainer.builder.privileged_prompt(of)
        body = sample.ids[len(c) :].tolist()
        logprobs = {
            name: sequence_logprobs(trainer.policy, [context + body])[0][len(context) - 1 :]
            for name, context in (("x", x), ("c", c))
        }
        gain = (logprobs["c"] - logprobs["x"]).detach()
        advantage, weight = sample.advantages[len(c) :], sample.policy_weight[len(c) :]
        chosen = keep(gain, advantage)
        if chosen.any():
            (-(weight * advantage * logprobs[under])[chosen].sum()).backward()
    found = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    trainer.model.zero_grad()
    return found


PARTS = {
    "all": lambda gain, advantage: torch.ones_like(gain, dtype=torch.bool),
    "negative": lambda gain, advantage: advantage < 0,
    "agree": lambda gain, advantage: gain >= 0,
    "positive depart": lambda gain, advantage: (advantage > 0) & (gain < 0),
}


def test_the_cosines_are_those_of_the_two_gradients(make_trainer):
    trainer = make_trainer("pact-no-sft")
    samples, _, _ = step_samples(trainer)
    records = {r.id: r for r in trainer.records}
    found = context_transfer(
        trainer.policy, trainer.builder, samples, records, temperature=1.0, token_budget=100_000
    )
    assert found.tokens["all"] == sum(len(s.live()) for s in samples if bool((s.advantages != 0).any()))
    for name, keep in PARTS.items():
        of_c, of_x = (
            direct_gradient(trainer, samples, records, under=under, keep=keep) for under in ("c", "x")
        )
        assert found.parts[name] == pytest.approx(float(torch.cosine_similarity(of_c, of_x, 0)), abs=2e-3)
        assert found.ratios[name] == pytest.approx(float(of_c.norm() / of_x.norm()), rel=2e-3)
    assert set(found.layers) >= {"embeddings", "layer 0", "layer 3"}
    assert all(-1.0 <= value <= 1.0 for value in found.layers.values())


def test_under_the_same_context_transfer_is_whole(make_trainer):
    """A trace without words, calls or responses still adds its headers; with no trace at all, c = x and the
    cosine is 1."""
    trainer = make_trainer("pact-no-sft")
    samples, _, _ = step_samples(trainer)
    records = {r.id: r for r in trainer.records}
    bare = [trainer.builder.prompt(records[s.record_id]).ids for s in samples]
    for sample, x in zip(samples, bare, strict=True):
        start, sample.start = sample.start, len(x)
        for name in ("ids", "policy_weight", "advantages", "sft_weight", "engine_logprobs"):
            head = torch.tensor(x) if name == "ids" else torch.zeros(len(x))
            setattr(sample, name, torch.cat([head, getattr(sample, name)[start:]]))
    found = context_transfer(
        trainer.policy, trainer.builder, samples, records, temperature=1.0, token_budget=100_000
    )
    assert found.parts["all"] == pytest.approx(1.0, abs=1e-5)
    assert found.ratios["all"] == pytest.approx(1.0, abs=1e-5)


def test_the_gauge_is_off_by_default_and_leaves_the_step_as_it_is(make_trainer):
    runs = []
    for every in (0, 1):
        trainer = make_trainer("pact-no-anchor", eval__transfer_every=every)
        row = trainer.train_step(0)
        runs.append([p.detach().clone() for p in trainer.model.parameters()])
        assert ("pact/context_transfer" in row) == bool(every)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert -1.0 <= row["pact/context_transfer_negative"] <= 1.0
    assert row["pact/trace_gain_positive"] != row["pact/trace_gain_negative"]
    assert make_trainer("matchtir").config.eval.transfer_every == 0


def test_without_rollouts_under_the_trace_there_is_nothing_to_measure(make_trainer):
    trainer = make_trainer("matchtir", eval__transfer_every=1)
    assert not any("context_transfer" in name for name in trainer.train_step(0))
