"""One thread owns the engine: requests of any thread wait in its line, weights change between two steps."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from pact_fast.rollout.in_process.engine import InProcessEngine
from pact_fast.rollout.in_process.scheduler import Request


class ServerBusy(RuntimeError):
    """The server is paused or full: the request may be sent again later."""


@dataclass(eq=False)
class Job(Request):
    """A request that somebody waits for."""

    done: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.on_end = lambda _: self.done.set()


class EngineThread:
    """Samples jobs with an engine.

    Args:
        engine: of the served model; nobody else may use it.
        max_waiting: jobs in line before `submit` refuses.
    """

    def __init__(self, engine: InProcessEngine, *, max_waiting: int = 4096) -> None:
        self.engine, self.max_waiting = engine, max_waiting
        engine.prepare()
        self._scheduler = engine.scheduler
        self._line: list[Job] = []
        self._state = threading.Condition()  # guards the line and the flags below
        self._paused = self._closing = False
        self._step_lock = threading.Lock()  # held for a step, or for what happens between two
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def paused(self) -> bool:
        return self._paused

    @property
    def served(self) -> int:
        """Jobs that ran to their end."""
        return self._scheduler.served

    @property
    def version(self) -> str:
        return self._scheduler.version

    @version.setter
    def version(self, name: str) -> None:
        self._scheduler.version = name

    @property
    def running(self) -> list[Request]:
        return self._scheduler.running

    def submit(self, jobs: Sequence[Job]) -> None:
        """Puts jobs in line, all or none. Raises ServerBusy while paused or where the line is full."""
        with self._state:
            if self._paused or self._closing:
                raise ServerBusy("paused for a change of weights" if self._paused else "closing")
            if (waiting := len(self._line) + len(self._scheduler.waiting)) + len(jobs) > self.max_waiting:
                raise ServerBusy(f"{waiting} requests are waiting")
            self._line.extend(jobs)
            self._state.notify_all()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Gives jobs up: nobody waits for them any more."""
        for job in jobs:
            job.cancelled = True

    def pause(self, *, keep: bool, clear_cache: bool) -> None:
        """Stops sampling, returns when no step is running. Rows in flight stay for `resume` or are cut."""
        with self._state:
            self._paused = True
        with self._step_lock:
            if not keep:
                self._abort()
            if clear_cache:
                self._scheduler.table.forget()

    def resume(self) -> None:
        with self._state:
            self._paused = False
            self._state.notify_all()

    def reset_prefix_cache(self) -> None:
        with self._step_lock:
            self._scheduler.table.forget()

    @contextmanager
    def weights(self) -> Iterator[PreTrainedModel]:
        """The model, to be changed while no step runs; only while paused. Rows that were kept go on with the
        new weights, their keys computed anew."""
        with self._step_lock:
            if not self._paused:
                raise ServerBusy("weights change only while paused: POST /pause first")
            yield self.engine.weights.model  # type: ignore[misc]
            self.engine.weights_changed()
            self.engine.prepare()

    def close(self) -> None:
        """Ends all jobs and the thread."""
        with self._state:
            self._closing = True
            self._state.notify_all()
        self._thread.join()
        self._abort()
        self.engine.close()

    def _abort(self) -> None:
        self._take_line()
        self._scheduler.abort_all()

    def _take_line(self) -> None:
        with self._state:
            jobs, self._line = self._line, []
        for job in jobs:
            try:
                self._scheduler.submit([job])
            except ValueError as error:
                job.error, job.finish_reason = str(error), "error"
                job.done.set()

    def _run(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(
                    lambda: self._closing or (not self._paused and (self._line or self._scheduler.busy))
                )
                if self._closing:
                    return
            with self._step_lock:
                # A pause that came between the two locks has the word.
                if not self._paused:
                    self._take_line()
                    try:
                        self._scheduler.step()
                    except Exception as error:  # costs the rows in flight, not the server
                        self._scheduler.fail_all(error)
