"""Reasoning cut into semantic chunks, and the cumulative prefix levels over them (arXiv 2606.16215,
appendix C).

A chunk is a stretch of one type. The prefix of level L0 is empty; those of L1, L2, ... grow; the last is the
longest safe one: it ends before the first `explicit_call_preview`, text that gives the call away (its literal
JSON, the tool's name with its arguments, a phrase that introduces it).

The rules here are deterministic. A turn they know too little about is `hard`: an annotator may cut it
(pact_fast.data.traces), else the conservative cut ends its prefix before the first hint at the call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

PREVIEW = "explicit_call_preview"
TYPES = (
    "task_restate",
    "tool_scan",
    "tool_selection",
    "required_arg_grounding",
    "optional_arg_analysis",
    "irrelevant_tool_rejection",
    "failure_reflection",
    "fallback_plan",
    "decision_summary",
    PREVIEW,
    "final_answer_grounding",
    "other",
)
HARD_SENTENCES = 12  # a turn of more is hard
HARD_SHARE = 0.34  # of characters whose type no rule knows


class Segment(NamedTuple):
    """Characters [start, end) of a turn's reasoning, and what they are: one of TYPES."""

    type: str
    start: int
    end: int


# The blank after a sentence starts the next token in most vocabularies; a line break ends the one before.
_SENTENCE = re.compile(r"\S(?:.*?)(?:[.!?…][\"')\]]*(?=\s)|(?=\s*\n)|\s*\Z)", re.DOTALL)
_JSON_CALL = re.compile(
    r'\{\s*"(?:name|function|tool)"\s*:|"(?:arguments|parameters)"\s*:\s*\{|<tool_call>|```'
)
_INTRODUCES = re.compile(
    r"\b(?:(?:i|we)(?:'ll| will| shall| should|'m going to| am going to)?|let me|let's|now|so|next|going to)"
    r"(?: now| just| then)? (?:call|invoke|issue|execute|run|make the call)\b"
    r"|\b(?:calling|invoking|executing|issuing)\b.*\bwith\b"
    r"|\b(?:function|tool) call (?:is|will be|would be|should be|looks)\b"
    r"|\b(?:here is|here's|this is) the call\b",
    re.IGNORECASE,
)
# The first that a sentence has one of the words of is its type.
_WORDS = {
    "failure_reflection": "errors?|fail(?:s|ed|ure)?|wrong|nothing|not found|invalid|mistake",
    "fallback_plan": "instead|alternatively|otherwise|fall back|another way|try again|check again",
    "irrelevant_tool_rejection": "not needed|no need|irrelevant|unrelated|useless|not help|unnecessary",
    "optional_arg_analysis": "optional|defaults?",
    "required_arg_grounding": "required|arguments?|parameters?|i give it|values? (?:is|are|for)",
    "final_answer_grounding": "the answers? (?:is|are)|final answer|i can answer|that is the answer",
    "task_restate": "the user|the question|the task|the request|asks?|i need to (?:find|know)|wants",
    "tool_scan": "tools|functions|available",
    "tool_selection": "the tool|use|using|choose|best tool|right tool|suits",
}
_RULES = [(kind, re.compile(rf"\b(?:{words})\b", re.IGNORECASE)) for kind, words in _WORDS.items()]
_SUMMARY = r"^(?:so|therefore|thus|hence|next|first|then|now|steps?|finally|in short|i got)\b"
_RULES.append(("decision_summary", re.compile(_SUMMARY, re.IGNORECASE)))


def segment_reasoning(text: str, calls: Sequence[Mapping[str, Any]]) -> tuple[list[Segment], bool]:
    """The chunks of one turn's reasoning by rules, and whether the turn is hard for them.

    Args:
        text: the reasoning.
        calls: the turn's calls, {"name", "arguments"}.
    """
    pieces = _typed(text, calls)
    unknown = sum(b - a for kind, a, b in pieces if kind == "other")
    hard = len(pieces) > HARD_SENTENCES or unknown > HARD_SHARE * max(len(text.strip()), 1)
    return _merged(pieces), hard


def conservative(text: str, calls: Sequence[Mapping[str, Any]]) -> list[Segment]:
    """The chunks by rules, the first sentence that names the called tool or a value it is given taken as a
    preview of the call: the prefix ends there at the latest."""
    pieces = _typed(text, calls)
    hints = [str(call["name"]) for call in calls] + [v for call in calls for v in _values(call)]
    for i, (_, start, end) in enumerate(pieces):
        if any(_stands_in(hint, text[start:end]) for hint in hints):
            pieces[i] = (PREVIEW, start, end)
            break
    return _merged(pieces)


def level_ends(message: Mapping[str, Any], levels: int) -> list[int]:
    """Where the prefix of each level 1 .. `levels` of an assistant message's reasoning ends, in characters.

    From the message's own `reasoning_levels`, else its `reasoning_segments`, else by rules. n ends are
    spread over the levels: level k holds the first ceil(k n / levels) of them.
    """
    ends = message.get("reasoning_levels")
    if ends is None:
        ends = safe_ends(turn_segments(message))
    if not ends:
        return [0] * levels
    return [ends[-(-k * len(ends) // levels) - 1] for k in range(1, levels + 1)]


def turn_segments(message: Mapping[str, Any]) -> list[Segment]:
    """The chunks of an assistant message: its own, else by rules, else, where it is hard, the conservative
    ones."""
    given = message.get("reasoning_segments")
    if given is not None:
        return [Segment(s["type"], s["start"], s["end"]) for s in given]
    text, calls = message.get("reasoning_content") or "", message.get("tool_calls") or []
    segments, hard = segment_reasoning(text, calls)
    return conservative(text, calls) if hard else segments


def cut_by(message: Mapping[str, Any]) -> str:
    """Who cut an assistant message's reasoning: "levels" or "segments" of the record, "rules",
    "conservative"."""
    if message.get("reasoning_levels") is not None:
        return "levels"
    if message.get("reasoning_segments") is not None:
        return "segments"
    hard = segment_reasoning(message.get("reasoning_content") or "", message.get("tool_calls") or [])[1]
    return "conservative" if hard else "rules"


def safe_ends(segments: Sequence[Segment]) -> list[int]:
    """The ends of the chunks before the first preview of the call."""
    ends = []
    for segment in segments:
        if segment.type == PREVIEW:
            break
        ends.append(segment.end)
    return ends


def token_levels(starts: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The lowest level, 1 .. K, whose prefix holds each token; K + 1 where none does.

    starts: first character of each token. ends: `level_ends`, K of them.
    """
    return [1 + sum(start >= end for end in ends) for start in starts]


def check_segments(segments: Any, text: str) -> str | None:
    """What is wrong with `reasoning_segments` of a turn with reasoning `text`, or None."""
    if not isinstance(segments, list):
        return f"must be a list of segments, got {type(segments).__name__}"
    position = 0
    for i, segment in enumerate(segments):
        if not isinstance(segment, dict) or not {"type", "start", "end"} <= segment.keys():
            return f"[{i}]: must be an object with type, start and end, got {segment!r:.80}"
        kind, start, end = segment["type"], segment["start"], segment["end"]
        if kind not in TYPES:
            return f"[{i}].type: unknown type {kind!r}; known: {', '.join(TYPES)}"
        if type(start) is not int or type(end) is not int or not 0 <= start < end <= len(text):
            return f"[{i}]: [{start}, {end}) does not lie in the turn's reasoning of {len(text)} characters"
        if start < position:
            return f"[{i}]: [{start}, {end}) overlaps or stands before the segment that ends at {position}"
        if text[position:start].strip():
            return f"[{i}]: characters {position} to {start} belong to no segment"
        position = end
    if text[position:].strip():
        return f": characters {position} to {len(text)} belong to no segment"
    return None


def check_levels(levels: Any, text: str) -> str | None:
    """What is wrong with `reasoning_levels`, the ends of L1, L2, ... in characters of `text`, or None."""
    if not isinstance(levels, list) or not levels or any(type(end) is not int for end in levels):
        return f"must be a list of whole numbers, the ends of L1, L2, ..., got {levels!r:.80}"
    for i, end in enumerate(levels):
        if not 0 <= end <= len(text):
            return f"[{i}]: {end} does not lie in the turn's reasoning of {len(text)} characters"
        if i and end < levels[i - 1]:
            return f"[{i}]: shrinks from {levels[i - 1]} to {end}; a level holds the one before it"
    return None


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    for match in _SENTENCE.finditer(text):
        start, end = match.span()
        yield start, start + len(text[start:end].rstrip())


def _typed(text: str, calls: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """(type, start, end) of every sentence."""
    literal = [match.start() for match in _JSON_CALL.finditer(text)]  # may go on over several lines
    return [
        (PREVIEW if any(a <= place < b for place in literal) else _type_of(text[a:b], calls), a, b)
        for a, b in _sentences(text)
    ]


def _type_of(sentence: str, calls: Sequence[Mapping[str, Any]]) -> str:
    if _INTRODUCES.search(sentence):
        return PREVIEW
    named = [call for call in calls if _stands_in(str(call["name"]), sentence)]
    if any(_stands_in(value, sentence) for call in named for value in _values(call)):
        return PREVIEW
    if any(re.search(rf"\b{re.escape(str(call['name']))}\s*\(", sentence) for call in calls):
        return PREVIEW
    if named:
        return "tool_selection"
    found = next((kind for kind, pattern in _RULES if pattern.search(sentence)), "other")
    if found in ("other", "decision_summary") and any(
        _stands_in(value, sentence) for call in calls for value in _values(call)
    ):
        return "required_arg_grounding"
    return found


def _values(call: Mapping[str, Any]) -> list[str]:
    """The argument values of a call as the reasoning would write them; what is too short to tell is left
    out."""
    values = [
        v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in call["arguments"].values()
    ]
    return [value for value in values if len(value) > 1 or value.isdigit()]


def _stands_in(word: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _merged(pieces: Sequence[tuple[str, int, int]]) -> list[Segment]:
    """Neighbours of one type as one chunk."""
    segments: list[Segment] = []
    for kind, start, end in pieces:
        if segments and segments[-1].type == kind:
            segments[-1] = segments[-1]._replace(end=end)
        else:
            segments.append(Segment(kind, start, end))
    return segments
