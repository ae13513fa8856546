"""Attention in a token tree: argument checks and the choice of implementation."""

import math

import torch
from torch import Tensor

from pact_fast.kernels.tree_attention.plan import TreePlan, check_qkv, run, tree_plan


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
