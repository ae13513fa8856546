"""The oracle of the LM-head ops: the formulas of their docstrings under plain autograd, nothing fused."""

import torch


def logits(hidden, weight, bias=None, temperature=1.0, softcap=None):
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def logprob_and_entropy(hidden, weight, target, **head):
    logp = logits(hidden, weight, **head).log_softmax(-1)
    return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def pact_loss(
    hidden,
    weight,
    target,
    *,
    row_index=None,
    policy_weight=None,
    advantages=None,
    old_logprobs=None,
    ref_logprobs=None,
    sft_weight=None,
    epsilon_low=0.2,
    epsilon_high=0.2,
    dual_clip=None,
    beta=0.0,
    entropy_coef=0.0,
    **head,
):
    """loss, policy_loss, sft_loss, kl, entropy over the rows that carry a weight."""
    if row_index is not None:
        hidden = hidden[row_index]
    zeros = hidden.new_zeros(target.shape[0])
    w = zeros if policy_weight is None else policy_weight
    u = zeros if sft_weight is None else sft_weight
    on, sft_on = w != 0, u != 0
    lp, entropy = logprob_and_entropy(hidden, weight, torch.where(on | sft_on, target, 0), **head)
    policy = kl = zeros
    if policy_weight is not None:
        a = torch.where(on, advantages, 0.0)
        old = lp.detach() if old_logprobs is None else torch.where(on, old_logprobs, 0.0)
        ratio = (lp - old).exp()
        best = torch.min(ratio * a, ratio.clip(1 - epsilon_low, 1 + epsilon_high) * a)
        if dual_clip is not None:
            best = torch.where(a < 0, torch.max(best, dual_clip * a), best)
        policy = -best
        if beta:
            gap = torch.where(on, ref_logprobs, 0.0) - lp
            kl = gap.exp() - gap - 1
    parts = [
        torch.where(on, w * policy, 0.0).sum(),
        torch.where(sft_on, u * -lp, 0.0).sum(),
        torch.where(on, w * kl, 0.0).sum(),
        torch.where(on, w * entropy, 0.0).sum(),
    ]
    return parts[0] + parts[1] + beta * parts[2] - entropy_coef * parts[3], *parts
