"""The anchored surrogate and the component-weighted SFT loss on one LM head, gradient made in the forward.

Formulas: reference/linear_pact_loss.py. Saved for the backward: only the finished gradients, which the first
backward multiplies by the incoming one and hands out; there is nothing to recompute, and nothing left for a
second backward.
"""

import torch
from torch import Tensor

from pact_fast.kernels.checks import require_indices, require_weights
from pact_fast.kernels.reference import linear_pact_loss as reference
from pact_fast.kernels.reference.linear_logprob import accumulation_dtype


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
    softcap: float | None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss [], sums (policy, sft, kl, entropy, clipped rows) [5], logprobs [R], three gradients.

    The gradients are those of hidden, weight and bias; an empty tensor for each that is not needed.
    """
    terms = reference.RowTerms(policy_weight, advantages, old_logprobs, ref_logprobs, sft_weight)
    how = reference.Surrogate(epsilon_low, epsilon_high, dual_clip, beta, entropy_coef)
    require_weights("policy_weight", policy_weight)
    require_weights("sft_weight", sft_weight)
    require_indices("target", target, weight.shape[0], live=terms.live())
    if row_index is not None:
        require_indices("row_index", row_index, hidden.shape[0])
    needs = (needs_hidden, needs_weight, needs_bias)
    sums, logprobs, grads = reference.linear_pact_loss_forward(
        hidden,
        weight,
        target.long(),
        None if row_index is None else row_index.long(),
        terms,
        how,
        bias,
        temperature,
        softcap,
        needs,
    )
    loss = sums[0] + sums[1]
    if beta != 0.0:
        loss = loss + beta * sums[2]
    if entropy_coef != 0.0:
        loss = loss - entropy_coef * sums[3]
    return loss, sums, logprobs, *(hidden.new_empty(0) if g is None else g for g in grads)


@linear_pact_loss_op.register_fake
def _(
    hidden,
    weight,
    target,
    row_index,
    policy_weight,
    advantages,
    old_logprobs,
    ref_logprobs,
    sft_weight,
    epsilon_low,
    epsilon_high,
    dual_clip,
    beta,
    entropy_coef,
    bias,
    temperature,
    softcap,
    needs_hidden,
    needs_weight,
    needs_bias,
    impl,
):
    sums = hidden.new_empty(5, dtype=accumulation_dtype(hidden.dtype))
    wanted = ((hidden, needs_hidden), (weight, needs_weight), (bias, needs_bias))
    grads = (torch.empty_like(t) if need else hidden.new_empty(0) for t, need in wanted)
    return sums.new_empty(()), sums, sums.new_empty(target.shape[0]), *grads


NUM_INPUTS = 21
HIDDEN, WEIGHT, BIAS = 0, 1, 14


def _setup_context(ctx, inputs, output):
    _, sums, logprobs, *grads = output
    ctx.mark_non_differentiable(sums, logprobs, *grads)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*grads)
    ctx.needs, ctx.spent = inputs[-4:-1], False


def _backward(ctx, grad_loss, *unused):
    if ctx.spent:
        raise RuntimeError(
            "the loss was already backpropagated: linear_pact_loss makes its gradient in the forward and "
            "hands it out once. Compute the loss again, or use linear_logprob, which recomputes"
        )
    out: list[Tensor | None] = [None] * NUM_INPUTS
    if grad_loss is None:
        return tuple(out)
    ctx.spent = True
    for position, grad, need in zip((HIDDEN, WEIGHT, BIAS), ctx.saved_tensors, ctx.needs, strict=True):
        out[position] = scale_gradient(grad, grad_loss) if need else None
    return tuple(out)


def scale_gradient(grad: Tensor, by: Tensor) -> Tensor:
    return grad * by.to(grad.dtype)


linear_pact_loss_op.register_autograd(_backward, setup_context=_setup_context)
