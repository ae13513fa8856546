"""What the rollout loop asks of an environment, and the registry of the bundled ones.

An environment holds records (prompt, tools, expert trace) and answers the calls of a batch of rollouts. The
loop sees four verbs: `start` a batch of episodes, `step` it with one assistant turn per row, `finish` it
with an outcome per row, `close` the workers. All state of a rollout lives in its `Episode`; rows never
share state.
"""

from __future__ import annotations

import difflib
import importlib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pact_fast.data.chat import AssistantTurn
from pact_fast.data.records import Record
from pact_fast.envs.plugins import is_path, load_env

FAILURE_KINDS = (
    "no_call",  # ended without one well-formed call
    "unknown_tool",
    "bad_arguments",  # not JSON, or not what the tool takes
    "tool_error",  # the tool itself failed
    "wrong_answer",
    "turn_limit",
    "length_limit",
    "unreadable",  # something that the model or a tool wrote raised an error where it was read
)


@dataclass(frozen=True)
class StepResult:
    """The environment's reply to one assistant turn.

    tool_responses: one text per call of the turn, in order; a malformed call gets an error message.
    user_message: the next user turn of the task, if one follows.
    done: no further assistant turn is asked for.
    reward: this turn's reward (turn-level advantages use it; the episode's reward is `Outcome.reward`).
    """

    tool_responses: tuple[str, ...] = ()
    user_message: str | None = None
    done: bool = False
    reward: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """A finished episode: the reward RL uses, whether the task is solved, the environment's own scores by
    name, the number of calls made, and for an unsolved task one of FAILURE_KINDS.

    turn_rewards: of each turn, in the place of what `step` gave, where a turn's reward is known at the end
    alone. feedback: what there is to say about the attempt, for methods that learn from it
    (`objective.privileged`)."""

    reward: float
    solved: bool
    scores: dict[str, float] = field(default_factory=dict)
    calls: int = 0
    failure: str | None = None
    turn_rewards: tuple[float, ...] | None = None
    feedback: str | None = None


FEEDBACK = {  # of FAILURE_KINDS, where the environment says nothing of its own
    "no_call": "it answered without calling a tool.",
    "unknown_tool": "it called a tool that there is none of.",
    "bad_arguments": "it called a tool with arguments that the tool does not take.",
    "tool_error": "a tool that it called failed.",
    "wrong_answer": "its final answer was wrong.",
    "turn_limit": "it did not come to an answer in the turns that there are.",
    "length_limit": "it did not come to an answer in the tokens that there are.",
    "unreadable": "it wrote what could not be read.",
}


def feedback_of(outcome: Outcome) -> str | None:
    """What the environment says of an attempt, else a sentence on the kind of failure; None of a solved one
    without a word of its own."""
    if outcome.feedback is not None or outcome.solved:
        return outcome.feedback
    return FEEDBACK.get(outcome.failure or "wrong_answer")


@dataclass
class Episode:
    """State of one rollout; environments subclass it. `failures` counts what went wrong with calls, by
    kind."""

    record: Record
    calls: int = 0
    done: bool = False
    invalid_in_a_row: int = 0
    failures: dict[str, int] = field(default_factory=dict)

    def count_failure(self, kind: str) -> None:
        self.failures[kind] = self.failures.get(kind, 0) + 1

    def failure_kind(self, truncated: str | None, valid_calls: int) -> str:
        """The kind an unsolved episode is booked under: how it was cut off, else no call at all, else the
        kind of call failure that happened most, else the answer itself."""
        if truncated is not None or "unreadable" in self.failures:
            return truncated or "unreadable"
        if valid_calls == 0 and not self.failures:
            return "no_call"
        if self.failures:
            return max(FAILURE_KINDS, key=lambda kind: self.failures.get(kind, 0))
        return "wrong_answer"


def reply_or_end(episode: Episode, reply: Callable[[], StepResult]) -> StepResult:
    """`reply()`; where it raises over what the model or its tools wrote, that ends this episode and no
    other."""
    try:
        return reply()
    except Exception:
        episode.done = True
        episode.count_failure("unreadable")
        return StepResult(done=True)


class ToolEnv(Protocol):
    name: str

    def records(self, split: str) -> list[Record]:
        """The tasks of "train", "validation" or "test"; a pure function of the settings."""
        ...

    def start(self, records: Sequence[Record]) -> list[Any]:
        """One fresh episode per row; the same record may stand in many rows."""
        ...

    def step(self, episodes: Sequence[Any], turns: Sequence[AssistantTurn]) -> list[StepResult]:
        """Runs the calls of all rows together, outside this process where the tools are untrusted."""
        ...

    def finish(self, episodes: Sequence[Any], truncated: Sequence[str | None]) -> list[Outcome]:
        """truncated: "turn_limit", "length_limit" or None per row."""
        ...

    def close(self) -> None: ...


class PreparedEnv(ToolEnv, Protocol):
    """An environment whose tasks depend on what the model did before them (BFCL's memory)."""

    def preparations(self, folder: Path) -> Iterator[list[Record]]:
        """Waves of records to roll out, one rollout each, in this order; `records` is asked after the last.
        What was done is kept in `folder`."""
        ...


REGISTRY = {
    "toolbox": "pact_fast.envs.toolbox:ToolboxEnv",
    "python": "pact_fast.envs.python_tools:PythonToolsEnv",
    "bfcl": "pact_fast.envs.bfcl.env:BfclEnv",
    "bfcl_memory": "pact_fast.envs.bfcl.memory:BfclMemoryEnv",
    "ftrl": "pact_fast.envs.ftrl:FtrlEnv",
    "toolhop": "pact_fast.envs.toolhop:ToolHopEnv",
}


def make_env(name: str, settings: Mapping[str, Any] | None = None) -> ToolEnv:
    """The environment `name` with `settings` (a mapping of its Settings dataclass' fields).

    name: of a bundled environment, or `module:Class` / `module:function` of one's own (docs/environments.md).

    Raises ValueError for an unknown environment, an unknown setting (naming the nearest) or a value of the
    wrong type.
    """
    if is_path(name):
        return load_env(
            name,
            lambda cls: cls(settings_from(cls.Settings, settings or {}, where="env.settings")),
            settings or {},
        )
    if name not in REGISTRY:
        known = f"{_nearest(name, REGISTRY)}, or module:Class of your own"
        raise ValueError(f"env.name: no environment {name!r}; {known}")
    module, cls_name = REGISTRY[name].split(":")
    cls = getattr(importlib.import_module(module), cls_name)
    return cls(settings_from(cls.Settings, settings or {}, where=f"env.{name}"))


S = TypeVar("S")


def settings_from(cls: type[S], values: Mapping[str, Any], *, where: str) -> S:
    """Builds the settings dataclass `cls` from a mapping; YAML lists become tuples, ints become floats.

    Raises ValueError that names `where.key`, the value, and the nearest valid key or the expected type.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    checked = {}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{where}.{key}: unknown setting; {_nearest(key, known)}")
        checked[key] = _coerce(value, hints[key], f"{where}.{key}")
    missing = [
        k
        for k, f in known.items()
        if f.default is MISSING and f.default_factory is MISSING and k not in checked
    ]
    if missing:
        raise ValueError(f"{where}.{missing[0]}: required setting is missing")
    return cls(**checked)


def _nearest(key: str, known: Any) -> str:
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    listing = "known: " + ", ".join(known)
    return f"did you mean {close[0]!r}? {listing}" if close else listing


def _coerce(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _coerce(value, next(a for a in args if a is not type(None)), where)
    if origin is tuple and isinstance(value, (list, tuple)):
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_coerce(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
        if len(value) != len(args):
            raise ValueError(f"{where}: needs {len(args)} values, got {value!r}")
        return tuple(_coerce(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = origin or hint
    if plain is Any or (isinstance(value, plain) and not (plain in (int, float) and isinstance(value, bool))):
        return value
    raise ValueError(f"{where}: expected {getattr(plain, '__name__', plain)}, got {value!r}")
