"""pact-fast eval MODEL --env NAME: scores a model on an environment, in batches, resumable."""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

from pact_fast.data.chat import ChatFormat
from pact_fast.data.formats import FORMAT_NAMES
from pact_fast.data.records import Record, load_records
from pact_fast.envs.base import FAILURE_KINDS, REGISTRY, ToolEnv, make_env
from pact_fast.evaluation.evaluate import transcript
from pact_fast.evaluation.stats import mean_interval, share_interval
from pact_fast.rollout import Rollout, RolloutLimits, collect_rollouts, local_engine
from pact_fast.train.build import base_out_of_place, device_of, load_pretrained, set_threads

# (assistant turns, tokens after the prompt, tokens a turn) where the command line says nothing. The bundled
# environment's answers are short; models of the real benchmarks think before they call.
LIMITS = {"toolbox": (10, 512, 128), "bfcl": (60, 16384, 1024), "ftrl": (20, 8192, 1024)}
OTHER_LIMITS = (10, 8192, 1024)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pact-fast eval", description=__doc__)
    parser.add_argument("model", help='a Hugging Face folder or hub name, a run\'s folder, or "toolbox-base"')
    parser.add_argument("--env", default="toolbox", help=", ".join(REGISTRY))
    parser.add_argument(
        "--setting", action="append", default=[], metavar="KEY=VALUE", help="a setting of the environment"
    )
    parser.add_argument("--split", default="test", choices=["train", "validation", "test"])
    parser.add_argument("--file", help="records in JSONL or parquet that replace the split")
    parser.add_argument("--tasks", type=int, help="only the first N tasks")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--samples", type=int, default=1, help="rollouts a task")
    turns = "assistant turns (toolbox, ...: 10; ftrl: 20; bfcl: 60, with protocol=benchmark its own limit)"
    parser.add_argument("--max-turns", type=int, help=turns)
    parser.add_argument(
        "--max-completion-length",
        type=int,
        help="tokens after the prompt, tool responses included (toolbox: 512; bfcl: 16384; else 8192)",
    )
    parser.add_argument("--max-turn-length", type=int, help="tokens sampled a turn (toolbox: 128; else 1024)")
    parser.add_argument("--batch-tasks", type=int, default=32, help="tasks at once, and between two saves")
    parser.add_argument("--chat-format", default="auto", help=", ".join(FORMAT_NAMES))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads; default: one for a small model, else all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", help="folder of results, transcripts and summary; default: runs/eval/<model>-<env>"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    args = build_parser().parse_args(list(argv))
    env = make_env(args.env, dict(parse_setting(s) for s in args.setting))
    limits = LIMITS.get(args.env, OTHER_LIMITS)
    if getattr(env, "official", False):  # the environment's own limit, that of the benchmark, is to hold
        limits = (env.max_turns, *limits[1:])  # type: ignore[attr-defined]
    for name, value in zip(("max_turns", "max_completion_length", "max_turn_length"), limits, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.out is None:
        path = Path(args.model)
        named = path.resolve().name if path.exists() else args.model.replace("/", "-")
        # The model folder of a run is named after the run.
        args.out = f"runs/eval/{path.resolve().parent.name if named == 'model' else named}-{args.env}"
    try:
        rows = run(args, env)
    finally:
        env.close()
    console = Console()
    console.print(summary_table(rows, f"{args.model} on {args.env}/{args.split}, T={args.temperature:g}"))
    console.print(failure_table(rows))
    (Path(args.out) / "summary.json").write_text(json.dumps(summary(rows), indent=1) + "\n")
    console.print(f"{args.out}: results.jsonl, transcripts.jsonl, summary.json", markup=False)
    return 0


def parse_setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--setting {text!r}: write KEY=VALUE")
    return key, yaml.safe_load(value)


def run(args: argparse.Namespace, env: ToolEnv) -> list[dict[str, Any]]:
    """Scores what `results.jsonl` does not hold yet and returns all rows."""
    prepare = getattr(env, "preparations", None)
    records = None if prepare else _records(args, env)  # what is wrong with them is said before a model loads
    device = device_of(args.device)
    model, tokenizer = load_pretrained(args.model, args.dtype)
    set_threads(args.threads, model)
    if note := base_out_of_place(args.model, args.env):
        print(note)
    chat = ChatFormat.for_tokenizer(tokenizer, args.chat_format)
    out = Path(args.out)  # made once what it is to hold can be made
    out.mkdir(parents=True, exist_ok=True)
    done = _resume(
        out, {k: v for k, v in vars(args).items() if k not in ("out", "tasks", "batch_tasks", "threads")}
    )
    context = getattr(model.config, "max_position_embeddings", None)
    limits = RolloutLimits(args.max_turns, args.max_completion_length, args.max_turn_length, context)
    roll = partial(
        collect_rollouts,
        local_engine(model, device),
        env,
        chat,
        temperature=args.temperature,
        seed=args.seed,
    )
    if prepare is not None:
        for wave in prepare(out):
            requests = max(len(record.env["requests"]) for record in wave)
            print(f"preparing: {', '.join(record.id for record in wave)}")
            longer = replace(
                limits,
                max_turns=limits.max_turns * requests,
                max_completion_length=limits.max_completion_length * requests,
            )
            roll(wave, num_generations=1, limits=longer, keys=range(len(wave)))
        records = _records(args, env)
    assert records is not None
    todo = [(i, r, chat.prompt(r.prompt, r.tools)) for i, r in enumerate(records) if r.id not in done]
    long = [record.id for _, record, prompt in todo if context is not None and len(prompt) >= context]
    if long:
        print(
            f"{len(long)} of {len(records)} prompts do not fit the model's context of {context} tokens and "
            f"count as length_limit, the first is {long[0]}"
        )
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns) as progress, Results(out) as results:
        bar = progress.add_task("tasks", total=len(records), completed=len(records) - len(todo))
        for start in range(0, len(todo), args.batch_tasks):
            keys, batch, prompts = zip(*todo[start : start + args.batch_tasks], strict=True)
            # Draws depend on the task's place in the split, so an interrupted run ends as an uncut one.
            rollouts = roll(batch, num_generations=args.samples, limits=limits, prompts=prompts, keys=keys)
            for record, group in zip(batch, _groups(rollouts, args.samples), strict=True):
                done[record.id] = results.add(record, group, chat)
            results.flush()
            solved = sum(row["solved"] for row in done.values()) / len(done)
            progress.update(bar, advance=len(batch), description=f"tasks, {solved:.3f} solved")
    return [done[r.id] for r in records]


def _records(args: argparse.Namespace, env: ToolEnv) -> list[Record]:
    loaded = load_records(args.file, require_trace=False).records if args.file else env.records(args.split)
    return loaded[: args.tasks] if args.tasks else loaded


def _groups(rollouts: Sequence[Rollout], size: int) -> Iterable[Sequence[Rollout]]:
    return (rollouts[i : i + size] for i in range(0, len(rollouts), size))


class Results:
    """The two files that an evaluation appends to: a row a task, and a transcript a rollout."""

    def __init__(self, out: Path) -> None:
        self.files = [(out / name).open("a") for name in ("transcripts.jsonl", "results.jsonl")]

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self.files:
            file.close()

    def add(self, record: Record, group: Sequence[Rollout], chat: ChatFormat) -> dict[str, Any]:
        transcripts, results = self.files
        for sample, rollout in enumerate(group):
            outcome = rollout.outcome
            assert outcome is not None
            line = {"id": record.id, "sample": sample, "reward": outcome.reward, "failure": outcome.failure}
            transcripts.write(json.dumps(line | {"pieces": transcript(rollout, chat)}) + "\n")
        row = _row(record, group)
        results.write(json.dumps(row) + "\n")
        return row

    def flush(self) -> None:
        for file in self.files:  # transcripts first: a row that is there has its transcripts
            file.flush()


def _resume(out: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of an interrupted evaluation of the same thing; another evaluation in the folder is an error."""
    marker, results, transcripts = (out / n for n in ("settings.json", "results.jsonl", "transcripts.jsonl"))
    before = json.loads(marker.read_text()) if marker.is_file() else settings
    other = [key for key in settings.keys() | before.keys() if settings.get(key) != before.get(key)]
    if other:
        raise ValueError(
            f"--out {out} holds an evaluation with another {', '.join(sorted(other))} (see {marker}): "
            "give another folder"
        )
    marker.write_text(json.dumps(settings))
    rows = {row["id"]: row for row in _whole_lines(results)}
    kept = [line for line in _whole_lines(transcripts) if line["id"] in rows]
    for path, lines in ((results, rows.values()), (transcripts, kept)):
        if path.is_file():
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return rows


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file; a last one that was cut short is left out, and so done again."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []


def _row(record: Record, group: Sequence[Rollout]) -> dict[str, Any]:
    outcomes = [r.outcome for r in group if r.outcome is not None]
    scores: dict[str, float] = defaultdict(float)
    for outcome in outcomes:
        for name, value in outcome.scores.items():
            scores[name] += value / len(outcomes)
    return {
        "id": record.id,
        "category": str(record.env.get("category", record.env.get("kind", "all"))),
        "solved": sum(o.solved for o in outcomes) / len(outcomes),
        "reward": sum(o.reward for o in outcomes) / len(outcomes),
        "calls": sum(o.calls for o in outcomes) / len(outcomes),
        "prompt_tokens": len(group[0].prompt),
        "completion_tokens": sum(len(r.token_ids) for r in group) / len(group),  # tool responses included
        "sampled_tokens": sum(r.num_sampled for r in group) / len(group),
        "scores": dict(scores),
        "failures": dict(Counter(o.failure for o in outcomes if o.failure)),
    }


def by_category(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of each category, then, where there are several, of all."""
    categories = sorted({row["category"] for row in rows})
    groups = {name: [row for row in rows if row["category"] == name] for name in categories}
    return groups | {"all": list(rows)} if len(categories) > 1 else {"all": list(rows)}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the tables show, as numbers: {category: {"tasks", "solved": [mean, low, high], ...}}."""
    out = {}
    for category, chosen in by_category(rows).items():
        solved = share_interval([r["solved"] for r in chosen])
        names = sorted({name for row in chosen for name in row["scores"]})
        out[category] = {
            "tasks": len(chosen),
            "solved": [solved.mean, solved.low, solved.high],
            "reward": _mean(r["reward"] for r in chosen),
            "calls": _mean(r["calls"] for r in chosen),
            "scores": {name: _mean(s[name] for r in chosen if name in (s := r["scores"])) for name in names},
            "failures": {k: sum(r["failures"].get(k, 0) for r in chosen) for k in FAILURE_KINDS},
        }
    return out


def _mean(values: Iterable[float]) -> float:
    return mean_interval(list(values)).mean


def summary_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """Solved share with its interval, reward, calls and the environment's own scores: a column per category,
    and one for all."""
    groups = summary(rows)
    names = sorted({name for row in rows for name in row["scores"]})
    table = Table(title=title)
    table.add_column("")
    for category in groups:
        table.add_column(category, justify="right")
    lines = {
        "tasks": [str(numbers["tasks"]) for numbers in groups.values()],
        "solved": [f"{numbers['solved'][0]:.3f}" for numbers in groups.values()],
        "  95%": ["{:.2f} to {:.2f}".format(*numbers["solved"][1:]) for numbers in groups.values()],
        "reward": [f"{numbers['reward']:.3f}" for numbers in groups.values()],
        "calls": [f"{numbers['calls']:.2f}" for numbers in groups.values()],
    }
    for name in names:
        values = [numbers["scores"].get(name) for numbers in groups.values()]
        lines[name] = ["-" if value is None else f"{value:.3f}" for value in values]
    for label, cells in lines.items():
        table.add_row(label, *cells)
    return table


def failure_table(rows: Sequence[dict[str, Any]]) -> Table:
    """How unsolved rollouts failed, by category."""
    groups = summary(rows)
    table = Table(title="what went wrong (rollouts)")
    table.add_column("failure")
    for category in groups:
        table.add_column(category, justify="right")
    for kind in FAILURE_KINDS:
        table.add_row(kind, *(str(numbers["failures"][kind]) for numbers in groups.values()))
    return table
