"""Log-probabilities (and entropies) of target tokens from hidden states, without an [N, V] logits tensor.

    lp = log_softmax(softcap(x W^T + b) / T)[target]          H = entropy of that distribution

Formulas and gradients: reference/linear_logprob.py. Saved for the backward: the inputs, lse [N] and entropy
[N]; the backward recomputes logits, so any loss may follow.
"""

import torch
from torch import Tensor

from pact_fast.kernels.checks import require_indices
from pact_fast.kernels.reference import linear_logprob as reference


@torch.library.custom_op("pact_fast::linear_logprob", mutates_args=())
def linear_logprob_op(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """logprob [N], entropy [N], lse [N]."""
    require_indices("target", target, weight.shape[0])
    return reference.linear_logprob_forward(hidden, weight, target.long(), bias, temperature, softcap)


@linear_logprob_op.register_fake
def _(hidden, weight, target, bias, temperature, softcap, impl):
    dtype = reference.accumulation_dtype(hidden.dtype)
    return tuple(hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(3))


@torch.library.custom_op("pact_fast::linear_logprob_backward", mutates_args=())
def linear_logprob_backward_op(
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    temperature: float,
    softcap: float | None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; an empty tensor for each that is not needed."""
    needs = (needs_hidden, needs_weight, needs_bias)
    grads = reference.linear_logprob_backward(
        grad_logprob, grad_entropy, hidden, weight, target.long(), bias, temperature, softcap, needs
    )
    return tuple(hidden.new_empty(0) if g is None else g for g in grads)


@linear_logprob_backward_op.register_fake
def _(
    grad_logprob,
    grad_entropy,
    hidden,
    weight,
    target,
    bias,
    lse,
    entropy,
    temperature,
    softcap,
    needs_hidden,
    needs_weight,
    needs_bias,
    impl,
):
    wanted = ((hidden, needs_hidden), (weight, needs_weight), (bias, needs_bias))
    return tuple(torch.empty_like(t) if need else hidden.new_empty(0) for t, need in wanted)


def _setup_context(ctx, inputs, output):
    hidden, weight, target, bias, ctx.temperature, ctx.softcap, ctx.impl = inputs
    _, entropy, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, target, bias, lse, entropy)


def _backward(ctx, grad_logprob, grad_entropy, grad_lse):
    hidden, weight, target, bias, lse, entropy = ctx.saved_tensors
    if grad_logprob is None and grad_entropy is None:
        return (None,) * 7
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
    if grad_logprob is None:
        grad_logprob = torch.zeros_like(lse)
    grads = linear_logprob_backward_op(
        grad_logprob,
        grad_entropy,
        hidden,
        weight,
        target,
        bias,
        lse,
        entropy,
        ctx.temperature,
        ctx.softcap,
        *needs,
        ctx.impl,
    )
    d_hidden, d_weight, d_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return d_hidden, d_weight, None, d_bias, None, None, None


linear_logprob_op.register_autograd(_backward, setup_context=_setup_context)
