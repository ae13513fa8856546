"""What of the objective depends on progress, on the step and on the rollouts' rewards; nothing that is saved.

All of it is a function of the config, the step and the rewards, so a resumed run repeats it (METHOD sections
3, 4 and 6).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pact_fast import objective as obj
from pact_fast.config import ObjectiveConfig
from pact_fast.data.records import Record
from pact_fast.rollout import Rollout


class Schedule:
    """Anchors, strengths and advantages of a run with this objective and seed; progress is t/T in [0, 1]."""

    def __init__(self, objective: ObjectiveConfig, seed: int) -> None:
        self.objective, self.seed = objective, seed

    def has_policy_term(self, progress: float) -> bool:
        return self.objective.rl_context != "none" and progress >= self.objective.rl_start

    def anchored(self, records: Sequence[Record], step: int) -> dict[str, bool]:
        """Per record id, whether the prompt-only ratio is used."""
        ids = [r.id for r in records]
        q = self.objective.anchor_probability if self.objective.rl_context == "trace" else 1.0
        return dict(zip(ids, obj.anchor_mask(self.seed, step, ids, q).tolist(), strict=True))

    def sft_strength(self, progress: float) -> obj.SFTStrength | None:
        """Strength of every component of a trace; None where there is no SFT term (any more)."""
        o = self.objective
        if progress >= o.sft_end:
            return None
        return obj.sft_strength(
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
        return obj.chord_mu(progress, o.mu_start, o.mu_end)

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

    def advantages(self, rollouts: Sequence[Rollout], group: int) -> list[Tensor]:
        """Per rollout, one advantage a turn; `group` rollouts of a draw lie beside each other."""
        o = self.objective
        rewards = [r.outcome.reward for r in rollouts if r.outcome is not None]
        # A record may be drawn twice in a step: a group is one draw of it.
        groups = [i // group for i in range(len(rollouts))]
        if o.advantages == "turn":
            turn_rewards = [r.turn_rewards for r in rollouts]
            return obj.turn_advantages(turn_rewards, rewards, groups, gamma=o.turn_discount)
        values = obj.group_advantages(rewards, groups, mode=o.advantages)
        return [value.expand(len(r.turn_rewards)) for value, r in zip(values, rollouts, strict=True)]
