"""Sampling with log-probability in one read of the logits: two Triton kernels.

    chunk c of row n:  best score and its token,  max l,  sum e^(l - max l)      l = logits / T
    row n:             the best of its chunks,  logprob = (l_token - max) - log sum

The score is l - log E_j with E_j from the counter-based hash of reference.py; greedy rows score l. Tiles are
[BLOCK, 8] and every lane keeps a best of its own, so the loop has neither shuffles nor barriers. Chunks
depend on V alone: a row's log-prob has the same bits whoever shares the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pact_fast.kernels.decode import reference

CHUNK = 16384  # tokens of a program
WIDTH = tl.constexpr(8)
PHI, MIX1, MIX2 = (tl.constexpr(x) for x in (reference.PHI, reference.MIX1, reference.MIX2))
C0, C1, C2 = (tl.constexpr(x) for x in (reference.C0, reference.C1, reference.C2))
TO_UNIT = tl.constexpr(reference.TO_UNIT)
SMALL_U = tl.constexpr(2.0**-5)  # below it -log(1 - u) is a series, exact to 2e-7 of itself


def chunk_config(vocab: int) -> dict[str, int]:
    if vocab >= 4096:
        return {"CHUNK": CHUNK, "BLOCK": 256, "num_warps": 8}
    return {"CHUNK": max(512, triton.next_power_of_2(vocab)), "BLOCK": 64, "num_warps": 2}


@triton.jit
def _mix64(x):
    x = (x ^ (x >> 30)) * tl.full((), MIX1, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full((), MIX2, tl.uint64)
    return x ^ (x >> 31)


@triton.jit
def _log_exponential(token, k0, k1):
    """log E_j of tokens [..] int32 under a row's key, two uint32."""
    x = token.to(tl.uint32) * tl.full((), C0, tl.uint32) + k0
    x = (x ^ (x >> 16)) * tl.full((), C1, tl.uint32)
    x = (x ^ (x >> 15) ^ k1) * tl.full((), C2, tl.uint32)
    x = (x ^ (x >> 15)) & 0x7FFFFFFF
    u = (x.to(tl.int32).to(tl.float32) + 0.5) * TO_UNIT
    series = u * (1.0 + u * (0.5 + u * (0.3333333333333333 + u * 0.25)))
    return tl.log(tl.where(u < SMALL_U, series, -tl.log(1.0 - u)))


@triton.jit
def sample_chunk_kernel(
    logits,  # [N, V], row stride s_n
    temperature,  # [N]
    floor,  # [N]
    seed,  # [N] int64
    position,  # [N] int64
    best_score,  # [N, chunks] fp32 out
    best_token,  # [N, chunks] int32 out; V where the chunk has no score above -inf
    top,  # [N, chunks] fp32 out
    total,  # [N, chunks] fp32 out
    s_n,
    V,
    HAS_FLOOR: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunks = tl.cdiv(V, CHUNK)
    i_n = (tl.program_id(0) // chunks).to(tl.int64)
    i_first = tl.program_id(0) % chunks * CHUNK
    b_t = tl.load(temperature + i_n)
    is_hot = b_t > 0.0
    scale = tl.where(is_hot, 1.0 / b_t, 1.0)
    key = _mix64(tl.load(seed + i_n).to(tl.uint64))
    key = _mix64(key + tl.load(position + i_n).to(tl.uint64) * tl.full((), PHI, tl.uint64))
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    b_floor = 0.0
    if HAS_FLOOR:
        b_floor = tl.load(floor + i_n)

    o_tile = tl.arange(0, BLOCK)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    b_best = tl.full([BLOCK, WIDTH], float("-inf"), tl.float32)
    b_token = tl.full([BLOCK, WIDTH], 2147483647, tl.int32)
    b_max = tl.full([BLOCK], -1e30, tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i_v in range(i_first, tl.minimum(i_first + CHUNK, V), BLOCK * WIDTH):
        o_v = i_v + o_tile
        b_z = tl.load(logits + i_n * s_n + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)
        b_l = b_z * scale
        b_score = b_l
        if is_hot:
            b_score = b_l - _log_exponential(o_v, k0, k1)
        if HAS_FLOOR:
            b_score = tl.where(b_z < b_floor, float("-inf"), b_score)
        m_new = b_score > b_best  # strict, so that the first of equals stays
        b_best = tl.where(m_new, b_score, b_best)
        b_token = tl.where(m_new, o_v, b_token)
        b_new = tl.maximum(b_max, tl.max(b_l, 1))
        b_sum = b_sum * tl.exp(b_max - b_new) + tl.sum(tl.exp(b_l - b_new[:, None]), 1)
        b_max = b_new
    i_out = tl.program_id(0)
    score = tl.max(tl.max(b_best, 1), 0)
    token = tl.where(b_best == score, b_token, 2147483647)
    tl.store(best_score + i_out, score)
    tl.store(best_token + i_out, tl.min(tl.min(token, 1), 0))
    b_top = tl.max(b_max, 0)
    tl.store(top + i_out, b_top)
    tl.store(total + i_out, tl.sum(b_sum * tl.exp(b_max - b_top), 0))


@triton.jit
def sample_row_kernel(
    logits,  # [N, V], row stride s_n
    temperature,  # [N]
    best_score,  # [N, chunks]
    best_token,
    top,
    total,
    token,  # [N] int64 out
    logprob,  # [N] fp32 out
    finite,  # [N] bool out
    s_n,
    chunks,
    BLOCK_C: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < chunks
    o_p = i_n * chunks + o_c
    b_top = tl.load(top + o_p, mask=m_c, other=-1e30)
    b_max = tl.max(b_top, 0)
    b_sum = tl.sum(tl.load(total + o_p, mask=m_c, other=0.0) * tl.exp(b_top - b_max), 0)
    b_score = tl.load(best_score + o_p, mask=m_c, other=float("-inf"))
    b_token = tl.load(best_token + o_p, mask=m_c, other=2147483647)
    i_token = tl.min(tl.where(b_score == tl.max(b_score, 0), b_token, 2147483647), 0)
    # NaN and +inf make the sum NaN, no finite logit makes it 0; and then no score counts.
    is_finite = (b_sum > 0.0) & (i_token != 2147483647)
    b_t = tl.load(temperature + i_n)
    b_z = tl.load(logits + i_n * s_n + i_token, mask=is_finite, other=0.0).to(tl.float32)
    b_l = b_z * tl.where(b_t > 0.0, 1.0 / b_t, 1.0)
    tl.store(token + i_n, tl.where(is_finite, i_token, -1).to(tl.int64))
    tl.store(logprob + i_n, tl.where(is_finite, (b_l - b_max) - tl.log(b_sum), float("nan")))
    tl.store(finite + i_n, is_finite)


def sample(
    logits: Tensor, temperature: Tensor, floor: Tensor | None, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    rows, vocab = logits.shape
    config = chunk_config(vocab)
    chunks = triton.cdiv(vocab, config["CHUNK"])
    made = torch.empty((3, rows, chunks), device=logits.device)
    best_token = torch.empty((rows, chunks), dtype=torch.int32, device=logits.device)
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprob = torch.empty(rows, device=logits.device)
    finite = torch.empty(rows, dtype=torch.bool, device=logits.device)
    if rows:
        sample_chunk_kernel[(rows * chunks,)](
            logits, temperature, temperature if floor is None else floor, seed, position, made[0], best_token,
            made[1], made[2], logits.stride(0), vocab, HAS_FLOOR=floor is not None, **config,
        )  # fmt: skip
        sample_row_kernel[(rows,)](
            logits, temperature, made[0], best_token, made[1], made[2], token, logprob, finite,
            logits.stride(0), chunks, BLOCK_C=triton.next_power_of_2(chunks), num_warps=1,
        )  # fmt: skip
    return token, logprob, finite
