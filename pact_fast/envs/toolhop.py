"""ToolHop (arXiv 2501.02506): multi-hop questions over Python tools, scored by the final answer.

Records as published, in a .json list or .jsonl: `question`, `answer`, `tools` ({sub-question: schema}),
`functions` (a list of sources). The data set is not shipped. The prompts are our own wording; put the
benchmark's own text into `prompt_template` to compare with published numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pact_fast.data.chat import AssistantTurn, ToolCall
from pact_fast.data.reading import read_json
from pact_fast.data.records import Record, parse_record
from pact_fast.envs.answers import answers_of
from pact_fast.envs.base import Outcome
from pact_fast.envs.python_tools import (
    PythonToolsEnv,
    PythonToolsSettings,
    SourceEpisode,
    check_settings,
    matches,
)
from pact_fast.envs.sandbox.sandbox import Program, SandboxCall

FORMAT = (
    "Write dates as YYYY-MM-DD, names as first name then last name, and numbers in digits alone. "
    "Put your answer between <answer> and </answer> and keep it short.\nQuestion: {question}"
)
TEMPLATES = {
    "direct": "Answer the question below. " + FORMAT,
    "mandatory": "Answer the question below. Take every step, the last one too, with the tools given; "
    "do not rely on what you know. " + FORMAT,
    "free": "Answer the question below. You may use the tools given. " + FORMAT,
}
RENDER = """
def render_result(name, arguments):
    import json
    return json.dumps(globals()[name](**arguments), ensure_ascii=False)
"""


@dataclass(frozen=True)
class ToolHopSettings(PythonToolsSettings):
    """scenario: "direct" (no tools), "mandatory" (tools at every step) or "free". prompt_template: text with
    {question}, instead of the built-in one."""

    scenario: str = "mandatory"
    prompt_template: str | None = None

    def __post_init__(self) -> None:
        if self.scenario not in TEMPLATES:
            raise ValueError(f"env.toolhop.scenario: one of {', '.join(TEMPLATES)}, got {self.scenario!r}")
        if self.prompt_template is not None and "{question}" not in self.prompt_template:
            raise ValueError("env.toolhop.prompt_template: must contain {question}")
        check_settings("toolhop", self, ("solve",))


class ToolHopEnv(PythonToolsEnv):
    """ToolHop tasks; reward and `solved` are answer correctness: the gold answer stands in the last
    assistant message, or, where that has text, in the tool message just before it."""

    name = "toolhop"
    Settings = ToolHopSettings

    def _read(self, path: Path) -> list[Record]:
        return [self._record(row, str(path), line) for line, row in read_rows(path)]

    def _record(self, row: Mapping[str, Any], file: str, line: int) -> Record:
        for key, kind in (("question", str), ("tools", dict), ("functions", list)):
            if not isinstance(row.get(key), kind):
                raise ValueError(f"{file}:{line}: {key}: must be a {kind.__name__}, got {row.get(key)!r:.80}")
        if "answer" not in row:
            raise ValueError(f"{file}:{line}: answer: is missing")
        template = self.settings.prompt_template or TEMPLATES[self.settings.scenario]
        raw = {
            "id": str(row.get("id", f"{Path(file).stem}:{line}")),
            "prompt": [{"role": "user", "content": template.replace("{question}", row["question"])}],
            "tools": [] if self.settings.scenario == "direct" else list(row["tools"].values()),
            "expert_trace": row.get("expert_trace"),
            "env": {
                "answer": str(row["answer"]),
                "codes": by_name(row["functions"], f"{file}:{line}"),
                "category": f"{len(row['tools'])} tools",  # one a hop
            },
        }
        return parse_record(raw, file=file, line=line, require_trace=False)

    def _runs(self, episode: SourceEpisode, call: ToolCall) -> bool:
        return self.settings.scenario != "direct" and super()._runs(episode, call)

    def _job(self, episode: SourceEpisode, call: ToolCall) -> SandboxCall:
        program = Program(episode.record.env["codes"][call.name] + "\n" + RENDER)
        return SandboxCall(program, "render_result", {"name": call.name, "arguments": call.arguments})

    def _turn_reward(self, episode: SourceEpisode, turn: AssistantTurn, newly: int) -> float:
        return 0.0 if turn.tool_calls else float(self._answered(episode))

    def _answered(self, episode: SourceEpisode) -> bool:
        if not episode.closed or not episode.content:
            return False
        texts = [text for text in (episode.content, episode.last_response) if text is not None]
        return any(matches(text, answer) for text in texts for answer in answers_of(episode.record))

    def _outcome(self, episode: SourceEpisode, truncated: str | None) -> Outcome:
        right = float(self._answered(episode))
        return self._book(episode, truncated, right, right == 1.0, {"answer_correctness": right})


def read_rows(path: Path) -> list[tuple[int, dict]]:
    """(line or position, row) of a .jsonl file or of a .json file that holds a list."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such ToolHop file")
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    lines = list(enumerate(text.split(b"\n"), 1)) if path.suffix == ".jsonl" else [(1, text)]
    rows = []
    for number, line in lines:
        if not line.strip():
            continue
        try:
            value = read_json(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: is not JSON: {error}") from None
        rows += [(number, value)] if path.suffix == ".jsonl" else list(enumerate(value, 1))
    return rows


def by_name(functions: list[str], where: str) -> dict[str, str]:
    """{function name: source}, the name being that of the first function a source defines."""
    named = {}
    for i, source in enumerate(functions):
        found = re.search(r"^def\s+(\w+)\s*\(", source, re.MULTILINE)
        if found is None:
            raise ValueError(f"{where}: functions[{i}]: defines no function")
        named[found.group(1)] = source
    return named
