"""Distillation from privileged contexts on real steps: the shared pass against separate forwards, teachers,
and that every preset goes the way its loss says."""

import math

import pytest
import torch

from pact_fast.envs.base import Outcome
from pact_fast.objective import (
    token_gaps,
)
from pact_fast.rollout import Rollout
from pact_fast.train.batch import pack_losses
from pact_fast.train.forwards import plan_forwards
from pact_fast.train.old_logprobs import score_gaps
from pact_fast.tree.packing import pack_tree, plan_packs
from tests.helpers.runs import config, curve, same_weights, tiny_experts, weights

RELATIVES = ("sdft", "opsd-sampled", "opsd", "sdpo", "sdar", "pi-distill", "rlcsd")
# -- one pass against separate forwards ----------------------------------------------------------------


def drawn(trainer, step=0):
    """Samples of one real step, before and after what the scoring passes change in them."""
    records = trainer.sampler.records(step)
    rollouts = trainer.rollout(records, step)
    free = {r.id: False for r in records}
    samples = [s for part in trainer.mini_batches(records, rollouts, free, None, 0.5) for s in part]
    trainer.score([samples], {r.id: r for r in records}, old=False)
    return samples


def step_loss(trainer, samples, **keys):
    """Loss, gradient, packed tokens."""
    trainer.model.zero_grad()
    loss, tokens = 0.0, 0
    budget = keys.pop("token_budget", 1_000_000)
    o = trainer.config.objective
    for pack in pack_losses(trainer.policy, samples, o, token_budget=budget, teacher=trainer.teacher, **keys):
        pack.loss.backward()
        loss, tokens = loss + float(pack.loss.detach()), tokens + pack.num_tokens
    flat = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    return loss, flat.clone(), tokens


def separate(trainer, samples, kind, temperature=1.0):
    """The divergence once more: every sequence alone, all logits, the model's own attention."""
    o = trainer.config.objective
    read = trainer.teacher.policy.model if trainer.teacher is not None else trainer.model
    loss = torch.zeros(())
    for sample in samples:
        rows = sample.distilled()
        student = (trainer.model(sample.ids[None]).logits[0, rows - 1] / temperature).log_softmax(-1)
        with torch.no_grad():
            shift = len(sample.teacher_ids) - len(sample.ids)
            logits = read(sample.teacher_ids[None]).logits[0, rows - 1 + shift]
            teacher = (logits / temperature).log_softmax(-1)
        if o.distillation_topk is not None and o.distillation_topk < teacher.shape[-1]:
            top = teacher.topk(o.distillation_topk).indices
            student, teacher = (
                torch.cat([p.gather(-1, top), torch.log1p(-p.gather(-1, top).exp().sum(-1, True))], -1)
                for p in (student, teacher)
            )
        p, q = student.exp(), teacher.exp()
        if kind == "reverse_kl":
            d = (p * (student - teacher)).sum(-1)
        elif kind == "forward_kl":
            d = (q * (teacher - student)).sum(-1)
        else:
            m = (0.5 * q + 0.5 * p).log()
            d = 0.5 * (q * (teacher - m)).sum(-1) + 0.5 * (p * (student - m)).sum(-1)
        if o.distillation_clip is not None:
            d = d.clamp(max=o.distillation_clip)
        loss = loss + (sample.distill_weight[rows] * d).sum()
    return loss


CASES = [
    {"distillation": "reverse_kl"},
    {"distillation": "forward_kl", "distillation_clip": 0.02},
    {"distillation": "jsd", "teacher": "frozen"},
    {"distillation": "jsd", "distillation_topk": 5, "teacher": "ema"},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_loss_and_gradient_equal_those_of_separate_forwards(make_trainer, case):
    keys = {f"objective__{name}": value for name, value in ({"teacher": "live"} | case).items()}
    trainer = make_trainer("opsd", train__prompts_per_step=2, **keys)
    samples = drawn(trainer)
    torch.manual_seed(0)
    for policy in filter(None, (trainer.policy, trainer.teacher and trainer.teacher.policy)):
        policy.model.double()
    with torch.no_grad():  # away from the teacher, where there is another one
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    trainer.model.zero_grad()
    expected = separate(trainer, samples, case["distillation"])
    expected.backward()
    wanted = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    assert float(expected.detach()) > 1e-3
    for keys in ({}, {"token_budget": 700}, {"packing": "none"}):
        loss, gradient, _ = step_loss(trainer, samples, **keys)
        assert loss == pytest.approx(float(expected.detach()), rel=1e-5), keys
        assert float((gradient - wanted).norm() / wanted.norm()) < 1e-5, keys


def test_routers_balance_the_samples_alone_whatever_the_packs(make_trainer):
    """The load-balancing loss of experts is of the update's own tokens; those a teacher reads beside them
    do not count, so packs and budgets change nothing."""
    trainer = make_trainer("opsd", model__path=tiny_experts(), objective__teacher="live")
    samples = drawn(trainer)
    trainer.model.train()
    whole, gradient, _ = step_loss(trainer, samples)
    for keys in ({"token_budget": 500}, {"packing": "none"}):
        loss, other, _ = step_loss(trainer, samples, **keys)
        assert loss == pytest.approx(whole, rel=1e-5), keys
        assert float((other - gradient).norm() / gradient.norm()) < 1e-4, keys


def test_x_and_c_of_all_rollouts_are_one_tree(make_trainer):
    """x + h + 2 G y tokens go through the model with a live teacher, each once; x + G y and, in a second
    forward, x + h + G y with another one."""
    for teacher in ("live", "frozen"):
        trainer = make_trainer("opsd", train__prompts_per_step=1, objective__teacher=teacher)
        (of,) = trainer.sampler.records(0)
        x, c = trainer.builder.prompt(of).ids, trainer.builder.privileged_prompt(of)
        h, rollouts = len(c) - len(x), []
        for k in range(4):  # as long as each other, and no two begin alike
            made = Rollout(of, trainer.builder.prompt(of))
            made.add_sampled([30 + k] * 7, [-1.0] * 7, 0)
            made.outcome, made.turn_rewards = Outcome(0.0, False), [0.0]
            rollouts.append(made)
        samples = trainer.mini_batches([of], rollouts, {of.id: False}, None, 0.0)[0]
        seen = []
        real = type(trainer.policy).hidden

        def hidden(self, pack, seen=seen, real=real):
            seen.append((pack.num_tokens, torch.is_grad_enabled()))
            return real(self, pack)

        for policy in {
            id(p): p for p in (trainer.policy, trainer.teacher and trainer.teacher.policy) if p
        }.values():
            policy.hidden = hidden.__get__(policy)
        step_loss(trainer, samples)
        if teacher == "live":
            assert seen == [(len(x) + h + 2 * 4 * 7, True)]
        else:
            assert seen == [(len(x) + 4 * 7, True), (len(x) + h + 4 * 7, False)]


def test_gaps_equal_separate_log_probs(make_trainer):
    trainer = make_trainer("rlcsd", train__prompts_per_step=3, objective__privileged="trace")
    records = trainer.sampler.records(0)
    rollouts = trainer.rollout(records, 0)
    free = {r.id: False for r in records}
    samples = [s for part in trainer.mini_batches(records, rollouts, free, None, 0.5) for s in part]
    assert any(s.contexts.wrong for s in samples)
    torch.manual_seed(0)
    trainer.model.double()
    trainer.teacher.policy.model.double()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))

    def logprobs(model, ids, count):
        with torch.no_grad():
            return model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[-count:, 0]

    keys = {"contrast": True, "gauge": True, "temperature": 1.0, "token_budget": 100_000}
    for teacher in (trainer.teacher, None):
        model = trainer.model if teacher is None else teacher.policy.model
        found = score_gaps(trainer.policy, samples, teacher=teacher, **keys)
        for sample, gaps in zip(samples, found, strict=True):
            n = len(sample.ids) - sample.start
            right = logprobs(model, sample.teacher_ids, n)
            wrong = [logprobs(model, sample.under(ids), n) for ids in sample.contexts.wrong]
            expected = token_gaps(right, None, wrong) if wrong else torch.zeros(n)
            torch.testing.assert_close(gaps.gaps, expected, rtol=0, atol=1e-5, check_dtype=False)
            torch.testing.assert_close(
                gaps.prompt_only,
                logprobs(trainer.model, sample.ids, n),
                rtol=0,
                atol=1e-5,
                check_dtype=False,
            )


def test_student_and_teacher_of_a_rollout_are_planned_into_one_pack(make_trainer):
    trainer = make_trainer("sdar", train__prompts_per_step=3)
    samples = drawn(trainer)
    plan, streamed = plan_forwards(trainer.policy.family, samples, 500)
    assert not streamed
    assert sorted(i for pack in plan for i in pack) == list(range(len(samples)))
    assert len(plan) > 1
    for pack in plan:
        tokens = pack_tree([samples[i].ids for i in pack] + [samples[i].teacher_ids for i in pack]).num_tokens
        assert tokens <= 500 or len(pack) == 1
    with pytest.raises(ValueError, match=r"train.prefix=stream: distributions are not distilled"):
        plan_forwards(trainer.policy.family, samples, 500, prefix="stream")


def test_partners_count_in_a_pack():
    """Two sequences of 4 tokens with partners of 5 that share their first 2: 7 tokens each, 2 of them shared
    with the other's; a budget of 11 holds one pair only, of 12 both."""
    sequences, partners = [[1, 2, 3, 3], [1, 2, 4, 4]], [[1, 2, 5, 6, 7], [1, 2, 8, 8, 8]]
    assert plan_packs(sequences, 12, partners=partners) == [[0, 1]]
    assert sorted(plan_packs(sequences, 11, partners=partners)) == [[0], [1]]
    assert plan_packs(sequences, 11, partners=[None, None]) == [[0, 1]]


# -- teachers ------------------------------------------------------------------------------------------


def test_an_average_follows_the_weights_when_it_is_due(make_trainer):
    """Rate 0.25, every second step: after steps 0, 1: 0.75 old + 0.25 new; after step 2: as it was."""
    trainer = make_trainer("sdpo", objective__teacher_update_rate=0.25, objective__teacher_sync_steps=2)
    name, mine = next(iter(trainer.teacher.policy.model.named_parameters()))
    trained = dict(trainer.model.named_parameters())[name]
    before = mine.clone()
    with torch.no_grad():
        trained.add_(1.0)
    trainer.teacher.follow(trainer.model, 0)
    assert torch.equal(mine, before)
    trainer.teacher.follow(trainer.model, 1)
    torch.testing.assert_close(mine, 0.75 * before + 0.25 * trained)
    once = mine.clone()
    trainer.teacher.follow(trainer.model, 2)
    assert torch.equal(mine, once)


def test_a_frozen_teacher_of_adapters_is_the_model_without_them(make_trainer):
    trainer = make_trainer("opsd", lora__rank=4, train__prompts_per_step=2)
    assert trainer.teacher.policy is trainer.policy
    samples = drawn(trainer)
    before = step_loss(trainer, samples)[0]
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    with trainer.teacher.reading():
        again = trainer.teacher.policy.hidden(pack_tree([samples[0].teacher_ids]))
    trained = trainer.policy.hidden(pack_tree([samples[0].teacher_ids]))
    assert not torch.allclose(again, trained, atol=1e-3)
    assert abs(step_loss(trainer, samples)[0] - before) > 1e-4, "the adapters must matter to the student"


def test_a_resumed_run_has_its_average_back(tmp_path):
    """Bit for bit: stopped after 3 of 6 steps, the teacher's weights come from the checkpoint."""
    from pact_fast.train.trainer import Trainer

    def run(folder, steps, **more):
        keys = {"train__max_steps": steps, "train__lr_scheduler_type": "constant", "eval__every": 0}
        keys |= {"objective__teacher_update_rate": 0.5, "checkpoint__every": 3, "train__learning_rate": 3e-3}
        trainer = Trainer(config(folder, "sdpo", **keys, **more))
        trainer.train()
        trainer.env.close()
        return trainer

    run(tmp_path / "whole", 6)
    run(tmp_path / "cut", 3)
    resumed = run(tmp_path / "cut", 6, checkpoint__resume=True)
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert curve(tmp_path / "whole") == curve(tmp_path / "cut")
    mine = dict(resumed.teacher.policy.model.named_parameters())
    assert any(not torch.equal(p, mine[n]) for n, p in resumed.model.named_parameters())


# -- training ------------------------------------------------------------------------------------------


def moved(trainer, samples, o):
    """What the loss of these samples asks for, smaller is better: minus the advantage-weighted log-probs of
    the policy terms, and the divergences."""
    total = 0.0
    with torch.no_grad():
        for pack in pack_losses(trainer.policy, samples, o, token_budget=1_000_000, teacher=trainer.teacher):
            if pack.distill_loss is not None:
                total += float(pack.distill_loss)
            if pack.output is not None:
                rows = torch.cat([s.policy_weight[s.live()] * s.advantages[s.live()] for s in pack.samples])
                total -= float((rows * pack.output.logprobs).sum())
    return total


@pytest.mark.parametrize("preset", RELATIVES)
def test_every_preset_trains_20_steps_and_goes_the_way_of_its_loss(make_trainer, preset):
    trainer = make_trainer(
        preset, train__learning_rate=1e-3, train__prompts_per_step=4, eval__gauge_every=5, train__max_steps=20
    )
    samples = next(filter(None, (drawn(trainer, step) for step in range(20))))
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    before = moved(trainer, samples, trainer.config.objective)
    for _ in range(3):
        assert not trainer.update(samples, 0).skipped
    assert moved(trainer, samples, trainer.config.objective) < before
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            parameter.copy_(start[name])
    trainer.engine.weights_changed()
    rows = [trainer.train_step(step) for step in range(20)]
    assert rows[-1]["pact/skipped_steps"] == 0
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert any(not torch.equal(start[n], p) for n, p in trainer.model.named_parameters())
    assert 0 <= rows[0]["pact/context_share"] <= 1
    assert "pact/context_words" in rows[0] or rows[0]["pact/context_share"] == 0
