"""Plain PyTorch reference of `linear_logprob`, chunked over rows: one [chunk, V] buffer, whatever N is.

With x [N, H], W [V, H], b [V], capacity c and temperature T:

    z = x W^T + b          l = c tanh(z / c) / T          lse = log sum_j exp l_j
    logprob = l_target - lse          p = exp(l - lse)          entropy = lse - sum_j p_j l_j
    d logprob / d l = 1[j = target] - p          d entropy / d l = -p (l - lse + entropy)
    dl / dz = (1 - tanh(z / c)^2) / T

Products run in the dtype of `hidden`; everything after them in fp32 (fp64 for fp64 input). Saved: lse and
entropy.
"""

import torch
from torch import Tensor

CPU_CHUNK_BYTES = 1 << 20  # measured at H=128, V=512: 1.06x the bare products; 16 MiB 1.4x
GPU_CHUNK_BYTES = 512 << 20
MIN_ROWS = 128  # below it the [V, H] traffic of dW outweighs the products


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_per_chunk(hidden: Tensor, vocab: int) -> int:
    budget = CPU_CHUNK_BYTES if hidden.device.type == "cpu" else GPU_CHUNK_BYTES
    return max(MIN_ROWS, budget // (accumulation_dtype(hidden.dtype).itemsize * max(vocab, 1)))


def row_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """l [n, V] and, under a softcap, tanh(z / c) [n, V], which its derivative needs."""
    z = torch.mm(x, weight.t()).to(accumulation_dtype(x.dtype))
    if bias is not None:
        z += bias
    squashed = None
    if softcap is not None:
        squashed = z.div_(softcap).tanh_()
        z = squashed * softcap
    return (z.div_(temperature) if temperature != 1.0 else z), squashed


def row_statistics(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """probs [n, V], lse [n], logprob [n], entropy [n]."""
    top = logits.amax(dim=1, keepdim=True)
    probs = (logits - top).exp_()
    total = probs.sum(dim=1, keepdim=True)
    probs /= total
    lse = (top + total.log_()).squeeze(1)
    logprob = logits.gather(1, target[:, None]).squeeze(1) - lse
    return probs, lse, logprob, lse - torch.linalg.vecdot(probs, logits)


def logits_gradient(
    probs: Tensor,
    logits: Tensor,
    squashed: Tensor | None,
    target: Tensor,
    lse: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    temperature: float,
) -> Tensor:
    """dL/dz [n, V] from dL/dlogprob [n] and dL/dentropy [n]; `probs` and `logits` are consumed."""
    if grad_entropy is None:
        grad = probs.mul_(-grad_logprob[:, None])
    else:
        slope = logits.sub_((lse - entropy)[:, None]).mul_(-grad_entropy[:, None])
        grad = probs.mul_(slope.sub_(grad_logprob[:, None]))
    grad.scatter_add_(1, target[:, None], grad_logprob[:, None])
    if squashed is not None:
        grad.mul_(1 - squashed.square())
    return grad.div_(temperature) if temperature != 1.0 else grad


def linear_logprob_forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """logprob [N], entropy [N], lse [N] in fp32 (fp64 for fp64 input)."""
    stats = hidden.new_empty(3, hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))
    step = rows_per_chunk(hidden, weight.shape[0])
    for i in range(0, hidden.shape[0], step):
        rows = slice(i, i + step)
        logits, _ = row_logits(hidden[rows], weight, bias, temperature, softcap)
        _, lse, logprob, entropy = row_statistics(logits, target[rows])
        stats[0, rows], stats[1, rows], stats[2, rows] = logprob, entropy, lse
    return (
        stats[0].clone(),
        stats[1].clone(),
        stats[2].clone(),
    )  # a custom op may not return views of one buffer


def linear_logprob_backward(
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (hidden, weight, bias), None where not needed; rows without a gradient are skipped."""
    grads = GradientSums(hidden, weight, bias, needs)
    live = grad_logprob != 0 if grad_entropy is None else (grad_logprob != 0) | (grad_entropy != 0)
    for rows in live.nonzero().squeeze(1).split(rows_per_chunk(hidden, weight.shape[0])):
        x, y = hidden[rows], target[rows]
        logits, squashed = row_logits(x, weight, bias, temperature, softcap)
        probs, lse, _, entropy = row_statistics(logits, y)
        g_entropy = None if grad_entropy is None else grad_entropy[rows]
        dz = logits_gradient(
            probs, logits, squashed, y, lse, entropy, grad_logprob[rows], g_entropy, temperature
        )
        grads.add(rows, x, dz)
    return grads.result()


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

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        d_hidden, d_weight, d_bias = (
            None if total is None else total.to(dtype)
            for total, dtype in zip(self.sums, self.dtypes, strict=True)
        )
        return d_hidden, d_weight, d_bias
