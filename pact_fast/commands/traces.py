"""Expert traces for training (arXiv 2606.16215, appendix C).

    pact-fast traces make FILE --teacher URL|MODEL --out traces.jsonl
    pact-fast traces segment FILE [--annotator URL] --out segmented.jsonl

`make` has a teacher solve every task of FILE with its tools and keeps what verifies. FILE: records (.jsonl or
.parquet, of the environment --env) or the .yaml of a training run, whose environment and training tasks are
taken.
The teacher: the URL of a server that speaks OpenAI chat completions (http://host:8000/v1; key in
OPENAI_API_KEY), or a local model folder. `segment` cuts the reasoning of every calling turn: by rules, then
by the annotator (a
URL, too) where these find a turn hard, else conservatively.

Both keep a journal beside --out and go on from it, killed at whatever moment; --out holds records that
`train` takes as they are.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pact_fast.config import LoraConfig, ModelConfig, RolloutConfig, load_config
from pact_fast.data.chat import ChatFormat
from pact_fast.data.journal import Journal
from pact_fast.data.records import Record, load_records, write_records
from pact_fast.data.segments import Segment, conservative, segment_reasoning
from pact_fast.data.traces import annotator_messages, read_annotation
from pact_fast.distributed import Sharded, World
from pact_fast.envs.base import ToolEnv, make_env
from pact_fast.rollout import RolloutLimits, build_engine
from pact_fast.rollout.teacher import (
    Attempt,
    ChatServer,
    Recorder,
    Refused,
    solve_with_engine,
    solve_with_server,
)

KEY = "OPENAI_API_KEY"  # environment variable: a command line is no place for a secret
ANNOTATOR_TRIES = 3


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(list(argv))
    return _make(args) if args.command == "make" else _segment(args)


# -- make
# ----------------------------------------------------------------------------------------------------------


def _make(args: argparse.Namespace) -> int:
    env = _environment(args)
    try:
        records = env.records("train")[: args.tasks]
        options = {"file": str(args.file), "teacher": args.teacher, "model": args.model, "env": env.name}
        options |= {"temperature": args.temperature, "seed": args.seed}
        with Journal(_journal_of(args.out), options) as journal:
            try:
                with _Progress(len(records), "tasks") as progress:
                    solve = _with_server if _is_url(args.teacher) else _with_engine
                    retries = solve(args, Recorder(env), records, journal, progress)
            finally:  # what is kept so far, however the work ended
                kept = _kept(records, journal, args.keep)
                if kept:
                    write_records(args.out, kept)
            _print_summary(journal, len(kept), len(records), retries)
    finally:
        env.close()
    if not kept:
        print(f"no trace is kept; {_journal_of(args.out)} says why of each")
        return 1
    print(f"{args.out}: {len(kept)} records; next: pact-fast traces segment {args.out}")
    return 0


def _environment(args: argparse.Namespace) -> ToolEnv:
    if args.file.suffix in (".yaml", ".yml"):
        config = load_config(args.file)
        return make_env(config.env.name, config.env.settings)
    # The same file for both splits: no task is held out.
    paths = {"train_path": str(args.file), "validation_path": str(args.file)}
    return make_env(args.env, paths | dict(_setting(text) for text in args.setting))


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--setting {text!r}: write KEY=VALUE")
    return key, yaml.safe_load(value)


def _is_url(teacher: str) -> bool:
    return re.match(r"https?://", teacher) is not None


def _journal_of(out: Path) -> Path:
    return out.with_name(out.name + ".journal")


def _state(journal: Journal) -> tuple[Counter[str], Counter[str]]:
    """Tries made and traces kept, by record."""
    made = Counter(row["record_id"] for row in journal.rows)
    return made, Counter(row["record_id"] for row in journal.rows if row["dropped"] is None)


def _with_server(
    args: argparse.Namespace,
    recorder: Recorder,
    records: Sequence[Record],
    journal: Journal,
    progress: _Progress,
) -> Counter[str]:
    server = _server(args.teacher, args)
    made, kept = _state(journal)
    for row in journal.rows:
        progress.count(row)

    def task(record: Record) -> None:
        tries, good = made[record.id], kept[record.id]
        while tries < args.samples and good < args.keep:
            how = {"temperature": args.temperature, "max_tokens": args.max_tokens, "seed": args.seed + tries}
            attempt = solve_with_server(server, recorder, record, tries, args.max_turns, **how)
            _book(journal, progress, attempt)
            tries, good = tries + 1, good + (attempt.dropped is None)
        progress.advance()

    _in_threads(task, records, args.concurrency)
    return server.retries


def _with_engine(
    args: argparse.Namespace,
    recorder: Recorder,
    records: Sequence[Record],
    journal: Journal,
    progress: _Progress,
) -> Counter[str]:
    # Imported here: a server's traces need no torch.
    from pact_fast.train.build import build_model, device_of

    path = ModelConfig(path=args.teacher, dtype=args.dtype)
    model, tokenizer = build_model(path, LoraConfig(), device_of("auto"))
    chat = ChatFormat.for_tokenizer(tokenizer)
    engine = build_engine(RolloutConfig(), model.eval(), Sharded(model, World()), Path(args.out).parent)
    context = getattr(model.config, "max_position_embeddings", None)
    limits = RolloutLimits(args.max_turns, args.max_tokens * args.max_turns, args.max_tokens, context)
    made, kept = _state(journal)
    for row in journal.rows:
        progress.count(row)
    for sample in range(args.samples):
        todo = [r for r in records if made[r.id] <= sample and kept[r.id] < args.keep]
        for start in range(0, len(todo), args.concurrency):
            part = todo[start : start + args.concurrency]
            how = {"temperature": args.temperature, "seed": args.seed}
            for attempt in solve_with_engine(engine, recorder, chat, part, sample, limits, **how):
                _book(journal, progress, attempt)
                kept[attempt.record_id] += attempt.dropped is None
    progress.advance(len(records))
    return Counter()


def _book(journal: Journal, progress: _Progress, attempt: Attempt) -> None:
    row = asdict(attempt)
    if attempt.dropped is not None:
        row["trace"] = []  # its reason and its cost are enough
    journal.add(row)
    progress.count(row)


def _kept(records: Sequence[Record], journal: Journal, keep: int) -> list[Record]:
    """The kept traces as records, in the order of the tasks; a further one of a task has its number in the
    id."""
    good: dict[str, list[tuple[dict, ...]]] = {}
    for row in sorted(journal.rows, key=lambda row: row["sample"]):
        if row["dropped"] is None:
            good.setdefault(row["record_id"], []).append(tuple(row["trace"]))
    out = []
    for record in records:
        for number, trace in enumerate(good.get(record.id, [])[:keep]):
            name = record.id if number == 0 else f"{record.id}#{number + 1}"
            out.append(replace(record, id=name, expert_trace=trace))
    return out


def _print_summary(journal: Journal, kept: int, tasks: int, retries: Counter[str]) -> None:
    table = Table("traces", "count", title=f"{tasks} tasks, {len(journal.rows)} tries")
    table.add_row("kept", str(kept), style="green")
    dropped = Counter(row["dropped"] for row in journal.rows if row["dropped"] is not None)
    for reason, count in dropped.most_common():
        table.add_row(f"dropped: {reason}", str(count))
    for cause, count in retries.most_common():
        table.add_row(f"retried: {cause}", str(count), style="yellow")
    for key in ("prompt_tokens", "completion_tokens"):
        table.add_row(key.replace("_", " "), f"{sum(row[key] for row in journal.rows):,}")
    Console().print(table)


# -- segment
# -------------------------------------------------------------------------------------------------------


def _segment(args: argparse.Namespace) -> int:
    records = load_records(args.file).records
    annotator = _server(args.annotator, args) if args.annotator else None
    options = {"file": str(args.file), "annotator": args.annotator, "model": args.model}
    with Journal(_journal_of(args.out), options) as journal:
        answered = {row["key"]: row for row in journal.rows}
        done: dict[str, list[tuple[dict[str, Any], str | None]]] = {}
        with _Progress(len(records), "records") as progress:

            def task(record: Record) -> None:
                done[record.id] = [_cut(m, annotator, journal, answered) for m in record.expert_trace]
                progress.advance()

            _in_threads(task, records, args.concurrency)
    cut = [replace(record, expert_trace=tuple(m for m, _ in done[record.id])) for record in records]
    write_records(args.out, cut)
    routes = Counter(route for messages in done.values() for _, route in messages if route is not None)
    table = Table("turns cut by", "count")
    for route, count in routes.most_common():
        table.add_row(route, str(count))
    for cause, count in (annotator.retries if annotator else Counter()).most_common():
        table.add_row(f"retried: {cause}", str(count), style="yellow")
    Console().print(table)
    print(f"{args.out}: {len(records)} records; pact-fast data check {args.out} shows their levels")
    return 0


def _cut(
    message: dict[str, Any],
    annotator: ChatServer | None,
    journal: Journal,
    answered: dict[str, dict],
) -> tuple[dict[str, Any], str | None]:
    """The message with `reasoning_segments` and who cut it; without reasoning or calls as it is, and None."""
    if message["role"] != "assistant" or not (message["reasoning_content"] and message["tool_calls"]):
        return message, None
    if message.get("reasoning_segments") is not None or message.get("reasoning_levels") is not None:
        return message, "the record"
    text, calls = message["reasoning_content"], message["tool_calls"]
    segments, hard = segment_reasoning(text, calls)
    route = "rules"
    if hard:
        key = hashlib.blake2b(repr((text, calls)).encode(), digest_size=16).hexdigest()
        row = answered.get(key)
        if row is None and annotator is not None:
            row = {"key": key, "segments": _annotated(message, annotator)}
            journal.add(row)
        found = row["segments"] if row else None
        route = "annotator" if found else "conservative"
        segments = [Segment(*s) for s in found] if found else conservative(text, calls)
    return {**message, "reasoning_segments": [s._asdict() for s in segments]}, route


def _annotated(message: dict[str, Any], annotator: ChatServer) -> list[Segment] | None:
    """The annotator's cut; None where it gave none that is valid in ANNOTATOR_TRIES tries."""
    for number in range(ANNOTATOR_TRIES):
        try:
            heat = 0.0 if number == 0 else 0.7  # another answer, where the first was none
            choice, _ = annotator.complete(annotator_messages(message), temperature=heat, seed=number)
            return read_annotation(choice["message"].get("content") or "", message)
        except ValueError:
            annotator.count("invalid annotation")
        except Refused:
            annotator.count("refused")
            return None
    return None


# -- both
# ------------------------------------------------------------------------------------------------------------


def _server(url: str, args: argparse.Namespace) -> ChatServer:
    if not _is_url(url):
        raise ValueError(f"{url!r} is no URL: write http://HOST:PORT/v1")
    return ChatServer(
        url,
        args.model,
        os.environ.get(KEY),
        timeout=args.timeout,
        retry_timeout=args.retry_timeout,
        backoff=args.backoff,
    )


def _in_threads(task: Callable[[Record], None], records: Iterable[Record], count: int) -> None:
    """Runs the tasks, `count` at once; the first error ends what has not begun and is raised."""
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(task, record) for record in records]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _Progress:
    """A bar over tasks with the traces kept, dropped by reason, and the tokens they cost."""

    def __init__(self, total: int, what: str) -> None:
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[told]}"))
        self._task = self._bar.add_task(what, total=total, told="")
        self._kept, self._tokens, self._dropped = 0, 0, Counter[str]()
        self._lock = threading.Lock()

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def count(self, row: dict[str, Any]) -> None:
        with self._lock:
            self._tokens += row["prompt_tokens"] + row["completion_tokens"]
            if row["dropped"] is None:
                self._kept += 1
            else:
                self._dropped[row["dropped"]] += 1
            reasons = "".join(f", {reason} {count}" for reason, count in self._dropped.most_common())
            self._bar.update(self._task, told=f"kept {self._kept}{reasons}; {self._tokens:,} tokens")

    def advance(self, count: int = 1) -> None:
        self._bar.advance(self._task, count)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pact-fast traces", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("file", type=Path, help="records (.jsonl, .parquet); make: or a training .yaml")
    shared.add_argument("--out", type=Path, required=True, help="records to write, .jsonl or .parquet")
    shared.add_argument("--model", default="default", help="the server's name of the model")
    shared.add_argument("--concurrency", type=int, default=16, help="requests at once")
    shared.add_argument("--timeout", type=float, default=300.0, help="seconds for one answer")
    shared.add_argument(
        "--retry-timeout", type=float, default=1800.0, help="seconds that one request is tried for"
    )
    shared.add_argument("--backoff", type=float, default=1.0, help="seconds before the second try")
    make = commands.add_parser("make", parents=[shared], help="solve tasks with a teacher")
    make.add_argument("--teacher", required=True, help="URL of chat completions, or a model folder")
    make.add_argument("--env", default="python", help="environment of the records (python, ftrl, toolhop)")
    make.add_argument("--setting", action="append", default=[], help="KEY=VALUE of the environment")
    make.add_argument("--tasks", type=int, help="only the first so many")
    make.add_argument("--samples", type=int, default=4, help="tries a task at most")
    make.add_argument("--keep", type=int, default=1, help="traces a task at most")
    make.add_argument("--max-turns", type=int, default=10)
    make.add_argument("--max-tokens", type=int, default=4096, help="of one turn")
    make.add_argument("--temperature", type=float, default=0.7)
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of a local model")
    segment = commands.add_parser("segment", parents=[shared], help="cut reasoning into segments")
    segment.add_argument("--annotator", help="URL of chat completions that cuts the turns rules find hard")
    return parser
