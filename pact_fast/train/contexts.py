"""Privileged contexts of a rollout: what stands before y in the place of x.

A source takes a rollout and the other rollouts of its group, and gives token ids or None:

    trace      the expert's trace of the record (`objective.trace_context` says how it follows x)
    peer       the best other rollout of the group that is solved, up to its last turn: x and turns as they
               were sampled. They are in the token tree already, so this context costs no token of its own
    feedback   what the environment says of the failed attempt, at the end of the user message
    hint       the record's field `hint`, a text, at the end of the user message

`objective.privileged` orders the sources; the first that has something is c. Wrong contexts c' are failed
rollouts of the group up to their last turn (`contrast=peer`), or x with the trace of another prompt of the
update.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pact_fast.data.records import Record
from pact_fast.envs.base import feedback_of
from pact_fast.rollout import Rollout

if TYPE_CHECKING:
    from pact_fast.train.samples import SampleBuilder

FEEDBACK = "\n\nAn earlier attempt at this task failed. Feedback on it: {note}"
HINT = "\n\nHint: {note}"
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Contexts:
    """Of one rollout: c as token ids (None: there is none) and where it is from; wrong contexts."""

    right: list[int] | None = None
    source: str | None = None
    wrong: tuple[list[int], ...] = ()


class ContextSources:
    """Finds the contexts of rollouts.

    Args:
        builder: makes the tokens of prompts and traces.
        max_prompt_length: tokens of a context at most; a longer one is passed over.
        context_length: tokens of a context and the rollout after it at most.
    """

    def __init__(
        self, builder: SampleBuilder, max_prompt_length: int | None = None, context_length: int | None = None
    ) -> None:
        self.builder, self.objective = builder, builder.objective
        self.max_prompt_length, self.context_length = max_prompt_length, context_length
        self.sources: dict[str, Callable[[Rollout, Sequence[Rollout]], list[int] | None]] = {
            "trace": self.trace,
            "peer": self.peer,
            "feedback": self.feedback,
            "hint": self.hint,
        }

    def of(self, rollouts: Sequence[Rollout], group: int) -> list[Contexts]:
        """Contexts of each rollout of an update; the `group` ones of a prompt lie beside each other."""
        if not self.objective.shows_privileged:
            return [Contexts()] * len(rollouts)
        prompts = [rollouts[i].record for i in range(0, len(rollouts), group)]
        out = []
        for i, rollout in enumerate(rollouts):
            first = i - i % group
            peers = [rollouts[j] for j in range(first, first + group) if j != i]
            others = prompts[i // group + 1 :] + prompts[: i // group]
            right, source = self._right(rollout, peers)
            out.append(Contexts(right, source, self._wrong(rollout, peers, others)))
        return out

    def _right(self, rollout: Rollout, peers: Sequence[Rollout]) -> tuple[list[int] | None, str | None]:
        for name in self.objective.privileged:
            ids = self.sources[name](rollout, peers)
            if ids is not None and self._fits(ids, rollout):
                return ids, name
        return None, None

    def _wrong(
        self, rollout: Rollout, peers: Sequence[Rollout], others: Sequence[Record]
    ) -> tuple[list[int], ...]:
        found: list[list[int] | None] = []
        if self.objective.contrast == "peer":
            failed = [p for p in peers if p.outcome is not None and not p.outcome.solved]
            found = [earlier_turns(p) for p in sorted(failed, key=lambda p: _reward(p))]
        elif self.objective.contrast == "trace":
            found = [self.builder.context_of(rollout.record, other) for other in others if other.expert_trace]
        fitting = [ids for ids in found if ids is not None and self._fits(ids, rollout)]
        return tuple(fitting[: self.objective.contrast_count])

    def _fits(self, ids: list[int], rollout: Rollout) -> bool:
        if self.max_prompt_length is not None and len(ids) > self.max_prompt_length:
            return False
        return self.context_length is None or len(ids) + len(rollout.token_ids) <= self.context_length

    def trace(self, rollout: Rollout, peers: Sequence[Rollout]) -> list[int] | None:
        record = rollout.record
        return self.builder.privileged_prompt(record) if record.expert_trace else None

    def peer(self, rollout: Rollout, peers: Sequence[Rollout]) -> list[int] | None:
        solved = [p for p in peers if p.outcome is not None and p.outcome.solved]
        ranked = sorted(solved, key=lambda p: (-_reward(p), len(p.token_ids)))
        return next((ids for p in ranked if (ids := earlier_turns(p)) is not None), None)

    def feedback(self, rollout: Rollout, peers: Sequence[Rollout]) -> list[int] | None:
        text = feedback_of(rollout.outcome) if rollout.outcome is not None else None
        return None if text is None else self._with_note(rollout.record, FEEDBACK, text)

    def hint(self, rollout: Rollout, peers: Sequence[Rollout]) -> list[int] | None:
        text = hint_of(rollout.record)
        return None if text is None else self._with_note(rollout.record, HINT, text)

    def _with_note(self, record: Record, template: str, text: str) -> list[int]:
        return self.builder.chat.prompt(record.prompt, record.tools, note=template.format(note=text)).ids


def _reward(rollout: Rollout) -> float:
    return rollout.outcome.reward if rollout.outcome is not None else 0.0


def earlier_turns(rollout: Rollout) -> list[int] | None:
    """x and a rollout's tokens up to its last turn, which is its answer; None where it has one turn alone."""
    sampled_in = [turn for turn, drawn in zip(rollout.turns, rollout.sampled, strict=True) if drawn]
    if not sampled_in or sampled_in[-1] == sampled_in[0]:
        return None
    end = next(
        i
        for i, (turn, drawn) in enumerate(zip(rollout.turns, rollout.sampled, strict=True))
        if drawn and turn == sampled_in[-1]
    )
    return rollout.prompt.ids + rollout.token_ids[:end]


def hint_of(record: Record) -> str | None:
    """The record's hint; None without. ValueError where it is no text."""
    hint = record.env.get("hint")
    if hint is None or (isinstance(hint, str) and hint.strip()):
        return hint
    raise ValueError(
        f"{record.source}: record {record.id!r}, field 'hint': {hint!r} is no text: give a non-empty string, "
        "or leave the field out"
    )


def context_metrics(
    contexts: Sequence[Contexts], rollouts: Sequence[Rollout], builder: SampleBuilder, *, words: bool
) -> dict[str, float]:
    """`pact/context_share`: share of rollouts that have a privileged context; with `words`
    `pact/context_words`: of the words that those rollouts' models wrote, the share that stands in c and not
    in x, a sign of copying its style."""
    if not contexts:
        return {}
    shown = [(c.right, r) for c, r in zip(contexts, rollouts, strict=True) if c.right is not None]
    row = {"pact/context_share": len(shown) / len(contexts)}
    if words and shown:
        written = taken = 0
        for right, rollout in shown:
            ids = [t for t, drawn in zip(rollout.token_ids, rollout.sampled, strict=True) if drawn]
            only_there = _words(builder, right) - _words(builder, rollout.prompt.ids)
            found = WORD.findall(builder.chat.decode(ids))
            written, taken = written + len(found), taken + sum(word in only_there for word in found)
        row["pact/context_words"] = taken / max(written, 1)
    return row


def _words(builder: SampleBuilder, ids: list[int]) -> set[str]:
    return set(WORD.findall(builder.chat.decode(ids)))
