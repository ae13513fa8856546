"""Tool calls in worker processes, batched, with a wall-time limit per call.

`Sandbox.run(calls)` spreads the calls over the workers, pipelines them, and gives one `CallResult` per call
in order. Every call runs in a process of its own (worker.py), so a call that hangs, dies or meddles with its
process costs its own result alone. A worker that dies, or says what no worker says, is replaced: the calls
behind are run elsewhere. What was killed from outside loses nothing: the call it was at is run once more.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
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

from pact_fast.data.reading import check_bounds, clean_text, clean_value, read_json

WORKER = Path(__file__).with_name("worker.py")
ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # so that a set has one order in every worker
MAX_PROGRAMS = 2048  # per worker, then it starts over
MAX_RESPONSE = 4 << 20  # bytes
MAX_FILE = 4 << 20  # bytes a tool may write to one file of its scratch folder
MAX_LINE = 1 << 16  # bytes of a frame's first line
START_LIMIT, STOP_LIMIT, END_LIMIT = 30.0, 5.0, 2.0  # seconds
GRACE = 2.0  # seconds past a call's limit after which the worker itself is taken to hang
KINDS = ("ok", "error", "timeout", "died", "killed")  # of a worker's answers
WALLS = ("namespaces", "root", "seccomp", "capabilities")  # what untrusted source needs
START_ATTEMPTS = 3  # of a worker that is killed before it has said a word
KILLED = (-signal.SIGKILL, signal.SIGKILL)  # exit statuses: the outer process was killed, or the inner one


class SandboxTooWeak(RuntimeError):
    """The machine cannot keep untrusted source from the user's files and processes."""


@dataclass(frozen=True)
class Program:
    """Python source that defines tools; `constants` become globals.

    fresh: every call gets a process of its own, which is what a record's source needs: it is not trusted, and
    no call sees what another did. False is for source of this package whose calls are meant to share state:
    they share one process per worker and source, and a namespace per program.
    """

    source: str
    constants: Mapping[str, Any] = field(default_factory=dict)
    fresh: bool = True

    @cached_property
    def key(self) -> str:
        text = json.dumps([self.source, self.constants, self.fresh], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def group(self) -> str:
        """Of the programs that share a process."""
        return hashlib.sha256(self.source.encode(errors="surrogatepass")).hexdigest()


@dataclass(frozen=True)
class SandboxCall:
    program: Program
    function: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class CallResult:
    """kind: "ok" (value holds what the tool returned), "error" (the tool raised), "timeout" or "died".

    value is JSON as data/reading.py bounds it, its text free of halves of surrogate pairs.
    """

    kind: str
    value: Any = None
    error: str = ""


@dataclass(frozen=True)
class _Answer:
    """A worker's answer to the call it was at, checked: whose it is, and of what kind."""

    kind: str
    lost: bool
    body: bytes

    def result(self) -> CallResult:
        """What the tool gave; its bytes are read here and nowhere before."""
        text = self.body.decode(errors="replace")
        if self.kind != "ok":
            return CallResult("died" if self.kind == "killed" else self.kind, error=clean_text(text))
        try:
            return CallResult("ok", clean_value(read_json(text)))
        except ValueError as error:
            return CallResult("error", error=f"ValueError: the tool's result cannot be read: {error}"[:300])


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
        self.pending: deque[tuple[int, str]] = deque()  # (call, tag) in the order of the answers
        self.deadline = float("inf")
        self.protections: dict[str, Any] = self._hello()["protections"]

    def _hello(self) -> dict[str, Any]:
        """The worker's first frame, sent once it has shut itself in."""
        deadline = time.monotonic() + START_LIMIT
        while time.monotonic() < deadline:
            if select.select([self.stdout], [], [], START_LIMIT)[0]:
                try:
                    if frames := self.read():
                        return json.loads(frames[0])
                except EOFError:
                    break
        self.kill()
        kind = _KilledAtStart if self.process.returncode in KILLED else RuntimeError
        raise kind(
            f"a sandbox worker did not start (exit status {self.process.returncode}): see its stderr above"
        )

    def submit(self, index: int, call: SandboxCall) -> None:
        """Queues a call. Raises ValueError, TypeError or RecursionError where it is no JSON."""
        arguments = json.dumps(dict(call.arguments))
        if call.program.key not in self.programs:
            constants = json.dumps(dict(call.program.constants))
            if len(self.programs) >= MAX_PROGRAMS:
                self._send({"forget": True})
                self.programs.clear()
            program = call.program
            head = {"program": program.key, "fresh": program.fresh, "group": program.group}
            self._send(head | {"source": program.source}, constants)
            self.programs.add(program.key)
        tag = secrets.token_hex(8)
        head = {"id": index, "tag": tag, "program": call.program.key, "function": call.function}
        self._send(head, arguments)
        self.pending.append((index, tag))

    def _send(self, head: dict[str, Any], body: str = "") -> None:
        data = (json.dumps(head) + "\n" + body).encode()
        self.outgoing += struct.pack("<I", len(data)) + data

    def write(self) -> None:
        written = os.write(self.stdin, memoryview(self.outgoing)[: 1 << 16])
        del self.outgoing[:written]

    def read(self) -> list[bytes]:
        """The complete frames that have arrived. Raises EOFError when the worker is gone, ValueError where
        one is too long."""
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
            frames.append(bytes(self.incoming[4 : 4 + size]))
            del self.incoming[: 4 + size]
        return frames

    def answer(self, frame: bytes) -> _Answer:
        """`frame` as the answer to the call the worker is at. Raises ValueError where it is not that."""
        line, _, body = frame.partition(b"\n")
        if not self.pending or len(line) > MAX_LINE:
            raise ValueError("an answer to no call")
        head = read_json(line.decode())
        index, tag = self.pending[0]
        if not isinstance(head, dict) or set(head) != {"id", "tag", "kind", "lost"}:
            raise ValueError("not an answer")
        if type(head["id"]) is not int or head["id"] != index or head["tag"] != tag:
            raise ValueError("answer to another call")
        if head["kind"] not in KINDS or not isinstance(head["lost"], bool):
            raise ValueError("an answer of no kind")
        return _Answer(head["kind"], head["lost"], body)

    def kill(self) -> None:
        """Lets go of the pipe: the worker's outer process ends the inner one, with all that it started."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(timeout=STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Sandbox:
    """A pool of worker processes for tool code, started when first used.

    workers: processes that take calls. time_limit: wall seconds per call; CPU seconds are limited to the
    same, rounded up. memory_mb: address space of a call. packages: folders the tools may import from,
    read-only. `protections` tells what holds on this machine. Where untrusted source (`Program.fresh`) could
    read the user's files and the trainer's environment, `run` raises SandboxTooWeak, unless `weak` allows it;
    isolate=False leaves the namespaces out (limits and system-call filter stay) and means the same. Use as a
    context manager, or `close()`.
    """

    def __init__(
        self,
        *,
        workers: int = 1,
        time_limit: float = 5.0,
        memory_mb: int = 512,
        isolate: bool = True,
        packages: Sequence[str] = (),
        weak: bool = False,
    ) -> None:
        self.time_limit, self.weak = time_limit, weak or not isolate
        self.count = workers
        self.workers: list[_Worker] = []
        self.restarts = 0  # processes lost so far: to calls that hung, died, left threads or no memory
        self._again: set[int] = set()  # calls of this batch that lost a worker through no fault of theirs
        self._options: dict[str, Any] = {
            "memory": memory_mb << 20,
            "file_bytes": MAX_FILE,
            "cpu_seconds": time_limit,
            "time_limit": time_limit,
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

    def admit_untrusted(self) -> None:
        """Raises SandboxTooWeak where `run` would refuse source that comes from records."""
        missing = [name for name in WALLS if self.protections[name] is not True]
        if missing and not self.weak:
            reasons = ", ".join(f"{name} ({self.protections[name]})" for name in missing)
            raise SandboxTooWeak(
                "this machine cannot shut tool code in: it could read your files, and the environment of "
                f"this process with the secrets in it. Missing: {reasons}. Allow user namespaces (sysctl "
                "user.max_user_namespaces, in a container --security-opt seccomp=unconfined), or accept "
                "the risk with --env.settings.sandbox weak; `pact-fast doctor` shows what holds"
            )

    def run(self, calls: Sequence[SandboxCall]) -> list[CallResult]:
        results: dict[int, CallResult] = {}
        todo = deque(range(len(calls)))
        self._again.clear()
        if any(call.program.fresh for call in calls):
            self.admit_untrusted()
        while len(results) < len(calls):
            self._fill()
            for turn, index in enumerate(todo):
                self._submit(self.workers[turn % len(self.workers)], index, calls[index], results)
            todo.clear()
            self._exchange(results, todo)
        return [results[i] for i in range(len(calls))]

    def _submit(self, worker: _Worker, index: int, call: SandboxCall, results: dict[int, CallResult]) -> None:
        try:
            if call.program.fresh:  # what a model wrote, in a process that a model's text could break
                check_bounds(call.arguments)
            worker.submit(index, call)
        except (ValueError, TypeError, RecursionError) as error:
            message = f"{type(error).__name__}: the call cannot be passed on: {error}"
            results[index] = CallResult("error", error=message[:300])

    def _exchange(self, results: dict[int, CallResult], todo: deque[int]) -> None:
        """Moves frames until no worker has a call pending; calls of dead workers go back to `todo`."""
        for worker in self.workers:
            worker.deadline = time.monotonic() + self.time_limit + GRACE
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
            answer = worker.answer(frame)
            index, _ = worker.pending.popleft()
            self.restarts += answer.lost
            if answer.kind == "killed" and self._first_loss(index):
                todo.append(index)
            else:
                results[index] = answer.result()
            worker.deadline = time.monotonic() + self.time_limit + GRACE

    def _guard(self, worker: _Worker, action, results, todo) -> None:
        if worker not in self.workers:
            return
        try:
            action()
        except (OSError, EOFError, ValueError, TypeError, LookupError) as error:  # gone, or no longer sane
            # The outer process must see how the inner one ended before it sees our end of the pipe close.
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(timeout=END_LIMIT)
            outside = worker.process.returncode in KILLED  # before we kill it ourselves
            worker.kill()
            if not (outside and worker.pending and self._first_loss(worker.pending[0][0])):
                died = CallResult("died", error=f"the tool ended its process ({type(error).__name__})")
                self._fail(worker, died, results)
            self._replace(worker, todo)

    def _first_loss(self, index: int) -> bool:
        """Whether a call that was killed from outside gets its other try; each gets one."""
        first = index not in self._again
        self._again.add(index)
        return first

    @staticmethod
    def _fail(worker: _Worker, result: CallResult, results: dict[int, CallResult]) -> None:
        """Books `result` for the call the worker was at."""
        if worker.pending:
            results[worker.pending.popleft()[0]] = result

    def _replace(self, worker: _Worker, todo: deque[int]) -> None:
        todo.extend(index for index, _ in worker.pending)
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
