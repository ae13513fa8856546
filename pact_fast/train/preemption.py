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
    """Listens for SIGTERM between `with` and its end; may be entered again inside.

    `requested` is looked at where the state is whole: after a step. Long phases that change nothing that is
    saved (rollouts) run inside `interruptible()` and are left at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self.immediate = True  # False: `interruptible` is never left early
        self._interruptible = False
        self._depth = 0
        self._previous: Any = None

    def __enter__(self) -> StopSignal:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if self._depth == 0 and self._previous is not None:
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
