"""What is optimised, and the presets: every training method is a choice of these values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is optimised; every preset is a choice of these.

    rl_context: context of the policy ratio: "trace" c(x,h), "prompt" x, "none" no policy term.
    anchor_probability: q, share of prompts that use the prompt-only ratio although rl_context is "trace".
    ratio_denominator: "context" is pi_old under the ratio's own context; "rollout" is pi_old as the tokens
        were drawn, under x: the clip then also brakes a token that c(x,h) has already made unlikely (or
        likely).
    rl_start: share of the steps before which no policy term is used (sft-then-grpo).
    sft_targets: "components" (annealed), "all" (every assistant token), "none". sft_end: share of the steps
    after which
        no SFT term is used. sft_weight: alpha. mu_start, mu_end: CHORD's global weight, loss (1-mu) RL + mu
        SFT.
    trace_observations: whether tool responses stay in the trace.
    beta: KL penalty to the policy before training, k3 estimator, under the context of the ratio.
    importance_ratio_cap: C; every advantage is multiplied by min(pi_old(y|x) / pi_engine(y|x), C), the
        trainer's over the engine's probability of the token as it was drawn (TIS). None: off.
    skip_zero_advantage: rollouts whose advantage is exactly 0 leave the pass (they still count in the
    normalisation).
    """

    rl_context: Literal["trace", "prompt", "none"] = "trace"
    anchor_probability: float = 0.3
    ratio_denominator: Literal["context", "rollout"] = "context"
    rl_start: float = 0.0
    advantages: str = "group"
    turn_discount: float = 0.9
    normalization: str = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    dual_clip: float | None = None
    beta: float = 0.0
    importance_ratio_cap: float | None = None
    entropy_coef: float = 0.0
    sft_targets: Literal["components", "all", "none"] = "components"
    sft_weight: float = 1.0
    sft_end: float = 1.0
    mu_start: float | None = None
    mu_end: float | None = None
    reasoning_segments: int = 4
    tool_call_start: float = 0.8
    tool_call_end: float = 0.2
    answer_strength: float = 0.0
    trace_observations: bool = True
    skip_zero_advantage: bool = True


PRESETS: dict[str, dict[str, Any]] = {
    "pact": {},
    "pact-no-anchor": {"anchor_probability": 0.0},
    "pact-no-sft": {"sft_targets": "none"},
    "pact-no-observation": {"trace_observations": False},
    "component-sft": {"rl_context": "none", "sft_weight": 1.0},
    "grpo": {"rl_context": "prompt", "sft_targets": "none"},
    "sft": {"rl_context": "none", "sft_targets": "all", "sft_weight": 1.0},
    "sft-then-grpo": {
        "rl_context": "prompt",
        "sft_targets": "all",
        "sft_weight": 1.0,
        "rl_start": 0.5,
        "sft_end": 0.5,
    },
    "chord": {"rl_context": "prompt", "sft_targets": "all", "mu_start": 0.9, "mu_end": 0.05},
    "matchtir": {"rl_context": "prompt", "sft_targets": "none", "advantages": "turn"},
}
