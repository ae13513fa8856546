"""A vocabulary spread over the ranks of a process group: rank i holds rows [i V/p, (i + 1) V/p) of the head.

Each rank computes the statistics of its own columns. With m_i = max l, log s_i relative to it, entropy H_i
and log-prob lp_i (of the target's owner) of rank i's softmax, and log w_i = log_softmax_i(m_i + log s_i)
the share of the whole distribution that lies on it:

    logprob = lp_owner + log w_owner          entropy = sum_i w_i (H_i - log w_i)

So one gather of four numbers a row and rank is all a chunk exchanges forwards, and every rank merges them in
the same order. The gradients of the head stay where the head is; that of the hidden states is summed over
the ranks. Collectives are torch's functional ones, which know a group by its name: kernels import no
torch.distributed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pact_fast.kernels.lm_head.checks import checked, require


class Shard(NamedTuple):
    """This rank's part of the vocabulary; group "" is the whole of it in one process."""

    group: str = ""
    rank: int = 0
    ranks: int = 1

    @property
    def alone(self) -> bool:
        return self.ranks == 1


def first_column(shard: Shard, width: int) -> int:
    """Number in the whole vocabulary of this rank's first column, of `width` a rank."""
    return shard.rank * width


def gather(values: Tensor, shard: Shard) -> Tensor:
    """[ranks, *shape] from a tensor of the same shape on every rank."""
    ops = torch.ops._c10d_functional
    out = ops.wait_tensor(ops.all_gather_into_tensor(values.contiguous(), shard.ranks, shard.group))
    return out.view(shard.ranks, *values.shape)


def summed(values: Tensor | None, shard: Shard) -> Tensor | None:
    """The sum over the ranks."""
    if values is None or shard.alone:
        return values
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(values.contiguous(), "sum", shard.group))


def require_equal_widths(weight: Tensor, shard: Shard) -> None:
    """ValueError on CPU where the ranks hold different numbers of vocabulary rows."""
    if shard.alone or not checked(weight):
        return
    widths = gather(torch.tensor([weight.shape[0]], device=weight.device), shard)
    require(
        widths == weight.shape[0],
        f"every rank of tp_group must hold equally many rows of weight, this one holds {weight.shape[0]}: "
        "pad the vocabulary to a multiple of the ranks",
    )


def merge(
    logprob: Tensor, entropy: Tensor, normalizer: Tensor, target: Tensor, width: int, shard: Shard
) -> tuple[Tensor, Tensor, Tensor]:
    """logprob [n], entropy [n] and normalizer [2, n] of the whole vocabulary from this rank's own.

    Args:
        target: [n] in the whole vocabulary; a rank's `logprob` counts only where the target is its own.
        width: columns a rank.
    """
    parts = gather(torch.stack((logprob, entropy, *normalizer)), shard)
    logprobs, entropies, tops, log_sums = parts.unbind(1)  # [ranks, n] each
    top = tops.amax(0)
    scores = tops - top + log_sums
    log_sum = scores.logsumexp(0)
    share = scores - log_sum
    owner = (target // width).clamp(0, shard.ranks - 1)
    logprob = (logprobs + share).gather(0, owner[None])[0]
    entropy = (share.exp() * (entropies - share)).sum(0)
    return logprob, entropy, torch.stack((top, log_sum))
