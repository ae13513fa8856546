"""Contexts of a rollout and what tokens learn from them: formulas and weights by hand, sources of contexts,
values that do not go together."""

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
    shaped_advantages,
    token_gaps,
    token_gates,
)
from pact_fast.rollout import Rollout
from pact_fast.train.old_logprobs import TokenGaps
from pact_fast.train.samples import SampleBuilder
from pact_fast.train.score import learn_from_gaps
from pact_fast.tree.packing import pack_tree

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
    assert float(token_gates(gap, gated)) == pytest.approx(0.1192029, abs=1e-6)
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
