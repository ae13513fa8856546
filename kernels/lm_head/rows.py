"""Row kernels over LM-head logits z [n, V] in HBM (bf16, fp16 or fp32); every sum is fp32.

    l = softcap tanh(z / softcap) / T, z with the bias added      d_j = l_j - max l       s = sum_j e^d_j
    logprob = d_target - log s          p_j = e^d_j / s           entropy = log s - sum_j e^d_j d_j / s

* `logits_rows_stats_kernel`   one read: logprob, entropy and the normalizer (max l, log s) of a row.
* `logits_rows_grad_kernel`    one read, one write: z of a vocabulary block overwritten by dL/dz, from saved
  normalizers.
* `sum_rows_kernel`            dX[t] = sum of dY[r] over the loss rows r with row_index[r] = t. One program a
  (t, column tile) walks its rows in a fixed order: the sum is fp32 and bitwise repeatable, without atomics.
* `scale_kernel`               x *= g in place, g a device scalar; does nothing where g is 1, which the host
  need not know.

    dL/dz_j = (dL/dlogprob (1[j = target] - p_j) - dL/dentropy p_j (log p_j + entropy)) (1 - tanh(..)^2) / T

A tile is [BLOCK, 8] and is reduced over its last axis only, so each lane keeps a running (max, s, sum e^d d)
of its own and the loop has neither shuffles nor barriers; the lanes meet once, after the loop. The max is
kept apart from log s because their sum, rounded to fp32, costs three digits at logits of -1e4. Offsets are
int64. The temperature is one value a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_H = 1024
BLOCK_SCALE = 4096
WIDTH = tl.constexpr(8)  # 16 bytes of bf16 a lane
FLOOR = tl.constexpr(-1e30)  # below every logit, finite: -inf - -inf would be NaN in lanes that saw nothing
TINY = tl.constexpr(-1000.0)  # e^TINY = 0, and 0 * TINY = 0 where 0 * -inf is NaN


@triton.jit
def load_logits(
    row, bias, o_v, V, softcap, scale, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, MASK: tl.constexpr
):
    """l of one tile, -inf past V, and tanh(z / softcap) (0 without a cap)."""
    if MASK:
        z = tl.load(row + o_v, mask=o_v < V, other=0.0).to(tl.float32)
    else:
        z = tl.load(row + o_v).to(tl.float32)
    if HAS_BIAS:
        if MASK:
            z += tl.load(bias + o_v, mask=o_v < V, other=0.0).to(tl.float32)
        else:
            z += tl.load(bias + o_v).to(tl.float32)
    tanh_z = z * 0.0
    if HAS_CAP:
        tanh_z = 2.0 / (1.0 + tl.exp(-2.0 * (z / softcap))) - 1.0  # tanh; exp overflow gives exactly -1
        z = tl.where(z == float("-inf"), z, tanh_z * softcap)  # a logit taken out stays out
    l = z * scale
    if MASK:
        l = tl.where(o_v < V, l, float("-inf"))
    return l, tanh_z


@triton.jit
def add_tile(l, m, s, u):
    """One more tile in each lane's max, sum e^d and sum e^d d."""
    m_new = tl.maximum(m, tl.max(l, 1))
    d = l - m_new[:, None]
    e = tl.exp(d)
    shift = m - m_new
    keep = tl.exp(shift)
    u = keep * (u + s * shift) + tl.sum(e * tl.maximum(d, TINY), 1)
    s = keep * s + tl.sum(e, 1)
    return m_new, s, u


@triton.jit
def row_statistics(
    row,
    bias,
    target,
    V,
    softcap,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """logprob, entropy, max l, log s of one row; NaN log-prob for a target outside [0, V)."""
    o_tile = tl.arange(0, BLOCK)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (target >= 0) & (target < V)
    # Read before anything may overwrite the row: the reductions below hold the barriers that order the two.
    z_target = tl.load(row + target, mask=inside, other=float("nan")).to(tl.float32)
    if HAS_BIAS:
        z_target += tl.load(bias + target, mask=inside, other=0.0).to(tl.float32)
    if HAS_CAP:
        z_target = softcap * (2.0 / (1.0 + tl.exp(-2.0 * (z_target / softcap))) - 1.0)

    m = tl.full([BLOCK], FLOOR, tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    u = tl.zeros([BLOCK], tl.float32)
    whole = V // (BLOCK * WIDTH) * (BLOCK * WIDTH)
    for i_v in range(0, whole, BLOCK * WIDTH):
        l, _ = load_logits(row, bias, i_v + o_tile, V, softcap, scale, HAS_BIAS, HAS_CAP, False)
        m, s, u = add_tile(l, m, s, u)
    if whole < V:
        l, _ = load_logits(row, bias, whole + o_tile, V, softcap, scale, HAS_BIAS, HAS_CAP, True)
        m, s, u = add_tile(l, m, s, u)

    top = tl.max(m, 0)
    shift = m - top
    keep = tl.exp(shift)
    total = tl.sum(keep * s, 0)
    moment = tl.sum(keep * (u + s * tl.maximum(shift, FLOOR)), 0)
    log_sum = tl.log(total)
    logprob = (z_target * scale - top) - log_sum
    return logprob, log_sum - moment / total, top, log_sum


@triton.jit
def gradient_tile(
    l,
    tanh_z,
    o_v,
    target,
    top,
    log_sum,
    entropy,
    g_logprob,
    g_entropy,
    scale,
    HAS_CAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    """dL/dz of one tile."""
    logp = (l - top) - log_sum
    p = tl.exp(logp)
    if HAS_ENTROPY:
        grad = -p * (g_logprob + g_entropy * (tl.maximum(logp, TINY) + entropy))
    else:
        grad = -p * g_logprob
    grad = tl.where(o_v == target, grad + g_logprob, grad) * scale
    if HAS_CAP:
        grad *= 1.0 - tanh_z * tanh_z
    return grad


def tile_config(vocab: int) -> dict[str, int]:
    """BLOCK, warps by vocabulary: 16 warps a row keep three rows in flight a multiprocessor at V = 150k."""
    if vocab >= 16384:
        return {"BLOCK": 512, "num_warps": 16, "num_stages": 1}
    return {"BLOCK": 128, "num_warps": 4, "num_stages": 1}


@triton.jit
def logits_rows_stats_kernel(
    logits,  # [n, V], row stride `stride`
    bias,  # [V]
    target,  # [n]
    scales,  # [n]: 1 / T of each row
    logprobs,  # [n] out
    entropies,  # [n] out
    normalizer,  # [2, N] out, this chunk's first column
    stride,
    stride_n,
    V,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    b_target = tl.load(target + i_n)
    scale = tl.load(scales + i_n)
    b_logprob, b_entropy, b_top, b_log_sum = row_statistics(
        logits + i_n * stride, bias, b_target, V, softcap, scale, HAS_BIAS, HAS_CAP, BLOCK
    )
    tl.store(logprobs + i_n, b_logprob)
    tl.store(entropies + i_n, b_entropy)
    tl.store(normalizer + i_n, b_top)
    tl.store(normalizer + stride_n + i_n, b_log_sum)


@triton.jit
def logits_rows_grad_kernel(
    logits,  # [n, width] in, dL/dz out; row stride `stride`; columns start .. start + width of the vocabulary
    bias,  # [width]
    target,  # [n], in the whole vocabulary
    scales,  # [n]: 1 / T of each row
    normalizer,  # [2, n]
    entropies,  # [n]
    grad_logprob,  # [n]
    grad_entropy,  # [n]
    stride,
    stride_n,
    start,
    width,
    softcap,
    HAS_ENTROPY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    row = logits + i_n * stride
    o_v = tl.program_id(1) * (BLOCK * WIDTH) + (
        tl.arange(0, BLOCK)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    )
    b_target = tl.load(target + i_n) - start
    scale = tl.load(scales + i_n)
    top = tl.load(normalizer + i_n)
    log_sum = tl.load(normalizer + stride_n + i_n)
    g_logprob = tl.load(grad_logprob + i_n)
    entropy = 0.0
    g_entropy = 0.0
    if HAS_ENTROPY:
        entropy = tl.load(entropies + i_n)
        g_entropy = tl.load(grad_entropy + i_n)
    l, tanh_z = load_logits(row, bias, o_v, width, softcap, scale, HAS_BIAS, HAS_CAP, True)
    grad = gradient_tile(
        l, tanh_z, o_v, b_target, top, log_sum, entropy, g_logprob, g_entropy, scale, HAS_CAP, HAS_ENTROPY
    )
    # A row without an incoming gradient may hold NaN logits, and 0 * NaN is NaN.
    dead = (g_logprob == 0.0) & (g_entropy == 0.0)
    grad = tl.where(dead, 0.0, grad)
    tl.store(row + o_v, grad.to(logits.dtype.element_ty), mask=o_v < width)


@triton.jit
def sum_rows_kernel(
    rows,  # [R, H]
    order,  # [R] int64: loss rows sorted by the hidden row they belong to
    starts,  # [T + 1] int64: the slice of `order` of each hidden row
    out,  # [T, H]
    H,
    BLOCK: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_h = o_h < H
    first = tl.load(starts + i_t)
    last = tl.load(starts + i_t + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(first, last):
        i_r = tl.load(order + i)
        total += tl.load(rows + i_r * H + o_h, mask=m_h, other=0.0).to(tl.float32)
    tl.store(out + i_t * H + o_h, total.to(out.dtype.element_ty), mask=m_h)


@triton.jit
def scale_kernel(x, factor, size, BLOCK: tl.constexpr):
    b_factor = tl.load(factor).to(tl.float32)
    if b_factor != 1.0:
        o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        b_x = tl.load(x + o, mask=o < size, other=0.0).to(tl.float32)
        tl.store(x + o, (b_x * b_factor).to(x.dtype.element_ty), mask=o < size)


# ---- launchers


def check_rows(logits: Tensor) -> None:
    if logits.stride(1) != 1:
        raise ValueError(f"logits must have contiguous rows, got strides {logits.stride()}")


def rows_stats(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scales: Tensor,
    logprobs: Tensor,
    entropies: Tensor,
    normalizer: Tensor,
    softcap: float | None,
) -> None:
    """Fills logprobs [n], entropies [n] and normalizer [2, n] (a column slice) from logits [n, V]."""
    check_rows(logits)
    n, vocab = logits.shape
    logits_rows_stats_kernel[(n,)](
        logits,
        logits if bias is None else bias,
        target,
        scales,
        logprobs,
        entropies,
        normalizer,
        logits.stride(0),
        normalizer.stride(0),
        vocab,
        softcap or 1.0,
        HAS_BIAS=bias is not None,
        HAS_CAP=softcap is not None,
        **tile_config(vocab),
    )


def rows_grad(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scales: Tensor,
    normalizer: Tensor,
    entropies: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    start: int,
    softcap: float | None,
) -> None:
    """Overwrites logits [n, width] of the vocabulary columns from `start` on by dL/dz."""
    check_rows(logits)
    n, width = logits.shape
    config = tile_config(width)
    logits_rows_grad_kernel[(n, triton.cdiv(width, config["BLOCK"] * WIDTH.value))](
        logits,
        logits if bias is None else bias,
        target,
        scales,
        normalizer,
        entropies,
        grad_logprob,
        grad_logprob if grad_entropy is None else grad_entropy,
        logits.stride(0),
        normalizer.stride(0),
        start,
        width,
        softcap or 1.0,
        HAS_ENTROPY=grad_entropy is not None,
        HAS_BIAS=bias is not None,
        HAS_CAP=softcap is not None,
        **config,
    )


def sum_rows(rows: Tensor, row_index: Tensor, out: Tensor) -> None:
    """out [T, H] = for each t the sum of rows [R, H] whose row_index is t; all contiguous."""
    length, width = out.shape
    if out.numel() == 0:
        return
    index, order = torch.sort(row_index, stable=True)
    starts = torch.searchsorted(index, torch.arange(length + 1, device=out.device, dtype=index.dtype))
    grid = (length, triton.cdiv(width, BLOCK_H))
    sum_rows_kernel[grid](rows, order, starts, out, width, BLOCK=BLOCK_H, num_warps=4, num_stages=2)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """x *= factor [] in place, without asking the device what factor is."""
    if x.numel():
        scale_kernel[(triton.cdiv(x.numel(), BLOCK_SCALE),)](
            x, factor, x.numel(), BLOCK=BLOCK_SCALE, num_warps=8
        )
    return x
