"""Writing files so that a failure says which: whole or not at all, synced, errors with the path in them."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, an error of the file system names `path` where it names no file itself, and is an OSError also
    where a library reports it as text alone."""
    try:
        yield
    except Exception as error:
        cause = file_error(error)
        if cause is None or (cause is error and cause.filename is not None):
            raise
        raise OSError(cause.errno, cause.strerror, str(cause.filename or path)) from error


def file_error(error: BaseException) -> OSError | None:
    """The error of the file system behind `error`: itself, what it was raised from, what it gathers from
    ranks (torch.distributed.checkpoint), or one that a library wrote down as text (safetensors)."""
    todo, seen = [error], set[int]()
    while todo:
        one = todo.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, OSError) and one.errno is not None:
            return one
        for number in (*FULL, *FORBIDDEN):
            if os.strerror(number) in str(one):
                return OSError(number, os.strerror(number))
        gathered = getattr(one, "failures", None)
        if isinstance(gathered, dict):
            todo += [failure[0] if isinstance(failure, tuple) else failure for failure in gathered.values()]
        todo += [inner for inner in (one.__cause__, one.__context__) if inner is not None]
    return None


def one_line(error: OSError) -> str:
    """What went wrong with which file, and the way out."""
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if error.errno in FULL:
        return f"{what}: free some space"
    return f"{what}: choose another folder or change its permissions" if error.errno in FORBIDDEN else what


def write_synced(path: Path, text: str) -> None:
    """Returns when the text is on disk."""
    with writing(path), open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    beside = path.with_name(f".{path.name}.tmp")
    write_synced(beside, json.dumps(value, indent=1))
    beside.replace(path)
