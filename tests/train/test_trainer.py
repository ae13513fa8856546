"""The loop on a real environment, tokenizer and model: what is scored, under which context, and that nothing
depends on how a batch is laid out."""

import json
from dataclasses import replace

import pytest
import torch

from pact_fast.config import PRESETS
from pact_fast.data.tokens import Component
from pact_fast.train.rollouts import batch_records
from pact_fast.train.trainer import TrainingStopped
from pact_fast.tree.scoring import sequence_logprobs
from tests.helpers.trainer_steps import gradients, step_samples


def assert_same(a, b):
    assert a[0] == pytest.approx(b[0], abs=1e-5)
    assert float((a[1] - b[1]).norm() / b[1].norm()) < 1e-4


def test_tree_and_one_by_one_give_the_same_loss_and_gradient(make_trainer):
    trainer = make_trainer(train__prompts_per_step=4)
    samples, _, _ = step_samples(trainer)
    assert_same(gradients(trainer, samples), gradients(trainer, samples, packing="none"))


def test_loss_and_gradient_do_not_depend_on_packs_or_micro_batches(make_trainer):
    trainer = make_trainer(train__prompts_per_step=4)
    samples, _, _ = step_samples(trainer)
    whole = gradients(trainer, samples)
    assert whole[2] == 1
    counts = set()
    for budget in (1800, 900, 500):
        cut = gradients(trainer, samples, token_budget=budget)
        counts.add(cut[2])
        assert_same(cut, whole)
    assert len(counts) == 3
    assert_same(gradients(trainer, samples, parts=4), whole)
    assert_same(gradients(trainer, samples, parts=4, token_budget=500), whole)


def test_rollouts_of_zero_advantage_leave_the_pass_without_a_trace_in_the_gradient(make_trainer):
    trainer = make_trainer("pact-no-sft")
    records = batch_records(trainer.records, 0, 3, 0)
    rollouts = trainer.rollout(records, 0)
    advantages = [torch.zeros(len(r.turn_rewards)) for r in rollouts]
    for i in (0, 5):
        advantages[i] += 1.0 - 2 * (i == 5)
    samples = trainer.builder.rollout_samples(rollouts, advantages, {r.id: False for r in records}, 1.0, 4)
    kept = [s for s in samples if bool((s.advantages != 0).any())]
    assert len(kept) == 2
    assert_same(gradients(trainer, kept), gradients(trainer, samples))


def test_first_update_after_a_rollout_is_on_policy_and_the_engine_agrees(make_trainer):
    trainer = make_trainer()
    row = trainer.train_step(0)
    assert abs(row["pact/ppo_kl"]) < 1e-6
    assert row["clip_ratio"] == 0.0
    assert row["pact/logprob_mismatch_max"] < 1e-4
    assert row["reward_std"] > 0, "no rollout was better than another: nothing was trained"


@pytest.mark.gpu
def test_a_step_on_a_gpu_is_on_policy_and_the_engine_agrees(make_trainer):
    trainer = make_trainer(run__device="cuda")
    row = trainer.train_step(0)
    assert abs(row["pact/ppo_kl"]) < 1e-6
    assert row["clip_ratio"] == 0.0
    assert row["pact/logprob_mismatch_max"] < 1e-3
    assert row["memory/peak"] > 0


def test_a_stale_policy_is_noticed_by_the_first_update_check(make_trainer):
    trainer = make_trainer()
    samples, _, _ = step_samples(trainer)
    records = {r.id: r for r in trainer.records}
    trainer.score([samples], records, old=True)
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight.mul_(1.01)
    with pytest.raises(TrainingStopped, match="ppo_kl"):
        trainer._check_first_update(trainer.update(samples, 0))


def test_the_ratio_is_taken_under_the_trace_unless_the_prompt_is_anchored(make_trainer):
    trainer = make_trainer(objective__anchor_probability=0.5, train__prompts_per_step=6)
    samples, rollouts, anchored = step_samples(trainer, step=1)
    assert set(anchored.values()) == {True, False}
    records = {r.id: r for r in trainer.records}
    for sample in (s for s in samples if s.is_policy):
        record = records[sample.record_id]
        head = (
            trainer.chat.prompt(record.prompt, record.tools).ids
            if anchored[record.id]
            else trainer.builder.privileged_prompt(record)
        )
        assert sample.ids[: len(head)].tolist() == head
        body = sample.ids[len(head) :].tolist()
        assert any(r.token_ids[: len(body)] == body for r in rollouts if r.record.id == record.id)
    right, swapped = (
        gradients(trainer, part) for part in (samples, [bare(trainer, s, records) for s in samples])
    )
    assert float((swapped[1] - right[1]).norm() / right[1].norm()) > 1e-2


def test_the_rollout_denominator_brakes_tokens_the_trace_has_made_unlikely(make_trainer):
    trainer = make_trainer("pact-no-anchor", objective__ratio_denominator="rollout")
    samples, _, _ = step_samples(trainer)
    by_hand, braked = [], 0
    for sample in samples:
        if not sample.is_policy:
            by_hand.append(sample)
            continue
        assert torch.equal(sample.old_logprobs, sample.engine_logprobs)  # under x, where they were drawn
        with torch.no_grad():
            now = torch.cat([torch.zeros(1), sequence_logprobs(trainer.policy, [sample.ids])[0]])
        ratio, live = (now - sample.engine_logprobs).exp(), sample.policy_weight != 0
        clipped = torch.where(sample.advantages > 0, ratio > 1.2, ratio < 0.8)
        braked += int((clipped & live & (sample.advantages < 0)).sum())
        factor = torch.where(live & ~clipped, ratio, 0.0)
        by_hand.append(replace(sample, advantages=sample.advantages * factor, old_logprobs=None))
    assert braked > 0
    same = (gradients(trainer, part)[1] for part in (samples, by_hand))
    torch.testing.assert_close(*same, rtol=1e-4, atol=1e-6)


def bare(trainer, sample, records):
    """The sample with x in the place of c(x,h)."""
    if not sample.is_policy or sample.prompt_only:
        return sample
    prompt = torch.tensor(trainer.builder.prompt(records[sample.record_id]).ids)
    start, zeros = context_length(trainer, sample, records), torch.zeros(len(prompt))
    return replace(
        sample,
        ids=torch.cat([prompt, sample.ids[start:]]),
        **{
            name: torch.cat([zeros, getattr(sample, name)[start:]])
            for name in ("policy_weight", "advantages", "sft_weight", "engine_logprobs")
        },
    )


def test_trace_gain_compares_the_two_contexts(make_trainer):
    trainer = make_trainer("pact-no-anchor")
    samples, _, _ = step_samples(trainer)
    records = {r.id: r for r in trainer.records}
    row = trainer.score([samples], records, old=True)
    total, count = 0.0, 0
    with torch.no_grad():
        for sample in (s for s in samples if s.is_policy):
            record = records[sample.record_id]
            c, x = trainer.builder.privileged_prompt(record), trainer.builder.prompt(record).ids
            y = sample.ids[len(c) :]
            own = sequence_logprobs(trainer.policy, [sample.ids])[0][len(c) - 1 :]
            bare = sequence_logprobs(trainer.policy, [torch.cat([torch.tensor(x), y])])[0][len(x) - 1 :]
            sampled = sample.policy_weight[len(c) :] != 0
            total += float((own - bare)[sampled].sum())
            count += int(sampled.sum())
    assert row["pact/trace_gain"] == pytest.approx(total / count, abs=1e-5)


def test_tool_responses_are_context_and_never_a_target_nor_a_ratio_term(make_trainer):
    trainer = make_trainer()
    samples, rollouts, _ = step_samples(trainer)
    records = {r.id: r for r in trainer.records}
    bodies = {(r.record.id, tuple(r.token_ids)): r for r in rollouts}
    seen = 0
    for sample in (s for s in samples if not s.is_policy):
        tokens = trainer.builder.trace(records[sample.record_id])
        assert sample.ids.tolist() == tokens.ids[: len(sample.ids)]
        targets = {tokens.components[p] for p in sample.live().tolist()}
        assert targets <= {Component.REASONING, Component.STRUCTURE, Component.TOOL_CALL}
    for sample in (s for s in samples if s.is_policy):
        start = context_length(trainer, sample, records)
        body = sample.ids[start:].tolist()
        rollout = next(
            r
            for (name, ids), r in bodies.items()
            if name == sample.record_id and list(ids[: len(body)]) == body
        )
        live = [p - start for p in sample.live().tolist()]
        assert all(rollout.sampled[p] for p in live)
        assert live == [p for p, sampled in enumerate(rollout.sampled) if sampled]
        seen += sum(not sampled for sampled in rollout.sampled[: len(body)])
    assert seen > 0, "no trained rollout holds a tool response"


def context_length(trainer, sample, records):
    record = records[sample.record_id]
    if sample.prompt_only:
        return len(trainer.builder.prompt(record))
    return len(trainer.builder.privileged_prompt(record))


def test_a_tool_response_is_seen_by_the_tokens_after_it(make_trainer):
    trainer = make_trainer()
    record = next(r for r in trainer.records if any(m["role"] == "tool" for m in r.expert_trace))
    tokens = trainer.builder.trace(record)
    place = tokens.components.index(Component.TOOL_RESPONSE) + 1
    changed = list(tokens.ids)
    changed[place] = changed[place] % 300 + 20
    with torch.no_grad():
        before, after = sequence_logprobs(trainer.policy, [tokens.ids, changed])
    assert torch.allclose(before[: place - 1], after[: place - 1], atol=1e-5)
    assert float((before[place + 2 :] - after[place + 2 :]).abs().max()) > 1e-3


def test_trace_without_observations_shows_no_tool_response(make_trainer):
    trainer = make_trainer("pact-no-observation")
    record = next(r for r in trainer.records if any(m["role"] == "tool" for m in r.expert_trace))
    response = next(m["content"] for m in record.expert_trace if m["role"] == "tool")
    tokens = trainer.builder.trace(record)
    shown = [i for i, c in enumerate(tokens.components) if c == Component.TOOL_RESPONSE]
    assert response.strip() not in trainer.chat.decode([tokens.ids[i] for i in shown])
    with_observations = make_trainer().builder
    assert len(trainer.builder.privileged_prompt(record)) < len(with_observations.privileged_prompt(record))


def test_weights_are_normalised_over_the_whole_update(make_trainer):
    trainer = make_trainer("pact-no-sft", objective__skip_zero_advantage=False)
    samples, _, _ = step_samples(trainer)
    assert sum(float(s.policy_weight.sum()) for s in samples) == pytest.approx(1.0, abs=1e-5)
    trainer = make_trainer("sft")
    strength = trainer.schedule.sft_strength(0.0)
    free = {r.id: False for r in trainer.records}
    traces = trainer.builder.trace_samples(trainer.records[:5], strength, 1.0, free)
    assert sum(float(s.sft_weight.sum()) for s in traces) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains(make_trainer, preset):
    trainer = make_trainer(preset)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    rows = [trainer.train_step(step) for step in (0, 3)]
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    o = trainer.config.objective
    assert ("sft_loss" in rows[0]) == (o.sft_targets != "none")
    assert ("reward" in rows[0]) == (o.rl_context != "none" and o.rl_start == 0)
    if preset == "sft-then-grpo":
        assert "reward" in rows[1]
        assert "sft_loss" not in rows[1]
    if preset == "chord":
        assert [r["pact/sft_coef"] for r in rows] == pytest.approx([0.9, 0.9 - 0.75 * 0.85])


def test_several_updates_per_rollout_use_the_old_logprobs(make_trainer):
    """The loss of every update is that of the definition, with the log-probs from before the step as old."""
    trainer = make_trainer(train__num_iterations=2, train__learning_rate=3e-3)
    real, old, losses = trainer.update, {}, []

    def policy_loss(samples, old_of):
        total, clip = 0.0, trainer.config.objective.epsilon
        with torch.no_grad():
            scored = sequence_logprobs(trainer.policy, [s.ids.tolist() for s in samples])
        for sample, logprobs in zip(samples, scored, strict=True):
            live = sample.live()
            current = logprobs[live - 1]
            ratio = (current - old_of(sample, current)).exp()
            gain = torch.minimum(
                ratio * sample.advantages[live], ratio.clamp(1 - clip, 1 + clip) * sample.advantages[live]
            )
            total -= float((sample.policy_weight[live] * gain).sum())
        return total

    def update(samples, step):
        policy = [s for s in samples if s.is_policy]
        want = policy_loss(policy, lambda s, current: old.setdefault(tuple(s.ids.tolist()), current))
        on_policy = policy_loss(policy, lambda s, current: current)
        out = real(samples, step)
        losses.append((sum(pack.get("policy_loss", 0.0) for pack in out.losses), want, on_policy))
        return out

    trainer.update = update
    trainer.train_step(0)
    (first, want_first, _), (second, want_second, on_policy) = losses
    assert first == pytest.approx(want_first, abs=1e-5)
    assert second == pytest.approx(want_second, abs=1e-5)
    assert abs(want_second - on_policy) > 1e-3  # a loss that takes the current ones as old is another


def test_the_same_seed_trains_the_same_weights(make_trainer):
    runs = []
    for _ in range(2):
        trainer = make_trainer(train__prompts_per_step=2)
        for step in range(2):
            trainer.train_step(step)
        runs.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_non_finite_step_is_skipped_counted_and_stops_after_ten(make_trainer, capsys):
    trainer = make_trainer("component-sft", train__max_skipped_steps=3)
    weight = trainer.model.get_input_embeddings().weight
    good = weight.detach().clone()
    sample = trainer.builder.trace_samples(
        trainer.records[:1], trainer.schedule.sft_strength(0.0), 1.0, {trainer.records[0].id: False}
    )

    def poisoned(times):
        hook = weight.register_hook(lambda grad: grad * float("nan"))
        try:
            return [trainer.update(sample, 0).skipped for _ in range(times)]
        finally:
            hook.remove()

    assert poisoned(2) == [True, True]
    assert trainer.records[0].id in capsys.readouterr().out
    assert torch.equal(weight, good)
    assert not trainer.update(sample, 0).skipped
    good = weight.detach().clone()
    with pytest.raises(TrainingStopped, match="3 updates in a row"):
        poisoned(3)
    assert torch.equal(weight, good)
    assert trainer.skipped_steps == 5


def test_a_whole_run_leaves_its_folder(make_trainer):
    trainer = make_trainer(train__max_steps=2, eval__every=1)
    summary = trainer.train()
    rows = [json.loads(line) for line in (trainer.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {r["step"] for r in rows} == {0, 1, 2}
    scores = [r["eval/solved"] for r in rows if "eval/solved" in r]
    assert len(scores) == 2 + 4
    assert all(0 <= s <= 1 for s in scores)
    assert summary["final"]["test"]["greedy"]["tasks"] == 4
    assert summary["base"]["test"]["sampled"]["tasks"] == 4
    for name in ("summary.json", "transcript.json", "config.json", "model/model.safetensors"):
        assert (trainer.run_dir / name).is_file()
    assert list(trainer.run_dir.rglob("events.out.tfevents*"))
