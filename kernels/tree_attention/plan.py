"""Plans of tree attention: the choice of implementation, and what each precomputes from a tree."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pact_fast.kernels.tree_attention import fa4, reference
from pact_fast.kernels.tree_attention.layout import tree_depth
from pact_fast.kernels.tree_attention.tiles import TilePlan

TREE_IMPLS = ("auto", "torch", "triton", "fa4", "flex")


@dataclass(frozen=True)
class TreePlan:
    """What an implementation precomputes from a tree: made once per pack, shared by all layers."""

    impl: str
    num_tokens: int
    window: int | None
    first_query: int
    data: Any


def tree_plan(
    subtree_end: Tensor,
    *,
    window: int | None = None,
    first_query: int = 0,
    impl: str = "auto",
    head_dim: int | None = None,
    dtype: torch.dtype | None = None,
) -> TreePlan:
    """The part of `tree_attention` that depends on the tree alone: its checks and the layout of the work.

    Args as in `tree_attention`. `first_query`: q and the result hold the tokens from here on only; the
    keys and values of those before come from a cache. `head_dim`, `dtype`: of q, k and v; "auto" looks at
    them (without them it is Triton on CUDA), and "fa4" at head_dim (without it 128). ValueError where
    `subtree_end` is not a tree.
    """
    if subtree_end.dim() != 1 or subtree_end.dtype != torch.int32:
        raise ValueError(f"subtree_end must be [T] int32, got {list(subtree_end.shape)} {subtree_end.dtype}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}; None for no window")
    end = subtree_end.cpu().numpy()
    depth = tree_depth(end)
    if not 0 <= first_query <= end.size:
        raise ValueError(f"first_query = {first_query} is not in [0, T = {end.size}]")
    impl = _choose_tree(impl, subtree_end, head_dim, dtype)
    data: Any
    if first_query and impl == "flex":
        raise ValueError('impl="flex" has no cached prefix (first_query); use "fa4", "triton" or "torch"')
    if impl == "torch":
        data = reference.block_plan(subtree_end, window=window, first_query=first_query)
    elif impl == "triton":
        data = TilePlan(subtree_end, depth, window, first_query)
    elif impl == "flex":
        from pact_fast.kernels.tree_attention.flex import FlexPlan

        data = FlexPlan(subtree_end, depth, window)
    else:
        blocks = fa4.block_sizes(head_dim or 128, torch.cuda.get_device_capability(subtree_end.device))
        data = fa4.Fa4Plan(subtree_end, depth, window, first_query, blocks=blocks)
    return TreePlan(impl, end.size, window, first_query, data)


def run(
    plan: TreePlan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    scale: float | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """out [T, Hq, D], and lse [T, Hq] if asked, by the implementation that `plan` was made for."""
    if q.shape[0] == 0:
        return q + 0 * (k.sum() + v.sum()), q[..., 0].float()
    if plan.impl == "torch":
        return reference.tree_attention(q, k, v, subtree_end, scale=scale, plan=plan.data)
    if plan.impl == "flex":
        from pact_fast.kernels.tree_attention import flex

        return flex.tree_attention(q, k, v, plan.data, scale=scale, return_lse=return_lse)
    if plan.impl == "fa4":
        return fa4.tree_attention(q, k, v, plan.data, scale=scale)
    from pact_fast.kernels.tree_attention.triton import (
        tree_attention,  # triton is an optional package on a CPU
    )

    return tree_attention(q, k, v, plan.data, scale=scale)


def check_qkv(q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, first_query: int) -> None:
    """Raise ValueError or TypeError unless the shapes, dtypes and devices fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3 or not x.is_floating_point():
            raise ValueError(f"{name} must be a [T, heads, D] float tensor, got {list(x.shape)} {x.dtype}")
        if x.dtype != q.dtype or x.device != q.device:
            raise TypeError(
                f"{name} is {x.dtype} on {x.device}, but q is {q.dtype} on {q.device}; cast or move one"
            )
        rows = subtree_end.shape[0] - (first_query if name == "q" else 0)
        if x.shape[0] != rows or x.shape[2] != q.shape[2]:
            raise ValueError(
                f"{name} is {list(x.shape)}, but {rows} rows are planned and q is {list(q.shape)}"
            )
    if k.shape != v.shape or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k and v must have the same heads, dividing those of q: got q {q.shape[1]}, k {k.shape[1]}, "
            f"v {v.shape[1]}"
        )


def _choose_tree(impl: str, tensor: Tensor, head_dim: int | None, dtype: torch.dtype | None) -> str:
    if impl not in TREE_IMPLS:
        raise ValueError(f"impl must be one of {', '.join(TREE_IMPLS)}, got {impl!r}")
    if impl == "auto":
        if not tensor.is_cuda:
            return "torch"
        capability = torch.cuda.get_device_capability(tensor.device)
        if head_dim not in fa4.AUTO_HEAD_DIMS or dtype is None:
            return "triton"
        return "fa4" if fa4.refusal(head_dim, dtype, capability) is None else "triton"
    if impl == "fa4":
        if not tensor.is_cuda:
            raise ValueError('impl="fa4" needs CUDA tensors, got CPU; use impl="torch"')
        capability = torch.cuda.get_device_capability(tensor.device)
        if why := fa4.refusal(head_dim or 128, dtype or torch.bfloat16, capability):
            raise ValueError(f'impl="fa4" {why}; use impl="triton" or "flex"')
    if impl == "triton" and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            'impl="triton" needs CUDA tensors, got CPU; use impl="torch" (or set TRITON_INTERPRET=1 to debug)'
        )
    return impl
