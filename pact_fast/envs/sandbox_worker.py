"""The process that runs tool code. Started by path with `python -I -S`: standard library only, no package.

Frames on the two pipes of the protocol: 4 bytes of length, then JSON. Requests: {"program": key, "source":
text, "constants": {...}, "fresh": bool} stores a program; {"id", "program", "function", "arguments"} runs a
call and is answered by {"id", "kind", "value"|"error"}; {"forget": true} drops all programs.
"""

import json
import os
import struct
import sys

MAX_ERROR = 300  # characters


def read_exactly(fd, count):
    chunks = []
    while count:
        chunk = os.read(fd, min(count, 1 << 20))
        if not chunk:
            os._exit(0)  # the parent is gone
        chunks.append(chunk)
        count -= len(chunk)
    return b"".join(chunks)


def send(fd, message):
    data = json.dumps(message).encode()
    data = struct.pack("<I", len(data)) + data
    while data:
        data = data[os.write(fd, data) :]


def build(program):
    namespace = {"__name__": "tool"}
    exec(program["code"], namespace)
    namespace.update(program["constants"])
    return namespace


def run(programs, request):
    program = programs[request["program"]]
    try:
        if program["namespace"] is None or program["fresh"]:
            program["namespace"] = build(program)
        value = program["namespace"][request["function"]](**request["arguments"])
    except BaseException as error:  # a tool that exits or is interrupted fails like any other
        return {"kind": "error", "error": f"{type(error).__name__}: {error}"[:MAX_ERROR]}
    return {"kind": "ok", "value": value}


def main():
    requests, responses = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    programs = {}
    while True:
        request = json.loads(read_exactly(requests, struct.unpack("<I", read_exactly(requests, 4))[0]))
        if request.get("forget"):
            programs.clear()
        elif "source" in request:
            programs[request["program"]] = request | {
                "code": compile(request["source"], "tool.py", "exec"),
                "namespace": None,
            }
        else:
            result = run(programs, request)
            send(responses, {"id": request["id"], **result})


if __name__ == "__main__":
    sys.setrecursionlimit(2000)
    main()
