"""The PACT loss of an LM head: `linear_token_loss` of the one formula in objective/losses.py."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pact_fast.kernels.lm_head.checks import require_indices, require_positive, require_weights
from pact_fast.kernels.lm_head.shard import Shard, require_equal_widths
from pact_fast.kernels.lm_head.token_loss import by_autograd, hand_out, keep_gradients, token_loss
from pact_fast.objective.losses import PolicyLossConfig, RowTerms, row_losses
from pact_fast.ops.checks import (
    autocast,
    check_head,
    check_memory,
    check_temperature,
    choose,
    row_dtype,
    row_values,
    shard_of,
)
from pact_fast.ops.token_loss import TokenLossOutput, check_row_arguments, recomputed


class PactLossOutput(NamedTuple):
    """loss = policy_loss + beta * kl - entropy_coef * entropy + sft_loss; only `loss` is differentiable.

    The four parts are weighted sums in fp32 (fp64 for fp64 hidden): policy_loss, kl and entropy with
    policy_weight (so they are means where the weights add up to 1), sft_loss with sft_weight. clip_fraction
    is the share of the rows with policy_weight != 0 whose clipped branch is active. logprobs [R] is 0 on rows
    whose weights are both 0.
    """

    loss: Tensor
    policy_loss: Tensor
    sft_loss: Tensor
    kl: Tensor
    entropy: Tensor
    clip_fraction: Tensor
    logprobs: Tensor


def linear_pact_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    row_index: Tensor | None = None,
    policy_weight: Tensor | None = None,
    advantages: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sft_weight: Tensor | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    memory: str = "fast",
    tp_group: Any = None,
    impl: str = "auto",
) -> PactLossOutput:
    """The clipped surrogate plus the weighted SFT loss of an LM head (PACT, arXiv 2606.16215).

    Row r predicts target[r] from hidden[row_index[r]]; lp and H are its log-prob and entropy. Equals::

        old = lp.detach() if old_logprobs is None else old_logprobs
        ratio = exp(lp - old)                                    # the log-ratio is cut at +80
        policy = -min(ratio * A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) * A)
        policy = -max(-policy, dual_clip * A)                    # only with dual_clip, where A < 0
        kl = exp(ref_logprobs - lp) - (ref_logprobs - lp) - 1    # only with beta != 0
        loss = (policy_weight * (policy + beta * kl - entropy_coef * H) + sft_weight * -lp).sum()

    It is :func:`linear_token_loss` of `objective.losses.row_losses`, with the same `memory`. The weights
    carry all normalisation; one call serves policy rows and SFT rows, at a temperature per row. A row whose
    weights are both 0 contributes exactly 0, whatever its other values hold.

    Args:
        hidden: [T, H] float, any strides. weight: [V, H] of the same dtype. bias: [V] or None.
        target: [R] integer, in [0, V) on rows with a weight.
        row_index: [R] integer in [0, T), repeats allowed; None: R = T, row r is hidden[r]. On a device its
            rows are taken as the live ones and nothing waits for the device; without it, rows of weight 0
            are found first (one wait).
        policy_weight, sft_weight: [R] >= 0; at least one of them. advantages: [R], with policy_weight.
        old_logprobs: [R] or None (the current log-probs: ratio 1). ref_logprobs: [R], needed for beta != 0.
        epsilon_low, epsilon_high: >= 0. dual_clip: > 1 or None. beta, entropy_coef: coefficients.
        temperature: > 0, one or [R]. softcap, tp_group, impl: as in :func:`linear_logprob`.
        memory: as in :func:`linear_token_loss`.

    Returns:
        PactLossOutput; differentiable in hidden, weight and bias through `loss`.

    Raises:
        ValueError, TypeError: naming the argument, before anything is computed.
    """
    hidden, weight, bias = autocast(hidden, weight, bias)
    check_head(hidden, weight, bias, softcap)
    rows = check_row_arguments(hidden, target, row_index)
    check_surrogate(policy_weight, advantages, old_logprobs, ref_logprobs, sft_weight, beta, entropy_coef)
    check_scalars(epsilon_low, epsilon_high, dual_clip, beta, entropy_coef)
    check_memory(memory)
    heat = check_temperature(temperature, rows, hidden)
    impl = choose(impl, hidden)
    values = {
        "policy_weight": policy_weight,
        "advantages": advantages,
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "sft_weight": sft_weight,
    }
    terms = RowTerms(
        *(None if value is None else row_values(name, value, rows, hidden) for name, value in values.items())
    )
    dual = None if dual_clip is None else float(dual_clip)
    config = PolicyLossConfig(float(epsilon_low), float(epsilon_high), dual, float(beta), float(entropy_coef))
    cap = None if softcap is None else float(softcap)
    if memory == "low":
        out = low_memory(
            hidden, weight, target, row_index, terms, config, bias, temperature, cap, tp_group, impl
        )
    else:
        leaves = (hidden, weight, bias)
        needs = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in leaves]
        out = TokenLossOutput(
            *linear_pact_loss_op(
                *(hidden, weight, target, row_index),
                *terms,
                *config,
                bias,
                *heat,
                cap,
                *shard_of(tp_group),
                *needs,
                impl,
            )[:3]
        )
    parts = row_losses(out.logprobs, out.entropy, terms, config)  # the formula again, for its parts
    policy_rows = 1 if terms.policy_weight is None else (terms.policy_weight != 0).sum().clamp(min=1)
    sums = (parts.policy.sum(), parts.sft.sum(), parts.kl.sum(), parts.entropy.sum())
    return PactLossOutput(out.loss, *sums, parts.clipped.sum() / policy_rows, out.logprobs)


def low_memory(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    row_index: Tensor | None,
    terms: RowTerms,
    config: PolicyLossConfig,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    tp_group: Any,
    impl: str,
) -> TokenLossOutput:
    """By `linear_logprob` over the live rows, which are counted first: that waits for a device."""
    rows = target.shape[0]
    kept = terms.live().nonzero().squeeze(1)
    source = kept if row_index is None else row_index.index_select(0, kept)
    heat = temperature[kept] if isinstance(temperature, Tensor) else temperature
    chosen = terms.select(kept)

    def loss_fn(logprobs: Tensor, entropy: Tensor, numbers: Tensor) -> Tensor:
        return row_losses(logprobs, entropy, chosen, config).total(config)

    head = (source, heat, bias, softcap)
    out = recomputed(hidden, weight, target[kept], loss_fn, *head, tp_group=tp_group, impl=impl)
    spread = [v.new_zeros(rows).index_copy(0, kept, v) for v in out[1:]]
    return TokenLossOutput(out.loss, *spread)


@torch.library.custom_op("pact_fast::linear_pact_loss", mutates_args=())
def linear_pact_loss_op(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    row_index: Tensor | None,
    policy_weight: Tensor | None,
    advantages: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    sft_weight: Tensor | None,
    epsilon_low: float,
    epsilon_high: float,
    dual_clip: float | None,
    beta: float,
    entropy_coef: float,
    bias: Tensor | None,
    temperature: float,
    row_temperature: Tensor | None,
    softcap: float | None,
    group: str,
    rank: int,
    ranks: int,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss [], logprobs [R], entropy [R], then the gradients of hidden, weight and bias.

    A gradient that is not needed is an empty tensor. A custom op of its own, beside the autograd function of
    `linear_token_loss`, because its loss function is known: one node of a compiled graph.
    """
    terms = RowTerms(policy_weight, advantages, old_logprobs, ref_logprobs, sft_weight)
    config = PolicyLossConfig(epsilon_low, epsilon_high, dual_clip, beta, entropy_coef)
    shard, live = Shard(group, rank, ranks), terms.live()
    require_weights("policy_weight", policy_weight)
    require_weights("sft_weight", sft_weight)
    require_equal_widths(weight, shard)
    require_indices("target", target, weight.shape[0] * ranks, live=live)
    if row_index is not None:
        require_indices("row_index", row_index, hidden.shape[0])
    if row_temperature is not None:
        require_positive("temperature", row_temperature)

    def loss_fn(logprobs: Tensor, entropy: Tensor, rows: Tensor) -> Tensor:
        return row_losses(logprobs, entropy, terms.select(rows), config).total(config)

    heat = temperature if row_temperature is None else row_temperature
    needs = (needs_hidden, needs_weight, needs_bias)
    head = (bias, heat, softcap, shard, needs, impl, live)
    loss, logprobs, entropy, grads = token_loss(
        hidden, weight, target, row_index, by_autograd(loss_fn), *head
    )
    d_hidden, d_weight, d_bias = (hidden.new_empty(0) if g is None else g for g in grads)
    return loss, logprobs, entropy, d_hidden, d_weight, d_bias


@linear_pact_loss_op.register_fake
def _(hidden, weight, target, *rest):
    bias, needs = rest[BIAS - 3], rest[-4:-1]
    loss = hidden.new_empty((), dtype=row_dtype(hidden))
    rows = [loss.new_empty(target.shape[0]) for _ in range(2)]
    grads = (
        hidden.new_empty(0) if not need else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, need in zip((hidden, weight, bias), needs, strict=True)
    )
    return loss, *rows, *grads


NUM_INPUTS = 25
HIDDEN, WEIGHT, BIAS = 0, 1, 14


def _setup_context(ctx, inputs, output):
    _, logprobs, entropy, *grads = output
    ctx.mark_non_differentiable(logprobs, entropy, *grads)
    keep_gradients(ctx, grads, inputs[-4:-1], inputs[-1], "linear_pact_loss")


def _backward(ctx, grad_loss, *unused):
    out: list[Tensor | None] = [None] * NUM_INPUTS
    out[HIDDEN], out[WEIGHT], out[BIAS] = hand_out(ctx, grad_loss)
    return tuple(out)


linear_pact_loss_op.register_autograd(_backward, setup_context=_setup_context)


def check_surrogate(
    policy_weight, advantages, old_logprobs, ref_logprobs, sft_weight, beta, entropy_coef
) -> None:
    if policy_weight is None and sft_weight is None:
        raise ValueError(
            "policy_weight and sft_weight are both None: give at least one, or no row has a loss"
        )
    if (policy_weight is None) != (advantages is None):
        raise ValueError("policy_weight and advantages belong together: give both or neither")
    if policy_weight is None:
        for name, value in (("old_logprobs", old_logprobs), ("ref_logprobs", ref_logprobs)):
            if value is not None:
                raise ValueError(f"{name} has no effect without policy_weight")
        for name, value in (("beta", beta), ("entropy_coef", entropy_coef)):
            if value != 0.0:
                raise ValueError(f"{name}={value} has no effect without policy_weight")
    if beta != 0.0 and ref_logprobs is None:
        raise ValueError(f"beta={beta} needs ref_logprobs")


def check_scalars(epsilon_low, epsilon_high, dual_clip, beta, entropy_coef) -> None:
    for name, value in (("epsilon_low", epsilon_low), ("epsilon_high", epsilon_high), ("beta", beta)):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be finite and >= 0, got {value}")
    if not math.isfinite(entropy_coef):
        raise ValueError(f"entropy_coef must be finite, got {entropy_coef}")
    if dual_clip is not None and not (dual_clip > 1 and math.isfinite(dual_clip)):
        raise ValueError(f"dual_clip must be > 1, or None for none, got {dual_clip}")
