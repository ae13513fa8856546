"""`pact-fast data check FILE`: is a record file fit for training, and what will the model see?

Checks every record, counts tokens by component, runs the traces of records that bring Python tools (`codes`)
through those tools, and shows one record coloured by component in the terminal and, with --html, as a page.
"""

from __future__ import annotations

import argparse
import html
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pact_fast.data.chat import ChatFormat, Component, Tokens
from pact_fast.data.colours import LOOKS, css, name_of
from pact_fast.data.formats import FORMAT_NAMES
from pact_fast.data.records import LoadedRecords, Record, RecordError, check_prompt_lengths, load_records
from pact_fast.data.segments import cut_by, turn_segments
from pact_fast.envs.base import make_env
from pact_fast.envs.replay import replay_traces
from pact_fast.envs.toolbox.base_model import base_model_path


@dataclass(frozen=True)
class Encoded:
    """One record as tokens: x, and the whole expert trace, its answer too."""

    record: Record
    prompt: Tokens
    trace: Tokens


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 where every record is good, 1 where some are bad, 2 where the file cannot be
    read."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["check"]:  # `pact-fast data` has this one command
        words = words[1:]
    arguments = _parser().parse_args(words)
    console = Console(highlight=False, soft_wrap=True)
    try:
        chat = _chat(arguments)
        loaded = load_records(arguments.file, require_trace=not arguments.no_trace, skip_bad=True)
    except (OSError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    encoded = [encode(chat, record) for record in loaded.records]
    if arguments.prompt_limit is not None:
        lengths = [len(item.prompt) for item in encoded]
        fitting = check_prompt_lengths(loaded.records, lengths, arguments.prompt_limit, skip_bad=True)
        loaded = LoadedRecords(fitting.records, [*loaded.skipped, *fitting.skipped])
        kept = {record.id for record in fitting.records}
        encoded = [item for item in encoded if item.record.id in kept]
    _print_errors(console, loaded.skipped)
    if encoded:
        _print_counts(console, encoded, chat)
        chosen = _choose(encoded, arguments.record)
        if chosen is None:
            console.print(f"error: no record with id {arguments.record!r}", style="red", markup=False)
            return 2
        name, source = escape(chosen.record.id), escape(chosen.record.source)
        console.print(f"\n[bold]record {name}[/] as the model sees it ({source})")
        console.print(legend())
        console.print(coloured(chat, chosen.prompt + chosen.trace))
        if arguments.html:
            arguments.html.write_text(html_page(chat, chosen), encoding="utf-8")
            console.print(f"\nwrote {arguments.html}")
    records = [item.record for item in encoded]
    stale = 0 if arguments.no_replay else _print_replay(console, records, arguments.reward)
    bad = len(loaded.skipped)
    style = "bold red" if bad or stale else "bold green"
    told = f", {stale} with a trace that its tools contradict" if stale else ""
    console.print(f"\n{len(encoded)} good records, {bad} bad{told}", style=style)
    return 1 if (bad or stale) and not arguments.skip_bad_records else 0


def encode(chat: ChatFormat, record: Record) -> Encoded:
    return Encoded(record, chat.prompt(record.prompt, record.tools), chat.trace(record.expert_trace))


def coloured(chat: ChatFormat, tokens: Tokens) -> Text:
    """The conversation as rich text, one style a component, `|` where a level of reasoning ends; what is in
    no level is struck through."""
    text = Text()
    for run, component, level in _runs(chat, tokens):
        if level > 1:
            text.append("|", style="bold blue reverse")
        text.append(run, style=LOOKS[component].terminal + (" strike" if level > chat.levels else ""))
    return text


def legend() -> Text:
    text = Text()
    for component, look in LOOKS.items():
        text.append(f"{name_of(component):14}", style=look.terminal)
        text.append(f"{look.meaning}\n", style="dim")
    return text


def html_page(chat: ChatFormat, item: Encoded) -> str:
    """A self-contained page that shows one record coloured by component."""
    spans = []
    for run, component, level in _runs(chat, item.prompt + item.trace):
        if level > 1:
            spans.append('<b class="border">|</b>')
        name = name_of(component)
        title = f"{name}: {LOOKS[component].meaning}"
        text = f"<s>{html.escape(run)}</s>" if level > chat.levels else html.escape(run)
        spans.append(f'<span class="{name}" title="{html.escape(title)}">{text}</span>')
    keys = "".join(
        f'<li><span class="{name_of(c)}">{name_of(c)}</span> {html.escape(look.meaning)}</li>'
        for c, look in LOOKS.items()
    )
    name = html.escape(item.record.id)
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{name}</title><style>"
        ":root{color-scheme:light dark}"
        "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
        "pre{white-space:pre-wrap;font:13px/1.6 ui-monospace,monospace;border:1px solid #d1d5db;padding:1rem}"
        f"ul{{list-style:none;padding:0}}.border{{font-weight:bold}}{css()}</style>"
        f"<h1>{name}</h1><p>{html.escape(item.record.source)}: prompt {len(item.prompt)} tokens, "
        f"expert trace {len(item.trace)}.</p>"
        f"<ul>{keys}</ul><pre>{''.join(spans)}</pre></html>\n"
    )


def _runs(chat: ChatFormat, tokens: Tokens) -> list[tuple[str, Component, int]]:
    """(text, component, reasoning level) for each stretch of equal ones."""
    keys = list(zip(tokens.components, tokens.levels, tokens.turns, strict=True))
    starts = [i for i in range(len(keys)) if i == 0 or keys[i] != keys[i - 1]]
    runs = []
    for start, end in zip(starts, [*starts[1:], len(keys)], strict=True):
        text = chat.decode(tokens.ids[start:end])
        runs.append((text, Component(tokens.components[start]), tokens.levels[start]))
    return runs


def _print_errors(console: Console, errors: Sequence[RecordError], shown: int = 20) -> None:
    for error in errors[:shown]:
        console.print(f"bad: {error}", style="red", markup=False)
    if len(errors) > shown:
        console.print(f"... and {len(errors) - shown} more", style="red")


def _print_replay(console: Console, records: Sequence[Record], reward: str) -> int:
    """Runs the traces of records with Python tools; returns how many the tools contradict."""
    own = [record for record in records if record.env.get("codes") and record.expert_trace]
    if not own:
        return 0
    env = make_env("python", {"reward": reward})
    try:
        replays = replay_traces(env, own)
    finally:
        env.close()
    outcomes = [replay.outcome for replay in replays if replay.outcome is not None]
    solved = sum(outcome.solved for outcome in outcomes)
    mean = sum(outcome.reward for outcome in outcomes) / max(1, len(outcomes))
    stale = [replay for replay in replays if replay.differences]
    console.print(
        f"traces run through their tools: {len(own)}, solved {solved}, mean reward {mean:.2f}, "
        f"contradicted {len(stale)}"
    )
    for replay in [r for r in replays if r.outcome is not None and not r.outcome.solved][:5]:
        console.print(
            f"unsolved: {replay.record.source}: record {replay.record.id!r}: answer "
            f"{replay.record.env.get('answer')!r} is not in the trace's last message",
            style="yellow",
            markup=False,
        )
    for replay in stale[:20]:
        where = f"{replay.record.source}: record {replay.record.id!r}"
        text = replay.differences[0]
        console.print(f"bad: {text if where in text else f'{where}: {text}'}", style="red", markup=False)
    return len(stale)


def _print_counts(console: Console, encoded: Sequence[Encoded], chat: ChatFormat) -> None:
    own = "the model's own template" if chat.own_template else "bundled template"
    console.print(f"chat format {chat.name} ({own}), {len(encoded)} records")
    table = Table("tokens", "min", "median", "95%", "max", title="lengths")
    rows = {
        "prompt x": [len(item.prompt) for item in encoded],
        "expert trace": [len(item.trace) for item in encoded],
        "prompt and trace": [len(item.prompt) + len(item.trace) for item in encoded],
    }
    for name, lengths in rows.items():
        marks = np.percentile(lengths, [0, 50, 95, 100])
        table.add_row(name, *(f"{mark:,.0f}" for mark in marks))
    console.print(table)

    counts = Counter(component for item in encoded for component in item.trace.components)
    total = max(1, sum(counts.values()))
    shares = Table("component of the trace", "tokens", "share", title="components")
    for component in Component:
        share = f"{counts[component] / total:.1%}"
        shares.add_row(Text(name_of(component), LOOKS[component].terminal), f"{counts[component]:,}", share)
    console.print(shares)
    _print_levels(console, encoded, chat)

    calls = Counter(
        call["name"] for item in encoded for m in item.record.expert_trace for call in m.get("tool_calls", ())
    )
    turns = sum(m["role"] == "assistant" for item in encoded for m in item.record.expert_trace)
    names = ", ".join(f"{name} {count}" for name, count in calls.most_common(12))
    more = f", {len(calls) - 12} more tools" if len(calls) > 12 else ""
    console.print(f"{turns} assistant turns, {sum(calls.values())} tool calls: {names}{more}", markup=False)


def _print_levels(console: Console, encoded: Sequence[Encoded], chat: ChatFormat) -> None:
    """How much reasoning each prefix level holds, what no level holds, and how the turns were cut."""
    levels = [level for item in encoded for level in item.trace.levels if level > 0]
    if not levels:
        return
    table = Table("prefix level", "reasoning tokens", "share", title="reasoning levels")
    for level in range(chat.levels + 1):
        held = sum(1 for of in levels if of <= level)
        table.add_row(f"L{level}", f"{held:,}", f"{held / len(levels):.0%}")
    excluded = sum(1 for level in levels if level > chat.levels)
    table.add_row("in no level", f"{excluded:,}", f"{excluded / len(levels):.0%}", style="red")
    console.print(table)
    turns = [m for item in encoded for m in item.record.expert_trace if m.get("reasoning_content")]
    types = Counter(segment.type for turn in turns for segment in turn_segments(turn))
    routes = Counter(cut_by(turn) for turn in turns)
    console.print("turns cut by: " + ", ".join(f"{name} {count}" for name, count in routes.most_common()))
    console.print("chunks: " + ", ".join(f"{name} {count}" for name, count in types.most_common()))


def _choose(encoded: Sequence[Encoded], record_id: str | None) -> Encoded | None:
    if record_id is None:
        return encoded[0]
    return next((item for item in encoded if item.record.id == record_id), None)


def _chat(arguments: argparse.Namespace) -> ChatFormat:
    from transformers import AutoTokenizer

    base = arguments.tokenizer == "toolbox-base"
    tokenizer = AutoTokenizer.from_pretrained(base_model_path() if base else arguments.tokenizer)
    return ChatFormat.for_tokenizer(tokenizer, arguments.format, levels=arguments.levels)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pact-fast data check", description=__doc__)
    parser.add_argument("file", type=Path, help="records, .jsonl or .parquet")
    parser.add_argument(
        "--tokenizer", default="toolbox-base", help="model folder or name (default: the bundled base model)"
    )
    parser.add_argument("--format", default="auto", choices=FORMAT_NAMES, help="chat format")
    parser.add_argument("--levels", type=int, default=4, help="prefix levels of a turn's reasoning")
    parser.add_argument("--record", help="id of the record to show (default: the first good one)")
    parser.add_argument("--html", type=Path, help="also write the shown record as a page")
    parser.add_argument("--prompt-limit", type=int, help="a longer prompt, in tokens, is a bad record")
    parser.add_argument("--no-trace", action="store_true", help="records need no expert trace")
    parser.add_argument("--no-replay", action="store_true", help="do not run the records' own Python tools")
    parser.add_argument("--reward", default="solve", help="module:function of your own to score the traces")
    parser.add_argument("--skip-bad-records", action="store_true", help="list bad records but succeed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
