"""Tree attention by flash-attn: one dense call per level of the tree, merged by log-sum-exp.

The pack is cut into runs, unbranched stretches of tokens. A token attends to its own run causally (one call
for all runs) and to each run above it whole (one call per level: runs of a level have disjoint subtrees).
With lse the merged log-sum-exp,

    out = sum_parts exp(lse_part - lse) * out_part                   lse = log sum_parts exp(lse_part)

The backward is exact: dS = P * (dP - delta) needs only the merged lse (in P) and the merged out (in delta),
so each part's ordinary backward gets those two instead of its own, and the gradients add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pact_fast.kernels.tree_attention.layout import parent_index


@dataclass(frozen=True)
class Part:
    """One variable-length call: packed indices of its queries and keys, and the ends of its segments."""

    queries: Tensor  # [n] int64
    keys: Tensor  # [m] int64
    cu_queries: Tensor  # [segments + 1] int32
    cu_keys: Tensor
    max_queries: int
    max_keys: int
    causal: bool


class Backend(Protocol):
    """Variable-length attention as flash-attn has it; lse is [Hq, n]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        part: Part,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class FlashAttention2:
    """The `flash-attn` package, 2.7 or later."""

    def __init__(self) -> None:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward, _flash_attn_varlen_forward

        self._forward, self._backward = _flash_attn_varlen_forward, _flash_attn_varlen_backward

    @staticmethod
    def _common(part: Part, scale: float) -> dict:
        return {
            "cu_seqlens_q": part.cu_queries,
            "cu_seqlens_k": part.cu_keys,
            "max_seqlen_q": part.max_queries,
            "max_seqlen_k": part.max_keys,
            "dropout_p": 0.0,
            "softmax_scale": scale,
            "causal": part.causal,
            "window_size_left": -1,
            "window_size_right": -1,
            "softcap": 0.0,
            "alibi_slopes": None,
        }

    def forward(self, q, k, v, part, scale):
        out, lse, *_ = self._forward(q, k, v, return_softmax=False, **self._common(part, scale))
        return out, lse

    def backward(self, d_out, q, k, v, out, lse, part, scale):
        grads = [torch.empty_like(x) for x in (q, k, v)]
        self._backward(
            d_out, q, k, v, out, lse.contiguous(), *grads, deterministic=True, **self._common(part, scale)
        )
        return grads[0], grads[1], grads[2]


class FlashPlan:
    """The parts of one tree: every run with itself, then level by level the runs with all below them."""

    def __init__(self, subtree_end: Tensor, depth: np.ndarray) -> None:
        end = subtree_end.cpu().numpy().astype(np.int64)
        starts = np.flatnonzero(np.concatenate(([True], end[1:] != end[:-1])))
        stops = np.append(starts[1:], end.size)
        run_of = np.repeat(np.arange(starts.size), stops - starts)
        above = parent_index(end, depth)[starts]
        level = np.zeros(starts.size, np.int64)
        for run in range(starts.size):  # pre-order: the run above comes first
            level[run] = level[run_of[above[run]]] + 1 if above[run] >= 0 else 0
        device = subtree_end.device
        self.parts = [_part(starts, stops, starts, stops, True, device)]
        below = stops < end[starts]
        for at in range(int(level.max()) + 1):
            runs = np.flatnonzero((level == at) & below)
            if runs.size:
                self.parts.append(
                    _part(stops[runs], end[starts[runs]], starts[runs], stops[runs], False, device)
                )


def _part(q_first, q_last, k_first, k_last, causal: bool, device: torch.device) -> Part:
    def side(first, last):
        index = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
        ends = np.concatenate(([0], np.cumsum(last - first))).astype(np.int32)
        return (
            torch.from_numpy(index).to(device),
            torch.from_numpy(ends).to(device),
            int((last - first).max()),
        )

    queries, cu_queries, max_queries = side(q_first, q_last)
    keys, cu_keys, max_keys = side(k_first, k_last)
    return Part(queries, keys, cu_queries, cu_keys, max_queries, max_keys, causal)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan: FlashPlan, scale: float, backend: Backend):
        first, *rest = plan.parts
        out, lse = backend.forward(q, k, v, first, scale)
        out = out.float()
        for part in rest:
            o, l = backend.forward(q[part.queries], k[part.keys], v[part.keys], part, scale)
            so_far = lse[:, part.queries]
            merged = torch.logaddexp(so_far, l)
            old, new = ((x - merged).exp().T[..., None] for x in (so_far, l))  # [n, Hq, 1]
            out[part.queries] = out[part.queries] * old + o.float() * new
            lse[:, part.queries] = merged
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = plan, scale, backend
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, d_out, _):
        q, k, v, out, lse = ctx.saved_tensors
        plan, scale, backend = ctx.rest
        d_out = d_out.contiguous()
        sums = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v)]
        for part in plan.parts:
            rows, cols = part.queries, part.keys
            grads = backend.backward(
                d_out[rows], q[rows], k[cols], v[cols], out[rows], lse[:, rows], part, scale
            )
            # Within a part no row and no column is named twice.
            for total, index, grad in zip(sums, (rows, cols, cols), grads, strict=True):
                total[index] += grad
        return *(total.to(x.dtype) for total, x in zip(sums, (q, k, v), strict=True)), None, None, None


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: FlashPlan, *, scale: float | None, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """out [T, Hq, D], differentiable, and lse [T, Hq] without a gradient. ImportError without flash-attn."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.contiguous() for x in (q, k, v))
    out, lse = _Merged.apply(q, k, v, plan, scale, backend or FlashAttention2())
    return out, lse.T
