"""Log-probabilities (and entropies) of target tokens from hidden states, without an [N, V] logits tensor.

    lp = log_softmax(softcap(x W^T + b) / T)[target]          H = entropy of that distribution

Formulas and gradients: reference.py. Saved for the backward: the inputs, entropy [N] and
normalizer [2, N]; the backward recomputes logits, so any loss may follow.
"""

import torch
from torch import Tensor

from pact_fast.kernels.lm_head import reference
from pact_fast.kernels.lm_head.checks import require_indices, require_positive
from pact_fast.kernels.lm_head.gemm import (
    LOW_BYTES,
    add_product,
    capturing,
    chunk_rows,
    equal_chunks,
    padded_rows,
)
from pact_fast.kernels.lm_head.shard import Shard, first_column, merge, require_equal_widths, summed

FORWARD_BYTES = LOW_BYTES  # of a chunk's logits [rows, V]: a larger one is no faster
BACKWARD_BYTES = 192 << 20  # of a vocabulary block's logits [N, width]; dX takes another 4 N H bytes
MIN_BLOCK = 1024  # columns; narrower GEMMs would be bound by memory


def fused_forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    shard: Shard,
) -> tuple[Tensor, Tensor, Tensor]:
    """logprob [N], entropy [N], normalizer [2, N]: one GEMM and one read of the logits."""
    n, vocab = hidden.shape[0], weight.shape[0]
    logprobs, entropies = hidden.new_empty(n, dtype=torch.float32), hidden.new_empty(n, dtype=torch.float32)
    normalizer = hidden.new_empty(2, n, dtype=torch.float32)
    step = chunk_rows(n, vocab, hidden, FORWARD_BYTES)
    buffer, scales = padded_rows(step, vocab, hidden), row_scales(temperature, n, hidden)
    for i in range(0, n, step or 1):
        rows = slice(i, min(i + step, n))
        logits = buffer[: rows.stop - i]
        torch.mm(hidden[rows], weight.t(), out=logits)
        outputs = (logprobs[rows], entropies[rows], normalizer[:, rows])
        chunk_statistics(logits, bias, target[rows], scales[rows], *outputs, softcap, shard)
    return logprobs, entropies, normalizer


def row_scales(temperature: float | Tensor, rows: int, like: Tensor) -> Tensor:
    """1 / T of each row, fp32 [rows]."""
    if isinstance(temperature, Tensor):
        return temperature.float().reciprocal().contiguous()
    return like.new_full((rows,), 1.0 / temperature, dtype=torch.float32)


def chunk_statistics(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scales: Tensor,
    logprobs: Tensor,
    entropies: Tensor,
    normalizer: Tensor,
    softcap: float | None,
    shard: Shard,
) -> None:
    """Fills logprobs [n], entropies [n], normalizer [2, n] of the whole vocabulary from a rank's logits."""
    from pact_fast.kernels.lm_head.rows import rows_stats

    width = logits.shape[1]
    own = target - first_column(shard, width)
    rows_stats(logits, bias, own, scales, logprobs, entropies, normalizer, softcap)
    if not shard.alone:
        merged = merge(logprobs, entropies, normalizer, target, width, shard)
        for out, value in zip((logprobs, entropies, normalizer), merged, strict=True):
            out.copy_(value)


def fused_backward(
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    normalizer: Tensor,
    entropy: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    shard: Shard,
    needs: tuple[bool, bool, bool],
) -> reference.Grads:
    """Gradients of (hidden, weight, bias): vocabulary blocks outermost, so each block of dW is written once.

    Rows without an incoming gradient are dropped first, which waits for the device (except in a CUDA graph
    capture).
    """
    from pact_fast.kernels.lm_head.rows import rows_grad

    grad_logprob = grad_logprob.float().contiguous()
    grad_entropy = None if grad_entropy is None else grad_entropy.float().contiguous()
    live, n = None, hidden.shape[0]
    scales = row_scales(temperature, n, hidden)
    dead = reference.without_gradient(grad_logprob, grad_entropy)
    if capturing(hidden):
        hidden = hidden.masked_fill(dead[:, None], 0)  # 0 * NaN in dW
    else:
        live = (~dead).nonzero().squeeze(1)
    if live is not None and live.numel() < n:
        hidden, target, entropy, scales = hidden[live], target[live], entropy[live], scales[live]
        grad_logprob, normalizer = grad_logprob[live], normalizer[:, live].contiguous()
        grad_entropy = None if grad_entropy is None else grad_entropy[live]
    hidden = hidden.contiguous()

    rows, vocab = hidden.shape[0], weight.shape[0]
    first = first_column(shard, vocab)
    d_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32) if needs[0] else None
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else None
    d_bias = torch.zeros_like(bias) if bias is not None and needs[2] else None
    if rows == 0:
        d_weight = None if d_weight is None else d_weight.zero_()
    else:
        columns = max(MIN_BLOCK, BACKWARD_BYTES // (hidden.element_size() * rows))
        step = min(equal_chunks(vocab, columns), vocab)
        buffer = padded_rows(rows, step, hidden)
        for i in range(0, vocab, step):
            block = slice(i, min(i + step, vocab))
            logits = buffer[:, : block.stop - i]
            torch.mm(hidden, weight[block].t(), out=logits)
            b = None if bias is None else bias[block]
            begin = first + i
            rows_grad(
                logits, b, target, scales, normalizer, entropy, grad_logprob, grad_entropy, begin, softcap
            )
            if d_weight is not None:
                torch.mm(logits.t(), hidden, out=d_weight[block])
            if d_hidden is not None:
                add_product(d_hidden, logits, weight[block], first=i == 0)
            if d_bias is not None:
                d_bias[block] = logits.sum(0, dtype=torch.float32)
        del buffer
    d_hidden = summed(d_hidden, shard)
    if d_hidden is not None:
        d_hidden = d_hidden.to(hidden.dtype)
        if live is not None and rows < n:
            d_hidden = d_hidden.new_zeros(n, d_hidden.shape[1]).index_copy_(0, live, d_hidden)
    return d_hidden, d_weight, d_bias


@torch.library.custom_op("pact_fast::linear_logprob", mutates_args=())
def linear_logprob_op(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    row_temperature: Tensor | None,
    softcap: float | None,
    group: str,
    rank: int,
    ranks: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """logprob [N], entropy [N], normalizer [2, N]: largest logit, log of the sum relative to it.

    row_temperature [N] replaces temperature; group, rank, ranks: a `Shard` of the vocabulary.
    """
    shard = Shard(group, rank, ranks)
    require_equal_widths(weight, shard)
    require_indices("target", target, weight.shape[0] * ranks)
    if row_temperature is not None:
        require_positive("temperature", row_temperature)
    forward = reference.linear_logprob_forward if impl == "torch" else fused_forward
    bias = None if bias is None else bias.contiguous()
    heat = temperature if row_temperature is None else row_temperature
    with torch.cuda.device_of(hidden):  # Triton launches on the current device, wherever the tensors are
        return forward(hidden, weight, target.long().contiguous(), bias, heat, softcap, shard)


@linear_logprob_op.register_fake
def _(hidden, weight, target, bias, temperature, row_temperature, softcap, group, rank, ranks, impl):
    logprob = hidden.new_empty(hidden.shape[0], dtype=reference.accumulation_dtype(hidden.dtype))
    return logprob, torch.empty_like(logprob), logprob.new_empty(2, hidden.shape[0])


@torch.library.custom_op("pact_fast::linear_logprob_backward", mutates_args=())
def linear_logprob_backward_op(
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    normalizer: Tensor,
    entropy: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; an empty tensor for each that is not needed."""
    needs = (needs_hidden, needs_weight, needs_bias)
    backward = reference.linear_logprob_backward if impl == "torch" else fused_backward
    with torch.cuda.device_of(hidden):
        grads = backward(
            grad_logprob,
            grad_entropy,
            hidden,
            weight,
            target.long().contiguous(),
            None if bias is None else bias.contiguous(),
            normalizer,
            entropy,
            temperature if row_temperature is None else row_temperature,
            softcap,
            Shard(group, rank, ranks),
            needs,
        )
    d_hidden, d_weight, d_bias = (hidden.new_empty(0) if g is None else g for g in grads)
    return d_hidden, d_weight, d_bias


@linear_logprob_backward_op.register_fake
def _(
    grad_logprob,
    grad_entropy,
    hidden,
    weight,
    target,
    bias,
    normalizer,
    entropy,
    temperature,
    row_temperature,
    softcap,
    group,
    rank,
    ranks,
    needs_hidden,
    needs_weight,
    needs_bias,
    impl,
):
    wanted = ((hidden, needs_hidden), (weight, needs_weight), (bias, needs_bias))
    return tuple(
        hidden.new_empty(0) if not need else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, need in wanted
    )


NUM_INPUTS = 11


def _setup_context(ctx, inputs, output):
    hidden, weight, target, bias, temperature, row_temperature, *rest = inputs
    _, entropy, normalizer = output
    ctx.temperature, ctx.rest = temperature, rest
    ctx.mark_non_differentiable(normalizer)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, target, bias, normalizer, entropy, row_temperature)


def _backward(ctx, grad_logprob, grad_entropy, grad_normalizer):
    *saved, entropy, row_temperature = ctx.saved_tensors
    if grad_logprob is None and grad_entropy is None:
        return (None,) * NUM_INPUTS
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
    if grad_logprob is None:
        grad_logprob = torch.zeros_like(entropy)
    *head, impl = ctx.rest
    grads = linear_logprob_backward_op(
        grad_logprob, grad_entropy, *saved, entropy, ctx.temperature, row_temperature, *head, *needs, impl
    )
    d_hidden, d_weight, d_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return d_hidden, d_weight, None, d_bias, *(None,) * (NUM_INPUTS - 4)


linear_logprob_op.register_autograd(_backward, setup_context=_setup_context)
