"""Expert traces: made from ground-truth calls, each really run; judged, where a teacher made them; cut."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pact_fast.data.formats import TAGS
from pact_fast.data.segments import PREVIEW, TYPES, Segment, segment_reasoning

Call = tuple[str, Mapping[str, Any]]
MAX_GOAL = 160  # characters of a request or a description repeated in the reasoning


def trace_from_calls(
    request: str, tools: Sequence[dict], calls: Sequence[Call], run: Callable[[Call], str], answer: str
) -> tuple[dict, ...]:
    """Messages of one user request: per call an assistant turn and the tool's response, then the closing
    answer."""
    purposes = {tool["function"]["name"]: purpose(tool["function"].get("description", "")) for tool in tools}
    messages: list[dict] = []
    for i, (name, arguments) in enumerate(calls):
        messages.append(
            {
                "role": "assistant",
                "reasoning_content": call_reasoning(
                    request, i, len(calls), name, arguments, purposes.get(name, "")
                ),
                "content": "",
                "tool_calls": [{"name": name, "arguments": dict(arguments)}],
            }
        )
        messages.append({"role": "tool", "name": name, "content": run((name, arguments))})
    closing = "Every call that the request needs is made. I can answer." if calls else ""
    messages.append({"role": "assistant", "reasoning_content": closing, "content": answer})
    return tuple(messages)


def call_reasoning(
    request: str, index: int, total: int, name: str, arguments: Mapping[str, Any], goal: str
) -> str:
    """Sentences that can be cut into segments: the request, the step, what the tool is for, what it is
    given."""
    sentences = (
        [f"The user asks: {shorten(request.splitlines()[-1] if request else '')}"] if index == 0 else []
    )
    sentences.append(f"Step {index + 1} of {total} is {name}.")
    if goal:
        sentences.append(f"It is for this: {goal}")
    if arguments:
        sentences.append(f"I give it {', '.join(arguments)}.")
    return " ".join(sentences)


def purpose(description: str) -> str:
    """The first sentence of a tool's description; a leading remark on the tool's suite is left out."""
    text = description.split("Tool description:")[-1].strip()
    return shorten(text.split(". ")[0])


def shorten(text: str) -> str:
    text = " ".join(text.split())
    if len(text) > MAX_GOAL:
        text = text[:MAX_GOAL].rsplit(" ", 1)[0] + " ..."
    return text if text.endswith((".", "?", "!")) else text + "."


# -- which traces are kept -------------------------------------------------------------------------------

# Text that would open a turn or a call of its own where it stands in a tool's response.
TAINTED = re.compile(
    r"<\|im_start\|>|<\|im_end\|>|<\|start_header_id\|>|<\|eot_id\|>"
    r"|</?tool_call>|</?tool_response>|</?think>"
    r"|^(?:assistant|user|system)\s*:",
    re.MULTILINE | re.IGNORECASE,
)


def trace_problem(trace: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str | None:
    """Why a teacher's trace is removed (arXiv 2606.16215, appendix C), or None.

    "invalid_tool": a call to a tool that is not offered; "malformed_turn": a turn that is empty or holds
    tags;
    "tainted_response": a tool response with role text or call tags in it; "no_call": nothing to teach.
    """
    known = {tool["function"]["name"] for tool in tools}
    calls = 0
    for message in trace:
        if message["role"] == "tool":
            if TAINTED.search(message["content"]):
                return "tainted_response"
        elif message["role"] == "assistant":
            made = message.get("tool_calls") or []
            calls += len(made)
            if any(call["name"] not in known for call in made):
                return "invalid_tool"
            texts = (message.get("reasoning_content") or "", message.get("content") or "")
            if not made and not any(text.strip() for text in texts):
                return "malformed_turn"
            if any(tag in text for text in texts for tag in TAGS):
                return "malformed_turn"
    return None if calls else "no_call"


# -- an annotator's cuts ---------------------------------------------------------------------------------

ANNOTATOR_PROMPT = (
    "You cut the reasoning of a tool-using agent into consecutive segments and name each one's type. Types: "
    + ", ".join(TYPES)
    + ". A segment is explicit_call_preview where it shows the literal call or words that give the call "
    "away. Copy the text of every segment exactly; together they are the whole reasoning, in order. Answer "
    'with JSON alone: {"segments": [{"type": "...", "text": "..."}, ...]}'
)


def annotator_messages(message: Mapping[str, Any]) -> list[dict[str, str]]:
    """The request that has an assistant message's reasoning cut by an annotator."""
    calls = json.dumps(list(message.get("tool_calls") or []), ensure_ascii=False)
    asked = f"Calls of the turn: {calls}\n\nReasoning:\n{message['reasoning_content']}"
    return [{"role": "system", "content": ANNOTATOR_PROMPT}, {"role": "user", "content": asked}]


def read_annotation(answer: str, message: Mapping[str, Any]) -> list[Segment]:
    """The segments in an annotator's answer. What the rules know to be a preview of the call stays one.

    Raises ValueError where the answer is not the JSON asked for, or its texts are not those of the turn, in
    order and whole.
    """
    fenced = re.search(r"```(?:json)?\s*(.*?)```", answer, re.DOTALL)
    try:
        value = json.loads(fenced.group(1) if fenced else answer)
    except json.JSONDecodeError as error:
        raise ValueError(f"the answer is not JSON: {error}") from None
    items = value.get("segments") if isinstance(value, dict) else None
    if not isinstance(items, list) or not items:
        raise ValueError("the answer has no list 'segments'")
    text, position = str(message["reasoning_content"]), 0
    rules = segment_reasoning(text, message.get("tool_calls") or [])[0]
    segments = []
    for i, item in enumerate(items):
        kind, part = (item.get("type"), item.get("text")) if isinstance(item, dict) else (None, None)
        if kind not in TYPES or not isinstance(part, str) or not part.strip():
            raise ValueError(f"segments[{i}]: must have a known type and a text, got {item!r:.80}")
        start = position + len(text[position:]) - len(text[position:].lstrip())
        if not text.startswith(part.strip(), start):
            raise ValueError(f"segments[{i}]: its text is not the turn's next: {part!r:.60}")
        position = start + len(part.strip())
        gives_away = any(r.type == PREVIEW and r.start < position and start < r.end for r in rules)
        segments.append(Segment(PREVIEW if gives_away else kind, start, position))
    if text[position:].strip():
        raise ValueError(f"the segments leave out {text[position:].strip()!r:.60}")
    return segments
