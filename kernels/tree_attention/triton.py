"""Tree attention in Triton.

    S = scale * Q K^T     P = softmax(S over the ancestors j of i)     O = P V     lse_i = log sum_j exp S_ij
    dV = P^T dO     dP = dO V^T     dS = P * (dP - delta + dlse)     dQ = scale dS K     dK = scale dS^T Q
    j is an ancestor of i (or i itself)  iff  j <= i < end[j];  delta_i = sum_d O_id dO_id

Forward and dQ: one program a query tile and head, walking the tile's list of key tiles (TileList). dK/dV: one
program a key tile and key/value head; the queries that see a key tile are one interval of the pack, so it
loops over that, for each query head of the group, and writes its gradients once: no atomics, bitwise
repeatable, K/V never repeated. Tiles that every query sees whole run in a loop of their own, without a mask.
Saved for the backward: q, k, v, out and lse in fp32.

Shapes: q, out [T, Hq, D]; k, v [T, Hkv, D]; lse, delta [Hq, T] fp32; end, depth [T] int32. i_: program index,
o_: offsets, m_: masks, b_: blocks, s_: strides in elements. M are queries, N keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pact_fast.kernels.tree_attention.tiles import Tile, TilePlan, Tiles, choose_tiles

LOG2E = 1.4426950408889634


@triton.jit
def _rows(
    p_x, i_t, s_t, T, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, MASKED: tl.constexpr
):
    """Tile i_t of one head [BLOCK_T, BLOCK_D]; zero past T (MASKED) and past D."""
    # The base is one 64-bit scalar, the offsets in the tile are 32-bit: fewer registers than 64-bit pointers.
    o_t = tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    p = p_x + i_t.to(tl.int64) * BLOCK_T * s_t + (o_t[:, None] * s_t + o_d[None, :])
    if MASKED:
        if D == BLOCK_D:
            return tl.load(p, mask=o_t[:, None] < T - i_t * BLOCK_T, other=0.0)
        else:
            return tl.load(p, mask=(o_t[:, None] < T - i_t * BLOCK_T) & (o_d[None, :] < D), other=0.0)
    else:
        if D == BLOCK_D:
            return tl.load(p)
        else:
            return tl.load(p, mask=o_d[None, :] < D, other=0.0)


@triton.jit
def _store_rows(p_x, i_t, s_t, b_x, T, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr):
    o_t = tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    p = p_x + i_t.to(tl.int64) * BLOCK_T * s_t + (o_t[:, None] * s_t + o_d[None, :])
    m_x = (o_t[:, None] < T - i_t * BLOCK_T) & (o_d[None, :] < D)
    tl.store(p, b_x.to(p_x.dtype.element_ty), mask=m_x)


@triton.jit
def _fwd_tile(
    b_acc, b_max, b_sum, b_q, p_k, p_v, end, depth, i_n, o_m, b_depth, scale_log2, T, window, s_kt, s_vt,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One key tile of the online softmax, in base 2."""
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_k = _rows(p_k, i_n, s_kt, T, D, BLOCK_D, BLOCK_N, MASKED)  # [N, D]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [M, N]
    if MASKED:
        b_end = tl.load(end + o_n, mask=o_n < T, other=0)
        m_s = (o_n[None, :] <= o_m[:, None]) & (o_m[:, None] < b_end[None, :])
        if WINDOW:
            b_depth_n = tl.load(depth + o_n, mask=o_n < T, other=0)
            m_s &= b_depth[:, None] - b_depth_n[None, :] < window
        b_s = tl.where(m_s, b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
    b_p = tl.exp2(b_s * scale_log2 - b_new[:, None])
    b_alpha = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
    b_v = _rows(p_v, i_n, s_vt, T, D, BLOCK_D, BLOCK_N, MASKED)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=PRECISION)
    return b_acc, b_new, b_sum


@triton.jit
def tree_attention_fwd_kernel(
    q, k, v, out, lse, end, depth, order, ptr, split, cols, scale_log2, T, window,
    s_qt, s_qh, s_kt, s_kh, s_vt, s_vh,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_m = tl.load(order + tl.program_id(0) // HEADS)
    i_h = tl.program_id(0) % HEADS
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    p_k = k + (i_h // GROUP).to(tl.int64) * s_kh
    p_v = v + (i_h // GROUP).to(tl.int64) * s_vh
    b_q = _rows(q + i_h.to(tl.int64) * s_qh, i_m, s_qt, T, D, BLOCK_D, BLOCK_M, True)
    b_depth = o_m
    if WINDOW:
        b_depth = tl.load(depth + o_m, mask=o_m < T, other=0)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_max = tl.full(
        [BLOCK_M], -1e30, dtype=tl.float32
    )  # not -inf: exp2(-inf - -inf) is NaN on rows not yet seen
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    i_split = tl.load(split + i_m)
    for i in range(tl.load(ptr + i_m), i_split):
        b_acc, b_max, b_sum = _fwd_tile(
            b_acc, b_max, b_sum, b_q, p_k, p_v, end, depth, tl.load(cols + i), o_m, b_depth, scale_log2, T,
            window, s_kt, s_vt, D, BLOCK_D, BLOCK_N, False, WINDOW, PRECISION,
        )  # fmt: skip
    for i in range(i_split, tl.load(ptr + i_m + 1)):
        b_acc, b_max, b_sum = _fwd_tile(
            b_acc, b_max, b_sum, b_q, p_k, p_v, end, depth, tl.load(cols + i), o_m, b_depth, scale_log2, T,
            window, s_kt, s_vt, D, BLOCK_D, BLOCK_N, True, WINDOW, PRECISION,
        )  # fmt: skip
    b_sum = tl.where(o_m < T, b_sum, 1.0)
    _store_rows(out + i_h.to(tl.int64) * D, i_m, HEADS * D, b_acc / b_sum[:, None], T, D, BLOCK_D, BLOCK_M)
    b_lse = (b_max + tl.log2(b_sum)) * 0.6931471805599453
    tl.store(lse + i_h.to(tl.int64) * T + o_m, b_lse, mask=o_m < T)


@triton.jit
def tree_attention_delta_kernel(
    out, d_out, d_lse, delta, T, s_dt, s_dh,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """delta = sum_d out * d_out - d_lse, so that dS = P * (dP - delta)."""
    i_h = tl.program_id(0) % HEADS
    i_m = tl.program_id(0) // HEADS
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    b_o = _rows(out + i_h.to(tl.int64) * D, i_m, HEADS * D, T, D, BLOCK_D, BLOCK_M, True).to(tl.float32)
    b_do = _rows(d_out + i_h.to(tl.int64) * s_dh, i_m, s_dt, T, D, BLOCK_D, BLOCK_M, True).to(tl.float32)
    b_delta = tl.sum(b_o * b_do, 1)
    o_row = i_h.to(tl.int64) * T + o_m
    if HAS_DLSE:
        b_delta -= tl.load(d_lse + o_row, mask=o_m < T, other=0.0)
    tl.store(delta + o_row, b_delta, mask=o_m < T)


@triton.jit
def _dq_tile(
    b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, end, depth, i_n, o_m, b_depth, scale_log2, T, window, s_kt,
    s_vt,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_k = _rows(p_k, i_n, s_kt, T, D, BLOCK_D, BLOCK_N, MASKED)
    b_v = _rows(p_v, i_n, s_vt, T, D, BLOCK_D, BLOCK_N, MASKED)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])
    if MASKED:
        b_end = tl.load(end + o_n, mask=o_n < T, other=0)
        m_s = (o_n[None, :] <= o_m[:, None]) & (o_m[:, None] < b_end[None, :])
        if WINDOW:
            b_depth_n = tl.load(depth + o_n, mask=o_n < T, other=0)
            m_s &= b_depth[:, None] - b_depth_n[None, :] < window
        b_p = tl.where(m_s, b_p, 0.0)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit
def tree_attention_dq_kernel(
    q, k, v, d_out, lse, delta, dq, end, depth, order, ptr, split, cols, scale, scale_log2, T, window,
    s_qt, s_qh, s_kt, s_kh, s_vt, s_vh, s_dt, s_dh,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_m = tl.load(order + tl.program_id(0) // HEADS)
    i_h = tl.program_id(0) % HEADS
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    p_k = k + (i_h // GROUP).to(tl.int64) * s_kh
    p_v = v + (i_h // GROUP).to(tl.int64) * s_vh
    b_q = _rows(q + i_h.to(tl.int64) * s_qh, i_m, s_qt, T, D, BLOCK_D, BLOCK_M, True)
    b_do = _rows(d_out + i_h.to(tl.int64) * s_dh, i_m, s_dt, T, D, BLOCK_D, BLOCK_M, True)
    o_row = i_h.to(tl.int64) * T + o_m
    b_lse = tl.load(lse + o_row, mask=o_m < T, other=float("inf")) * 1.4426950408889634
    b_delta = tl.load(delta + o_row, mask=o_m < T, other=0.0)
    b_depth = o_m
    if WINDOW:
        b_depth = tl.load(depth + o_m, mask=o_m < T, other=0)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    i_split = tl.load(split + i_m)
    for i in range(tl.load(ptr + i_m), i_split):
        b_dq = _dq_tile(
            b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, end, depth, tl.load(cols + i), o_m, b_depth,
            scale_log2, T,
            window, s_kt, s_vt, D, BLOCK_D, BLOCK_N, False, WINDOW, PRECISION,
        )  # fmt: skip
    for i in range(i_split, tl.load(ptr + i_m + 1)):
        b_dq = _dq_tile(
            b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, end, depth, tl.load(cols + i), o_m, b_depth,
            scale_log2, T,
            window, s_kt, s_vt, D, BLOCK_D, BLOCK_N, True, WINDOW, PRECISION,
        )  # fmt: skip
    _store_rows(dq + i_h.to(tl.int64) * D, i_m, HEADS * D, b_dq * scale, T, D, BLOCK_D, BLOCK_M)


@triton.jit
def _dkv_tile(
    b_dk, b_dv, b_k, b_v, q, d_out, lse, delta, end, depth, i_h, i_m, i_n, scale_log2, T, window,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One query tile; scores transposed [N, M], so that P^T and dS^T are left operands from registers."""
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_row = i_h.to(tl.int64) * T + o_m
    # Where D < BLOCK_D these rows run on into the next head: K and V are 0 there, and dK, dV are not stored.
    b_q = q.load([i_m * BLOCK_M, i_h * D])
    b_do = d_out.load([i_m * BLOCK_M, i_h * D])
    if MASKED:
        b_lse = tl.load(lse + o_row, mask=o_m < T, other=float("inf")) * 1.4426950408889634
        b_delta = tl.load(delta + o_row, mask=o_m < T, other=0.0)
    else:
        b_lse = tl.load(lse + o_row) * 1.4426950408889634
        b_delta = tl.load(delta + o_row)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [N, M]
    b_p = tl.exp2(b_s * scale_log2 - b_lse[None, :])
    if MASKED:
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        b_end = tl.load(end + o_n, mask=o_n < T, other=0)
        m_s = (o_n[:, None] <= o_m[None, :]) & (o_m[None, :] < b_end[:, None])
        if WINDOW:
            b_depth_m = tl.load(depth + o_m, mask=o_m < T, other=0)
            b_depth_n = tl.load(depth + o_n, mask=o_n < T, other=0)
            m_s &= b_depth_m[None, :] - b_depth_n[:, None] < window
        b_p = tl.where(m_s, b_p, 0.0)
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[None, :])
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit
def tree_attention_dkv_kernel(
    q, k, v, d_out, lse, delta, dk, dv, end, depth, order, scale, scale_log2, T, first, window, s_kt, s_kh,
    s_vt, s_vh,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q and d_out are tensor descriptors of [T, Hq * D] in blocks [BLOCK_M, BLOCK_D]: pointers spill.
    Tiles of queries before `first` are left out."""
    i_n = tl.load(order + tl.program_id(0) // KV_HEADS)
    i_hk = tl.program_id(0) % KV_HEADS
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_k = _rows(k + i_hk.to(tl.int64) * s_kh, i_n, s_kt, T, D, BLOCK_D, BLOCK_N, True)
    b_v = _rows(v + i_hk.to(tl.int64) * s_vh, i_n, s_vt, T, D, BLOCK_D, BLOCK_N, True)
    b_end = tl.load(end + o_n, mask=o_n < T, other=0)
    # Query tiles [first, last) see this tile; all keys are visible to all queries of [full, full_end).
    i_first = tl.maximum(i_n * BLOCK_N, first) // BLOCK_M
    i_last = tl.maximum(tl.cdiv(tl.max(b_end, 0), BLOCK_M), i_first)
    i_full = tl.minimum(tl.maximum(tl.cdiv(i_n * BLOCK_N + BLOCK_N - 1, BLOCK_M), i_first), i_last)
    i_full_end = i_full
    if not WINDOW:
        i_full_end = tl.maximum(i_full, tl.min(b_end, 0) // BLOCK_M)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    # Heads of the group and query tiles in one flat loop: nested loops spill.
    n_full = i_full_end - i_full
    for i in range(GROUP * n_full):
        b_dk, b_dv = _dkv_tile(
            b_dk, b_dv, b_k, b_v, q, d_out, lse, delta, end, depth, i_hk * GROUP + i // n_full,
            i_full + i % n_full, i_n, scale_log2, T, window, D, BLOCK_M, BLOCK_N, False, WINDOW, PRECISION,
        )  # fmt: skip
    n_part = i_last - i_first - n_full
    for i in range(GROUP * n_part):
        i_m = i_first + i % n_part
        i_m = tl.where(i_m < i_full, i_m, i_m + n_full)
        b_dk, b_dv = _dkv_tile(
            b_dk, b_dv, b_k, b_v, q, d_out, lse, delta, end, depth, i_hk * GROUP + i // n_part, i_m,
            i_n, scale_log2, T, window, D, BLOCK_M, BLOCK_N, True, WINDOW, PRECISION,
        )  # fmt: skip
    _store_rows(dk + i_hk.to(tl.int64) * D, i_n, KV_HEADS * D, b_dk * scale, T, D, BLOCK_D, BLOCK_N)
    _store_rows(dv + i_hk.to(tl.int64) * D, i_n, KV_HEADS * D, b_dv, T, D, BLOCK_D, BLOCK_N)


def _block_d(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _precision(dtype: torch.dtype) -> str:
    # 16-bit inputs ignore it; an fp32 dot defaults to tf32.
    return "ieee" if dtype == torch.float32 else "tf32"


def _heads_dense(x: Tensor) -> Tensor:
    """x [T, heads, D] such that it can be described as [T, heads * D] with rows on 16 bytes."""
    dense = x.stride(2) == 1 and x.stride(1) == x.shape[2] and x.stride(0) * x.element_size() % 16 == 0
    return x if dense and x.data_ptr() % 16 == 0 else x.contiguous()


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(x, [x.shape[0], x.shape[1] * x.shape[2]], [x.stride(0), 1], block)


@torch.library.custom_op("pact_fast::tree_attention", mutates_args=())
def tree_attention_op(
    q: Tensor, k: Tensor, v: Tensor, end: Tensor, depth: Tensor, lists: list[Tensor], tiles: list[int],
    scale: float, window: int, first: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [T, Hq, D], lse [Hq, T]. `lists`: of the forward, of dQ, and the key order; window 0: none. Rows
    before `first` are no queries: out 0 and lse inf there, or what the tile they share with others gives."""
    tile = Tile(*tiles[:4])
    order, ptr, split, cols = lists[:4]
    heads, head_dim = q.shape[1:]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_empty(heads, q.shape[0], dtype=torch.float32)
    out[:first], lse[:, :first] = 0.0, torch.inf  # a tile of the backward may hold rows that no program wrote
    with torch.cuda.device_of(q):  # Triton launches on the current device, wherever the tensors are
        tree_attention_fwd_kernel[(order.numel() * heads,)](
            q, k, v, out, lse, end, depth, order, ptr, split, cols, scale * LOG2E, q.shape[0], window,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            HEADS=heads, GROUP=heads // k.shape[1], D=head_dim, BLOCK_D=_block_d(head_dim),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, WINDOW=window > 0, PRECISION=_precision(q.dtype),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out, lse


@tree_attention_op.register_fake
def _(q, k, v, end, depth, lists, tiles, scale, window, first):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("pact_fast::tree_attention_backward", mutates_args=())
def tree_attention_backward_op(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    end: Tensor, depth: Tensor, lists: list[Tensor], tiles: list[int], scale: float, window: int, first: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq [T, Hq, D], dk and dv [T, Hkv, D]."""
    dq_tile, dkv_tile = Tile(*tiles[4:8]), Tile(*tiles[8:])
    order, ptr, split, cols, key_order = lists[4:]
    tokens, heads, head_dim = q.shape
    q, d_out = _heads_dense(q), _heads_dense(d_out)
    delta = torch.empty_like(lse)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    block_d = _block_d(head_dim)
    shape: dict[str, int | str] = {"D": head_dim, "BLOCK_D": block_d}
    with torch.cuda.device_of(q):
        tree_attention_delta_kernel[(triton.cdiv(tokens, 64) * heads,)](
            out, d_out, lse if d_lse is None else d_lse, delta, tokens, *d_out.stride()[:2],
            HEADS=heads, BLOCK_M=64, HAS_DLSE=d_lse is not None, **shape,
        )  # fmt: skip
        shape |= {"GROUP": heads // k.shape[1], "WINDOW": window > 0, "PRECISION": _precision(q.dtype)}
        strides = (*k.stride()[:2], *v.stride()[:2])
        tree_attention_dkv_kernel[(key_order.numel() * k.shape[1],)](
            _descriptor(q, [dkv_tile.block_m, block_d]), k, v,
            _descriptor(d_out, [dkv_tile.block_m, block_d]), lse, delta, dk, dv, end, depth,
            key_order, scale, scale * LOG2E, tokens, first, window, *strides,
            KV_HEADS=k.shape[1], BLOCK_M=dkv_tile.block_m, BLOCK_N=dkv_tile.block_n,
            num_warps=dkv_tile.num_warps, num_stages=dkv_tile.num_stages, **shape,
        )  # fmt: skip
        tree_attention_dq_kernel[(order.numel() * heads,)](
            q, k, v, d_out, lse, delta, dq, end, depth, order, ptr, split, cols, scale, scale * LOG2E, tokens,
            window,
            *q.stride()[:2], *strides, *d_out.stride()[:2],
            HEADS=heads, BLOCK_M=dq_tile.block_m, BLOCK_N=dq_tile.block_n,
            num_warps=dq_tile.num_warps, num_stages=dq_tile.num_stages, **shape,
        )  # fmt: skip
    return dq, dk, dv


@tree_attention_backward_op.register_fake
def _(d_out, d_lse, q, k, v, out, lse, end, depth, lists, tiles, scale, window, first):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, end, depth, lists, tiles, scale, window, first = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, end, depth, *output, *lists)
    ctx.rest = tiles, scale, window, first


def _backward(ctx, d_out, d_lse):
    q, k, v, end, depth, out, lse, *lists = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(out)
    if d_lse is not None:
        d_lse = d_lse.contiguous()
    grads = tree_attention_backward_op(d_out, d_lse, q, k, v, out, lse, end, depth, lists, *ctx.rest)
    return *grads, None, None, [None] * len(lists), None, None, None, None


tree_attention_op.register_autograd(_backward, setup_context=_setup_context)


def _arguments(q: Tensor, k: Tensor, v: Tensor, plan: TilePlan, scale: float, tiles: Tiles | None) -> tuple:
    """q with rows for the prefix, k and v as the ops take them, and their other arguments."""
    first, head_dim = plan.first_query, q.shape[2]
    if first:
        q = torch.cat((q.new_zeros(first, *q.shape[1:]), q))  # rows of tiles that no program visits
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
    tiles = tiles or choose_tiles(head_dim, q.dtype, capability, plan.window is not None)
    lists = [*plan.lists(tiles.fwd), *plan.lists(tiles.dq), plan.key_order(tiles.dkv)]
    flat = [size for tile in tiles for size in tile]
    return (q, k, v), (plan.end, plan.depth, lists, flat, scale, plan.window or 0, first)


def forward(q: Tensor, k: Tensor, v: Tensor, plan: TilePlan, scale: float) -> tuple[Tensor, Tensor]:
    """out [T, Hq, D] and lse [Hq, T] without an autograd graph; rows of the prefix are not in them."""
    qkv, rest = _arguments(q, k, v, plan, scale, None)
    out, lse = tree_attention_op(*qkv, *rest)
    return out[plan.first_query :], lse[:, plan.first_query :]


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: TilePlan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from what `forward` gave."""
    first = plan.first_query
    qkv, rest = _arguments(q, k, v, plan, scale, None)
    if first:
        out, d_out = (torch.cat((x.new_zeros(first, *x.shape[1:]), x)) for x in (out, d_out))
        lse = torch.cat((lse.new_full((lse.shape[0], first), torch.inf), lse), 1)
    gradients = tree_attention_backward_op(d_out, None, *qkv, out.contiguous(), lse.contiguous(), *rest)
    return gradients[0][first:], gradients[1], gradients[2]


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: TilePlan, *, scale: float | None = None, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """out [T, Hq, D] and lse [T, Hq] fp32, both differentiable. `tiles`: for tests; None: `choose_tiles`.

    ValueError for a head_dim that is not a multiple of 16 up to 256; TypeError for dtypes other than bf16,
    fp16 and fp32.
    """
    head_dim, first = q.shape[2], plan.first_query
    if head_dim % 16 or not 16 <= head_dim <= 256:
        raise ValueError(
            f'head_dim = {head_dim}: impl="triton" takes multiples of 16 up to 256; use impl="torch"'
        )
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f'q is {q.dtype}: impl="triton" takes bfloat16, float16 or float32; use impl="torch"')
    qkv, rest = _arguments(q, k, v, plan, head_dim**-0.5 if scale is None else scale, tiles)
    out, lse = tree_attention_op(*qkv, *rest)
    return out[first:], lse.T[first:]
