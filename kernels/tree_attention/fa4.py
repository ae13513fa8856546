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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pact_fast.kernels.tree_attention.layout import visible_tiles

PACKAGE = "flash-attn-4"
# Of queries and keys, in the forward and in the backward: multiples of the kernels' own tiles on sm_90, sm_100.
BLOCKS = {9: ((128, 128), (128, 128)), 10: ((256, 128), (128, 128))}
HEAD_DIMS = range(64, 257, 8)
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
    if capability[0] not in BLOCKS:
        return f"needs sm_90 or sm_100, this GPU is sm_{capability[0]}{capability[1]}"
    if head_dim not in HEAD_DIMS:
        return f"takes head_dim {HEAD_DIMS[0]} to {HEAD_DIMS[-1]} in steps of 8, got {head_dim}"
    if dtype not in DTYPES:
        return f"takes bfloat16 or float16, got {dtype}"
    return None if installed() else f"needs the package {PACKAGE}: pip install 'pact_fast[fa4]'"


class BlockLists:
    """Per row block the column blocks seen in part and whole: (counts [1, 1, rows], numbers [1, 1, rows,
    most]) each, int32; numbers past a row's count are 0."""

    def __init__(
        self, seen: np.ndarray, full: np.ndarray, block: tuple[int, int], device: torch.device
    ) -> None:
        self.block = block
        self.partial = _numbers(seen & ~full, device)
        self.full = _numbers(full, device)


def _numbers(
    mask: np.ndarray, device: torch.device, values: np.ndarray | None = None
) -> tuple[Tensor, Tensor]:
    """Counts of a row's true entries and, packed to the left, their columns, or their `values`."""
    count = mask.sum(1)
    rows, columns = np.nonzero(mask)
    index = np.zeros((mask.shape[0], max(int(count.max(initial=0)), 1)), np.int32)
    index[rows, np.arange(rows.size) - np.repeat(np.cumsum(count) - count, count)] = (
        columns if values is None else values[rows, columns]
    )
    return tuple(torch.from_numpy(x)[None, None].to(device) for x in (count.astype(np.int32), index))  # type: ignore[return-value]


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
        blocks: tuple[tuple[int, int], tuple[int, int]] = BLOCKS[9],
    ) -> None:
        device, end = subtree_end.device, subtree_end.cpu().numpy()
        self.window, self.first_query = window, first_query

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
        self.write_order = tuple(_numbers(m.T, device, place.T)[1] for m in (seen & ~full, full))


@lru_cache(maxsize=1)
def _library() -> Any:
    """flash-attn-4's two calls, its type of block lists, and our masks compiled for it."""
    import cutlass.cute as cute
    from cutlass import Int32
    from flash_attn.cute import utils
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    class Library:
        forward, backward, Lists = _flash_attn_fwd, _flash_attn_bwd, BlockSparseTensorsTorch
        masks: dict[Any, Any] = {}

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

    Library.tree, Library.behind, Library.windowed = tree, behind, lru_cache(windowed)  # type: ignore[attr-defined]
    return Library


def _mask(library: Any, plan: Fa4Plan) -> Any:
    if plan.window is not None:
        return library.windowed(plan.window)
    return library.behind if plan.first_query else library.tree


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Fa4Plan, scale: float) -> tuple[Tensor, Tensor]:
    """out [T, Hq, D] and lse [Hq, T]."""
    library, lists = _library(), plan.forward
    out, lse, *_ = library.forward(
        q[None],
        k[None],
        v[None],
        softmax_scale=scale,
        mask_mod=_mask(library, plan),
        aux_tensors=plan.aux,
        block_sparse_tensors=library.Lists(*lists.partial, *lists.full, block_size=lists.block),
        return_lse=True,
    )
    return out[0], lse[0]


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
    order = dict(zip(("dq_write_order", "dq_write_order_full"), plan.write_order, strict=True))
    gradients = library.backward(
        q[None],
        k[None],
        v[None],
        out[None],
        d_out[None],
        lse[None],
        softmax_scale=scale,
        mask_mod=_mask(library, plan),
        aux_tensors=plan.aux,
        block_sparse_tensors=library.Lists(
            *lists.partial,
            *lists.full,
            block_size=lists.block,
            **(order | {"spt": False} if deterministic else {}),
        ),
        dlse=None if d_lse is None else d_lse[None],
        deterministic=deterministic,
    )
    dq, dk, dv = (x[0] for x in gradients)
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
        d_lse = None if d_lse is None else d_lse.float().contiguous()
        deterministic = torch.are_deterministic_algorithms_enabled()
        return *backward(d_out, d_lse, q, k, v, out, lse, ctx.plan, ctx.scale, deterministic), None, None


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Fa4Plan, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """out [T, Hq, D] and lse [T, Hq] fp32, both differentiable. ValueError where it cannot run (`refusal`)."""
    if q.is_cuda and (why := refusal(q.shape[2], q.dtype, torch.cuda.get_device_capability(q.device))):
        raise ValueError(f'impl="fa4" {why}; use impl="triton"')
    q, k, v = (x.contiguous() for x in (q, k, v))
    out, lse = _Fa4.apply(q, k, v, plan, q.shape[2] ** -0.5 if scale is None else scale)
    return out, lse.T
