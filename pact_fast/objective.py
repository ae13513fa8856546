"""The PACT objective as pure functions: advantages, anchoring draw, schedules and per-token weights.

Nothing here touches a model. Every training method is a choice of these weights over the same packed
pass (arXiv 2606.16215; GRPO: arXiv 2402.03300; CHORD: arXiv 2508.11408; turn-level advantages as in
MatchTIR).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pact_fast.data.chat import Component

ADVANTAGE_MODES = ("group", "group_mean", "turn")
NORMALIZATIONS = ("token", "sequence", "constant")
STD_EPSILON = 1e-6


def group_advantages(
    rewards: Sequence[float] | Tensor, group_ids: Sequence[Hashable], *, mode: str = "group"
) -> Tensor:
    """Advantage of every rollout relative to the other rollouts of its prompt.

    Equals, per group, ``(R - R.mean()) / (R.std() + 1e-6)`` for ``mode="group"`` (sample standard deviation,
    as in TRL and verl) and ``R - R.mean()`` for ``mode="group_mean"``. A group without spread, or of one,
    gets exactly 0.

    Args:
        rewards: [N] rewards, one a rollout.
        group_ids: [N] the prompt that each rollout belongs to, in any order.
        mode: "group" or "group_mean". Turn-level advantages have a function of their own, `turn_advantages`.

    Returns:
        float32 [N].

    Raises:
        ValueError: lengths differ, a reward is not finite, or the mode is unknown.
    """
    if mode not in ("group", "group_mean"):
        hint = "; for turn-level advantages call turn_advantages" if mode == "turn" else ""
        raise ValueError(f"mode={mode!r} is not one of 'group', 'group_mean'{hint}")
    values = torch.as_tensor(rewards, dtype=torch.float64).flatten()
    groups = _group_index(group_ids)
    if len(groups) != values.numel():
        raise ValueError(f"rewards has {values.numel()} entries, group_ids {len(groups)}")
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).nonzero()[0])
        raise ValueError(f"rewards[{bad}]={float(values[bad])} is not finite")
    out = torch.zeros_like(values)
    for group in range(max(groups, default=-1) + 1):
        rows = torch.tensor([i for i, g in enumerate(groups) if g == group])
        out[rows] = _standardise(values[rows], scale=mode == "group")
    return out.float()


def turn_advantages(
    turn_rewards: Sequence[Sequence[float]],
    rewards: Sequence[float],
    group_ids: Sequence[Hashable],
    *,
    gamma: float = 0.9,
) -> list[Tensor]:
    """Turn-level advantages: ``(A_traj + A_turn) / 2``, one value a turn.

    ``A_turn`` z-scores the discounted turn rewards ``sum_k gamma^k r[t+k]`` over those members of the group
    that have a turn t; ``A_traj`` is `group_advantages` of the whole-episode rewards.

    Args:
        turn_rewards: per rollout, the reward of each assistant turn.
        rewards: [N] whole-episode rewards.
        group_ids: [N] the prompt of each rollout.
        gamma: discount per turn.

    Returns:
        Per rollout, float32 [turns].
    """
    if len(turn_rewards) != len(rewards):
        raise ValueError(f"turn_rewards has {len(turn_rewards)} rollouts, rewards {len(rewards)}")
    trajectory = group_advantages(rewards, group_ids)
    groups = _group_index(group_ids)
    returns = [_discounted(r, gamma) for r in turn_rewards]
    out = [torch.full((len(r),), float(a) / 2) for r, a in zip(returns, trajectory, strict=True)]
    for turn in range(max((len(r) for r in returns), default=0)):
        for group in set(groups):
            members = [i for i, g in enumerate(groups) if g == group and len(returns[i]) > turn]
            if not members:
                continue
            scores = _standardise(torch.tensor([returns[i][turn] for i in members], dtype=torch.float64))
            for i, score in zip(members, scores, strict=True):
                out[i][turn] += float(score) / 2
    return out


def _discounted(rewards: Sequence[float], gamma: float) -> list[float]:
    out, running = [], 0.0
    for reward in reversed(rewards):
        running = reward + gamma * running
        out.append(running)
    return out[::-1]


def _standardise(values: Tensor, *, scale: bool = True) -> Tensor:
    """[n] float64 -> centred, and divided by the sample deviation where there is one."""
    if values.numel() < 2 or bool((values == values[0]).all()):
        return torch.zeros_like(values)
    centred = values - values.mean()
    return centred / (values.std() + STD_EPSILON) if scale else centred


def _group_index(group_ids: Sequence[Hashable]) -> list[int]:
    if isinstance(group_ids, Tensor):
        group_ids = group_ids.tolist()
    seen: dict[Hashable, int] = {}
    return [seen.setdefault(g, len(seen)) for g in group_ids]


def anchor_mask(seed: int, step: int, prompt_ids: Sequence[Hashable], q: float) -> Tensor:
    """Which prompts use the ordinary prompt-only ratio in this step: ``b ~ Bernoulli(q)``, one draw a prompt.

    A pure function of (seed, step, prompt id): a resumed run repeats it, and the order of the prompts, the
    number of ranks and the platform play no part.

    Args:
        seed, step: integers.
        prompt_ids: [P] strings or integers.
        q: probability of anchoring in [0, 1]; 0 anchors none, 1 all.

    Returns:
        bool [P].

    Raises:
        ValueError: q lies outside [0, 1].
    """
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"q={q} is not a probability: give a value in [0, 1]")
    ids = prompt_ids.tolist() if isinstance(prompt_ids, Tensor) else prompt_ids
    draws = []
    for prompt_id in ids:
        digest = hashlib.blake2b(f"{seed}\x1f{step}\x1f{prompt_id}".encode(), digest_size=8).digest()
        draws.append((int.from_bytes(digest, "big") >> 11) * 2.0**-53 < q)
    return torch.tensor(draws, dtype=torch.bool)


def reasoning_level(progress: float, segments: int = 4) -> int:
    """How many leading reasoning segments of a turn are supervised: ``ceil(K * (1 - progress))``, K -> 0.

    Args:
        progress: training progress in [0, 1].
        segments: K, the segments a turn's reasoning is cut into.
    """
    _check_progress(progress)
    # The slack keeps exact multiples exact: 3 * (1 - 2/3) is 1.0000000000000002 in binary.
    return max(0, math.ceil(segments * (1.0 - progress) - 1e-9))


def tool_call_scale(progress: float, start: float = 0.8, end: float = 0.2) -> float:
    """Strength lambda of tool-call and structure tokens: linear from `start` at progress 0 to `end` at 1."""
    _check_progress(progress)
    return start + (end - start) * progress


def _check_progress(progress: float) -> None:
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress={progress} lies outside [0, 1]: pass step / max_steps")


@dataclass(frozen=True)
class SFTStrength:
    """Supervision of each component of an expert trace at one moment of training; 0 leaves a token out."""

    reasoning: float
    reasoning_level: int
    tool_call: float
    structure: float
    answer: float


def sft_strength(
    targets: str,
    progress: float,
    *,
    segments: int = 4,
    start: float = 0.8,
    end: float = 0.2,
    answer: float = 0.0,
) -> SFTStrength | None:
    """The component strengths of METHOD section 4 at `progress`.

    Args:
        targets: "components" (annealed PACT supervision), "all" (every assistant token with strength 1),
        "none".
        segments, start, end: see `reasoning_level` and `tool_call_scale`; used by "components" alone.
        answer: strength of final-answer text under "components".
    """
    if targets == "none":
        return None
    if targets == "all":
        return SFTStrength(1.0, segments, 1.0, 1.0, 1.0)
    if targets != "components":
        raise ValueError(f"targets={targets!r} is not one of 'components', 'all', 'none'")
    scale = tool_call_scale(progress, start, end)
    return SFTStrength(1.0, reasoning_level(progress, segments), scale, scale, answer)


def sft_token_strengths(components: Sequence[int], segments: Sequence[int], strength: SFTStrength) -> Tensor:
    """Strength of every token of a trace before normalisation.

    Args:
        components: [L] `Component` of each token.
        segments: [L] reasoning segment of each token, -1 outside reasoning.
        strength: from `sft_strength`.

    Returns:
        float32 [L]; context and tool responses are always 0.
    """
    component = torch.as_tensor(components, dtype=torch.long)
    table = torch.zeros(max(Component) + 1)
    table[Component.REASONING] = strength.reasoning
    table[Component.TOOL_CALL] = strength.tool_call
    table[Component.STRUCTURE] = strength.structure
    table[Component.ANSWER] = strength.answer
    out = table[component]
    beyond = torch.as_tensor(segments, dtype=torch.long) >= strength.reasoning_level
    return out.masked_fill((component == Component.REASONING) & beyond, 0.0)


def policy_token_weight(
    normalization: str, length: int, *, total_tokens: int, num_sequences: int, max_length: int
) -> float:
    """Weight w of one sampled token, from global counts over all ranks and micro-batches.

    Args:
        normalization: "token" 1/N_rl, "sequence" 1/(#sequences * length), "constant" 1/(#sequences *
        max_length).
        length: sampled tokens of this sequence.
        total_tokens: N_rl, sampled tokens of all sequences.
        num_sequences: number of sequences with a policy term.
        max_length: the largest number of tokens a rollout may sample.
    """
    if normalization == "token":
        return 1.0 / max(total_tokens, 1)
    if normalization == "sequence":
        return 1.0 / max(num_sequences * length, 1)
    if normalization == "constant":
        return 1.0 / max(num_sequences * max_length, 1)
    raise ValueError(f"normalization={normalization!r} is not one of {NORMALIZATIONS}")


def chord_mu(progress: float, start: float, end: float) -> float:
    """Global SFT share mu of CHORD, linear in progress: the loss is (1 - mu) RL + mu SFT."""
    _check_progress(progress)
    return start + (end - start) * progress
