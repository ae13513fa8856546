"""The method's pure parts: advantages, anchoring, schedules, strengths and weights."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pact_fast.data.chat import Component
from pact_fast.objective import (
    anchor_mask,
    chord_mu,
    group_advantages,
    policy_token_weight,
    reasoning_level,
    sft_strength,
    sft_token_strengths,
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


def test_turn_advantages_average_the_trajectory_and_the_turn_scores():
    turn_rewards, rewards = [[1.0, 0.0], [0.0, 0.0], [0.0]], [1.0, 0.0, 0.5]
    out = turn_advantages(turn_rewards, rewards, ["p"] * 3, gamma=0.5)
    trajectory = group_advantages(rewards, ["p"] * 3)
    first = group_advantages([1.0, 0.0, 0.0], ["p"] * 3)
    assert [len(o) for o in out] == [2, 2, 1]
    torch.testing.assert_close(torch.stack([o[0] for o in out]), (trajectory + first) / 2)
    torch.testing.assert_close(out[0][1], trajectory[0] / 2)  # no spread among second turns


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


def test_reasoning_level_anneals_from_all_segments_to_none():
    assert [reasoning_level(p) for p in (0, 0.01, 0.25, 0.26, 0.5, 0.75, 0.99, 1)] == [4, 4, 3, 3, 2, 1, 1, 0]


@given(st.integers(1, 12), st.integers(0, 12))
@settings(deadline=None, max_examples=60)
def test_reasoning_level_is_exact_at_multiples(segments, done):
    done = min(done, segments)
    assert reasoning_level(done / segments, segments) == segments - done


def test_tool_call_scale_at_start_middle_and_end():
    assert [tool_call_scale(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.8, 0.5, 0.2])
    with pytest.raises(ValueError, match=r"progress=1\.5"):
        tool_call_scale(1.5)


def test_chord_weight_anneals():
    assert [chord_mu(p, 0.9, 0.05) for p in (0.0, 1.0)] == pytest.approx([0.9, 0.05])


COMPONENTS = [
    Component.CONTEXT,
    *[Component.REASONING] * 4,
    Component.STRUCTURE,
    Component.TOOL_CALL,
    Component.TOOL_RESPONSE,
    Component.ANSWER,
]
SEGMENTS = [-1, 0, 1, 2, 3, -1, -1, -1, -1]


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_components_are_supervised_with_their_strength_at_every_level(progress):
    level, scale = reasoning_level(progress), tool_call_scale(progress)
    out = sft_token_strengths(COMPONENTS, SEGMENTS, sft_strength("components", progress)).tolist()
    assert out == pytest.approx([0, *[float(i < level) for i in range(4)], scale, scale, 0, 0])


def test_all_targets_every_assistant_token_and_never_a_tool_response():
    out = sft_token_strengths(COMPONENTS, SEGMENTS, sft_strength("all", 0.9)).tolist()
    assert out == [0, 1, 1, 1, 1, 1, 1, 0, 1]
    assert sft_strength("none", 0.5) is None


@pytest.mark.parametrize(("mode", "want"), [("token", 1 / 30), ("sequence", 1 / 20), ("constant", 1 / 80)])
def test_policy_weights_follow_the_normalisation(mode, want):
    got = policy_token_weight(mode, 5, total_tokens=30, num_sequences=4, max_length=20)
    assert got == pytest.approx(want)
