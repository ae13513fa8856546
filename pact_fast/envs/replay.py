"""Expert traces run through their environment: do the tools still answer what the traces say?

A trace whose tool responses the tools do not give teaches the policy a world that its rollouts never meet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pact_fast.data.chat import AssistantTurn, ToolCall
from pact_fast.data.records import Record
from pact_fast.envs.base import Outcome, ToolEnv

SHOWN = 80  # characters of a response that a difference quotes


@dataclass(frozen=True)
class Replay:
    """outcome: what the environment makes of the trace (None where it cannot be started). differences: what
    the tools or the environment say otherwise than the trace, each naming the message."""

    record: Record
    outcome: Outcome | None
    differences: tuple[str, ...]


def replay_traces(env: ToolEnv, records: Sequence[Record]) -> list[Replay]:
    """Plays every record's expert trace as the policy's own turns and compares the responses."""
    return [_replay(env, record) for record in records if record.expert_trace]


def _replay(env: ToolEnv, record: Record) -> Replay:
    try:
        episodes = env.start([record])
    except ValueError as error:
        return Replay(record, None, (str(error),))
    differences: list[str] = []
    trace = record.expert_trace
    for i, message in enumerate(trace):
        if message["role"] != "assistant":
            continue
        result = env.step(episodes, [assistant_turn(message)])[0]
        expected = _followers(trace, i)
        texts = [*result.tool_responses, *([result.user_message] if result.user_message is not None else [])]
        for place, (told, text) in enumerate(zip(expected, texts, strict=False), i + 1):
            if told["content"].strip() != text.strip():
                source = f"tool {told['name']!r}" if told["role"] == "tool" else "the next request"
                says = f"{source} gives {text[:SHOWN]!r}, the trace says {told['content'][:SHOWN]!r}"
                differences.append(f"expert_trace[{place}]: {says}")
        if result.done and i + 1 + len(expected) < len(trace):
            differences.append(f"expert_trace[{i}]: the environment ends here, the trace goes on")
            break
    return Replay(record, env.finish(episodes, [None])[0], tuple(differences))


def assistant_turn(message: Mapping[str, Any]) -> AssistantTurn:
    """An expert's message as the turn that the parser would have read."""
    calls = tuple(ToolCall(c["name"], dict(c["arguments"]), None, "") for c in message["tool_calls"])
    return AssistantTurn(message["reasoning_content"], message["content"], calls, "", True)


def _followers(trace: Sequence[Mapping[str, Any]], position: int) -> list[Mapping[str, Any]]:
    """The messages between an assistant turn and the next one."""
    end = position + 1
    while end < len(trace) and trace[end]["role"] != "assistant":
        end += 1
    return list(trace[position + 1 : end])
