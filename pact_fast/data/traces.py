"""Expert traces from ground-truth calls: each call is really run, and the reasoning names its goal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
