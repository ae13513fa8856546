"""The anchored surrogate and the component-weighted SFT loss on one LM head, gradient made in the forward.

Formulas: reference.py. Saved for the backward: only the finished gradients, which the first
backward multiplies by the incoming one and hands out; there is nothing to recompute, and nothing left for a
second backward.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from pact_fast.kernels.lm_head import reference
from pact_fast.kernels.lm_head.checks import require_indices, require_weights
from pact_fast.kernels.lm_head.gemm import add_product, capturing, equal_chunks, padded_rows
from pact_fast.kernels.lm_head.reference import accumulation_dtype

CHUNK_BYTES = (
    1216 << 20
)  # of a chunk's logits: 4,096 rows of 151,936 in bf16; below 1,000 rows dW is bound by memory


def rows_loss(impl: str) -> Callable[..., None]:
    """The row kernel of an implementation, imported only when it is wanted."""
    if impl == "cuda":
        from pact_fast.kernels.lm_head import rows_cuda

        return rows_cuda.rows_loss
    from pact_fast.kernels.lm_head import rows

    return rows.rows_loss


def fused_forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    row_index: Tensor | None,
    terms: reference.RowTerms,
    config: reference.PolicyLossConfig,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    needs: tuple[bool, bool, bool],
    impl: str,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Sums [5], logprobs [R], gradients of (hidden, weight, bias): per chunk three GEMMs and one row kernel.

    Waits for the device once, to count the live rows, and only where no row_index names them.
    """
    kept = None
    if row_index is None and not capturing(hidden):
        kept = terms.live().nonzero().squeeze(1)
        if kept.numel() == target.shape[0]:
            kept = None
        else:
            row_index, target, terms = kept, target[kept], terms.select(kept)
    rows, vocab = target.shape[0], weight.shape[0]
    logprobs = hidden.new_empty(rows, dtype=torch.float32)
    parts = hidden.new_empty(5, rows, dtype=torch.float32)
    step = min(equal_chunks(rows, CHUNK_BYTES // (hidden.element_size() * vocab)), rows)
    grads = ChunkGradients(hidden, weight, bias, rows, step, needs)
    buffer = padded_rows(step, vocab, hidden)
    row_kernel = rows_loss(impl)
    for i in range(0, rows, step or 1):
        chunk = slice(i, min(i + step, rows))
        part = terms.select(chunk)
        x = hidden[chunk] if row_index is None else hidden.index_select(0, row_index[chunk])
        if kept is None:
            x = x.masked_fill(~part.live()[:, None], 0)  # 0 * NaN in dW
        logits = buffer[: chunk.stop - i]
        torch.mm(x, weight.t(), out=logits)
        row_kernel(
            logits,
            bias,
            target[chunk],
            part,
            config,
            logprobs[chunk],
            parts[:, chunk],
            temperature,
            softcap,
            any(needs),
        )
        grads.add(chunk, x, logits)
    del buffer
    if kept is not None:
        logprobs = logprobs.new_zeros(hidden.shape[0]).index_copy_(0, kept, logprobs)
    return parts.sum(1), logprobs, grads.result(row_index)


class ChunkGradients:
    """dX per loss row, dW and db summed over chunks in fp32; a single chunk writes dW in its final dtype."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: int,
        step: int,
        needs: tuple[bool, bool, bool],
    ):
        needs_hidden, needs_weight, needs_bias = needs
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.d_rows = hidden.new_empty(rows, hidden.shape[1]) if needs_hidden else None
        self.d_weight, self.d_bias = None, None
        if needs_weight:
            dtype = weight.dtype if rows == step else torch.float32
            make = torch.zeros if rows == 0 else torch.empty
            self.d_weight = make(weight.shape, dtype=dtype, device=weight.device)
        if bias is not None and needs_bias:
            self.d_bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)

    def add(self, chunk: slice, x: Tensor, dz: Tensor) -> None:
        if self.d_rows is not None:
            torch.mm(dz, self.weight, out=self.d_rows[chunk])
        if self.d_weight is not None:
            add_product(self.d_weight, dz.t(), x, first=chunk.start == 0)
        if self.d_bias is not None:
            self.d_bias += dz.sum(0, dtype=torch.float32)

    def result(self, row_index: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        d_rows = d_hidden = self.d_rows
        if d_rows is not None and row_index is not None:
            from pact_fast.kernels.lm_head.gradient_rows import sum_rows

            d_hidden = d_rows.new_empty(self.hidden.shape)
            sum_rows(d_rows, row_index, d_hidden)
        d_weight = None if self.d_weight is None else self.d_weight.to(self.weight.dtype)
        if self.d_bias is None or self.bias is None:
            return d_hidden, d_weight, None
        return d_hidden, d_weight, self.d_bias.to(self.bias.dtype)


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
    values = (policy_weight, advantages, old_logprobs, ref_logprobs, sft_weight)
    terms = reference.RowTerms(*(None if value is None else value.contiguous() for value in values))
    bias = None if bias is None else bias.contiguous()
    config = reference.PolicyLossConfig(epsilon_low, epsilon_high, dual_clip, beta, entropy_coef)
    require_weights("policy_weight", policy_weight)
    require_weights("sft_weight", sft_weight)
    require_indices("target", target, weight.shape[0], live=terms.live())
    if row_index is not None:
        require_indices("row_index", row_index, hidden.shape[0])
    needs = (needs_hidden, needs_weight, needs_bias)
    index = None if row_index is None else row_index.long()
    forward = (
        reference.linear_pact_loss_forward if impl == "torch" else functools.partial(fused_forward, impl=impl)
    )
    with torch.cuda.device_of(hidden):  # Triton launches on the current device, wherever the tensors are
        sums, logprobs, grads = forward(
            hidden,
            weight,
            target.long().contiguous(),
            index,
            terms,
            config,
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
    d_hidden, d_weight, d_bias = (hidden.new_empty(0) if g is None else g for g in grads)
    return loss, sums, logprobs, d_hidden, d_weight, d_bias


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
    grads = (
        hidden.new_empty(0) if not need else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, need in wanted
    )
    return sums.new_empty(()), sums, sums.new_empty(target.shape[0]), *grads


NUM_INPUTS = 21
HIDDEN, WEIGHT, BIAS = 0, 1, 14


def _setup_context(ctx, inputs, output):
    _, sums, logprobs, *grads = output
    ctx.mark_non_differentiable(sums, logprobs, *grads)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*grads)
    ctx.needs, ctx.impl, ctx.spent = inputs[-4:-1], inputs[-1], False


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
        out[position] = scale_gradient(grad, grad_loss, ctx.impl) if need else None
    return tuple(out)


def scale_gradient(grad: Tensor, by: Tensor, impl: str) -> Tensor:
    """grad * by; in place with the kernels, where a second [V, H] tensor would be the peak of the whole step.

    Under torch.compile the backward is traced with tensors of another type, and the product is left to the
    compiler.
    """
    if impl != "torch" and type(grad) is Tensor:
        from pact_fast.kernels.lm_head.gradient_rows import scale_

        with torch.cuda.device_of(grad):
            return scale_(grad, by)
    return grad * by.to(grad.dtype)


linear_pact_loss_op.register_autograd(_backward, setup_context=_setup_context)
