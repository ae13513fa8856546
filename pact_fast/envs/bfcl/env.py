"""BFCL multi-turn tasks (package `bfcl-eval`), as training environment and as evaluation.

The data, the simulated systems and the checkers are the package's own; the calls run in sandbox workers
(worker.py). Install it without its dependencies: `pip install --no-deps bfcl-eval==2026.3.23 mpmath`.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from pact_fast.data.chat import AssistantTurn, ToolCall
from pact_fast.data.records import Record
from pact_fast.data.traces import trace_from_calls
from pact_fast.envs.base import Episode, Outcome, StepResult, reply_or_end
from pact_fast.envs.sandbox.sandbox import CallResult, Program, Sandbox, SandboxCall

CATEGORIES = ("base", "miss_func", "miss_param", "long_context")
TASKS = 200  # per category
FUNCTION_DOCS = {
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MessageAPI": "message_api",
    "TwitterAPI": "posting_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "VehicleControlAPI": "vehicle_control",
}
JSON_TYPES = {
    "dict": "object",
    "float": "number",
    "tuple": "array",
    "list": "array",
    "int": "integer",
    "any": None,
}
ELSEWHERE = {  # categories of the package that are no tasks of this environment, and why
    "web_search": "needs a search engine on the network, which the sandbox does not give to tools",
    "memory_vector": "needs an embedding model, which the package downloads",
    "memory_rec_sum": "is not built; of the memory backends the key-value one is (env bfcl_memory)",
    "memory": "is an environment of its own, since the model first fills its memory: use env bfcl_memory",
}
STEPS = 20  # messages with calls that the official run lets a user turn have; one more ends the task
# What the official run says where functions are handed over (its wording for models that read them as text).
OFFICIAL_MORE_TOOLS = "{tools}\nI have updated some more functions you can choose from. What about now?"
MORE_TOOLS = "From now on there are more tools:\n{tools}\nUse them for what I asked before."
NO_TOOL = "None of my tools can do this."
NO_DETAILS = "I need more details before I can do this."
DONE = "This is done."
Call = tuple[str, list, dict]  # name, positional arguments (ground truth only), named arguments


@dataclass(frozen=True)
class BfclSettings:
    """Which tasks, how they are split, and how calls are run.

    protocol: "in_house" splits the task numbers into train, validation and test (our split, no leaderboard
    number); "benchmark" makes every task of the categories a test task, has no training tasks, and does as
    the official run does: unreadable calls are passed over, a message without a readable one ends the user
    turn, no number of bad calls ends the task, more than 20 messages with calls in one user turn do, and
    functions are handed over in its words.
    reward: "turns" (share of user turns passed before the first failure) or "accuracy" (1 if the checker
    says valid).
    """

    categories: tuple[str, ...] = ("base",)
    protocol: str = "in_house"
    test_tasks: int = 50  # task numbers, in_house
    validation_tasks: int = 30  # task numbers, taken from the others
    seed: int = 0  # of the split
    reward: str = "turns"
    max_consecutive_invalid: int = 3  # unreadable calls or unknown tools; then the episode ends. in_house
    short_descriptions: bool = False  # without the remark on the suite each tool's description starts with
    max_response_length: int | None = None  # characters the model sees of a response; the checker sees all
    workers: int = 2
    time_limit: float = 10.0  # seconds per turn's calls
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        for category in self.categories:
            group = next((name for name in ELSEWHERE if category.startswith(name)), None)
            if group is not None:
                raise ValueError(f"env.bfcl.categories: {category}: {ELSEWHERE[group]}")
            if category not in CATEGORIES:
                raise ValueError(f"env.bfcl.categories: one of {', '.join(CATEGORIES)}, got {category!r}")
        for name, known in (("protocol", ("in_house", "benchmark")), ("reward", ("turns", "accuracy"))):
            if getattr(self, name) not in known:
                raise ValueError(f"env.bfcl.{name}: one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not 0 < self.test_tasks + self.validation_tasks < TASKS:
            raise ValueError(
                f"env.bfcl: test_tasks + validation_tasks must leave some of the {TASKS} tasks to train on, "
                f"got {self.test_tasks} + {self.validation_tasks}"
            )


@dataclass
class BfclEpisode(Episode):
    """`turns`: per user turn so far, the calls of each assistant message."""

    turns: list[list[list[Call]]] = field(default_factory=lambda: [[]])
    steps: int = 0  # messages with calls in this user turn
    valid_calls: int = 0
    verdict: dict[str, Any] | None = None

    def made(self) -> list[Call]:
        return [call for turn in self.turns for step in turn for call in step]


class BfclEnv:
    """BFCL multi-turn. `solved` is the official checker's verdict; scores: accuracy, turns (share of turns
    passed)."""

    name = "bfcl"
    Settings = BfclSettings

    def __init__(self, settings: BfclSettings) -> None:
        self.settings = settings
        self.folder = package_folder("bfcl_eval")
        self.sandbox = Sandbox(
            workers=settings.workers,
            time_limit=settings.time_limit,
            memory_mb=settings.memory_mb,
            packages=[str(package_folder(name).parent) for name in ("bfcl_eval", "mpmath")],
        )
        self._records: dict[str, list[Record]] = {}

    @property
    def official(self) -> bool:
        return self.settings.protocol == "benchmark"

    @property
    def max_turns(self) -> int:
        """Assistant messages that an episode may need: no limit of a rollout should end it before."""
        return (STEPS + 1) * max(len(r.env["requests"]) for r in self.records("test"))

    # Records

    def records(self, split: str) -> list[Record]:
        if split not in ("train", "validation", "test"):
            raise ValueError(f"split: train, validation or test, got {split!r}")
        numbers = self._numbers(split)
        records = [r for category in self.settings.categories for r in self._category(category)]
        return [r for r in records if number(r.id) in numbers and (r.expert_trace or split != "train")]

    def _numbers(self, split: str) -> set[int]:
        """Task numbers of a split. Task k of every category tells the same story, so the categories split
        alike."""
        if self.settings.protocol == "benchmark":
            if split != "test":
                raise ValueError(f'env.bfcl.protocol: "benchmark" has test tasks only, {split} was asked for')
            return set(range(TASKS))
        order = random.Random(self.settings.seed).sample(range(TASKS), TASKS)
        test = self.settings.test_tasks
        held = test + self.settings.validation_tasks
        return set({"test": order[:test], "validation": order[test:held], "train": order[held:]}[split])

    def _category(self, category: str) -> list[Record]:
        if category not in self._records:
            tasks = read_jsonl(self.folder / "data" / f"BFCL_v4_multi_turn_{category}.json")
            answers = read_jsonl(
                self.folder / "data" / "possible_answer" / f"BFCL_v4_multi_turn_{category}.json"
            )
            truths = {row["id"]: row["ground_truth"] for row in answers}
            short, official = self.settings.short_descriptions, self.official
            records = [task_record(t, truths[t["id"]], category, short, official) for t in tasks]
            self._records[category] = self._with_traces(records)
        return self._records[category]

    def _with_traces(self, records: Sequence[Record]) -> list[Record]:
        """Expert traces from the ground truths, whose calls are run once, all records together."""
        jobs = [self._job(r, [], [c for turn in r.env["ground_truth"] for c in turn]) for r in records]
        traced = []
        for record, result in zip(records, self.sandbox.run(jobs), strict=True):
            if result.kind != "ok":
                raise RuntimeError(f"bfcl: the ground truth of {record.id} could not be run: {result.error}")
            trace = expert_trace(record, [text for _, text in result.value])
            traced.append(Record(record.id, record.prompt, record.tools, trace, record.env, record.source))
        return traced

    # Episodes

    def start(self, records: Sequence[Record]) -> list[BfclEpisode]:
        return [BfclEpisode(record) for record in records]

    def step(self, episodes: Sequence[BfclEpisode], turns: Sequence[AssistantTurn]) -> list[StepResult]:
        rows = list(zip(episodes, turns, strict=True))
        readable: list[list[Call]] = [
            [(c.name, [], dict(c.arguments or {})) for c in t.tool_calls if c.error is None] for t in turns
        ]
        running = [i for i, calls in enumerate(readable) if calls]
        jobs = [self._job(episodes[i].record, episodes[i].made(), readable[i]) for i in running]
        results = dict(zip(running, self.sandbox.run(jobs), strict=True))
        replies = [
            reply_or_end(e, partial(self._reply, e, t, readable[i], results.get(i)))
            for i, (e, t) in enumerate(rows)
        ]
        self._score([e for e in episodes if e.done])
        return [
            replace(reply, done=e.done, reward=self._reward(e) if e.done else 0.0)
            for e, reply in zip(episodes, replies, strict=True)
        ]

    def _job(self, record: Record, earlier: list[Call], calls: list[Call]) -> SandboxCall:
        arguments = {"task": record.env["task"], "earlier": earlier, "calls": calls}
        return SandboxCall(program(), "run_calls", arguments)

    def _reply(
        self, episode: BfclEpisode, turn: AssistantTurn, calls: list[Call], result: CallResult | None
    ) -> StepResult:
        """Tool responses and next user message of one row; books the calls."""
        answered = turn.tool_calls
        if self.official:  # it passes over what it cannot read
            answered = tuple(call for call in turn.tool_calls if call.error is None)
            for _ in range(len(turn.tool_calls) - len(answered)):
                episode.count_failure("bad_arguments")
        if not answered:
            return StepResult(user_message=self._next_request(episode))
        outputs: Iterator[tuple[str, str]]
        if result is not None and result.kind == "ok":
            episode.turns[-1].append(calls)
            outputs = iter([(kind, text) for kind, text in result.value])
        else:  # the calls hung or broke the worker: they count as not made
            message = f"Error during execution: {result.error}" if result else ""
            outputs = iter([("tool_error", message)] * len(calls))
        responses = tuple(self._book(episode, call, outputs) for call in answered)
        episode.steps += 1
        if self.official:
            episode.done = episode.steps > STEPS
        else:
            episode.done = episode.invalid_in_a_row >= self.settings.max_consecutive_invalid
        return StepResult(responses)

    def _book(self, episode: BfclEpisode, call: ToolCall, outputs: Iterator[tuple[str, str]]) -> str:
        episode.calls += 1
        if call.error is not None:
            kind, text = "bad_arguments", f"Error: the call could not be read: {call.error}"
        else:
            kind, text = next(outputs)
        if kind != "ok":
            episode.count_failure(kind)
        invalid = call.error is not None or kind == "unknown_tool"
        episode.invalid_in_a_row = episode.invalid_in_a_row + 1 if invalid else 0
        episode.valid_calls += not invalid
        limit = self.settings.max_response_length
        if limit is None or len(text) <= limit:
            return text
        return f"{text[:limit]}... ({len(text) - limit} characters cut off)"

    def _next_request(self, episode: BfclEpisode) -> str | None:
        requests = episode.record.env["requests"]
        if len(episode.turns) == len(requests):
            episode.done = True
            return None
        episode.turns.append([])
        episode.steps = 0
        return requests[len(episode.turns) - 1]

    # Scores

    def _score(self, episodes: Sequence[BfclEpisode]) -> None:
        open_ones = [e for e in episodes if e.verdict is None]
        jobs = []
        for episode in open_ones:
            env = episode.record.env
            arguments = {"task": env["task"], "turns": episode.turns, "truth": env["ground_truth"]}
            jobs.append(SandboxCall(program(), "score", arguments))
        for episode, result in zip(open_ones, self.sandbox.run(jobs), strict=True):
            failed = {"passed": 0, "valid": False, "error": f"checker: {result.error}"}
            episode.verdict = result.value if result.kind == "ok" else failed

    def _reward(self, episode: BfclEpisode) -> float:
        assert episode.verdict is not None
        if self.settings.reward == "accuracy":
            return float(episode.verdict["valid"])
        return episode.verdict["passed"] / len(episode.record.env["requests"])

    def finish(self, episodes: Sequence[BfclEpisode], truncated: Sequence[str | None]) -> list[Outcome]:
        for episode in episodes:
            if not episode.done:
                episode.turns.pop()  # a request that was cut off is not answered
        self._score(episodes)
        return [self._outcome(e, cut) for e, cut in zip(episodes, truncated, strict=True)]

    def _outcome(self, episode: BfclEpisode, truncated: str | None) -> Outcome:
        verdict = episode.verdict
        assert verdict is not None
        passed = verdict["passed"] / len(episode.record.env["requests"])
        failure = None if verdict["valid"] else episode.failure_kind(truncated, episode.valid_calls)
        scores = {"accuracy": float(verdict["valid"]), "turns": passed}
        return Outcome(self._reward(episode), verdict["valid"], scores, episode.calls, failure)

    def close(self) -> None:
        self.sandbox.close()


def package_folder(package: str) -> Path:
    """Where a package is installed, found without importing it (bfcl_eval's utils make folders when
    imported)."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"env.bfcl and env.bfcl_memory need the package {package}: "
            "pip install --no-deps bfcl-eval==2026.3.23 mpmath rank-bm25 overrides"
        )
    return Path(spec.origin).parent


@cache
def program() -> Program:
    return Program(Path(__file__).with_name("worker.py").read_text(), fresh=False)


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def number(record_id: str) -> int:
    return int(record_id.rsplit("_", 1)[1])


def task_record(
    task: Mapping[str, Any],
    truth: Sequence[Sequence[str]],
    category: str,
    short: bool = False,
    official: bool = False,
) -> Record:
    """The record of one task, without a trace. env: task, requests (later user turns' texts), more_tools,
    ground_truth. official: whether functions are handed over in the official run's words."""
    functions = [
        f for cls in task["involved_classes"] for f in function_docs(cls) if f["name"] not in excluded(task)
    ]
    held_back = {name: int(turn) for turn, names in task.get("missed_function", {}).items() for name in names}
    tools = [tool_schema(f, short) for f in functions if f["name"] not in held_back]
    more = {
        str(turn): [tool_schema(f, short) for f in functions if held_back.get(f["name"]) == turn]
        for turn in sorted(set(held_back.values()))
    }
    parameters = {f["name"]: list(f["parameters"]["properties"]) for f in functions_of(task)}
    env = {
        "category": category,
        "task": {
            "initial_config": task["initial_config"],
            "involved_classes": task["involved_classes"],
            "long_context": category == "long_context",
        },
        "requests": [
            request(messages, more.get(str(turn)), official) for turn, messages in enumerate(task["question"])
        ],
        "more_tools": more,
        "ground_truth": [[json_call(text, parameters) for text in turn] for turn in truth],
    }
    prompt = tuple({"role": m["role"], "content": m["content"]} for m in task["question"][0])
    return Record(task["id"], prompt, tuple(tools), (), env, f"bfcl-eval:{task['id']}")


def excluded(task: Mapping[str, Any]) -> list[str]:
    return task.get("excluded_function", [])


def functions_of(task: Mapping[str, Any]) -> list[dict]:
    return [f for cls in task["involved_classes"] for f in function_docs(cls)]


@cache
def function_docs(cls: str) -> list[dict]:
    return read_jsonl(
        package_folder("bfcl_eval") / "data" / "multi_turn_func_doc" / f"{FUNCTION_DOCS[cls]}.json"
    )


def tool_schema(function: Mapping[str, Any], short: bool = False) -> dict:
    """The function's documentation as a tool with a valid JSON Schema."""
    parameters = json_schema(function["parameters"])
    description = function["description"]
    if short:
        description = description.split("Tool description:")[-1].strip()
    body = {"name": function["name"], "description": description, "parameters": parameters}
    return {"type": "function", "function": body}


def json_schema(spec: Any) -> Any:
    """BFCL's type names replaced by JSON Schema's, at every depth; property names are left alone."""
    if not isinstance(spec, Mapping):
        return spec
    out: dict[str, Any] = {}
    for key, value in spec.items():
        if key == "type":
            kind = JSON_TYPES.get(value, value)
            out |= {"type": kind} if kind is not None else {}
        elif key == "properties":
            out[key] = {name: json_schema(sub) for name, sub in value.items()}
        elif key == "items":
            out[key] = json_schema(value)
        else:
            out[key] = value
    return out


def request(
    messages: Sequence[Mapping[str, str]], more: Sequence[dict] | None, official: bool = False
) -> str:
    """A user turn's text. Where functions held back so far are handed over, their schemas stand in it."""
    texts = [m["content"] for m in messages]
    if more:
        tools = "\n".join(json.dumps(tool["function"]) for tool in more)
        texts.append((OFFICIAL_MORE_TOOLS if official else MORE_TOOLS).format(tools=tools))
    return "\n".join(texts)


def json_call(text: str, parameters: Mapping[str, Sequence[str]]) -> Call:
    """`mv(source='a', destination='b')` as (name, [], arguments); positional arguments get their documented
    names."""
    node = ast.parse(text, mode="eval").body
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError(f"bfcl: not a call: {text!r}")
    name = node.func.id
    named = {k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg is not None}
    positional = dict(zip(parameters[name], map(ast.literal_eval, node.args), strict=False))
    return name, [], positional | named


def expert_trace(record: Record, responses: Sequence[str]) -> tuple[dict, ...]:
    """The ground truth as a conversation: every call with its real response, each user turn closed by a
    sentence. Empty where the ground truth uses a function before it is handed over (one miss_func task
    does): no model could learn that.
    """
    env = record.env
    outputs = iter(responses)
    messages: list[dict] = []
    tools = list(record.tools)
    for turn, calls in enumerate(env["ground_truth"]):
        if turn > 0:
            added = env["more_tools"].get(str(turn), [])
            tools += added
            message = {"role": "user", "content": env["requests"][turn]}
            messages.append(message | ({"tools": added} if added else {}))
        closing = DONE
        if not calls:
            closing = NO_TOOL if str(turn + 1) in env["more_tools"] else NO_DETAILS
        pairs = [(name, arguments) for name, _, arguments in calls]
        if not {name for name, _ in pairs} <= {tool["function"]["name"] for tool in tools}:
            return ()
        messages += trace_from_calls(env["requests"][turn], tools, pairs, lambda _: next(outputs), closing)
    return tuple(messages)
