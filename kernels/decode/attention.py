"""Shared-prefix decode attention in Triton: two kernels.

    partial, a task and kv head:  S = scale Q K^T  lse = log sum_j e^S_ij  out_i = sum_j e^(S_ij - lse_i) V_j
    merge, a row and query head:  lse = log sum_p e^lse_p   out = sum_p e^(lse_p - lse) out_p

Q of a task is one tile: its rows times the G query heads of kv head h. So a segment's keys are read once for
all rows below it (more than `tile_rows` rows: once more a tile, from L2, because their tasks are neighbours).
A fixed number of programs walks the list, of which `count` tasks are in use: neither depends on the host.
Keys past `row_length` are not there yet; a task that begins past it says lse = -inf and writes no out.

Everything is in base 2. Dims as in ops.py; M rows of the query tile, N keys. i_: index, o_: offsets,
m_: masks, b_: blocks.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pact_fast.kernels.decode.tasks import DecodeTasks

LOG2E = math.log2(math.e)
MAX_TILE = 64  # query rows of a tile
PROGRAMS = 4  # a multiprocessor
MERGE_BLOCK = 8  # partials of one step of the merge
TASK = tl.constexpr(8)


class KeyTile(NamedTuple):
    """Keys of a step, warps and pipeline stages of the partial kernel."""

    block_n: int
    num_warps: int
    num_stages: int


def capability(device: torch.device) -> tuple[int, int] | None:
    """None: the interpreter on a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def choose_key_tile(
    block_d: int, block_m: int, dtype: torch.dtype, capability: tuple[int, int] | None
) -> KeyTile:
    """By shape, never by timing. One stage of three goes to the page numbers, so a program has one tile of
    keys and values (32 KB at D = 128) on its way, and four programs a multiprocessor 128 KB: five times what
    hides a microsecond of latency at 3.35 TB/s."""
    if capability is None:
        return KeyTile(16, 1, 1)
    if dtype == torch.float32:
        return KeyTile(32, 4, 2)
    return KeyTile(64 if block_d <= 128 else 32, 8 if block_m > 32 else 4, 3)


@triton.jit
def load_keys(
    cache,
    pages,  # of the segment
    i_n,
    i_last,
    i_h,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Pointers [BLOCK_N, BLOCK_D] to the keys [i_n, i_last) of a segment, for one kv head, and their mask."""
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n = i_n + o_n < i_last
    m_x = m_n[:, None]
    if D != BLOCK_D:
        m_x = m_x & (o_d[None, :] < D)
    if PAGE % BLOCK_N == 0:  # a tile lies in one page: one 64-bit base, 32-bit offsets
        i_slot = tl.load(pages + i_n // PAGE).to(tl.int64) * PAGE + i_n % PAGE
        p_x = cache + (i_slot * HKV + i_h) * D + (o_n[:, None] * (HKV * D) + o_d[None, :])
    else:
        i_page = tl.load(pages + (i_n + o_n) // PAGE, mask=m_n, other=0).to(tl.int64)
        i_slot = i_page * PAGE + (i_n + o_n) % PAGE
        p_x = cache + ((i_slot * HKV + i_h) * D)[:, None] + o_d[None, :]
    return p_x, m_x


@triton.jit
def softmax_step(
    b_acc, b_max, b_sum, b_q, b_k, b_v, m_s, scale, cap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr
):
    """One tile of keys of the online softmax in base 2. m_s: [M, N] or [1, N], which scores count."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    if SOFTCAP:
        b_s = cap * (2.0 / (1.0 + tl.exp2(-2.885390081777927 * b_s)) - 1.0)  # tanh; 2 log2(e)
    b_s = tl.where(m_s, b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_p = tl.exp2(b_s - b_new[:, None])
    b_alpha = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=PRECISION)
    return b_acc, b_new, b_sum


@triton.jit
def shared_prefix_partial_kernel(
    q,  # [N, HQ, D], row stride s_q, heads contiguous
    k_cache,  # [S, HKV, D]
    v_cache,  # [S, HKV, D]
    partial_out,  # [task_rows, HQ, D] fp32 out
    partial_lse,  # [task_rows, HQ] fp32 out, base 2
    count,  # [1]
    tasks,  # [tasks, 8]
    rows,  # [task_rows]
    pages,  # [pages]
    row_start,  # [N]
    row_length,  # [N]
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
    o_m = tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    for i in range(tl.program_id(0), tl.load(count) * HKV, tl.num_programs(0)):
        i_h = i % HKV
        p_task = tasks + i // HKV * TASK
        i_row = tl.load(p_task)
        i_pages = tl.load(p_task + 2)
        i_first = tl.load(p_task + 3)
        i_last = i_first + tl.load(p_task + 4)
        i_own = tl.load(p_task + 6)
        if i_own >= 0:
            i_last = tl.minimum(i_last, tl.load(row_length + i_own).to(tl.int32))
        m_m = o_m // GROUP < tl.load(p_task + 1)
        o_p = i_row + o_m // GROUP  # partials
        b_row = tl.load(rows + o_p, mask=m_m, other=0)
        o_head = i_h * GROUP + o_m % GROUP
        m_q = m_m[:, None] & (o_d[None, :] < D)
        p_q = q + (b_row.to(tl.int64) * s_q + o_head * D)[:, None] + o_d[None, :]
        # A task whose keys are not there yet waits for nothing.
        m_there = (o_m * 0 + i_first < i_last)[:, None]
        b_q = tl.load(p_q, mask=m_q & m_there, other=0.0)
        i_begin = i_first
        b_low = o_m  # first key a row sees, counted in the segment
        if WINDOW:
            b_length = tl.load(row_length + b_row, mask=m_m, other=0).to(tl.int32)
            b_start = tl.load(row_start + b_row, mask=m_m, other=0)
            b_low = b_start + b_length - window - tl.load(p_task + 5)
            i_low = tl.min(tl.where(m_m, b_low, 2147483647), 0)
            i_begin += tl.maximum(i_low - i_first, 0) // BLOCK_N * BLOCK_N
        b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        b_max = tl.full([BLOCK_M], -1e30, dtype=tl.float32)  # finite: -inf - -inf is NaN
        b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        for i_n in range(i_begin, i_last, BLOCK_N):
            p_k, m_k = load_keys(k_cache, pages + i_pages, i_n, i_last, i_h, HKV, D, BLOCK_D, BLOCK_N, PAGE)
            p_v, m_v = load_keys(v_cache, pages + i_pages, i_n, i_last, i_h, HKV, D, BLOCK_D, BLOCK_N, PAGE)
            b_k = tl.load(p_k, mask=m_k, other=0.0)
            b_v = tl.load(p_v, mask=m_v, other=0.0)
            m_s = (i_n + o_n < i_last)[None, :]
            if WINDOW:
                m_s = m_s & (i_n + o_n[None, :] >= b_low[:, None])
            b_acc, b_max, b_sum = softmax_step(
                b_acc, b_max, b_sum, b_q, b_k, b_v, m_s, scale, cap, SOFTCAP, PRECISION
            )
        m_seen = b_sum > 0.0
        b_sum = tl.where(m_seen, b_sum, 1.0)
        o_p = o_p.to(tl.int64) * HQ + o_head
        b_lse = tl.where(m_seen, b_max + tl.log2(b_sum), float("-inf"))
        tl.store(partial_lse + o_p, b_lse, mask=m_m)
        m_q = m_q & m_seen[:, None]
        tl.store(partial_out + (o_p * D)[:, None] + o_d[None, :], b_acc / b_sum[:, None], mask=m_q)


@triton.jit
def shared_prefix_merge_kernel(
    partial_out,  # [task_rows, HQ, D] fp32
    partial_lse,  # [task_rows, HQ] fp32
    row_ptr,  # [N + 1]
    row_partials,  # [task_rows]
    out,  # [N, HQ, D] out
    HQ: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i_n = tl.program_id(0) // HQ
    i_h = tl.program_id(0) % HQ
    o_d = tl.arange(0, BLOCK_D)
    o_p = tl.arange(0, BLOCK_P)
    b_acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    b_max = -1e30
    b_sum = 0.0
    i_end = tl.load(row_ptr + i_n + 1)
    for i in range(tl.load(row_ptr + i_n), i_end, BLOCK_P):
        m_p = i + o_p < i_end
        b_part = tl.load(row_partials + i + o_p, mask=m_p, other=0).to(tl.int64) * HQ + i_h
        b_lse = tl.load(partial_lse + b_part, mask=m_p, other=float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_lse, 0))
        b_w = tl.exp2(b_lse - b_new)
        b_alpha = tl.exp2(b_max - b_new)
        m_x = (b_lse > float("-inf"))[:, None] & (o_d[None, :] < D)
        b_o = tl.load(partial_out + (b_part * D)[:, None] + o_d[None, :], mask=m_x, other=0.0)
        b_acc = b_acc * b_alpha + tl.sum(b_w[:, None] * b_o, 0)
        b_sum = b_sum * b_alpha + tl.sum(b_w, 0)
        b_max = b_new
    b_acc = b_acc / tl.where(b_sum > 0.0, b_sum, 1.0)
    tl.store(out + tl.program_id(0).to(tl.int64) * D + o_d, b_acc.to(out.dtype.element_ty), mask=o_d < D)


@functools.cache
def programs(device: torch.device) -> int:
    """Programs of the partial kernel; a few on a CPU, so that the interpreter walks the list, too."""
    if device.type != "cuda":
        return 5
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


def score_scales(scale: float, softcap: float | None) -> tuple[float, float]:
    """Factor of q k before the cap (or before exp2), and the cap, in base 2."""
    return (scale * LOG2E, 0.0) if softcap is None else (scale / softcap, softcap * LOG2E)


def block_sizes(head_dim: int, group: int, tile_rows: int) -> tuple[int, int]:
    """BLOCK_D and BLOCK_M."""
    if tile_rows * group > MAX_TILE:
        raise ValueError(
            f"tile_rows = {tile_rows} times {group} query heads a kv head are more than {MAX_TILE}: give "
            f"decode_tasks tile_rows={max(1, MAX_TILE // group)}"
        )
    return max(16, triton.next_power_of_2(head_dim)), max(16, triton.next_power_of_2(tile_rows * group))


def shared_prefix_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tasks: DecodeTasks,
    row_length: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    rows, num_q, head_dim = q.shape
    num_kv = k_cache.shape[1]
    group = num_q // num_kv
    block_d, block_m = block_sizes(head_dim, group, tasks.tile_rows)
    tile = choose_key_tile(block_d, block_m, q.dtype, capability(q.device))
    if tasks.split_keys % tile.block_n:
        raise ValueError(
            f"split_keys = {tasks.split_keys} must be a multiple of {tile.block_n} for {q.dtype}"
        )
    if q.stride()[1:] != (head_dim, 1):
        q = q.contiguous()
    partial_out = torch.empty((tasks.capacity.task_rows, num_q, head_dim), device=q.device)
    partial_lse = torch.empty((tasks.capacity.task_rows, num_q), device=q.device)
    out = torch.empty((rows, num_q, head_dim), dtype=q.dtype, device=q.device)
    factor, cap = score_scales(scale, softcap)
    shared_prefix_partial_kernel[(min(tasks.capacity.tasks * num_kv, programs(q.device)),)](
        q, k_cache, v_cache, partial_out, partial_lse, tasks.count, tasks.tasks, tasks.rows, tasks.pages,
        tasks.row_start, row_length, factor, cap, window or 0, q.stride(0),
        HKV=num_kv, GROUP=group, D=head_dim, PAGE=tasks.page_size, WINDOW=window is not None,
        SOFTCAP=softcap is not None, PRECISION="ieee", BLOCK_M=block_m, BLOCK_D=block_d,
        BLOCK_N=tile.block_n, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    shared_prefix_merge_kernel[(rows * num_q,)](
        partial_out, partial_lse, tasks.row_ptr, tasks.row_partials, out,
        HQ=num_q, D=head_dim, BLOCK_D=block_d, BLOCK_P=MERGE_BLOCK, num_warps=2, num_stages=1,
    )  # fmt: skip
    return out
