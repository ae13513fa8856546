"""What a rollout's tokens learn from how likely they are under a privileged context.

With t(c) the log-prob of a sampled token under c by the teacher, c'_1 .. c'_K wrong contexts, s its log-prob
under x by the policy, and A its advantage from rewards:

    gap    = t(c) - s                                            without wrong contexts
    gap    = t(c) - log(mean_k exp t(c'_k))                      with them: what a right context adds
    g      = sigmoid(distillation_gate gap)                      1 without a gate
    A'     = A + distillation_weight g gap                       distillation=sampled
    A'     = A + distillation_weight tanh(gap / tau)            distillation=modulate; 0 past a change of sign
    loss  += w distillation_weight g D(p_teacher(.|c,y), p(.|x,y))       divergences (ops.linear_divergence)

Nothing here has a gradient. Sources: sampled arXiv 2601.19897 and 2601.18734; gate arXiv 2605.15155; modulate
and wrong contexts arXiv 2606.11709.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pact_fast.objective.presets import ObjectiveConfig


def token_gaps(privileged: Tensor, prompt_only: Tensor | None, wrong: Sequence[Tensor]) -> Tensor:
    """How much likelier each token is under c than under x, or than under wrong contexts: [n] each."""
    if wrong:
        return privileged - (torch.stack(list(wrong)).logsumexp(0) - math.log(len(wrong)))
    assert prompt_only is not None, "without wrong contexts the gap is to x"
    return privileged - prompt_only


def token_gates(gaps: Tensor, objective: ObjectiveConfig) -> Tensor:
    """Factor g [n] on what is distilled from each token; 1 without a gate."""
    if objective.distillation_gate is None:
        return torch.ones_like(gaps)
    return torch.sigmoid(objective.distillation_gate * gaps)


def shaped_advantages(advantages: Tensor, gaps: Tensor, objective: ObjectiveConfig) -> Tensor:
    """Advantages [n] from those of rewards [n] and the gaps [n]; as they are where distributions teach."""
    strength = objective.distillation_weight * token_gates(gaps, objective)
    if objective.distillation == "sampled":
        return advantages + strength * gaps
    if objective.distillation == "modulate":
        moved = advantages + strength * torch.tanh(gaps / objective.modulation_scale)
        same_sign = torch.where(advantages > 0, moved.clamp(min=0), moved.clamp(max=0))
        return torch.where(advantages == 0, advantages, same_sign)
    return advantages
