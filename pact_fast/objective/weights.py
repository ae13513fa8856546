"""Per-token weights: the strength of a trace token, the weight of a sampled token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pact_fast.data.tokens import Component
from pact_fast.objective.schedules import SFTStrength

NORMALIZATIONS = ("prompt", "token", "sequence", "constant")


def sft_token_strengths(
    components: Sequence[int], turns: Sequence[int], levels: Sequence[int], strength: SFTStrength
) -> Tensor:
    """Strength m_n of every token of a trace before normalisation (arXiv 2606.16215, equation 9).

    Args:
        components: [L] `Component` of each token.
        turns: [L] assistant turn of each token.
        levels: [L] of a reasoning token, the lowest level whose prefix holds it; 0 elsewhere.
        strength: from `sft_strength`.

    Returns:
        float32 [L]; context and tool responses are always 0.
    """
    component, turn, level = (torch.as_tensor(v, dtype=torch.long) for v in (components, turns, levels))
    reasoning, call = component == Component.REASONING, component == Component.TOOL_CALL
    calls = call.clone()
    if strength.structure != "none":
        calling = torch.isin(turn, turn[call])
        calls |= (component == Component.STRUCTURE) & (calling | (strength.structure == "all"))
    if strength.structure == "all":
        calls |= component == Component.THINK_TAG
    if strength.level is not None:
        reasoning &= level <= strength.level
    out = torch.zeros(len(component))
    out[reasoning & _leading(reasoning, turn, strength.reasoning_share)] = strength.reasoning
    out[calls & _leading(calls, turn, strength.call_share)] = strength.tool_call
    out[component == Component.ANSWER] = strength.answer
    return out * _leading(out != 0, torch.zeros_like(turn), strength.sequence_share)


def _leading(chosen: Tensor, group: Tensor, share: float) -> Tensor:
    """bool [L]: the leading `share` of the chosen tokens of every group, rounded up."""
    if share >= 1.0:
        return torch.ones_like(chosen)
    keep = torch.zeros_like(chosen)
    for number in group[chosen].unique().tolist():
        places = (chosen & (group == number)).nonzero()[:, 0]
        keep[places[: math.ceil(share * len(places) - 1e-9)]] = True
    return keep


def sft_token_weights(strengths: Sequence[Tensor], normalization: str, num_prompts: int) -> list[Tensor]:
    """Weights of the SFT term from the strengths of each trace, [L] each (equations 10 and 11).

    Args:
        normalization: "prompt": m / Z_i / #prompts with Z_i the sum of the trace's strengths, all 0 where
        Z_i is;
            "token": m / (tokens of all traces with a strength).
        num_prompts: prompts of the mini-batch, those without an SFT term too.
    """
    if normalization == "prompt":
        return [m / (float(m.sum()) * num_prompts) if m.any() else m for m in strengths]
    if normalization == "token":
        count = max(sum(int((m > 0).sum()) for m in strengths), 1)
        return [m / count for m in strengths]
    raise ValueError(f"sft_normalization={normalization!r} is not one of 'prompt', 'token'")


def policy_token_weight(
    normalization: str,
    length: int,
    *,
    total_tokens: int,
    num_sequences: int,
    max_length: int,
    prompt_tokens: int,
    num_prompts: int,
) -> float:
    """Weight w of one sampled token, from counts over the whole mini-batch, all ranks and micro-batches.

    Args:
        normalization: "prompt" 1/(#prompts * prompt_tokens), "token" 1/N_rl, "sequence" 1/(#sequences *
        length),
            "constant" 1/(#sequences * max_length).
        length: sampled tokens of this sequence.
        total_tokens: N_rl, sampled tokens of all sequences.
        num_sequences: number of sequences with a policy term.
        max_length: the largest number of tokens a rollout may sample.
        prompt_tokens: sampled tokens of all rollouts of this prompt.
        num_prompts: number of prompts.
    """
    if normalization == "prompt":
        return 1.0 / max(num_prompts * prompt_tokens, 1)
    if normalization == "token":
        return 1.0 / max(total_tokens, 1)
    if normalization == "sequence":
        return 1.0 / max(num_sequences * length, 1)
    if normalization == "constant":
        return 1.0 / max(num_sequences * max_length, 1)
    raise ValueError(f"normalization={normalization!r} is not one of {NORMALIZATIONS}")
