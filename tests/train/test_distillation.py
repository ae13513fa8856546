"""Learning from privileged contexts: formulas and weights by hand, the shared pass against separate forwards,
sources of contexts, teachers, and that every preset goes the way its loss says."""

import math

import pytest
import torch
from transformers import AutoTokenizer

from pact_fast.config import ConfigError, load_config
from pact_fast.data.chat import ChatFormat
from pact_fast.data.records import Record
from pact_fast.envs.base import Outcome, feedback_of
from pact_fast.envs.toolbox.base_model import base_model_path
from pact_fast.objective import (
    PRESETS,
    ObjectiveConfig,
    distillation_strength,
    shaped_advantages,
    token_gaps,
)
from pact_fast.rollout import Rollout
from pact_fast.train.batch import pack_losses
from pact_fast.train.forwards import plan_forwards
from pact_fast.train.old_logprobs import TokenGaps, score_gaps
from pact_fast.train.samples import SampleBuilder
from pact_fast.train.score import learn_from_gaps
from pact_fast.tree.packing import pack_tree, plan_packs
from tests.helpers.runs import config, curve, same_weights, tiny_experts, weights

RELATIVES = ("sdft", "opsd-sampled", "opsd", "sdpo", "sdar", "pi-distill", "rlcsd")
TRACE = (
    {"role": "assistant", "content": "", "tool_calls": [{"name": "person", "arguments": {"name": "Mora"}}]},
    {"role": "tool", "name": "person", "content": '"Tila"'},
)
TOOLS = (
    {"type": "function", "function": {"name": "person", "description": "", "parameters": {"properties": {}}}},
)


@pytest.fixture(scope="module")
def chat():
    return ChatFormat.for_tokenizer(AutoTokenizer.from_pretrained(base_model_path()))


def record(name="one", trace=TRACE, **env):
    return Record(name, ({"role": "user", "content": "Who is the boss?"},), TOOLS, trace, env, "tasks.jsonl")


def objective(preset="pact", **keys):
    return ObjectiveConfig(**{**PRESETS[preset], **keys})


def rollout(chat, of, turns, *, solved=False, reward=None):
    """`turns`: the sampled ids of each turn; a token of a tool response (9) stands between two."""
    made = Rollout(of, chat.prompt(of.prompt, of.tools))
    for turn, ids in enumerate(turns):
        made.add_sampled(ids, [-0.5] * len(ids), turn)
        if turn + 1 < len(turns):
            made._add([9], False, [0.0], turn)
    made.outcome = Outcome(float(solved) if reward is None else reward, solved)
    return made


# -- formulas ----------------------------------------------------------------------------------------


def test_a_gap_is_to_x_or_to_the_mean_probability_under_wrong_contexts():
    """log 0.6 - log 0.3 = log 2. Wrong contexts: 0.1 and 0.3, on average 0.2: log 0.6 - log 0.2 = log 3."""
    right, x = torch.tensor([0.6]).log(), torch.tensor([0.3]).log()
    wrong = [torch.tensor([0.1]).log(), torch.tensor([0.3]).log()]
    assert float(token_gaps(right, x, [])) == pytest.approx(math.log(2), abs=1e-6)
    assert float(token_gaps(right, None, wrong)) == pytest.approx(math.log(3), abs=1e-6)


def test_sampled_adds_the_gap_and_the_gate_scales_it():
    """A 1, gap -0.4, weight 0.5: 1 - 0.2 = 0.8. With a gate of beta 5: sigmoid(-2) = 0.1192, 1 - 0.0238."""
    o = objective("sdft", distillation_weight=0.5)
    advantage, gap = torch.tensor([1.0]), torch.tensor([-0.4])
    assert float(shaped_advantages(advantage, gap, o)) == pytest.approx(0.8)
    gated = objective("sdft", distillation_weight=0.5, distillation_gate=5.0)
    assert float(distillation_strength(gap, gated)) == pytest.approx(0.5 * 0.1192029, abs=1e-6)
    assert float(shaped_advantages(advantage, gap, gated)) == pytest.approx(1 - 0.0238406, abs=1e-6)


def test_modulate_moves_the_advantage_and_never_past_zero():
    """tanh(0.02 / 0.02) = 0.7616, times 0.5: 0.3808. A 1: 1.3808 up, 0.6192 down; A 0.2 down: cut at 0; A
    -0.2 up: cut at 0; A 0 stays."""
    o = objective("rlcsd")
    advantages = torch.tensor([1.0, 1.0, 0.2, -0.2, 0.0])
    gaps = torch.tensor([0.02, -0.02, -0.02, 0.02, 0.02])
    found = shaped_advantages(advantages, gaps, o)
    assert found.tolist() == pytest.approx([1.3807971, 0.6192029, 0.0, 0.0, 0.0], abs=1e-6)


def test_divergences_leave_the_advantages_as_they_are():
    gaps, advantages = torch.tensor([0.7]), torch.tensor([0.3])
    assert torch.equal(shaped_advantages(advantages, gaps, objective("sdar")), advantages)


# -- weights of each preset on a hand-made batch --------------------------------------------------------


# preset: samples of a rollout, weights of a token's policy term and of its divergence, A after gaps of 0.1
HAND = {
    "sdft": (1, [1 / 8], None, [0.1, 0.1]),
    "opsd-sampled": (1, [1 / 8], None, [0.1, 0.1]),
    "opsd": (1, [0.0], 1 / 8, [0.0, 0.0]),
    "sdpo": (1, [0.0], 1 / 8, [0.0, 0.0]),
    # sigmoid(5 0.1) = 0.6224593, times lambda 0.01
    "sdar": (1, [1 / 8], 0.006224593 / 8, [0.7071068, -0.7071068]),
    "pi-distill": (2, [1 / 16, 1 / 16], None, [0.7071068, -0.7071068]),
    # 0.5 tanh(0.1 / 0.02) = 0.49995; the failed one keeps its sign: -0.7071 + 0.49995
    "rlcsd": (1, [1 / 8], None, [0.7071068 + 0.4999546, -0.7071068 + 0.4999546]),
    "grpo": (1, [1 / 8], None, [0.7071068, -0.7071068]),
}


@pytest.mark.parametrize("preset", HAND)
def test_weights_of_a_hand_made_batch(chat, preset):
    """One prompt, two rollouts of two turns, 2 + 2 sampled tokens each: every token weighs 1/8 of its prompt.
    Rewards 1 and 0: A = 0.5 / 0.7071 = 0.7071 and -0.7071."""
    o = objective(preset)
    built = SampleBuilder(chat, o, 64)
    two = [
        rollout(chat, record(), [[30, 31], [32, 33]], solved=True),
        rollout(chat, record(), [[40, 41], [42, 43]]),
    ]
    advantages = [o.reward_weight * torch.full((2,), sign * 0.7071068) for sign in (1, -1)]
    samples = built.rollout_samples(two, advantages, {"one": False}, 1.0, 2)
    count, policy, distilled, values = HAND[preset]
    solved_peer = 1 if preset in ("sdpo", "rlcsd") else 2  # the solved one has no solved peer
    assert len(samples) == 2 * count
    for number, (weight, sample) in enumerate(zip(policy * 2, samples, strict=True)):
        assert sample.policy_weight[sample.start :].tolist() == pytest.approx(
            [weight, weight, 0, weight, weight], abs=1e-9
        )
        if sample.contexts is not None:
            n = len(sample.ids) - sample.start
            gaps = torch.full((n,), 0.1)
            learn_from_gaps(sample, TokenGaps(gaps, gaps, None, None, gaps > 0), o)
        expected = values[number // count]
        if preset == "rlcsd" and number == 0:
            expected = 0.7071068  # without a solved peer there is no c, and the reward alone is left
        assert sample.advantages[sample.start].item() == pytest.approx(expected, abs=1e-6)
        if distilled is not None and not (solved_peer == 1 and number == 0):
            assert sample.distill_weight[sample.start :].tolist() == pytest.approx(
                [distilled, distilled, 0, distilled, distilled], abs=1e-8
            )
    if preset == "pi-distill":
        assert [s.prompt_only for s in samples] == [False, True, False, True]
    else:
        assert all(s.prompt_only for s in samples)


# -- sources of contexts -------------------------------------------------------------------------------


def test_a_peer_is_the_best_solved_other_rollout_up_to_its_last_turn(chat):
    one = record()
    built = SampleBuilder(chat, objective("sdpo"), 64)
    group = [
        rollout(chat, one, [[30], [31]], solved=True, reward=0.7),
        rollout(chat, one, [[40, 41], [42]], solved=True, reward=0.9),
        rollout(chat, one, [[50]], solved=True, reward=1.0),  # answered at once: it shows nothing
        rollout(chat, one, [[60], [61]]),
    ]
    x = chat.prompt(one.prompt, one.tools).ids
    found = built.contexts.of(group, 4)
    assert [c.source for c in found] == ["peer"] * 4
    assert [c.right for c in found] == [[*x, 40, 41, 9], [*x, 30, 9], [*x, 40, 41, 9], [*x, 40, 41, 9]]
    # They are branches of the tree already: not one token more than the rollouts under x and under c.
    tree = pack_tree([torch.tensor([*x, *r.token_ids]) for r in group]).num_tokens
    c_and_y = [torch.tensor([*c.right, *r.token_ids]) for c, r in zip(found, group, strict=True)]
    both = pack_tree([torch.tensor([*x, *r.token_ids]) for r in group] + c_and_y).num_tokens
    assert both <= tree + sum(len(r.token_ids) for r in group)


def test_feedback_stands_in_where_no_peer_has_solved_the_task(chat):
    one = record()
    built = SampleBuilder(chat, objective("sdpo"), 64)
    failed = [rollout(chat, one, [[30], [31]]), rollout(chat, one, [[40]])]
    failed[0].outcome = Outcome(0.0, False, failure="tool_error")
    failed[1].outcome = Outcome(
        0.0, False, failure="wrong_answer", feedback="The sum is off by 2.<tool_call>"
    )
    found = built.contexts.of(failed, 2)
    assert [c.source for c in found] == ["feedback"] * 2
    assert feedback_of(failed[0].outcome) in chat.decode(found[0].right)
    assert "The sum is off by 2." in chat.decode(found[1].right)
    plain = chat.prompt(one.prompt, one.tools, note="x").ids
    assert len(set(chat.stop_token_ids) & set(found[1].right)) == len(set(chat.stop_token_ids) & set(plain))


def test_a_hint_is_a_text_of_the_record_and_anything_else_is_named(chat):
    built = SampleBuilder(chat, objective("opsd", privileged=["hint", "trace"]), 64)
    hinted, plain = record(hint="Ask for the boss."), record("two")
    found = built.contexts.of([rollout(chat, hinted, [[30]]), rollout(chat, plain, [[30]])], 1)
    assert [c.source for c in found] == ["hint", "trace"]
    assert "Ask for the boss." in chat.decode(found[0].right)
    with pytest.raises(ValueError, match=r"tasks.jsonl: record 'one', field 'hint': 3 is no text"):
        built.contexts.of([rollout(chat, record(hint=3), [[30]])], 1)


def test_wrong_contexts_are_failed_peers_or_the_traces_of_other_prompts(chat):
    one, two = record("one"), record("two")
    group = [rollout(chat, one, [[30], [31]], solved=True), rollout(chat, one, [[40], [41]])]
    group += [rollout(chat, two, [[50], [51]]), rollout(chat, two, [[60], [61]])]
    x = chat.prompt(one.prompt, one.tools).ids
    peers = SampleBuilder(chat, objective("rlcsd"), 64).contexts.of(group, 2)
    assert [c.wrong for c in peers] == [([*x, 40, 9],), (), ([*x, 60, 9],), ([*x, 50, 9],)]
    built = SampleBuilder(chat, objective("rlcsd", contrast="trace", contrast_count=1), 64)
    assert built.contexts.of(group, 2)[0].wrong == (built.context_of(one, two),)


def test_a_context_that_does_not_fit_is_passed_over(chat):
    one = record()
    y = rollout(chat, one, [[30, 31]])
    c = SampleBuilder(chat, objective("opsd"), 64).privileged_prompt(one)
    for limit, source in ((len(c) + 2, "trace"), (len(c) + 1, None)):
        built = SampleBuilder(chat, objective("opsd"), 64, context_length=limit)
        assert built.contexts.of([y], 1)[0].source == source
    built = SampleBuilder(chat, objective("opsd"), 64, max_prompt_length=len(c) - 1)
    assert built.contexts.of([y], 1)[0].right is None
    (sample,) = built.rollout_samples([y], [torch.zeros(1)], {"one": False}, 1.0, 1)
    assert sample.distill_weight is None
    assert sample.contexts is None


def test_pact_takes_the_same_sources(chat):
    """rl_context trace with a solved peer as c: the policy ratio of the failed rollout is under it."""
    one = record()
    group = [rollout(chat, one, [[30], [31]], solved=True), rollout(chat, one, [[40], [41]])]
    built = SampleBuilder(chat, objective("pact", privileged=["peer"]), 64)
    solved, failed = built.rollout_samples(group, [torch.ones(2)] * 2, {"one": False}, 1.0, 2)
    x = chat.prompt(one.prompt, one.tools).ids
    assert solved.prompt_only
    assert not failed.prompt_only
    assert failed.ids.tolist() == [*x, 30, 9, 40, 9, 41]


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


# -- bad values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "words", "message"),
    [
        ("grpo", ["--objective.teacher", "ema"], r"objective.teacher='ema' cannot be used: give live"),
        ("grpo", ["--objective.contrast", "peer"], r"objective.contrast='peer'.*nothing is distilled"),
        ("grpo", ["--objective.reward_weight", "0"], r"objective.reward_weight=0.0"),
        (
            "pact",
            ["--objective.distillation", "sampled"],
            r"objective.distillation='sampled'.*rl_context=trace",
        ),
        ("sft", ["--objective.distillation", "jsd"], r"objective.distillation='jsd'.*rl_context=none"),
        ("opsd", ["--objective.contrast", "peer"], r"objective.contrast='peer'"),
        ("rlcsd", ["--objective.reward_weight", "0"], r"objective.reward_weight=0.0"),
        ("rlcsd", ["--objective.distillation_gate", "5"], r"objective.distillation_gate=5.0"),
        ("rlcsd", ["--rollout.num_generations", "1"], r"rollout.num_generations=1"),
        ("opsd", ["--objective.privileged", "gold"], r"objective.privileged=\['gold'\].*trace, peer"),
        ("opsd", ["--objective.privileged", "hint,hint"], r"each once"),
        ("opsd", ["--train.prefix", "stream"], r"train.prefix='stream'.*give auto"),
        ("opsd", ["--objective.distillation_topk", "0"], r"objective.distillation_topk=0"),
    ],
)
def test_values_that_do_not_go_together_are_named(preset, words, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, ["--preset", preset, *words])


def test_presets_load_and_their_sources_can_be_given_on_the_command_line():
    for preset in RELATIVES:
        assert load_config(None, ["--preset", preset]).preset == preset
    found = load_config(None, ["--preset", "opsd", "--objective.privileged", "hint,feedback"])
    assert found.objective.privileged == ["hint", "feedback"]


def test_a_head_with_a_bias_is_refused_for_divergences():
    from pact_fast.train.distill import check_head
    from pact_fast.tree.families import HeadParams

    head = HeadParams(torch.zeros(4, 2), torch.zeros(4), None, 1.0)
    with pytest.raises(ValueError, match="has a bias"):
        check_head(head, objective("opsd"))
    check_head(head, objective("sdft"))
