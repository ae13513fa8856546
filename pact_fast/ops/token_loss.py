"""Any torch function of each row's log-prob and entropy as the loss of an LM head."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pact_fast.kernels.lm_head.checks import checked, require, require_indices, require_positive
from pact_fast.kernels.lm_head.shard import require_equal_widths
from pact_fast.kernels.lm_head.token_loss import LossFn, TokenLoss, by_autograd, token_loss
from pact_fast.ops.checks import (
    autocast,
    check_head,
    check_memory,
    check_rows,
    check_temperature,
    choose,
    describe,
    shard_of,
)
from pact_fast.ops.logprob import logprobs_and_entropy


class TokenLossOutput(NamedTuple):
    """loss [] is the sum of all rows' losses; logprobs [R] and entropy [R] carry no gradient."""

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor


@torch.compiler.disable  # loss_fn and its derivative run inside of the forward: a break of the graph
def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    loss_fn: LossFn,
    *,
    row_index: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    memory: str = "fast",
    tp_group: Any = None,
    impl: str = "auto",
) -> TokenLossOutput:
    """A loss of your own on an LM head, with its gradient, for three matrix products and no [R, V] logits.

    Equals, with `logprobs` and `entropy` as in :func:`linear_logprob`::

        loss = loss_fn(logprobs, entropy, torch.arange(R)).sum()

    loss_fn is called once a chunk of rows, with their logprobs [n], entropy [n] (both fp32, fp64 for fp64
    hidden, requiring a gradient) and rows, the int64 [n] row numbers, to index per-row inputs with. It
    returns their losses [n], made by any differentiable torch code. A row's loss may depend on that row
    alone, and not on n: how many rows a chunk has is not specified. A loss that couples rows (a ratio of
    whole sequences) needs memory="low", which calls loss_fn once with all rows.

    Args:
        hidden: [T, H] float, any strides. weight: [V, H] of the same dtype. bias: [V] or None.
        target: [R] integer in [0, V) (checked on CPU; on a device under PACT_FAST_DEBUG=1).
        loss_fn: (logprobs [n], entropy [n], rows [n]) -> losses [n].
        row_index: [R] integer in [0, T), repeats allowed: row r predicts target[r] from hidden[row_index[r]];
            None: R = T, row r is hidden[r].
        temperature: > 0, one or [R]. softcap: > 0 or None.
        memory: "fast" makes the gradient in the forward (three products, one backward only) and holds the
            logits of as many rows as a twentieth of the device's memory takes; "low" computes them again in
            the backward (four products), with at most 0.5 GiB beside inputs and outputs.
        tp_group, impl: as in :func:`linear_logprob`.

    Returns:
        TokenLossOutput; differentiable in hidden, weight and bias through `loss`. A row whose loss has no
        gradient adds exactly 0 to theirs, even where its hidden state holds NaN.

    Raises:
        ValueError, TypeError: naming the argument; of loss_fn, where it returns something else than [n]
            losses, something not differentiable in logprobs or entropy, or (checked as the targets) a value
            or derivative that is not finite although the row's log-prob and entropy are.
    """
    hidden, weight, bias = autocast(hidden, weight, bias)
    check_head(hidden, weight, bias, softcap)
    rows = check_row_arguments(hidden, target, row_index)
    check_memory(memory)
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of (logprobs, entropy, rows), got {describe(loss_fn)}")
    one, each = check_temperature(temperature, rows, hidden)
    impl, shard = choose(impl, hidden), shard_of(tp_group)
    require_equal_widths(weight, shard)
    require_indices("target", target, weight.shape[0] * shard.ranks)
    if row_index is not None:
        require_indices("row_index", row_index, hidden.shape[0])
    if each is not None:
        require_positive("temperature", each)
    heat = one if each is None else each
    function = named_errors(loss_fn)
    if memory == "low":
        return recomputed(
            hidden, weight, target, function, row_index, heat, bias, softcap, tp_group=tp_group, impl=impl
        )
    cap = None if softcap is None else float(softcap)

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]):
        head = (bias, heat, cap, shard, needs, impl)
        return token_loss(hidden, weight, target, row_index, by_autograd(function), *head)

    return TokenLossOutput(*TokenLoss.apply(hidden, weight, bias, impl, compute))


def recomputed(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    loss_fn: LossFn,
    row_index: Tensor | None,
    temperature: float | Tensor,
    bias: Tensor | None,
    softcap: float | None,
    *,
    tp_group: Any,
    impl: str,
) -> TokenLossOutput:
    """The loss by `linear_logprob`: loss_fn is called once, the backward computes the logits again."""
    x = hidden if row_index is None else hidden.index_select(0, row_index)
    logprobs, entropy = logprobs_and_entropy(x, weight, target, bias, temperature, softcap, tp_group, impl)
    losses = loss_fn(logprobs, entropy, torch.arange(target.shape[0], device=target.device))
    return TokenLossOutput(losses.sum(), logprobs.detach(), entropy.detach())


def check_row_arguments(hidden: Tensor, target: Tensor, row_index: Tensor | None) -> int:
    """The number R of loss rows."""
    whole = None if row_index is not None else hidden.shape[0]
    rows = check_rows("target", target, whole, hidden, integer=True)
    if row_index is not None:
        check_rows("row_index", row_index, rows, hidden, integer=True)
    return rows


def named_errors(loss_fn: LossFn) -> LossFn:
    """loss_fn, whose mistakes are told by name instead of by what they break later."""

    def call(logprobs: Tensor, entropy: Tensor, rows: Tensor) -> Tensor:
        n = logprobs.shape[0]
        losses = loss_fn(logprobs, entropy, rows)
        if not isinstance(losses, Tensor) or losses.shape != logprobs.shape:
            raise ValueError(
                f"loss_fn must return the losses of its {n} rows as a tensor [{n}], got {describe(losses)}; "
                "return one value a row, the op takes their sum"
            )
        if not losses.is_floating_point():
            raise TypeError(f"loss_fn must return floating-point losses, got {describe(losses)}")
        if losses.device != logprobs.device:
            raise ValueError(f"loss_fn returned losses on {losses.device}, its rows are on {logprobs.device}")
        wanted = torch.is_grad_enabled() and (logprobs.requires_grad or entropy.requires_grad)
        if wanted and n and not losses.requires_grad:
            raise ValueError(
                "loss_fn returned losses that depend on neither logprobs nor entropy, so they have no "
                "gradient: do not detach both, leave no_grad or convert to NumPy between them"
            )
        sound = torch.isfinite(logprobs) & torch.isfinite(entropy)
        require_finite("loss", losses, sound, rows)
        for name, value in (("logprobs", logprobs), ("entropy", entropy)):
            if wanted and value.requires_grad and checked(value):
                grad = torch.autograd.grad(losses.sum(), value, retain_graph=True, allow_unused=True)[0]
                if grad is not None:
                    require_finite(f"derivative by {name}", grad, sound, rows)
        return losses

    return call


def require_finite(what: str, values: Tensor, sound: Tensor, rows: Tensor) -> None:
    """ValueError (a device assert under PACT_FAST_DEBUG=1) where a row's own inputs are finite."""
    if not checked(values):
        return
    values = values.detach()
    good = torch.isfinite(values) | ~sound
    where = ""
    if values.device.type == "cpu" and not bool(good.all()):
        first = int((~good).nonzero()[0])
        where = f" at row {int(rows[first])}: {float(values[first])}"
    require(good, f"loss_fn gave a {what} that is not finite{where}")
