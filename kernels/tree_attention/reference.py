"""Tree attention in plain PyTorch: the shipped reference, any device, any float dtype.

    token i attends to j   iff   j <= i < subtree_end[j]      (and depth[i] - depth[j] < window, if a window
    is given)

Every query takes part in at most two dense attentions: its own block (an unbranched run, causal, or a few
small subtrees under a mask) and, without a mask, the path above, which all siblings share and which is
gathered once for all of them. So work is done for visible pairs and for little else, and K/V are never
repeated over the query heads of a group. The two are merged by log-sum-exp,

    lse = logaddexp(lse_own, lse_path)        out = exp(lse_own - lse) out_own + exp(lse_path - lse) out_path

and the backward is exact: with P = exp(S - lse), delta = rowsum(dO * out) and the merged lse and out,

    dV = P^T dO        dS = P (dO V^T - delta + d_lse)        dQ = scale dS K        dK = scale dS^T Q

holds for the keys of each part alone, so the gradients of the parts add up. Saved: q, k, v, out, lse.

Shapes: T packed tokens, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

BLOCK = 128  # queries under one mask: more wastes masked pairs, fewer makes more calls
LONG_RUN = 1024  # SDPA's causal CPU kernel computes all pairs up to 512 tokens, but few in vain from here on

FUSED_DEVICES = ("cpu",)  # where torch has kernels that return and take the lse; elsewhere: the formulas

Range = tuple[int, int]


def tree_mask(subtree_end: Tensor, window: int | None = None) -> Tensor:
    """Dense mask [T, T] bool, True where query i (row) attends to key j (column)."""
    index = torch.arange(subtree_end.numel(), device=subtree_end.device)
    mask = (index[None] <= index[:, None]) & (index[:, None] < subtree_end[None])
    if window is not None:
        depth = mask.sum(1) - 1
        mask &= depth[:, None] - depth[None] < window
    return mask


def tree_attention_dense(q, k, v, subtree_end, *, scale=None, window=None):
    """The definition, with all T x T pairs: returns (out [T, Hq, D], lse [T, Hq]) in the dtype of `q`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    score = torch.einsum("ihd,jhd->hij", q, k) * scale
    score = score.masked_fill(~tree_mask(subtree_end, window), float("-inf"))
    return torch.einsum("hij,jhd->ihd", score.softmax(-1), v), score.logsumexp(-1).T


@dataclass(frozen=True)
class Part:
    """A dense attention of neighbouring queries; all pairs are visible unless it is causal or masked."""

    queries: slice  # rows of q
    keys: tuple[slice, ...]  # rows of k and v, joined
    causal: bool = False
    mask: Tensor | None = None  # [queries, keys] bool


@dataclass
class BlockPlan:
    """Parts of one tree, made once, used by every layer: `own` holds every query, `path` is merged in."""

    own: list[Part]
    path: list[Part]
    window: int | None
    _bias: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)

    def bias(self, part: Part, dtype: torch.dtype) -> Tensor | None:
        """The additive mask of a part, kept."""
        if part.mask is None:
            return None
        if (key := (id(part), dtype)) not in self._bias:
            bias = torch.zeros(part.mask.shape, dtype=dtype, device=part.mask.device)
            self._bias[key] = bias.masked_fill_(~part.mask, float("-inf"))
        return self._bias[key]


def _cut(end: list[int], first_query: int, block: int) -> Iterable[tuple[int, int, bool, tuple[Range, ...]]]:
    """Blocks (start, stop, is a run, path above), in pre-order, that hold every token once.

    Subtrees of up to `block` tokens join their neighbours in one block. A run, with the first children that
    continue it, sees the path above and itself causally; it never crosses `first_query`.
    """
    cuts = sorted({i for i in range(len(end)) if i == 0 or end[i] != end[i - 1]} | {first_query, len(end)})
    stops = dict(pairwise(cuts))
    root: tuple[Range, ...] = ()
    stack = [(0, len(end), root)]  # sibling subtrees still to be cut, and the path above them
    while stack:
        at, limit, path = stack.pop()
        if at == limit:
            continue
        begin = at
        while at < limit and end[at] - begin <= block:
            at = end[at]
        if at > begin:
            yield begin, at, stops[begin] == at, path
            stack.append((at, limit, path))
            continue
        runs = [begin]
        # A first child continues its parent without a gap, so both are one run where that saves small calls.
        while (stop := stops[runs[-1]]) not in (end[runs[-1]], first_query):
            if min(stop - begin, stops[stop] - stop) >= block:
                break
            runs.append(stop)
        yield begin, stop, True, path
        stack.append((end[begin], limit, path))  # later siblings, after the children
        head, before = (path[:-1], path[-1][0]) if path and path[-1][1] == begin else (path, begin)
        for run, child_end in zip(runs, [*(end[run] for run in runs[1:]), stop], strict=True):
            stack.append((child_end, end[run], (*head, (before, stops[run]))))


def block_plan(
    subtree_end: Tensor, *, window: int | None = None, first_query: int = 0, block: int = BLOCK
) -> BlockPlan:
    """Cut a tree into parts. `subtree_end` [T] int32 must be a tree (see `TreePack.check`).

    `first_query`: queries are the tokens from here on only.
    """
    ends = subtree_end.cpu().long()
    # tokens whose interval is still open at i, less itself
    depth = torch.arange(ends.numel()) - torch.bincount(ends, minlength=1).cumsum(0)[: ends.numel()]
    own: list[Part] = []
    groups: list[tuple[int, int, tuple[Range, ...]]] = []
    for start, stop, is_run, path in _cut(ends.tolist(), first_query, block):
        if stop <= first_query:
            continue
        first = max(start, first_query)
        for a, b in _pieces(first, stop, block) if is_run and window is None else [(first, stop)]:
            above = path if window is not None else ()  # with a window, what is left of a path differs by row
            keys = tuple(slice(*r) for r in (*above, (start, b if is_run else stop)))
            causal = is_run and a == start and window is None
            mask = None if causal else _visible(a, b, keys, ends, depth, window).to(subtree_end.device)
            own.append(Part(slice(a - first_query, b - first_query), keys, causal, mask))
        if path and window is None:
            if groups and groups[-1][1:] == (first, path):
                first = groups.pop()[0]
            groups.append((first, stop, path))
    paths = [
        Part(slice(first - first_query, stop - first_query), tuple(slice(*r) for r in path))
        for first, stop, path in groups
    ]
    return BlockPlan(own, paths, window)


def _pieces(start: int, stop: int, block: int) -> list[Range]:
    """A run in equal pieces of at most `block` tokens, or whole where it is long."""
    count = 1 if stop - start > LONG_RUN else -(-(stop - start) // block)
    return list(pairwise([start + (stop - start) * i // count for i in range(count + 1)]))


def _visible(
    first: int, stop: int, keys: tuple[slice, ...], ends: Tensor, depth: Tensor, window: int | None
) -> Tensor:
    """Mask [stop - first, keys] of the queries [first, stop)."""
    rows = torch.arange(first, stop)[:, None]
    columns = torch.cat([torch.arange(key.start, key.stop) for key in keys])
    mask = (columns <= rows) & (rows < ends[columns])
    if window is not None:
        mask &= depth[rows] - depth[columns] < window
    return mask


def tree_attention(q, k, v, subtree_end, *, scale=None, window=None, plan: BlockPlan | None = None):
    """(out [T, Hq, D] in the dtype of `q`, lse [T, Hq], fp32 at least); differentiable in q, k and v.

    `plan`: the `block_plan` of the same tree, where one is kept; else it is made here.
    """
    if plan is None:
        plan = block_plan(subtree_end, window=window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    queries = q.unflatten(1, (k.shape[1], -1))  # [T, Hkv, G, D]
    out, lse = _TreeAttention.apply(queries, k, v, plan, scale)
    return out.flatten(1, 2), lse.flatten(1)


def forward(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> tuple[Tensor, Tensor]:
    """out [T, Hkv, G, D] in the dtype of `q` and lse [T, Hkv, G], fp32 at least; q as out."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
    for part in plan.own:
        out[part.queries], lse[part.queries] = _attend(q, k, v, part, plan.bias(part, dtype), scale)
    for part in plan.path:
        o, l = _attend(q, k, v, part, None, scale)
        so_far = lse[part.queries]
        out[part.queries].lerp_(o.to(dtype), torch.sigmoid(l - so_far)[..., None])
        torch.logaddexp(so_far, l, out=so_far)
    return out.to(q.dtype), lse


def backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: BlockPlan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; shapes as in `forward`."""
    dim, given = q.shape[-1], q.dtype
    if d_lse is not None:  # a column more: v there is 1, so dO V^T - delta gains d_lse
        q, k, v, out, d_out = (torch.nn.functional.pad(x, (0, 1)) for x in (q, k, v, out, d_out))
        v[..., dim], d_out[..., dim] = 1, d_lse
    dtype = lse.dtype
    dq = torch.empty(q.shape, dtype=dtype, device=q.device)
    dk, dv = torch.zeros((2, *k.shape), dtype=dtype, device=q.device)
    saved = q, k, v, out, lse, d_out
    for part in plan.own:
        dq[part.queries] = _add_gradients(saved, dk, dv, part, plan.bias(part, dtype), scale)
    for part in plan.path:
        dq[part.queries] += _add_gradients(saved, dk, dv, part, None, scale)
    dq, dk, dv = (grad[..., :dim].to(given) for grad in (dq, dk, dv))
    return dq, dk, dv


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan: BlockPlan, scale: float):
        out, lse = forward(q, k, v, plan, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, d_out, d_lse):
        q, k, v, out, lse = ctx.saved_tensors
        if d_out is None:
            d_out = torch.zeros_like(out)
        return *backward(d_out, d_lse, q, k, v, out, lse, ctx.plan, ctx.scale), None, None


def _heads_first(x: Tensor) -> Tensor:
    """[n, Hkv, G, ...] as [Hkv, G, n, ...]."""
    return x.movedim(0, 2)


def _gather(x: Tensor, part: Part, group: int) -> Tensor:
    """Rows of k or v of a part as [Hkv, G, m, D], not copied for the heads of a group."""
    rows = x[part.keys[0]] if len(part.keys) == 1 else torch.cat([x[key] for key in part.keys])
    return rows.transpose(0, 1)[:, None].expand(-1, group, -1, -1)


def _attend(q, k, v, part: Part, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """out [n, Hkv, G, D] and lse [n, Hkv, G] of one part."""
    queries, (keys, values) = _heads_first(q[part.queries]), (_gather(x, part, q.shape[2]) for x in (k, v))
    if q.device.type in FUSED_DEVICES:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, 0.0, part.causal, attn_mask=bias, scale=scale
        )
    else:
        score = _scores(queries, keys, part, bias, scale)
        lse = score.logsumexp(-1)
        out = (score - lse[..., None]).exp() @ values.to(score.dtype)
    return out.movedim(2, 0), lse.movedim(2, 0)


def _add_gradients(saved, dk, dv, part: Part, bias: Tensor | None, scale: float) -> Tensor:
    """dQ [n, Hkv, G, D] of one part; its dK and dV are added to `dk` and `dv` [T, Hkv, D]."""
    q, k, v, *rest = saved
    queries, (keys, values) = _heads_first(q[part.queries]), (_gather(x, part, q.shape[2]) for x in (k, v))
    out, lse, d_out = (_heads_first(x[part.queries]) for x in rest)
    if q.device.type in FUSED_DEVICES:
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, queries, keys, values, out, lse, 0.0, part.causal, attn_mask=bias, scale=scale
        )
    else:
        weight = (_scores(queries, keys, part, bias, scale) - lse[..., None]).exp()
        d_out = d_out.to(weight.dtype)
        d_score = weight * (d_out @ values.to(weight.dtype).mT - (d_out * out).sum(-1, keepdim=True)) * scale
        grads = d_score @ keys.to(weight.dtype), d_score.mT @ queries.to(weight.dtype), weight.mT @ d_out
    for total, grad in ((dk, grads[1]), (dv, grads[2])):
        pieces = grad.sum(1).transpose(0, 1).split([key.stop - key.start for key in part.keys])
        for key, piece in zip(part.keys, pieces, strict=True):
            total[key] += piece
    return grads[0].movedim(2, 0)


def _scores(queries, keys, part: Part, bias: Tensor | None, scale: float) -> Tensor:
    """Masked scores [Hkv, G, n, m], fp32 at least: what the CPU kernels do without writing it down."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    score = queries.to(dtype) @ keys.to(dtype).mT * scale
    if part.causal:
        above = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).triu(1)
        score = score.masked_fill(above, float("-inf"))
    return score if bias is None else score + bias
