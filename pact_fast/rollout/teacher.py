"""A teacher that solves an environment's tasks with its tools: a server that speaks OpenAI chat
completions, or a model of our own through the rollout engine. Both go through a `Recorder`, which writes
down each episode.
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pact_fast.data.chat import AssistantTurn, ChatFormat, ToolCall
from pact_fast.data.formats import HERMES, LLAMA
from pact_fast.data.parsing import parse_turn
from pact_fast.data.records import Record, RecordError, parse_record
from pact_fast.data.traces import trace_problem
from pact_fast.envs.base import Outcome, StepResult, ToolEnv
from pact_fast.envs.python_tools import matches
from pact_fast.rollout.engine import Engine, RolloutError
from pact_fast.rollout.http.client import InvalidResponse, RemoteServer, RetryableError
from pact_fast.rollout.loop import RolloutLimits, collect_rollouts


@dataclass(frozen=True)
class Attempt:
    """One try of a teacher at a task. trace: its messages, in the form of records. dropped: why it is not
    kept,
    None where it is. Tokens as the server counts them."""

    record_id: str
    sample: int
    trace: tuple[dict, ...]
    dropped: str | None
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class Played:
    """An episode written down: its messages in the form of records, and what was wrong with a turn."""

    record: Record
    inner: Any
    messages: list[dict] = field(default_factory=list)
    malformed: bool = False


class Recorder:
    """An environment that writes down what is played in another; safe to use from many threads."""

    def __init__(self, env: ToolEnv) -> None:
        self.env, self.name = env, env.name
        self.finished: list[tuple[Played, Outcome, str | None]] = []
        self._lock = threading.Lock()

    def records(self, split: str) -> list[Record]:
        return self.env.records(split)

    def start(self, records: Sequence[Record]) -> list[Played]:
        with self._lock:
            return [Played(r, e) for r, e in zip(records, self.env.start(records), strict=True)]

    def step(self, episodes: Sequence[Played], turns: Sequence[AssistantTurn]) -> list[StepResult]:
        with self._lock:
            results = self.env.step([e.inner for e in episodes], turns)
        for played, turn, result in zip(episodes, turns, results, strict=True):
            played.malformed |= any(call.error is not None for call in turn.tool_calls)
            calls = [{"name": c.name, "arguments": c.arguments or {}} for c in turn.tool_calls]
            told = {"reasoning_content": turn.reasoning, "content": turn.content, "tool_calls": calls}
            played.messages.append({"role": "assistant", **told})
            for call, text in zip(calls, result.tool_responses, strict=False):
                played.messages.append({"role": "tool", "name": call["name"], "content": text})
            if result.user_message is not None:
                played.messages.append({"role": "user", "content": result.user_message})
        return results

    def finish(self, episodes: Sequence[Played], truncated: Sequence[str | None]) -> list[Outcome]:
        with self._lock:
            outcomes = self.env.finish([e.inner for e in episodes], truncated)
            self.finished += zip(episodes, outcomes, truncated, strict=True)
        return outcomes

    def close(self) -> None:
        self.env.close()


def judge(played: Played, outcome: Outcome, truncated: str | None) -> str | None:
    """Why an episode is no expert trace, None where it is one: it ended by itself, is well formed, and its
    final answer or its last tool response verifies."""
    if truncated is not None:
        return truncated
    if played.malformed:
        return "malformed_turn"
    problem = trace_problem(played.messages, played.record.tools)
    if problem is not None:
        return problem
    record = played.record
    raw = {"prompt": list(record.prompt), "tools": list(record.tools), "expert_trace": played.messages}
    try:
        parse_record({"id": record.id, **raw}, file=record.source or "teacher", line=0)
    except RecordError:
        return "malformed_turn"
    solved = outcome.solved or outcome.scores.get("answer") == 1.0
    return None if solved or _last_response_verifies(played) else "unverified"


def _last_response_verifies(played: Played) -> bool:
    env = played.record.env
    golds = env.get("answers") or ([env["answer"]] if env.get("answer") else [])
    last = next((m["content"] for m in reversed(played.messages) if m["role"] == "tool"), None)
    return bool(golds) and last is not None and all(matches(last, str(gold)) for gold in golds)


# -- a server
# -------------------------------------------------------------------------------------------------


class Refused(RuntimeError):
    """The server does not take this request (a prompt past its context, say); another one it may."""


@dataclass
class ChatServer:
    """A server of OpenAI chat completions.

    url: with its path, as http://host:8000/v1. key: bearer token. timeout: seconds for one answer.
    retry_timeout: seconds that one request is tried for before RolloutError. backoff: seconds before the
    second try, doubled with every further one up to half a minute. retries: counted by cause.
    """

    url: str
    model: str
    key: str | None = None
    timeout: float = 300.0
    retry_timeout: float = 1800.0
    backoff: float = 1.0
    retries: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._server = RemoteServer(self.url, token=self.key, timeout=self.timeout)
        self._lock = threading.Lock()

    def count(self, cause: str) -> None:
        with self._lock:
            self.retries[cause] += 1

    def complete(
        self, messages: Sequence[Mapping], tools: Sequence[Mapping] = (), **options: Any
    ) -> tuple[dict[str, Any], Counter[str]]:
        """One choice, {"message", "finish_reason"}, and the tokens it cost.

        Raises Refused, or RolloutError where no try had an answer or the server refuses all.
        """
        body = {"model": self.model, "messages": list(messages), **options}
        if tools:
            body["tools"] = list(tools)
        deadline, wait = time.monotonic() + self.retry_timeout, self.backoff
        while True:
            try:
                answer = self._server.call("POST", "/chat/completions", body)
                return _choice(answer, self.url), _usage(answer)
            except RetryableError as error:
                self.count(_cause(error))
                if time.monotonic() + wait > deadline:
                    raise RolloutError(f"{error}; tried for {self.retry_timeout:g} s") from error
            except RolloutError as error:
                if re.search(r"status (?:400|413|422)\b", str(error)):
                    raise Refused(str(error)) from error
                raise
            time.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(2 * wait, 30.0)


def _cause(error: RetryableError) -> str:
    status = re.search(r"status (\d+)", str(error))
    if isinstance(error, InvalidResponse):
        return "malformed answer"
    return f"status {status.group(1)}" if status else "no answer"


def _choice(answer: Mapping[str, Any], url: str) -> dict[str, Any]:
    try:
        choice = answer["choices"][0]
        if not isinstance(choice["message"], dict):
            raise TypeError("message")
        return choice
    except (KeyError, IndexError, TypeError) as error:
        raise InvalidResponse(
            f"{url}: the answer has no choice with a message: {str(answer)[:200]}"
        ) from error


def _usage(answer: Mapping[str, Any]) -> Counter[str]:
    usage = answer.get("usage") or {}
    return Counter({key: int(usage.get(key) or 0) for key in ("prompt_tokens", "completion_tokens")})


def read_turn(choice: Mapping[str, Any]) -> AssistantTurn:
    """The turn in a choice: calls in the protocol's own field, else written in the text, in the Hermes or the
    Llama way, as a server without a parser for its model leaves them."""
    message = choice["message"]
    text = message.get("content") or ""
    parsed = parse_turn(text, HERMES, complete=True)
    reasoning = message.get("reasoning_content") or message.get("reasoning") or parsed.reasoning
    calls = tuple(_call(call) for call in message.get("tool_calls") or ())
    if not calls and not parsed.tool_calls:
        bare = parse_turn(text, LLAMA, complete=True)
        parsed = bare if any(call.error is None for call in bare.tool_calls) else parsed
    return AssistantTurn(reasoning.strip(), parsed.content.strip(), calls or parsed.tool_calls, text, True)


def _call(call: Any) -> ToolCall:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return ToolCall("", None, "the call has no function with a name", str(call))
    name, arguments = function["name"], function.get("arguments") or {}
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except json.JSONDecodeError as error:
        return ToolCall(name, None, f"arguments are not JSON: {error}", str(call))
    if not isinstance(arguments, dict):
        return ToolCall(name, None, "arguments must be a JSON object", str(call))
    return ToolCall(name, arguments, None, str(call))


def to_chat(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages of a trace in the form of chat completions; earlier reasoning is left out, as servers do."""
    chat: list[dict[str, Any]] = []
    open_ids: list[str] = []
    for number, message in enumerate(messages):
        if message["role"] == "tool":
            chat.append({"role": "tool", "tool_call_id": open_ids.pop(0), "content": message["content"]})
        elif message["role"] == "assistant" and message.get("tool_calls"):
            open_ids = [f"call_{number}_{i}" for i in range(len(message["tool_calls"]))]
            calls = []
            for name, call in zip(open_ids, message["tool_calls"], strict=True):
                arguments = json.dumps(call["arguments"], ensure_ascii=False)
                function = {"name": call["name"], "arguments": arguments}
                calls.append({"id": name, "type": "function", "function": function})
            chat.append({"role": "assistant", "content": message["content"], "tool_calls": calls})
        else:
            chat.append({"role": message["role"], "content": message["content"]})
    return chat


def solve_with_server(
    server: ChatServer, recorder: Recorder, record: Record, sample: int, max_turns: int, **options: Any
) -> Attempt:
    """One try at a task; several may run at once, in threads. options: of the request (temperature, ...)."""
    (played,) = recorder.start([record])
    spent: Counter[str] = Counter()
    truncated: str | None = "turn_limit"
    for _ in range(max_turns):
        try:
            asked = [*record.prompt, *to_chat(played.messages)]
            choice, tokens = server.complete(asked, record.tools, **options)
        except Refused:
            truncated = "refused"
            break
        spent += tokens
        if choice.get("finish_reason") == "length":
            truncated = "length_limit"
            break
        (result,) = recorder.step([played], [read_turn(choice)])
        if result.done or played.malformed:
            truncated = None
            break
    kind = truncated if truncated in ("turn_limit", "length_limit", None) else "length_limit"
    (outcome,) = recorder.finish([played], [kind])
    reason = judge(played, outcome, truncated)
    return Attempt(
        record.id, sample, tuple(played.messages), reason, spent["prompt_tokens"], spent["completion_tokens"]
    )


# -- a model of our own
# -----------------------------------------------------------------------------------------


def solve_with_engine(
    engine: Engine,
    recorder: Recorder,
    chat: ChatFormat,
    records: Sequence[Record],
    sample: int,
    limits: RolloutLimits,
    *,
    temperature: float,
    seed: int,
) -> list[Attempt]:
    """One try at each of the tasks, all together."""
    recorder.finished.clear()
    rollouts = collect_rollouts(
        engine,
        recorder,
        chat,
        records,
        num_generations=1,
        limits=limits,
        temperature=temperature,
        seed=seed * 1009 + sample,
    )
    attempts = []
    for rollout, (played, outcome, cut) in zip(rollouts, recorder.finished, strict=True):
        reason = judge(played, outcome, cut)
        read = len(rollout.prompt) + len(rollout.token_ids) - rollout.num_sampled
        trace = tuple(played.messages)
        attempts.append(Attempt(rollout.record.id, sample, trace, reason, read, rollout.num_sampled))
    return attempts
