"""The folder of a run: one run at a time, never the remains of another taken for its own."""

from __future__ import annotations

import difflib
import json
import shutil
import uuid
from pathlib import Path

from pact_fast.config import ConfigError

IDENTITY = "run.json"
# What a run writes into its folder, and what a new run there must not find.
ARTIFACTS = (
    *(IDENTITY, "config.json", "metrics.jsonl", "tensorboard", "checkpoints", "model", "weights"),
    *("summary.json", "transcript.json", "report.html"),
)


def claim(run_dir: Path, *, resume: bool, overwrite: bool) -> list[str]:
    """Makes the folder this run's own -> lines to tell the user. For the first rank alone.

    A new run in a folder that holds another moves that one into `previous-1`, `previous-2`, ...; with
    `overwrite` it is deleted. A resumed run keeps what is there, and the identity that it began with.

    Raises ConfigError where `resume` finds nothing and a run of nearly that name could be meant.
    """
    found = [run_dir / name for name in ARTIFACTS if (run_dir / name).exists()]
    if resume:
        if found:
            return [] if (run_dir / IDENTITY).exists() else _begin(run_dir, [])
        if near := _similar_run(run_dir):
            raise ConfigError(
                f"--resume: {run_dir} holds no run; did you mean --run.name {near}? "
                "Without --resume a new run begins"
            )
        return _begin(run_dir, [f"--resume: {run_dir} holds no run yet: a new one begins"])
    told = []
    if found and overwrite:
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        told.append(f"{run_dir}: the run that was there is overwritten")
    elif found:
        number = 1
        while (aside := run_dir / f"previous-{number}").exists():
            number += 1
        aside.mkdir()
        for path in found:
            path.rename(aside / path.name)
        told.append(f"{run_dir}: the run that was there is now in {aside} (--overwrite deletes it instead)")
    return _begin(run_dir, told)


def _begin(run_dir: Path, told: list[str]) -> list[str]:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / IDENTITY).write_text(json.dumps({"id": uuid.uuid4().hex}) + "\n", encoding="utf-8")
    return told


def _similar_run(run_dir: Path) -> str | None:
    """A run beside this folder whose name is nearly its name, and that could be resumed."""
    parent = run_dir.parent
    beside = sorted(parent.iterdir()) if parent.is_dir() else []
    names = [path.name for path in beside if (path / "checkpoints").is_dir()]
    return next(iter(difflib.get_close_matches(run_dir.name, names, 1, cutoff=0.8)), None)
