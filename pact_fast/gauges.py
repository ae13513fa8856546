"""Passes without gradient over a step's rollouts: old and reference log-probs, and what they tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from pact_fast.batch import Sample, SampleBuilder
from pact_fast.data.records import Record
from pact_fast.distributed import Sharded, World
from pact_fast.policy import Policy
from pact_fast.scoring import sequence_logprobs


@torch.no_grad()
def score_rollouts(
    policy: Policy,
    builder: SampleBuilder,
    samples: Sequence[Sample],
    records: Mapping[str, Record],
    *,
    temperature: float,
    token_budget: int,
    sharded: Sharded | None = None,
    correction_cap: float | None = None,
) -> dict[str, float]:
    """Fills `old_logprobs` of every policy sample that has none, under its own context; returns the gauges.

    correction_cap: C of the truncated importance weight min(pi_old(y|x) / pi_engine(y|x), C) that multiplies
    every sampled token's advantage (TIS). Prompt-only on both sides, whatever the context of the ratio: an
    engine knows no other log-probs (METHOD section 2).

    Returns:
        `pact/engine_gap`, `pact/engine_gap_max`: |engine - trainer|, prompt-only, sampled tokens; of rollouts
        sampled ahead with what the updates since then changed.
        `pact/trace_gain`: mean of log pi(y|x,h) - log pi(y|x) over sampled tokens of the rollouts that are
        trained under the trace (METHOD section 7). `pact/is_correction`: mean importance weight, with a cap.
        Empty without policy samples.
    """
    chosen = [s for s in samples if s.is_policy]
    if not chosen:
        return {}
    prompts = {s.record_id: torch.tensor(builder.prompt(records[s.record_id]).ids) for s in chosen}
    heads = [
        len(prompts[s.record_id]) if s.prompt_only else len(builder.privileged_prompt(records[s.record_id]))
        for s in chosen
    ]
    bare = [torch.cat([prompts[s.record_id], s.ids[head:]]) for s, head in zip(chosen, heads, strict=True)]
    sharded = sharded or Sharded(policy.model, World())
    scored = _spread_logprobs(
        policy,
        sharded,
        [s.ids for s in chosen] + bare,
        [s.record_id for s in chosen] * 2,
        temperature=temperature,
        token_budget=token_budget,
    )
    gains, gaps, weights = [], [], []
    for i, (sample, head) in enumerate(zip(chosen, heads, strict=True)):
        in_context = torch.cat([torch.zeros(1), scored[i]])
        if sample.old_logprobs is None:
            sample.old_logprobs = in_context
        prompt_only = scored[len(chosen) + i][len(prompts[sample.record_id]) - 1 :]
        sampled = sample.policy_weight[head:] != 0
        assert sample.engine_logprobs is not None
        mismatch = prompt_only - sample.engine_logprobs[head:]
        gaps.append(mismatch[sampled].abs())
        if not sample.prompt_only:
            gains.append((in_context[head:] - prompt_only)[sampled])
        if correction_cap is not None:
            weight = torch.where(sampled, mismatch.exp().clamp(max=correction_cap), 1.0)
            sample.advantages = torch.cat([sample.advantages[:head], sample.advantages[head:] * weight])
            weights.append(weight[sampled])
    gap = torch.cat(gaps)
    row = {"pact/engine_gap": float(gap.mean()), "pact/engine_gap_max": float(gap.max())}
    if gains:
        row["pact/trace_gain"] = float(torch.cat(gains).mean())
    if weights:
        row["pact/is_correction"] = float(torch.cat(weights).mean())
    return row


@torch.no_grad()
def score_reference(
    reference: Policy,
    samples: Sequence[Sample],
    *,
    temperature: float,
    token_budget: int,
    sharded: Sharded | None = None,
) -> None:
    """Fills `ref_logprobs` of every policy sample: the reference's, under the context of the ratio.

    reference: the policy before training: a frozen copy, or a model whose adapters are switched off for this
    pass.
    """
    chosen = [s for s in samples if s.is_policy]
    if not chosen:
        return
    model: Any = reference.model
    with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
        scored = _spread_logprobs(
            reference,
            sharded or Sharded(model, World()),
            [s.ids for s in chosen],
            [s.record_id for s in chosen],
            temperature=temperature,
            token_budget=token_budget,
        )
    for sample, logprobs in zip(chosen, scored, strict=True):
        sample.ref_logprobs = torch.cat([torch.zeros(1), logprobs])


def _spread_logprobs(
    policy: Policy,
    sharded: Sharded,
    sequences: Sequence[Tensor],
    owners: Sequence[str],
    *,
    temperature: float,
    token_budget: int,
) -> list[Tensor]:
    """`sequence_logprobs` on the host of every rank, each rank computing a share."""
    # A rank scores the prompts that are its own, so that their sequences still share a tree.
    world, place = sharded.world, {owner: i for i, owner in enumerate(dict.fromkeys(owners))}
    mine = [i for i, owner in enumerate(owners) if place[owner] % world.size == world.rank]
    with sharded.whole():
        part = sequence_logprobs(
            policy, [sequences[i] for i in mine], temperature=temperature, token_budget=token_budget
        )
    found = world.gather({i: scores.cpu() for i, scores in zip(mine, part, strict=True)})
    scored = {i: scores for share in found for i, scores in share.items()}
    return [scored[i] for i in range(len(sequences))]
