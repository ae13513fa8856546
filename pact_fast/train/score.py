"""The passes without gradient of one step, and what they change in its samples before the update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pact_fast.config import Config, ObjectiveConfig
from pact_fast.data.records import Record
from pact_fast.distributed import Sharded
from pact_fast.objective import shaped_advantages, token_gates
from pact_fast.train.old_logprobs import (
    TokenGaps,
    gap_metrics,
    importance_ratios,
    reference_logprobs,
    score_contexts,
    score_gaps,
    score_metrics,
)
from pact_fast.train.samples import Sample, SampleBuilder
from pact_fast.train.teacher import Teacher
from pact_fast.tree.policy import Policy


def score_step(
    policy: Policy,
    builder: SampleBuilder,
    samples: Sequence[Sample],
    records: Mapping[str, Record],
    config: Config,
    *,
    old: bool,
    gauge: bool,
    sharded: Sharded,
    reference: Teacher | None,
    teacher: Teacher | None,
) -> dict[str, float]:
    """Gaps between contexts, old log-probs, importance ratios and the reference's log-probs, as the objective
    asks for them; returns the gauges.

    Args:
        samples: of rollouts; their advantages, weights and log-probs are set.
        records: by id, those of the samples.
        old: old log-probs are needed whatever the objective says: several updates, or a gauge.
        gauge: measure what no update needs, too.
    """
    o, cap = config.objective, config.objective.importance_ratio_cap
    scoring: dict[str, Any] = {
        "temperature": config.rollout.temperature,
        "token_budget": config.train.token_budget,
    }
    row: dict[str, float] = {}
    learning = [s for s in samples if s.contexts is not None]
    if learning and o.needs_gaps:
        contrast = o.contrast != "none"
        found = score_gaps(
            policy, learning, contrast=contrast, gauge=gauge, sharded=sharded, teacher=teacher, **scoring
        )
        for sample, gaps in zip(learning, found, strict=True):
            learn_from_gaps(sample, gaps, o)
        row |= gap_metrics(found)
    if samples and (old or cap is not None):
        scores = score_contexts(policy, builder, samples, records, sharded=sharded, **scoring)
        row |= score_metrics(samples, scores, cap)
        for sample, score in zip(samples, scores, strict=True):
            if o.ratio_denominator == "context":
                sample.old_logprobs = score.in_context
            if cap is not None:
                sample.advantages = sample.advantages * importance_ratios(score, cap)
    if reference is not None:
        for sample, logprobs in zip(samples, reference_logprobs(reference, samples, **scoring), strict=True):
            sample.ref_logprobs = logprobs
    return row


def learn_from_gaps(sample: Sample, found: TokenGaps, objective: ObjectiveConfig) -> None:
    """Sets the advantages of a sample's tokens, and its distillation weights where they are gated."""
    behind = slice(sample.start, None)
    sample.advantages = sample.advantages.clone()
    sample.advantages[behind] = shaped_advantages(sample.advantages[behind], found.gaps, objective)
    if sample.distill_weight is not None:
        sample.distill_weight = sample.distill_weight.clone()
        sample.distill_weight[behind] *= token_gates(found.gaps, objective)
