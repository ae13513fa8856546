"""SIGTERM ends a run at a place where its state is whole, so that it can be saved and resumed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Preempted(BaseException):
    """The run was asked to stop and has been saved. No Exception: nothing on the way may swallow it."""


class StopSignal:
    """Listens for SIGTERM between `with` and its end.

    `requested` is looked at where the state is whole: after a step. Long phases that change nothing that is
    saved (rollouts) run inside `interruptible()` and are left at once.
    """

    def __init__(self, *, immediate: bool = True) -> None:
        """immediate=False: `interruptible` is never left early (ranks have to stop at the same place)."""
        self.requested = False
        self.immediate = immediate
        self._interruptible = False
        self._previous: Any = None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raises Preempted out of its body as soon as the signal comes."""
        self._interruptible = self.immediate
        try:
            if self.requested and self.immediate:
                raise Preempted
            yield
        finally:
            self._interruptible = False

    def _receive(self, signum: int, frame: Any) -> None:
        self.requested = True
        if self._interruptible:
            raise Preempted
