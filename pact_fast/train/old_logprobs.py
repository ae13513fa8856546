"""Passes without gradient over a step's samples: old and reference log-probs, gaps between contexts.

Everything here returns what it computed; the trainer puts it where it belongs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pact_fast.data.records import Record
from pact_fast.distributed import Sharded, World
from pact_fast.objective import token_gaps
from pact_fast.train.samples import Sample, SampleBuilder
from pact_fast.train.teacher import Teacher
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
    bare = [torch.cat([prompts[s.record_id], s.ids[s.start :]]) for s in samples]
    scored = _spread_logprobs(
        policy,
        sharded or Sharded(policy.model, World()),
        [s.ids for s in samples] + bare,
        [s.record_id for s in samples] * 2,
        temperature=temperature,
        token_budget=token_budget,
    )
    scores = []
    for i, sample in enumerate(samples):
        start = sample.start
        prompt_only = scored[len(samples) + i][len(prompts[sample.record_id]) - 1 :]
        assert sample.engine_logprobs is not None
        scores.append(
            ContextScores(
                start,
                torch.cat([torch.zeros(1), scored[i]]),
                prompt_only,
                sample.drawn()[start:],
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


def score_metrics(
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


@dataclass(frozen=True)
class TokenGaps:
    """Of one sample that learns from contexts, [n] each, n = L - start: its gaps
    (pact_fast.objective.distillation), log-probs under c by the teacher, under x by the policy, and under
    wrong contexts on average; None where not asked for or not there. sampled: bool, tokens that count."""

    gaps: Tensor
    privileged: Tensor
    prompt_only: Tensor | None
    wrong: Tensor | None
    sampled: Tensor


@torch.no_grad()
def score_gaps(
    policy: Policy,
    samples: Sequence[Sample],
    *,
    contrast: bool,
    gauge: bool,
    temperature: float,
    token_budget: int,
    sharded: Sharded | None = None,
    teacher: Teacher | None = None,
) -> list[TokenGaps]:
    """How much likelier the tokens of each sample are under its contexts; with a live teacher in one pass.

    Args:
        samples: that have contexts (`Sample.contexts`, c among them).
        contrast: gaps are to wrong contexts; 0 where a sample has none.
        gauge: score the tokens under x even where no gap needs it.
        teacher: weights that read c and wrong contexts; None: the policy's own.
    """
    own = sharded or Sharded(policy.model, World())
    scoring: dict[str, Any] = {"temperature": temperature, "token_budget": token_budget}
    read: list[tuple[int, Tensor]] = []  # sample, sequence that the teacher reads: c first
    for i, sample in enumerate(samples):
        assert sample.contexts is not None
        assert sample.contexts.right is not None
        read += [(i, sample.under(ids)) for ids in (sample.contexts.right, *sample.contexts.wrong)]
    bare = [(i, s.ids) for i, s in enumerate(samples) if gauge or not contrast]
    if teacher is None:
        both = read + bare
        names = [samples[i].record_id for i, _ in both]
        scored = _spread_logprobs(policy, own, [ids for _, ids in both], names, **scoring)
    else:
        with teacher.reading():
            names = [samples[i].record_id for i, _ in read]
            scored = _spread_logprobs(
                teacher.policy, teacher.sharded, [ids for _, ids in read], names, **scoring
            )
        names = [samples[i].record_id for i, _ in bare]
        scored += _spread_logprobs(policy, own, [ids for _, ids in bare], names, **scoring)
    under: list[list[Tensor]] = [[] for _ in samples]
    for (i, _), logprobs in zip(read + bare, scored, strict=True):
        under[i].append(logprobs[len(logprobs) - (len(samples[i].ids) - samples[i].start) :])
    out = []
    for sample, (right, *rest) in zip(samples, under, strict=True):
        assert sample.contexts is not None
        wrong, plain = rest[: len(sample.contexts.wrong)], rest[len(sample.contexts.wrong) :]
        bare_logprobs = plain[0] if plain else None
        if contrast and not wrong:
            gaps = torch.zeros_like(right)
        else:
            gaps = token_gaps(right, bare_logprobs, wrong if contrast else [])
        shown = torch.stack(wrong).mean(0) if wrong else None
        out.append(TokenGaps(gaps, right, bare_logprobs, shown, sample.drawn()[sample.start :]))
    return out


def gap_metrics(found: Sequence[TokenGaps]) -> dict[str, float]:
    """`pact/gap`: mean gap of the sampled tokens. `pact/divergence`, `pact/divergence_wrong`: mean of
    log pi(y|x) - log pi(y|c) and of the same with wrong contexts, the sampled estimates of the reverse KL."""
    if not found:
        return {}
    row = {"pact/gap": float(torch.cat([f.gaps[f.sampled] for f in found]).mean())}
    for name, part in (("pact/divergence", "privileged"), ("pact/divergence_wrong", "wrong")):
        gone = [
            (f.prompt_only - getattr(f, part))[f.sampled]
            for f in found
            if f.prompt_only is not None and getattr(f, part) is not None
        ]
        if gone:
            row[name] = float(torch.cat(gone).mean())
    return row


@torch.no_grad()
def reference_logprobs(
    reference: Teacher,
    samples: Sequence[Sample],
    *,
    temperature: float,
    token_budget: int,
) -> list[Tensor]:
    """The reference's log-probs of policy samples, [L] each, under the context of the ratio; entry 0 is 0."""
    if not samples:
        return []
    with reference.reading():
        scored = _spread_logprobs(
            reference.policy,
            reference.sharded,
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
