"""Any loss of (log-prob, entropy) of each row on one LM head, its gradient made in the forward.

    logits of a chunk of rows -> statistics kernel (one read) -> the caller's loss and its derivative on [n]
    vectors -> gradient kernel (one read, one write, in place) -> dX, dW

Three GEMMs for any such loss. Saved for the backward: only the finished gradients, which the first backward
multiplies by the incoming one and hands out; there is nothing to recompute, and nothing left for a second
backward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pact_fast.kernels.lm_head import gemm, reference
from pact_fast.kernels.lm_head.gemm import ChunkGradients, capturing, chunk_rows, padded_rows
from pact_fast.kernels.lm_head.logprob import chunk_statistics, row_scales
from pact_fast.kernels.lm_head.reference import Grads, RowGradients
from pact_fast.kernels.lm_head.shard import Shard, first_column, summed

LossFn = Callable[[Tensor, Tensor, Tensor], Tensor]


def fused_forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    row_index: Tensor | None,
    numbers: Tensor,
    row_gradients: RowGradients,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    shard: Shard,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Grads]:
    """As `reference.linear_token_loss_forward`; waits for the device nowhere."""
    from pact_fast.kernels.lm_head.rows import rows_grad

    rows, vocab = target.shape[0], weight.shape[0]
    losses, logprobs, entropies = hidden.new_empty(3, rows, dtype=torch.float32).unbind()
    normalizer = hidden.new_empty(2, rows, dtype=torch.float32)
    step = chunk_rows(rows, vocab, hidden, gemm.logits_budget(hidden))
    grads = ChunkGradients(hidden, weight, bias, rows, step, needs)
    buffer, scales = padded_rows(step, vocab, hidden), row_scales(temperature, rows, hidden)
    start = first_column(shard, vocab)
    for i in range(0, rows, step or 1):
        chunk = slice(i, min(i + step, rows))
        x = hidden[chunk] if row_index is None else hidden.index_select(0, row_index[chunk])
        logits, outputs = buffer[: chunk.stop - i], (logprobs[chunk], entropies[chunk], normalizer[:, chunk])
        torch.mm(x, weight.t(), out=logits)
        chunk_statistics(logits, bias, target[chunk], scales[chunk], *outputs, softcap, shard)
        losses[chunk], grad, grad_entropy = row_gradients(*outputs[:2], numbers[chunk])
        if any(needs):
            grad = grad.float().contiguous()
            grad_entropy = None if grad_entropy is None else grad_entropy.float().contiguous()
            head = (logits, bias, target[chunk], scales[chunk], normalizer[:, chunk], entropies[chunk])
            rows_grad(*head, grad, grad_entropy, start, softcap)
            dead = reference.without_gradient(grad, grad_entropy)
            grads.add(chunk, x.masked_fill(dead[:, None], 0), logits)  # 0 * NaN in dW
    del buffer
    d_hidden, d_weight, d_bias = grads.result(row_index)
    return losses, logprobs, entropies, (summed(d_hidden, shard), d_weight, d_bias)


def token_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    row_index: Tensor | None,
    row_gradients: RowGradients,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    shard: Shard,
    needs: tuple[bool, bool, bool],
    impl: str,
    live: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Grads]:
    """loss [], logprobs [R], entropy [R] and the gradients of (hidden, weight, bias).

    Args:
        live: bool [R], rows with a loss; the others are 0 in every output. None: all. Rows that are not live
            are left out before anything is computed; on a device, where counting them would wait for it,
            only if no row_index names the rows.
    """
    rows = target.shape[0]
    target, bias = target.long().contiguous(), None if bias is None else bias.contiguous()
    row_index = None if row_index is None else row_index.long()
    numbers = torch.arange(rows, device=target.device)
    kept = None
    if live is not None:
        if not hidden.is_cuda or (row_index is None and not capturing(hidden)):
            kept = live.nonzero().squeeze(1)
            kept = None if kept.numel() == rows else kept
        else:
            target = torch.where(live, target, 0)
    if kept is not None:
        row_index = kept if row_index is None else row_index[kept]
        target, numbers = target[kept], kept
        temperature = temperature[kept] if isinstance(temperature, Tensor) else temperature
    forward = reference.linear_token_loss_forward if impl == "torch" else fused_forward
    with torch.cuda.device_of(hidden):  # Triton launches on the current device, wherever the tensors are
        losses, logprobs, entropy, grads = forward(
            hidden,
            weight,
            target,
            row_index,
            numbers,
            row_gradients,
            bias,
            temperature,
            softcap,
            shard,
            needs,
        )
    if kept is not None:
        logprobs, entropy = (v.new_zeros(rows).index_copy_(0, kept, v) for v in (logprobs, entropy))
    elif live is not None:
        logprobs, entropy = torch.where(live, logprobs, 0.0), torch.where(live, entropy, 0.0)
    return losses.sum(), logprobs, entropy, grads


def by_autograd(loss_fn: LossFn) -> RowGradients:
    """loss_fn with its derivative by autograd: None for an entropy that it does not use."""
    key = torch._C.DispatchKey.AutogradFunctionality

    def row_gradients(logprobs: Tensor, entropy: Tensor, rows: Tensor):
        # A custom op's body runs with autograd's dispatch off, enable_grad or not: here it is needed.
        with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(key, False):
            inputs = [t.detach().clone().requires_grad_() for t in (logprobs, entropy)]
            losses = loss_fn(inputs[0], inputs[1], rows)
            grad, grad_entropy = torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
        return losses.detach(), torch.zeros_like(logprobs) if grad is None else grad, grad_entropy

    return row_gradients


class TokenLoss(torch.autograd.Function):
    """loss [], logprobs [R], entropy [R] of `compute` (hidden, weight, bias) -> token_loss(...)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, impl: str, compute: Callable):
        loss, logprobs, entropy, grads = compute(hidden, weight, bias, ctx.needs_input_grad[:3])
        keep_gradients(ctx, grads, ctx.needs_input_grad[:3], impl, "linear_token_loss")
        ctx.mark_non_differentiable(logprobs, entropy)
        return loss, logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *unused: Tensor | None):
        return (*hand_out(ctx, grad_loss), None, None)


def keep_gradients(ctx: Any, grads: Any, needs: Any, impl: str, name: str) -> None:
    """Keeps gradients that the forward has made for `hand_out`."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*grads)
    ctx.needs, ctx.impl, ctx.spent, ctx.name = needs, impl, False, name


def hand_out(ctx: Any, grad_loss: Tensor | None) -> list[Tensor | None]:
    """The kept gradients times the incoming one, once; None for each that is not needed."""
    if ctx.spent:
        raise RuntimeError(
            f"the loss was already backpropagated: {ctx.name} makes its gradient in the forward and hands it "
            'out once. Compute the loss again, or use linear_logprob or memory="low", which recompute'
        )
    if grad_loss is None:
        return [None] * len(ctx.needs)
    ctx.spent = True
    return [
        scale_gradient(grad, grad_loss, ctx.impl) if need else None
        for grad, need in zip(ctx.saved_tensors, ctx.needs, strict=True)
    ]


def scale_gradient(grad: Tensor, by: Tensor, impl: str) -> Tensor:
    """grad * by; in place with the kernels, where a second [V, H] tensor would be the peak of the whole step.

    Under torch.compile the backward is traced with tensors of another type, and the product is left to the
    compiler.
    """
    if impl != "torch" and type(grad) is Tensor:
        from pact_fast.kernels.lm_head.rows import scale_

        with torch.cuda.device_of(grad):
            return scale_(grad, by)
    return grad * by.to(grad.dtype)
