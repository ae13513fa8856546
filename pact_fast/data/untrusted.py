"""JSON that a model or a tool wrote: bounded, and every way in which it can be wrong is one error.

`json.loads` alone raises RecursionError on deep text and a plain ValueError on a number of 5,000 digits, and
passes on halves of surrogate pairs, which no tokenizer and no file takes.
"""

from __future__ import annotations

import json
import re
from typing import Any

MAX_DEPTH = 100  # brackets within brackets
_MARKS = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[{]|[\]}]', re.DOTALL)
_HALF = re.compile("[\ud800-\udfff]")


class Unreadable(ValueError):
    """The text is not JSON, or nests too deeply, or holds a number too long."""


def read_json(text: str, *, strict: bool = True) -> Any:
    """The value that `text` holds, halves of surrogate pairs replaced by U+FFFD. Raises Unreadable.

    strict: refuse raw line breaks within strings, as JSON does.
    """
    check_depth(text)
    try:
        value = json.loads(text, strict=strict)
    except (ValueError, RecursionError) as error:
        raise Unreadable(str(error)) from None
    return whole_text(value) if "\\u" in text or not text.isascii() else value


def check_depth(text: str) -> None:
    """Raises Unreadable where brackets outside of strings nest deeper than MAX_DEPTH."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for match in _MARKS.finditer(text):
        mark = match[0]
        depth += (mark in "[{") - (mark in "]}")
        if depth > MAX_DEPTH:
            raise Unreadable(f"nests deeper than {MAX_DEPTH} brackets")


def depth_of(value: Any, limit: int = MAX_DEPTH) -> int:
    """How deep lists and mappings of `value` nest; limit + 1 for anything deeper."""
    level, depth = [value], 0
    while depth <= limit:
        level = [
            inner
            for one in level
            if isinstance(one, (dict, list, tuple))
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            break
        depth += 1
    return depth


def whole_text(value: Any) -> Any:
    """`value` (at most MAX_DEPTH deep) with every half of a surrogate pair replaced by U+FFFD."""
    if isinstance(value, str):
        return _HALF.sub("\ufffd", value)
    if isinstance(value, list):
        return [whole_text(one) for one in value]
    if isinstance(value, dict):
        return {whole_text(key): whole_text(one) for key, one in value.items()}
    return value
