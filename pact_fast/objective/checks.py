"""Which values of the objective cannot be used together: each with the way out."""

from __future__ import annotations

from collections.abc import Iterator

from pact_fast.objective.advantages import ADVANTAGE_MODES
from pact_fast.objective.presets import SOURCES, ObjectiveConfig
from pact_fast.objective.weights import NORMALIZATIONS

Problem = tuple[str, object, str]  # key, its value, what to give


def objective_problems(o: ObjectiveConfig) -> Iterator[Problem]:
    """What is wrong with values that are fine one by one."""
    if o.advantages not in ADVANTAGE_MODES:
        yield "advantages", o.advantages, f"one of {', '.join(ADVANTAGE_MODES)}"
    if o.normalization not in NORMALIZATIONS:
        yield "normalization", o.normalization, f"one of {', '.join(NORMALIZATIONS)}"
    if (o.reasoning_anneal == "sequence") != (o.call_anneal == "sequence"):
        want = "sequence to both reasoning_anneal and call_anneal, or to none: it anneals both as one"
        yield "call_anneal", o.call_anneal, want
    if o.trace_answer and o.rl_context in ("trace", "both") and o.trace_context == "concat":
        want = "false with trace_context=concat: a rollout's first turn cannot follow an answer"
        yield "trace_answer", o.trace_answer, want
    if (o.mu_start is None) != (o.mu_end is None):
        yield "mu_end", o.mu_end, "both mu_start and mu_end, or none"
    if o.importance_ratio_cap is not None and o.ratio_denominator == "rollout":
        want = "none with ratio_denominator=rollout: that ratio has the engine's log-probs in it already"
        yield "importance_ratio_cap", o.importance_ratio_cap, want
    if not o.privileged or (set(o.privileged) - set(SOURCES)) or len(set(o.privileged)) < len(o.privileged):
        yield "privileged", o.privileged, f"some of {', '.join(SOURCES)}, each once, the best first"
    yield from _distillation_problems(o)
    yield from _nothing_to_train(o)


def _distillation_problems(o: ObjectiveConfig) -> Iterator[Problem]:
    if o.distillation == "none":
        for name in ("contrast", "teacher", "distillation_gate"):
            value, default = getattr(o, name), getattr(ObjectiveConfig(), name)
            if value != default:
                yield name, value, f"{default} without distillation: nothing is distilled"
        return
    if o.rl_context == "none":
        yield "distillation", o.distillation, "none with rl_context=none: it has no rollouts"
    if o.rl_context == "trace" and not o.diverges:
        want = "a divergence with rl_context=trace, or rl_context=prompt: advantages of y under x change"
        yield "distillation", o.distillation, want
    if o.contrast != "none" and not o.needs_gaps:
        yield "contrast", o.contrast, "none, or distillation=sampled or modulate, or a distillation_gate"
    if o.distillation == "modulate" and not o.reward_weight:
        yield "reward_weight", o.reward_weight, "more than 0 with distillation=modulate, which changes it"
    if o.distillation == "modulate" and o.distillation_gate is not None:
        yield "distillation_gate", o.distillation_gate, "none with distillation=modulate, which has its own"


def _nothing_to_train(o: ObjectiveConfig) -> Iterator[Problem]:
    has_rl, has_sft = o.rl_context != "none", o.sft_targets != "none" and o.sft_end > 0
    if not has_rl and not has_sft:
        yield "sft_targets", o.sft_targets, "a term to train: rl_context is none, too"
    if has_rl and not has_sft and not o.reward_weight and o.distillation == "none":
        yield "reward_weight", o.reward_weight, "more than 0: there is no distillation and no SFT term"
    if has_sft and not has_rl and not o.sft_weight and o.mu_start is None:
        yield "sft_weight", o.sft_weight, "a weight above 0: it is the only term"
    if has_rl and o.rl_start >= 1 and not has_sft:
        yield "rl_start", o.rl_start, "a share below 1: the policy term, the only one, never starts"
