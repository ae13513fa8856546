"""Reading an assistant turn as models really write it.

Rules, in this order (each has a test of its name in tests/data/test_parsing.py):

1. Reasoning is what stands in every `<think>` ... `</think>`; where the first `</think>` has no opening tag,
   all that stands before it. Calls inside a closed thinking block are thoughts: they are not run.
2. A thinking block that is never closed: on a turn cut by the length limit all of it is reasoning. On a
   turn that the model ended itself, the reasoning stops at the first tool call and the calls count: it
   forgot the closing tag.
3. hermes: every `<tool_call>` ... `</tool_call>` block holds calls, in order. A missing closing tag ends
   the block at the next tag or at the end of the turn; a turn cut inside a block yields a call with
   an error. JSON without tags is text, not a call.
   llama: the turn, less its reasoning, is calls if it starts with `{` or `[` (after an optional
   <|python_tag|> and one code fence); objects may follow each other, separated by blanks, `;` or `,`.
4. A block may hold one object, a list of objects, or several objects in a row: each is a call.
5. Repairs before a block counts as broken: code fences, raw line breaks in strings, trailing commas, Python
   literals (single quotes, True/None) and up to three missing closing brackets.
6. `arguments` or `parameters`, as an object or as JSON text of one; {"function": {...}} is unwrapped; absent
   arguments are {}. Anything else is a call with `error` set and arguments None: the environment answers it
   with the error and it counts as a call.
7. What is outside reasoning and calls is the content.
8. A tag inside the JSON of a call is data, as is a tag that was spelt with ordinary tokens where the
   tokenizer
   has the tag as a token of its own (`ChatFormat.parse` marks those with SPELT).
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from typing import Any

from pact_fast.data.formats import CALL_CLOSE, CALL_OPEN, THINK_CLOSE, THINK_OPEN, CallSyntax
from pact_fast.data.reading import clean_value, read_json, read_json_at


@dataclass(frozen=True)
class ToolCall:
    """One call. `arguments` is None and `error` says why where it could not be read; `raw` is the text of
    it.
    """

    name: str
    arguments: dict | None
    error: str | None
    raw: str


@dataclass(frozen=True)
class AssistantTurn:
    """One parsed turn; `complete` is False where the length limit cut it."""

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...]
    raw: str
    complete: bool


SPELT = "\ufdd0"  # stands inside tags that are text: a noncharacter, which Unicode keeps for such inner use


def parse_turn(text: str, syntax: CallSyntax, *, complete: bool) -> AssistantTurn:
    """Parse the text of one assistant turn (without its end-of-turn token) by the rules of this module."""
    reasoning, content, blocks = (_tagged if syntax.tagged else _bare)(text, complete)
    calls: list[ToolCall] = []
    for block, closed in blocks:
        if not closed and not complete and syntax.tagged:
            calls.append(ToolCall("", None, "the call was cut off by the length limit", _plain(block)))
        else:
            calls.extend(_read_calls(_plain(block)))
    return AssistantTurn(_plain(reasoning), _plain(content), tuple(calls), _plain(text), complete)


def _plain(text: str) -> str:
    return text.replace(SPELT, "")


_TAG = re.compile("|".join(map(re.escape, (THINK_OPEN, THINK_CLOSE, CALL_OPEN, CALL_CLOSE))))

Blocks = list[tuple[str, bool]]  # text between the tags of a call; whether the closing tag is there


def _tagged(text: str, complete: bool) -> tuple[str, str, Blocks]:
    """Reasoning, content and call blocks of a turn whose calls stand between tags."""
    reasoning: list[str] = []
    outside: list[str] = []
    blocks: Blocks = []
    begin = position = 0  # of what is not sorted yet; where the search for tags goes on
    opened: tuple[int, int, int] | None = None  # an open thinking block: start, pieces and calls before it
    first = True  # a closing tag without an opening one is one only where it is the first
    while (tag := _TAG.search(text, position)) is not None:
        position = tag.end()
        if tag.group() == THINK_OPEN:
            if opened is None:
                outside.append(text[begin : tag.start()])
                begin, opened = position, (position, len(outside), len(blocks))
        elif tag.group() == THINK_CLOSE:
            if opened is None and not first:
                continue
            start, pieces, calls = opened or (0, 0, 0)
            reasoning.append(text[start : tag.start()])
            del outside[pieces:], blocks[calls:]
            begin, opened, first = position, None, False
        elif tag.group() == CALL_OPEN:
            outside.append(text[begin : tag.start()])
            end = _json_end(text, position)
            closing = _TAG.search(text, end)
            if end == position or closing is None or text[end : closing.start()].strip():
                closing = _TAG.search(text, position if end == position else end)
            closed = closing is not None and closing.group() == CALL_CLOSE
            stop = closing.start() if closing is not None else len(text)
            blocks.append((text[position:stop].strip(), closed))
            begin = position = closing.end() if closed and closing is not None else stop
    outside.append(text[begin:])
    if opened is not None:  # rule 2
        start, pieces, calls = opened
        if complete and len(blocks) > calls:
            call = text.find(CALL_OPEN, start)
            reasoning.append(text[start:call])
            outside[pieces] = ""  # what stands between the tag and the call is in the reasoning
        else:
            reasoning.append(text[start:])
            del outside[pieces:], blocks[calls:]
    content = "\n".join(piece.strip() for piece in outside if piece.strip())
    thought = "\n".join(piece.strip() for piece in reasoning if piece.strip())
    return thought, content.replace(CALL_CLOSE, "").strip(), blocks


def _json_end(text: str, position: int) -> int:
    """Where the JSON values that begin at `position` end; `position` itself where none begins there."""
    separator = re.compile(r"[\s;,]*")
    end = position
    while True:
        begin = separator.match(text, end).end()  # type: ignore[union-attr]
        try:
            _, end = read_json_at(text, begin, strict=False)
        except ValueError:
            return end


def _bare(text: str, complete: bool) -> tuple[str, str, Blocks]:
    """The same of a turn whose calls are bare JSON: a thinking block, if any, comes first."""
    body = text.replace("<|python_tag|>", "", 1).lstrip()
    rest, reasoning = text, ""
    end = _json_end(body, 0)
    if not body.startswith(("{", "[")) or not end or body[end:].strip():
        before, close, after = text.partition(THINK_CLOSE)
        if close:
            reasoning, rest = before.replace(THINK_OPEN, "", 1).strip(), after
        elif THINK_OPEN in text:
            lead, _, thought = text.partition(THINK_OPEN)
            return thought.strip(), lead.strip(), []
    blocks, content = _bare_block(rest)
    return reasoning, content, blocks


def _bare_block(text: str) -> tuple[Blocks, str]:
    body = _strip_fence(text.replace("<|python_tag|>", "", 1))
    if body.startswith(("{", "[")):
        return [(body, True)], ""
    # A sentence before the calls is content, as in the hermes format.
    start = re.search(r'^[ \t]*\{\s*"(?:name|function)"', body, re.MULTILINE)
    if start is None:
        return [], text.strip()
    return [(body[start.start() :].strip(), True)], body[: start.start()].strip()


def _strip_fence(text: str) -> str:
    match = re.fullmatch(r"```[a-z_]*\n(.*?)\n?```", text.strip(), re.DOTALL)
    return (match.group(1) if match else text).strip()


def _read_calls(block: str) -> list[ToolCall]:
    block = _strip_fence(block)
    if not block:
        return [ToolCall("", None, "the call is empty", block)]
    values, problem = _read_values(block)
    if problem is not None:
        return [ToolCall(_guess_name(block), None, problem, block)]
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    if not flat:
        return [ToolCall("", None, "the call is an empty list", block)]
    if len(flat) == 1:
        return [_to_call(flat[0], block)]
    return [_to_call(item, json.dumps(clean_value(item), ensure_ascii=False)) for item in flat]


def _read_values(block: str) -> tuple[list[Any], str | None]:
    """JSON values that fill `block`, repaired where rule 5 allows; or what is wrong with it."""
    values, position, problem = [], 0, None
    while position < len(block):
        try:
            value, position = read_json_at(block, position, strict=False)
        except ValueError as error:
            problem = f"the call is not JSON: {error}"
            break
        values.append(value)
        position = re.compile(r"[\s;,]*").match(block, position).end()  # type: ignore[union-attr]
    if problem is None:
        return values, None
    repaired = _repair(block)
    return ([], problem) if repaired is None else ([repaired], None)


def _repair(block: str) -> Any | None:
    candidate = re.sub(r",\s*([}\]])", r"\1", block)
    for closing in ("", *_missing_brackets(candidate)):
        try:
            return read_json(candidate + closing, strict=False)
        except ValueError:
            pass
    if len(block) <= 10_000:  # literal_eval's parser is slow and deep on hostile text
        try:
            # As JSON would hold it: keys are text, tuples are lists.
            value = read_json(json.dumps(ast.literal_eval(block), allow_nan=False))
            return value if isinstance(value, dict | list) else None
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            pass
    return None


def _missing_brackets(text: str) -> tuple[str, ...]:
    """The closing brackets that `text` lacks, at most three."""
    stack: list[str] = []
    in_string = escaped = False
    for char in text:
        if in_string:
            in_string = escaped or char != '"'
            escaped = char == "\\" and not escaped
        elif char == '"':
            in_string = True
        elif char in "{[":
            stack.append("}" if char == "{" else "]")
        elif char in "}]" and stack:
            stack.pop()
    if in_string or not 0 < len(stack) <= 3:
        return ()
    return ("".join(reversed(stack)),)


def _guess_name(block: str) -> str:
    match = re.search(r'["\']name["\']\s*:\s*["\']([^"\'\n]{1,100})["\']', block)
    return match.group(1) if match else ""


def _to_call(value: Any, raw: str) -> ToolCall:
    value = clean_value(value)
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        return ToolCall("", None, f"a call must be a JSON object, got {type(value).__name__}", raw)
    name = value.get("name", value.get("function"))
    if not isinstance(name, str) or not name:
        return ToolCall("", None, "the call has no name", raw)
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = clean_value(read_json(arguments, strict=False))
        except ValueError as error:
            return ToolCall(name, None, f"arguments are not JSON: {error}", raw)
    if not isinstance(arguments, dict):
        return ToolCall(name, None, f"arguments must be a JSON object, got {type(arguments).__name__}", raw)
    return ToolCall(name, arguments, None, raw)
