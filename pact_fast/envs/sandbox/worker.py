"""The process that runs tool code. Started by path with `python -S -s -P`: standard library only, no package.

Two processes: the outer one enters the namespaces, starts the inner one, and ends it when the trainer lets
go of the pipe or dies; the inner one shuts itself in (protect.py) and then runs calls. Frames on
the two pipes of the
protocol: 4 bytes of length, then JSON. First comes {"protections": {name: true | reason}} from the worker.
Requests: {"program": key, "source": text, "constants": {...}, "fresh": bool} stores a program; {"id",
"program", "function", "arguments"} runs a call and is answered by {"id", "kind", "value"|"error",
"recycle"?}; {"forget": true} drops all programs. "recycle": the call left something behind (threads,
processes, no memory), and the worker ends.
"""

import importlib.util
import json
import os
import select
import signal
import struct
import sys
import threading

MAX_ERROR = 300  # characters of an error message
MAX_RESULT = 1 << 20  # bytes of a result as JSON


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
            os._exit(0)  # the trainer is gone
        chunks.append(chunk)
        count -= len(chunk)
    return b"".join(chunks)


def send(fd, message):
    data = message if isinstance(message, bytes) else json.dumps(message).encode()
    data = struct.pack("<I", len(data)) + data
    while data:
        data = data[os.write(fd, data) :]


def build(program):
    namespace = {"__name__": "tool"}
    exec(program["code"], namespace)
    namespace.update(program["constants"])
    return namespace


def describe(error):
    try:
        return f"{type(error).__name__}: {error}"[:MAX_ERROR]
    except BaseException:  # its own __str__ fails
        return type(error).__name__


def call(program, request):
    """The result frame of one call, as bytes."""
    frame = {"id": request["id"]}
    try:
        if program["code"] is None:
            program["code"] = compile(program["source"], "tool.py", "exec")
        if program["namespace"] is None or program["fresh"]:
            program["namespace"] = build(program)
        value = program["namespace"][request["function"]](**request["arguments"])
        frame |= {"kind": "ok", "value": value} | leftovers()
        data = json.dumps(frame).encode()
        if len(data) > MAX_RESULT:
            raise ValueError(f"the result is {len(data):,} bytes of JSON; at most {MAX_RESULT:,} are allowed")
        return data
    except MemoryError:
        failed = {"kind": "error", "error": "MemoryError", "recycle": True}
    except BaseException as error:  # a tool that exits or is interrupted fails like any other
        failed = {"kind": "error", "error": describe(error)} | leftovers()
    return json.dumps({"id": request["id"]} | failed).encode()


def leftovers():
    """{"recycle": True} where threads or child processes outlive the call."""
    if threading.active_count() > 1:
        return {"recycle": True}
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return {}
    return {"recycle": True}


def out_of_cpu_time(signum, frame):
    raise TimeoutError("CPU time limit")


def serve(requests, responses, limit_cpu, cpu_seconds):
    programs = {}
    while True:
        request = json.loads(read_exactly(requests, struct.unpack("<I", read_exactly(requests, 4))[0]))
        if request.get("forget"):
            programs.clear()
        elif "source" in request:
            programs[request["program"]] = request | {"code": None, "namespace": None}
        else:
            limit_cpu(cpu_seconds)
            send(responses, call(programs[request["program"]], request))


def run_inner(protect, requests, responses, options, report):
    """The inner process: shuts itself in, reports, serves. Never returns."""
    protect.die_with_parent()
    signal.signal(signal.SIGXCPU, out_of_cpu_time)  # process 1 of a namespace ignores what it does not handle
    if report["namespaces"] is True:
        protect.try_step(report, "root", protect.change_root, options["root"], options["packages"])
    else:
        report["root"] = "needs namespaces"
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    sys.path += options["packages"]
    protect.try_step(report, "limits", protect.set_limits, options["memory"], options["file_bytes"])
    protect.try_step(report, "capabilities", protect.drop_capabilities)
    protect.try_step(report, "seccomp", protect.install_filter, report["root"] is True)
    send(responses, {"protections": report})
    serve(requests, responses, protect.limit_cpu, options["cpu_seconds"])


def watch(child, requests):
    """The outer process: waits for the inner one to end or for the trainer's end of the pipe to close.

    Its exit status tells the trainer whether the inner one was killed from outside (out of memory, an
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
    requests, responses = os.dup(0), os.dup(1)
    report = {}
    if options["isolate"]:
        protect.try_step(report, "namespaces", protect.unshare_namespaces)
    else:
        report["namespaces"] = "switched off"
    child = os.fork()
    if child == 0:
        run_inner(protect, requests, responses, options, report)
    os.close(responses)
    os.close(1)
    watch(child, requests)


if __name__ == "__main__":
    main()
