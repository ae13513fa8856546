"""Passes without gradient over a step's samples: old and reference log-probs, and what their gaps tell.

Everything here returns what it computed; the trainer puts it where it belongs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pact_fast.data.records import Record
from pact_fast.distributed import Sharded, World
from pact_fast.train.batch import Sample, SampleBuilder
from pact_fast.tree.policy import Policy
from pact_fast.tree.scoring import sequence_logprobs


@dataclass(frozen=True)
class ContextScores:
    """Log-probs of one policy sample of length L whose context has `start` tokens."""

    start: int
    in_context: Tensor  # [L] under the sample's own context; entry 0 is 0
    prompt_only: Tensor  # [L - start] of the tokens after the context, under x
    sampled: Tensor  # bool [L - start] tokens that the policy drew
    mismatch: Tensor  # [L - start] prompt_only minus the engine's


@torch.no_grad()
def score_contexts(
    policy: Policy,
    builder: SampleBuilder,
    samples: Sequence[Sample],
    records: Mapping[str, Record],
    *,
    temperature: float,
    token_budget: int,
    sharded: Sharded | None = None,
) -> list[ContextScores]:
    """Log-probs of policy samples with the current weights, under their own context and under x, in one pass.

    Args:
        samples: policy samples (`Sample.is_policy`); nothing of them is changed.
        records: by id, the records of all of them.
    """
    prompts = {s.record_id: torch.tensor(builder.prompt(records[s.record_id]).ids) for s in samples}
    starts = [
        len(prompts[s.record_id]) if s.prompt_only else len(builder.privileged_prompt(records[s.record_id]))
        for s in samples
    ]
    bare = [
        torch.cat([prompts[s.record_id], s.ids[start:]]) for s, start in zip(samples, starts, strict=True)
    ]
    scored = _spread_logprobs(
        policy,
        sharded or Sharded(policy.model, World()),
        [s.ids for s in samples] + bare,
        [s.record_id for s in samples] * 2,
        temperature=temperature,
        token_budget=token_budget,
    )
    scores = []
    for i, (sample, start) in enumerate(zip(samples, starts, strict=True)):
        prompt_only = scored[len(samples) + i][len(prompts[sample.record_id]) - 1 :]
        assert sample.engine_logprobs is not None
        scores.append(
            ContextScores(
                start,
                torch.cat([torch.zeros(1), scored[i]]),
                prompt_only,
                sample.policy_weight[start:] != 0,
                prompt_only - sample.engine_logprobs[start:],
            )
        )
    return scores


def importance_ratios(scores: ContextScores, cap: float) -> Tensor:
    """Truncated importance ratio min(pi_old(y|x) / pi_engine(y|x), cap) of every token: [L], 1 where nothing
    was sampled.

    Prompt-only on both sides, whatever the context of the policy ratio: an engine knows no other log-probs.
    """
    ratios = torch.where(scores.sampled, scores.mismatch.exp().clamp(max=cap), 1.0)
    return torch.cat([torch.ones(scores.start), ratios])


def context_metrics(
    samples: Sequence[Sample], scores: Sequence[ContextScores], cap: float | None = None
) -> dict[str, float]:
    """The gauges of a scoring pass; empty without policy samples.

    `pact/logprob_mismatch`, `_max`: |engine - trainer|, prompt-only, sampled tokens; of rollouts sampled
    ahead with what the updates since then changed. `pact/trace_gain`: mean of log pi(y|x,h) - log pi(y|x)
    over sampled tokens of the rollouts trained under the trace, also of those of positive and of negative
    advantage (`_positive`, `_negative`). `pact/is_correction`: mean importance
    ratio, with a cap.
    """
    if not scores:
        return {}
    gap = torch.cat([s.mismatch[s.sampled].abs() for s in scores])
    row = {"pact/logprob_mismatch": float(gap.mean()), "pact/logprob_mismatch_max": float(gap.max())}
    shown = [(a, s) for a, s in zip(samples, scores, strict=True) if not a.prompt_only]
    if shown:
        gain = torch.cat([(s.in_context[s.start :] - s.prompt_only)[s.sampled] for _, s in shown])
        advantage = torch.cat([a.advantages[s.start :][s.sampled] for a, s in shown])
        row["pact/trace_gain"] = float(gain.mean())
        for sign, chosen in (("positive", advantage > 0), ("negative", advantage < 0)):
            if chosen.any():
                row[f"pact/trace_gain_{sign}"] = float(gain[chosen].mean())
    if cap is not None:
        ratios = torch.cat([importance_ratios(s, cap)[s.start :][s.sampled] for s in scores])
        row["pact/is_correction"] = float(ratios.mean())
    return row


@torch.no_grad()
def reference_logprobs(
    reference: Policy,
    samples: Sequence[Sample],
    *,
    temperature: float,
    token_budget: int,
    sharded: Sharded | None = None,
) -> list[Tensor]:
    """The reference's log-probs of policy samples, [L] each, under the context of the ratio; entry 0 is 0.

    reference: the policy before training: a frozen copy, or a model whose adapters are switched off for this
    pass.
    """
    if not samples:
        return []
    model: Any = reference.model
    with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
        scored = _spread_logprobs(
            reference,
            sharded or Sharded(model, World()),
            [s.ids for s in samples],
            [s.record_id for s in samples],
            temperature=temperature,
            token_budget=token_budget,
        )
    return [torch.cat([torch.zeros(1), logprobs]) for logprobs in scored]


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

    def score() -> dict[int, Tensor]:
        if not mine:
            return {}
        part = sequence_logprobs(
            policy, [sequences[i] for i in mine], temperature=temperature, token_budget=token_budget
        )
        return {i: scores.cpu() for i, scores in zip(mine, part, strict=True)}

    scored = {i: scores for share in sharded.apart("score", score) for i, scores in share.items()}
    return [scored[i] for i in range(len(sequences))]
