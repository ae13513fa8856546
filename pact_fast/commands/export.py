"""`pact-fast export`: a run's weights as a plain Hugging Face folder that AutoModelForCausalLM loads."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pact_fast.config import load_config
from pact_fast.train.build import build_model
from pact_fast.train.checkpoint import Checkpointer, CheckpointError, load_tensors, verify


def export(run_dir: str | Path, out: str | Path, *, which: str = "last") -> Path:
    """Writes model, tokenizer and generation settings of a run's checkpoint to `out` and returns it.

    which: "last", "best" (by validation score) or a step number.
    The weights come from run_dir/checkpoints, into the model named in its config.json; adapters are merged.
    `out` must not exist: it is written beside and renamed, so a folder that is there is whole.
    """
    run_dir, out = run_folder(run_dir), Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; give another folder or remove it")
    config_file = run_dir / "config.json"
    if not config_file.exists():
        raise FileNotFoundError(f"{config_file}: no such file; is {run_dir} a run folder?")
    path = _choose(Checkpointer(run_dir / "checkpoints"), which)
    if problem := verify(path):
        raise CheckpointError(f"{path}: {problem}; choose another with --which")
    config = load_config(config_file)
    model, tokenizer = build_model(config.model, config.lora, torch.device("cpu"))
    load_tensors(path, model, None)
    if config.lora.rank:
        model = model.merge_and_unload()
    building = out.with_name(f".{out.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    model.save_pretrained(building)
    tokenizer.save_pretrained(building)
    building.rename(out)
    return out


def run_folder(path: str | Path) -> Path:
    """The run's folder, also where its model folder is given."""
    path = Path(path)
    return path.parent if path.name == "model" and (path.parent / "config.json").exists() else path


def _choose(checkpoints: Checkpointer, which: str) -> Path:
    if which == "last":
        path = checkpoints.latest()
    elif which == "best":
        path = checkpoints.best()
    else:
        found = [
            p for p in checkpoints.paths() if p.name.removeprefix("step-").lstrip("0") == which.lstrip("0")
        ]
        path = found[0] if found else None
    if path is None:
        names = ", ".join(p.name for p in checkpoints.paths()) or "none"
        raise CheckpointError(f"{checkpoints.folder}: no checkpoint {which!r}; there are: {names}")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "pact-fast export", description="A run's weights as a Hugging Face folder."
    )
    parser.add_argument("run_dir", help="the run's folder, or its model folder")
    parser.add_argument("out", help="folder to write; must not exist")
    parser.add_argument("--which", default="last", help="last (default), best, or a step number")
    arguments = parser.parse_args(argv)
    try:
        folder = run_folder(arguments.run_dir) / "checkpoints"
        chosen = _choose(Checkpointer(folder), arguments.which) if folder.is_dir() else None
        which = arguments.which if chosen is None else chosen.name.removeprefix("step-")
        export(arguments.run_dir, arguments.out, which=which)
        print(f"{arguments.out}: the weights of step {int(which)}")
    except (CheckpointError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    return 0
