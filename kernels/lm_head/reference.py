"""Plain PyTorch references of the LM-head ops, chunked over rows: one [chunk, V] buffer, whatever N is.

`linear_logprob`:

With x [N, H], W [V, H], b [V], capacity c and temperature T:

    z = x W^T + b          l = c tanh(z / c) / T          d = l - max l          log s = log sum_j exp d_j
    logprob = d_target - log s          p = exp(d - log s)          entropy = log s - sum_j p_j d_j
    d logprob / d l = 1[j = target] - p          d entropy / d l = -p (log p + entropy)
    dl / dz = (1 - tanh(z / c)^2) / T

Products run in the dtype of `hidden`; everything after them in fp32 (fp64 for fp64 input). Saved: entropy and
the normalizer (max l, log s), apart because their sum loses digits where logits are large.

`linear_pact_loss`, its gradient made in the forward. With lp and H the log-prob and entropy of a row, A its
advantage, w and u its policy and SFT weight:

    ratio  = exp(lp - old)                              old = lp where no old log-prob is given
    policy = -min(ratio A, clip(ratio, 1 - eps_low, 1 + eps_high) A)
    policy = -max(-policy, dual_clip A)                 with dual_clip, where A < 0
    kl     = exp(ref - lp) - (ref - lp) - 1
    loss   = sum_r w (policy + beta kl - entropy_coef H) - u lp

    dL/dlp = w (-A ratio [clipped branch not active] + beta (1 - exp(ref - lp))) - u
    dL/dH  = -w entropy_coef

dL/dlp is known once the row's log-sum-exp is, so one pass over a chunk's logits yields loss and gradient. A
row whose weights are both 0 is dropped before anything is computed: it adds exactly 0 whatever its other
values hold. The log-ratio is cut at +80, past which exp overflows and 0 * inf would turn a zero advantage
into NaN.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CPU_CHUNK_BYTES = 1 << 20  # measured at H=128, V=512: 1.06x the bare products; 16 MiB 1.4x
GPU_CHUNK_BYTES = 512 << 20
MIN_ROWS = 128  # below it the [V, H] traffic of dW outweighs the products
MAX_LOG_RATIO = 80.0


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
    tanh_z = None
    if softcap is not None:
        tanh_z = z.div_(softcap).tanh_()
        z = tanh_z * softcap
    return (z.div_(temperature) if temperature != 1.0 else z), tanh_z


def row_statistics(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """probs [n, V], logprob [n], entropy [n], normalizer [2, n]; `logits` becomes d = l - max l."""
    top = logits.amax(dim=1)
    logits -= top[:, None]
    probs = logits.exp()
    total = probs.sum(dim=1)
    probs /= total[:, None]
    log_sum = total.log_()
    logprob = logits.gather(1, target[:, None]).squeeze(1) - log_sum
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
    temperature: float,
) -> Tensor:
    """dL/dz [n, V] from dL/dlogprob [n] and dL/dentropy [n]; `probs` and `shifted` = d are consumed."""
    if grad_entropy is None:
        grad = probs.mul_(-grad_logprob[:, None])
    else:
        slope = shifted.sub_((log_sum - entropy)[:, None]).mul_(-grad_entropy[:, None])
        grad = probs.mul_(slope.sub_(grad_logprob[:, None]))
    grad.scatter_add_(1, target[:, None], grad_logprob[:, None])
    if tanh_z is not None:
        grad.mul_(1 - tanh_z.square())
    return grad.div_(temperature) if temperature != 1.0 else grad


def linear_logprob_forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """logprob [N], entropy [N], normalizer [2, N] in fp32 (fp64 for fp64 input)."""
    n = hidden.shape[0]
    logprob, entropy = hidden.new_empty(2, n, dtype=accumulation_dtype(hidden.dtype)).unbind()
    normalizer = logprob.new_empty(2, n)
    step = rows_per_chunk(hidden, weight.shape[0])
    for i in range(0, n, step):
        rows = slice(i, i + step)
        logits, _ = row_logits(hidden[rows], weight, bias, temperature, softcap)
        _, logprob[rows], entropy[rows], normalizer[:, rows] = row_statistics(logits, target[rows])
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
    temperature: float,
    softcap: float | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (hidden, weight, bias), None where not needed; rows without a gradient are skipped."""
    grads = GradientSums(hidden, weight, bias, needs)
    live = grad_logprob != 0 if grad_entropy is None else (grad_logprob != 0) | (grad_entropy != 0)
    for rows in live.nonzero().squeeze(1).split(rows_per_chunk(hidden, weight.shape[0])):
        x, y, (top, log_sum) = hidden[rows], target[rows], normalizer[:, rows]
        logits, tanh_z = row_logits(x, weight, bias, temperature, softcap)
        logits -= top[:, None]
        probs = (logits - log_sum[:, None]).exp_()
        g_entropy = None if grad_entropy is None else grad_entropy[rows]
        dz = logits_gradient(
            probs, logits, tanh_z, y, log_sum, entropy[rows], grad_logprob[rows], g_entropy, temperature
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


class PolicyLossConfig(NamedTuple):
    """The scalars of the loss; their meaning is in the file's docstring."""

    epsilon_low: float
    epsilon_high: float
    dual_clip: float | None
    beta: float
    entropy_coef: float


class RowTerms(NamedTuple):
    """Per-row inputs [R], fp32 (fp64 for fp64 hidden); None where the caller gave none."""

    policy_weight: Tensor | None
    advantages: Tensor | None
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    sft_weight: Tensor | None

    def select(self, rows: Tensor | slice) -> "RowTerms":
        return RowTerms(*(None if value is None else value[rows] for value in self))

    def live(self) -> Tensor:
        weights = [w != 0 for w in (self.policy_weight, self.sft_weight) if w is not None]
        return weights[0] if len(weights) == 1 else weights[0] | weights[1]


def row_losses(
    logprob: Tensor, entropy: Tensor, terms: RowTerms, config: PolicyLossConfig
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums (policy, sft, kl, entropy, clipped rows) [5], dL/dlogprob [n], dL/dentropy [n] or None."""
    zero = torch.zeros_like(logprob)
    policy, kl, clipped, weighted_entropy, grad, grad_entropy = zero, zero, zero, zero, zero, None
    if terms.policy_weight is not None:
        weight, advantages = terms.policy_weight, terms.advantages
        assert advantages is not None  # the op asks for them with policy_weight
        if terms.old_logprobs is None:
            ratio = torch.ones_like(logprob)
        else:
            ratio = (logprob - terms.old_logprobs).clamp(max=MAX_LOG_RATIO).exp()
        objective = torch.minimum(
            ratio * advantages, ratio.clamp(1 - config.epsilon_low, 1 + config.epsilon_high) * advantages
        )
        inactive = ((advantages > 0) & (ratio > 1 + config.epsilon_high)) | (
            (advantages < 0) & (ratio < 1 - config.epsilon_low)
        )
        if config.dual_clip is not None:
            floor = config.dual_clip * advantages
            dual = (advantages < 0) & (objective < floor)
            objective, inactive = torch.where(dual, floor, objective), inactive | dual
        slope = torch.where(inactive, zero, -ratio * advantages)
        if config.beta != 0.0:
            assert terms.ref_logprobs is not None  # the op asks for them with beta
            gap = terms.ref_logprobs - logprob
            kl = gap.exp() - gap - 1
            slope = slope + config.beta * (1 - gap.exp())
        on = weight != 0  # selects rather than multiplies: the other rows may hold NaN
        policy, kl = torch.where(on, -weight * objective, zero), torch.where(on, weight * kl, zero)
        weighted_entropy, grad = weight * entropy, torch.where(on, weight * slope, zero)
        clipped = (on & inactive).to(logprob.dtype)
        grad_entropy = -config.entropy_coef * weight if config.entropy_coef != 0.0 else None
    sft = zero
    if terms.sft_weight is not None:
        sft, grad = -terms.sft_weight * logprob, grad - terms.sft_weight
    sums = torch.stack([policy.sum(), sft.sum(), kl.sum(), weighted_entropy.sum(), clipped.sum()])
    return sums, grad, grad_entropy


def linear_pact_loss_forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    row_index: Tensor | None,
    terms: RowTerms,
    config: PolicyLossConfig,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Sums as in row_losses [5], logprobs [R] (0 on dead rows), gradients of (hidden, weight, bias)."""
    sums = hidden.new_zeros(5, dtype=accumulation_dtype(hidden.dtype))
    logprobs = sums.new_zeros(target.shape[0])
    grads = GradientSums(hidden, weight, bias, needs)
    for rows in terms.live().nonzero().squeeze(1).split(rows_per_chunk(hidden, weight.shape[0])):
        source = rows if row_index is None else row_index[rows]
        x, y = hidden[source], target[rows]
        logits, tanh_z = row_logits(x, weight, bias, temperature, softcap)
        probs, logprobs[rows], entropy, (_, log_sum) = row_statistics(logits, y)
        part, grad, grad_entropy = row_losses(logprobs[rows], entropy, terms.select(rows), config)
        sums += part
        if any(needs):
            dz = logits_gradient(probs, logits, tanh_z, y, log_sum, entropy, grad, grad_entropy, temperature)
            grads.add(source, x, dz)
    return sums, logprobs, grads.result()
