"""From rollouts and traces to weighted sequences: which ones a step scores, and each token's weight.

A rollout may stand under several contexts at once (x, c, wrong ones), each with its own role: policy term,
student, teacher, or log-probs alone. Weights decide; nothing here knows a method's name. All normalisation is
in the weights, from global counts, before anything is packed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from pact_fast.config import ObjectiveConfig
from pact_fast.data.chat import ChatFormat, Tokens
from pact_fast.data.records import Record
from pact_fast.objective import (
    SFTStrength,
    policy_token_weight,
    sft_token_strengths,
    sft_token_weights,
)
from pact_fast.rollout import Rollout
from pact_fast.train.contexts import Contexts, ContextSources

T = TypeVar("T")


@dataclass
class Sample:
    """One sequence and what it contributes. Every tensor is [L], aligned with `ids`; entry p speaks of
    predicting ids[p] from the tokens before it. A sample is either of a rollout or a trace (sft_weight).

    start: tokens of the context before a rollout. contexts: of a rollout that learns from them; its tokens
    under c are `teacher_ids`. distill_weight: of the divergence of each position from the same one there.
    """

    record_id: str
    ids: Tensor
    policy_weight: Tensor
    advantages: Tensor
    sft_weight: Tensor
    old_logprobs: Tensor | None = None
    engine_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    prompt_only: bool = False
    start: int = 0
    distill_weight: Tensor | None = None
    contexts: Contexts | None = None

    @property
    def is_policy(self) -> bool:
        return self.engine_logprobs is not None

    def live(self) -> Tensor:
        """Positions with a term of the policy or the SFT loss."""
        return ((self.policy_weight != 0) | (self.sft_weight != 0)).nonzero()[:, 0]

    def distilled(self) -> Tensor:
        """Positions whose distribution is to come near the teacher's."""
        if self.distill_weight is None:
            return torch.empty(0, dtype=torch.int64)
        return (self.distill_weight != 0).nonzero()[:, 0]

    def drawn(self) -> Tensor:
        """bool [L]: tokens that the policy sampled and a term speaks of."""
        drawn = self.policy_weight != 0
        return drawn if self.distill_weight is None else drawn | (self.distill_weight != 0)

    @property
    def teacher_ids(self) -> Tensor:
        """c and the tokens after the sample's own context."""
        assert self.contexts is not None
        assert self.contexts.right is not None
        return self.under(self.contexts.right)

    def under(self, context: Sequence[int]) -> Tensor:
        """The sample's tokens after another context."""
        return torch.cat([torch.tensor(list(context)), self.ids[self.start :]])


def _made_once(made: dict[int, tuple[Record, T]], record: Record, make: Callable[[], T]) -> T:
    """What was made of this very record, or is now; the record is kept, so that its id stays its own."""
    if id(record) not in made:
        made[id(record)] = record, make()
    return made[id(record)][1]


class SampleBuilder:
    """Builds the samples of a step; the token form of prompts and traces is made once a record and kept.

    Args:
        max_completion_length: tokens after the prompt, for `normalization=constant`.
        max_prompt_length, context_length: as in `ContextSources`.
    """

    def __init__(
        self,
        chat: ChatFormat,
        objective: ObjectiveConfig,
        max_completion_length: int,
        *,
        max_prompt_length: int | None = None,
        context_length: int | None = None,
    ) -> None:
        self.chat, self.objective, self.max_length = chat, objective, max_completion_length
        self.contexts = ContextSources(self, max_prompt_length, context_length)
        # By the record itself: ids are unique in a split, two files may well have the same ones.
        self._prompts: dict[int, tuple[Record, Tokens]] = {}
        self._traces: dict[int, tuple[Record, Tokens]] = {}
        self._privileged: dict[int, tuple[Record, list[int]]] = {}

    def prompt(self, record: Record) -> Tokens:
        """Tokens of x."""
        return _made_once(self._prompts, record, lambda: self.chat.prompt(record.prompt, record.tools))

    def privileged_prompt(self, record: Record) -> list[int]:
        """Token ids of c(x, h)."""
        return _made_once(self._privileged, record, lambda: self.context_of(record, record))

    def context_of(self, record: Record, expert: Record) -> list[int]:
        """Token ids of x of one record with the trace of another, or its own."""
        messages = self.shown_trace(expert)
        if self.objective.trace_context == "message":
            text = self.chat.render_trace(messages, observations=self.objective.trace_observations)
            return self.chat.prompt(record.prompt, record.tools, privileged=text).ids
        # h ends on a tool response (or a request), and so on the header that the rollout's first turn
        # follows.
        return (self.prompt(record) + self.chat.trace(messages)).ids

    def shown_trace(self, record: Record) -> list[dict]:
        """The messages of h: what of the expert's trace the objective lets through."""
        o, messages = self.objective, list(record.expert_trace)
        last = messages[-1] if messages else {"role": None}
        if not o.trace_answer and last["role"] == "assistant" and not last.get("tool_calls"):
            messages = messages[:-1]
        shown = []
        for message in messages:
            if message["role"] == "tool" and not o.trace_observations:
                message = {**message, "content": ""}
            elif message["role"] == "assistant" and not (o.trace_reasoning and o.trace_calls):
                left_out = [("reasoning_content", "", o.trace_reasoning), ("tool_calls", [], o.trace_calls)]
                message = message | {key: empty for key, empty, kept in left_out if not kept}
            shown.append(message)
        return shown

    def trace(self, record: Record) -> Tokens:
        """x + h as one token sequence with components."""
        return _made_once(
            self._traces, record, lambda: self.prompt(record) + self.chat.trace(self.shown_trace(record))
        )

    def rollout_samples(
        self,
        rollouts: Sequence[Rollout],
        advantages: Sequence[Tensor],
        anchored: dict[str, bool],
        scale: float,
        group: int,
        contexts: Sequence[Contexts] | None = None,
    ) -> list[Sample]:
        """The samples of rollouts: one under c or x, or under both where both have a role.

        Args:
            rollouts: of a mini-batch, the `group` ones of a prompt beside each other.
            advantages: per rollout, one value a turn.
            anchored: per record id, whether the prompt-only ratio stands in for the trace-conditioned one.
            scale: factor on the whole policy term (1, or 1 - mu).
            contexts: per rollout; None looks for them here.
        """
        o = self.objective
        counts = [r.num_sampled for r in rollouts]
        contexts = self.contexts.of(rollouts, group) if contexts is None else contexts
        samples = []
        for i, (rollout, advantage, shown) in enumerate(zip(rollouts, advantages, contexts, strict=True)):
            first = i - i % group
            weight = scale * policy_token_weight(
                o.normalization,
                counts[i],
                total_tokens=sum(counts),
                num_sequences=len(rollouts),
                max_length=self.max_length,
                prompt_tokens=sum(counts[first : first + group]),
                num_prompts=len(rollouts) // group,
            )
            under_c, under_x = self._shares(shown, anchored[rollout.record.id])
            learns = o.distillation != "none" and shown.right is not None
            if under_c:
                assert shown.right is not None
                samples.append(self._sample(rollout, advantage, shown.right, under_c * weight))
            if under_x or learns:
                policy = under_x * weight if o.has_reward_rows else 0.0
                sample = self._sample(rollout, advantage, rollout.prompt.ids, policy, prompt_only=True)
                if learns:
                    sample.contexts = shown
                if learns and o.diverges:
                    drawn = torch.tensor([False] * sample.start + rollout.sampled)
                    sample.distill_weight = drawn.float() * weight * o.distillation_weight
                samples.append(sample)
        return samples

    def _shares(self, shown: Contexts, anchored: bool) -> tuple[float, float]:
        """Weights of the policy term under c and under x."""
        o = self.objective
        if o.rl_context == "prompt" or anchored or shown.right is None:
            return 0.0, 1.0
        return (o.trace_share, 1.0 - o.trace_share) if o.rl_context == "both" else (1.0, 0.0)

    def _sample(
        self,
        rollout: Rollout,
        advantage: Tensor,
        head: Sequence[int],
        weight: float,
        *,
        prompt_only: bool = False,
    ) -> Sample:
        start = len(head)
        ids = torch.tensor([*head, *rollout.token_ids])
        policy_weight, values, engine = torch.zeros(3, len(ids))
        policy_weight[start:] = torch.tensor(rollout.sampled).float() * weight
        values[start:] = advantage[torch.tensor(rollout.turns)]
        engine[start:] = torch.tensor(rollout.logprobs)
        return Sample(
            rollout.record.id,
            ids,
            policy_weight,
            values,
            torch.zeros(len(ids)),
            old_logprobs=None if self.objective.ratio_denominator == "context" else engine,
            engine_logprobs=engine,
            prompt_only=prompt_only,
            start=start,
        )

    def trace_samples(
        self, records: Sequence[Record], strength: SFTStrength, scale: float, anchored: dict[str, bool]
    ) -> list[Sample]:
        """One sample a record of the mini-batch that has an SFT term: teacher forcing of h after x.

        Args:
            anchored: per record id; such a record has no SFT term (unless `sft_on_anchored`) but counts as a
                prompt of the batch.
            scale: factor on the whole SFT term.
        """
        taught = [r for r in records if self.objective.sft_on_anchored or not anchored[r.id]]
        tokens = [self.trace(r) for r in taught]
        strengths = [sft_token_strengths(t.components, t.turns, t.levels, strength) for t in tokens]
        weights = sft_token_weights(strengths, self.objective.sft_normalization, len(records))
        return [
            Sample(
                record.id,
                torch.tensor(t.ids),
                torch.zeros(len(t)),
                torch.zeros(len(t)),
                w * scale,
            )
            for record, t, w in zip(taught, tokens, weights, strict=True)
        ]


def needed(sample: Sample, objective: ObjectiveConfig) -> bool:
    """Whether a sample can change the loss or its gradient."""
    if not sample.is_policy:
        return bool((sample.sft_weight != 0).any())
    if sample.contexts is not None:  # its advantages are not known yet, or its distributions teach
        return True
    if not objective.skip_zero_advantage or objective.entropy_coef or objective.beta:
        return True
    return bool(((sample.advantages != 0) & (sample.policy_weight != 0)).any())


def trim(sample: Sample) -> Sample:
    """Drops the tokens behind the last one with a loss term: they are predicted by nobody and seen by
    nobody."""
    live = torch.cat([sample.live(), sample.distilled()])
    end = max(int(live.max()) + 1 if len(live) else 1, sample.start)
    cut: dict[str, Any] = {k: v[:end] for k, v in vars(sample).items() if isinstance(v, Tensor)}
    return replace(sample, **cut)
