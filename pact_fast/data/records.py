"""Training records: a prompt, its tools, an expert trace and whatever the environment needs.

One record a line (JSONL) or row (parquet; every column a JSON string or a nested value):

    id            optional, unique in its file; default "<file stem>:<line>"
    prompt        [{"role": "system"|"user"|"assistant", "content": str}, ...], last one from the user
    tools         [{"type": "function", "function": {"name", "description", "parameters": JSON Schema}}, ...]
    expert_trace  [{"role": "assistant", "reasoning_content", "content",
                    "tool_calls": [{"name", "arguments"}], "reasoning_segments"?, "reasoning_levels"?}
                   | {"role": "tool", "name" or "tool_call_id", "content"}
                   | {"role": "user", "content", "tools"?}, ...]
    env           {...} handed to the environment as it is; other top-level fields are added to it

A trace ends on a tool response or on an answer. An assistant message may say how its reasoning is cut:
`reasoning_segments` [{"type", "start", "end"}, ...], characters of reasoning_content, or finished
`reasoning_levels`, the ends of L1, L2, ... in characters (pact_fast.data.segments).

`messages` may stand for prompt and trace together: the trace starts at its first assistant message.
Every record is checked when it is loaded, so that a bad one stops a run before training begins.
"""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from pact_fast.data.formats import TAGS
from pact_fast.data.reading import clean_value, half_surrogate, read_json
from pact_fast.data.segments import check_levels, check_segments

FIELDS = ("id", "prompt", "tools", "expert_trace", "env", "messages")


class RecordError(ValueError):
    """One bad record. Attributes: file, line (1-based line or row), record (id or None), field, problem."""

    def __init__(self, problem: str, *, file: str, line: int, record: str | None, field: str):
        self.problem, self.file, self.line, self.record, self.field = problem, file, line, record, field
        name = f"record {record!r}" if record is not None else "record without id"
        super().__init__(f"{file}:{line}: {name}: {field}: {problem}")


@dataclass(frozen=True)
class Record:
    """A checked record; messages and tools are in the normal form of this module's docstring."""

    id: str
    prompt: tuple[dict, ...]
    tools: tuple[dict, ...]
    expert_trace: tuple[dict, ...] = ()
    env: dict = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class LoadedRecords:
    """`records` that passed and, with skip_bad, the error of each record that was left out."""

    records: list[Record]
    skipped: list[RecordError]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)


def load_records(path: str | Path, *, require_trace: bool = True, skip_bad: bool = False) -> LoadedRecords:
    """Read and check every record of a .jsonl or .parquet file.

    `require_trace=False` accepts records without an expert trace (pure RL, evaluation).
    Raises RecordError for the first bad record, unless `skip_bad`, which collects them in `.skipped`;
    ValueError where the file type is unknown or no record is left; FileNotFoundError.
    """
    path = Path(path)
    records: list[Record] = []
    errors: list[RecordError] = []
    first_line: dict[str, int] = {}
    for line, raw in _read_rows(path):
        try:
            record = parse_record(raw, file=str(path), line=line, require_trace=require_trace)
            if record.id in first_line:
                problem = f"id is already used in line {first_line[record.id]}"
                raise RecordError(problem, file=str(path), line=line, record=record.id, field="id")
        except RecordError as error:
            errors.append(error)
            continue
        first_line[record.id] = line
        records.append(record)
    if errors and not skip_bad:
        first = errors[0]
        more = f"; {len(errors) - 1} more bad records" if len(errors) > 1 else ""
        problem = f"{first.problem}{more} (env.settings.skip_bad_records leaves bad records out)"
        raise RecordError(problem, file=first.file, line=first.line, record=first.record, field=first.field)
    if not records:
        raise ValueError(f"{path}: no record" + (f" left, all {len(errors)} are bad" if errors else ""))
    return LoadedRecords(records, errors)


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Write records as .jsonl, or as .parquet with one JSON string a field (schema free of the data)."""
    path = Path(path)
    rows = [
        {
            "id": record.id,
            "prompt": list(record.prompt),
            "tools": list(record.tools),
            "expert_trace": list(record.expert_trace),
            "env": record.env,
        }
        for record in records
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = ("id", "prompt", "tools", "expert_trace", "env")
        columns = {
            name: [row[name] if name == "id" else json.dumps(row[name], ensure_ascii=False) for row in rows]
            for name in names
        }
        pq.write_table(pa.table({name: pa.array(columns[name], pa.string()) for name in names}), path)
    else:
        raise ValueError(f"{path}: unknown file type {path.suffix!r}; use .jsonl or .parquet")


def parse_record(raw: Any, *, file: str, line: int, require_trace: bool = True) -> Record:
    """Check one record as read from a file (dict, or the text of a JSONL line) and bring it to normal form.

    Raises RecordError at the first problem, naming the field by its path, e.g. expert_trace[2].tool_calls[0].
    """
    check = _Checker(file, line)
    if isinstance(raw, str | bytes):
        try:
            raw = read_json(raw)
        except ValueError as error:
            check.fail("(whole line)", f"is not JSON: {error}")
    if not isinstance(raw, dict):
        check.fail("(whole line)", f"must be a JSON object, got {type(raw).__name__}")
    raw = {key: _decode_column(key, value, check) for key, value in raw.items()}
    if (where := half_surrogate(raw)) is not None:
        warnings.warn(
            f"{file}:{line}: {where} holds half a surrogate pair (a cut emoji, say), "
            "which no tokenizer reads: taken as U+FFFD",
            stacklevel=2,
        )
        raw = clean_value(raw)
    record_id = raw.get("id")
    if record_id is None or record_id == "":
        record_id = f"{Path(file).stem}:{line}"
    check.record = str(record_id)

    prompt, trace = raw.get("prompt"), raw.get("expert_trace")
    if prompt is None and isinstance(raw.get("messages"), list):
        messages = raw["messages"]
        start = next((i for i, m in enumerate(messages) if _role(m) == "assistant"), len(messages))
        prompt = messages[:start]
        trace = trace if trace is not None else messages[start:]
    if prompt is None:
        check.missing("prompt", raw)
    if raw.get("tools") is None:
        check.missing("tools", raw)
    if trace is None and require_trace:
        check.missing("expert_trace", raw)
    env = raw.get("env") or {}
    if not isinstance(env, dict):
        check.fail("env", f"must be an object, got {type(env).__name__}")
    extra = {key: value for key, value in raw.items() if key not in FIELDS}

    tools = check.tools(raw["tools"], "tools")
    return Record(
        id=check.record,
        prompt=check.prompt(prompt),
        tools=tools,
        expert_trace=check.trace(trace or [], tools, require_trace),
        env={**extra, **env},
        source=f"{file}:{line}",
    )


def check_prompt_lengths(
    records: Sequence[Record], lengths: Sequence[int], limit: int, *, skip_bad: bool = False
) -> LoadedRecords:
    """Refuse records whose prompt has more than `limit` tokens (`lengths` gives each prompt's token count).

    Raises RecordError naming the record, or lists it in `.skipped` with skip_bad.
    """
    kept, skipped = [], []
    for record, length in zip(records, lengths, strict=True):
        if length <= limit:
            kept.append(record)
            continue
        file, _, line = record.source.rpartition(":")
        problem = f"prompt has {length} tokens, the limit is {limit}: raise the limit or drop the record"
        error = RecordError(
            problem,
            file=file or record.source,
            line=int(line) if line.isdigit() else 0,
            record=record.id,
            field="prompt",
        )
        if not skip_bad:
            raise error
        skipped.append(error)
    return LoadedRecords(kept, skipped)


def _read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such record file")
    if path.suffix == ".jsonl":
        with path.open("rb") as lines:  # bytes: a line that is not UTF-8 is one bad record, not a bad file
            for number, text in enumerate(lines, 1):
                if number == 1:
                    text = text.removeprefix(b"\xef\xbb\xbf")  # what Windows editors write
                if text.strip():
                    yield number, text
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet as pq

        number = 0
        try:
            for batch in pq.ParquetFile(path).iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield number, _drop_nulls(row)
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).split("\n")[0] or type(error).__name__
            after = f" after row {number}" if number else ""
            raise ValueError(f"{path}: is damaged or no parquet file{after}: {reason}") from None
    else:
        raise ValueError(f"{path}: unknown file type {path.suffix!r}; use .jsonl or .parquet")


def _drop_nulls(value: Any) -> Any:
    """Arrow structs hold every key of the column; a null in one means that the key was absent."""
    if isinstance(value, dict):
        return {key: _drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_drop_nulls(item) for item in value]
    return value


def _decode_column(key: str, value: Any, check: _Checker) -> Any:
    """A parquet column of prompt, tools, ... may hold JSON text instead of nested values."""
    if key in FIELDS and key != "id" and isinstance(value, str):
        try:
            return read_json(value)
        except ValueError as error:
            check.fail(key, f"is text but not JSON: {error}")
    return value


def _role(message: Any) -> str | None:
    return message.get("role") if isinstance(message, dict) else None


@dataclass
class _Call:
    """A call of the trace that waits for its response."""

    name: str
    id: Any
    response: dict | None = None


class _Checker:
    """Checks of one record; `fail` raises with the record's place filled in."""

    def __init__(self, file: str, line: int):
        self.file, self.line = file, line
        self.record: str | None = None

    def fail(self, field: str, problem: str) -> NoReturn:
        raise RecordError(problem, file=self.file, line=self.line, record=self.record, field=field)

    def missing(self, name: str, raw: dict) -> None:
        near = difflib.get_close_matches(name, [key for key in raw if key not in FIELDS], 1)
        self.fail(name, "is missing" + (f"; found {near[0]!r}: misspelt?" if near else ""))

    def messages(self, value: Any, where: str, roles: tuple[str, ...]) -> list[dict]:
        if not isinstance(value, list):
            self.fail(where, f"must be a list of messages, got {type(value).__name__}")
        for i, message in enumerate(value):
            if not isinstance(message, dict):
                self.fail(f"{where}[{i}]", f"must be a message object, got {type(message).__name__}")
            if message.get("role") not in roles:
                self.fail(
                    f"{where}[{i}].role", f"is {message.get('role')!r}; must be one of {', '.join(roles)}"
                )
        return value

    def text(self, message: dict, key: str, where: str, *, optional: bool = False) -> str:
        value = message.get(key)
        if value is None and optional:
            return ""
        if not isinstance(value, str):
            self.fail(f"{where}.{key}", "is missing" if value is None else f"must be text, got {value!r:.80}")
        return value

    def tools(self, value: Any, where: str) -> tuple[dict, ...]:
        if not isinstance(value, list):
            self.fail(where, f"must be a list of tools, got {type(value).__name__}")
        tools, names = [], set()
        for i, tool in enumerate(value):
            function = tool.get("function", tool) if isinstance(tool, dict) else None
            if not isinstance(function, dict):
                self.fail(f"{where}[{i}]", "must be an object with 'function'")
            name = self.text(function, "name", f"{where}[{i}].function")
            parameters = function.get("parameters") or {"type": "object", "properties": {}}
            if not isinstance(parameters, dict) or not isinstance(parameters.get("properties", {}), dict):
                self.fail(f"{where}[{i}].function.parameters", "must be a JSON Schema object")
            if name in names:
                self.fail(f"{where}[{i}].function.name", f"tool {name!r} is listed twice")
            names.add(name)
            description = self.text(function, "description", f"{where}[{i}].function", optional=True)
            body = {**function, "name": name, "description": description, "parameters": parameters}
            tools.append({"type": "function", "function": body})
        return tuple(tools)

    def prompt(self, value: Any) -> tuple[dict, ...]:
        messages = self.messages(value, "prompt", ("system", "user", "assistant"))
        if not messages:
            self.fail("prompt", "is empty")
        if messages[-1]["role"] != "user":
            self.fail("prompt", f"must end with a user message, ends with {messages[-1]['role']!r}")
        return tuple(
            {"role": m["role"], "content": self.text(m, "content", f"prompt[{i}]")}
            for i, m in enumerate(messages)
        )

    def trace(self, value: Any, tools: tuple[dict, ...], required: bool) -> tuple[dict, ...]:
        messages = self.messages(value, "expert_trace", ("assistant", "tool", "user"))
        if not messages:
            if required:
                self.fail("expert_trace", "is empty")
            return ()
        if messages[0]["role"] != "assistant":
            self.fail("expert_trace[0].role", f"must be 'assistant', is {messages[0]['role']!r}")
        known = {tool["function"]["name"] for tool in tools}
        unanswered: list[_Call] = []
        normal: list[dict] = []
        for i, message in enumerate(messages):
            where = f"expert_trace[{i}]"
            if message["role"] == "tool":
                self._tool_response(message, where, unanswered)
                if all(call.response is not None for call in unanswered):
                    normal += [call.response for call in unanswered if call.response is not None]
                    unanswered = []
                continue
            self._all_answered(unanswered, where, " before this message")
            previous = messages[i - 1]["role"] if i else None
            if (message["role"], previous) in (
                ("assistant", "assistant"),
                ("user", "tool"),
                ("user", "user"),
            ):
                self.fail(f"{where}.role", f"{message['role']!r} cannot follow {previous!r}")
            if message["role"] == "user":
                added = self.tools(message.get("tools") or [], f"{where}.tools")
                known |= {tool["function"]["name"] for tool in added}
                turn: dict[str, Any] = {"role": "user", "content": self.text(message, "content", where)}
                normal.append({**turn, "tools": list(added)} if added else turn)
                continue
            turn = self._assistant(message, where, known)
            ids = [call.get("id") for call in message.get("tool_calls") or []]
            unanswered = [_Call(c["name"], i) for c, i in zip(turn["tool_calls"], ids, strict=True)]
            named = [i for i in ids if i is not None]
            if len(set(map(str, named))) != len(named):
                self.fail(f"{where}.tool_calls", f"two calls have the same id: {named}")
            normal.append(turn)
        for call in unanswered:
            if call.response is None:
                problem = f"call to {call.name!r} has no tool response"
                where = f"expert_trace[{len(messages) - 1}]"
                self.fail(where, f"{problem}: a trace ends on a tool response or an answer")
        return tuple(normal)

    def _all_answered(self, calls: list[_Call], where: str, when: str) -> None:
        for call in calls:
            if call.response is None:
                self.fail(where, f"call to {call.name!r} has no tool response{when}")

    def _tool_response(self, message: dict, where: str, calls: list[_Call]) -> None:
        """Gives a response to its call: the one that `tool_call_id` names, else the first without one."""
        open_calls = [call for call in calls if call.response is None]
        if not open_calls:
            self.fail(where, "tool response without its call")
        call, wanted = open_calls[0], message.get("tool_call_id")
        if wanted is not None and any(c.id is not None for c in calls):
            found = [c for c in calls if c.id is not None and str(c.id) == str(wanted)]
            if not found:
                known = ", ".join(repr(c.id) for c in calls)
                self.fail(
                    f"{where}.tool_call_id", f"{wanted!r} is the id of no call before it; there are {known}"
                )
            if found[0].response is not None:
                self.fail(f"{where}.tool_call_id", f"the call {wanted!r} has a response already")
            call = found[0]
        name = message.get("name") or call.name
        if name != call.name:
            self.fail(f"{where}.name", f"tool response of {name!r} without its call; expected {call.name!r}")
        call.response = {"role": "tool", "name": name, "content": self.text(message, "content", where)}

    def _assistant(self, message: dict, where: str, known: set[str]) -> dict:
        content = self.text(message, "content", where, optional=True)
        reasoning = self.text(message, "reasoning_content", where, optional=True)
        if not reasoning and content.lstrip().startswith("<think>") and "</think>" in content:
            reasoning, content = content.lstrip().removeprefix("<think>").split("</think>", 1)
        for key, text in (("reasoning_content", reasoning), ("content", content)):
            for tag in TAGS:
                if tag in text:
                    self.fail(f"{where}.{key}", f"contains the tag {tag}; the chat format writes tags itself")
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list):
            self.fail(f"{where}.tool_calls", f"must be a list, got {type(calls).__name__}")
        normal = [self._call(call, f"{where}.tool_calls[{j}]", known) for j, call in enumerate(calls)]
        turn = {
            "role": "assistant",
            "reasoning_content": reasoning.strip("\n"),
            "content": content.strip("\n"),
            "tool_calls": normal,
        }
        if not (turn["reasoning_content"] or turn["content"] or normal):
            self.fail(where, "assistant message is empty: no reasoning, content or tool call")
        return turn | self._cuts(message, reasoning, where)

    def _cuts(self, message: dict, raw: str, where: str) -> dict[str, Any]:
        """The message's own `reasoning_segments` or `reasoning_levels`, counted in the normal form's
        reasoning."""
        text, front = raw.strip("\n"), len(raw) - len(raw.lstrip("\n"))

        def moved(value: Any) -> Any:
            """A place in `raw` as one in `text`; what is no place in `raw` stays, to be told of."""
            inside = type(value) is int and 0 <= value <= len(raw)
            return min(max(value - front, 0), len(text)) if inside else value

        def fail(key: str, problem: str) -> NoReturn:
            place, _, told = problem.partition(": ") if problem[:1] in "[:" else ("", "", problem)
            self.fail(f"{where}.{key}{place}", told)

        cuts: dict[str, Any] = {}
        segments, levels = message.get("reasoning_segments"), message.get("reasoning_levels")
        if isinstance(segments, list):
            segments = [
                {k: moved(v) if k != "type" else v for k, v in s.items() if k in ("type", "start", "end")}
                if isinstance(s, dict)
                else s
                for s in segments
            ]
        if segments is not None:
            if problem := check_segments(segments, text):
                fail("reasoning_segments", problem)
            cuts["reasoning_segments"] = segments
        if levels is not None:
            levels = [moved(end) for end in levels] if isinstance(levels, list) else levels
            if problem := check_levels(levels, text):
                fail("reasoning_levels", problem)
            cuts["reasoning_levels"] = levels
        return cuts

    def _call(self, call: Any, where: str, known: set[str]) -> dict:
        body = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(body, dict):
            self.fail(where, f"must be an object with 'name' and 'arguments', got {call!r:.80}")
        name = self.text(body, "name", where)
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            self.fail(f"{where}.name", f"calls unknown tool {name!r}, tools has {sorted(known)}{hint}")
        arguments = body.get("arguments")
        if arguments is None:
            self.fail(f"{where}.arguments", "is missing")
        if isinstance(arguments, str):
            try:
                arguments = read_json(arguments)
            except ValueError as error:
                self.fail(f"{where}.arguments", f"is not JSON: {error}: {arguments!r:.80}")
        if not isinstance(arguments, dict):
            self.fail(f"{where}.arguments", f"must be a JSON object, got {arguments!r:.80}")
        return {"name": name, "arguments": arguments}
