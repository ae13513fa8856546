"""Tree attention by flash-attn-4 (CuTe, sm_90 and sm_100): its mask_mod, and lists of blocks from the tree.

    token i attends to j   iff   start[j] <= i < end[j]        start[j] = j, end = subtree_end
                                 (and depth[i] - depth[j] < window, if a window is given)

flash-attn-4 takes the mask as a function of (query, key) that it inlines, and per block of queries the blocks
of keys that are seen in part, where it asks the function, and whole, where it does not; in the backward the
same per block of keys. start, end and depth of a token are tensors that the function reads, padded so that
lanes past T see nothing. Behind a cached prefix of P tokens (first_query) queries count from 0: start and end
are less by P.

Saved for the backward: q, k, v, out and lse. dQ, and dK and dV under grouped heads, are sums in an order that
varies from run to run, unless torch.use_deterministic_algorithms is on.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pact_fast.kernels.tree_attention.layout import visible_tiles

PACKAGE = "flash-attn-4"
HEAD_DIMS = {9: range(64, 257, 8), 10: range(64, 129, 8)}  # by major capability
AUTO_HEAD_DIMS = (128,)  # measured; at 64 some releases have had wrong block-sparse gradients
DTYPES = (torch.bfloat16, torch.float16)
PAD = 256  # a tile past the end is read, never used


def installed() -> bool:
    try:
        metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return False
    return True


def refusal(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> str | None:
    """Why this cannot run, or None."""
    if capability[0] not in HEAD_DIMS:
        return f"needs sm_90 or sm_100, this GPU is sm_{capability[0]}{capability[1]}"
    if head_dim not in (known := HEAD_DIMS[capability[0]]):
        return f"takes head_dim {known[0]} to {known[-1]} in steps of 8 here, got {head_dim}"
    if dtype not in DTYPES:
        return f"takes bfloat16 or float16, got {dtype}"
    return None if installed() else f"needs the package {PACKAGE}: pip install 'pact-fast[fa4]'"


def block_sizes(
    head_dim: int, capability: tuple[int, int] = (9, 0)
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Queries x keys of a block in the forward and in the backward: what the kernels' own tiles divide."""
    if capability[0] == 10:
        return (256, 128), (128, 128)
    if head_dim <= 128:
        return (128, 128), (128, 128)
    return ((128, 112), (128, 96)) if head_dim <= 192 else ((128, 80), (128, 64))


class BlockLists:
    """Per row block the column blocks seen in part and whole: (counts [1, 1, rows], numbers [1, 1, rows,
    most]) each, int32; numbers past a row's count are 0."""

    def __init__(
        self, seen: np.ndarray, full: np.ndarray, block: tuple[int, int], device: torch.device
    ) -> None:
        self.block = block
        self.partial = packed_columns(seen & ~full, device)
        self.full = packed_columns(full, device)


def packed_columns(
    mask: np.ndarray, device: torch.device, width: int | None = None, values: np.ndarray | None = None
) -> tuple[Tensor, Tensor]:
    """Counts [1, 1, rows] of a row's true entries and, packed to the left in [1, 1, rows, width], their
    columns, or their `values`; width None: as many as any row has."""
    count = mask.sum(1)
    rows, columns = np.nonzero(mask)
    index = np.zeros((mask.shape[0], width or max(int(count.max(initial=0)), 1)), np.int32)
    place = np.arange(rows.size) - np.repeat(np.cumsum(count) - count, count)
    index[rows, place] = columns if values is None else values[rows, columns]
    counts, numbers = (torch.from_numpy(x)[None, None].to(device) for x in (count.astype(np.int32), index))
    return counts, numbers


class Fa4Plan:
    """Mask tensors and block lists of one tree.

    `aux`: end [T + PAD], and start, query depth, key depth likewise where the mask needs them; int32.
    `forward`: rows are query blocks; `backward`: rows are key blocks; `write_order`: of dQ, for a
    deterministic backward: the place of a key block among those that add to a query block, as `backward`.
    """

    def __init__(
        self,
        subtree_end: Tensor,
        depth: np.ndarray,
        window: int | None,
        first_query: int = 0,
        *,
        blocks: tuple[tuple[int, int], tuple[int, int]] = ((128, 128), (128, 128)),
    ) -> None:
        device, end = subtree_end.device, subtree_end.cpu().numpy()
        self.window, self.first_query, self.blocks = window, first_query, blocks

        def padded(values: np.ndarray) -> Tensor:
            return torch.from_numpy(np.pad(values.astype(np.int32), (0, PAD))).to(device)

        self.aux = [padded(end - first_query)]
        if first_query or window is not None:
            self.aux.append(padded(np.arange(end.size) - first_query))
        if window is not None:
            self.aux += [padded(depth[first_query:]), padded(depth)]
        (forward, backward) = blocks
        self.forward = BlockLists(*visible_tiles(end, depth, *forward, window, first_query), forward, device)
        seen, full = visible_tiles(end, depth, *backward, window, first_query)
        self.backward = BlockLists(seen.T, full.T, backward, device)
        place = np.cumsum(seen, axis=1) - 1
        self.write_order = tuple(packed_columns(m.T, device, values=place.T)[1] for m in (seen & ~full, full))


@lru_cache(maxsize=1)
def _library() -> Any:
    """flash-attn-4's two calls, its type of block lists, and our masks compiled for it."""
    import cutlass.cute as cute
    from cutlass import Int32
    from flash_attn.cute import utils
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    def at(table, index):
        return utils.scalar_to_ssa(table[index[0]], Int32)

    @cute.jit
    def tree(batch, head, query, key, seqlen, aux):
        return (key <= query) & (query < at(aux[0], key))

    @cute.jit
    def behind(batch, head, query, key, seqlen, aux):
        return (at(aux[1], key) <= query) & (query < at(aux[0], key))

    def windowed(window: int):
        @cute.jit
        def mask(batch, head, query, key, seqlen, aux):
            near = at(aux[2], query) < at(aux[3], key) + window
            return (at(aux[1], key) <= query) & (query < at(aux[0], key)) & near

        return mask

    return SimpleNamespace(
        forward=_flash_attn_fwd,
        backward=_flash_attn_bwd,
        lists=BlockSparseTensorsTorch,
        tree=tree,
        behind=behind,
        windowed=lru_cache(windowed),
    )


def _mask(library: Any, plan: Fa4Plan) -> Any:
    if plan.window is not None:
        return library.windowed(plan.window)
    return library.behind if plan.first_query else library.tree


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Fa4Plan, scale: float) -> tuple[Tensor, Tensor]:
    """out [T, Hq, D] and lse [Hq, T]."""
    library, lists = _library(), plan.forward
    out, lse, *_ = library.forward(
        q.unsqueeze(0),
        k.unsqueeze(0),
        v.unsqueeze(0),
        softmax_scale=scale,
        mask_mod=_mask(library, plan),
        aux_tensors=plan.aux,
        block_sparse_tensors=library.lists(*lists.partial, *lists.full, block_size=lists.block),
        return_lse=True,
    )
    return out.squeeze(0), lse.squeeze(0)


def backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Fa4Plan,
    scale: float,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [T, Hq, D], dk and dv [T, Hkv, D]; d_lse and lse [Hq, T]."""
    library, lists = _library(), plan.backward
    order: dict[str, Any] = dict(
        zip(("dq_write_order", "dq_write_order_full"), plan.write_order, strict=True)
    )
    order["spt"] = False
    gradients = library.backward(
        q.unsqueeze(0),
        k.unsqueeze(0),
        v.unsqueeze(0),
        out.unsqueeze(0),
        d_out.unsqueeze(0),
        lse.unsqueeze(0),
        softmax_scale=scale,
        mask_mod=_mask(library, plan),
        aux_tensors=plan.aux,
        block_sparse_tensors=library.lists(
            *lists.partial,
            *lists.full,
            block_size=lists.block,
            **(order | {"spt": False} if deterministic else {}),
        ),
        dlse=None if d_lse is None else d_lse.unsqueeze(0),
        deterministic=deterministic,
    )
    dq, dk, dv = (x.squeeze(0) for x in gradients)
    return dq, dk, dv


class _Fa4(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Fa4Plan, scale: float) -> Any:
        out, lse = forward(q, k, v, plan, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else d_out.contiguous()
        d_lse = None if d_lse is None else d_lse.contiguous()
        deterministic = torch.are_deterministic_algorithms_enabled()
        return *backward(d_out, d_lse, q, k, v, out, lse, ctx.plan, ctx.scale, deterministic), None, None


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Fa4Plan, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """out [T, Hq, D] and lse [T, Hq] fp32, both differentiable. ValueError where it cannot run."""
    capability = torch.cuda.get_device_capability(q.device)
    if why := refusal(q.shape[2], q.dtype, capability):
        raise ValueError(f'impl="fa4" {why}; use impl="triton"')
    if plan.blocks != block_sizes(q.shape[2], capability):
        raise ValueError(f"the plan is of another head_dim than {q.shape[2]}: give it to tree_plan")
    q, k, v = (x.contiguous() for x in (q, k, v))
    out, lse = _Fa4.apply(q, k, v, plan, q.shape[2] ** -0.5 if scale is None else scale)
    return out, lse.T
