"""`pact-fast train CONFIG [--resume | --overwrite] [--section.field value ...]`: one training run."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pact_fast.config import Config, config_parser, load_config

if TYPE_CHECKING:
    from pact_fast.train.preemption import StopSignal
    from pact_fast.train.trainer import Trainer


SHORT = {"--resume": "--checkpoint.resume=true", "--overwrite": "--checkpoint.overwrite=true"}


def main(argv: Sequence[str]) -> int:
    words = list(argv)
    if not words or words[0] in ("-h", "--help"):
        config_parser().print_help()
        return 0
    words = [SHORT.get(word, word) for word in words]
    path = None if words[0].startswith("--") else words[0]
    config = load_config(path, words if path is None else words[1:])
    from pact_fast.evaluation.report import final_table, write_report
    from pact_fast.train.preemption import StopSignal

    with StopSignal() as stop:  # from here on SIGTERM and Ctrl-C end the run in order
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
    from pact_fast.distributed import RankLost
    from pact_fast.rollout import RolloutError
    from pact_fast.train.checkpoint import CheckpointError
    from pact_fast.train.preemption import Preempted
    from pact_fast.train.trainer import Trainer, TrainingStopped

    trainer = Trainer(config, stop)
    try:
        return trainer, trainer.train(), 0
    except Preempted as stopped:
        if trainer.world.main:
            folder = trainer.run_dir / "checkpoints"
            print(f"stopped by {stopped} and saved in {folder}; go on with --resume")
        return trainer, None, 130 if stop.by == "Ctrl-C" else 0
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
