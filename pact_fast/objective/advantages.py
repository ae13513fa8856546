"""Advantages of rollouts relative to the other rollouts of their prompt (GRPO: arXiv 2402.03300; turn
level as in MatchTIR)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

ADVANTAGE_MODES = ("group", "group_mean", "turn")
ADVANTAGE_MIXES = ("sum", "mean")
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
    mix: str = "sum",
) -> list[Tensor]:
    """Turn-level advantages: ``A_traj + A_turn``, one value a turn (arXiv 2606.16215, equations 30 to 32).

    ``A_turn`` z-scores the turn returns ``sum_u gamma^(u-t) r[u]`` over those members of the group that
    have a turn t, and is 0 for a turn that one member alone reaches; ``A_traj`` is `group_advantages` of the
    whole-episode rewards.

    Args:
        turn_rewards: per rollout, the reward of each assistant turn.
        rewards: [N] whole-episode rewards.
        group_ids: [N] the prompt of each rollout.
        gamma: discount per turn.
        mix: "sum" as the paper writes it, or "mean", half of that, as MatchTIR's code has it.

    Returns:
        Per rollout, float32 [turns].

    Raises:
        ValueError: lengths differ, a reward is not finite, or the mix is unknown.
    """
    if mix not in ADVANTAGE_MIXES:
        raise ValueError(f"mix={mix!r} is not one of {ADVANTAGE_MIXES}")
    if len(turn_rewards) != len(rewards):
        raise ValueError(f"turn_rewards has {len(turn_rewards)} rollouts, rewards {len(rewards)}")
    trajectory = group_advantages(rewards, group_ids)
    groups = _group_index(group_ids)
    returns = [_discounted(r, gamma) for r in turn_rewards]
    share = 1.0 if mix == "sum" else 0.5
    out = [torch.full((len(r),), share * float(a)) for r, a in zip(returns, trajectory, strict=True)]
    for turn in range(max((len(r) for r in returns), default=0)):
        for group in set(groups):
            members = [i for i, g in enumerate(groups) if g == group and len(returns[i]) > turn]
            if not members:
                continue
            scores = _standardise(torch.tensor([returns[i][turn] for i in members], dtype=torch.float64))
            for i, score in zip(members, scores, strict=True):
                out[i][turn] += share * float(score)
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
