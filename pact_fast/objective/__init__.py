"""The PACT objective as pure functions of tensors and config values: no model, no rollout.

Every training method is a choice of these weights over the same packed pass (arXiv 2606.16215; GRPO: arXiv
2402.03300; CHORD: arXiv 2508.11408).
"""

from pact_fast.objective.advantages import ADVANTAGE_MIXES, ADVANTAGE_MODES, group_advantages, turn_advantages
from pact_fast.objective.anchoring import anchor_mask
from pact_fast.objective.checks import objective_problems
from pact_fast.objective.distillation import shaped_advantages, token_gaps, token_gates
from pact_fast.objective.presets import PRESETS, SOURCES, ObjectiveConfig
from pact_fast.objective.schedules import (
    Schedule,
    SFTStrength,
    chord_mu,
    reasoning_level,
    sft_strength,
    tool_call_scale,
)
from pact_fast.objective.weights import (
    NORMALIZATIONS,
    policy_token_weight,
    sft_token_strengths,
    sft_token_weights,
)

__all__ = [
    "ADVANTAGE_MIXES",
    "ADVANTAGE_MODES",
    "NORMALIZATIONS",
    "PRESETS",
    "SOURCES",
    "ObjectiveConfig",
    "SFTStrength",
    "Schedule",
    "anchor_mask",
    "chord_mu",
    "group_advantages",
    "objective_problems",
    "policy_token_weight",
    "reasoning_level",
    "sft_strength",
    "sft_token_strengths",
    "sft_token_weights",
    "shaped_advantages",
    "token_gaps",
    "token_gates",
    "tool_call_scale",
    "turn_advantages",
]
