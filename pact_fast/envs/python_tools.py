"""Tasks whose tools are Python source: the environment of one's own tools, and the ground of FTRL and
ToolHop.

A record's `env` holds `codes` ({tool name: source that defines a function of that name}), and `answer`
(text, a number, or a list of alternatives) or `unsolved_set` ({tool name: values its calls should give}), or
both. The source is untrusted: every call runs in the sandbox, in a process of its own. A tool's result
becomes text the way FTRL does it: dicts and lists as JSON (what JSON lacks inside of them as text), text as
it is, all else through str().
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pact_fast.data.chat import AssistantTurn, ToolCall
from pact_fast.data.records import Record, load_records
from pact_fast.envs.answers import KNOWN, answers_of, bad_field, check_source, decoded, gold_answers
from pact_fast.envs.base import Episode, Outcome, StepResult, reply_or_end
from pact_fast.envs.call_matching import (
    REWARDS,
    Call,
    answer_f1,
    match_turns,
    need_reference_calls,
    reference_calls,
    tagged_answer,
)
from pact_fast.envs.plugins import CallMade, RewardInput, is_path, load_reward, score
from pact_fast.envs.sandbox.sandbox import CallResult, Program, Sandbox, SandboxCall

RENDER = """
def render_result(name, arguments):
    import json
    value = globals()[name](**arguments)
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return value if isinstance(value, str) else str(value)
"""


@dataclass(frozen=True)
class PythonToolsSettings:
    """Files of records (.jsonl or .parquet), how their tools are run, and how episodes are rewarded.

    reward: "solve" (answer and sub-answers), or "call_matching" / "call_matching_greedy": calls matched with
    the record's `ground_truth`, the answer in <answer> tags by words (pact_fast.envs.call_matching); or
    "module:function" / "module:Class" of one's own, called with a RewardInput (pact_fast.envs.plugins).
    unmatched_penalty: what a call without a match loses. answer_instruction: with call matching, what is
    added to a prompt that does not speak of <answer>; empty: nothing.
    """

    train_path: str | None = None
    skip_bad_records: bool = False  # leave bad ones out, with a warning each, instead of refusing the file
    validation_path: str | None = None  # None: drawn from the training file
    test_path: str | None = None
    validation_tasks: int = 32  # drawn from the training file where validation_path is None
    seed: int = 0  # of that draw

    reward: str = "solve"
    answer_weight: float = 0.5  # of "solve": share for the final answer, the rest for sub-answers
    unmatched_penalty: float = 0.0
    answer_instruction: str = "Put the final answer between <answer> and </answer>."
    max_consecutive_invalid: int = 3  # unreadable or unknown calls; then the episode ends
    max_response_length: int = (
        4096  # characters of a tool's response; the rest is cut off, and the cut is said
    )
    workers: int = 2
    time_limit: float = 10.0  # seconds per call
    memory_mb: int = 512  # per call
    sandbox: str = "strict"  # "weak": run the tools even where the machine cannot shut them in

    def __post_init__(self) -> None:
        check_settings("python", self, ("solve", *REWARDS))

    @property
    def matches_calls(self) -> bool:
        return self.reward in REWARDS


def check_settings(name: str, settings: PythonToolsSettings, rewards: Sequence[str]) -> None:
    """Raises ValueError for a reward or a sandbox that environment `name` does not have."""
    if settings.sandbox not in ("strict", "weak"):
        raise ValueError(f"env.{name}.sandbox: one of strict, weak, got {settings.sandbox!r}")
    if settings.reward not in rewards and not is_path(settings.reward):
        known = f"one of {', '.join(rewards)}, or module:function of your own"
        raise ValueError(f"env.{name}.reward: {known}, got {settings.reward!r}")


@dataclass
class SourceEpisode(Episode):
    """`remaining`: the answers of each tool no call has given yet. `content`: of the last assistant turn."""

    remaining: dict[str, list[str]] = field(default_factory=dict)
    solved: int = 0
    valid_calls: int = 0
    turn_rewards: list[float] = field(default_factory=list)
    called: list[ToolCall] = field(default_factory=list)
    turn_calls: list[list[Call]] = field(default_factory=list)  # of each turn; an unreadable one is ("", {})
    turns: list[AssistantTurn] = field(default_factory=list)
    calls_made: list[CallMade] = field(default_factory=list)  # for a reward of one's own
    content: str = ""
    closed: bool = False  # ended by a turn without calls
    last_response: str | None = None  # the tool message just before the last assistant turn, if there is one

    @property
    def unsolved(self) -> int:
        return sum(len(answers) for answers in self.remaining.values())


def matches(text: str, gold: str) -> bool:
    """Whether every ", "-separated part of `gold` stands in `text`; case and commas do not count."""
    plain = text.lower().replace(",", "").strip()
    return all(part.lower().replace(",", "").strip() in plain for part in gold.split(", "))


class PythonToolsEnv:
    """One's own tools: reward = w * (answer right) + (1 - w) * Solve-F1 over `unsolved_set` where the
    record has one.

    `env` of a record: `codes`, `answer`, and optionally `unsolved_set` ({tool name: [values its calls
    should give]}) and `ground_truth` (the calls of a good solution, for reward="call_matching").
    """

    name = "python"
    Settings: type[PythonToolsSettings] = PythonToolsSettings
    packages: tuple[str, ...] = ()  # what tools may import beside the standard library, where it is installed

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.sandbox = Sandbox(
            workers=settings.workers,
            time_limit=settings.time_limit,
            memory_mb=settings.memory_mb,
            packages=site_folders(self.packages),
            weak=settings.sandbox == "weak",
        )
        self._files: dict[str, list[Record]] = {}
        self._reward_at = f"env.{self.name}.reward {settings.reward}"
        self._reward = (
            load_reward(settings.reward, f"env.{self.name}.reward") if is_path(settings.reward) else None
        )

    # Records

    def records(self, split: str) -> list[Record]:
        if split == "test":
            return self._load("test_path")
        if split == "validation" and self.settings.validation_path is not None:
            return self._load("validation_path")
        if split not in ("train", "validation"):
            raise ValueError(f"split: train, validation or test, got {split!r}")
        records = self._load("train_path")
        if self.settings.validation_path is not None:
            return records
        held = self._held_out(len(records))
        return [r for i, r in enumerate(records) if (i in held) == (split == "validation")]

    def _held_out(self, count: int) -> set[int]:
        wanted = self.settings.validation_tasks
        if wanted >= count:
            raise ValueError(
                f"env.{self.name}.validation_tasks: {wanted} of {count} training records would leave none "
                "to train on"
            )
        return set(random.Random(self.settings.seed).sample(range(count), wanted))

    def _load(self, key: str) -> list[Record]:
        path = getattr(self.settings, key)
        if path is None:
            raise ValueError(f"env.{self.name}.{key}: is not set, give the file of records")
        self.sandbox.admit_untrusted()  # said before a model is trained, not at its first call
        if path not in self._files:
            self._files[path] = self._prepared(self._read(Path(path)))
            warn_of_tools_that_cannot_run(path, self._files[path], self.packages)
        return self._files[path]

    def _read(self, path: Path) -> list[Record]:
        loaded = load_records(path, require_trace=False, skip_bad=self.settings.skip_bad_records)
        for error in loaded.skipped:
            warnings.warn(f"left out: {error}", stacklevel=2)
        return loaded.records

    def _prepared(self, records: Sequence[Record]) -> list[Record]:
        """Those that this environment can play; a bad one is an error, or is left out where that is asked."""
        good = []
        for record in records:
            try:
                good.append(self._prepare(record))
            except ValueError as error:
                if not self.settings.skip_bad_records:
                    raise
                warnings.warn(f"left out: {error}", stacklevel=2)
        if records and not good:
            raise ValueError(f"{records[0].source}: no record is left, all {len(records)} are bad")
        return good

    def _prepare(self, record: Record) -> Record:
        """The record, its fields for this environment decoded (in place) and checked; twice does no harm."""
        env = record.env
        for key, required in (("codes", True), ("unsolved_set", False)):
            env[key] = decoded(record, key, required)
        for tool in record.tools:
            name = tool["function"]["name"]
            if name not in env["codes"]:
                bad_field(record, "codes", f"no source for tool {name!r}")
        for name, source in env["codes"].items():
            check_source(record, name, source)
        if env["unsolved_set"] is not None:
            env["unsolved_set"] = {
                tool: gold_answers(record, f"unsolved_set.{tool}", value)
                for tool, value in env["unsolved_set"].items()
            }
            for tool in env["unsolved_set"].keys() - env["codes"].keys():
                bad_field(record, "unsolved_set", f"answers of tool {tool!r}, which `codes` does not hold")
        if env.get("answer") is not None:
            gold_answers(record, "answer", env["answer"])
        elif not env["unsolved_set"] and self._reward is None:
            near = difflib.get_close_matches("answer", [key for key in env if key not in KNOWN], 1)
            bad_field(record, "answer", "is missing" + (f"; found {near[0]!r}: misspelt?" if near else ""))
        env["true_calls"] = reference_calls(record)
        if self.settings.matches_calls:
            need_reference_calls(record, env["true_calls"], self.settings.reward)
            record = self._asking_for_tags(record)
        return record

    def _asking_for_tags(self, record: Record) -> Record:
        """The record with the instruction on <answer> tags, where its prompt does not speak of them."""
        instruction = self.settings.answer_instruction
        if not instruction or any("<answer>" in message["content"] for message in record.prompt):
            return record
        last = record.prompt[-1]
        asked = {**last, "content": f"{last['content']}\n{instruction}"}
        return replace(record, prompt=(*record.prompt[:-1], asked))

    # Episodes

    def start(self, records: Sequence[Record]) -> list[SourceEpisode]:
        """Records may come from these files or from anywhere else; those are decoded here."""
        return [self._episode(self._prepare(r)) for r in records]

    def _episode(self, record: Record) -> SourceEpisode:
        unsolved = record.env.get("unsolved_set") or {}
        return SourceEpisode(record, remaining={tool: list(answers) for tool, answers in unsolved.items()})

    def step(self, episodes: Sequence[SourceEpisode], turns: Sequence[AssistantTurn]) -> list[StepResult]:
        rows = list(zip(episodes, turns, strict=True))
        jobs = [[self._job(e, call) for call in t.tool_calls if self._runs(e, call)] for e, t in rows]
        results = iter(self.sandbox.run([job for row in jobs for job in row]))
        mine = [iter([next(results) for _ in row]) for row in jobs]
        return [
            reply_or_end(e, partial(self._step_one, e, t, given))
            for (e, t), given in zip(rows, mine, strict=True)
        ]

    def _runs(self, episode: SourceEpisode, call: ToolCall) -> bool:
        return call.error is None and call.name in episode.record.env["codes"]

    def _job(self, episode: SourceEpisode, call: ToolCall) -> SandboxCall:
        program = Program(episode.record.env["codes"][call.name] + "\n" + RENDER)
        return SandboxCall(program, "render_result", {"name": call.name, "arguments": call.arguments})

    def _step_one(
        self, episode: SourceEpisode, turn: AssistantTurn, results: Iterator[CallResult]
    ) -> StepResult:
        episode.content = turn.content
        episode.turns.append(turn)
        episode.turn_calls.append([(call.name, call.arguments or {}) for call in turn.tool_calls])
        if not turn.tool_calls:
            episode.done = episode.closed = True
            reward = self._turn_reward(episode, turn, 0)
            episode.turn_rewards.append(reward)
            return StepResult(done=True, reward=reward)
        before = episode.solved
        responses = tuple(self._answer(episode, call, results) for call in turn.tool_calls)
        episode.last_response = responses[-1]
        episode.calls_made += [
            CallMade(call.name, call.arguments, text, call.error)
            for call, text in zip(turn.tool_calls, responses, strict=True)
        ]
        episode.done = episode.invalid_in_a_row >= self.settings.max_consecutive_invalid
        reward = self._turn_reward(episode, turn, episode.solved - before)
        episode.turn_rewards.append(reward)
        return StepResult(responses, done=episode.done, reward=reward)

    def _answer(self, episode: SourceEpisode, call: ToolCall, results: Iterator[CallResult]) -> str:
        """The response to one call, with everything it changes in the episode."""
        if call.error is not None:
            episode.invalid_in_a_row += 1
            episode.count_failure("bad_arguments")
            return f"Error: the call could not be read: {call.error}"
        episode.calls += 1
        episode.called.append(call)
        if not self._runs(episode, call):
            episode.invalid_in_a_row += 1
            episode.count_failure("unknown_tool")
            return f"Error: no tool named {call.name!r}. Tools: {', '.join(episode.record.env['codes'])}."
        episode.invalid_in_a_row = 0
        episode.valid_calls += 1
        kind, text = self._render(call, next(results))
        if kind is not None:
            episode.count_failure(kind)
        self._solve(episode, call.name, text)
        limit = self.settings.max_response_length
        return text if len(text) <= limit else f"{text[:limit]}... ({len(text) - limit} characters cut off)"

    def _render(self, call: ToolCall, result: CallResult) -> tuple[str | None, str]:
        """(failure kind or None, text): arguments the function does not take are the model's mistake."""
        if result.kind == "ok":
            return None, result.value if isinstance(result.value, str) else json.dumps(result.value)
        name, _, message = result.error.partition(": ")
        wrong_arguments = name == "TypeError" and f"{call.name}()" in message
        kind = "bad_arguments" if wrong_arguments else "tool_error"
        return kind, f"Error when calling {call.name}: {message or result.error}"

    def _solve(self, episode: SourceEpisode, tool: str, text: str) -> None:
        """The first remaining answer of this tool that stands in the output is solved."""
        answers = episode.remaining.get(tool, [])
        for answer in answers:
            if matches(text, answer):
                answers.remove(answer)
                episode.solved += 1
                return

    # Scores

    def finish(self, episodes: Sequence[SourceEpisode], truncated: Sequence[str | None]) -> list[Outcome]:
        return [self._outcome(e, cut) for e, cut in zip(episodes, truncated, strict=True)]

    def _turn_reward(self, episode: SourceEpisode, turn: AssistantTurn, newly: int) -> float:
        if turn.tool_calls:
            return 2 * newly / (len(turn.tool_calls) + 1)
        return float(self._answered(episode))

    def _answered(self, episode: SourceEpisode) -> bool:
        return episode.closed and any(matches(episode.content, gold) for gold in answers_of(episode.record))

    def _outcome(self, episode: SourceEpisode, truncated: str | None) -> Outcome:
        scores = solve_scores(episode) | {"answer": float(self._answered(episode))}
        weight = self.settings.answer_weight if episode.record.env.get("unsolved_set") else 1.0
        reward = weight * scores["answer"] + (1 - weight) * scores.get("solve_f1", 0.0)
        return self._book(episode, truncated, reward, scores["answer"] == 1.0, scores)

    def _book(
        self,
        episode: SourceEpisode,
        truncated: str | None,
        reward: float,
        solved: bool,
        scores: dict[str, float],
    ) -> Outcome:
        """The outcome; with call matching the reward is the sum of the turns' rewards, with a function of
        one's own what that gives, whatever is given here."""
        turn_rewards = None
        if self._reward is not None:
            answer = episode.content if episode.closed else ""
            turns, calls = tuple(episode.turns), tuple(episode.calls_made)
            told = RewardInput(episode.record, turns, calls, answer, truncated, scores, solved)
            reward, solved = score(self._reward, told, self._reward_at)
            turn_rewards = (*[0.0] * (len(turns) - 1), reward)[: len(turns)]  # the last turn earns it
        failure = None if solved else episode.failure_kind(truncated, episode.valid_calls)
        outcome = Outcome(reward, solved, scores, episode.calls, failure, turn_rewards)
        if not self.settings.matches_calls:
            return outcome
        references = episode.record.env["true_calls"]
        greedy, penalty = self.settings.reward.endswith("greedy"), self.settings.unmatched_penalty
        matched = match_turns(episode.turn_calls, references, greedy=greedy, penalty=penalty)
        rewards = list(matched.turn_rewards)
        if episode.closed:
            given = tagged_answer(episode.content)
            rewards[-1] = max((answer_f1(given, gold) for gold in answers_of(episode.record)), default=0.0)
        total = episode.calls + len(references)
        scores = scores | {"call_match": 2 * matched.total / total if total else 1.0}
        return replace(outcome, reward=sum(rewards), scores=scores, turn_rewards=tuple(rewards))

    def close(self) -> None:
        self.sandbox.close()


def site_folders(packages: Sequence[str]) -> list[str]:
    """The folders that hold those of the packages which are installed."""
    found = [importlib.util.find_spec(name) for name in packages]
    return sorted({str(Path(spec.origin).parent.parent) for spec in found if spec and spec.origin})


def warn_of_tools_that_cannot_run(path: str, records: Sequence[Record], packages: Sequence[str]) -> None:
    """Names the tools whose source imports what a call will not find."""
    there = {name for name in packages if importlib.util.find_spec(name)} | sys.stdlib_module_names
    lacking: dict[str, list[str]] = {}
    for record in records:
        for tool, source in record.env["codes"].items():
            for module in imported(source) - there:
                lacking.setdefault(module, []).append(f"{tool} of record {record.id!r}")
    for module, tools in sorted(lacking.items()):
        more = f" and {len(tools) - 3} more" if len(tools) > 3 else ""
        hint = f": pip install {module.replace('dateutil', 'python-dateutil')}" if module in packages else ""
        warnings.warn(
            f"{path}: these tools import {module}, which the sandbox does not give them{hint}: "
            f"{', '.join(tools[:3])}{more}",
            stacklevel=3,
        )


def imported(source: str) -> set[str]:
    """Top-level names of the modules that a source imports anywhere."""
    names: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in other people's strings
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def solve_scores(episode: SourceEpisode) -> dict[str, float]:
    """Solve-P = S/C (1 where C = 0), Solve-R = S/U, Solve-F1 = 2S/(C+U); none for a record without
    sub-answers, which nothing can solve."""
    solved, calls, total = episode.solved, episode.calls, episode.solved + episode.unsolved
    if not total:
        return {}
    return {
        "solve_p": solved / calls if calls else 1.0,
        "solve_r": solved / total,
        "solve_f1": 2 * solved / (calls + total),
    }
