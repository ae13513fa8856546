"""`pact-fast train [CONFIG] [--section.key value ...]`: one training run."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import yaml

from pact_fast.config import Config, bundled_configs, load_config
from pact_fast.files import FULL, one_line
from pact_fast.keys import described
from pact_fast.objective import PRESETS

if TYPE_CHECKING:
    from pact_fast.train.preemption import StopSignal
    from pact_fast.train.trainer import Trainer


SHORT = {"--resume": "--checkpoint.resume=true", "--overwrite": "--checkpoint.overwrite=true"}


def main(argv: Sequence[str]) -> int:
    words = list(argv)
    if not words or {"-h", "--help"} & set(words):
        print(help_text())
        return 0
    dry_run = "--dry-run" in words
    words = [SHORT.get(word, word) for word in words if word != "--dry-run"]
    path = None if not words or words[0].startswith("--") else words[0]
    config = load_config(path, words if path is None else words[1:])
    if dry_run:
        print(plan(config))
        return 0
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
    folder = trainer.run_dir
    console.print(f"{page}: curves and a transcript; metrics.jsonl and TensorBoard events beside it")
    words = ["pact-fast", "eval", str(folder), "--env", config.env.name]
    words += [w for name, value in config.env.settings.items() for w in ("--setting", f"{name}={value}")]
    console.print(f"next: {shlex.join(words)}", highlight=False, markup=False, soft_wrap=True)
    return 0


def help_text() -> str:
    """Every key in one line: its section, default and what it is; presets and bundled configs."""
    lines = [
        "pact-fast train [CONFIG] [--resume | --overwrite] [--dry-run] [--preset NAME] [--SECTION.KEY VALUE]",
        "",
        "  CONFIG       a YAML file, or the name of a bundled one: "
        + _folded(", ".join(bundled_configs()), 15),
        "  --resume     go on from the newest checkpoint of the run folder",
        "  --overwrite  delete another run that is in the run folder; without, it is moved aside",
        "  --dry-run    print the resolved config, what a step is, memory and time by formula; run nothing",
        "  --preset     " + _folded(", ".join(PRESETS), 15),
    ]
    for section, title, keys in described(Config):
        lines += ["", f"{section}: {title}"]
        for key in keys:
            head = f"  --{key.dotted} {key.default}"
            gap = f"{head:<42}" if len(head) < 42 else f"{head}\n{'':<42}"
            lines.append(gap + _folded(key.what, 42))
    return "\n".join(lines)


def _folded(text: str, indent: int, width: int = 118) -> str:
    words, lines = text.split(" "), [""]
    for word in words:
        if len(lines[-1]) + len(word) + indent + 1 > width:
            lines.append("")
        lines[-1] += f"{word} "
    return ("\n" + " " * indent).join(line.rstrip() for line in lines)


def plan(config: Config) -> str:
    """The resolved config, what a step consists of, and memory by formula."""
    t, r = config.train, config.rollout
    rollouts = t.prompts_per_step * r.num_generations
    updates = t.num_mini_batches * t.num_iterations
    lines = [
        yaml.safe_dump(config.to_dict(), sort_keys=False).rstrip(),
        "",
        f"a step: {t.prompts_per_step} prompts x {r.num_generations} rollouts = {rollouts} rollouts of "
        f"at most {r.max_completion_length:,} tokens, {updates} update{'s' * (updates > 1)}",
        f"a run: {t.max_steps} steps, {t.max_steps * rollouts:,} rollouts, {t.max_steps * updates:,} updates",
        *_memory(config),
    ]
    return "\n".join(lines)


def _memory(config: Config) -> list[str]:
    """Memory of an update per device, where the model's config is at hand."""
    from transformers import AutoConfig

    from pact_fast.train.build import model_path
    from pact_fast.train.memory import memory
    from pact_fast.tree.families import family_of

    try:
        family = family_of(AutoConfig.from_pretrained(model_path(config.model.path)))
    except (OSError, ValueError) as error:
        return [f"memory: not known: {str(error).splitlines()[0]}"]
    gpus = int(os.environ.get("WORLD_SIZE", "1"))
    parts = memory(family, gpus, config.train.token_budget)
    told = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items() if name != "total")
    return [
        f"memory per device, {gpus} device{'s' * (gpus > 1)}, {config.train.token_budget:,} packed tokens, "
        f"all layers checkpointed: {parts['total'] / 2**30:.2f} GiB ({told})"
    ]


def _run(config: Config, stop: StopSignal) -> tuple[Trainer, dict[str, Any] | None, int]:
    """Trains -> trainer, summary (None where the run was stopped), exit status."""
    from pact_fast.distributed import RankLost, RanksDisagree
    from pact_fast.rollout import RolloutError
    from pact_fast.train.checkpoint import CheckpointError
    from pact_fast.train.preemption import Preempted
    from pact_fast.train.run_lock import RunInUse
    from pact_fast.train.trainer import Trainer, TrainingStopped

    trainer = Trainer(config, stop)
    folder = trainer.run_dir / "checkpoints"
    try:
        return trainer, trainer.train(), 0
    except Preempted as stopped:
        if trainer.world.main:
            print(f"stopped by {stopped} and saved in {folder}; go on with --resume")
        return trainer, None, 130 if stop.by == "Ctrl-C" else 0
    except RunInUse as error:
        print(f"error: {error}", file=sys.stderr)
        return trainer, None, 2
    except (TrainingStopped, RanksDisagree, RankLost, CheckpointError) as error:
        print(f"stopped: {error}", file=sys.stderr)
    except RolloutError as error:
        print(f"stopped: {error}\nsaved in {folder}; go on with --resume", file=sys.stderr)
    except OSError as error:
        if error.errno not in FULL:
            raise
        print(f"stopped: {one_line(error)} and go on with --resume", file=sys.stderr)
    return trainer, None, 1
