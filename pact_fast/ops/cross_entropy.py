"""Weighted cross-entropy of an LM head with the meaning of torch's."""

from typing import Any

import torch
from torch import Tensor

from pact_fast.ops.checks import check_rows, describe, row_dtype, row_values
from pact_fast.ops.logprob import logprobs_and_entropy
from pact_fast.ops.pact_loss import linear_pact_loss


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    row_index: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    memory: str = "fast",
    tp_group: Any = None,
    impl: str = "auto",
) -> Tensor:
    """Cross-entropy of an LM head without [N, V] logits, a weight per token: the component-masked SFT loss.

    Equals, with `logprobs` of :func:`linear_logprob` and w = token_weight, 0 where target == ignore_index::

        loss = (w * -logprobs).sum() / w.sum()     # reduction="mean", as F.cross_entropy
        loss = (w * -logprobs).sum()               # reduction="sum"
        loss = w * -logprobs                       # reduction="none", [N]

    "mean" is 0, where torch's is NaN, if all weights are 0. "none" computes the logits again in its backward;
    "sum" and "mean" make their gradient in the forward (one backward only) unless memory="low". Rows of
    weight 0 cost nothing and may hold any target.

    Args, besides those of :func:`linear_token_loss`:
        target: [N], or [R] with row_index: in [0, V) or ignore_index; any other value is an error.
        token_weight: [N] (or [R]) >= 0, a mask or per-token strengths; None: all 1. Not differentiable.
        ignore_index: of targets that count nowhere.
        label_smoothing: 0; anything else is refused.

    Returns:
        The loss, fp32 (fp64 for fp64 hidden).
    """
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f'reduction must be "sum", "mean" or "none", got {reduction!r}')
    if label_smoothing != 0.0:
        raise ValueError(
            f"label_smoothing={label_smoothing} is not supported, only 0.0: it needs the mean of all logits "
            "of a row; use F.cross_entropy on materialised logits"
        )
    rows = check_rows("target", target, None, hidden, integer=True)
    if token_weight is None:
        token_weight = torch.ones_like(target, dtype=row_dtype(hidden))
    if not isinstance(token_weight, Tensor) or token_weight.shape != target.shape:
        raise ValueError(
            f"token_weight must have the shape of target {tuple(target.shape)}, got {describe(token_weight)}"
        )
    strength = row_values("token_weight", token_weight, rows, hidden)
    strength = torch.where(target == ignore_index, 0.0, strength)
    if reduction == "none":
        if row_index is not None:
            check_rows("row_index", row_index, rows, hidden, integer=True)
            hidden = hidden.index_select(0, row_index)
        live = strength != 0
        target = torch.where(live, target, 0)
        logprobs, _ = logprobs_and_entropy(hidden, weight, target, bias, temperature, softcap, tp_group, impl)
        return torch.where(live, -strength * logprobs, 0.0)
    if reduction == "mean":
        total = strength.sum()
        strength = torch.where(total > 0, strength / total, strength)
    return linear_pact_loss(
        hidden,
        weight,
        target,
        row_index=row_index,
        sft_weight=strength,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        memory=memory,
        tp_group=tp_group,
        impl=impl,
    ).loss
