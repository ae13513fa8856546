"""Checkpoints: atomic, checked, written beside training; safetensors and JSON, nothing is ever unpickled.

    run_dir/checkpoints/step-000040/
        shard-*.safetensors    trainable weights, a teacher's average of them, buffers, optimizer state; each
                               rank its own shard
                               (torch.distributed.checkpoint; read back on any number of ranks)
        rank-0.json ...        random number generators of each rank
        state.json             what the caller gave: step, counters, scores so far
        manifest.json          size and SHA-256 of every file; written last

A checkpoint is built in a hidden folder, synced and renamed: a half-written one is never seen. `latest`
checks every byte against the manifest and passes over a damaged one, with a warning, to the one before.

Only parameters that train are stored: of a LoRA run the adapters. The rest comes from where the run took it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from pact_fast.files import file_error, write_synced
from pact_fast.train.optimizer import plain_states, rebuilt_states

MANIFEST, STATE = "manifest.json", "state.json"
REPLACED = ".replaced-"  # before the name of a checkpoint while a new one takes its place
FORMAT = 1
WEIGHTS = ("model", "average")  # beginnings of names that are no optimizer state


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names it and says what to do."""


class Checkpointer:
    """Saves and finds the checkpoints of one run.

    Args:
        folder: usually run_dir / "checkpoints".
        keep_last: how many of the newest to keep; the one with the best score is kept besides.
        asynchronous: write in a thread while training goes on; only the copy to host memory is waited for.

    Under torch.distributed every rank makes one and calls the same methods in the same order.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, keep_last: int = 2, asynchronous: bool = True
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last}: keep at least 1 checkpoint")
        self.folder = Path(folder)
        self.keep_last, self.asynchronous = keep_last, asynchronous
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._distributed = dist.is_initialized()
        self.rank = dist.get_rank() if self._distributed else 0
        # Its collectives run in the writing thread: they must not mix with those of training.
        self._group = dist.new_group(backend="gloo") if self._distributed else None
        options = StagingOptions(False, False, False, False)  # plain copies, done when stage() returns
        self._stager = DefaultStager(options)

    # -- writing -----------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
        *,
        score: float | None = None,
        wait: bool = False,
        average: nn.Module | None = None,
    ) -> None:
        """Saves the state after `step` steps; returns once it is copied, the writing goes on behind.

        state: JSON values. score: held-out score, higher is better; marks the checkpoint to keep as best.
        average: a moving average of the model, whose trained weights are kept, too.
        A save that fails (disk full) leaves the older checkpoints as they are and warns; `wait` raises it.
        """
        self._join(warn=True)
        tensors = self._stager.stage(collect(model, optimizer) | average_tensors(model, average))
        assert isinstance(tensors, dict)
        record = {"step": step, "score": score, "state": dict(state)}
        text, draws = json.dumps(record), json.dumps(generators())

        def write() -> None:
            try:
                self._write(step, tensors, text, draws)
            except BaseException as error:
                self._error = error

        if self.asynchronous and not wait:
            self._thread = threading.Thread(target=write, name=f"checkpoint-{step}")
            self._thread.start()
        else:
            write()
            if wait:
                self.wait()
            else:
                self._join(warn=True)

    def wait(self, *, warn: bool = False) -> None:
        """Returns when the last save is on disk; raises CheckpointError where it failed, or warns of it."""
        self._join(warn=warn)

    def _join(self, *, warn: bool) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is None:
            return
        message = (
            f"{self.folder}: saving a checkpoint failed: {_first_line(error)}; older checkpoints are "
            "untouched. Free some space or check the folder's permissions"
        )
        if not warn:
            raise CheckpointError(message) from error
        warnings.warn(message, stacklevel=3)

    def _write(self, step: int, tensors: dict[str, Any], text: str, draws: str) -> None:
        target = self.folder / f"step-{step:06d}"
        building = self.folder / f".building-{step:06d}"

        def prepare() -> None:
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)

        def finish() -> None:
            write_synced(building / STATE, text)
            _write_manifest(building, json.loads(text))
            replaced = self.folder / f"{REPLACED}{target.name}"
            if target.exists():  # a damaged one, or one of a run that was resumed before it
                shutil.rmtree(replaced, ignore_errors=True)
                target.rename(replaced)
            building.rename(target)
            _sync_folder(self.folder)
            shutil.rmtree(replaced, ignore_errors=True)
            self._prune()

        def tensors_and_generators() -> None:
            writer = dcp.HuggingFaceStorageWriter(str(building), save_distributed=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it runs without a process group is intended
                dcp.save(
                    tensors, storage_writer=writer, process_group=self._group, no_dist=not self._distributed
                )
            write_synced(building / f"rank-{self.rank}.json", draws)

        try:
            self._together(prepare if self.rank == 0 else _nothing)
            self._together(tensors_and_generators)
            self._together(finish if self.rank == 0 else _nothing)
        except BaseException:
            if self.rank == 0:
                shutil.rmtree(building, ignore_errors=True)
            raise

    def _together(self, work: Callable[[], None]) -> None:
        """Runs a part of the save on every rank; where one rank fails, all raise, none waits for ever."""
        problem: BaseException | None = None
        try:
            work()
        except BaseException as error:
            problem = error
        if self._distributed:
            found: list[str | None] = [None] * dist.get_world_size()
            dist.all_gather_object(found, _first_line(problem) if problem else None, group=self._group)
            if problem is None and (first := next(filter(None, found), None)):
                problem = OSError(f"on another rank: {first}")
        if problem is not None:
            raise problem

    def _prune(self) -> None:
        for stale in self.folder.glob(".building-*"):
            shutil.rmtree(stale, ignore_errors=True)
        complete = [path for path in self.paths() if (path / MANIFEST).exists()]
        scores = {path: score for path in complete if (score := _manifest(path).get("score")) is not None}
        keep = {*complete[-self.keep_last :], *([max(scores, key=lambda p: scores[p])] if scores else [])}
        for path in complete:
            if path not in keep:
                # Renamed first: a deletion that is cut short must not leave a folder that looks whole.
                path.rename(doomed := path.with_name(f".building-deleted-{path.name}"))
                shutil.rmtree(doomed, ignore_errors=True)

    def _put_back(self) -> None:
        """A save that was cut between its two renames left the older checkpoint aside: use that one."""
        for replaced in self.folder.glob(f"{REPLACED}step-*"):
            target = replaced.with_name(replaced.name.removeprefix(REPLACED))
            if target.exists():
                shutil.rmtree(replaced, ignore_errors=True)
            else:
                replaced.rename(target)

    # -- reading -----------------------------------------------------------------------------------

    def paths(self) -> list[Path]:
        """Folders of finished checkpoints, oldest first, unchecked."""
        return sorted(p for p in self.folder.glob("step-*") if p.is_dir())

    def latest(self) -> Path | None:
        """The newest checkpoint whose every byte is as written; None where none was ever saved.

        Raises CheckpointError where there are checkpoints and all are damaged: starting over by itself would
        lose the run.
        """
        choice: list[Any] = [None, None]
        if self.rank == 0:
            self._put_back()
            damaged = []
            for path in reversed(self.paths()):
                problem = verify(path)
                if problem is None:
                    choice[0] = str(path)
                    break
                damaged.append(f"{path}: {problem}")
            if choice[0] is None and damaged:
                choice[1] = "no usable checkpoint: " + "; ".join(damaged) + ". Delete them to start anew"
            for message in damaged if choice[0] else []:
                warnings.warn(f"damaged checkpoint passed over: {message}", stacklevel=2)
        if self._distributed:
            dist.broadcast_object_list(choice, src=0, group=self._group)
        if choice[1]:
            raise CheckpointError(choice[1])
        return Path(choice[0]) if choice[0] else None

    def best(self) -> Path | None:
        """The checkpoint with the highest score; None where none was scored."""
        scores = {path: _manifest(path).get("score") for path in self.paths() if (path / MANIFEST).exists()}
        scored = {path: score for path, score in scores.items() if score is not None}
        return max(scored, key=lambda path: scored[path]) if scored else None

    def load(
        self,
        path: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        average: nn.Module | None = None,
    ) -> dict[str, Any]:
        """Puts weights, optimizer state, average and random generators back; returns {"step", "score",
        "state"}."""
        self._join(warn=True)
        load_tensors(path, model, optimizer, average, distributed=self._distributed)
        draws = path / f"rank-{self.rank}.json"
        if draws.exists():  # more ranks than before: the new ones keep their own seeds
            set_generators(json.loads(draws.read_text()))
        return json.loads((path / STATE).read_text())


def load_tensors(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    average: nn.Module | None = None,
    *,
    distributed: bool = False,
) -> None:
    """Reads a checkpoint's tensors into the model (and optimizer, and average where the checkpoint has one),
    whatever number of ranks wrote them."""
    reader = dcp.HuggingFaceStorageReader(str(path))
    metadata: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    saved = {name: tuple(meta.size) for name, meta in metadata.items()}
    wanted = {f"model/{name}": tensor for name, tensor in model_tensors(model).items()}
    check_names(path, {n: s for n, s in saved.items() if n.startswith("model/")}, wanted)
    target: dict[str, Any] = dict(wanted)
    if any(name.startswith("average/") for name in saved):
        target |= average_tensors(model, average)
    if optimizer is not None:
        target |= empty_optimizer_state(path, metadata, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=not distributed)
    if optimizer is not None:
        set_optimizer_state(optimizer, model, target)


def verify(path: Path) -> str | None:
    """None where every file of the checkpoint is there and as written, else what is wrong."""
    try:
        manifest = _manifest(path)
        content = {key: value for key, value in manifest.items() if key != "sha256"}
        if manifest.get("sha256") != hashlib.sha256(_canonical(content)).hexdigest():
            return f"{MANIFEST} is damaged"
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version reads {FORMAT}"
        for name, expected in manifest["files"].items():
            file = path / name
            if not file.exists():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} holds {file.stat().st_size} bytes instead of {expected['bytes']}"
            if _digest(file) != expected["sha256"]:
                return f"{name} has changed (checksum differs)"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {_first_line(error)}"
    return None


def _write_manifest(folder: Path, record: Mapping[str, Any]) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.iterdir())
    }
    content = {"format": FORMAT, "step": record["step"], "score": record["score"], "files": files}
    seal = hashlib.sha256(_canonical(content)).hexdigest()
    write_synced(folder / MANIFEST, json.dumps(content | {"sha256": seal}, indent=1))
    _sync_folder(folder)


def _manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_text())


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """A rename is safe only once the folder that holds it is on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: BaseException) -> str:
    """The cause in one line: of what a disk refused, the system's own words."""
    behind = file_error(error)
    if behind is not None and behind.strerror:
        return f"{behind.strerror} ({behind.filename})" if behind.filename else behind.strerror
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _nothing() -> None:
    pass


def collect(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"model/{name}": tensor.detach() for name, tensor in model_tensors(model).items()}
    names: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, values in optimizer.state.items():
        for key, value in plain_states(values).items():
            if not isinstance(value, Tensor):
                raise CheckpointError(
                    f"optimizer state {key!r} of {names[parameter]} is no tensor: {value!r}"
                )
            # safetensors slices need a dimension; AdamW's step counter has none.
            scalar = value.ndim == 0
            prefix = "scalar" if scalar else "optimizer"
            tensors[f"{prefix}/{key}/{names[parameter]}"] = (
                value.detach().reshape(1) if scalar else value.detach()
            )
    return tensors


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters (tied ones once) and persistent buffers, by name."""
    tensors: dict[str, Tensor] = {n: p.data for n, p in model.named_parameters() if p.requires_grad}
    persistent = model.state_dict().keys()
    return tensors | {n: b for n, b in model.named_buffers() if n in persistent}


def average_tensors(model: nn.Module, average: nn.Module | None) -> dict[str, Tensor]:
    """Those of a moving average that belong to trained weights of the model; empty without one."""
    if average is None:
        return {}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {f"average/{n}": p.data for n, p in average.named_parameters() if n in trained}


def empty_optimizer_state(path: Path, metadata: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    empty: dict[str, Tensor] = {}
    for full, meta in metadata.items():
        kind, _, rest = full.partition("/")
        if kind in WEIGHTS:
            continue
        name = rest.partition("/")[2]
        if name not in parameters:
            raise CheckpointError(f"{path}: holds optimizer state of {name!r}, which the model has not")
        dtype = meta.properties.dtype
        if kind == "scalar":
            empty[full] = torch.zeros(1, dtype=dtype)
        elif tuple(meta.size) != tuple(parameters[name].shape):  # a part of a quantised state
            empty[full] = torch.zeros(meta.size, dtype=dtype, device=parameters[name].device)
        else:  # sharded as its parameter is
            empty[full] = torch.zeros_like(parameters[name].data, dtype=dtype)
    return empty


def set_optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    states: dict[str, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        kind, _, rest = full.partition("/")
        if kind not in WEIGHTS:
            key, _, name = rest.partition("/")
            states.setdefault(name, {})[key] = value.reshape(()) if kind == "scalar" else value
    for name, values in states.items():
        optimizer.state[parameters[name]] = rebuilt_states(values, parameters[name])


def check_names(path: Path, saved: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Tensor]) -> None:
    problems = [f"{name} is missing in it" for name in sorted(wanted.keys() - saved.keys())]
    problems += [f"{name} is unknown to the model" for name in sorted(saved.keys() - wanted.keys())]
    problems += [
        f"{name} is {list(saved[name])}, the model's {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in saved and saved[name] != tuple(tensor.shape)
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{path} is of another model: {'; '.join(problems[:3])}{more}. Use the config the run began with"
        )


def generators() -> dict[str, Any]:
    legacy: Any = np.random.get_state()  # noqa: NPY002 - the global state is what libraries draw from
    name, keys, position, has_gauss, cached = legacy
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
        "cuda": [bytes(s.tolist()).hex() for s in torch.cuda.get_rng_state_all()],
    }


def set_generators(saved: Mapping[str, Any]) -> None:
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = saved["numpy"]
    state = (name, np.array(keys, dtype=np.uint32), position, has_gauss, cached)
    np.random.set_state(state)  # noqa: NPY002
    torch.set_rng_state(_bytes(saved["torch"]))
    if len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_bytes(state) for state in saved["cuda"]])


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
