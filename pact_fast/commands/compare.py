"""`pact-fast compare PLAN`: presets x seeds x settings, one table, one plot."""

from __future__ import annotations

import argparse
import shlex
import signal
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from pact_fast.evaluation.sweep import PHASES, TRAINER, compare, load_plan, score_runs, tune_runs


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "pact-fast compare", description="Presets x seeds x settings in one table."
    )
    parser.add_argument("plan", help="plan file (YAML); see pact_fast/evaluation/sweep.py for its fields")
    parser.add_argument("--phase", choices=PHASES, default="all")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default 2)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    arguments = parser.parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    try:
        plan = load_plan(arguments.plan)
        if arguments.dry_run:
            runs = (
                tune_runs(plan) if arguments.phase in ("all", "tune") and plan.tune else score_runs(plan, {})
            )
            for run in runs:
                console.print(shlex.join([*TRAINER, *run.arguments]))
            return 0
        signal.signal(signal.SIGTERM, _stop)
        console.print(f"wrote {compare(plan, phase=arguments.phase, jobs=arguments.jobs, console=console)}")
    except (OSError, RuntimeError, ValueError) as error:
        console.print(f"compare: {error}", style="red")
        return 1
    return 0


def _stop(signum: int, frame: Any) -> None:
    raise SystemExit(128 + signum)
