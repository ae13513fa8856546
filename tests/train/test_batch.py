"""One call of the loss for a pack's rows of both kinds."""

import dataclasses

import pytest
import torch

from pact_fast.train.batch import pack_losses
from pact_fast.train.step_metrics import pack_metrics
from tests.helpers.trainer_steps import step_samples


def run(trainer, samples, temperature):
    """Loss, flat gradient and metrics of the one pack of these samples."""
    trainer.model.zero_grad()
    (pack,) = list(
        pack_losses(
            trainer.policy,
            samples,
            trainer.config.objective,
            token_budget=1_000_000,
            temperature=temperature,
        )
    )
    pack.loss.backward()
    flat = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    return float(pack.loss.detach()), flat.clone(), pack_metrics(pack)


@pytest.fixture
def step(make_trainer):
    trainer = make_trainer(objective__skip_zero_advantage=False)
    samples, *_ = step_samples(trainer)
    g = torch.Generator().manual_seed(0)
    for sample in samples:
        if sample.is_policy:
            sample.advantages = torch.randn(len(sample.ids), generator=g)
    kinds = [[s for s in samples if s.is_policy], [s for s in samples if not s.is_policy]]
    assert all(kinds)
    return trainer, samples, *kinds


def test_one_call_serves_policy_rows_at_their_temperature_and_trace_rows_at_one(step):
    trainer, samples, rollouts, traces = step
    whole, gradient, metrics = run(trainer, samples, 0.7)
    policy, policy_gradient, policy_metrics = run(trainer, rollouts, 0.7)
    sft, sft_gradient, sft_metrics = run(trainer, traces, 1.0)
    assert whole == pytest.approx(policy + sft, rel=1e-5)
    torch.testing.assert_close(gradient, policy_gradient + sft_gradient, rtol=1e-4, atol=1e-6)
    for name in ("policy_loss", "policy_rows", "entropy", "clipped", "policy_weight"):
        assert metrics[name] == pytest.approx(policy_metrics[name], rel=1e-5), name
    for name in ("sft_loss", "sft_rows", "sft_logprob"):
        assert metrics[name] == pytest.approx(sft_metrics[name], rel=1e-5), name
    assert metrics["rows"] == metrics["policy_rows"] + metrics["sft_rows"]
    assert run(trainer, rollouts, 1.0)[2]["entropy"] != pytest.approx(policy_metrics["entropy"], rel=1e-2)


def test_old_logprobs_are_those_of_their_own_rows_whatever_the_order(step):
    trainer, samples, rollouts, _ = step
    g = torch.Generator().manual_seed(1)
    for sample in rollouts:
        sample.old_logprobs = -torch.rand(len(sample.ids), generator=g)
    forth, back = (run(trainer, s, 1.0) for s in (samples, samples[::-1]))
    assert forth[0] == pytest.approx(back[0], rel=1e-5)
    torch.testing.assert_close(forth[1], back[1], rtol=1e-4, atol=1e-6)
    assert forth[2]["ppo_kl"] == pytest.approx(back[2]["ppo_kl"], rel=1e-5)
    alone = run(trainer, rollouts, 1.0)
    assert forth[2]["ppo_kl"] == pytest.approx(alone[2]["ppo_kl"], rel=1e-5)


def test_rollouts_with_and_without_old_logprobs_do_not_mix(step):
    trainer, samples, rollouts, _ = step
    mixed = [
        dataclasses.replace(s, old_logprobs=torch.zeros(len(s.ids)) if s is rollouts[0] else None)
        for s in samples
    ]
    with pytest.raises(ValueError, match="old_logprobs is missing in a rollout of"):
        run(trainer, mixed, 1.0)
