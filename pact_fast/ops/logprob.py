"""Log-probabilities of target tokens from hidden states: argument checks and the choice of implementation."""

from typing import Any

from torch import Tensor

from pact_fast.kernels.lm_head.logprob import linear_logprob_op
from pact_fast.ops.checks import autocast, check_head, check_rows, check_temperature, choose, shard_of


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    tp_group: Any = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each row's target token (and its distribution's entropy), without [N, V] logits.

    Equals::

        logits = (hidden @ weight.T + bias).float()
        logits = softcap * tanh(logits / softcap)      # only with softcap
        logprobs = log_softmax(logits / temperature, -1).gather(1, target[:, None])[:, 0]

    Args:
        hidden: [N, H] float, any strides; the input of the LM head.
        weight: [V, H] of the same dtype.
        target: [N] integer, every value in [0, V) (checked on CPU; on a device under PACT_FAST_DEBUG=1).
        bias: [V] or None.
        temperature: > 0, one or [N]; divides the logits after the softcap.
        softcap: > 0 or None.
        return_entropy: also return the entropy in nats, differentiable as well.
        tp_group: a torch.distributed process group whose rank i holds rows [i V/p, (i + 1) V/p) of the head:
            weight [V/p, H] and bias [V/p] of this rank, everything else the same on all. The outputs and the
            gradient of hidden are those of the whole head on every rank; those of weight and bias its part's.
        impl: "auto" (Triton on CUDA, torch elsewhere), "torch" or "triton".

    Returns:
        logprobs [N], or (logprobs [N], entropy [N]); fp32 (fp64 for fp64 hidden). Differentiable in hidden,
        weight, bias.

    Raises:
        ValueError, TypeError: naming the argument, before anything is computed.
    """
    outputs = logprobs_and_entropy(hidden, weight, target, bias, temperature, softcap, tp_group, impl)
    return outputs if return_entropy else outputs[0]


def logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    tp_group: Any,
    impl: str,
) -> tuple[Tensor, Tensor]:
    hidden, weight, bias = autocast(hidden, weight, bias)
    check_head(hidden, weight, bias, softcap)
    rows = check_rows("target", target, hidden.shape[0], hidden, integer=True)
    heat = check_temperature(temperature, rows, hidden)
    cap = None if softcap is None else float(softcap)
    impl, shard = choose(impl, hidden), shard_of(tp_group)
    logprobs, entropy, _ = linear_logprob_op(hidden, weight, target, bias, *heat, cap, *shard, impl)
    return logprobs, entropy
