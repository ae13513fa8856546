"""`transcripts.html` of an evaluation's folder: every conversation, coloured by component, in one page that
fetches nothing and filters by outcome, kind of failure, category and text.

Reads `transcripts.jsonl` ({"id", "sample", "reward", "failure", "pieces": [{"role", "component", "text"},
...]} a line; failure is null where the task is solved) and, where it is there, `results.jsonl` for the tasks'
categories.
"""

from __future__ import annotations

import html
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from pact_fast.data.colours import LOOKS, css, name_of
from pact_fast.data.reading import read_json

TRANSCRIPTS, RESULTS, PAGE = "transcripts.jsonl", "results.jsonl", "transcripts.html"
COMPONENTS = tuple(map(name_of, LOOKS))


def write_transcripts(folder: str | os.PathLike[str]) -> Path:
    """Writes folder/transcripts.html, returns its path.

    FileNotFoundError where the folder holds no transcripts.jsonl; ValueError names the line that is no
    transcript. A last line that was cut short is left out.
    """
    folder = Path(folder)
    source = folder / TRANSCRIPTS
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file; is {folder} an evaluation's folder?")
    results = folder / RESULTS
    categories = (
        {row.get("id"): row.get("category") for _, row in _lines(results)} if results.is_file() else {}
    )
    rows, outcomes, kinds = [], Counter[str](), set()
    for number, line in _lines(source):
        where = f"{source}:{number}"
        if not isinstance(line.get("pieces"), list):
            raise ValueError(f"{where}: pieces: must be a list, got {line.get('pieces')!r:.80}")
        outcome = str(line.get("failure") or "solved")
        category = str(categories.get(line.get("id")) or "all")
        outcomes[outcome] += 1
        kinds.add(category)
        rows.append(_row(line, outcome, category, where))
    total = sum(outcomes.values())
    page = Template(_PAGE).substitute(
        title=html.escape(folder.resolve().name),
        colours=css(),
        key=key_line(),
        outcomes=_options(["solved", "unsolved", *(k for k, _ in outcomes.most_common() if k != "solved")]),
        categories=_options(sorted(kinds)),
        facts=html.escape(
            f"{total} transcripts: " + ", ".join(f"{k} {n}" for k, n in outcomes.most_common())
        ),
        rows="\n".join(rows),
    )
    path = folder / PAGE
    beside = path.with_suffix(".html.tmp")
    beside.write_text(page, encoding="utf-8")
    beside.replace(path)
    return path


def conversation(pieces: Sequence[Mapping[str, Any]], where: str) -> str:
    """The pieces of a conversation as HTML, a block a role; ValueError naming `where` for an unknown
    component."""
    spans, role = [], None
    for number, piece in enumerate(pieces):
        if not isinstance(piece, Mapping) or not {"role", "component", "text"} <= piece.keys():
            raise ValueError(f"{where}: pieces[{number}] needs role, component and text, got {piece!r:.80}")
        component = str(piece["component"]).lower()
        if component not in COMPONENTS:
            raise ValueError(f"{where}: component {component!r} is none of {', '.join(COMPONENTS)}")
        if piece["role"] != role:
            role = piece["role"]
            spans.append(f"</div><div class='turn'><b>{html.escape(str(role))}</b>")
        text = html.escape(str(piece["text"]))
        spans.append(f"<span class='{component}' title='{component}'>{text}</span>")
    return f"<div class='transcript'><div>{''.join(spans)}</div></div>"


def key_line() -> str:
    """Which colour is which component."""
    names = " ".join(f"<span class='{name}'>{name.replace('_', ' ')}</span>" for name in COMPONENTS)
    return f"<p class='key'>{names}</p>"


def _row(line: Mapping[str, Any], outcome: str, category: str, where: str) -> str:
    sample, reward = line.get("sample") or 0, line.get("reward")
    facts = [f"sample {sample}"] if sample else []
    facts += [outcome.replace("_", " ")] + (
        [f"reward {reward:.3f}"] if isinstance(reward, int | float) else []
    )
    told = html.escape(", ".join(facts))
    marks = f"data-outcome='{html.escape(outcome)}' data-category='{html.escape(category)}'"
    summary = f"<summary><b>{html.escape(str(line.get('id')))}</b> {told}</summary>"
    return f"<details {marks}>{summary}{conversation(line['pieces'], where)}</details>"


def _options(names: Sequence[str]) -> str:
    return "".join(
        f"<option value='{html.escape(name)}'>{html.escape(name.replace('_', ' '))}</option>"
        for name in names
    )


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of a JSONL file; what follows the last line break was cut short."""
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            value = read_json(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise ValueError(f"{path}:{number}: must be an object, got {type(value).__name__}")
        yield number, value


_PAGE = (Path(__file__).parent / "transcripts_page.html").read_text(encoding="utf-8")
