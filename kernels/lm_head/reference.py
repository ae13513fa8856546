"""Plain PyTorch references of the LM-head ops, chunked over rows: one [chunk, V] buffer, whatever N is.

With x [N, H], W [V, H], b [V], capacity c and temperature T (one, or one a row):

    z = x W^T + b          l = c tanh(z / c) / T          d = l - max l          log s = log sum_j exp d_j
    logprob = d_target - log s          p = exp(d - log s)          entropy = log s - sum_j p_j d_j
    d logprob / d l = 1[j = target] - p          d entropy / d l = -p (log p + entropy)
    dl / dz = (1 - tanh(z / c)^2) / T

Products run in the dtype of `hidden`; everything after them in fp32 (fp64 for fp64 input). Saved: entropy and
the normalizer (max l, log s), apart because their sum loses digits where logits are large.

* `linear_logprob`     the backward computes the logits again, so any loss may follow.
* `linear_token_loss`  the gradient is made in the forward: a loss function of (logprob, entropy) of a chunk's
  rows and its derivative are known once their log-sum-exp is, so one pass over the logits yields both.
* `linear_divergence`  of pairs of rows, gradient in the forward as well (`divergence`).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pact_fast.kernels.lm_head.shard import Shard, first_column, merge, summed

CPU_CHUNK_BYTES = 1 << 20  # measured at H=128, V=512: 1.06x the bare products; 16 MiB 1.4x
GPU_CHUNK_BYTES = 512 << 20
MIN_ROWS = 128  # below it the [V, H] traffic of dW outweighs the products

# (logprob [n], entropy [n], row numbers [n]) -> losses [n], dL/dlogprob [n], dL/dentropy [n] or None
RowGradients = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_per_chunk(hidden: Tensor, vocab: int) -> int:
    budget = CPU_CHUNK_BYTES if hidden.device.type == "cpu" else GPU_CHUNK_BYTES
    return max(MIN_ROWS, budget // (accumulation_dtype(hidden.dtype).itemsize * max(vocab, 1)))


def pick(temperature: float | Tensor, rows: Tensor | slice) -> float | Tensor:
    """The temperature of these rows: the one of all, or [n, 1]."""
    return temperature[rows, None] if isinstance(temperature, Tensor) else temperature


def row_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, temperature: float | Tensor, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """l [n, V] and, under a softcap, tanh(z / c) [n, V], which its derivative needs."""
    z = torch.mm(x, weight.t()).to(accumulation_dtype(x.dtype))
    if bias is not None:
        z += bias
    tanh_z = None
    if softcap is not None:
        tanh_z = z.div_(softcap).tanh_()
        z = tanh_z * softcap
    return divided(z, temperature), tanh_z


def divided(values: Tensor, temperature: float | Tensor) -> Tensor:
    """values [n, V] / T in place."""
    return values if isinstance(temperature, float) and temperature == 1.0 else values.div_(temperature)


def row_statistics(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """probs [n, V], logprob [n], entropy [n], normalizer [2, n]; `logits` becomes d = l - max l.

    A target outside [0, V) has the log-prob NaN.
    """
    top = logits.amax(dim=1)
    logits -= top[:, None]
    probs = logits.exp()
    total = probs.sum(dim=1)
    probs /= total[:, None]
    log_sum = total.log_()
    inside = (target >= 0) & (target < logits.shape[1])
    logprob = logits.gather(1, torch.where(inside, target, 0)[:, None]).squeeze(1) - log_sum
    logprob = torch.where(inside, logprob, float("nan"))
    return probs, logprob, log_sum - torch.linalg.vecdot(probs, logits), torch.stack([top, log_sum])


def logits_gradient(
    probs: Tensor,
    shifted: Tensor,
    tanh_z: Tensor | None,
    target: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    temperature: float | Tensor,
) -> Tensor:
    """dL/dz [n, V] from dL/dlogprob [n] and dL/dentropy [n]; `probs` and `shifted` = d are consumed."""
    if grad_entropy is None:
        grad = probs.mul_(-grad_logprob[:, None])
    else:
        slope = shifted.sub_((log_sum - entropy)[:, None]).mul_(-grad_entropy[:, None])
        grad = probs.mul_(slope.sub_(grad_logprob[:, None]))
    inside = (target >= 0) & (target < grad.shape[1])  # the target may lie on another rank
    own = torch.where(inside, target, 0), torch.where(inside, grad_logprob, 0)
    grad.scatter_add_(1, own[0][:, None], own[1][:, None])
    if tanh_z is not None:
        grad.mul_(1 - tanh_z.square())
    return divided(grad, temperature)


def shard_statistics(logits: Tensor, target: Tensor, shard: Shard):
    """`row_statistics` over the whole vocabulary, of which `logits` are this rank's columns."""
    if shard.alone:
        return row_statistics(logits, target)
    width = logits.shape[1]
    own = target - first_column(shard, width)
    probs, logprob, entropy, normalizer = row_statistics(logits, own)
    logprob, entropy, whole = merge(logprob, entropy, normalizer, target, width, shard)
    shift = normalizer[0] - whole[0]
    logits += shift[:, None]
    probs *= (shift + normalizer[1] - whole[1]).exp()[:, None]
    return probs, logprob, entropy, whole


def without_gradient(grad_logprob: Tensor, grad_entropy: Tensor | None) -> Tensor:
    """bool [n]: rows that no gradient comes into."""
    dead = grad_logprob == 0
    return dead if grad_entropy is None else dead & (grad_entropy == 0)


def linear_logprob_forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    shard: Shard,
) -> tuple[Tensor, Tensor, Tensor]:
    """logprob [N], entropy [N], normalizer [2, N] in fp32 (fp64 for fp64 input)."""
    n = hidden.shape[0]
    logprob, entropy = hidden.new_empty(2, n, dtype=accumulation_dtype(hidden.dtype)).unbind()
    normalizer = logprob.new_empty(2, n)
    step = rows_per_chunk(hidden, weight.shape[0])
    for i in range(0, n, step):
        rows = slice(i, i + step)
        logits, _ = row_logits(hidden[rows], weight, bias, pick(temperature, rows), softcap)
        _, logprob[rows], entropy[rows], normalizer[:, rows] = shard_statistics(logits, target[rows], shard)
    return logprob, entropy.clone(), normalizer  # the outputs of a custom op may not share memory


def linear_logprob_backward(
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    normalizer: Tensor,
    entropy: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    shard: Shard,
    needs: tuple[bool, bool, bool],
) -> Grads:
    """Gradients of (hidden, weight, bias), None where not needed; rows without a gradient are skipped."""
    grads = GradientSums(hidden, weight, bias, needs)
    live = ~without_gradient(grad_logprob, grad_entropy)
    start = first_column(shard, weight.shape[0])
    for rows in live.nonzero().squeeze(1).split(rows_per_chunk(hidden, weight.shape[0])):
        x, y, (top, log_sum), heat = hidden[rows], target[rows], normalizer[:, rows], pick(temperature, rows)
        logits, tanh_z = row_logits(x, weight, bias, heat, softcap)
        logits -= top[:, None]
        probs = (logits - log_sum[:, None]).exp_()
        g_entropy = None if grad_entropy is None else grad_entropy[rows]
        dz = logits_gradient(
            probs, logits, tanh_z, y - start, log_sum, entropy[rows], grad_logprob[rows], g_entropy, heat
        )
        grads.add(rows, x, dz)
    return grads.result(shard)


def linear_token_loss_forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    row_index: Tensor | None,
    numbers: Tensor,
    row_gradients: RowGradients,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    shard: Shard,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Grads]:
    """losses, logprobs and entropies [n] of n rows, gradients of (hidden, weight, bias) of the losses' sum.

    Args:
        target, row_index, temperature: [n], of these rows alone; row_index None: row i is hidden[i].
        numbers: [n] int64, how the rows are called towards `row_gradients`.
    """
    n = target.shape[0]
    losses, logprobs, entropies = hidden.new_zeros(3, n, dtype=accumulation_dtype(hidden.dtype)).unbind()
    grads = GradientSums(hidden, weight, bias, needs)
    start, step = first_column(shard, weight.shape[0]), rows_per_chunk(hidden, weight.shape[0])
    sources = torch.arange(n, device=hidden.device) if row_index is None else row_index
    for i in range(0, n, step):
        rows = slice(i, i + step)
        x, y, heat = hidden[sources[rows]], target[rows], pick(temperature, rows)
        logits, tanh_z = row_logits(x, weight, bias, heat, softcap)
        probs, logprobs[rows], entropies[rows], (_, log_sum) = shard_statistics(logits, y, shard)
        losses[rows], grad, grad_entropy = row_gradients(logprobs[rows], entropies[rows], numbers[rows])
        if any(needs):
            dz = logits_gradient(
                probs, logits, tanh_z, y - start, log_sum, entropies[rows], grad, grad_entropy, heat
            )
            bad = without_gradient(grad, grad_entropy) & ~logprobs[rows].isfinite()
            if bool(bad.any()):  # 0 * NaN is NaN
                dz, x = (t.masked_fill_(bad[:, None], 0) for t in (dz, x))
            grads.add(sources[rows], x, dz)
    return losses, logprobs, entropies, grads.result(shard)


KINDS = ("reverse_kl", "forward_kl", "jsd")


class Pair(NamedTuple):
    """How a pair of rows is compared; see divergence.py."""

    kind: str
    beta: float
    top_k: int  # V: every token, no buckets
    clip: float  # inf: none
    temperature: float
    teacher_temperature: float
    softcap: float | None

    def clipped(self, divergences: Tensor) -> Tensor:
        """bool: rows whose divergence is over the clip, and which have no gradient."""
        return divergences > self.clip


def divergence(log_p: Tensor, log_q: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """D [n] of student log p [n, B] and teacher log q [n, B], and dD/dl [n, B] where p = softmax(l).

    With m = beta q + (1 - beta) p; its logarithm is made from log q - log p, so equal rows give exactly 0.
    """
    p, gap = log_p.exp(), log_q - log_p
    if kind == "reverse_kl":
        value = -torch.linalg.vecdot(p, gap)
        return value, p.mul_(gap.neg_().sub_(value[:, None]))
    q = log_q.exp()
    if kind == "forward_kl":
        return torch.linalg.vecdot(q, gap), p.sub_(q)
    share = torch.where(gap > 0, gap.new_tensor(1 - beta), gap.new_tensor(beta))
    log_m_over_p = share.mul_(gap.abs().neg_().expm1_()).log1p_().add_(gap.clamp(min=0))
    kl_q = torch.linalg.vecdot(q, gap - log_m_over_p)
    kl_p = -torch.linalg.vecdot(p, log_m_over_p)
    value = beta * kl_q + (1 - beta) * kl_p
    return value, p.mul_(log_m_over_p.add_(kl_p[:, None]).mul_(beta - 1))


def bucket_logprobs(chosen: Tensor, top: Tensor, log_sum: Tensor) -> Tensor:
    """[n, k + 1] log-probs of k tokens with logits [n, k] and of the rest, whose normalizer is given [n]."""
    peak = torch.maximum(chosen.amax(1), top)[:, None]
    rest = (top[:, None] - peak) + log_sum[:, None]
    return torch.cat((chosen - peak, rest), 1).log_softmax(1)


def linear_divergence_forward(
    hidden: Tensor,
    weight: Tensor,
    student: Tensor,
    teacher: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    row_weight: Tensor,
    pair: Pair,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Grads]:
    """divergences [R], gradients of (hidden, weight, None) of sum row_weight * min(D, clip)."""
    divergences = torch.zeros_like(row_weight)
    grads = GradientSums(hidden, weight, None, needs)
    for rows in (row_weight != 0).nonzero().squeeze(1).split(rows_per_chunk(hidden, weight.shape[0])):
        x, y = hidden[student[rows]], teacher_hidden[teacher[rows]]
        l_s, tanh_z = row_logits(x, weight, None, pair.temperature, pair.softcap)
        l_t, _ = row_logits(y, teacher_weight, None, pair.teacher_temperature, pair.softcap)
        if pair.top_k >= weight.shape[0]:
            value, dl = divergence(l_s.log_softmax(1), l_t.log_softmax(1), pair.kind, pair.beta)
        else:
            value, dl = bucket_divergence(l_s, l_t, pair)
        divergences[rows] = value
        if any(needs):
            strength = torch.where(pair.clipped(value), 0, row_weight[rows])
            dz = divided(dl.mul_(strength[:, None]), pair.temperature)
            if tanh_z is not None:
                dz.mul_(1 - tanh_z.square())
            grads.add(student[rows], x, dz)
    return divergences, grads.result()


def bucket_divergence(l_s: Tensor, l_t: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """As `divergence` of softmax(l) [n, V], over the teacher's k likeliest tokens and one bucket more."""
    index = l_t.topk(pair.top_k, dim=1).indices
    logs = []
    for l in (l_t, l_s):
        chosen = l.gather(1, index)
        l.scatter_(1, index, float("-inf"))
        top = l.amax(1)
        log_sum = (l - top[:, None]).exp_().sum(1).log_()
        logs.append(bucket_logprobs(chosen, top, log_sum))
    value, grad = divergence(logs[1], logs[0], pair.kind, pair.beta)
    dl = l_s.softmax(1).mul_(grad[:, -1:])  # the tail's gradient, spread over its tokens
    return value, dl.scatter_(1, index, grad[:, :-1])


class GradientSums:
    """Sums of dX, dW and db over chunks, in fp32 (fp64 for fp64 input), rounded once at the end."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]):
        dtype = accumulation_dtype(hidden.dtype)
        self.weight = weight
        self.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        tensors = (hidden, weight, bias)
        self.sums = [
            torch.zeros(t.shape, dtype=dtype, device=t.device) if t is not None and need else None
            for t, need in zip(tensors, needs, strict=True)
        ]

    def add(self, rows: Tensor, x: Tensor, dz: Tensor) -> None:
        d_hidden, d_weight, d_bias = self.sums
        if d_bias is not None:
            d_bias += dz.sum(0)
        dz = dz.to(x.dtype)
        if d_hidden is not None:
            d_hidden.index_add_(0, rows, torch.mm(dz, self.weight).to(d_hidden.dtype))
        if d_weight is not None and d_weight.dtype == x.dtype:
            d_weight.addmm_(dz.t(), x)
        elif d_weight is not None:
            d_weight += torch.mm(dz.t(), x)

    def result(self, shard: Shard = Shard()) -> Grads:  # noqa: B008
        self.sums[0] = summed(self.sums[0], shard)
        d_hidden, d_weight, d_bias = (
            None if total is None else total.to(dtype)
            for total, dtype in zip(self.sums, self.dtypes, strict=True)
        )
        return d_hidden, d_weight, d_bias
