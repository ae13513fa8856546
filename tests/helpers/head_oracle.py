"""The oracle of the LM-head ops: the formulas of their docstrings under plain autograd, nothing fused."""

import torch


def logits(hidden, weight, bias=None, temperature=1.0, softcap=None):
    z = torch.nn.functional.linear(hidden, weight, bias)
    z = z.to(torch.promote_types(z.dtype, torch.float32))  # half-precision logits, fp32 from there on
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
    zeros = hidden.new_zeros(target.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))
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


# One set of problems for every implementation: rows R of T hidden rows, a share of them dead and full of NaN.
T, R, H, V = 40, 57, 8, 53
SETTINGS = {
    "sft": {"use": ("sft_weight",)},
    "on_policy": {"use": ("policy_weight", "advantages")},
    "clipped": {
        "use": ("policy_weight", "advantages", "old_logprobs"),
        "epsilon_low": 0.1,
        "epsilon_high": 0.3,
    },
    "dual_clip": {"use": ("policy_weight", "advantages", "old_logprobs"), "dual_clip": 1.5},
    "kl": {"use": ("policy_weight", "advantages", "old_logprobs", "ref_logprobs"), "beta": 0.3},
    "entropy": {"use": ("policy_weight", "advantages"), "entropy_coef": 0.2, "temperature": 0.8},
    "all": {
        "use": ("policy_weight", "advantages", "old_logprobs", "ref_logprobs", "sft_weight"),
        "beta": 0.1,
        "entropy_coef": 0.05,
        "dual_clip": 2.0,
        "softcap": 4.0,
        "temperature": 1.2,
    },
}


def problem(setting, *, rows=R, hidden_rows=T, vocab=V, dtype=torch.float64, dead=0.3, seed=0):
    """hidden, weight, bias and the arguments of one setting; a share of the rows is dead and full of NaN."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    leaves = [t.to(dtype).requires_grad_() for t in (draw(hidden_rows, H), draw(vocab, H), draw(vocab))]
    row_index = torch.randint(0, hidden_rows, (rows,), generator=g)
    target = torch.randint(0, vocab, (rows,), generator=g)
    exact = [t.detach().double() for t in leaves]
    near, _ = logprob_and_entropy(exact[0][row_index], exact[1], target, bias=exact[2])
    values = {
        "policy_weight": draw(rows).abs() / 10,
        "advantages": draw(rows),
        "old_logprobs": near + 0.5 * draw(rows),
        "ref_logprobs": near + 0.5 * draw(rows),
        "sft_weight": draw(rows).abs() / 10,
    }
    gone = torch.rand(rows, generator=g) < dead
    for name, value in values.items():
        value[gone] = 0.0 if name.endswith("weight") else float("nan")
    target[gone] = -100
    options = {k: v for k, v in SETTINGS[setting].items() if k != "use"}
    return leaves, {
        "target": target,
        "row_index": row_index,
        **{k: values[k] for k in SETTINGS[setting]["use"]},
        **options,
    }


def run(function, leaves, args):
    hidden, weight, bias = leaves
    out = function(hidden, weight, bias=bias, **args)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    return out, torch.autograd.grad(out[0], wanted)
