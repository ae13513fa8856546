"""Per-token weights: the strength of a trace token, the weight of a sampled token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pact_fast.data.chat import Component
from pact_fast.objective.schedules import SFTStrength

NORMALIZATIONS = ("token", "sequence", "constant")


def sft_token_strengths(components: Sequence[int], segments: Sequence[int], strength: SFTStrength) -> Tensor:
    """Strength of every token of a trace before normalisation.

    Args:
        components: [L] `Component` of each token.
        segments: [L] reasoning segment of each token, -1 outside reasoning.
        strength: from `sft_strength`.

    Returns:
        float32 [L]; context and tool responses are always 0.
    """
    component = torch.as_tensor(components, dtype=torch.long)
    table = torch.zeros(max(Component) + 1)
    table[Component.REASONING] = strength.reasoning
    table[Component.TOOL_CALL] = strength.tool_call
    table[Component.STRUCTURE] = strength.structure
    table[Component.ANSWER] = strength.answer
    out = table[component]
    beyond = torch.as_tensor(segments, dtype=torch.long) >= strength.reasoning_level
    return out.masked_fill((component == Component.REASONING) & beyond, 0.0)


def policy_token_weight(
    normalization: str, length: int, *, total_tokens: int, num_sequences: int, max_length: int
) -> float:
    """Weight w of one sampled token, from global counts over all ranks and micro-batches.

    Args:
        normalization: "token" 1/N_rl, "sequence" 1/(#sequences * length), "constant" 1/(#sequences *
        max_length).
        length: sampled tokens of this sequence.
        total_tokens: N_rl, sampled tokens of all sequences.
        num_sequences: number of sequences with a policy term.
        max_length: the largest number of tokens a rollout may sample.
    """
    if normalization == "token":
        return 1.0 / max(total_tokens, 1)
    if normalization == "sequence":
        return 1.0 / max(num_sequences * length, 1)
    if normalization == "constant":
        return 1.0 / max(num_sequences * max_length, 1)
    raise ValueError(f"normalization={normalization!r} is not one of {NORMALIZATIONS}")
