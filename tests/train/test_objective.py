"""The method's pure parts: advantages, anchoring, schedules, strengths and weights."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pact_fast.data.tokens import Component
from pact_fast.objective import (
    ObjectiveConfig,
    anchor_mask,
    chord_mu,
    group_advantages,
    policy_token_weight,
    reasoning_level,
    sft_strength,
    sft_token_strengths,
    sft_token_weights,
    tool_call_scale,
    turn_advantages,
)


def test_group_advantages_are_the_formula_per_group_in_any_order():
    rewards, groups = [1.0, 5.0, 0.0, 7.0, 2.0], ["a", "b", "a", "b", "a"]
    out = group_advantages(rewards, groups)
    for name in "ab":
        rows = [i for i, g in enumerate(groups) if g == name]
        r = torch.tensor([rewards[i] for i in rows])
        torch.testing.assert_close(out[rows], (r - r.mean()) / (r.std() + 1e-6))


def test_group_mean_keeps_the_scale():
    torch.testing.assert_close(
        group_advantages([1.0, 3.0], [0, 0], mode="group_mean"), torch.tensor([-1.0, 1.0])
    )


@pytest.mark.parametrize("rewards", [[0.3], [0.1, 0.1, 0.1], [0.1 + 0.2, 0.1 + 0.2]])
def test_a_group_without_spread_or_of_one_gets_exactly_zero(rewards):
    assert group_advantages(rewards, [0] * len(rewards)).tolist() == [0.0] * len(rewards)


def test_bad_rewards_name_the_argument():
    with pytest.raises(ValueError, match=r"rewards\[1\]=nan"):
        group_advantages([0.0, math.nan], [0, 0])
    with pytest.raises(ValueError, match="group_ids 3"):
        group_advantages([0.0, 1.0], [0, 0, 0])
    with pytest.raises(ValueError, match="turn_advantages"):
        group_advantages([0.0, 1.0], [0, 0], mode="turn")


@pytest.mark.parametrize(("mix", "share"), [("sum", 1.0), ("mean", 0.5)])
def test_turn_advantages_add_the_trajectory_and_the_turn_scores(mix, share):
    turn_rewards, rewards = [[1.0, 0.0], [0.0, 0.0], [0.0]], [1.0, 0.0, 0.5]
    out = turn_advantages(turn_rewards, rewards, ["p"] * 3, gamma=0.5, mix=mix)
    trajectory = group_advantages(rewards, ["p"] * 3)
    first = group_advantages([1.0, 0.0, 0.0], ["p"] * 3)
    assert [len(o) for o in out] == [2, 2, 1]
    torch.testing.assert_close(torch.stack([o[0] for o in out]), share * (trajectory + first))
    torch.testing.assert_close(out[0][1], share * trajectory[0])  # no spread among second turns


def test_an_unknown_mix_is_refused():
    with pytest.raises(ValueError, match="mix='max'"):
        turn_advantages([[1.0]], [1.0], [0], mix="max")


def test_anchor_is_one_repeatable_draw_a_prompt_whatever_the_order():
    ids = [f"task-{i}" for i in range(50)]
    mask = anchor_mask(3, 7, ids, 0.4)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, anchor_mask(3, 7, ids, 0.4))
    assert torch.equal(mask.flip(0), anchor_mask(3, 7, ids[::-1], 0.4))
    assert not torch.equal(mask, anchor_mask(3, 8, ids, 0.4))
    assert not torch.equal(mask, anchor_mask(4, 7, ids, 0.4))


def test_the_anchor_draw_is_frozen():
    assert anchor_mask(0, 0, ["a", "b", "c", "d", "e", "f"], 0.5).tolist() == [
        True,
        True,
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("q", [0.0, 0.2, 0.3, 0.5, 1.0])
def test_anchors_come_with_frequency_q(q):
    share = anchor_mask(0, 1, range(20_000), q).float().mean().item()
    assert abs(share - q) <= 4 * math.sqrt(q * (1 - q) / 20_000)


def test_a_larger_q_keeps_every_anchor_of_a_smaller_one():
    small, large = anchor_mask(0, 0, range(500), 0.2), anchor_mask(0, 0, range(500), 0.5)
    assert bool((large | ~small).all())


@pytest.mark.parametrize("q", [-0.1, 1.1, math.nan])
def test_q_must_be_a_probability(q):
    with pytest.raises(ValueError, match="q="):
        anchor_mask(0, 0, ["a"], q)


def test_every_reasoning_level_has_a_fifth_of_the_steps():
    """L = max(0, 4 - floor(5 s / S)): 0.2 is the first step of L3, 0.8 the first of L0."""
    at = (0, 0.19, 0.2, 0.39, 0.4, 0.6, 0.79, 0.8, 0.99, 1)
    assert [reasoning_level(p) for p in at] == [4, 4, 3, 3, 2, 1, 1, 0, 0, 0]


@given(st.integers(1, 12), st.integers(0, 13))
@settings(deadline=None, max_examples=60)
def test_reasoning_level_is_exact_at_multiples(levels, done):
    done = min(done, levels + 1)
    assert reasoning_level(done / (levels + 1), levels) == max(levels - done, 0)


def test_tool_call_scale_at_start_middle_and_end():
    assert [tool_call_scale(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.8, 0.5, 0.2])
    with pytest.raises(ValueError, match=r"progress=1\.5"):
        tool_call_scale(1.5)


def test_chord_weight_anneals():
    assert [chord_mu(p, 0.9, 0.05) for p in (0.0, 1.0)] == pytest.approx([0.9, 0.05])


# <think> four chunks and a preview of the call </think>, the call and its tags, a response; then an
# answer's turn.
COMPONENTS = [
    Component.CONTEXT,
    Component.THINK_TAG,
    *[Component.REASONING] * 5,
    Component.STRUCTURE,
    *[Component.TOOL_CALL] * 2,
    Component.STRUCTURE,
    Component.TOOL_RESPONSE,
    Component.ANSWER,
    Component.STRUCTURE,
]
TURNS = [-1, *[0] * 11, 1, 1]
LEVELS = [0, 0, 1, 2, 3, 4, 5, *[0] * 7]


def strengths(progress=0.0, **keys):
    strength = sft_strength(ObjectiveConfig(**keys), progress)
    return sft_token_strengths(COMPONENTS, TURNS, LEVELS, strength).tolist()


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_components_are_supervised_with_their_strength_at_every_level(progress):
    level, scale = reasoning_level(progress), tool_call_scale(progress)
    reasoning = [float(i <= level) for i in range(1, 6)]
    assert strengths(progress) == pytest.approx([0, 0, *reasoning, scale, scale, scale, scale, 0, 0, 0])


def test_structure_has_the_strength_of_calls_where_they_are_or_everywhere_or_none():
    assert strengths(0.5, structure_strength="none") == pytest.approx(
        [0, 0, 1, 1, 0, 0, 0, 0, 0.5, 0.5, 0, 0, 0, 0]
    )
    everywhere = strengths(0.5, structure_strength="all")
    assert everywhere == pytest.approx([0, 0.5, 1, 1, 0, 0, 0, 0.5, 0.5, 0.5, 0.5, 0, 0, 0.5])


def test_fixed_reasoning_stays_at_the_longest_safe_prefix_and_fixed_calls_at_their_start():
    assert strengths(1.0, reasoning_anneal="fixed")[2:7] == [1, 1, 1, 1, 0]
    assert strengths(1.0, call_anneal="fixed")[7:11] == pytest.approx([0.8] * 4)


def test_token_annealing_keeps_a_share_of_a_turns_tokens_whatever_they_mean():
    """At 0.5: 3 of 5 reasoning tokens (2.5 rounded up), 2 of the 4 tokens of the call, at their start's
    0.8."""
    assert strengths(0.5, reasoning_anneal="token")[2:7] == [1, 1, 1, 0, 0]
    assert strengths(0.0, reasoning_anneal="token")[2:7] == [1, 1, 1, 1, 1]
    assert strengths(0.5, call_anneal="token")[7:11] == pytest.approx([0.8, 0.8, 0, 0])


def test_one_sequence_keeps_a_share_of_all_supervised_tokens():
    """5 reasoning tokens and 4 of the call are 9: at 1/3 the first 6 are kept."""
    both = {"reasoning_anneal": "sequence", "call_anneal": "sequence"}
    assert strengths(1 / 3, **both) == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert sum(strengths(1.0, **both)) == 0


def test_a_component_that_is_left_out_has_no_strength():
    assert sum(strengths(0.0, reasoning_anneal="none")[:7]) == 0
    assert sum(strengths(0.0, call_anneal="none")[7:]) == 0


def test_all_targets_every_assistant_token_and_never_a_tool_response():
    assert strengths(0.9, sft_targets="all") == [0, *[1] * 10, 0, 1, 1]
    assert sft_strength(ObjectiveConfig(sft_targets="none"), 0.5) is None


@pytest.mark.parametrize(
    ("mode", "want"), [("prompt", 1 / 24), ("token", 1 / 30), ("sequence", 1 / 20), ("constant", 1 / 80)]
)
def test_policy_weights_follow_the_normalisation(mode, want):
    counts = {"total_tokens": 30, "num_sequences": 4, "max_length": 20, "prompt_tokens": 12, "num_prompts": 2}
    assert policy_token_weight(mode, 5, **counts) == pytest.approx(want)


def test_sft_weights_follow_the_normalisation():
    """Z = 2 and 0: per prompt 1/2 of 1/3 and nothing; over the batch's 3 tokens, 1/3 each times the
    strength."""
    traces = [torch.tensor([0.0, 1.0, 0.5, 0.5]), torch.zeros(2)]
    prompt, token = (sft_token_weights(traces, mode, 3) for mode in ("prompt", "token"))
    torch.testing.assert_close(prompt[0], torch.tensor([0.0, 1.0, 0.5, 0.5]) / 6)
    torch.testing.assert_close(token[0], torch.tensor([0.0, 1.0, 0.5, 0.5]) / 3)
    assert prompt[1].tolist() == token[1].tolist() == [0, 0]
    with pytest.raises(ValueError, match="'batch'"):
        sft_token_weights(traces, "batch", 3)
