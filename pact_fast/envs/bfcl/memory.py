"""BFCL's key-value memory tasks (package `bfcl-eval`): what the model wrote down earlier answers a question.

As published, the model first holds every prerequisite conversation of a scenario, one after the other, with
nothing carried over but its memory; then each question is asked on its own. `preparations` gives those
conversations to the evaluation. Prompts, backend and answer rule are the package's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pact_fast.data.chat import AssistantTurn
from pact_fast.data.records import Record
from pact_fast.envs.base import Episode, Outcome, StepResult, reply_or_end
from pact_fast.envs.bfcl.env import package_folder, program, read_jsonl, tool_schema
from pact_fast.envs.sandbox.sandbox import CallResult, Sandbox, SandboxCall

SCENARIOS = ("customer", "finance", "healthcare", "notetaker", "student")
ENTRY_LENGTH, ENTRIES = 2000, 50  # the backend's limits on the archival memory
EMPTY: dict[str, dict[str, str]] = {"core": {}, "archival": {}}
Memory = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class BfclMemorySettings:
    """memory: "model" (as published; test tasks only, `pact-fast eval` holds what fills it) or
    "verbatim": the conversations stand in the archival memory word for word, so that a task is one episode
    that can be trained on. That variant and its split by scenario are ours, never a leaderboard number.

    scenarios: of "model". train_scenarios, validation_scenarios, test_scenarios: of "verbatim".
    """

    memory: str = "model"
    scenarios: tuple[str, ...] = SCENARIOS
    train_scenarios: tuple[str, ...] = ("customer", "finance", "student")
    validation_scenarios: tuple[str, ...] = ("notetaker",)
    test_scenarios: tuple[str, ...] = ("healthcare",)
    max_consecutive_invalid: int = 3  # unreadable calls or unknown tools; then the episode ends
    short_descriptions: bool = False  # without the remark on the suite each tool's description starts with
    max_response_length: int | None = None  # characters the model sees of a response
    workers: int = 2
    time_limit: float = 10.0  # seconds per turn's calls
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        if self.memory not in ("model", "verbatim"):
            raise ValueError(f"env.bfcl_memory.memory: one of model, verbatim, got {self.memory!r}")
        for key in ("scenarios", "train_scenarios", "validation_scenarios", "test_scenarios"):
            for name in getattr(self, key):
                if name not in SCENARIOS:
                    raise ValueError(f"env.bfcl_memory.{key}: one of {', '.join(SCENARIOS)}, got {name!r}")
        parts = [*self.train_scenarios, *self.validation_scenarios, *self.test_scenarios]
        if len(set(parts)) < len(parts):
            raise ValueError(f"env.bfcl_memory: a scenario stands in two splits: {', '.join(sorted(parts))}")


@dataclass
class MemoryEpisode(Episode):
    """`memory` as the calls so far left it; `answer`: the message that ended the episode, if one did."""

    memory: Memory = field(default_factory=lambda: EMPTY)
    request: int = 0
    valid_calls: int = 0
    answer: str | None = None


class BfclMemoryEnv:
    """Questions answered from a key-value memory. Reward and `solved`: the official rule, one of the possible
    answers stands in the last message."""

    name = "bfcl_memory"
    Settings = BfclMemorySettings

    def __init__(self, settings: BfclMemorySettings) -> None:
        self.settings = settings
        self.folder = package_folder("bfcl_eval") / "data"
        site = [package_folder(name).parent for name in ("bfcl_eval", "overrides", "numpy")]
        self.sandbox = Sandbox(
            workers=settings.workers,
            time_limit=settings.time_limit,
            memory_mb=settings.memory_mb,
            packages=[str(path) for path in (*site, package_folder("rank_bm25"))],  # the last is one file
        )
        self._memories: dict[str, dict[str, Any]] = {}  # scenario -> memory, and conversations held so far
        self._left: dict[str, Memory] = {}  # record id of a conversation -> the memory it left

    # Records

    def preparations(self, folder: Path) -> Iterator[list[Record]]:
        """The conversations that fill the memory, in waves to be rolled out in this order, a scenario a row.

        What they left is kept in `folder`/memory.json, from where an interrupted evaluation goes on.
        """
        if self.settings.memory != "model":
            return
        path = folder / "memory.json"
        if path.is_file():
            self._memories = json.loads(path.read_text())
        for name in self.settings.scenarios:
            self._memories.setdefault(name, {**EMPTY, "conversations": 0})
        while wave := [r for name in self.settings.scenarios if (r := self._next_conversation(name))]:
            yield wave
            for record in wave:
                held = self._memories[record.env["scenario"]]["conversations"] + 1
                left = self._left.pop(record.id)
                self._memories[record.env["scenario"]] = {**left, "conversations": held}
            path.write_text(json.dumps(self._memories))

    def _next_conversation(self, scenario: str) -> Record | None:
        conversations = self._conversations(scenario)
        memory = self._memories[scenario]
        if memory["conversations"] == len(conversations):
            return None
        entry = conversations[memory["conversations"]]
        requests = ["\n".join(m["content"] for m in messages) for messages in entry["question"]]
        prompt = [
            {"role": "system", "content": self._instruction(scenario, memory)},
            {"role": "user", "content": requests[0]},
        ]
        env = {"scenario": scenario, "memory": memory, "requests": requests, "answers": None}
        name = entry["id"].replace("memory", "memory_kv", 1)
        return Record(name, tuple(prompt), self._tools(), (), env, f"bfcl-eval:{entry['id']}")

    def records(self, split: str) -> list[Record]:
        if split not in ("train", "validation", "test"):
            raise ValueError(f"split: train, validation or test, got {split!r}")
        if self.settings.memory == "verbatim":
            return [r for name in getattr(self.settings, f"{split}_scenarios") for r in self._verbatim(name)]
        if split != "test":
            raise ValueError(
                f'env.bfcl_memory.memory: "model" has test tasks only, {split} was asked for; use "verbatim"'
            )
        for name in self.settings.scenarios:
            held = self._memories.get(name, {}).get("conversations", 0)
            if held < len(self._conversations(name)):
                raise ValueError(
                    f'env.bfcl_memory.memory: "model" needs the conversations that fill it, {held} of '
                    f'{name} were held; `pact-fast eval` holds them, elsewhere use "verbatim"'
                )
        return [r for name in self.settings.scenarios for r in self._questions(name, self._memories[name])]

    def _questions(self, scenario: str, memory: Memory) -> list[Record]:
        from bfcl_eval.constants.default_prompts import ADDITIONAL_SYSTEM_PROMPT_FOR_AGENTIC_RESPONSE_FORMAT

        system = (
            f"{self._instruction(scenario, memory)}\n\n{ADDITIONAL_SYSTEM_PROMPT_FOR_AGENTIC_RESPONSE_FORMAT}"
        )
        tasks = read_jsonl(self.folder / "BFCL_v4_memory.json")
        answers = read_jsonl(self.folder / "possible_answer" / "BFCL_v4_memory.json")
        records = []
        for task, answer in zip(tasks, answers, strict=True):
            if task["scenario"] != scenario:
                continue
            question = "\n".join(m["content"] for m in task["question"][0])
            prompt = ({"role": "system", "content": system}, {"role": "user", "content": question})
            env = {
                "category": scenario,
                "scenario": scenario,
                "memory": memory,
                "requests": [question],
                "answers": answer["ground_truth"],
                "told": answer["source"],
            }
            name = task["id"].replace("memory", "memory_kv", 1)
            records.append(Record(name, prompt, self._tools(), (), env, f"bfcl-eval:{task['id']}"))
        return records

    def _verbatim(self, scenario: str) -> list[Record]:
        memory = verbatim_memory(self._conversations(scenario))
        return [replace(r, expert_trace=self._expert_trace(r)) for r in self._questions(scenario, memory)]

    def _expert_trace(self, record: Record) -> tuple[dict, ...]:
        """Lists the keys, reads the entry that the answer was told in, and answers as asked."""
        archival = record.env["memory"]["archival"]
        key = best_entry(archival, record.env["told"], record.env["answers"])
        calls = [("archival_memory_list_keys", {}), ("archival_memory_retrieve", {"key": key})]
        thoughts = [
            f"The user asks: {record.env['requests'][0]} What was said earlier is in the archival memory. I "
            "look which keys it has.",
            f"The entry {key} is the likeliest to say it. I read it.",
        ]
        results = self._run([(record.env["memory"], [(name, [], arguments) for name, arguments in calls])])[0]
        messages: list[dict[str, Any]] = []
        for (name, arguments), thought, (_, text) in zip(
            calls, thoughts, results.value["results"], strict=True
        ):
            call = {"name": name, "arguments": arguments}
            message = {"role": "assistant", "reasoning_content": thought, "content": "", "tool_calls": [call]}
            messages += [message, {"role": "tool", "name": name, "content": text}]
        answer = {"answer": record.env["answers"][0], "context": f"The user said so; it stands under {key}."}
        thought = "The entry says it. I answer in the format that was asked for."
        last = {"role": "assistant", "reasoning_content": thought, "content": str(answer), "tool_calls": []}
        return (*messages, last)

    def _instruction(self, scenario: str, memory: Memory) -> str:
        from bfcl_eval.constants.default_prompts import (
            MEMORY_AGENT_SETTINGS,
            MEMORY_BACKEND_INSTRUCTION_CORE_ARCHIVAL,
        )

        shown = self.sandbox.run([SandboxCall(program(), "core_memory_text", {"memory": memory})])[0]
        if shown.kind != "ok":
            raise RuntimeError(f"bfcl_memory: the memory backend does not run: {shown.error}")
        return MEMORY_BACKEND_INSTRUCTION_CORE_ARCHIVAL.format(
            scenario_setting=MEMORY_AGENT_SETTINGS[scenario], memory_content=shown.value
        )

    def _tools(self) -> tuple[dict, ...]:
        functions = read_jsonl(self.folder / "multi_turn_func_doc" / "memory_kv.json")
        return tuple(tool_schema(function, self.settings.short_descriptions) for function in functions)

    def _conversations(self, scenario: str) -> list[dict]:
        return read_jsonl(self.folder / "memory_prereq_conversation" / f"memory_{scenario}.json")

    # Episodes

    def start(self, records: Sequence[Record]) -> list[MemoryEpisode]:
        return [MemoryEpisode(record, memory=record.env["memory"]) for record in records]

    def _run(self, rows: Sequence[tuple[Memory, list]]) -> list[CallResult]:
        return self.sandbox.run(
            [SandboxCall(program(), "run_memory_calls", {"memory": m, "calls": calls}) for m, calls in rows]
        )

    def step(self, episodes: Sequence[MemoryEpisode], turns: Sequence[AssistantTurn]) -> list[StepResult]:
        calling = [i for i, turn in enumerate(turns) if turn.tool_calls]
        readable: dict[int, list] = {
            i: [(c.name, [], dict(c.arguments or {})) for c in turns[i].tool_calls if c.error is None]
            for i in calling
        }
        results = dict(
            zip(calling, self._run([(episodes[i].memory, readable[i]) for i in calling]), strict=True)
        )
        rows = enumerate(zip(episodes, turns, strict=True))
        return [reply_or_end(e, partial(self._reply, e, t, results.get(i))) for i, (e, t) in rows]

    def _reply(self, episode: MemoryEpisode, turn: AssistantTurn, result: CallResult | None) -> StepResult:
        if result is None:
            return self._close_request(episode, turn)
        return self._book(episode, turn, result)

    def _close_request(self, episode: MemoryEpisode, turn: AssistantTurn) -> StepResult:
        requests = episode.record.env["requests"]
        episode.request += 1
        if episode.request < len(requests):
            return StepResult(user_message=requests[episode.request])
        episode.done, episode.answer = True, turn.content
        return StepResult(done=True, reward=float(self._valid(episode)))

    def _book(self, episode: MemoryEpisode, turn: AssistantTurn, result: CallResult) -> StepResult:
        """Answers the calls of a turn; calls that hung or broke the worker count as not made."""
        if result.kind == "ok":
            episode.memory = result.value["memory"]
            outputs = iter(result.value["results"])
        else:
            outputs = iter([("tool_error", f"Error during execution: {result.error}")] * len(turn.tool_calls))
        responses = []
        for call in turn.tool_calls:
            kind, text = "bad_arguments", f"Error: the call could not be read: {call.error}"
            if call.error is None:
                kind, text = next(outputs)
            invalid = call.error is not None or kind == "unknown_tool"
            episode.calls += 1
            episode.valid_calls += not invalid
            episode.invalid_in_a_row = episode.invalid_in_a_row + 1 if invalid else 0
            if kind != "ok":
                episode.count_failure(kind)
            limit = self.settings.max_response_length
            if limit is not None and len(text) > limit:
                text = f"{text[:limit]}... ({len(text) - limit} characters cut off)"
            responses.append(text)
        episode.done = episode.invalid_in_a_row >= self.settings.max_consecutive_invalid
        return StepResult(tuple(responses), done=episode.done)

    # Scores

    @staticmethod
    def _valid(episode: MemoryEpisode) -> bool:
        from bfcl_eval.eval_checker.agentic_eval.agentic_checker import agentic_checker

        answers = episode.record.env["answers"]
        if not answers or not episode.answer:
            return False
        return agentic_checker(episode.answer, answers)["valid"]

    def finish(self, episodes: Sequence[MemoryEpisode], truncated: Sequence[str | None]) -> list[Outcome]:
        return [self._outcome(e, cut) for e, cut in zip(episodes, truncated, strict=True)]

    def _outcome(self, episode: MemoryEpisode, truncated: str | None) -> Outcome:
        if episode.record.env["answers"] is None:  # a conversation that fills the memory, however it ended
            self._left[episode.record.id] = {k: dict(episode.memory[k]) for k in ("core", "archival")}
            return Outcome(0.0, False, {}, episode.calls, truncated)
        valid = self._valid(episode)
        failure = None if valid else episode.failure_kind(truncated, episode.valid_calls)
        return Outcome(float(valid), valid, {"accuracy": float(valid)}, episode.calls, failure)

    def close(self) -> None:
        self.sandbox.close()


def verbatim_memory(conversations: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """All that the user said, sentence by sentence, in as few archival entries as it fits; an entry's key is
    the topic that it begins in and a number. Raises ValueError where it does not fit the backend's limits."""
    entries: dict[str, str] = {}
    key = ""
    for conversation in conversations:
        topic = "_".join(re.findall(r"[a-z]+", conversation["topic"].lower()))
        for messages in conversation["question"]:
            for message in messages:
                for sentence in re.split(r"(?<=[.!?])\s+", message["content"].strip()):
                    if not key or len(entries[key]) + 1 + len(sentence) > ENTRY_LENGTH:
                        key = f"{topic}_{len(entries) + 1}"
                        entries[key] = sentence
                    else:
                        entries[key] += f" {sentence}"
    if len(entries) > ENTRIES or max(map(len, entries.values())) > ENTRY_LENGTH:
        raise ValueError(f"bfcl_memory: {len(entries)} entries of a scenario do not fit the archival memory")
    return {"core": {}, "archival": entries}


def best_entry(archival: Mapping[str, str], told: str, answers: Sequence[str]) -> str:
    """The key of the entry that shares most words with the passage an answer was told in; of equals, one that
    holds an answer."""
    wanted = set(re.findall(r"\w+", told.lower()))

    def score(key: str) -> tuple[int, bool]:
        text = archival[key].lower()
        return len(wanted & set(re.findall(r"\w+", text))), any(a.lower() in text for a in answers)

    return max(archival, key=score)
