"""Prefill and extend in Triton: attention of a forest of new tokens over cached paths and over itself.

One program a query tile and kv head. A query tile is up to BLOCK_M / G neighbouring new tokens of one tree,
with the G query heads of the kv head: the keys are read once for the group. It walks the pages of its tree's
path, segment by segment, then a list of blocks of new tokens: those that all its tokens see (no mask), and
those that some see. Softmax in base 2; out is written once.

Tile lists are made on the host, once for all layers. Dims as in ops.py; M rows of the query tile, N keys.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from pact_fast.kernels.decode.attention import capability, load_keys, score_scales, softmax_step
from pact_fast.kernels.decode.tasks import ExtendTasks

TILE = tl.constexpr(8)  # columns of a tile's record


class ExtendTile(NamedTuple):
    """Query rows (tokens times heads of the group) and keys of a tile, warps and stages of the launch."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def choose_extend_tile(
    block_d: int, group: int, dtype: torch.dtype, capability: tuple[int, int] | None
) -> ExtendTile:
    """By shape and architecture, never by timing. 64 x 64 with 4 warps was among the best of tree attention's
    forward on an H100; on sm_80 and sm_100 it spills here, with 8 warps it does not."""
    if capability is None:
        return ExtendTile(max(16, triton.next_power_of_2(group)), 16, 1, 1)
    block_m = max(64, triton.next_power_of_2(group))
    if dtype == torch.float32:
        return ExtendTile(max(16, triton.next_power_of_2(group)), 32, 8, 1)  # checks only: no tensor cores
    if block_d <= 128:
        if capability[0] == 9:
            return ExtendTile(block_m, 64, 4, 3)
        return ExtendTile(block_m, 64, 8, 3 if block_d > 64 else 2)
    return ExtendTile(block_m, 32, 8, 2)


class ExtendLists(NamedTuple):
    """int32 tensors on the device.

    tiles [tiles, 8]: token_start, token_count, path_begin, path_end (into `segments`), block_begin,
        block_split, block_end (into `blocks`; [begin, split) are seen whole), tree_end (first token past it)
    segments [segments, 4]: page_start (into `pages`), length, position of the first token
    """

    tiles: Tensor
    segments: Tensor
    blocks: Tensor
    pages: Tensor
    end: Tensor
    positions: Tensor


def extend_lists(
    tasks: ExtendTasks, tile_tokens: int, block_n: int, masked: bool, device: torch.device
) -> ExtendLists:
    """Tiles of `tile_tokens` tokens, the longest first. `masked`: a window may hide any key, so no block is
    whole."""
    end = tasks.subtree_end
    tiles: list[tuple[int, ...]] = []
    segments: list[tuple[int, int, int, int]] = []
    blocks: list[int] = []
    pages: list[int] = []
    work: list[int] = []  # keys of a tile
    for i_root, path in enumerate(tasks.paths):
        root, stop = int(tasks.roots[i_root]), int(tasks.roots[i_root + 1])
        path_begin, position = len(segments), 0
        for segment in path:
            if segment.length:
                segments.append((len(pages), segment.length, position, 0))
                pages.extend(segment.pages[: -(-segment.length // tasks.page_size)])
            position += segment.length
        starts = np.arange(root, stop, block_n)
        stops = np.minimum(starts + block_n, stop)
        most = np.maximum.reduceat(end[root:stop], starts - root)
        least = np.minimum.reduceat(end[root:stop], starts - root)
        for token in range(root, stop, tile_tokens):
            last = min(token + tile_tokens, stop) - 1
            seen = (starts <= last) & (most > token)
            full = (stops <= token + 1) & (stops - starts == block_n) & (not masked)
            whole = seen & full & (least > last)
            begin = len(blocks)
            blocks.extend(starts[whole].tolist())
            split = len(blocks)
            blocks.extend(starts[seen & ~whole].tolist())
            tiles.append(
                (token, last + 1 - token, path_begin, len(segments), begin, split, len(blocks), stop)
            )
            work.append((len(blocks) - begin) * block_n + position)
    # Long tiles first, so that the last programs to start are short.
    tiles = [tiles[i] for i in np.argsort(-np.array(work), kind="stable")]
    arrays = tiles, segments or [(0, 0, 0, 0)], blocks, pages or [0], end, tasks.positions
    return ExtendLists(*(torch.from_numpy(np.asarray(a, np.int32)).to(device) for a in arrays))


@triton.jit
def extend_attention_kernel(
    q,  # [T, HQ, D], row stride s_q, heads contiguous
    k_cache,  # [S, HKV, D]
    v_cache,  # [S, HKV, D]
    out,  # [T, HQ, D] out
    slots,  # [T] int64
    tiles,  # [tiles, 8]
    segments,  # [segments, 4]
    blocks,
    pages,
    end,  # [T]
    positions,  # [T]
    scale,
    cap,
    window,
    s_q,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    HQ: tl.constexpr = HKV * GROUP
    i_h = tl.program_id(0) % HKV
    p_tile = tiles + tl.program_id(0) // HKV * TILE
    o_m = tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    i_first = tl.load(p_tile)
    i_tree_end = tl.load(p_tile + 7)
    m_m = (o_m < BLOCK_M // GROUP * GROUP) & (o_m // GROUP < tl.load(p_tile + 1))
    b_token = i_first + o_m // GROUP
    b_token = tl.where(m_m, b_token, i_first)
    o_head = i_h * GROUP + o_m % GROUP
    m_q = m_m[:, None] & (o_d[None, :] < D)
    p_q = q + (b_token.to(tl.int64) * s_q + o_head * D)[:, None] + o_d[None, :]
    b_q = tl.load(p_q, mask=m_q, other=0.0)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], -1e30, dtype=tl.float32)  # finite: -inf - -inf is NaN
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_low = b_token
    i_low = 0  # the first position that some token of the tile sees
    if WINDOW:
        b_low = tl.load(positions + b_token) - window + 1
        i_low = tl.min(b_low, 0)

    for i_s in range(tl.load(p_tile + 2), tl.load(p_tile + 3)):
        i_pages = tl.load(segments + i_s * 4)
        i_last = tl.load(segments + i_s * 4 + 1)
        i_pos = tl.load(segments + i_s * 4 + 2)
        i_begin = tl.maximum(i_low - i_pos, 0) // BLOCK_N * BLOCK_N
        for i_n in range(i_begin, i_last, BLOCK_N):
            p_k, m_k = load_keys(k_cache, pages + i_pages, i_n, i_last, i_h, HKV, D, BLOCK_D, BLOCK_N, PAGE)
            p_v, m_v = load_keys(v_cache, pages + i_pages, i_n, i_last, i_h, HKV, D, BLOCK_D, BLOCK_N, PAGE)
            b_k = tl.load(p_k, mask=m_k, other=0.0)
            b_v = tl.load(p_v, mask=m_v, other=0.0)
            m_s = (i_n + o_n < i_last)[None, :]
            if WINDOW:
                m_s = m_s & (i_pos + i_n + o_n[None, :] >= b_low[:, None])
            b_acc, b_max, b_sum = softmax_step(
                b_acc, b_max, b_sum, b_q, b_k, b_v, m_s, scale, cap, SOFTCAP, PRECISION
            )

    i_split = tl.load(p_tile + 5)
    for i_b in range(tl.load(p_tile + 4), i_split):
        b_slot = tl.load(slots + tl.load(blocks + i_b) + o_n)
        o_x = ((b_slot * HKV + i_h) * D)[:, None] + o_d[None, :]
        m_x = o_d[None, :] < D
        b_k = tl.load(k_cache + o_x, mask=m_x, other=0.0)
        b_v = tl.load(v_cache + o_x, mask=m_x, other=0.0)
        m_s = (o_n >= 0)[None, :]
        b_acc, b_max, b_sum = softmax_step(
            b_acc, b_max, b_sum, b_q, b_k, b_v, m_s, scale, cap, SOFTCAP, PRECISION
        )
    for i_b in range(i_split, tl.load(p_tile + 6)):
        b_key = tl.load(blocks + i_b) + o_n
        m_n = b_key < i_tree_end
        b_slot = tl.load(slots + b_key, mask=m_n, other=0)
        o_x = ((b_slot * HKV + i_h) * D)[:, None] + o_d[None, :]
        m_x = m_n[:, None] & (o_d[None, :] < D)
        b_k = tl.load(k_cache + o_x, mask=m_x, other=0.0)
        b_v = tl.load(v_cache + o_x, mask=m_x, other=0.0)
        b_end = tl.load(end + b_key, mask=m_n, other=0)
        m_s = (b_key[None, :] <= b_token[:, None]) & (b_token[:, None] < b_end[None, :])
        if WINDOW:
            m_s = m_s & (tl.load(positions + b_key, mask=m_n, other=0)[None, :] >= b_low[:, None])
        b_acc, b_max, b_sum = softmax_step(
            b_acc, b_max, b_sum, b_q, b_k, b_v, m_s, scale, cap, SOFTCAP, PRECISION
        )
    p_o = out + ((b_token.to(tl.int64) * HQ + o_head) * D)[:, None] + o_d[None, :]
    tl.store(p_o, (b_acc / b_sum[:, None]).to(out.dtype.element_ty), mask=m_q)


def extend_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    tasks: ExtendTasks,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    tokens, num_q, head_dim = q.shape
    num_kv = k_cache.shape[1]
    group = num_q // num_kv
    block_d = max(16, triton.next_power_of_2(head_dim))
    tile = choose_extend_tile(block_d, group, q.dtype, capability(q.device))
    tile_tokens = tile.block_m // group
    key = ("triton", q.device, tile_tokens, tile.block_n, window is not None)
    if key not in tasks.plans:
        tasks.plans[key] = extend_lists(tasks, tile_tokens, tile.block_n, window is not None, q.device)
    lists: ExtendLists = tasks.plans[key]
    if q.stride()[1:] != (head_dim, 1):
        q = q.contiguous()
    out = torch.empty((tokens, num_q, head_dim), dtype=q.dtype, device=q.device)
    factor, cap = score_scales(scale, softcap)
    if tokens:
        extend_attention_kernel[(len(lists.tiles) * num_kv,)](
            q, k_cache, v_cache, out, slots, *lists, factor, cap, window or 0, q.stride(0),
            HKV=num_kv, GROUP=group, D=head_dim, PAGE=tasks.page_size, WINDOW=window is not None,
            SOFTCAP=softcap is not None, PRECISION="ieee", BLOCK_M=tile.block_m, BLOCK_D=block_d,
            BLOCK_N=tile.block_n, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out
