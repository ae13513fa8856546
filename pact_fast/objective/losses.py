"""The loss of a row, once for the whole repository: clipped surrogate, k3 KL, entropy bonus, weighted SFT.

With lp and H the log-prob and the entropy of a row, A its advantage, w and u its policy and SFT weight:

    ratio  = exp(lp - old)                              old = lp where no old log-prob is given
    policy = -min(ratio A, clip(ratio, 1 - eps_low, 1 + eps_high) A)
    policy = -max(-policy, dual_clip A)                 with dual_clip, where A < 0
    kl     = exp(ref - lp) - (ref - lp) - 1
    loss   = w (policy + beta kl - entropy_coef H) - u lp

Plain torch on [n] vectors, differentiable in lp and H by autograd: `ops.linear_pact_loss` is
`ops.linear_token_loss` of this function. A row whose weight is 0 gives exactly 0 and no gradient, whatever
its other values hold: its values are replaced before anything is computed, because a gradient of 0 through
a NaN is NaN. The log-ratio is cut at +80, past which exp overflows and 0 * inf would turn a zero advantage
into NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 80.0


class PolicyLossConfig(NamedTuple):
    """The scalars of the loss; their meaning is in the file's docstring."""

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float | None = None
    beta: float = 0.0
    entropy_coef: float = 0.0


class RowTerms(NamedTuple):
    """Per-row inputs [R]; None where the caller gave none."""

    policy_weight: Tensor | None = None
    advantages: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    sft_weight: Tensor | None = None

    def select(self, rows: Tensor) -> RowTerms:
        return RowTerms(*(None if value is None else value[rows] for value in self))

    def live(self) -> Tensor:
        """bool [R]: rows with a weight."""
        weights = [w != 0 for w in (self.policy_weight, self.sft_weight) if w is not None]
        return weights[0] if len(weights) == 1 else weights[0] | weights[1]


class RowLosses(NamedTuple):
    """The weighted parts of each row's loss [n]; `clipped` is 1 where the clipped branch is active."""

    policy: Tensor
    sft: Tensor
    kl: Tensor
    entropy: Tensor
    clipped: Tensor

    def total(self, config: PolicyLossConfig) -> Tensor:
        loss = self.policy + self.sft
        if config.beta != 0.0:
            loss = loss + config.beta * self.kl
        return loss - config.entropy_coef * self.entropy if config.entropy_coef != 0.0 else loss


def policy_loss(
    logprobs: Tensor, advantages: Tensor, old_logprobs: Tensor, config: PolicyLossConfig
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate of each row [n] before its weight, and whether its clipped branch is active."""
    ratio = (logprobs - old_logprobs).clamp(max=MAX_LOG_RATIO).exp()
    low, high = 1 - config.epsilon_low, 1 + config.epsilon_high
    objective = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    clipped = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
    if config.dual_clip is not None:
        floor = config.dual_clip * advantages
        dual = (advantages < 0) & (objective < floor)
        objective, clipped = torch.where(dual, floor, objective), clipped | dual
    return -objective, clipped


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The k3 estimate of KL(pi | ref) from one sampled token [n], >= 0."""
    gap = ref_logprobs - logprobs
    return gap.exp() - gap - 1


def row_losses(logprobs: Tensor, entropy: Tensor, terms: RowTerms, config: PolicyLossConfig) -> RowLosses:
    """Every part of the loss of n rows, from their log-probs [n] and entropies [n]."""
    zero = torch.zeros_like(logprobs)
    policy = sft = kl = weighted_entropy = clipped = zero
    if terms.policy_weight is not None:
        weight, advantages = terms.policy_weight, terms.advantages
        assert advantages is not None, "policy_weight needs advantages"
        on = weight != 0
        lp = torch.where(on, logprobs, zero)
        old = lp.detach() if terms.old_logprobs is None else torch.where(on, terms.old_logprobs, zero)
        surrogate, inactive = policy_loss(lp, torch.where(on, advantages, zero), old, config)
        policy, clipped = weight * surrogate, (on & inactive).to(zero.dtype)
        weighted_entropy = weight * torch.where(on, entropy, zero)
        if config.beta != 0.0:
            assert terms.ref_logprobs is not None, "beta needs ref_logprobs"
            kl = weight * kl_k3(lp, torch.where(on, terms.ref_logprobs, zero))
    if terms.sft_weight is not None:
        sft = -terms.sft_weight * torch.where(terms.sft_weight != 0, logprobs, zero)
    return RowLosses(policy, sft, kl, weighted_entropy, clipped)
