"""Tool calls in worker processes, batched, with a wall-time limit per call.

`Sandbox.run(calls)` spreads the calls over the workers, pipelines them, and gives one `CallResult` per call
in order. A worker that hangs or dies is replaced; the call it was at gets an error, the calls behind it are
run elsewhere. A worker that was killed from outside loses nothing: the call it was at is run once more.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # so that a set has one order in every worker
MAX_PROGRAMS = 2048  # per worker, then it starts over
MAX_RESPONSE = 4 << 20  # bytes
MAX_FILE = 4 << 20  # bytes a tool may write to one file of its scratch folder
START_LIMIT, STOP_LIMIT, END_LIMIT = 30.0, 5.0, 2.0  # seconds
START_ATTEMPTS = 3  # of a worker that is killed before it has said a word
KILLED = (-signal.SIGKILL, signal.SIGKILL)  # exit statuses: the outer process was killed, or the inner one


@dataclass(frozen=True)
class Program:
    """Python source that defines tools; `constants` become globals. fresh: a new namespace for every call."""

    source: str
    constants: Mapping[str, Any] = field(default_factory=dict)
    fresh: bool = True

    @cached_property
    def key(self) -> str:
        text = json.dumps([self.source, self.constants, self.fresh], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class SandboxCall:
    program: Program
    function: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class CallResult:
    """kind: "ok" (value holds what the tool returned), "error" (the tool raised), "timeout" or "died"."""

    kind: str
    value: Any = None
    error: str = ""


class _KilledAtStart(RuntimeError):
    pass


class _Worker:
    """One worker process and the frames on their way to and from it."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        command = [sys.executable, "-S", "-s", "-P", str(WORKER), json.dumps(options)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT, cwd="/"
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.stdin, False)
        os.set_blocking(self.stdout, False)
        self.programs: set[str] = set()
        self.outgoing = bytearray()
        self.incoming = bytearray()
        self.pending: deque[int] = deque()
        self.deadline = float("inf")
        self.protections: dict[str, Any] = self._hello()["protections"]

    def _hello(self) -> dict[str, Any]:
        """The worker's first frame, sent once it has shut itself in."""
        deadline = time.monotonic() + START_LIMIT
        while time.monotonic() < deadline:
            if select.select([self.stdout], [], [], START_LIMIT)[0]:
                try:
                    if frames := self.read():
                        return frames[0]
                except EOFError:
                    break
        self.kill()
        kind = _KilledAtStart if self.process.returncode in KILLED else RuntimeError
        raise kind(
            f"a sandbox worker did not start (exit status {self.process.returncode}): see its stderr above"
        )

    def submit(self, index: int, call: SandboxCall) -> None:
        if call.program.key not in self.programs:
            if len(self.programs) >= MAX_PROGRAMS:
                self._send({"forget": True})
                self.programs.clear()
            program = call.program
            self._send(
                {
                    "program": program.key,
                    "source": program.source,
                    "constants": dict(program.constants),
                    "fresh": program.fresh,
                }
            )
            self.programs.add(program.key)
        self._send(
            {
                "id": index,
                "program": call.program.key,
                "function": call.function,
                "arguments": dict(call.arguments),
            }
        )
        self.pending.append(index)

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode()
        self.outgoing += struct.pack("<I", len(data)) + data

    def write(self) -> None:
        written = os.write(self.stdin, memoryview(self.outgoing)[: 1 << 16])
        del self.outgoing[:written]

    def read(self) -> list[dict[str, Any]]:
        """The complete frames that have arrived. Raises EOFError when the worker is gone, ValueError on
        garbage."""
        chunk = os.read(self.stdout, 1 << 16)
        if not chunk:
            raise EOFError
        self.incoming += chunk
        frames = []
        while len(self.incoming) >= 4:
            size = struct.unpack_from("<I", self.incoming)[0]
            if size > MAX_RESPONSE:
                raise ValueError("response too long")
            if len(self.incoming) < 4 + size:
                break
            frames.append(json.loads(self.incoming[4 : 4 + size]))
            del self.incoming[: 4 + size]
        return frames

    def kill(self) -> None:
        """Lets go of the pipe: the worker's outer process ends the inner one, with all that it started."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class Sandbox:
    """A pool of worker processes for tool code, started when first used.

    workers: processes. time_limit: wall seconds per call; CPU seconds are limited to the same, rounded up.
    memory_mb: address space of a worker. isolate=False leaves the namespaces out (limits and system-call
    filter stay). packages: folders the tools may import from, read-only. `protections` tells what holds on
    this machine; use as a context manager, or `close()`.
    """

    def __init__(
        self,
        *,
        workers: int = 1,
        time_limit: float = 5.0,
        memory_mb: int = 512,
        isolate: bool = True,
        packages: Sequence[str] = (),
    ) -> None:
        self.time_limit = time_limit
        self.count = workers
        self.workers: list[_Worker] = []
        self.restarts = 0  # workers replaced so far
        self._again: set[int] = set()  # calls of this batch that lost a worker through no fault of theirs
        self._options: dict[str, Any] = {
            "memory": memory_mb << 20,
            "file_bytes": MAX_FILE,
            "cpu_seconds": time_limit,
            "isolate": isolate,
            "packages": list(dict.fromkeys(packages)),
        }
        weakref.finalize(self, _close, self.workers, self._options)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def protections(self) -> dict[str, Any]:
        """{name: True, or the reason why not} for namespaces, root, limits, capabilities, seccomp."""
        self._fill()
        return dict(self.workers[0].protections)

    def _fill(self) -> None:
        if "root" not in self._options:  # a mount point of the workers; it stays empty
            self._options["root"] = tempfile.mkdtemp(prefix="pact-sandbox-")
        while len(self.workers) < self.count:
            self.workers.append(self._start())

    def _start(self) -> _Worker:
        for _ in range(START_ATTEMPTS - 1):
            with contextlib.suppress(_KilledAtStart):
                return _Worker(self._options)
        return _Worker(self._options)

    def run(self, calls: Sequence[SandboxCall]) -> list[CallResult]:
        results: dict[int, CallResult] = {}
        todo = deque(range(len(calls)))
        self._again.clear()
        while len(results) < len(calls):
            self._fill()
            for turn, index in enumerate(todo):
                self.workers[turn % len(self.workers)].submit(index, calls[index])
            todo.clear()
            self._exchange(results, todo)
        return [results[i] for i in range(len(calls))]

    def _exchange(self, results: dict[int, CallResult], todo: deque[int]) -> None:
        """Moves frames until no worker has a call pending; calls of dead workers go back to `todo`."""
        for worker in self.workers:
            worker.deadline = time.monotonic() + self.time_limit
        while busy := [w for w in self.workers if w.pending]:
            readers = {w.stdout: w for w in busy}
            writers = {w.stdin: w for w in busy if w.outgoing}
            wait = max(0.0, min(w.deadline for w in busy) - time.monotonic())
            readable, writable, _ = select.select(list(readers), list(writers), [], wait)
            for fd in writable:
                self._guard(writers[fd], writers[fd].write, results, todo)
            for fd in readable:
                self._guard(readers[fd], lambda w=readers[fd]: self._collect(w, results, todo), results, todo)
            now = time.monotonic()
            for worker in busy:
                if worker in self.workers and worker.pending and now > worker.deadline:
                    self._fail(
                        worker, CallResult("timeout", error=f"no result in {self.time_limit:g} s"), results
                    )
                    self._replace(worker, todo)

    def _collect(self, worker: _Worker, results: dict[int, CallResult], todo: deque[int]) -> None:
        for frame in worker.read():
            index = worker.pending.popleft()
            if frame["id"] != index:
                raise ValueError("answer to another call")
            results[index] = CallResult(frame["kind"], frame.get("value"), frame.get("error", ""))
            worker.deadline = time.monotonic() + self.time_limit
            if frame.get("recycle"):
                self._replace(worker, todo)
                return

    def _guard(self, worker: _Worker, action, results, todo) -> None:
        if worker not in self.workers:
            return
        try:
            action()
        except (OSError, EOFError, ValueError, TypeError, LookupError) as error:  # gone, or no longer sane
            # The outer process must see how the inner one ended before it sees our end of the pipe close.
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(timeout=END_LIMIT)
            worker.kill()
            if not self._run_again(worker):
                died = CallResult("died", error=f"the tool ended its process ({type(error).__name__})")
                self._fail(worker, died, results)
            self._replace(worker, todo)

    def _run_again(self, worker: _Worker) -> bool:
        """Whether the call that a dead worker was at deserves another try; each gets one."""
        if worker.process.returncode not in KILLED or not worker.pending:
            return False
        first = worker.pending[0] not in self._again
        self._again.add(worker.pending[0])
        return first

    @staticmethod
    def _fail(worker: _Worker, result: CallResult, results: dict[int, CallResult]) -> None:
        """Books `result` for the call the worker was at."""
        if worker.pending:
            results[worker.pending.popleft()] = result

    def _replace(self, worker: _Worker, todo: deque[int]) -> None:
        todo.extend(worker.pending)
        self.workers.remove(worker)
        self.restarts += 1
        worker.kill()

    def close(self) -> None:
        _close(self.workers, self._options)


def _close(workers: list[_Worker], options: dict[str, Any]) -> None:
    while workers:
        workers.pop().kill()
    if "root" in options:
        with contextlib.suppress(OSError):
            os.rmdir(options.pop("root"))
