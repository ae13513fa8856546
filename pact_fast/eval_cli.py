"""pact-fast eval MODEL --env NAME: scores a model on an environment, in batches, resumable."""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from pact_fast.data.chat import ChatFormat
from pact_fast.data.records import Record, load_records
from pact_fast.envs.base import FAILURE_KINDS, ToolEnv, make_env
from pact_fast.evaluate import transcript
from pact_fast.models import base_model_path
from pact_fast.rollout import HFEngine, Rollout, RolloutLimits, collect_rollouts
from pact_fast.stats import mean_interval, share_interval


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pact-fast eval", description=__doc__)
    parser.add_argument("model", help='a Hugging Face folder, a run\'s model folder, or "toolbox-base"')
    parser.add_argument("--env", default="toolbox", help="toolbox, bfcl, ftrl, toolhop, ...")
    parser.add_argument(
        "--setting", action="append", default=[], metavar="KEY=VALUE", help="a setting of the environment"
    )
    parser.add_argument("--split", default="test", choices=["train", "validation", "test"])
    parser.add_argument("--file", help="records in JSONL or parquet that replace the split")
    parser.add_argument("--tasks", type=int, help="only the first N tasks")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--samples", type=int, default=1, help="rollouts a task")
    parser.add_argument("--max-turns", type=int, default=10)
    parser.add_argument("--max-completion-length", type=int, default=512)
    parser.add_argument("--max-turn-length", type=int, default=128)
    parser.add_argument("--batch-tasks", type=int, default=32, help="tasks between two saves")
    parser.add_argument("--chat-format", default="auto")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/eval", help="folder of results.jsonl and transcripts.jsonl")
    return parser


def main(argv: Sequence[str]) -> int:
    args = build_parser().parse_args(list(argv))
    env = make_env(args.env, dict(_setting(s) for s in args.setting))
    try:
        rows = run(args, env)
    finally:
        env.close()
    console = Console()
    console.print(summary_table(rows, f"{args.model} on {args.env}/{args.split}, T={args.temperature:g}"))
    console.print(failure_table(rows))
    return 0


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--setting {text!r}: write KEY=VALUE")
    return key, yaml.safe_load(value)


def run(args: argparse.Namespace, env: ToolEnv) -> list[dict[str, Any]]:
    """Scores what `results.jsonl` does not hold yet and returns all rows."""
    records = (
        list(load_records(args.file, require_trace=False).records) if args.file else env.records(args.split)
    )
    records = records[: args.tasks] if args.tasks else records
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    done = _resume(out, {k: v for k, v in vars(args).items() if k not in ("out", "tasks", "batch_tasks")})
    todo = [r for r in records if r.id not in done]
    path = base_model_path() if args.model == "toolbox-base" else args.model
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, args.dtype))
    engine = HFEngine(model.to(args.device).eval())
    chat = ChatFormat.for_tokenizer(AutoTokenizer.from_pretrained(path), args.chat_format)
    limits = RolloutLimits(args.max_turns, args.max_completion_length, args.max_turn_length)
    with Progress() as progress, (out / "results.jsonl").open("a") as results:
        bar = progress.add_task("tasks", total=len(records), completed=len(records) - len(todo))
        with (out / "transcripts.jsonl").open("a") as transcripts:
            for start in range(0, len(todo), args.batch_tasks):
                batch = todo[start : start + args.batch_tasks]
                rollouts = collect_rollouts(
                    engine,
                    env,
                    chat,
                    batch,
                    num_generations=args.samples,
                    limits=limits,
                    temperature=args.temperature,
                    seed=args.seed + start,
                )
                for record, group in zip(batch, _groups(rollouts, args.samples), strict=True):
                    transcripts.write(
                        json.dumps({"id": record.id, "pieces": transcript(group[0], chat)}) + "\n"
                    )
                    done[record.id] = _row(record, group)
                    results.write(json.dumps(done[record.id]) + "\n")
                transcripts.flush()
                results.flush()
                progress.advance(bar, len(batch))
    return [done[r.id] for r in records]


def _groups(rollouts: Sequence[Rollout], size: int) -> Iterable[Sequence[Rollout]]:
    return (rollouts[i : i + size] for i in range(0, len(rollouts), size))


def _resume(out: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of an interrupted evaluation of the same thing; another evaluation in the folder is an error."""
    marker, results = out / "settings.json", out / "results.jsonl"
    if marker.is_file() and json.loads(marker.read_text()) != settings:
        raise ValueError(
            f"--out {out} holds an evaluation with other settings ({marker}): give another folder"
        )
    marker.write_text(json.dumps(settings))
    if not results.is_file():
        return {}
    lines = results.read_text().split("\n")
    results.write_text("".join(line + "\n" for line in lines[:-1]))  # a line that was cut short is done again
    return {row["id"]: row for row in map(json.loads, lines[:-1])}


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
        "scores": dict(scores),
        "failures": dict(Counter(o.failure for o in outcomes if o.failure)),
    }


def summary_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """Solved share, reward, calls and the environment's own scores, a line per category and one for all."""
    names = sorted({name for row in rows for name in row["scores"]})
    table = Table(title=title)
    for column in ("category", "tasks", "solved [95%]", "reward", "calls", *names):
        table.add_column(column, justify="left" if column == "category" else "right")
    categories = sorted({row["category"] for row in rows})
    for category in [*categories, "all"] if len(categories) > 1 else ["all"]:
        chosen = [r for r in rows if category in ("all", r["category"])]
        solved = share_interval([r["solved"] for r in chosen])
        own = [mean_interval([r["scores"].get(n, 0.0) for r in chosen]).mean for n in names]
        table.add_row(
            category,
            str(len(chosen)),
            str(solved),
            f"{mean_interval([r['reward'] for r in chosen]).mean:.3f}",
            f"{mean_interval([r['calls'] for r in chosen]).mean:.2f}",
            *(f"{value:.3f}" for value in own),
        )
    return table


def failure_table(rows: Sequence[dict[str, Any]]) -> Table:
    """How unsolved rollouts failed, by category."""
    categories = sorted({row["category"] for row in rows})
    table = Table(title="what went wrong (rollouts)")
    table.add_column("failure")
    for category in categories:
        table.add_column(category, justify="right")
    for kind in FAILURE_KINDS:
        counts = [sum(r["failures"].get(kind, 0) for r in rows if r["category"] == c) for c in categories]
        table.add_row(kind, *map(str, counts))
    return table
