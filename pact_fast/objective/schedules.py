"""What of the objective depends on progress and on the step: levels, strengths, scales, anchors.

All of it is a function of the config, the step and the rewards, so a resumed run repeats it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pact_fast.objective.advantages import group_advantages, turn_advantages
from pact_fast.objective.anchoring import anchor_mask
from pact_fast.objective.presets import ObjectiveConfig


def reasoning_level(progress: float, levels: int = 4) -> int:
    """The prefix level of reasoning that is supervised: ``max(0, K - floor((K + 1) progress))``, K -> 0.

    Every level, 0 among them, has the same share of the steps.

    Args:
        progress: training progress in [0, 1].
        levels: K, the levels above 0.
    """
    _check_progress(progress)
    # The slack keeps exact multiples exact: 5 * 0.6 may be 2.9999999999999996 in binary.
    return max(0, levels - math.floor((levels + 1) * progress + 1e-9))


def tool_call_scale(progress: float, start: float = 0.8, end: float = 0.2) -> float:
    """Strength lambda of tool-call tokens: linear from `start` at progress 0 to `end` at 1."""
    _check_progress(progress)
    return start + (end - start) * progress


def _check_progress(progress: float) -> None:
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress={progress} lies outside [0, 1]: pass step / max_steps")


@dataclass(frozen=True)
class SFTStrength:
    """Supervision of each component of an expert trace at one moment of training; 0 leaves a token out.

    reasoning, tool_call, answer: strengths. structure: which tags have the strength of calls
    ("call", "all", "none"). level: of the reasoning prefix; None takes every reasoning token.
    reasoning_share, call_share: share of the tokens of a turn's reasoning, of its calls, from the front;
    sequence_share: of all supervised tokens of the trace.
    """

    reasoning: float
    tool_call: float
    structure: str = "call"
    answer: float = 0.0
    level: int | None = None
    reasoning_share: float = 1.0
    call_share: float = 1.0
    sequence_share: float = 1.0


def sft_strength(objective: ObjectiveConfig, progress: float) -> SFTStrength | None:
    """The component strengths at `progress` in [0, 1] (arXiv 2606.16215, section 4.3); None without an SFT
    term."""
    o = objective
    if o.sft_targets == "none":
        return None
    if o.sft_targets == "all":
        return SFTStrength(1.0, 1.0, "all", 1.0)
    left, whole = 1.0 - progress, 1.0
    calls = {
        "scale": tool_call_scale(progress, o.tool_call_start, o.tool_call_end),
        "token": o.tool_call_start,
        "fixed": o.tool_call_start,
        "sequence": 1.0,
        "none": 0.0,
    }
    level = {"segment": reasoning_level(progress, o.reasoning_levels), "fixed": o.reasoning_levels}
    return SFTStrength(
        reasoning=0.0 if o.reasoning_anneal == "none" else 1.0,
        tool_call=calls[o.call_anneal],
        structure=o.structure_strength,
        answer=o.answer_strength,
        level=level.get(o.reasoning_anneal),
        reasoning_share=left if o.reasoning_anneal == "token" else whole,
        call_share=left if o.call_anneal == "token" else whole,
        sequence_share=left if o.call_anneal == "sequence" else whole,
    )


def chord_mu(progress: float, start: float, end: float) -> float:
    """Global SFT share mu of CHORD, linear in progress: the loss is (1 - mu) RL + mu SFT."""
    _check_progress(progress)
    return start + (end - start) * progress


class Schedule:
    """Anchors, strengths and advantages of a run with this objective and seed; progress is t/T in [0, 1]."""

    def __init__(self, objective: ObjectiveConfig, seed: int) -> None:
        self.objective, self.seed = objective, seed

    def has_policy_term(self, progress: float) -> bool:
        return self.objective.rl_context != "none" and progress >= self.objective.rl_start

    def anchored(self, prompt_ids: Sequence[str], step: int) -> dict[str, bool]:
        """Per prompt id the draw z: whether the prompt-only ratio stands in for the trace-conditioned one."""
        q = self.objective.anchor_probability if self.objective.rl_context == "trace" else 0.0
        drawn = anchor_mask(self.seed, step, prompt_ids, q).tolist()
        return dict(zip(prompt_ids, drawn, strict=True))

    def sft_strength(self, progress: float) -> SFTStrength | None:
        """Strength of every component of a trace; None where there is no SFT term (any more)."""
        return None if progress >= self.objective.sft_end else sft_strength(self.objective, progress)

    def sft_scale(self, progress: float) -> float:
        """Weight of the SFT term: beta_SFT, or CHORD's mu."""
        o = self.objective
        if o.mu_start is None or o.mu_end is None:
            return o.sft_weight
        return chord_mu(progress, o.mu_start, o.mu_end)

    def sft_metrics(self, progress: float) -> dict[str, float]:
        """The SFT term's strengths for metrics.jsonl; empty where there is no such term."""
        strength = self.sft_strength(progress)
        if strength is None:
            return {}
        row = {"pact/tool_call_scale": strength.tool_call, "pact/sft_coef": self.sft_scale(progress)}
        return row if strength.level is None else row | {"pact/reasoning_level": strength.level}

    def rl_scale(self, progress: float) -> float:
        """Weight of the policy term: 1, or CHORD's 1 - mu."""
        return 1.0 if self.objective.mu_start is None else 1.0 - self.sft_scale(progress)

    def advantages(
        self, rewards: Sequence[float], turn_rewards: Sequence[Sequence[float]], group: int
    ) -> list[Tensor]:
        """Per rollout, one advantage per turn, times `reward_weight`; `group` rollouts of a draw lie beside
        each other."""
        o = self.objective
        # A record may be drawn twice in a step: a group is one draw of it.
        groups = [i // group for i in range(len(rewards))]
        if o.advantages == "turn":
            gamma, mix = o.turn_discount, o.advantage_mix
            turns = turn_advantages(turn_rewards, rewards, groups, gamma=gamma, mix=mix)
            return [o.reward_weight * value for value in turns]
        values = o.reward_weight * group_advantages(rewards, groups, mode=o.advantages)
        return [value.expand(len(turns)) for value, turns in zip(values, turn_rewards, strict=True)]
