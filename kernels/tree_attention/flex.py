"""Tree attention by torch's FlexAttention: the best pip-only peer, with the same mask and tile lists."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from pact_fast.kernels.tree_attention.fa4 import packed_columns
from pact_fast.kernels.tree_attention.layout import visible_tiles

BLOCK = 128


class FlexPlan:
    """The BlockMask of one tree."""

    def __init__(self, subtree_end: Tensor, depth: np.ndarray, window: int | None) -> None:
        size = subtree_end.numel()
        padding = -size % BLOCK
        # Lanes past T read these entries: end 0 makes them invisible.
        end = torch.nn.functional.pad(subtree_end, (0, padding))
        level = torch.from_numpy(np.pad(depth.astype(np.int32), (0, padding))).to(subtree_end.device)

        def visible(_batch, _head, q_index, kv_index):
            seen = (kv_index <= q_index) & (q_index < end[kv_index])
            return seen if window is None else seen & (level[q_index] - level[kv_index] < window)

        seen, full = visible_tiles(subtree_end.cpu().numpy(), depth, BLOCK, BLOCK, window)
        device, width = subtree_end.device, full.shape[1]
        counts, keys = packed_columns(seen & ~full, device, width)
        full_counts, full_keys = packed_columns(full, device, width)
        self.mask = BlockMask.from_kv_blocks(
            counts, keys, full_counts, full_keys, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(size, size)
        )


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: FlexPlan, *, scale: float | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """out [T, Hq, D], and lse [T, Hq] if asked. On a CPU torch has it in eager form and without gradients."""
    attend = _compiled() if q.is_cuda else flex_attention
    out, aux = attend(
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        block_mask=plan.mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    return out[0].transpose(0, 1), aux.lse[0].T if return_lse else None
