"""The command line: pact-fast train | eval | compare | report | export | serve | doctor | bench | data."""

from __future__ import annotations

import errno
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pact_fast.config import Config, ConfigError, config_parser, load_config
from pact_fast.version import __version__

if TYPE_CHECKING:
    from pact_fast.preemption import StopSignal
    from pact_fast.trainer import Trainer

# Commands that live in a module of their own, as `main(argv) -> exit status`.
MODULES = {
    "eval": ("pact_fast.eval_cli", "score a model on an environment"),
    "compare": ("pact_fast.compare", "run presets x seeds x settings: one table, one plot"),
    "report": ("pact_fast.report", "write report.html of a run folder"),
    "export": ("pact_fast.export", "a run's weights as a plain Hugging Face folder"),
    "serve": ("pact_fast.serve.main", "sample for trainers elsewhere, over HTTP"),
    "doctor": ("pact_fast.doctor", "what this machine has, and what each lack costs"),
    "bench": ("pact_fast.bench_cli", "microbenchmarks of the ops beside their peers"),
    "data": ("pact_fast.data.check", "check and show records of a data file"),
}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    command, rest = words[0], words[1:]
    if command == "train":
        return _guarded(train, rest)
    if command in MODULES:
        return _guarded(importlib.import_module(MODULES[command][0]).main, rest)
    print(f"error: unknown command {command!r}; there are train, {', '.join(MODULES)}", file=sys.stderr)
    return 2


def usage() -> str:
    lines = ["pact-fast COMMAND ...", "", "  train CONFIG    train a policy (--help lists every key)"]
    lines += [f"  {name:<15} {text}" for name, (_, text) in MODULES.items()]
    return "\n".join([*lines, "", "pact-fast COMMAND --help tells more."])


def _guarded(run: Callable[[list[str]], int], words: list[str]) -> int:
    """Errors of the user's making are one line and exit status 2; anything else keeps its traceback."""
    try:
        return run(words)
    except (ConfigError, ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def train(words: list[str]) -> int:
    """pact-fast train CONFIG [--resume] [--section.field value ...]"""
    if not words or words[0] in ("-h", "--help"):
        config_parser().print_help()
        return 0
    words = ["--checkpoint.resume=true" if word == "--resume" else word for word in words]
    path = None if words[0].startswith("--") else words[0]
    config = load_config(path, words if path is None else words[1:])
    from pact_fast.preemption import StopSignal
    from pact_fast.report import final_table, write_report

    with StopSignal() as stop:  # from here on a SIGTERM ends the run in order
        trainer, summary, status = _run(config, stop)
    if summary is None:
        return status
    if not trainer.world.main:
        return 0
    page = write_report(trainer.run_dir)
    from rich.console import Console

    console = Console()
    console.print(final_table(summary))
    console.print(
        f"run folder {trainer.run_dir}: metrics.jsonl, tensorboard events, model, {Path(page).name}"
    )
    return 0


def _run(config: Config, stop: StopSignal) -> tuple[Trainer, dict[str, Any] | None, int]:
    """Trains -> trainer, summary (None where the run was stopped), exit status."""
    from pact_fast.checkpoint import CheckpointError
    from pact_fast.distributed import RankLost
    from pact_fast.preemption import Preempted
    from pact_fast.rollout import RolloutError
    from pact_fast.trainer import Trainer, TrainingStopped

    trainer = Trainer(config, stop)
    try:
        return trainer, trainer.train(), 0
    except Preempted:
        if trainer.world.main:
            print(f"stopped by SIGTERM and saved in {trainer.run_dir / 'checkpoints'}; go on with --resume")
        return trainer, None, 0
    except (TrainingStopped, RankLost, CheckpointError) as error:
        print(f"stopped: {error}", file=sys.stderr)
    except RolloutError as error:
        folder = trainer.run_dir / "checkpoints"
        print(f"stopped: {error}\nsaved in {folder}; go on with --resume", file=sys.stderr)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"stopped: {error}: free some space and go on with --resume", file=sys.stderr)
    return trainer, None, 1


if __name__ == "__main__":
    sys.exit(main())
