"""SIGTERM and Ctrl-C end a run at a place where its state is whole, so that it can be saved and resumed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class Preempted(BaseException):
    """The run was asked to stop and has been saved. No Exception: nothing on the way may swallow it."""


class StopSignal:
    """Listens for SIGTERM and SIGINT between `with` and its end; may be entered again inside.

    `requested` is looked at where the state is whole: after a step. Long phases that change nothing that is
    saved (rollouts) run inside `interruptible()` and are left at once. A second Ctrl-C waits for nothing: it
    is the KeyboardInterrupt that it always was.
    """

    def __init__(self) -> None:
        self.requested = False
        self.by = ""  # the name of what asked: "SIGTERM" or "Ctrl-C"
        self.immediate = True  # False: `interruptible` is never left early
        self._interruptible = False
        self._depth = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in NAMES}
        return self

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, previous in self._previous.items():
                signal.signal(number, previous)
            self._previous = {}

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raises Preempted out of its body as soon as the signal comes."""
        self._interruptible = self.immediate
        try:
            if self.requested and self.immediate:
                raise Preempted(self.by)
            yield
        finally:
            self._interruptible = False

    def _receive(self, signum: int, frame: Any) -> None:
        if signum == signal.SIGINT and self.by == NAMES[signal.SIGINT]:
            raise KeyboardInterrupt
        self.requested, self.by = True, NAMES[signal.Signals(signum)]
        if self._interruptible:
            raise Preempted(self.by)
        if signum == signal.SIGINT:
            print("\nstopping after this step; Ctrl-C again stops at once", flush=True)
