"""The process that runs tool code. Started by path with `python -S -s -P`: standard library only, no package.

Three generations. The outer process enters the namespaces, starts the worker, and ends it when the trainer
lets go of the pipe or dies. The worker shuts itself in (protect.py) and never runs a line of a tool: for
every call it starts a process, a copy of its clean self, which runs the call, says what came out, and is
ended; the scratch folder is made anew where the call left something in it. So no call sees what another
did. Programs that are declared to keep state (`fresh` false: source of this package, never a record's) share
one process per source instead, which lives until a call of it hangs, dies, or leaves threads or no memory.

Frames: 4 bytes of length, one line of JSON, a line break, and a body. From the trainer:

    {"program", "fresh", "group", "source"} + constants as JSON    stores a program
    {"forget": true}                                               drops all programs
    {"id", "tag", "program", "function"} + arguments as JSON       runs a call

To the trainer: {"protections": {name: true | reason}} once, then per call {"id", "tag", "kind", "lost"} and
the result: JSON for "ok", else a message. lost: the call's process had to be ended, or kept what it should
not.
Only the worker holds the trainer's pipes. A call's process has one pipe, to the worker, which passes on what
comes through it, unread, as the result of that call and no other.
"""

import _thread
import contextlib
import gc
import importlib.util
import json
import os
import select
import signal
import struct
import sys
import time

MAX_ERROR = 300  # characters of an error message
MAX_RESULT = 1 << 20  # bytes of a result as JSON
MAX_KEPT = 4  # processes of programs that keep state
PRELOADED = ("calendar", "datetime", "math", "re")  # what tools import most; else each call would anew
OK, ERROR, OUT_OF_MEMORY = 0, 1, 2  # what a call's process says first; + LEFT where threads outlive the call
LEFT = 4


def load_protect():
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "protect.py")
    spec = importlib.util.spec_from_file_location("sandbox_protect", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_exactly(fd, count):
    chunks = []
    while count:
        chunk = os.read(fd, min(count, 1 << 20))
        if not chunk:
            os._exit(0)  # the other side is gone
        chunks.append(chunk)
        count -= len(chunk)
    return b"".join(chunks)


def read_frame(fd):
    """(header, body) of the next frame."""
    data = read_exactly(fd, struct.unpack("<I", read_exactly(fd, 4))[0])
    line, _, body = data.partition(b"\n")
    return json.loads(line), body


def write_all(fd, data):
    while data:
        data = data[os.write(fd, data) :]


def write_frame(fd, header, body=b""):
    data = json.dumps(header).encode() + b"\n" + body
    write_all(fd, struct.pack("<I", len(data)) + data)


# A call's own process


def describe(error):
    try:
        text = f"{type(error).__name__}: {error}"[:MAX_ERROR]
        return text.encode(errors="replace").decode()
    except BaseException:  # its own __str__ fails
        return type(error).__name__


def build(program):
    namespace = {"__name__": "tool"}
    exec(program["code"], namespace)
    if program["constants"] != b"{}":
        namespace.update(json.loads(program["constants"]))
    return namespace


def answer(program, function, arguments):
    """(what came out, its bytes) of one call."""
    try:
        if program["error"] is not None:
            return ERROR, program["error"].encode()
        if program["namespace"] is None:
            program["namespace"] = build(program)
        value = program["namespace"][function](**json.loads(arguments))
        data = json.dumps(value).encode()
        if len(data) > MAX_RESULT:
            raise ValueError(f"the result is {len(data):,} bytes of JSON; at most {MAX_RESULT:,} are allowed")
        return OK, data
    except MemoryError:
        return OUT_OF_MEMORY, b"MemoryError"
    except BaseException as error:  # a tool that exits or is interrupted fails like any other
        return ERROR, describe(error).encode()


def say(fd, kind, data):
    write_all(fd, struct.pack("<IB", len(data), kind) + data)


def left():
    return LEFT if _thread._count() else 0


def keep_only(*files):
    """Closes every file of this process but `files`, which become 3, 4, ...: none of them may stand on a
    place of another. stdin, stdout and stderr become /dev/null, opened anew."""
    for place, fd in enumerate(files, 3):
        if fd != place:
            os.dup2(fd, place)
    os.closerange(3 + len(files), 1024)
    with contextlib.suppress(
        PermissionError
    ):  # where no file may be opened for writing they are that already
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)


def run_once(shut_in, program, function, arguments, out):
    """The life of a call's process."""
    keep_only(out)
    shut_in()
    kind, data = answer(program, function, arguments)
    say(3, kind | left(), data)


def run_kept(shut_in, renew_cpu, requests, out):
    """The life of a process that keeps the state of its programs."""
    keep_only(requests, out)
    shut_in()
    programs = {}
    while True:
        header, body = read_frame(3)
        if "source" in header:
            programs[header["program"]] = store(header, body)
            continue
        renew_cpu()
        program = programs[header["program"]]
        compile_once(program)
        kind, data = answer(program, header["function"], body)
        say(4, kind | left(), data)


# The worker


def store(header, body):
    return header | {"constants": body, "code": None, "error": None, "namespace": None}


def compile_once(program):
    """Compiles a program; compiling runs none of its code."""
    if program["code"] is None and program["error"] is None:
        try:
            program["code"] = compile(program["source"], "tool.py", "exec", dont_inherit=True)
        except MemoryError:
            raise
        except BaseException as error:
            program["error"] = describe(error)


def out_of_cpu_time(signum, frame):
    raise TimeoutError("CPU time limit")


class Child:
    """A process of this worker, the pipe its results come through and, of a kept one, the pipe to it."""

    def __init__(self, start, end, live, keep):
        """start, end: how a process begins, and is ended. live(out) or, where `keep`, live(requests, out):
        what it does; it ends with it."""
        self.kill = end
        self.results, out = os.pipe()
        requests, self.requests = os.pipe() if keep else (None, None)
        self.pid = start()
        if self.pid == 0:
            try:
                gc.enable()
                live(requests, out) if keep else live(out)
            finally:
                os._exit(0)
        os.close(out)
        if keep:
            os.close(requests)
        self.programs = set()

    def result(self, seconds):
        """(kind, body, lost) of the call it is at. lost: the process is not to be used again."""
        deadline = time.monotonic() + seconds
        try:
            size, kind = struct.unpack("<IB", self.read(5, deadline))
            if size > MAX_RESULT or kind & ~LEFT not in (OK, ERROR, OUT_OF_MEMORY):
                return "died", b"the tool broke its process", True
            body = self.read(size, deadline)
        except TimeoutError:
            return "timeout", f"no result in {seconds:g} s".encode(), True
        except EOFError:
            return self.end()
        lost = bool(kind & LEFT) or kind & ~LEFT == OUT_OF_MEMORY
        return "ok" if kind & ~LEFT == OK else "error", body, lost

    def read(self, count, deadline):
        poller = select.poll()
        poller.register(self.results, select.POLLIN)
        data = b""
        while len(data) < count:
            wait = deadline - time.monotonic()
            if wait <= 0 or not poller.poll(wait * 1000 + 1):
                raise TimeoutError
            chunk = os.read(self.results, min(count - len(data), 1 << 20))
            if not chunk:
                raise EOFError
            data += chunk
        return data

    def quiet(self):
        """Whether it waits for a call: has neither ended nor said something nobody asked for."""
        return not select.select([self.results], [], [], 0)[0]

    def end(self):
        """Ends the process, if it has not ended, and says how it did as a result."""
        self.close()
        return ("killed" if self.signal == signal.SIGKILL else "died"), b"the tool ended its process", True

    def close(self, kill=False):
        os.close(self.results)
        if self.requests is not None:
            os.close(self.requests)
        if kill:
            self.kill(self.pid)
        status = os.waitpid(self.pid, 0)[1]
        self.signal = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        self.pid = None


class Worker:
    """Runs the calls that come through `requests`, one after the other."""

    def __init__(self, protect, requests, responses, options):
        self.protect, self.requests, self.responses = protect, requests, responses
        self.options = options
        self.report = {}
        self.alone = False  # whether a call has a pid namespace to itself
        self.programs, self.kept = {}, {}
        self.scratch = None

    def shut_in(self):
        self.protect.shut_call_in(self.report, self.alone, self.options["cpu_seconds"])

    def child(self, live, *, keep=False):
        protect = self.protect
        return Child(protect.start_alone if self.alone else protect.start_beside, protect.end, live, keep)

    def renew_cpu(self):
        self.protect.limit_cpu(self.options["cpu_seconds"])

    def serve(self):
        if not self.alone and self.report["seccomp"] is True:
            self.protect.call_filter()  # made once, here
        gc.collect()
        gc.freeze()  # a collection in a call's process would copy every page
        gc.disable()
        if self.report["root"] is True:
            self.scratch = self.protect.scratch_state()
        while True:
            header, body = read_frame(self.requests)
            if header.get("forget"):
                self.programs.clear()
                self.drop_kept()
            elif "source" in header:
                self.programs[header["program"]] = store(header, body)
            else:
                kind, data, lost = self.call(header, body)
                answered = {"id": header["id"], "tag": header["tag"], "kind": kind, "lost": lost}
                write_frame(self.responses, answered, data)

    def call(self, header, arguments):
        program = self.programs[header["program"]]
        if not program["fresh"]:
            outcome = self.call_kept(program, header, arguments)
        else:
            self.drop_kept()
            outcome = self.call_fresh(program, header, arguments)
        self.clean_scratch()
        return outcome

    def call_fresh(self, program, header, arguments):
        compile_once(program)
        child = self.child(lambda out: run_once(self.shut_in, program, header["function"], arguments, out))
        outcome = child.result(self.options["time_limit"])
        if child.pid is not None:
            child.close(kill=True)
        return outcome

    def call_kept(self, program, header, arguments):
        child = self.kept.pop(program["group"], None)
        if child is not None and not child.quiet():
            child.close(kill=True)
            child = None
        if child is None:
            if len(self.kept) >= MAX_KEPT:
                self.kept.pop(next(iter(self.kept))).close(kill=True)
            child = self.child(
                lambda requests, out: run_kept(self.shut_in, self.renew_cpu, requests, out), keep=True
            )
        try:
            if program["program"] not in child.programs:
                known = {name: program[name] for name in ("program", "fresh", "group", "source")}
                write_frame(child.requests, known, program["constants"])
                child.programs.add(program["program"])
            write_frame(child.requests, header, arguments)
            outcome = child.result(self.options["time_limit"])
        except BrokenPipeError:
            outcome = child.end()
        if not outcome[2]:
            self.kept[program["group"]] = child  # the last used stands last
        elif child.pid is not None:
            child.close(kill=True)
        return outcome

    def drop_kept(self):
        """Ends the processes that keep state: they share no scratch folder with a record's tools."""
        while self.kept:
            self.kept.popitem()[1].close(kill=True)
        self.clean_scratch()

    def clean_scratch(self):
        if self.scratch is None or self.kept:
            return
        if self.protect.scratch_state() != self.scratch:
            self.protect.renew_scratch()
            self.scratch = self.protect.scratch_state()

    def probe(self):
        """What of a call's own protections holds: a process tries them, before any tool runs."""
        wanted = dict(self.report)

        def live(out):
            keep_only(out)
            found = {}
            for name in ("capabilities", "seccomp"):
                one = {"root": None, "capabilities": None, "seccomp": None, name: wanted[name]}
                cpu = self.options["cpu_seconds"]
                self.protect.try_step(found, name, self.protect.shut_call_in, one, self.alone, cpu)
                if wanted[name] is not True:
                    found[name] = wanted[name]
            say(3, OK, json.dumps(found).encode())

        child = self.child(live)
        self.report |= json.loads(child.result(30)[1])
        child.close(kill=True)

    def try_alone(self):
        """Whether calls can have a pid namespace each; it takes a root too, whose capability starts them."""
        if self.report["namespaces"] is not True or self.report["root"] is not True:
            return False
        try:
            pid = self.protect.start_alone()
        except OSError:
            return False
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        return True

    def start(self):
        """Shuts the worker in, reports, serves. Never returns."""
        protect, report, options = self.protect, self.report, self.options
        protect.die_with_parent()
        signal.signal(
            signal.SIGXCPU, out_of_cpu_time
        )  # process 1 of a namespace ignores what it does not handle
        if report["namespaces"] is True:
            protect.try_step(report, "root", protect.change_root, options["root"], options["packages"])
        else:
            report["root"] = "needs namespaces"
        keep_only(self.requests, self.responses)
        sys.path += options["packages"]
        for name in PRELOADED:
            importlib.import_module(name)
        self.alone = self.try_alone()
        kept = (
            protect.CAP_SYS_ADMIN if report["root"] is True else 0
        )  # for calls' namespaces and scratch folder
        protect.hide_memory()
        protect.try_step(report, "limits", protect.set_limits, options["memory"], options["file_bytes"])
        protect.try_step(report, "capabilities", protect.set_capabilities, kept)
        if self.alone:
            protect.try_step(report, "seccomp", protect.install_whole_filter)
        else:
            protect.try_step(report, "seccomp", protect.install_worker_filter, report["root"] is True)
        self.probe()
        write_frame(self.responses, {"protections": report})
        self.serve()


def watch(child, requests):
    """The outer process: waits for the worker to end or for the trainer's end of the pipe to close.

    Its exit status tells the trainer whether the worker was killed from outside (out of memory, an
    operator): then the call was not to blame.
    """
    poller = select.poll()
    ended = os.pidfd_open(child)
    poller.register(ended, select.POLLIN)
    poller.register(requests, 0)  # only the hang-up, which is always reported
    by_itself = any(descriptor == ended for descriptor, _ in poller.poll())
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    killed = by_itself and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    os._exit(signal.SIGKILL if killed else 0)


def main():
    options = json.loads(sys.argv[1])
    protect = load_protect()
    requests, responses = os.dup(0), os.dup(1)  # 3 and 4: where keep_only wants them
    worker = Worker(protect, requests, responses, options)
    if options["isolate"]:
        protect.try_step(worker.report, "namespaces", protect.unshare_namespaces)
    else:
        worker.report["namespaces"] = "switched off"
    child = os.fork()
    if child == 0:
        try:
            worker.start()
        except Exception:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(1)
    protect.hide_memory()
    os.close(responses)
    os.close(1)
    watch(child, requests)


if __name__ == "__main__":
    main()
