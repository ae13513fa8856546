"""Tree attention whose output outlives a checkpointed layer: recomputing the layer runs no attention.

A checkpointed layer forgets its activations and computes them again in the backward. Its attention is the
dearest of them to compute and cheap to keep: out [T, Hq, D] and lse [T, Hq]. Here the first forward puts
both into `kept`; the recomputation takes them out and computes nothing, while q, k and v, which the gradient
needs, are recomputed with the layer:

    dQ, dK, dV = backward(dO, q, k, v, out, lse)        as without a checkpoint
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pact_fast.kernels.tree_attention import fa4, reference
from pact_fast.kernels.tree_attention.plan import TreePlan

IMPLS = ("torch", "triton", "fa4")


def _forward(plan: TreePlan, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out [T, Hq, D] and lse, of the implementation's own shape."""
    if plan.impl == "torch":
        out, lse = reference.forward(q.unflatten(1, (k.shape[1], -1)), k, v, plan.data, scale)
        return out.flatten(1, 2), lse
    if plan.impl == "fa4":
        return fa4.forward(q.contiguous(), k.contiguous(), v.contiguous(), plan.data, scale)
    from pact_fast.kernels.tree_attention import triton

    return triton.forward(q, k, v, plan.data, scale)


def _backward(
    plan: TreePlan, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if plan.impl == "torch":
        heads = (k.shape[1], -1)
        grouped = (x.unflatten(1, heads) for x in (d_out, q, out))
        d_out, q, out = grouped
        dq, dk, dv = reference.backward(d_out, None, q, k, v, out, lse, plan.data, scale)
        return dq.flatten(1, 2), dk, dv
    if plan.impl == "fa4":
        q, k, v, d_out = (x.contiguous() for x in (q, k, v, d_out))
        deterministic = torch.are_deterministic_algorithms_enabled()
        return fa4.backward(d_out, None, q, k, v, out, lse, plan.data, scale, deterministic)
    from pact_fast.kernels.tree_attention import triton

    return triton.backward(d_out, q, k, v, out, lse, plan.data, scale)


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: TreePlan, scale: float, kept: dict, key: int
    ) -> Tensor:
        if key in kept:
            out, lse = kept.pop(key)
        else:
            out, lse = _forward(plan, q, k, v, scale)
            kept[key] = out.detach(), lse.detach()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        plan, scale = ctx.rest
        q, k, v, out, lse = ctx.saved_tensors
        return *_backward(plan, d_out, q, k, v, out, lse, scale), None, None, None, None


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: TreePlan, kept: dict, key: int, *, scale: float | None = None
) -> Tensor:
    """out [T, Hq, D], differentiable. `kept`: where the first call under `key` leaves what the second takes.

    ValueError for an implementation that has no gradient apart from its forward (flex).
    """
    if plan.impl not in IMPLS:
        raise ValueError(
            f'gradient_checkpointing="keep_attention" needs attention {", ".join(IMPLS)}, got {plan.impl!r}'
        )
    return _Kept.apply(q, k, v, plan, q.shape[2] ** -0.5 if scale is None else scale, kept, key)
