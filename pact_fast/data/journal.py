"""Finished pieces of long work, one JSON object a line, each on disk before the next is begun.

A process may be killed at any moment: a line that it left half written is cut off at the next start, every
whole one is found again. So nothing that was paid for is asked for twice.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


class Journal:
    """The file `path`; its first line holds the options of the work.

    Args:
        path: made where it is missing.
        options: what the pieces depend on.

    Raises ValueError where the file was written with other options.
    """

    def __init__(self, path: Path, options: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.rows = path, self._read(path)
        self._lock = threading.Lock()
        self._file = path.open("a", encoding="utf-8")
        if not self.rows:
            self._write({"options": dict(options)})
        elif (found := self.rows.pop(0).get("options")) != json.loads(json.dumps(dict(options))):
            self._file.close()
            changed = sorted(k for k in options if (found or {}).get(k) != options[k])
            raise ValueError(
                f"{path}: was written with other options ({', '.join(changed) or 'none known'}); choose "
                "another --out, or delete the file to begin anew"
            )

    @staticmethod
    def _read(path: Path) -> list[dict[str, Any]]:
        if not path.exists():
            return []
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        return [json.loads(line) for line in whole.splitlines()]

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends a finished piece; on disk when this returns."""
        with self._lock:
            self._write(row)
            self.rows.append(dict(row))

    def _write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
