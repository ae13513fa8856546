"""Divergences between pairs of rows of one LM head (or of two): a student's distribution and a teacher's.

With p = softcap(x_s W^T) / T of the student and q that of the teacher, after their softmax, and D of a row:

    reverse_kl   D = sum p (log p - log q)        dD/dl_j = p_j (log p_j - log q_j - D)
    forward_kl   D = sum q (log q - log p)        dD/dl_j = p_j - q_j
    jsd          m = beta q + (1 - beta) p        D = beta KL(q|m) + (1 - beta) KL(p|m)
                                                  dD/dl_j = (1 - beta) p_j (log p_j/m_j - KL(p|m))

The teacher has no gradient. log m/p and log m/q are made from log q - log p, and the KL sums from differences
to both maxima, so identical rows give exactly 0, and logits of -1e4 lose nothing.

`divergence_rows_kernel` reads a pair of rows of logits twice (three times for jsd, whose sum needs both
normalizers) and overwrites the student's by its gradient. With top_k the kernels of rows.py do: the k logits
that the teacher finds most likely are taken out of both rows, the statistics of what is left are the tail
bucket, k + 1 numbers a row go through the formula in torch (reference.py), and the gradient of the tail is
spread over its tokens in place.

Saved for the backward: the finished gradients, as in token_loss.py. Logits of the teacher exist for some
rows at a time; those of the student for a chunk, filled by products of the same shape, so that a row paired
with itself meets the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pact_fast.kernels.lm_head import gemm, reference
from pact_fast.kernels.lm_head.checks import require_indices, require_weights
from pact_fast.kernels.lm_head.gemm import LOW_BYTES, ChunkGradients, chunk_rows, padded_rows
from pact_fast.kernels.lm_head.reference import KINDS
from pact_fast.kernels.lm_head.rows import (
    FLOOR,
    WIDTH,
    check_rows,
    load_logits,
    rows_grad,
    rows_stats,
    tile_config,
)
from pact_fast.kernels.lm_head.token_loss import hand_out, keep_gradients

REVERSE = tl.constexpr(KINDS.index("reverse_kl"))
FORWARD = tl.constexpr(KINDS.index("forward_kl"))
JSD = tl.constexpr(KINDS.index("jsd"))


@triton.jit
def load_pair(student, teacher, o_v, V, softcap, scale_s, scale_t, HAS_CAP: tl.constexpr, MASK: tl.constexpr):
    """l of both rows and the student's tanh(z / softcap); -inf past V."""
    l_s, tanh_s = load_logits(student, student, o_v, V, softcap, scale_s, False, HAS_CAP, MASK)
    l_t, _ = load_logits(teacher, teacher, o_v, V, softcap, scale_t, False, HAS_CAP, MASK)
    return l_s, tanh_s, l_t


@triton.jit
def add_pair(l_s, l_t, m_s, s_s, m_t, s_t, c, KIND: tl.constexpr):
    """One more tile in each lane's maxima, sums e^d, and c = sum e^d (d - d of the other row)."""
    new_s = tl.maximum(m_s, tl.max(l_s, 1))
    new_t = tl.maximum(m_t, tl.max(l_t, 1))
    d_s = l_s - new_s[:, None]
    d_t = l_t - new_t[:, None]
    e_s = tl.exp(d_s)
    e_t = tl.exp(d_t)
    shift_s = m_s - new_s
    shift_t = m_t - new_t
    keep_s = tl.exp(shift_s)
    keep_t = tl.exp(shift_t)
    if KIND != JSD:
        gap = tl.maximum(d_s, FLOOR) - tl.maximum(d_t, FLOOR)
        if KIND == REVERSE:
            c = keep_s * (c + s_s * (shift_s - shift_t)) + tl.sum(e_s * gap, 1)
        else:
            c = keep_t * (c + s_t * (shift_t - shift_s)) - tl.sum(e_t * gap, 1)
    s_s = keep_s * s_s + tl.sum(e_s, 1)
    s_t = keep_t * s_t + tl.sum(e_t, 1)
    return new_s, s_s, new_t, s_t, c


@triton.jit
def mixture(log_p, log_q, beta):
    """log p/m and log q/m of m = beta q + (1 - beta) p: exactly 0 where both are equal."""
    gap = tl.maximum(log_q, FLOOR) - tl.maximum(log_p, FLOOR)
    share = tl.where(gap > 0, 1.0 - beta, beta)
    low = tl.log(1.0 + share * (tl.exp(-tl.abs(gap)) - 1.0))  # log of m over the larger of p and q
    over_p = tl.where(gap > 0, low + gap, low)
    return -over_p, gap - over_p


@triton.jit
def pair_gradient(
    l_s,
    tanh_s,
    l_t,
    top_s,
    log_s,
    top_t,
    log_t,
    total,
    beta,
    scale,
    KIND: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    """dD/dz of one tile; total: D, or for jsd KL(p|m)."""
    log_p = (l_s - top_s) - log_s
    log_q = (l_t - top_t) - log_t
    p = tl.exp(log_p)
    if KIND == REVERSE:
        grad = p * (tl.maximum(log_p, FLOOR) - tl.maximum(log_q, FLOOR) - total)
    elif KIND == FORWARD:
        grad = p - tl.exp(log_q)
    else:
        p_over_m, _ = mixture(log_p, log_q, beta)
        grad = (1.0 - beta) * p * (p_over_m - total)
    grad *= scale
    if HAS_CAP:
        grad *= 1.0 - tanh_s * tanh_s
    return grad


@triton.jit
def divergence_rows_kernel(
    student,  # [n, V] logits in, gradient out; row stride `stride_s`
    teacher,  # [n, V] logits; row stride `stride_t`
    weights,  # [n]
    divergences,  # [n] out: D of each row, 0 where the weight is 0
    stride_s,
    stride_t,
    V,
    softcap,
    scale_s,  # 1 / T
    scale_t,
    beta,
    clip,  # rows of a larger D have no gradient
    KIND: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    row_s = student + i_n * stride_s
    row_t = teacher + i_n * stride_t
    o_tile = tl.arange(0, BLOCK)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    whole = V // (BLOCK * WIDTH) * (BLOCK * WIDTH)
    b_weight = tl.load(weights + i_n)
    if b_weight != 0.0:
        m_s = tl.full([BLOCK], FLOOR, tl.float32)
        m_t = tl.full([BLOCK], FLOOR, tl.float32)
        s_s = tl.zeros([BLOCK], tl.float32)
        s_t = tl.zeros([BLOCK], tl.float32)
        c = tl.zeros([BLOCK], tl.float32)
        for i_v in range(0, whole, BLOCK * WIDTH):
            l_s, _, l_t = load_pair(row_s, row_t, i_v + o_tile, V, softcap, scale_s, scale_t, HAS_CAP, False)
            m_s, s_s, m_t, s_t, c = add_pair(l_s, l_t, m_s, s_s, m_t, s_t, c, KIND)
        if whole < V:
            l_s, _, l_t = load_pair(row_s, row_t, whole + o_tile, V, softcap, scale_s, scale_t, HAS_CAP, True)
            m_s, s_s, m_t, s_t, c = add_pair(l_s, l_t, m_s, s_s, m_t, s_t, c, KIND)
        top_s = tl.max(m_s, 0)
        top_t = tl.max(m_t, 0)
        shift_s = m_s - top_s
        shift_t = m_t - top_t
        keep_s = tl.exp(shift_s)
        keep_t = tl.exp(shift_t)
        total_s = tl.sum(keep_s * s_s, 0)
        total_t = tl.sum(keep_t * s_t, 0)
        log_s = tl.log(total_s)
        log_t = tl.log(total_t)
        if KIND == REVERSE:
            moment = tl.sum(keep_s * (c + s_s * (shift_s - shift_t)), 0)
            b_divergence = moment / total_s - (log_s - log_t)
            b_total = b_divergence
        elif KIND == FORWARD:
            moment = tl.sum(keep_t * (c + s_t * (shift_t - shift_s)), 0)
            b_divergence = moment / total_t - (log_t - log_s)
            b_total = b_divergence
        else:
            kl_p = tl.zeros([BLOCK], tl.float32)
            kl_q = tl.zeros([BLOCK], tl.float32)
            for i_v in range(0, whole, BLOCK * WIDTH):
                l_s, _, l_t = load_pair(
                    row_s, row_t, i_v + o_tile, V, softcap, scale_s, scale_t, HAS_CAP, False
                )
                log_p = (l_s - top_s) - log_s
                log_q = (l_t - top_t) - log_t
                p_over_m, q_over_m = mixture(log_p, log_q, beta)
                kl_p += tl.sum(tl.exp(log_p) * p_over_m, 1)
                kl_q += tl.sum(tl.exp(log_q) * q_over_m, 1)
            if whole < V:
                l_s, _, l_t = load_pair(
                    row_s, row_t, whole + o_tile, V, softcap, scale_s, scale_t, HAS_CAP, True
                )
                log_p = (l_s - top_s) - log_s
                log_q = (l_t - top_t) - log_t
                p_over_m, q_over_m = mixture(log_p, log_q, beta)
                kl_p += tl.sum(tl.exp(log_p) * p_over_m, 1)
                kl_q += tl.sum(tl.exp(log_q) * q_over_m, 1)
            b_total = tl.sum(kl_p, 0)
            b_divergence = beta * tl.sum(kl_q, 0) + (1.0 - beta) * b_total
        tl.store(divergences + i_n, b_divergence)
        if WRITE_GRAD:
            factor = tl.where(b_divergence > clip, 0.0, b_weight * scale_s)
            for i_v in range(0, whole, BLOCK * WIDTH):
                o_v = i_v + o_tile
                l_s, tanh_s, l_t = load_pair(row_s, row_t, o_v, V, softcap, scale_s, scale_t, HAS_CAP, False)
                grad = pair_gradient(
                    l_s, tanh_s, l_t, top_s, log_s, top_t, log_t, b_total, beta, factor, KIND, HAS_CAP
                )
                tl.store(row_s + o_v, grad.to(student.dtype.element_ty))
            if whole < V:
                o_v = whole + o_tile
                l_s, tanh_s, l_t = load_pair(row_s, row_t, o_v, V, softcap, scale_s, scale_t, HAS_CAP, True)
                grad = pair_gradient(
                    l_s, tanh_s, l_t, top_s, log_s, top_t, log_t, b_total, beta, factor, KIND, HAS_CAP
                )
                tl.store(row_s + o_v, grad.to(student.dtype.element_ty), mask=o_v < V)
    else:  # its logits may be NaN
        tl.store(divergences + i_n, 0.0)
        if WRITE_GRAD:
            for i_v in range(0, V, BLOCK * WIDTH):
                o_v = i_v + o_tile
                tl.store(row_s + o_v, tl.zeros([BLOCK, WIDTH], student.dtype.element_ty), mask=o_v < V)


def divergence_rows(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    divergences: Tensor,
    pair: reference.Pair,
    write_grad: bool,
) -> None:
    """Fills divergences [n]; overwrites the student's logits [n, V] by the gradient if write_grad."""
    check_rows(student)
    check_rows(teacher)
    n, vocab = student.shape
    divergence_rows_kernel[(n,)](
        student,
        teacher,
        weights,
        divergences,
        student.stride(0),
        teacher.stride(0),
        vocab,
        pair.softcap or 1.0,
        1.0 / pair.temperature,
        1.0 / pair.teacher_temperature,
        pair.beta,
        pair.clip,
        KIND=KINDS.index(pair.kind),
        HAS_CAP=pair.softcap is not None,
        WRITE_GRAD=write_grad,
        **tile_config(vocab),
    )


def bucket_rows(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    divergences: Tensor,
    pair: reference.Pair,
    write_grad: bool,
) -> None:
    """As `divergence_rows`, over the teacher's k most likely tokens and one bucket for the rest."""
    index = teacher.topk(pair.top_k, dim=1).indices
    chosen, tails, tanh_z = [], [], None
    for logits, heat in ((teacher, pair.teacher_temperature), (student, pair.temperature)):
        z = logits.gather(1, index).float()
        if pair.softcap is not None:
            tanh_z = (z / pair.softcap).tanh()
            z = tanh_z * pair.softcap
        chosen.append(z / heat)
        logits.scatter_(1, index, float("-inf"))
        n = logits.shape[0]
        unused, tail = (logits.new_empty(2, n, dtype=torch.float32) for _ in range(2))
        scales = unused.new_full((n,), 1.0 / heat)
        nobody = torch.full((n,), -1, dtype=torch.int64, device=logits.device)
        rows_stats(logits, None, nobody, scales, unused[0], unused[1], tail, pair.softcap)
        tails.append(tail)
    log_q, log_p = (reference.bucket_logprobs(l, *tail) for l, tail in zip(chosen, tails, strict=True))
    value, grad = reference.divergence(log_p, log_q, pair.kind, pair.beta)
    on = weights != 0
    divergences.copy_(torch.where(on, value, 0.0))
    if not write_grad:
        return
    strength = torch.where(on & ~pair.clipped(value), weights, 0.0)
    grad = torch.where(strength[:, None] != 0, grad * strength[:, None], 0.0)
    # The tail's own normalizer: its gradient is spread by the probabilities inside of it.
    rest = -grad[:, -1].contiguous()
    rows_grad(student, None, nobody, scales, tails[1], value, rest, None, 0, pair.softcap)
    own = grad[:, :-1] / pair.temperature
    if tanh_z is not None:
        own = own * (1 - tanh_z.square())
    student.scatter_(1, index, own.to(student.dtype))


def fused_forward(
    hidden: Tensor,
    weight: Tensor,
    student: Tensor,
    teacher: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    row_weight: Tensor,
    pair: reference.Pair,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, reference.Grads]:
    """divergences [R], gradients of (hidden, weight, None): four GEMMs, waits for the device nowhere."""
    rows, vocab = student.shape[0], weight.shape[0]
    divergences = hidden.new_empty(rows, dtype=torch.float32)
    step = chunk_rows(rows, vocab, hidden, gemm.logits_budget(hidden))
    part = chunk_rows(step, vocab, hidden, LOW_BYTES if hidden.is_cuda else gemm.CPU_BYTES)
    grads = ChunkGradients(hidden, weight, None, rows, step, needs)
    buffer, beside = padded_rows(step, vocab, hidden), padded_rows(part, vocab, hidden)
    kernel = divergence_rows if pair.top_k >= vocab else bucket_rows
    for i in range(0, rows, step or 1):
        chunk = slice(i, min(i + step, rows))
        x = hidden.index_select(0, student[chunk])
        logits = buffer[: chunk.stop - i]
        for j in range(i, chunk.stop, part):
            piece = slice(j, min(j + part, chunk.stop))
            own, other = logits[j - i : piece.stop - i], beside[: piece.stop - j]
            torch.mm(x[j - i : piece.stop - i], weight.t(), out=own)
            torch.mm(teacher_hidden.index_select(0, teacher[piece]), teacher_weight.t(), out=other)
            kernel(own, other, row_weight[piece], divergences[piece], pair, any(needs))
        if any(needs):
            dead = (row_weight[chunk] == 0)[:, None]
            grads.add(chunk, x.masked_fill_(dead, 0), logits)  # 0 * NaN in dW
    del buffer, beside
    return divergences, grads.result(student)


@torch.library.custom_op("pact_fast::linear_divergence", mutates_args=())
def linear_divergence_op(
    hidden: Tensor,
    weight: Tensor,
    student: Tensor,
    teacher: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    row_weight: Tensor | None,
    kind: str,
    beta: float,
    top_k: int | None,
    clip: float | None,
    temperature: float,
    teacher_temperature: float,
    softcap: float | None,
    needs_hidden: bool,
    needs_weight: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss [], divergences [R], then the gradients of hidden and weight: empty where not needed."""
    require_indices("student", student, hidden.shape[0])
    theirs = hidden if teacher_hidden is None else teacher_hidden
    require_indices("teacher", teacher, theirs.shape[0])
    require_weights("row_weight", row_weight)
    bound = float("inf") if clip is None else clip
    k = weight.shape[0] if top_k is None else top_k
    pair = reference.Pair(kind, beta, k, bound, temperature, teacher_temperature, softcap)
    accumulate = reference.accumulation_dtype(hidden.dtype)
    weights = hidden.new_ones(student.shape[0], dtype=accumulate) if row_weight is None else row_weight
    forward = reference.linear_divergence_forward if impl == "torch" else fused_forward
    with torch.cuda.device_of(hidden):  # Triton launches on the current device, wherever the tensors are
        divergences, (d_hidden, d_weight, _) = forward(
            hidden,
            weight,
            student.long().contiguous(),
            teacher.long().contiguous(),
            theirs,
            weight if teacher_weight is None else teacher_weight,
            weights.contiguous(),
            pair,
            (needs_hidden, needs_weight, False),
        )
    loss = torch.where(weights != 0, weights * divergences.clamp(max=bound), 0.0).sum()
    nothing = hidden.new_empty(0), hidden.new_empty(0)
    d_hidden, d_weight = (n if g is None else g for n, g in zip(nothing, (d_hidden, d_weight), strict=True))
    return loss, divergences, d_hidden, d_weight


@linear_divergence_op.register_fake
def _(hidden, weight, student, *rest):
    loss = hidden.new_empty((), dtype=reference.accumulation_dtype(hidden.dtype))
    grads = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else hidden.new_empty(0)
        for t, need in zip((hidden, weight), rest[-3:-1], strict=True)
    )
    return loss, loss.new_empty(student.shape[0]), *grads


NUM_INPUTS = 17


def _setup_context(ctx, inputs, output):
    _, divergences, *grads = output
    ctx.mark_non_differentiable(divergences, *grads)
    keep_gradients(ctx, grads, inputs[-3:-1], inputs[-1], "linear_divergence")


def _backward(ctx, grad_loss, *unused):
    return (*hand_out(ctx, grad_loss), *(None,) * (NUM_INPUTS - 2))


linear_divergence_op.register_autograd(_backward, setup_context=_setup_context)
