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
    """The component strengths of docs/method.md, "The SFT term", at `progress`.

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
        """Per prompt id, whether the prompt-only ratio is used."""
        q = self.objective.anchor_probability if self.objective.rl_context == "trace" else 1.0
        drawn = anchor_mask(self.seed, step, prompt_ids, q).tolist()
        return dict(zip(prompt_ids, drawn, strict=True))

    def sft_strength(self, progress: float) -> SFTStrength | None:
        """Strength of every component of a trace; None where there is no SFT term (any more)."""
        o = self.objective
        if progress >= o.sft_end:
            return None
        return sft_strength(
            o.sft_targets,
            progress,
            segments=o.reasoning_segments,
            start=o.tool_call_start,
            end=o.tool_call_end,
            answer=o.answer_strength,
        )

    def sft_scale(self, progress: float) -> float:
        """Weight of the SFT term: alpha, or CHORD's mu."""
        o = self.objective
        if o.mu_start is None or o.mu_end is None:
            return o.sft_weight
        return chord_mu(progress, o.mu_start, o.mu_end)

    def sft_metrics(self, progress: float) -> dict[str, float]:
        """The SFT term's strengths for metrics.jsonl; empty where there is no such term."""
        strength = self.sft_strength(progress)
        if strength is None:
            return {}
        return {
            "pact/tool_call_scale": strength.tool_call,
            "pact/reasoning_level": strength.reasoning_level,
            "pact/sft_coef": self.sft_scale(progress),
        }

    def rl_scale(self, progress: float) -> float:
        """Weight of the policy term: 1, or CHORD's 1 - mu."""
        return 1.0 if self.objective.mu_start is None else 1.0 - self.sft_scale(progress)

    def advantages(
        self, rewards: Sequence[float], turn_rewards: Sequence[Sequence[float]], group: int
    ) -> list[Tensor]:
        """Per rollout, one advantage per turn; `group` rollouts of a draw lie beside each other."""
        o = self.objective
        # A record may be drawn twice in a step: a group is one draw of it.
        groups = [i // group for i in range(len(rewards))]
        if o.advantages == "turn":
            return turn_advantages(turn_rewards, rewards, groups, gamma=o.turn_discount)
        values = group_advantages(rewards, groups, mode=o.advantages)
        return [value.expand(len(turns)) for value, turns in zip(values, turn_rewards, strict=True)]
