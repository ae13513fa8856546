"""One run at a time in a run folder: two would overwrite each other's checkpoints and curves.

`run_dir/.lock` names the owner, and is locked (flock) by its main rank as long as it lives: the system lets
go of it when that process ends, however it ends, so a lock that can be taken is stale whatever its file says.
Where the file names another machine, whose locks a network file system may not show here, the folder counts
as in use, and the message says what to delete once that process is known to be gone.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pact_fast.distributed import World
from pact_fast.files import writing

LOCK = ".lock"


class RunInUse(RuntimeError):
    """Another process trains in this run folder; the message says which."""


class RunLock:
    """Holds a run folder between `with` and its end, for all ranks of a run. RunInUse on every rank where it
    is taken."""

    def __init__(self, run_dir: Path, world: World) -> None:
        self.path, self.world = run_dir / LOCK, world
        self._file: int | None = None

    def __enter__(self) -> RunLock:
        problem = self._take() if self.world.main else None
        if told := next(filter(None, self.world.gather(problem)), None):
            raise RunInUse(told)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None
            with suppress(OSError):  # a run that was refused leaves no empty folder
                self.path.parent.rmdir()

    def _take(self) -> str | None:
        """Takes the lock; else what is in the way."""
        while True:
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            owner = _read(self.path)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                return self._in_use(owner, "wait until it has ended, or stop it")
            if not _same_file(file, self.path):  # its owner has just left and deleted it
                os.close(file)
                continue
            here = socket.gethostname()
            if owner and owner.get("host") != here:
                os.close(file)
                return self._in_use(owner, f"if that process is gone, delete {self.path}")
            me = {"pid": os.getpid(), "host": here, "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            with writing(self.path):
                os.ftruncate(file, 0)
                os.pwrite(file, json.dumps(me).encode(), 0)
            self._file = file
            return None

    def _in_use(self, owner: dict[str, Any], way_out: str) -> str:
        told = "another process"
        if owner:
            told = f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"
        return f"{self.path.parent} is in use by {told}: {way_out}, or give this run a run.name of its own"


def _read(path: Path) -> dict[str, Any]:
    """The owner that the file names; empty where it names none (yet)."""
    try:
        owner = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _same_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
