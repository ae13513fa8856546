"""PACT as its paper has it (arXiv 2606.16215): equations 4 to 14, with numbers worked out by hand, and the
defaults."""

import math

import pytest
import torch
from transformers import AutoTokenizer

from pact_fast.config import load_config
from pact_fast.data.chat import ChatFormat, Component
from pact_fast.data.records import Record
from pact_fast.envs.toolbox.base_model import base_model_path
from pact_fast.objective import PRESETS, ObjectiveConfig, Schedule
from pact_fast.ops import linear_pact_loss
from pact_fast.rollout import Rollout
from pact_fast.train.samples import SampleBuilder, trim
from pact_fast.tree.packing import pack_tree
from pact_fast.tree.scoring import sequence_logprobs
from tests.helpers.trainer_steps import gradients, step_samples

CALL = {"name": "person", "arguments": {"name": "Mora", "field": "boss"}}
TOOLS = (
    {"type": "function", "function": {"name": "person", "description": "", "parameters": {"properties": {}}}},
)
TRACE = (
    {
        "role": "assistant",
        "reasoning_content": "The question is of a boss.",
        "content": "",
        "tool_calls": [CALL],
    },
    {"role": "tool", "name": "person", "content": '"Tila"'},
    {"role": "assistant", "reasoning_content": "Done.", "content": 'The answer is "Tila".', "tool_calls": []},
)


@pytest.fixture(scope="module")
def chat():
    return ChatFormat.for_tokenizer(AutoTokenizer.from_pretrained(base_model_path()))


def record(name="one", trace=TRACE, question="Who is the boss?"):
    return Record(name, ({"role": "user", "content": question},), TOOLS, trace)


def builder(chat, **keys):
    return SampleBuilder(chat, ObjectiveConfig(**keys), 64)


def rollouts(chat, of, counts):
    """Rollouts of so many sampled tokens, each followed by one token of a tool response."""
    prompt = chat.prompt(of.prompt, of.tools)
    out = []
    for i, count in enumerate(counts):
        rollout = Rollout(of, prompt)
        rollout.add_sampled([30 + i] * count, [-0.5] * count, 0)
        rollout.add_context(chat.user("x", 0)[:1], 0)
        out.append(rollout)
    return out


def policy_samples(built, of, anchored, advantages=None):
    values = advantages or [torch.ones(1)] * len(of)
    return built.rollout_samples(of, values, anchored, 1.0, 2)


# -- equations 4, 5: ratio and clip ------------------------------------------------------------------


def test_the_policy_term_is_the_clipped_ratio():
    """p(0) = 0.8, p(1) = 0.2, and 0.5 before. Ratios 1.6 and 0.4, clipped to 1.2 and 0.8.

    token 0: A = 1: -min(1.6, 1.2) = -1.2;  A = -1: -min(-1.6, -1.2) = 1.6
    token 1: A = 1: -min(0.4, 0.8) = -0.4;  A = -1: -min(-0.4, -0.8) = 0.8      sum 0.8
    """
    out = linear_pact_loss(
        torch.ones(4, 1),
        torch.tensor([[math.log(4.0)], [0.0]]),
        torch.tensor([0, 0, 1, 1]),
        policy_weight=torch.ones(4),
        advantages=torch.tensor([1.0, -1.0, 1.0, -1.0]),
        old_logprobs=torch.full((4,), math.log(0.5)),
    )
    assert ObjectiveConfig().epsilon == 0.2
    assert float(out.loss) == pytest.approx(0.8, abs=1e-6)


# -- equation 8: mean over a prompt's tokens, then over prompts ---------------------------------------


def test_policy_tokens_are_averaged_within_a_prompt_then_over_prompts(chat):
    """Prompt one has 2 + 4 sampled tokens, prompt two 1 + 1: weights 1/2/6 = 1/12 and 1/2/2 = 1/4. Over the
    whole batch (the old way) every token would weigh 1/8."""
    one, two = record("one"), record("two", question="Who is the chief?")
    samples = policy_samples(
        builder(chat), rollouts(chat, one, [2, 4]) + rollouts(chat, two, [1, 1]), {"one": False, "two": False}
    )
    live = [s.policy_weight[s.policy_weight != 0].tolist() for s in samples]
    assert [len(w) for w in live] == [2, 4, 1, 1]
    assert [*live[0], *live[1]] == pytest.approx([1 / 12] * 6)
    assert [*live[2], *live[3]] == pytest.approx([1 / 4] * 2)


def test_a_record_drawn_twice_in_a_step_is_two_prompts(chat):
    one = record("one")
    samples = policy_samples(builder(chat), rollouts(chat, one, [2, 4, 1, 1]), {"one": False})
    weights = [float(s.policy_weight.max()) for s in samples]
    assert weights == pytest.approx([1 / 12, 1 / 12, 1 / 4, 1 / 4])


# -- section 3: how h follows x ----------------------------------------------------------------------


def test_the_context_is_x_and_then_the_trace_as_turns_without_its_answer(chat):
    one, built = record(), builder(chat)
    x, c = chat.prompt(one.prompt, one.tools), built.privileged_prompt(one)
    h = chat.assistant(TRACE[0], 0) + chat.tool_results(['"Tila"'], 0)
    assert c == x.ids + h.ids
    assert built.trace(one).ids == c
    assert "The answer is" not in chat.decode(c)
    free, anchored = (
        policy_samples(built, rollouts(chat, one, [2, 2]), {"one": z})[0] for z in (False, True)
    )
    assert free.ids.tolist() == [*c, 30, 30, *free.ids.tolist()[-1:]]
    assert not free.prompt_only
    assert anchored.ids.tolist()[: len(x) + 2] == [*x.ids, 30, 30]
    assert anchored.prompt_only


def test_the_trace_as_a_message_is_an_option(chat):
    one = record()
    message = builder(chat, trace_context="message").privileged_prompt(one)
    assert message != builder(chat).privileged_prompt(one)
    text = chat.decode(message)
    assert text.index("expert solved") < text.rindex("assistant")
    assert "The answer is" not in text
    assert "The answer is" in chat.decode(
        builder(chat, trace_context="message", trace_answer=True).privileged_prompt(one)
    )


@pytest.mark.parametrize(
    ("key", "gone", "kept"),
    [
        ("trace_reasoning", "question is of", ['"boss"', "Tila"]),
        ("trace_calls", '"field"', ["question is of", "Tila"]),
        ("trace_observations", "Tila", ["question is of", '"boss"']),
    ],
)
@pytest.mark.parametrize("context", ["concat", "message"])
def test_a_part_of_the_trace_may_be_left_out(chat, key, gone, kept, context):
    built, one = builder(chat, trace_context=context, **{key: False}), record()
    for ids in (built.privileged_prompt(one), built.trace(one).ids):
        text = chat.decode(ids[len(chat.prompt(one.prompt, one.tools).ids) - 10 :])
        assert gone not in text
        assert all(part in text for part in kept)


def test_with_concat_the_trace_stands_in_the_tree_once(chat):
    """x = 3,000, h = 2,000, eight rollouts of 1,500: 3,000 + 2,000 + 12,000 = 17,000 tokens. As a message
    the trace is there a second time, behind the user's words: 19,000 and the 100 or so of the words around
    it."""

    def grown(length, make):
        """`make(words)` where that has `length` tokens."""
        base, step = len(make(0)), len(make(100)) - len(make(0))
        words = (length - base) * 100 // step
        while len(make(words)) < length:
            words += 1
        return words

    def sized(words, padding):
        trace = (TRACE[0], {**TRACE[1], "content": " x" * padding}, TRACE[2])
        return record(trace=trace, question="Who?" + " x" * words)

    words = grown(3000, lambda n: chat.prompt(sized(n, 0).prompt, TOOLS).ids)
    padding = grown(2000, lambda n: chat.trace(sized(0, n).expert_trace[:2]).ids)
    one = sized(words, padding)
    sizes = {}
    for context in ("concat", "message"):
        built = builder(chat, trace_context=context)
        assert len(built.prompt(one)) == 3000
        assert len(built.trace(one)) == 5000
        group = []
        for k in range(8):
            rollout = Rollout(one, built.prompt(one))
            rollout.add_sampled([100 + k] * 1500, [-0.5] * 1500, 0)
            group.append(rollout)
        samples = built.rollout_samples(group, [torch.ones(1)] * 8, {"one": False}, 1.0, 8)
        strength = Schedule(built.objective, 0).sft_strength(0.0)
        samples += built.trace_samples([one], strength, 0.1, {"one": False})
        sizes[context] = pack_tree([s.ids for s in samples]).num_tokens
    assert sizes["concat"] == 17_000
    assert 19_000 <= sizes["message"] <= 19_150


# -- equations 9 to 11: component-aware SFT ----------------------------------------------------------


def test_the_sft_term_is_normalised_per_prompt_by_the_sum_of_its_strengths(chat):
    """With R reasoning tokens of strength 1 and C of the call and its structure of lambda = 0.8 - 0.6 / 2 =
    0.5 at the middle, Z = n + C / 2 where n of the R are inside level 4 - floor(5 / 2) = 2; two prompts: m
    / Z / 2 each."""
    one, two = record("one"), record("two", trace=(*TRACE[:2], *TRACE[:2]))
    built = builder(chat)
    strength = Schedule(built.objective, 0).sft_strength(0.5)
    free = {"one": False, "two": False}
    for sample, of in zip(built.trace_samples([one, two], strength, 1.0, free), (one, two), strict=True):
        tokens = built.trace(of)
        calling = [Component.TOOL_CALL, Component.STRUCTURE]
        inside = sum(
            c == Component.REASONING and t <= 2 for c, t in zip(tokens.components, tokens.levels, strict=True)
        )
        calls = sum(c in calling for c in tokens.components)
        z = inside + calls / 2
        assert inside > 0
        weights = dict(zip(tokens.components, sample.sft_weight.tolist(), strict=True))
        assert weights[Component.TOOL_CALL] == pytest.approx(0.5 / z / 2)
        assert max(sample.sft_weight.tolist()) == pytest.approx(1 / z / 2)
        assert float(sample.sft_weight.sum()) == pytest.approx(1 / 2)
        assert weights[Component.TOOL_RESPONSE] == weights[Component.THINK_TAG] == 0


def test_without_reasoning_lambda_cancels(chat):
    """At the end Z = C lambda, so each of the C tokens of the call weighs lambda / Z = 1 / C."""
    one, built = record(), builder(chat)
    late, later = (
        built.trace_samples([one], Schedule(built.objective, 0).sft_strength(p), 1.0, {"one": False})[0]
        for p in (0.8, 1.0 - 1e-9)
    )
    torch.testing.assert_close(late.sft_weight, later.sft_weight)
    count = int((late.sft_weight > 0).sum())
    assert late.sft_weight[late.sft_weight > 0].tolist() == pytest.approx([1 / count] * count)


def test_a_trace_without_strength_is_skipped(chat):
    one, built = record(), builder(chat, call_anneal="none")
    sample = built.trace_samples([one], Schedule(built.objective, 0).sft_strength(0.9), 1.0, {"one": False})[
        0
    ]
    assert float(sample.sft_weight.abs().sum()) == 0.0


# -- equations 12 to 14: anchoring and the whole objective ---------------------------------------------


def test_an_anchored_prompt_has_no_sft_term_but_counts_as_a_prompt(chat):
    """One of two prompts is anchored: the other's SFT weights sum to 1/2 beta_SFT = 0.05."""
    one, two, built = record("one"), record("two"), builder(chat)
    schedule = Schedule(built.objective, 0)
    scale = schedule.sft_scale(0.0)
    samples = built.trace_samples([one, two], schedule.sft_strength(0.0), scale, {"one": True, "two": False})
    assert [s.record_id for s in samples] == ["two"]
    assert float(samples[0].sft_weight.sum()) == pytest.approx(0.05)
    everyone = builder(chat, sft_on_anchored=True)
    samples = everyone.trace_samples(
        [one, two], schedule.sft_strength(0.0), scale, {"one": True, "two": False}
    )
    assert len(samples) == 2


def test_the_whole_loss_of_a_step_is_the_mean_over_its_prompts(make_trainer):
    """Written down once more, sequence by sequence: on policy the ratio is 1, so L_RL = - mean of the
    advantages."""
    trainer = make_trainer(train__prompts_per_step=4, objective__anchor_probability=0.5)
    samples, rollouts, anchored = step_samples(trainer, step=1)
    assert set(anchored.values()) == {True, False}
    group = trainer.config.rollout.num_generations
    advantages = trainer.schedule.advantages(
        [r.outcome.reward for r in rollouts], [r.turn_rewards for r in rollouts], group
    )
    wanted, strength = 0.0, trainer.schedule.sft_strength(0.0)
    for first in range(0, len(rollouts), group):
        of = rollouts[first].record
        values = [
            float(advantages[i][turn])
            for i in range(first, first + group)
            for turn, sampled in zip(rollouts[i].turns, rollouts[i].sampled, strict=True)
            if sampled
        ]
        wanted -= sum(values) / len(values) / 4
        if not anchored[of.id]:
            tokens = trainer.builder.trace(of)
            with torch.no_grad():
                logprobs = sequence_logprobs(trainer.policy, [tokens.ids])[0]
            m = [
                1.0 if c == Component.REASONING and t <= 4 else 0.8 if c in (2, 3) else 0.0
                for c, t in zip(tokens.components, tokens.levels, strict=True)
            ]
            assert strength.tool_call == 0.8
            nll = -sum(a * float(b) for a, b in zip(m[1:], logprobs, strict=True)) / sum(m)
            wanted += 0.1 * nll / 4
    assert gradients(trainer, samples)[0] == pytest.approx(wanted, abs=2e-5)


def test_all_anchored_is_matchtir(make_trainer):
    """q = 1 is exactly the row of prompt-only RL: no trace as context, no SFT term."""
    loss = [
        gradients(trainer, step_samples(trainer)[0])
        for trainer in (make_trainer("pact", objective__anchor_probability=1.0), make_trainer("matchtir"))
    ]
    assert loss[0][0] == loss[1][0]
    assert torch.equal(loss[0][1], loss[1][1])


@pytest.mark.parametrize("preset", ["pact", "matchtir"])
def test_old_logprobs_are_those_under_each_ratios_own_context(make_trainer, preset):
    trainer = make_trainer(preset, train__num_mini_batches=3)
    samples, _, anchored = step_samples(trainer)
    records = {r.id: r for r in trainer.records}
    trainer.score([samples], records, old=True)
    checked = 0
    for sample in (s for s in samples if s.is_policy):
        of = records[sample.record_id]
        x, c = trainer.builder.prompt(of).ids, trainer.builder.privileged_prompt(of)
        context = x if anchored[of.id] or preset == "matchtir" else c
        start = len(c) if sample.ids[: len(c)].tolist() == c else len(x)
        body = sample.ids[start:].tolist()
        with torch.no_grad():
            wanted = sequence_logprobs(trainer.policy, [context + body])[0][len(context) - 1 :]
        torch.testing.assert_close(sample.old_logprobs[start:], wanted, rtol=0, atol=1e-4)
        checked += 1
    assert checked > 0


# -- the defaults, and the rows of tables 2, 3, 4 and 6 -----------------------------------------------


def test_the_defaults_are_the_papers():
    o = ObjectiveConfig()
    assert PRESETS["pact"] == {}
    assert (o.anchor_probability, o.sft_weight, o.normalization, o.sft_normalization) == (
        0.4,
        0.1,
        "prompt",
        "prompt",
    )
    assert (o.advantages, o.advantage_mix, o.turn_discount) == ("turn", "sum", 0.9)
    assert (o.trace_context, o.trace_answer, o.sft_on_anchored) == ("concat", False, False)
    assert (o.tool_call_start, o.tool_call_end, o.reasoning_levels, o.structure_strength) == (
        0.8,
        0.2,
        4,
        "call",
    )


@pytest.mark.parametrize(
    ("preset", "keys"),
    [
        ("matchtir", {"rl_context": "prompt", "sft_targets": "none", "advantages": "turn"}),
        ("pact-no-sft", {"rl_context": "trace", "sft_targets": "none"}),
        ("prompt-rl+sft", {"rl_context": "prompt", "sft_targets": "components"}),
        ("pact-no-anchor", {"rl_context": "trace", "sft_targets": "components"}),
        ("pact-no-reasoning", {"trace_reasoning": False, "trace_calls": True, "trace_observations": True}),
        ("pact-no-calls", {"trace_reasoning": True, "trace_calls": False, "trace_observations": True}),
        ("pact-no-observation", {"trace_reasoning": True, "trace_calls": True, "trace_observations": False}),
        ("pact-fixed-reasoning", {"reasoning_anneal": "fixed", "call_anneal": "scale"}),
        ("pact-fixed-calls", {"reasoning_anneal": "segment", "call_anneal": "fixed"}),
        ("pact-token-reasoning", {"reasoning_anneal": "token", "call_anneal": "scale"}),
        ("pact-token-calls", {"reasoning_anneal": "segment", "call_anneal": "token"}),
        ("pact-reasoning-only", {"reasoning_anneal": "segment", "call_anneal": "none"}),
        ("pact-calls-only", {"reasoning_anneal": "none", "call_anneal": "scale"}),
        ("pact-one-sequence", {"reasoning_anneal": "sequence", "call_anneal": "sequence"}),
    ],
)
def test_every_row_of_the_ablations_is_a_preset_without_anchors(preset, keys):
    o = load_config(None, ["--preset", preset]).objective
    assert {key: getattr(o, key) for key in keys} == keys
    q = o.anchor_probability if o.rl_context == "trace" else 0.0
    assert q == 0.0
    assert not any(Schedule(o, 0).anchored(["a", "b", "c"], 0).values())


def test_prompt_rl_with_sft_keeps_the_sft_term_on_every_prompt(make_trainer):
    trainer = make_trainer("prompt-rl+sft")
    samples, _, anchored = step_samples(trainer)
    assert {s.record_id for s in samples if not s.is_policy} == set(anchored)
    assert all(s.prompt_only for s in samples if s.is_policy)


def test_annealing_both_as_one_sequence_takes_both_keys():
    with pytest.raises(ValueError, match=r"objective\.call_anneal='scale'"):
        load_config(None, ["--objective.reasoning_anneal", "sequence"])


def test_an_answer_cannot_stand_before_the_rollouts_first_turn():
    with pytest.raises(ValueError, match="trace_context=concat"):
        load_config(None, ["--objective.trace_answer", "true"])


def test_samples_without_a_loss_behind_them_are_trimmed_to_the_trace(chat):
    """x + h of the SFT term ends in the prefix of the policy's sequences: nothing of it is packed twice."""
    one, built = record(), builder(chat)
    taught = trim(
        built.trace_samples([one], Schedule(built.objective, 0).sft_strength(0.0), 1.0, {"one": False})[0]
    )
    policy = policy_samples(built, rollouts(chat, one, [2, 2]), {"one": False})
    assert policy[0].ids[: len(taught.ids)].tolist() == taught.ids.tolist()
