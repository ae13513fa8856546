"""Text from outside (files, models, tools, servers): read as JSON with bounds, and mended for tokenizers.

Everything that others wrote goes through here, so that what a parser cannot hold is one kind of error
everywhere: numbers of more digits than Python converts, nesting past its stack, NaN, and half surrogate
pairs, which Python's strings hold and no tokenizer or UTF-8 file does.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 100  # of nested lists and objects; what reads a value later may recurse

_SURROGATE = re.compile("[\ud800-\udfff]")


def read_json(text: str | bytes, *, strict: bool = True) -> Any:
    """`json.loads` of foreign text.

    strict: as in json; False lets strings hold raw line breaks.
    Raises ValueError, and nothing else, that says what is wrong: no JSON, no UTF-8, nested more than
    MAX_DEPTH deep, a number that is not finite or has too many digits.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(not_utf8(error)) from None
    start = re.compile(r"\s*").match(text)
    value, end = read_json_at(text, start.end() if start else 0, strict=strict)
    if rest := text[end:].strip():
        raise ValueError(f"extra text after the JSON value: {rest[:40]!r}")
    return value


def read_json_at(text: str, position: int, *, strict: bool = True) -> tuple[Any, int]:
    """The JSON value that begins at `position`, and where it ends. Raises as `read_json`."""
    try:
        value, end = json.JSONDecoder(strict=strict, parse_constant=_refuse).raw_decode(text, position)
    except RecursionError:
        raise ValueError(f"nested too deep, at most {MAX_DEPTH} levels") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # more digits than int() takes
        detail = "a number with too many digits" if "integer string conversion" in str(error) else str(error)
        raise ValueError(detail) from None
    check_bounds(value)
    return value, end


def check_bounds(value: Any) -> None:
    """ValueError where `value` nests deeper than MAX_DEPTH or holds a number that is not finite."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, float) and not math.isfinite(item):
                raise ValueError(f"the number {item} is not finite")
        if not below:
            return
        level = below
    raise ValueError(f"nested too deep, at most {MAX_DEPTH} levels")


def not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}; save it as UTF-8"


def half_surrogate(value: Any, where: str = "") -> str | None:
    """Path of the first text in a JSON value that holds half a surrogate pair; None where all text is
    whole.
    """
    return next(_surrogates(value, where), None)


def _surrogates(value: Any, where: str) -> Iterator[str]:
    if isinstance(value, str):
        if _SURROGATE.search(value):
            yield where
    elif isinstance(value, dict):
        for key, item in value.items():
            if isinstance(key, str) and _SURROGATE.search(key):
                yield f"{where} (a key)"
            yield from _surrogates(item, f"{where}.{clean_text(str(key))}" if where else clean_text(str(key)))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _surrogates(item, f"{where}[{i}]")


def clean_text(text: str) -> str:
    """`text` with every half surrogate pair replaced by U+FFFD: as long as before, and valid UTF-8."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def clean_value(value: Any) -> Any:
    """`clean_text` of every text and key of a JSON value."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, dict):
        return {clean_text(k) if isinstance(k, str) else k: clean_value(v) for k, v in value.items()}
    if isinstance(value, list):
        return [clean_value(item) for item in value]
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"the number {constant} is not finite")
