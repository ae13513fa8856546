"""The optional terms: KL to the policy before training, and the correction of the engine's log-probs."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from pact_fast.config import ConfigError, load_config
from pact_fast.envs.toolbox.base_model import base_model_path
from pact_fast.train.old_logprobs import reference_logprobs
from tests.helpers.trainer_steps import gradients, step_samples

BETA = 0.3


def moved(trainer, by=0.02):
    """Puts the policy away from where it began."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))
    return trainer


def logprobs(model, ids):
    """[L] of ids given those before them, 0 for the first: the model's own attention, all logits."""
    logits = model(ids[None]).logits[0, :-1].float()
    return torch.cat([torch.zeros(1), logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]])


def direct_loss(model, reference, samples):
    """L_rl + beta KL + L_sft, written down once more, sequence by sequence."""
    loss, kl = torch.zeros(()), 0.0
    for sample in samples:
        lp = logprobs(model, sample.ids)
        if sample.is_policy:
            with torch.no_grad():
                ref = logprobs(reference, sample.ids)
            penalty = (ref - lp).exp() - (ref - lp) - 1
            ratio = (lp - lp.detach()).exp()
            loss = loss + (sample.policy_weight * (-ratio * sample.advantages + BETA * penalty)).sum()
            kl += float((sample.policy_weight * penalty).sum())
        loss = loss - (sample.sft_weight * lp).sum()
    return loss, kl


@pytest.mark.parametrize("lora", [0, 4])
def test_the_kl_term_is_the_k3_estimate_against_the_untrained_policy(make_trainer, lora):
    trainer = make_trainer(objective__beta=BETA, lora__rank=lora, train__prompts_per_step=2)
    samples, _, _ = step_samples(moved(trainer, 0.012 if lora else 0.02))
    untrained = AutoModelForCausalLM.from_pretrained(base_model_path()).float()
    chosen = [s for s in samples if s.is_policy]
    found = reference_logprobs(trainer.reference, chosen, temperature=1.0, token_budget=100_000)
    for sample, ref_logprobs in zip(chosen, found, strict=True):
        sample.ref_logprobs = ref_logprobs
    trainer.model.zero_grad()
    expected, kl = direct_loss(trainer.model, untrained, samples)
    expected.backward()
    wanted = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    assert kl > 1e-3, "the policy has not moved"
    loss, got, _ = gradients(trainer, samples)
    assert loss == pytest.approx(float(expected), abs=1e-5, rel=1e-5)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-4
    for sample in samples:
        sample.ref_logprobs = None if sample.ref_logprobs is None else sample.ref_logprobs * 0 - 1.0
    assert abs(gradients(trainer, samples)[0] - loss) > 1e-3, "the reference's log-probs must matter"


def test_kl_is_zero_at_the_first_step_and_grows(make_trainer):
    trainer = make_trainer(objective__beta=0.001, train__prompts_per_step=2, train__learning_rate=0.003)
    before = {name: p.clone() for name, p in trainer.reference.policy.model.named_parameters()}
    rows = [trainer.train_step(step) for step in range(2)]
    assert abs(rows[0]["kl"]) < 1e-6
    assert rows[1]["kl"] > 1e-5
    assert all(torch.equal(before[name], p) for name, p in trainer.reference.policy.model.named_parameters())


@pytest.mark.parametrize("cap", [1.1, 100.0])
def test_every_sampled_token_is_weighted_by_trainer_over_engine_capped(make_trainer, cap):
    trainer = make_trainer(train__prompts_per_step=6, objective__importance_ratio_cap=cap)
    samples, _, anchored = step_samples(trainer)
    assert set(anchored.values()) == {False} or len(set(anchored.values())) == 2
    records = {r.id: r for r in trainer.records}
    torch.manual_seed(0)
    for sample in (s for s in samples if s.is_policy):
        sample.engine_logprobs = sample.engine_logprobs + 0.3 * torch.randn(len(sample.ids))
    before = [s.advantages.clone() for s in samples]
    row = trainer.score([samples], records, old=True)
    seen = []
    for sample, advantages in zip(samples, before, strict=True):
        if not sample.is_policy:
            continue
        record = records[sample.record_id]
        prompt = torch.tensor(trainer.builder.prompt(record).ids)
        head = len(prompt) if sample.prompt_only else len(trainer.builder.privileged_prompt(record))
        with torch.no_grad():  # prompt-only, also where the ratio is under the trace
            own = logprobs(trainer.model, torch.cat([prompt, sample.ids[head:]]))[len(prompt) :]
        weight = (own - sample.engine_logprobs[head:]).exp().clamp(max=cap)
        sampled = sample.policy_weight[head:] != 0
        wanted = torch.where(sampled, advantages[head:] * weight, advantages[head:])
        assert torch.allclose(sample.advantages[head:], wanted, atol=1e-4)
        assert torch.equal(sample.advantages[:head], advantages[:head])
        seen.append(weight[sampled])
    weights = torch.cat(seen)
    assert row["pact/is_correction"] == pytest.approx(float(weights.mean()), abs=1e-4)
    assert bool((weights == cap).any()) == (cap == 1.1)


def test_an_engine_that_agrees_needs_no_correction_and_it_is_off_by_default(make_trainer):
    row = make_trainer(objective__importance_ratio_cap=2.0).train_step(0)
    assert row["pact/is_correction"] == pytest.approx(1.0, abs=1e-4)
    assert "pact/is_correction" not in make_trainer().train_step(0)


@pytest.mark.parametrize("key", ["objective.beta", "objective.importance_ratio_cap"])
def test_coefficients_out_of_range_are_refused(key):
    with pytest.raises(ConfigError, match=key):
        load_config(None, [f"--{key}", "-1"])
