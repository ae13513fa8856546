"""The toolbox environment: `ToolboxEnv` (the ToolEnv protocol) and `base_records` for the recipe of the
base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

from pact_fast.data.chat import AssistantTurn, ToolCall
from pact_fast.data.records import Record, load_records
from pact_fast.envs.base import Episode, Outcome, StepResult, reply_or_end
from pact_fast.envs.call_matching import (
    Call,
    answer_f1,
    match_turns,
    need_reference_calls,
    reference_calls,
)
from pact_fast.envs.sandbox.sandbox import CallResult, Program, Sandbox, SandboxCall
from pact_fast.envs.toolbox import tools
from pact_fast.envs.toolbox.expert import Trace, write_trace
from pact_fast.envs.toolbox.questions import Task, draw_task, offered_tools, quoted, resolve
from pact_fast.envs.toolbox.reward import newly_solved, right_answers, solve_f1
from pact_fast.envs.toolbox.settings import ToolboxSettings
from pact_fast.envs.toolbox.worlds import World, build_world, schema

SYSTEM = "Use the tools. Then answer with each value in double quotes."
SPLITS = ("train", "validation", "test")
INVALID = ("malformed", "unknown_tool", "bad_arguments")


@dataclass
class ToolboxEpisode(Episode):
    open_values: list[str] = field(default_factory=list)
    solved: int = 0
    valid_calls: int = 0
    seen: set[str] = field(default_factory=set)
    final: str = ""
    turn_calls: list[list[Call]] = field(default_factory=list)  # of each turn; an unreadable one is ("", {})
    closed: bool = False  # ended by a turn without calls


class ToolboxEnv:
    """Multi-hop questions over small random worlds. `records` is a pure function of the settings."""

    name = "toolbox"
    Settings = ToolboxSettings

    def __init__(self, settings: ToolboxSettings | None = None) -> None:
        self.settings = settings or ToolboxSettings()
        self.sandbox = Sandbox(workers=self.settings.workers, time_limit=self.settings.time_limit)
        self._programs: dict[str, Program] = {}

    def records(self, split: str) -> list[Record]:
        if split not in SPLITS:
            raise ValueError(f"split: one of {', '.join(SPLITS)}, got {split!r}")
        if split == "train" and self.settings.train_path is not None:
            return load_records(self.settings.train_path).records
        count = getattr(self.settings, f"{split}_tasks")
        return [_task_record(self.settings, split, i) for i in range(count)]

    def start(self, records: Sequence[Record]) -> list[ToolboxEpisode]:
        return [ToolboxEpisode(r, open_values=[s["value"] for s in r.env["steps"]]) for r in records]

    def step(self, episodes: Sequence[ToolboxEpisode], turns: Sequence[AssistantTurn]) -> list[StepResult]:
        rows = list(zip(episodes, turns, strict=True))
        jobs = [
            [
                SandboxCall(self._program(e.record), "call_here", {"name": c.name, "arguments": c.arguments})
                for c in t.tool_calls
                if c.error is None
            ]
            for e, t in rows
        ]
        results = iter(self.sandbox.run([job for row in jobs for job in row]))
        mine = [iter([next(results) for _ in row]) for row in jobs]
        return [
            reply_or_end(e, partial(self._step_one, e, t, given))
            for (e, t), given in zip(rows, mine, strict=True)
        ]

    def finish(self, episodes: Sequence[ToolboxEpisode], truncated: Sequence[str | None]) -> list[Outcome]:
        return [self._outcome(e, cut) for e, cut in zip(episodes, truncated, strict=True)]

    def close(self) -> None:
        self.sandbox.close()

    def _program(self, record: Record) -> Program:
        if record.id not in self._programs:
            self._programs[record.id] = Program(_tools_source(), {"WORLD": record.env["world"]}, fresh=False)
        return self._programs[record.id]

    def _step_one(self, episode: ToolboxEpisode, turn: AssistantTurn, results: Any) -> StepResult:
        episode.turn_calls.append([(call.name, call.arguments or {}) for call in turn.tool_calls])
        if not turn.tool_calls:
            episode.final, episode.done, episode.closed = turn.content, True, True
            right = self._right(episode)
            return StepResult(done=True, reward=right / len(episode.record.env["answers"]))
        responses = []
        before = episode.solved
        for call in turn.tool_calls:
            kind, text = _response(call, None if call.error is not None else next(results))
            self._count(episode, call, kind, text)
            responses.append(text)
        episode.done = episode.invalid_in_a_row >= self.settings.max_consecutive_invalid
        reward = 2 * (episode.solved - before) / (len(responses) + 1)
        return StepResult(tuple(responses), done=episode.done, reward=reward)

    def _count(self, episode: ToolboxEpisode, call: ToolCall, kind: str, text: str) -> None:
        episode.calls += 1
        episode.invalid_in_a_row = episode.invalid_in_a_row + 1 if kind in INVALID else 0
        if kind != "ok":
            episode.count_failure("bad_arguments" if kind == "malformed" else kind)
            return
        episode.valid_calls += 1
        signature = f"{call.name} {sorted((call.arguments or {}).items())}"
        value = newly_solved(text, episode.open_values) if signature not in episode.seen else None
        episode.seen.add(signature)
        if value is not None:
            episode.open_values.remove(value)
            episode.solved += 1

    def _right(self, episode: ToolboxEpisode) -> int:
        env = episode.record.env
        return right_answers(episode.final, env["answers"], len(env["starts"]))

    def _outcome(self, episode: ToolboxEpisode, truncated: str | None) -> Outcome:
        env = episode.record.env
        right, sub_answers = self._right(episode), len(env["steps"])
        solved = right == len(env["answers"])
        f1 = solve_f1(
            solved=episode.solved,
            sub_answers=sub_answers,
            calls=episode.calls,
            right=right,
            answers=len(env["answers"]),
            answer_weight=self.settings.answer_weight,
        )
        formless = episode.valid_calls == 0 and '"' not in episode.final
        scores = {
            "solve_f1": f1,
            "solve_p": episode.solved / episode.calls if episode.calls else 1.0,
            "solve_r": episode.solved / sub_answers if sub_answers else 1.0,
        }
        failure = None if solved else episode.failure_kind(truncated, episode.valid_calls)
        reward = self.settings.no_format_reward if formless else f1
        outcome = Outcome(reward=reward, solved=solved, scores=scores, calls=episode.calls, failure=failure)
        return outcome if self.settings.reward == "solve_f1" else self._matched(episode, outcome)

    def _matched(self, episode: ToolboxEpisode, outcome: Outcome) -> Outcome:
        """The outcome with the rewards of call matching: the answer is what the final message quotes."""
        record, how = episode.record, self.settings
        references = need_reference_calls(record, reference_calls(record), how.reward)
        greedy, penalty = how.reward.endswith("greedy"), how.unmatched_penalty
        matched = match_turns(episode.turn_calls, references, greedy=greedy, penalty=penalty)
        rewards = list(matched.turn_rewards)
        if episode.closed:
            rewards[-1] = answer_f1(" ".join(quoted(episode.final)), " ".join(record.env["answers"]))
        scores = outcome.scores | {"call_match": 2 * matched.total / (episode.calls + len(references))}
        return replace(outcome, reward=sum(rewards), scores=scores, turn_rewards=tuple(rewards))


def _response(call: ToolCall, result: CallResult | None) -> tuple[str, str]:
    if result is None:
        return "malformed", f"Error: the call could not be read: {call.error}"[:80]
    if result.kind == "ok":
        return result.value[0], result.value[1]
    return "tool_error", f"Error: {call.name} failed: {result.error}"[:80]


@cache
def _tools_source() -> str:
    return Path(tools.__file__).read_text()


def _task_record(settings: ToolboxSettings, split: str, index: int) -> Record:
    """Task `index` of a split. Its generator is seeded by the split's name, so that worlds of splits never
    meet."""
    rng = Random(f"toolbox/{settings.seed}/{split}/{index}")
    world = build_world(rng, settings.difficulty)
    held_out = split != "train" and rng.random() < settings.shift
    hops = settings.train_hops if split == "train" else settings.eval_hops
    task = draw_task(rng, world, settings.difficulty, hops, settings.two_part_share, held_out)
    offered = offered_tools(rng, task, settings.difficulty)
    right, detour = rng.random() < settings.success_rate, rng.random() < settings.detour_rate
    trace = write_trace(rng, world, task, offered, right=right, detour=detour)
    return make_record(f"toolbox/{settings.seed}/{split}/{index}", world, task, offered, trace)


def shortest_way(world: World, task: Task) -> list[dict[str, Any]]:
    """The calls that the task needs, as {"name", "arguments"}."""
    values: dict[int, list[str]] = {}
    calls = []
    for i, step in enumerate(task.steps):
        arguments = resolve(step, values)
        values[i] = quoted(tools.call(world, step.tool, arguments)[1])
        calls.append({"name": step.tool, "arguments": arguments})
    return calls


def make_record(record_id: str, world: World, task: Task, offered: Sequence[str], trace: Trace) -> Record:
    env = {
        "world": world,
        "kind": task.kind,
        "hops": task.hops,
        "wording": task.wording,
        "starts": list(task.starts),
        "steps": [{"tool": step.tool, "label": step.label, "value": step.value} for step in task.steps],
        "answers": list(task.answers),
        "ground_truth": shortest_way(world, task),
        "expert": {"solves": trace.solves, "calls": trace.calls, "detours": trace.detours},
    }
    prompt = ({"role": "system", "content": SYSTEM}, {"role": "user", "content": task.question})
    schemas = tuple(schema(name, world) for name in offered)
    return Record(record_id, prompt, schemas, tuple(trace.messages), env, "toolbox")
