"""Row kernels over LM-head logits z [n, V] in HBM (bf16, fp16 or fp32); every sum is fp32.

    l = softcap tanh(z / softcap) / T, z with the bias added      d_j = l_j - max l       s = sum_j e^d_j
    logprob = d_target - log s          p_j = e^d_j / s           entropy = log s - sum_j e^d_j d_j / s

* `logits_rows_stats_kernel`   one read: logprob, entropy and the normalizer (max l, log s) of a row.
* `logits_rows_loss_kernel`    two reads, one write: as above, then the row's loss terms, dL/dlogprob and
  dL/dentropy (formulas: reference.py), then z overwritten by dL/dz.
* `logits_rows_grad_kernel`    one read, one write: z of a vocabulary block overwritten by dL/dz, from saved
  normalizers.

    dL/dz_j = (dL/dlogprob (1[j = target] - p_j) - dL/dentropy p_j (log p_j + entropy)) (1 - tanh(..)^2) / T

A tile is [BLOCK, 8] and is reduced over its last axis only, so each lane keeps a running (max, s, sum e^d d)
of its own and the loop has neither shuffles nor barriers; the lanes meet once, after the loop. The max is
kept apart from log s because their sum, rounded to fp32, costs three digits at logits of -1e4. Offsets are
int64.
"""

import triton
import triton.language as tl
from torch import Tensor

from pact_fast.kernels.lm_head.reference import PolicyLossConfig, RowTerms
from pact_fast.kernels.lm_head.tiles import WIDTH, gradient_tile, load_logits, policy_terms, row_statistics


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
    logprobs,  # [n] out
    entropies,  # [n] out
    normalizer,  # [2, N] out, this chunk's first column
    stride,
    stride_n,
    V,
    softcap,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    b_target = tl.load(target + i_n)
    b_logprob, b_entropy, b_top, b_log_sum = row_statistics(
        logits + i_n * stride, bias, b_target, V, softcap, scale, HAS_BIAS, HAS_CAP, BLOCK
    )
    tl.store(logprobs + i_n, b_logprob)
    tl.store(entropies + i_n, b_entropy)
    tl.store(normalizer + i_n, b_top)
    tl.store(normalizer + stride_n + i_n, b_log_sum)


@triton.jit
def logits_rows_loss_kernel(
    logits,  # [n, V] in, dL/dz out; row stride `stride`
    bias,  # [V]
    target,  # [n]
    policy_weight,  # [n]
    advantages,  # [n]
    old_logprobs,  # [n]
    ref_logprobs,  # [n]
    sft_weight,  # [n]
    logprobs,  # [n] out
    parts,  # [5, R] out: policy, sft, kl, entropy, clipped of each row, this chunk's first column
    stride,
    stride_r,
    V,
    epsilon_low,
    epsilon_high,
    dual_clip,
    beta,
    entropy_coef,
    softcap,
    scale,
    HAS_POLICY: tl.constexpr,
    HAS_SFT: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_DUAL: tl.constexpr,
    HAS_KL: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64)
    row = logits + i_r * stride
    o_tile = tl.arange(0, BLOCK)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    b_policy_weight = 0.0
    b_sft_weight = 0.0
    if HAS_POLICY:
        b_policy_weight = tl.load(policy_weight + i_r)
    if HAS_SFT:
        b_sft_weight = tl.load(sft_weight + i_r)

    if (b_policy_weight != 0.0) | (b_sft_weight != 0.0):
        b_target = tl.load(target + i_r)
        logprob, entropy, top, log_sum = row_statistics(
            row, bias, b_target, V, softcap, scale, HAS_BIAS, HAS_CAP, BLOCK
        )
        b_policy = 0.0
        b_kl = 0.0
        b_clipped = 0.0
        g_logprob = -b_sft_weight
        g_entropy = 0.0
        if HAS_POLICY:
            b_advantage = tl.load(advantages + i_r)
            b_old = 0.0
            b_ref = 0.0
            if HAS_OLD:
                b_old = tl.load(old_logprobs + i_r)
            if HAS_KL:
                b_ref = tl.load(ref_logprobs + i_r)
            p_loss, p_kl, p_clipped, slope = policy_terms(
                logprob,
                b_policy_weight,
                b_advantage,
                b_old,
                b_ref,
                epsilon_low,
                epsilon_high,
                dual_clip,
                beta,
                HAS_OLD,
                HAS_DUAL,
                HAS_KL,
            )
            on = b_policy_weight != 0.0  # selects rather than multiplies: an SFT row may hold NaN here
            b_policy = tl.where(on, b_policy_weight * p_loss, 0.0)
            b_kl = tl.where(on, b_policy_weight * p_kl, 0.0)
            b_clipped = tl.where(on, p_clipped, 0.0)
            g_logprob += tl.where(on, b_policy_weight * slope, 0.0)
            if HAS_ENTROPY:
                g_entropy = -entropy_coef * b_policy_weight
        tl.store(logprobs + i_r, logprob)
        tl.store(parts + i_r, b_policy)
        tl.store(parts + stride_r + i_r, -b_sft_weight * logprob)
        tl.store(parts + 2 * stride_r + i_r, b_kl)
        tl.store(parts + 3 * stride_r + i_r, b_policy_weight * entropy)
        tl.store(parts + 4 * stride_r + i_r, b_clipped)
        if WRITE_GRAD:
            tl.debug_barrier()  # every warp holds the target's logit before the first one overwrites it
            whole = V // (BLOCK * WIDTH) * (BLOCK * WIDTH)
            for i_v in range(0, whole, BLOCK * WIDTH):
                o_v = i_v + o_tile
                l, tanh_z = load_logits(row, bias, o_v, V, softcap, scale, HAS_BIAS, HAS_CAP, False)
                grad = gradient_tile(
                    l,
                    tanh_z,
                    o_v,
                    b_target,
                    top,
                    log_sum,
                    entropy,
                    g_logprob,
                    g_entropy,
                    scale,
                    HAS_CAP,
                    HAS_ENTROPY,
                )
                tl.store(row + o_v, grad.to(logits.dtype.element_ty))
            if whole < V:
                o_v = whole + o_tile
                l, tanh_z = load_logits(row, bias, o_v, V, softcap, scale, HAS_BIAS, HAS_CAP, True)
                grad = gradient_tile(
                    l,
                    tanh_z,
                    o_v,
                    b_target,
                    top,
                    log_sum,
                    entropy,
                    g_logprob,
                    g_entropy,
                    scale,
                    HAS_CAP,
                    HAS_ENTROPY,
                )
                tl.store(row + o_v, grad.to(logits.dtype.element_ty), mask=o_v < V)
    else:
        tl.store(logprobs + i_r, 0.0)
        for i_part in range(5):
            tl.store(parts + i_part * stride_r + i_r, 0.0)
        if WRITE_GRAD:
            for i_v in range(0, V, BLOCK * WIDTH):
                o_v = i_v + o_tile
                tl.store(row + o_v, tl.zeros([BLOCK, WIDTH], logits.dtype.element_ty), mask=o_v < V)


@triton.jit
def logits_rows_grad_kernel(
    logits,  # [n, width] in, dL/dz out; row stride `stride`; columns start .. start + width of the vocabulary
    bias,  # [width]
    target,  # [n], in the whole vocabulary
    normalizer,  # [2, n]
    entropies,  # [n]
    grad_logprob,  # [n]
    grad_entropy,  # [n]
    stride,
    stride_n,
    start,
    width,
    softcap,
    scale,
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


# ---- launchers


def check_rows(logits: Tensor) -> None:
    if logits.stride(1) != 1:
        raise ValueError(f"logits must have contiguous rows, got strides {logits.stride()}")


def rows_stats(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    logprobs: Tensor,
    entropies: Tensor,
    normalizer: Tensor,
    temperature: float,
    softcap: float | None,
) -> None:
    """Fills logprobs [n], entropies [n] and normalizer [2, n] (a column slice) from logits [n, V]."""
    check_rows(logits)
    n, vocab = logits.shape
    logits_rows_stats_kernel[(n,)](
        logits,
        logits if bias is None else bias,
        target,
        logprobs,
        entropies,
        normalizer,
        logits.stride(0),
        normalizer.stride(0),
        vocab,
        softcap or 1.0,
        1.0 / temperature,
        HAS_BIAS=bias is not None,
        HAS_CAP=softcap is not None,
        **tile_config(vocab),
    )


def rows_loss(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    terms: RowTerms,
    config: PolicyLossConfig,
    logprobs: Tensor,
    parts: Tensor,
    temperature: float,
    softcap: float | None,
    write_grad: bool,
) -> None:
    """Fills logprobs [n], parts [5, n] (a column slice); overwrites logits [n, V] by dL/dz if write_grad."""
    check_rows(logits)
    n, vocab = logits.shape
    unused = logprobs  # a pointer the kernel never reads
    logits_rows_loss_kernel[(n,)](
        logits,
        unused if bias is None else bias,
        target,
        *(unused if value is None else value for value in terms),
        logprobs,
        parts,
        logits.stride(0),
        parts.stride(0),
        vocab,
        config.epsilon_low,
        config.epsilon_high,
        config.dual_clip or 0.0,
        config.beta,
        config.entropy_coef,
        softcap or 1.0,
        1.0 / temperature,
        HAS_POLICY=terms.policy_weight is not None,
        HAS_SFT=terms.sft_weight is not None,
        HAS_OLD=terms.old_logprobs is not None,
        HAS_DUAL=config.dual_clip is not None,
        HAS_KL=config.beta != 0.0,
        HAS_ENTROPY=config.entropy_coef != 0.0,
        HAS_BIAS=bias is not None,
        HAS_CAP=softcap is not None,
        WRITE_GRAD=write_grad,
        **tile_config(vocab),
    )


def rows_grad(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    normalizer: Tensor,
    entropies: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    start: int,
    temperature: float,
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
        normalizer,
        entropies,
        grad_logprob,
        grad_logprob if grad_entropy is None else grad_entropy,
        logits.stride(0),
        normalizer.stride(0),
        start,
        width,
        softcap or 1.0,
        1.0 / temperature,
        HAS_ENTROPY=grad_entropy is not None,
        HAS_BIAS=bias is not None,
        HAS_CAP=softcap is not None,
        **config,
    )
