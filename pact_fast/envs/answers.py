"""Fields of a record that scoring rests on: gold answers and tools' sources, told where they cannot be
used.
"""

from __future__ import annotations

import ast
import difflib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from pact_fast.data.reading import read_json
from pact_fast.data.records import Record

KNOWN = ("codes", "answer", "unsolved_set", "ground_truth")  # fields that this module and its heirs read


def decoded(record: Record, key: str, required: bool) -> Any:
    """A field of `env` that files hold as JSON text or as an object. Raises ValueError naming file, record,
    field."""
    value = record.env.get(key)
    if value is None and not required:
        return None
    if value is None:
        near = difflib.get_close_matches(key, [k for k in record.env if k not in KNOWN], 1)
        bad_field(record, key, "is missing" + (f"; found {near[0]!r}: misspelt?" if near else ""))
    if isinstance(value, str):
        try:
            value = read_json(value)
        except ValueError as error:
            bad_field(record, key, f"is text but not JSON: {error}")
    if not isinstance(value, Mapping):
        bad_field(record, key, f"must be an object, got {type(value).__name__}")
    return value


def gold_answers(record: Record, key: str, value: Any) -> list[str]:
    """Gold answers as texts: a text or a number is one, a list holds several. ValueError for anything else,
    and for an answer without text, which every output would hold."""
    answers = []
    for item in value if isinstance(value, list | tuple) else [value]:
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            bad_field(record, key, f"must be text, a number or a list of them, got {item!r:.80}")
        text = str(item)
        if not text.replace(",", "").strip():
            bad_field(record, key, "is empty: every output would hold it")
        answers.append(text)
    if not answers:
        bad_field(record, key, "is an empty list")
    return answers


def answers_of(record: Record) -> list[str]:
    """The alternatives of the record's gold answer; empty without one."""
    value = record.env.get("answer")
    return [] if value is None else gold_answers(record, "answer", value)


def check_source(record: Record, name: str, source: Any) -> None:
    """ValueError unless `source` is Python that binds `name` at its top level."""
    if not isinstance(source, str):
        bad_field(record, f"codes.{name}", f"must be Python source, got {type(source).__name__}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        bad_field(record, f"codes.{name}", f"is not Python: {error}")
    if not any(name in _bound_names(node) for node in ast.walk(tree)):
        bad_field(record, f"codes.{name}", f"defines no function {name!r}")


def _bound_names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.alias):
        yield node.asname or node.name


def bad_field(record: Record, key: str, problem: str) -> NoReturn:
    raise ValueError(f"{record.source}: record {record.id!r}: {key}: {problem}")
