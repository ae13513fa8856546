"""Plans of tree attention: the choice of implementation, and what each precomputes from a tree."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pact_fast.kernels.reference import tree_attention as reference
from pact_fast.kernels.tree_layout import tree_depth
from pact_fast.kernels.tree_tiles import TilePlan

TREE_IMPLS = ("auto", "torch", "triton")


@dataclass(frozen=True)
class TreePlan:
    """What an implementation precomputes from a tree: made once per pack, shared by all layers."""

    impl: str
    num_tokens: int
    window: int | None
    data: Any


def tree_plan(subtree_end: Tensor, *, window: int | None = None, impl: str = "auto") -> TreePlan:
    """The part of `tree_attention` that depends on the tree alone: its checks and the layout of the work.

    Args as in `tree_attention`. ValueError where `subtree_end` is not a tree.
    """
    if subtree_end.dim() != 1 or subtree_end.dtype != torch.int32:
        raise ValueError(f"subtree_end must be [T] int32, got {list(subtree_end.shape)} {subtree_end.dtype}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}; None for no window")
    depth = tree_depth(subtree_end.cpu().numpy())
    impl = _choose_tree(impl, subtree_end)
    data: Any
    if impl == "torch":
        data = reference.block_plan(subtree_end, window=window)
    else:
        data = TilePlan(subtree_end, depth, window)
    return TreePlan(impl, subtree_end.numel(), window, data)


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
        return reference.tree_attention(
            q, k, v, subtree_end, scale=scale, plan=plan.data, return_lse=return_lse
        )
    from pact_fast.kernels.tree_attention import tree_attention  # triton is an optional package on a CPU

    return tree_attention(q, k, v, plan.data, scale=scale)


def check_qkv(q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor) -> None:
    """Raise ValueError or TypeError unless the shapes, dtypes and devices fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3 or not x.is_floating_point():
            raise ValueError(f"{name} must be a [T, heads, D] float tensor, got {list(x.shape)} {x.dtype}")
        if x.dtype != q.dtype or x.device != q.device:
            raise TypeError(
                f"{name} is {x.dtype} on {x.device}, but q is {q.dtype} on {q.device}; cast or move one"
            )
        if x.shape[0] != subtree_end.shape[0] or x.shape[2] != q.shape[2]:
            raise ValueError(
                f"{name} is {list(x.shape)}, but subtree_end is [{subtree_end.shape[0]}], q {list(q.shape)}"
            )
    if k.shape != v.shape or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k and v must have the same heads, dividing those of q: got q {q.shape[1]}, k {k.shape[1]}, "
            f"v {v.shape[1]}"
        )


def _choose_tree(impl: str, tensor: Tensor) -> str:
    if impl not in TREE_IMPLS:
        raise ValueError(f"impl must be one of {', '.join(TREE_IMPLS)}, got {impl!r}")
    if impl == "auto":
        return "triton" if tensor.is_cuda else "torch"
    if impl == "triton" and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            'impl="triton" needs CUDA tensors, got CPU; use impl="torch" (or set TRITON_INTERPRET=1 to debug)'
        )
    return impl
