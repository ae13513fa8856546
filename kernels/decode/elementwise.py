"""Element-wise Triton kernels of a decoder layer: norms, rotary embedding and cache write, activations.

Formulas and roundings: reference.py. Each row is read once and written once; at decode sizes all three are
bound by their launch, so they do as much as one launch can. Offsets past a row's start are 32-bit, row starts
and slots 64-bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

HEAD_BLOCK = 8  # heads of one program of the rotary kernel
GATE_BLOCK = 1024
GELU = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi): 0.5 (1 + tanh z) = sigmoid(2 z)


def norm_config(hidden: int) -> dict[str, int]:
    block = triton.next_power_of_2(hidden)
    return {"BLOCK": block, "num_warps": 4 if block <= 2048 else 8 if block <= 8192 else 16}


def rope_config(head_dim: int, num_q: int, full_width: bool) -> dict[str, int]:
    heads = triton.next_power_of_2(num_q) if full_width else min(HEAD_BLOCK, triton.next_power_of_2(num_q))
    block_d = triton.next_power_of_2(head_dim)
    return {"HEAD_BLOCK": heads, "BLOCK_D": block_d, "num_warps": 4 if heads * block_d <= 4096 else 8}


@triton.jit
def add_rms_norm_kernel(
    x,  # [N, H], row stride s_x
    residual,  # [N, H], row stride s_r
    weight,  # [H]
    normed,  # [N, H] out
    total,  # [N, H] out, only with a residual
    s_x,
    s_r,
    H,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BLOCK)
    m_h = o_h < H
    dtype = x.dtype.element_ty
    b_x = tl.load(x + i_n * s_x + o_h, mask=m_h, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        b_x += tl.load(residual + i_n * s_r + o_h, mask=m_h, other=0.0).to(tl.float32)
        tl.store(total + i_n * H + o_h, b_x.to(dtype), mask=m_h)
        b_x = b_x.to(dtype).to(tl.float32)
    b_y = b_x * tl.rsqrt(tl.sum(b_x * b_x, 0) / H + eps)
    b_w = tl.load(weight + o_h, mask=m_h, other=0.0).to(tl.float32)
    if PLUS_ONE:
        b_y = b_y * (1.0 + b_w)
    else:
        b_y = b_w * b_y.to(dtype).to(tl.float32)
    tl.store(normed + i_n * H + o_h, b_y.to(dtype), mask=m_h)


@triton.jit
def _norm(b_x, b_rstd, b_w, dtype: tl.constexpr, PLUS_ONE: tl.constexpr):
    b_y = b_x * b_rstd
    if PLUS_ONE:
        b_y = (b_y * (1.0 + b_w)).to(dtype)
    else:
        b_y = (b_w * b_y.to(dtype).to(tl.float32)).to(dtype)
    return b_y.to(tl.float32)


@triton.jit
def qk_norm_rope_write_kernel(
    qkv,  # [N, (HQ + 2 HKV) D], row stride s_n
    q_norm,  # [D] or [HQ D]
    k_norm,  # [D] or [HKV D]
    cos,  # [P, ROT]
    sin,  # [P, ROT]
    positions,  # [N]
    slots,  # [N]
    k_cache,  # [S, HKV, D] out
    v_cache,  # [S, HKV, D] out
    q_out,  # [N, HQ, D] out
    s_n,
    eps,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    ROT: tl.constexpr,
    HAS_NORM: tl.constexpr,
    FULL_WIDTH: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: HEAD_BLOCK heads of q, of k or of v of one token."""
    Q_BLOCKS: tl.constexpr = (HQ + HEAD_BLOCK - 1) // HEAD_BLOCK
    KV_BLOCKS: tl.constexpr = (HKV + HEAD_BLOCK - 1) // HEAD_BLOCK
    i_n = (tl.program_id(0) // (Q_BLOCKS + 2 * KV_BLOCKS)).to(tl.int64)
    i_b = tl.program_id(0) % (Q_BLOCKS + 2 * KV_BLOCKS)
    is_q = i_b < Q_BLOCKS
    is_v = i_b >= Q_BLOCKS + KV_BLOCKS
    dtype = qkv.dtype.element_ty
    i_slot = tl.load(slots + i_n)
    heads = tl.where(is_q, HQ, HKV)
    o_h = tl.where(is_q, i_b, (i_b - Q_BLOCKS) % KV_BLOCKS) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)[:, None]
    first = tl.where(is_q, 0, tl.where(is_v, HQ + HKV, HQ))  # head of the row at which q, k or v begins
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_x = (o_h < heads) & (o_d < D)
    row = qkv + i_n * s_n
    b_raw = tl.load(row + (first + o_h) * D + o_d, mask=m_x, other=0.0)
    if is_v:
        if i_slot >= 0:
            tl.store(v_cache + i_slot * (HKV * D) + o_h * D + o_d, b_raw, mask=m_x)
    else:
        # The other half of the pair that turns together; a dimension that does not turn is its own.
        o_p = tl.where(o_d < ROT // 2, o_d + ROT // 2, tl.where(o_d < ROT, o_d - ROT // 2, o_d))
        b_x = b_raw.to(tl.float32)
        b_p = tl.load(row + (first + o_h) * D + o_p, mask=m_x, other=0.0).to(tl.float32)
        if HAS_NORM:
            o_w = o_h * 0
            if FULL_WIDTH:
                o_w = o_h * D
                b_rstd = tl.rsqrt(tl.sum(tl.sum(b_x * b_x, 1), 0) / (heads * D) + eps)
            else:
                b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)[:, None]
            if is_q:
                b_w = tl.load(q_norm + o_w + o_d, mask=m_x, other=0.0).to(tl.float32)
                b_wp = tl.load(q_norm + o_w + o_p, mask=m_x, other=0.0).to(tl.float32)
            else:
                b_w = tl.load(k_norm + o_w + o_d, mask=m_x, other=0.0).to(tl.float32)
                b_wp = tl.load(k_norm + o_w + o_p, mask=m_x, other=0.0).to(tl.float32)
            b_x = _norm(b_x, b_rstd, b_w, dtype, PLUS_ONE)
            b_p = _norm(b_p, b_rstd, b_wp, dtype, PLUS_ONE)
        i_pos = tl.load(positions + i_n).to(tl.int64)
        b_cos = tl.load(cos + i_pos * ROT + o_d, mask=o_d < ROT, other=1.0).to(tl.float32)
        b_sin = tl.load(sin + i_pos * ROT + o_d, mask=o_d < ROT, other=0.0).to(tl.float32)
        b_sin = tl.where(o_d < ROT // 2, -b_sin, b_sin)
        if cos.dtype.element_ty == dtype:
            b_o = (b_x * b_cos).to(dtype).to(tl.float32) + (b_p * b_sin).to(dtype).to(tl.float32)
        else:
            b_o = b_x * b_cos + b_p * b_sin
        if is_q:
            tl.store(q_out + i_n * (HQ * D) + o_h * D + o_d, b_o.to(dtype), mask=m_x)
        elif i_slot >= 0:
            tl.store(k_cache + i_slot * (HKV * D) + o_h * D + o_d, b_o.to(dtype), mask=m_x)


@triton.jit
def gated_kernel(
    gate_up,  # [N, 2F], row stride s_n
    out,  # [N, F] out
    s_n,
    F,
    IS_GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(F, BLOCK)
    i_n = (tl.program_id(0) // blocks).to(tl.int64)
    o_f = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    m_f = o_f < F
    dtype = gate_up.dtype.element_ty
    b_gate = tl.load(gate_up + i_n * s_n + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_up = tl.load(gate_up + i_n * s_n + F + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_z = b_gate
    if IS_GELU:
        b_z = GELU * (b_gate + 0.044715 * b_gate * b_gate * b_gate)
    b_act = (b_gate / (1.0 + tl.exp(-b_z))).to(dtype).to(tl.float32)
    tl.store(out + i_n * F + o_f, (b_act * b_up).to(dtype), mask=m_f)


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, plus_one: bool
) -> tuple[Tensor, Tensor]:
    x = _unit_rows(x)
    rows, hidden = x.shape
    normed = torch.empty((rows, hidden), dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(normed)
    other = x if residual is None else _unit_rows(residual)
    if rows:
        add_rms_norm_kernel[(rows,)](
            x, other, weight, normed, total, x.stride(0), other.stride(0), hidden, eps,
            HAS_RESIDUAL=residual is not None, PLUS_ONE=plus_one, **norm_config(hidden),
        )  # fmt: skip
    return normed, total


def qk_norm_rope_write(
    qkv, q_norm, k_norm, cos, sin, positions, slots, k_cache, v_cache, eps: float, heads, plus_one: bool
) -> Tensor:
    num_q, num_kv = heads
    head_dim = k_cache.shape[-1]
    full_width = q_norm is not None and q_norm.numel() != head_dim
    config = rope_config(head_dim, num_q, full_width)
    qkv = _unit_rows(qkv)
    q = torch.empty((len(qkv), num_q, head_dim), dtype=qkv.dtype, device=qkv.device)
    block = config["HEAD_BLOCK"]
    programs = len(qkv) * (triton.cdiv(num_q, block) + 2 * triton.cdiv(num_kv, block))
    if programs:
        qk_norm_rope_write_kernel[(programs,)](
            qkv, q_norm, k_norm, cos.contiguous(), sin.contiguous(), positions, slots, k_cache, v_cache, q,
            qkv.stride(0), eps, HQ=num_q, HKV=num_kv, D=head_dim, ROT=cos.shape[-1],
            HAS_NORM=q_norm is not None, FULL_WIDTH=full_width, PLUS_ONE=plus_one, **config,
        )  # fmt: skip
    return q


def gated(gate_up: Tensor, activation: str) -> Tensor:
    gate_up = _unit_rows(gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        gated_kernel[(rows * triton.cdiv(width, GATE_BLOCK),)](
            gate_up,
            out,
            gate_up.stride(0),
            width,
            IS_GELU=activation == "gelu",
            BLOCK=GATE_BLOCK,
            num_warps=4,
        )
    return out


def _unit_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
