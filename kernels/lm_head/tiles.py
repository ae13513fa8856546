"""Device functions of the row kernels (formulas: rows.py): tiles [BLOCK, 8], lane states [BLOCK]."""

import triton
import triton.language as tl

from pact_fast.kernels.lm_head.reference import MAX_LOG_RATIO

WIDTH = tl.constexpr(8)  # 16 bytes of bf16 a lane
FLOOR = tl.constexpr(-1e30)  # below every logit, finite: -inf - -inf would be NaN in lanes that saw nothing
TINY = tl.constexpr(-1000.0)  # e^TINY = 0, and 0 * TINY = 0 where 0 * -inf is NaN
RATIO_CAP = tl.constexpr(MAX_LOG_RATIO)


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
        z = tanh_z * softcap
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


@triton.jit
def policy_terms(
    logprob,
    weight,
    advantage,
    old,
    ref,
    epsilon_low,
    epsilon_high,
    dual_clip,
    beta,
    HAS_OLD: tl.constexpr,
    HAS_DUAL: tl.constexpr,
    HAS_KL: tl.constexpr,
):
    """policy loss, kl, clipped (0 or 1) and d(policy + beta kl)/dlogprob of a row, before its weight."""
    ratio = 1.0
    if HAS_OLD:
        log_ratio = logprob - old
        ratio = tl.exp(tl.where(log_ratio > RATIO_CAP, RATIO_CAP, log_ratio))  # where, not min: NaN stays NaN
    high = 1.0 + epsilon_high
    low = 1.0 - epsilon_low
    bounded = tl.where(ratio > high, high, tl.where(ratio < low, low, ratio))
    raw = ratio * advantage
    objective = tl.where(bounded * advantage < raw, bounded * advantage, raw)
    clipped = ((advantage > 0) & (ratio > high)) | ((advantage < 0) & (ratio < low))
    if HAS_DUAL:
        dual = (advantage < 0) & (objective < dual_clip * advantage)
        objective = tl.where(dual, dual_clip * advantage, objective)
        clipped = clipped | dual
    slope = tl.where(clipped, 0.0, -raw)
    kl = objective * 0.0
    if HAS_KL:
        growth = tl.exp(ref - logprob)
        kl = growth - (ref - logprob) - 1.0
        slope += beta * (1.0 - growth)
    return -objective, kl, tl.where(clipped, 1.0, 0.0), slope
