"""Log-probs of many sequences in one shared pass: every token once, however many sequences contain it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pact_fast.ops import linear_logprob
from pact_fast.tree.packing import TreePack, check_ids, pack_tree, plan_packs
from pact_fast.tree.policy import Policy

Tokens = Sequence[int] | Tensor


def sequence_logprobs(
    model: Policy | nn.Module,
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
        model: a Policy, or what Policy takes: a Hugging Face causal LM, with PEFT or DDP around it or not.
        sequences: lists or [len] tensors of token ids, len >= 1.
        temperature: divides the logits.
        token_budget: packed tokens of one forward. More take several: with gradients, packs that repeat the
            prefixes they need; without, one sweep over the tree that keeps the keys and values of one path,
            so every token is still computed once and memory stays bounded.
        impl: "auto", or the implementation of attention and head by name (with a Policy: of the head).

    Returns:
        A list of fp32 [len - 1], on the model's device. Differentiable where gradients are enabled: use
        `torch.no_grad()` to score.
    """
    policy = _policy(model, impl)
    tensors = [_tensor(sequence, f"sequences[{s}]") for s, sequence in enumerate(sequences)]
    for name, ids in _named("sequences", tensors):
        if ids.numel() == 0:
            raise ValueError(f"{name} is empty: a log-prob needs a token and at least one before it")
        check_ids(ids, policy.family.vocabulary, name)
    return _score(policy, tensors, [1] * len(tensors), temperature, token_budget, impl)


def context_logprobs(
    model: Policy | nn.Module,
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
        `pact/trace_gain` averages (docs/method.md, "What is measured").
    """
    contexts = (_tensor(prompt, "prompt"), _tensor(privileged_prompt, "privileged_prompt"))
    for name, context in zip(("prompt", "privileged_prompt"), contexts, strict=True):
        if context.numel() == 0:
            raise ValueError(f"{name} is empty: the first token of a rollout needs a token before it")
    bodies = [_tensor(rollout, f"rollouts[{g}]") for g, rollout in enumerate(rollouts)]
    policy = _policy(model, impl)
    both = list(zip(("prompt", "privileged_prompt"), contexts, strict=True))
    for name, ids in both + _named("rollouts", bodies):
        check_ids(ids, policy.family.vocabulary, name)
    sequences = [torch.cat((context, body)) for context in contexts for body in bodies]
    starts = [context.numel() for context in contexts for _ in bodies]
    scores = _score(policy, sequences, starts, temperature, token_budget, impl)
    return scores[: len(bodies)], scores[len(bodies) :]


def _policy(model: Policy | nn.Module, impl: str) -> Policy:
    return model if isinstance(model, Policy) else Policy(model, attention=impl)


def _named(name: str, sequences: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    return [(f"{name}[{s}]", sequence) for s, sequence in enumerate(sequences)]


def _tensor(tokens: Tokens, name: str) -> Tensor:
    """Token ids as int64 [len] on the CPU; ValueError names what is something else."""
    if isinstance(tokens, int) or (isinstance(tokens, Tensor) and tokens.ndim == 0):
        raise ValueError(
            f"{name} is {tokens!r:.40}, not a list or tensor of token ids: a single sequence is given as "
            "[ids], a batch as a list of them"
        )
    try:
        ids = torch.as_tensor(tokens, device="cpu")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a flat list or tensor of token ids: {error}") from None
    if ids.ndim != 1 or (ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool)):
        raise ValueError(
            f"{name} must be a flat list or tensor of token ids, got {ids.dtype} {list(ids.shape)}"
        )
    return ids.long()


def _score(
    policy: Policy,
    sequences: Sequence[Tensor],
    starts: list[int],
    temperature: float,
    token_budget: int,
    impl: str,
) -> list[Tensor]:
    """Log-probs of tokens starts[s]: of every sequence, pack by pack."""
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1, got {token_budget}")
    out: list[Tensor] = [torch.empty(0)] * len(sequences)
    everything = list(range(len(sequences)))
    for members in plan_packs(sequences, token_budget) if torch.is_grad_enabled() else [everything]:
        pack = pack_tree([sequences[s] for s in members]).to(policy.device)
        targets = [index[starts[s] :] for s, index in zip(members, pack.token_index, strict=True)]
        logprobs = pack_logprobs(
            policy, pack, targets, temperature=temperature, token_budget=token_budget, impl=impl
        )
        for s, scores in zip(members, logprobs, strict=True):
            out[s] = scores
    return out


def pack_logprobs(
    policy: Policy,
    pack: TreePack,
    targets: Sequence[Tensor],
    *,
    temperature: float = 1.0,
    token_budget: int | None = None,
    impl: str = "auto",
) -> list[Tensor]:
    """Log-probs of the packed tokens `targets[s]` ([n] int64 each, none a root) given their ancestors: fp32
    [n] each.

    A token that several of them name goes through the LM head once. `token_budget`: without gradients, a
    larger pack is streamed in chunks of that many tokens.
    """
    wanted = torch.cat([torch.empty(0, dtype=torch.int64, device=policy.device), *targets])
    rows, where = wanted.unique(return_inverse=True)
    head = policy.head

    def score(hidden: Tensor, tokens: Tensor) -> Any:
        return linear_logprob(
            hidden,
            head.weight,
            tokens,
            impl=impl,
            **head.options(temperature),
        )

    if token_budget is None or torch.is_grad_enabled() or pack.num_tokens <= token_budget:
        logprobs = score(policy.hidden(pack)[pack.parent[rows]], pack.input_ids[rows])
    else:
        pieces = []
        for first, last, above, hidden in policy.stream(pack, token_budget):
            own = rows[(rows >= first) & (rows < last)]
            # Ancestors of the chunk are one path, so the parent above it is found by its depth.
            parent = pack.parent[own]
            parent = torch.where(parent >= first, parent - first + above.shape[0], pack.position_ids[own] - 1)
            pieces.append(score(torch.cat((above, hidden))[parent], pack.input_ids[own]))
        logprobs = torch.cat(pieces)
    return list(logprobs[where].split([target.numel() for target in targets]))
