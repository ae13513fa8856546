"""Fused ops for any training loop: argument checks and the choice of implementation; the work is in kernels/.

Dims: N rows, R loss rows, T packed tokens, H hidden, V vocabulary.
"""

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from pact_fast.kernels.lm_head.logprob import linear_logprob_op
from pact_fast.kernels.lm_head.pact_loss import linear_pact_loss_op
from pact_fast.kernels.tree_attention.plan import TreePlan, check_qkv, run, tree_plan

__all__ = [
    "PactLossOutput",
    "TreePlan",
    "linear_cross_entropy",
    "linear_logprob",
    "linear_pact_loss",
    "tree_attention",
    "tree_plan",
]


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


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each row's target token (and its distribution's entropy), without [N, V] logits.

    Equals::

        logits = (hidden @ weight.T + bias).float()
        logits = softcap * tanh(logits / softcap)      # only with softcap
        logprobs = log_softmax(logits / temperature, -1).gather(1, target[:, None])[:, 0]

    Args:
        hidden: [N, H] float, any strides; the input of the LM head.
        weight: [V, H] of the same dtype.
        target: [N] integer, every value in [0, V) (checked on CPU; on a device under PACT_FAST_DEBUG=1).
        bias: [V] or None.
        temperature: > 0; divides the logits after the softcap.
        softcap: > 0 or None.
        return_entropy: also return the entropy in nats, differentiable as well.
        impl: "auto" (Triton on CUDA, torch elsewhere), "torch", "triton" or "cuda".

    Returns:
        logprobs [N], or (logprobs [N], entropy [N]); fp32 (fp64 for fp64 hidden). Differentiable in hidden,
        weight, bias.

    Raises:
        ValueError, TypeError: naming the argument, before anything is computed.
    """
    outputs = _logprobs_and_entropy(hidden, weight, target, bias, temperature, softcap, impl)
    return outputs if return_entropy else outputs[0]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    token_weight: Tensor | None = None,
    reduction: str = "sum",
    row_index: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Weighted cross-entropy of an LM head, without [N, V] logits: the component-masked SFT loss.

    Equals, with `logprobs` as in :func:`linear_logprob`::

        loss = (token_weight * -logprobs).sum()            # reduction="sum"
        loss = loss / token_weight.sum()                   # reduction="mean"; 0 where all weights are 0

    reduction="none" returns [N] token_weight * -logprobs and recomputes logits in its backward; "sum" and
    "mean" make their gradient in the forward (one backward only). Rows of weight 0 cost nothing and may hold
    any target.

    Args, besides those of :func:`linear_logprob`:
        target: [N], or [R] with row_index.
        token_weight: [N] (or [R]) >= 0, a mask or per-token strengths; None: all 1. Not differentiable.
        row_index: [R] integer: row r predicts target[r] from hidden[row_index[r]]; None: hidden[r].

    Returns:
        The loss, fp32 (fp64 for fp64 hidden).
    """
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f'reduction must be "sum", "mean" or "none", got {reduction!r}')
    if token_weight is None:
        token_weight = torch.ones_like(target, dtype=_row_dtype(hidden))
    if not isinstance(token_weight, Tensor) or token_weight.shape != target.shape:
        raise ValueError(
            f"token_weight must have the shape of target {tuple(target.shape)}, got {_describe(token_weight)}"
        )
    strength = _row_values("token_weight", token_weight, target.shape[0], hidden)
    if reduction == "none":
        if row_index is not None:
            _check_rows("row_index", row_index, target.shape[0], hidden, integer=True)
            hidden = hidden[row_index]
        live = strength != 0
        target = torch.where(live, target, 0)
        logprobs, _ = _logprobs_and_entropy(hidden, weight, target, bias, temperature, softcap, impl)
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
        impl=impl,
    ).loss


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
    temperature: float = 1.0,
    softcap: float | None = None,
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

    The weights carry all normalisation. The gradient is made in the forward, so `loss` can be backpropagated
    once. A row whose weights are both 0 contributes exactly 0, whatever its other values hold.

    Args:
        hidden: [T, H] float, any strides. weight: [V, H] of the same dtype. bias: [V] or None.
        target: [R] integer, in [0, V) on rows with a weight.
        row_index: [R] integer in [0, T), repeats allowed; None: R = T, row r is hidden[r]. On a device its
            rows are taken as the live ones and nothing waits for the device; without it, rows of weight 0
            are found first (one wait).
        policy_weight, sft_weight: [R] >= 0; at least one of them. advantages: [R], with policy_weight.
        old_logprobs: [R] or None (the current log-probs: ratio 1). ref_logprobs: [R], needed for beta != 0.
        epsilon_low, epsilon_high: >= 0. dual_clip: > 1 or None. beta, entropy_coef: coefficients.
        temperature, softcap, impl: as in :func:`linear_logprob`.

    Returns:
        PactLossOutput; differentiable in hidden, weight and bias through `loss`.

    Raises:
        ValueError, TypeError: naming the argument, before anything is computed.
    """
    hidden, weight, bias = _autocast(hidden, weight, bias)
    _check_head(hidden, weight, bias, temperature, softcap)
    rows = _check_rows(
        "target", target, None if row_index is not None else hidden.shape[0], hidden, integer=True
    )
    if row_index is not None:
        _check_rows("row_index", row_index, rows, hidden, integer=True)
    _check_surrogate(policy_weight, advantages, old_logprobs, ref_logprobs, sft_weight, beta, entropy_coef)
    _check_scalars(epsilon_low, epsilon_high, dual_clip, beta, entropy_coef)
    impl = _choose(impl, hidden)
    values = {
        "policy_weight": policy_weight,
        "advantages": advantages,
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "sft_weight": sft_weight,
    }
    terms = [
        None if value is None else _row_values(name, value, rows, hidden) for name, value in values.items()
    ]
    needs = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in (hidden, weight, bias)]
    loss, sums, logprobs, *_ = linear_pact_loss_op(
        hidden,
        weight,
        target,
        row_index,
        *terms,
        float(epsilon_low),
        float(epsilon_high),
        None if dual_clip is None else float(dual_clip),
        float(beta),
        float(entropy_coef),
        bias,
        float(temperature),
        None if softcap is None else float(softcap),
        *needs,
        impl,
    )
    policy_loss, sft_loss, kl, entropy, clipped = sums.unbind()
    policy_rows = 1 if terms[0] is None else (terms[0] != 0).sum().clamp(min=1)
    return PactLossOutput(loss, policy_loss, sft_loss, kl, entropy, clipped / policy_rows, logprobs)


def _logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    hidden, weight, bias = _autocast(hidden, weight, bias)
    _check_head(hidden, weight, bias, temperature, softcap)
    _check_rows("target", target, hidden.shape[0], hidden, integer=True)
    cap = None if softcap is None else float(softcap)
    impl = _choose(impl, hidden)
    logprobs, entropy, _ = linear_logprob_op(hidden, weight, target, bias, float(temperature), cap, impl)
    return logprobs, entropy


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    plan: TreePlan | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in a token tree: every token sees its ancestors and itself.

    Equals::

        i, j = torch.arange(T)[:, None], torch.arange(T)[None]
        mask = (j <= i) & (i < subtree_end[None])                      # & (depth_i - depth_j < window)
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)  # heads first

    Args:
        q: [T, Hq, D] float. k, v: [T, Hkv, D] of the same dtype; Hkv divides Hq.
        subtree_end: [T] int32, `TreePack.subtree_end`.
        scale: of the scores; None: D ** -0.5.
        window: sliding window in tokens of depth (a token sees itself and window - 1 ancestors); None: all
            ancestors.
        plan: `tree_plan` of the same tree, to be made once where many calls share a tree; None: made here.
        return_lse: also return the log-sum-exp of each row's scores, differentiable as well.
        impl: "auto" ("fa4" where it is installed on sm_90 and sm_100, else Triton on CUDA; torch elsewhere),
            "torch", "triton", "fa4" (the package flash-attn-4) or "flex" (torch's FlexAttention).

    Returns:
        out [T, Hq, D] in the dtype of q, or (out, lse [T, Hq] fp32); differentiable in q, k and v.

    Raises:
        ValueError, TypeError: naming the argument; also where `subtree_end` is not a tree.
    """
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:  # as SDPA does
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    check_qkv(q, k, v, subtree_end, plan.first_query if plan else 0)
    if scale is not None and not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be finite and > 0, got {scale}")
    if plan is None:
        plan = tree_plan(subtree_end, window=window, impl=impl, head_dim=q.shape[2], dtype=q.dtype)
    elif plan.num_tokens != k.shape[0] or plan.window != window:
        raise ValueError(
            f"plan is of {plan.num_tokens} tokens and window {plan.window}, the call has {k.shape[0]} tokens "
            f"and window {window}: make a plan for each tree and window"
        )
    elif impl != "auto" and impl != plan.impl:
        raise ValueError(f"impl={impl!r}, but plan was made for {plan.impl!r}")
    out, lse = run(plan, q, k, v, subtree_end, scale, return_lse)
    return out if lse is None or not return_lse else (out, lse)


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts what F.linear would cast under torch.autocast; the casts are differentiable."""
    if (
        isinstance(hidden, Tensor)
        and isinstance(weight, Tensor)
        and torch.is_autocast_enabled(hidden.device.type)
    ):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        if hidden.dtype != torch.float64:
            return hidden.to(dtype), weight.to(dtype), bias
    return hidden, weight, bias


def _check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None
) -> None:
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
        raise TypeError(f"hidden must be a floating-point tensor, got {_describe(hidden)}")
    if hidden.dim() != 2:
        raise ValueError(
            f"hidden must be [N, H], got {_describe(hidden)}; flatten the leading dimensions first"
        )
    if not isinstance(weight, Tensor) or weight.dtype != hidden.dtype:
        raise TypeError(
            f"weight must have the dtype of hidden ({hidden.dtype}), got {_describe(weight)}; cast one"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight must be [V, H] with V >= 1 and H = {hidden.shape[1]}, got {_describe(weight)}"
        )
    _check_device("weight", weight, hidden)
    if bias is not None:
        if not isinstance(bias, Tensor) or not bias.is_floating_point():
            raise TypeError(f"bias must be a floating-point tensor, got {_describe(bias)}")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be [V] = [{weight.shape[0]}], got {_describe(bias)}")
        _check_device("bias", bias, hidden)
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be finite and > 0, got {temperature}")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be finite and > 0, or None for no cap, got {softcap}")


def _check_surrogate(
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


def _check_scalars(epsilon_low, epsilon_high, dual_clip, beta, entropy_coef) -> None:
    for name, value in (("epsilon_low", epsilon_low), ("epsilon_high", epsilon_high), ("beta", beta)):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be finite and >= 0, got {value}")
    if not math.isfinite(entropy_coef):
        raise ValueError(f"entropy_coef must be finite, got {entropy_coef}")
    if dual_clip is not None and not (dual_clip > 1 and math.isfinite(dual_clip)):
        raise ValueError(f"dual_clip must be > 1, or None for none, got {dual_clip}")


def _check_rows(name: str, value: Tensor, rows: int | None, hidden: Tensor, *, integer: bool = False) -> int:
    """`value` is [rows] on hidden's device; its length."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {_describe(value)}")
    if integer and value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {_describe(value)}")
    if value.dim() != 1 or (rows is not None and value.shape[0] != rows):
        raise ValueError(f"{name} must be [{'R' if rows is None else rows}], got {_describe(value)}")
    _check_device(name, value, hidden)
    return value.shape[0]


def _row_values(name: str, value: Tensor, rows: int, hidden: Tensor) -> Tensor:
    """A per-row input in the accumulation dtype."""
    _check_rows(name, value, rows, hidden)
    if value.is_complex():
        raise TypeError(f"{name} must be real, got {_describe(value)}")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, but the loss has none for it; pass {name}.detach()")
    return value.to(_row_dtype(hidden))


def _row_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _check_device(name: str, value: Tensor, hidden: Tensor) -> None:
    if value.device != hidden.device:
        raise ValueError(f"{name} is on {value.device} but hidden is on {hidden.device}; move one of them")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__


def _choose(impl: str, hidden: Tensor) -> str:
    if impl not in ("auto", "torch", "triton", "cuda"):
        raise ValueError(f'impl must be "auto", "torch", "triton" or "cuda", got {impl!r}')
    if impl == "auto":
        return "triton" if hidden.is_cuda and hidden.dtype != torch.float64 else "torch"
    if impl == "torch":
        return impl
    if hidden.dtype == torch.float64:
        raise TypeError(
            f'impl="{impl}" takes bf16, fp16 or fp32 hidden, got {hidden.dtype}; pass impl="torch"'
        )
    interpreted = impl == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if not hidden.is_cuda and not interpreted:
        hint = "move the tensors to a GPU, or set TRITON_INTERPRET=1 before importing triton"
        raise ValueError(f'impl="{impl}" needs CUDA tensors, hidden is on {hidden.device}: {hint}')
    return impl
