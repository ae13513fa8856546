"""The PACT objective as pure functions of tensors and config values: no model, no rollout.

Every training method is a choice of these weights over the same packed pass (arXiv 2606.16215; GRPO: arXiv
2402.03300; CHORD: arXiv 2508.11408).
"""

from pact_fast.objective.advantages import ADVANTAGE_MIXES, ADVANTAGE_MODES, group_advantages, turn_advantages
from pact_fast.objective.anchoring import anchor_mask
from pact_fast.objective.presets import PRESETS, ObjectiveConfig
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
    "ObjectiveConfig",
    "SFTStrength",
    "Schedule",
    "anchor_mask",
    "chord_mu",
    "group_advantages",
    "policy_token_weight",
    "reasoning_level",
    "sft_strength",
    "sft_token_strengths",
    "sft_token_weights",
    "tool_call_scale",
    "turn_advantages",
]
