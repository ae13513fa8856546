"""FTRL (arXiv 2508.08791): tasks over generated Python tools, scored by which calls give the answers looked
for.

Records as published: `messages`, `tools`, `codes`, `unsolved_set`, `answer`; optionally `ground_truth` (a
list of calls {"name", "arguments"}), from which an expert trace is made, or an `expert_trace`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pact_fast.data.chat import AssistantTurn, ToolCall
from pact_fast.data.formats import THINK_CLOSE
from pact_fast.data.records import Record
from pact_fast.data.traces import Call, trace_from_calls
from pact_fast.envs.answers import answers_of
from pact_fast.envs.base import Outcome
from pact_fast.envs.call_matching import REWARDS
from pact_fast.envs.python_tools import (
    PythonToolsEnv,
    PythonToolsSettings,
    SourceEpisode,
    check_settings,
    solve_scores,
)

STRAY_TAGS = ("<tool_call>", "</tool_call>")


@dataclass(frozen=True)
class FtrlSettings(PythonToolsSettings):
    """reward: "turn_f1" (published: per turn 2s/(n+1) for n calls of which s solve something), "solve_f1"
    (of the whole episode), "call_matching" or "call_matching_greedy" (calls matched with `ground_truth`)."""

    reward: str = "turn_f1"

    def __post_init__(self) -> None:
        check_settings("ftrl", self, ("turn_f1", "solve_f1", *REWARDS))


class BadTruth(ValueError):
    """A record's ground truth fails when its own calls are made."""


class FtrlEnv(PythonToolsEnv):
    """FTRL tasks. Scores: solve_p, solve_r, solve_f1 (evaluation), answer, and call_match where calls are
    known.

    `solved`: every answer of the unsolved set was given by a call. The episode's reward is the mean of its
    turn rewards, or Solve-F1 with reward="solve_f1". A turn without a readable call gets, by the first rule
    that fits: -0.5 empty, -0.3 stray or unreadable tool tags, 1/(1 + answers left) if it holds the final
    answer, 0.5 if all are solved, else 0.
    """

    name = "ftrl"
    packages = ("pytz", "dateutil")
    Settings = FtrlSettings

    def _prepare(self, record: Record) -> Record:
        record = super()._prepare(record)
        if not record.env["unsolved_set"]:
            raise ValueError(f"{record.source}: record {record.id!r}: unsolved_set: is missing or empty")
        if record.env.get("data_source"):  # as published: self/single_hop, self/multi_hop, ...
            record.env["category"] = str(record.env["data_source"]).rsplit("/", 1)[-1]
        return record

    def _read(self, path: Path) -> list[Record]:
        records = self._prepared(super()._read(path))
        good, bad = [], []
        for record in records:
            try:
                if record.env["true_calls"] and not record.expert_trace:
                    trace = self._expert_trace(record, record.env["true_calls"])
                    record = replace(record, expert_trace=trace)
                good.append(record)
            except BadTruth as error:
                bad.append(str(error))
        if bad and not good:
            raise ValueError(f"{path}: no ground truth can be replayed; the first: {bad[0]}")
        if bad:
            listed = "; ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
            told = f"{path}: {len(bad)} of {len(records)} records are left out, their ground truth fails"
            warnings.warn(f"{told}: {listed}", stacklevel=2)
        return good

    def _expert_trace(self, record: Record, truth: Sequence[Call]) -> tuple[dict, ...]:
        """The ground-truth calls, really run, with reasoning that says what each is for."""

        def run(call: Call) -> str:
            episode = self.start([record])
            turn = AssistantTurn("", "", (ToolCall(call[0], dict(call[1]), None, ""),), "", True)
            text = self.step(episode, [turn])[0].tool_responses[0]
            if episode[0].failures:  # a call that fails teaches nothing
                raise BadTruth(f"record {record.id!r}: ground_truth: {call[0]}({call[1]}): {text}"[:300])
            return text

        answer = f"The answer is {', '.join(answers_of(record))}."
        if self.settings.matches_calls:
            answer = f"<answer>{', '.join(answers_of(record))}</answer>"
        return trace_from_calls(record.prompt[-1]["content"], record.tools, truth, run, answer)

    def _turn_reward(self, episode: Any, turn: AssistantTurn, newly: int) -> float:
        readable = [call for call in turn.tool_calls if call.error is None]
        if not readable:
            return self._closing_reward(episode, turn)
        return 2 * newly / (len(readable) + 1)

    def _closing_reward(self, episode: SourceEpisode, turn: AssistantTurn) -> float:
        answers = [a.lower().replace(",", "").strip() for a in answers_of(episode.record)]
        # The tags are looked for in what was written: the parser leaves none of them in the content.
        written = turn.raw.rpartition(THINK_CLOSE)[2] or turn.content
        stray = bool(turn.tool_calls) or any(tag in written for tag in STRAY_TAGS)
        if not turn.content and not stray:
            return -0.5
        if stray:
            return -0.3
        if any(answer in turn.content.lower().replace(",", "") for answer in answers):
            return 1 / (1 + episode.unsolved)
        return 0.5 if episode.unsolved == 0 else 0.0

    def _outcome(self, episode: Any, truncated: str | None) -> Outcome:
        scores = solve_scores(episode) | {"answer": float(self._answered(episode))}
        reward = scores["solve_f1"]
        if self.settings.reward != "solve_f1":
            reward = sum(episode.turn_rewards) / len(episode.turn_rewards) if episode.turn_rewards else -0.5
        return self._book(episode, truncated, reward, episode.unsolved == 0, scores)
