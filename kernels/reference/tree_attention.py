"""Tree attention in plain PyTorch: the shipped reference, any device, any float dtype.

    token i attends to j   iff   j <= i < subtree_end[j]      (and depth[i] - depth[j] < window, if a window
    is given)

The pack is cut into blocks of neighbouring queries that share all their ancestors. The keys of a block are
those ancestors, gathered, and the block itself; each block is one dense SDPA call with a small mask. So work
is done for visible pairs and for little else, and K/V are never repeated over the query heads of a group.

Shapes: T packed tokens, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F

BLOCK = 192  # queries a block may hold: larger wastes masked pairs, smaller gathers ancestors more often


def tree_mask(subtree_end: torch.Tensor, window: int | None = None) -> torch.Tensor:
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
class Block:
    """Neighbouring queries, their keys in the gathered K/V, and the mask (None: plain causal)."""

    queries: int
    keys: int
    mask: torch.Tensor | None  # [queries, keys] bool


@dataclass
class BlockPlan:
    """Blocks of one tree, made once, used by every layer; `gather`: packed index of all blocks' keys."""

    blocks: list[Block]
    gather: torch.Tensor  # [K] int64
    window: int | None
    _bias: dict[tuple, list] = field(default_factory=dict)

    def bias(self, dtype: torch.dtype) -> list[torch.Tensor | None]:
        """Additive masks in the dtype of the queries, kept: SDPA would convert a bool mask on every call."""
        if dtype not in self._bias:
            self._bias[dtype] = [
                None
                if block.mask is None
                else torch.zeros(block.mask.shape, dtype=dtype, device=block.mask.device).masked_fill_(
                    ~block.mask, float("-inf")
                )
                for block in self.blocks
            ]
        return self._bias[dtype]


def _runs(end: list[int]) -> list[tuple[int, int]]:
    """Unbranched runs [start, stop) of the tree in pre-order: neighbours whose subtrees end together."""
    cuts = [i for i in range(len(end)) if i == 0 or end[i] != end[i - 1]] + [len(end)]
    return list(pairwise(cuts))


def _cut(end: list[int], block: int) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """Blocks (start, stop, ancestor ranges): sibling subtrees together if they fit, long runs in pieces."""
    stops = dict(_runs(end))
    out: list[tuple[int, int, list[tuple[int, int]]]] = []
    everything: list[tuple[int, int]] = []
    stack = [(0, len(end), everything)]  # sibling ranges still to be cut, and the path above them
    while stack:
        at, limit, path = stack.pop()
        if at == limit:
            continue
        begin = at
        while at < limit and end[at] - begin <= block:
            at = end[at]
        if at > begin:
            out.append((begin, at, path))
        else:
            at, stop = end[begin], stops[begin]
            if path:
                for piece in range(begin, stop, block):
                    out.append((piece, min(piece + block, stop), [*path, (begin, piece)]))
            else:
                out.append((begin, stop, path))
            stack.append((at, limit, path))  # later siblings, after the children
            at, limit, path = stop, at, [*path, (begin, stop)]
        stack.append((at, limit, path))
    return out


def block_plan(
    subtree_end: torch.Tensor, *, window: int | None = None, first_query: int = 0, block: int = BLOCK
) -> BlockPlan:
    """Cut a tree into blocks. `subtree_end` [T] int32 must be a tree (see `TreePack.check`).

    `first_query`: queries are the tokens from here on only.
    """
    device = subtree_end.device
    ends = subtree_end.cpu().long()
    pieces, blocks = [], []
    depth = None
    if window is not None:
        # tokens whose interval is still open at i, less itself
        closed = torch.bincount(ends, minlength=ends.numel() + 1).cumsum(0)[: ends.numel()]
        depth = torch.arange(ends.numel()) - closed
    for start, stop, path in _cut(ends.tolist(), block):
        if stop <= first_query:
            continue
        own = torch.arange(start, stop)
        rows = own[max(first_query - start, 0) :]
        index = torch.cat([*(torch.arange(a, b) for a, b in path), own])
        mask = None
        if rows.numel() < index.numel() or window is not None or not bool((ends[own] >= stop).all()):
            mask = torch.ones(rows.numel(), index.numel(), dtype=torch.bool)
            visible = (own[None] <= rows[:, None]) & (rows[:, None] < ends[own][None])
            mask[:, index.numel() - own.numel() :] = visible
            if depth is not None:
                mask &= depth[rows][:, None] - depth[index][None] < window
            mask = mask.to(device)
        pieces.append(index)
        blocks.append(Block(rows.numel(), index.numel(), mask))
    gather = torch.cat(pieces) if pieces else ends
    return BlockPlan(blocks, gather.to(device), window)


def tree_attention(
    q, k, v, subtree_end, *, scale=None, window=None, plan: BlockPlan | None = None, return_lse=False
):
    """(out [T, Hq, D] in the dtype of `q`, lse [T, Hq] or None); differentiable in q, k and v [T, Hkv, D].

    `plan`: the `block_plan` of the same tree, where one is kept; else it is made here.
    """
    if plan is None:
        plan = block_plan(subtree_end, window=window)
    kv_heads, group, dim = k.shape[1], q.shape[1] // k.shape[1], q.shape[2]
    keys = k.index_select(0, plan.gather)
    values = v.index_select(0, plan.gather)
    queries = q.unflatten(1, (kv_heads, group))
    sizes = [block.keys for block in plan.blocks]
    out, lse = [], []
    for q_block, k_block, v_block, bias in zip(
        queries.split([block.queries for block in plan.blocks]),
        keys.split(sizes),
        values.split(sizes),
        plan.bias(q.dtype),
        strict=True,
    ):
        rows = k_block.shape[0]
        heads_first = (
            q_block.permute(1, 2, 0, 3),  # [Hkv, G, n, D]
            k_block.transpose(0, 1)[:, None].expand(kv_heads, group, rows, dim),
            v_block.transpose(0, 1)[:, None].expand(kv_heads, group, rows, dim),
        )
        o = F.scaled_dot_product_attention(*heads_first, attn_mask=bias, is_causal=bias is None, scale=scale)
        out.append(o.permute(2, 0, 1, 3).flatten(1, 2))
        if return_lse:
            lse.append(_block_lse(*heads_first[:2], bias, scale).permute(2, 0, 1).flatten(1))
    return torch.cat(out), torch.cat(lse) if return_lse else None


def _block_lse(q, k, bias, scale):
    """Log-sum-exp [Hkv, G, n] of the scores of one block, which SDPA does not return; fp32 at least."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    score = q.to(dtype) @ k.to(dtype).transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is None:
        bias = torch.full(score.shape[-2:], float("-inf"), dtype=dtype, device=q.device).triu(1)
    return (score + bias.to(dtype)).logsumexp(-1)
