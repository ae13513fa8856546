"""Log-probs of many sequences in one shared pass: every token once, however many sequences contain it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pact_fast.ops import linear_logprob
from pact_fast.packing import TreePack, pack_tree, plan_packs
from pact_fast.policy import Policy

Tokens = Sequence[int] | Tensor


def sequence_logprobs(
    model: Policy | PreTrainedModel,
    sequences: Sequence[Tokens],
    *,
    temperature: float = 1.0,
    token_budget: int = 65536,
    impl: str = "auto",
) -> list[Tensor]:
    """Log-probability of every token of every sequence given those before it.

    Equals, for each sequence::

        logits = model(sequence[None]).logits[0, :-1].float() / temperature
        logprobs = logits.log_softmax(-1).gather(1, sequence[1:, None])[:, 0]

    Args:
        model: a Policy, or a Hugging Face causal LM of a family that Policy accepts.
        sequences: lists or [len] tensors of token ids, len >= 1.
        temperature: divides the logits.
        token_budget: packed tokens of one forward; more sequences than fit take several.
        impl: "auto", or the implementation of attention and head by name (with a Policy: of the head).

    Returns:
        A list of fp32 [len - 1], on the model's device. Differentiable where gradients are enabled: use
        `torch.no_grad()` to score.
    """
    return _score(model, sequences, [1] * len(sequences), temperature, token_budget, impl)


def context_logprobs(
    model: Policy | PreTrainedModel,
    prompt: Tokens,
    privileged_prompt: Tokens,
    rollouts: Sequence[Tokens],
    *,
    temperature: float = 1.0,
    token_budget: int = 65536,
    impl: str = "auto",
) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probs of the rollouts' tokens after the prompt and after the prompt with the expert trace, in one
    pass.

    Args as in `sequence_logprobs`; `prompt` x and `privileged_prompt` c(x, h): token ids, at least one each;
    `rollouts`: the tokens after them, the same in both contexts.

    Returns:
        (prompt_only, trace_conditioned): two lists of fp32 [len of the rollout]. Their difference is what
        `pact/trace_gain` averages (METHOD.md, 7).
    """
    contexts = (_tensor(prompt), _tensor(privileged_prompt))
    for name, context in zip(("prompt", "privileged_prompt"), contexts, strict=True):
        if context.numel() == 0:
            raise ValueError(f"{name} is empty: the first token of a rollout needs a token before it")
    bodies = [_tensor(rollout) for rollout in rollouts]
    sequences = [torch.cat((context, body)) for context in contexts for body in bodies]
    starts = [context.numel() for context in contexts for _ in bodies]
    scores = _score(model, sequences, starts, temperature, token_budget, impl)
    return scores[: len(bodies)], scores[len(bodies) :]


def _tensor(tokens: Tokens) -> Tensor:
    return torch.as_tensor(tokens, dtype=torch.int64, device="cpu")


def _score(
    model, sequences, starts: list[int], temperature: float, token_budget: int, impl: str
) -> list[Tensor]:
    """Log-probs of tokens starts[s]: of every sequence, pack by pack."""
    policy = model if isinstance(model, Policy) else Policy(model, attention=impl)
    for s, sequence in enumerate(sequences):
        if len(sequence) == 0:
            raise ValueError(f"sequences[{s}] is empty: a log-prob needs a token and at least one before it")
    out: list[Tensor] = [torch.empty(0)] * len(sequences)
    for members in plan_packs(sequences, token_budget):
        pack = pack_tree([sequences[s] for s in members]).to(policy.device)
        targets = [index[starts[s] :] for s, index in zip(members, pack.token_index, strict=True)]
        logprobs = pack_logprobs(policy, pack, targets, temperature=temperature, impl=impl)
        for s, scores in zip(members, logprobs, strict=True):
            out[s] = scores
    return out


def pack_logprobs(
    policy: Policy, pack: TreePack, targets: Sequence[Tensor], *, temperature: float = 1.0, impl: str = "auto"
) -> list[Tensor]:
    """Log-probs of the packed tokens `targets[s]` ([n] int64 each, none a root) given their ancestors: fp32
    [n] each.

    A token that several of them name goes through the LM head once.
    """
    wanted = torch.cat([torch.empty(0, dtype=torch.int64, device=policy.device), *targets])
    rows, where = wanted.unique(return_inverse=True)
    hidden = policy.hidden(pack)
    head = policy.head
    logprobs = linear_logprob(
        hidden[pack.parent[rows]],
        head.weight,
        pack.input_ids[rows],
        bias=head.bias,
        temperature=temperature / head.scale,
        softcap=head.softcap,
        impl=impl,
    )
    return list(logprobs[where].split([target.numel() for target in targets]))
