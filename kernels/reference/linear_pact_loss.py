"""Plain PyTorch reference of `linear_pact_loss`, chunked over rows, its gradient made in the forward.

With lp and H the log-prob and entropy of a row (linear_logprob.py), A its advantage, w and u its policy and
SFT weight:

    ratio  = exp(lp - old)                              old = lp where no old log-prob is given
    policy = -min(ratio A, clip(ratio, 1 - eps_low, 1 + eps_high) A)
    policy = -max(-policy, dual_clip A)                 with dual_clip, where A < 0
    kl     = exp(ref - lp) - (ref - lp) - 1
    loss   = sum_r w (policy + beta kl - entropy_coef H) - u lp

    dL/dlp = w (-A ratio [clipped branch not active] + beta (1 - exp(ref - lp))) - u
    dL/dH  = -w entropy_coef

dL/dlp is known once the row's log-sum-exp is, so one pass over a chunk's logits yields loss and gradient. A
row whose weights are both 0 is dropped before anything is computed: it adds exactly 0 whatever its other
values hold. The log-ratio is cut at +80, past which exp overflows and 0 * inf would turn a zero advantage
into NaN.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pact_fast.kernels.reference.linear_logprob import (
    GradientSums,
    accumulation_dtype,
    logits_gradient,
    row_logits,
    row_statistics,
    rows_per_chunk,
)

MAX_LOG_RATIO = 80.0


class Surrogate(NamedTuple):
    """The scalars of the loss; their meaning is in the file's docstring."""

    epsilon_low: float
    epsilon_high: float
    dual_clip: float | None
    beta: float
    entropy_coef: float


class RowTerms(NamedTuple):
    """Per-row inputs [R], fp32 (fp64 for fp64 hidden); None where the caller gave none."""

    policy_weight: Tensor | None
    advantages: Tensor | None
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    sft_weight: Tensor | None

    def select(self, rows: Tensor) -> "RowTerms":
        return RowTerms(*(None if value is None else value[rows] for value in self))

    def live(self) -> Tensor:
        weights = [w != 0 for w in (self.policy_weight, self.sft_weight) if w is not None]
        return weights[0] if len(weights) == 1 else weights[0] | weights[1]


def row_losses(
    logprob: Tensor, entropy: Tensor, terms: RowTerms, how: Surrogate
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums (policy, sft, kl, entropy, clipped rows) [5], dL/dlogprob [n], dL/dentropy [n] or None."""
    zero = torch.zeros_like(logprob)
    policy, kl, clipped, weighted_entropy, grad, grad_entropy = zero, zero, zero, zero, zero, None
    if terms.policy_weight is not None:
        weight, advantages = terms.policy_weight, terms.advantages
        if terms.old_logprobs is None:
            ratio = torch.ones_like(logprob)
        else:
            ratio = (logprob - terms.old_logprobs).clamp(max=MAX_LOG_RATIO).exp()
        objective = torch.minimum(
            ratio * advantages, ratio.clamp(1 - how.epsilon_low, 1 + how.epsilon_high) * advantages
        )
        inactive = ((advantages > 0) & (ratio > 1 + how.epsilon_high)) | (
            (advantages < 0) & (ratio < 1 - how.epsilon_low)
        )
        if how.dual_clip is not None:
            floor = how.dual_clip * advantages
            dual = (advantages < 0) & (objective < floor)
            objective, inactive = torch.where(dual, floor, objective), inactive | dual
        slope = torch.where(inactive, zero, -ratio * advantages)
        if how.beta != 0.0:
            gap = terms.ref_logprobs - logprob
            kl = gap.exp() - gap - 1
            slope = slope + how.beta * (1 - gap.exp())
        on = weight != 0  # selects rather than multiplies: the other rows may hold NaN
        policy, kl = torch.where(on, -weight * objective, zero), torch.where(on, weight * kl, zero)
        weighted_entropy, grad = weight * entropy, torch.where(on, weight * slope, zero)
        clipped = (on & inactive).to(logprob.dtype)
        grad_entropy = -how.entropy_coef * weight if how.entropy_coef != 0.0 else None
    sft = zero
    if terms.sft_weight is not None:
        sft, grad = -terms.sft_weight * logprob, grad - terms.sft_weight
    sums = torch.stack([policy.sum(), sft.sum(), kl.sum(), weighted_entropy.sum(), clipped.sum()])
    return sums, grad, grad_entropy


def linear_pact_loss_forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    row_index: Tensor | None,
    terms: RowTerms,
    how: Surrogate,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Sums as in row_losses [5], logprobs [R] (0 on dead rows), gradients of (hidden, weight, bias)."""
    sums = hidden.new_zeros(5, dtype=accumulation_dtype(hidden.dtype))
    logprobs = sums.new_zeros(target.shape[0])
    grads = GradientSums(hidden, weight, bias, needs)
    for rows in terms.live().nonzero().squeeze(1).split(rows_per_chunk(hidden, weight.shape[0])):
        source = rows if row_index is None else row_index[rows]
        x, y = hidden[source], target[rows]
        logits, squashed = row_logits(x, weight, bias, temperature, softcap)
        probs, logprobs[rows], entropy, (_, log_sum) = row_statistics(logits, y)
        part, grad, grad_entropy = row_losses(logprobs[rows], entropy, terms.select(rows), how)
        sums += part
        if any(needs):
            dz = logits_gradient(
                probs, logits, squashed, y, log_sum, entropy, grad, grad_entropy, temperature
            )
            grads.add(source, x, dz)
    return sums, logprobs, grads.result()
