"""Tools that reach for the channel, and tools that leave something for the next call: neither gets far."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pact_fast.data.reading import MAX_DEPTH
from pact_fast.envs.base import make_env
from pact_fast.envs.sandbox.sandbox import Program, Sandbox, SandboxCall, SandboxTooWeak

ROOT = Path(__file__).parent.parent.parent


def program(body):
    return Program("def tool(**arguments):\n" + "\n".join("    " + line for line in body.splitlines()))


def run(sandbox, *bodies):
    return sandbox.run([SandboxCall(program(body), "tool", {}) for body in bodies])


@pytest.fixture(scope="module", params=[True, False], ids=["isolated", "limits-only"])
def sandbox(request):
    with Sandbox(workers=1, time_limit=3, memory_mb=384, isolate=request.param) as sandbox:
        yield sandbox


# The channel

FRAMES = {
    "wrong id": {"id": 99, "kind": "ok", "value": 1},
    "no kind": {"id": 0, "value": 1},
    "a list": [1],
    "null": None,
    "whole": {"id": 0, "tag": "0" * 16, "kind": "ok", "lost": False},
}
WRITE_EVERYWHERE = """
import os, struct
for fd in range(0, 64):
    for frame in {frames!r}:
        for head in (struct.pack('<I', len(frame)), struct.pack('<IB', len(frame), 0)):
            try:
                os.write(fd, head + frame)
            except OSError:
                pass
return 'mine'
"""


@pytest.mark.parametrize("name", [*FRAMES, "deep", "no text", "endless"])
def test_frames_written_to_every_descriptor_change_no_other_call(sandbox, name):
    frame = json.dumps(FRAMES[name]).encode() if name in FRAMES else None
    frame = frame or {"deep": b"[" * 100_000, "no text": b"\xff\xfe\x00", "endless": b"[" * 900_000}[name]
    forging = WRITE_EVERYWHERE.format(frames=[frame, frame + b"\n1", b"1"])
    started = time.monotonic()
    results = run(sandbox, "return 1", forging, "return 2", forging, "return 3")
    assert [results[i].value for i in (0, 2, 4)] == [1, 2, 3]
    assert all(result.kind in ("ok", "error", "died", "timeout") for result in results)
    assert time.monotonic() - started < 30


class LyingWorker:
    """A worker process that answers every request as `lie` says: no worker does, whatever a tool does."""

    SOURCE = """
import json, os, struct, sys
def read(n):
    data = b''
    while len(data) < n:
        chunk = os.read(0, n - len(data))
        if not chunk: os._exit(0)
        data += chunk
    return data
def send(data): os.write(1, struct.pack('<I', len(data)) + data)
protections = dict.fromkeys(('namespaces', 'root', 'limits', 'capabilities', 'seccomp'), True)
send(json.dumps({{'protections': protections}}).encode())
while True:
    head = json.loads(read(struct.unpack('<I', read(4))[0]).partition(b'\\n')[0])
    if 'id' in head:
        good = {{'id': head['id'], 'tag': head['tag'], 'kind': 'ok', 'lost': False}}
        send({lie})
"""


@pytest.mark.parametrize(
    "lie",
    [
        "json.dumps(good | {'id': 7}).encode() + b'\\n1'",
        "json.dumps(good | {'id': True}).encode() + b'\\n1'",
        "json.dumps(good | {'tag': 'guess'}).encode() + b'\\n1'",
        "json.dumps(good | {'kind': 'great'}).encode() + b'\\n1'",
        "json.dumps(good | {'kind': []}).encode() + b'\\n1'",
        "json.dumps(good | {'lost': None}).encode() + b'\\n1'",
        "json.dumps({'id': head['id']}).encode()",
        "b'[1]'",
        "b'null'",
        "b''",
        "b'[' * 100_000",
        "b'{\"a\":' * 10_000",
        "b'\\xff\\xfe'",
        "b'9' * 10_000",
    ],
)
def test_an_answer_that_no_worker_gives_is_the_workers_death(lie, tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(LyingWorker.SOURCE.format(lie=lie))
    monkeypatch.setattr("pact_fast.envs.sandbox.sandbox.WORKER", script)
    monkeypatch.setattr("pact_fast.envs.sandbox.sandbox.END_LIMIT", 0.05)
    with Sandbox(workers=1, time_limit=5) as sandbox:
        results = run(sandbox, "return 1", "return 2")
        assert [result.kind for result in results] == ["died", "died"]
        assert sandbox.restarts == 2


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("x = []\nfor _ in range(900): x = [x]\nreturn x", "too deep"),
        ("return 10 ** 4299", "digits"),
        ("import json\njson.dumps = lambda v: '[' * 300_000\nreturn 1", "too deep"),
        ("import json\njson.dumps = lambda v: '9' * 5000\nreturn 1", "digits"),
        ("import json\njson.dumps = lambda v: 'no json'\nreturn 1", "Expecting"),
        ("import json\njson.dumps = lambda v: '\\udc80'\nreturn 1", "surrogate"),
    ],
)
def test_a_result_that_cannot_be_read_is_the_tools_error(sandbox, body, error):
    result, after = run(sandbox, body, "return 5")
    if "4299" in body:
        assert result.kind == "ok"
    else:
        assert result.kind == "error", result
        assert error in result.error
    assert after.value == 5


def test_halves_of_surrogate_pairs_come_back_as_whole_characters(sandbox):
    (result,) = run(sandbox, "return {'\\ud83d': ['\\udc80x', 'ok']}")
    assert result.value == {"\ufffd": ["\ufffdx", "ok"]}
    (failed,) = run(sandbox, "raise ValueError('\\ud800')")
    assert failed.kind == "error"
    failed.error.encode()


def test_arguments_that_cannot_be_passed_on_are_an_error_of_that_call_alone(sandbox):
    deep = []
    for _ in range(100_000):
        deep = [deep]
    deep = {"x": deep}
    calls = [SandboxCall(program("return 4"), "tool", arguments) for arguments in ({}, deep, {"x": {1}}, {})]
    results = sandbox.run(calls)
    assert [result.kind for result in results] == ["ok", "error", "error", "ok"]
    assert str(MAX_DEPTH) in results[1].error


# What one call leaves

LEAVE = {
    "a patched module": (
        "import json; json.dumps = lambda v: '\"patched\"'",
        "import json; return json.dumps(1)",
        "1",
    ),
    "a module attribute": ("import math; math.mine = 1", "import math; return hasattr(math, 'mine')", False),
    "an imported module": (
        "import sys; sys.modules['mine'] = sys",
        "import sys; return 'mine' in sys.modules",
        False,
    ),
    "a builtin": ("import builtins; builtins.len = lambda x: 0", "return len([1, 2])", 2),
    "a trace function": (
        "import sys; sys.settrace(lambda *a: None)",
        "import sys; return sys.gettrace() is None",
        True,
    ),
    "a profile function": (
        "import sys; sys.setprofile(lambda *a: None)",
        "import sys; return sys.getprofile() is None",
        True,
    ),
    "an audit hook": (
        "import sys\ndef hook(*a): raise ValueError('hooked')\nsys.addaudithook(hook)",
        "import os; return os.path.exists('/dev/null')",
        True,
    ),
    "an alarm": (
        "import signal; signal.signal(signal.SIGALRM, lambda *a: 1/0)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)",
        "import time; time.sleep(0.5); return 'slept'",
        "slept",
    ),
    "a recursion limit": (
        "import sys; sys.setrecursionlimit(120)",
        "import sys; return sys.getrecursionlimit()",
        1000,
    ),
    "decimal precision": (
        "import decimal; decimal.getcontext().prec = 3; decimal.DefaultContext.prec = 3",
        "import decimal; return str(decimal.Decimal(1) / 3)",
        "0." + "3" * 28,
    ),
    "a thread": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        "import threading; return threading.active_count()",
        1,
    ),
    "an environment variable": (
        "import os; os.environ['MINE'] = '1'",
        "import os; return os.environ.get('MINE')",
        None,
    ),
    "the working folder": ("import os; os.chdir('/')", "import os; return os.getcwd()", None),
    "a file mode mask": ("import os; os.umask(0o777)", "import os; return os.umask(0)", 0o22),
    "a limit": (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (5, 5))",
        "import resource; return resource.getrlimit(resource.RLIMIT_NOFILE)[0]",
        64,
    ),
    "memory": (
        "import builtins; builtins.held = bytearray(300 << 20)",
        "return len(bytearray(300 << 20)) >> 20",
        300,
    ),
    "a random state": (
        "import random; random.seed(1)",
        "import random; a = random.random(); return a != 0.13436424411240122",
        True,
    ),
    "a closed descriptor": ("import os; os.close(2)", "import os; os.write(2, b'x'); return 1", 1),
    "priority": (
        "import os; os.setpriority(os.PRIO_PROCESS, 0, 19)",
        "import os; return os.getpriority(os.PRIO_PROCESS, 0)",
        None,
    ),
}


@pytest.mark.parametrize("what", LEAVE)
def test_a_call_finds_nothing_of_the_call_before(sandbox, what):
    leave, look, expected = LEAVE[what]
    if expected is None:
        (before,) = run(sandbox, look)
        expected = before.value
    _, after = run(sandbox, leave, look)
    assert (after.kind, after.value) == ("ok", expected), after


SCRATCH = {
    "a file": "open('/tmp/left', 'w').write('x')",
    "a folder": "import os; os.makedirs('/tmp/' + '/'.join('d' * 200)[:399])",
    "a full scratch": (
        "for i in range(9):\n    try: open(f'/tmp/{i}', 'wb').write(bytes(4 << 20))\n    except OSError: pass"
    ),
    "many files": "for i in range(10_000):\n    try: open(f'/tmp/{i}', 'w')\n    except OSError: break",
    "a closed folder": (
        "import os; os.mkdir('/tmp/d'); open('/tmp/d/f', 'w'); os.chmod('/tmp/d', 0); os.chmod('/tmp', 0)"
    ),
    "a time stamp": "import os; os.utime('/tmp', (7, 7))",
}


@pytest.mark.parametrize("what", SCRATCH)
def test_the_scratch_folder_is_empty_for_every_call(what):
    look = (
        "import os\nwhole = b'x' * (3 << 20)\nfound = os.listdir('/tmp')\n"
        "open('/tmp/mine', 'wb').write(whole)\nit = os.stat('/tmp')\n"
        "return [found, os.path.getsize('/tmp/mine') >> 20, oct(it.st_mode & 0o777), it.st_atime != 7]"
    )
    with Sandbox(workers=1, time_limit=10) as sandbox:
        if sandbox.protections["root"] is not True:
            pytest.skip("no root of its own here")
        for _ in range(2):
            _, after = run(sandbox, SCRATCH[what], look)
            assert after.value == [[], 3, "0o700", True], after


RAW = (
    "syscall(56, 0x20000000 | 17, 0, 0, 0, 0)",  # clone into a pid namespace
    "syscall(56, 0x30000000 | 17, 0, 0, 0, 0)",  # and a user namespace, whose owner may do so
    "mount(b'none', b'/tmp', b'tmpfs', 0, None)",
    "umount2(b'/tmp', 2)",
)


def test_a_call_cannot_reach_other_processes_or_the_machines_devices(sandbox):
    bodies = (
        "import os; os.kill(-1, 15)",
        "import os; os.kill(1 if os.getpid() != 1 else 2, 15)",
        "import fcntl, os; r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETOWN, 1)",
        "import os, resource; resource.prlimit(3 - min(os.getpid(), 2), resource.RLIMIT_CPU, (1, 1))",
        "import os; os.chmod('/dev/null', 0)",
        "import ctypes, os\nif ctypes.CDLL(None, use_errno=True).prctl(1, 0, 0, 0, 0): raise PermissionError",
        "import os; os.sched_setaffinity(0, {0})",
        *(f"import ctypes\nif ctypes.CDLL(None).{call} != 0: raise PermissionError" for call in RAW),
    )
    if sandbox.protections["seccomp"] is not True:
        pytest.skip("no system-call filter here")
    mode = os.stat("/dev/null").st_mode
    for body, result in zip(bodies, run(sandbox, *bodies), strict=True):
        assert result.kind == "error", body
        assert "Error" in result.error
    assert os.stat("/dev/null").st_mode == mode
    assert run(sandbox, "return 1")[0].value == 1


def test_programs_that_are_declared_to_keep_state_share_it_with_their_own_kind_alone():
    count = "count = 0\ndef tool():\n    global count\n    count += 1\n    return count"
    meddle = "import math\ndef tool():\n    math.mine = 1\n    return hasattr(math, 'theirs')"
    kept, other = Program(count, fresh=False), Program(meddle, fresh=False)
    with Sandbox(workers=1) as sandbox:
        calls = [SandboxCall(p, "tool", {}) for p in (kept, other, kept, other, kept)]
        assert [r.value for r in sandbox.run(calls)] == [1, False, 2, False, 3]
        assert run(sandbox, "import math; return hasattr(math, 'mine')")[0].value is False


# Machines that cannot shut tools in

WEAK = """
import ctypes, json, os, sys
sys.path.insert(0, {root!r})
from pact_fast.commands.doctor import examine
from pact_fast.envs.sandbox import protect
from pact_fast.envs.sandbox.sandbox import Program, Sandbox, SandboxCall, SandboxTooWeak
rules = protect.Rules(protect.known_calls()["arch"])
rules.deny({unshare})
protect.install(rules.code())  # as in a container that forbids namespaces
protect.set_capabilities(0)  # as of a user who is not root
leak = Program("import glob\\ndef tool():\\n"
    "    found = b''\\n"
    "    for path in glob.glob('/proc/[0-9]*/environ'):\\n"
    "        try: found += open(path, 'rb').read()\\n"
    "        except OSError: pass\\n"
    "    return 'PACT_FAST_SECRET' in found.decode(errors='replace')")
out = {{}}
with Sandbox() as sandbox:
    out["protections"] = sandbox.protections
    try:
        sandbox.run([SandboxCall(leak, "tool", {{}})])
    except SandboxTooWeak as error:
        out["refused"] = str(error)
    own = Program("def tool(): return 1", fresh=False)
    out["own"] = sandbox.run([SandboxCall(own, "tool", {{}})])[0].value
with Sandbox(weak=True) as sandbox:
    out["leaks"] = sandbox.run([SandboxCall(leak, "tool", {{}})])[0].value
    out["weak"] = sandbox.run([SandboxCall(Program("def tool(): return 1"), "tool", {{}})])[0].value
out["doctor"] = [[f.name, f.status, f.cost] for f in examine() if f.area == "sandbox"]
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def weak_machine():
    """What a user without namespaces sees, who is not root: a real process without any of root's rights."""
    unshare = {"x86_64": 272, "aarch64": 97}[os.uname().machine]
    code = WEAK.format(root=str(ROOT), unshare=unshare)
    environment = os.environ | {"PACT_FAST_SECRET": "hidden"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_without_namespaces_untrusted_source_is_refused_and_the_way_out_is_said(weak_machine):
    assert weak_machine["protections"]["namespaces"] is not True
    assert "--env.settings.sandbox weak" in weak_machine["refused"]
    assert "environment" in weak_machine["refused"]
    assert weak_machine["leaks"] is True  # why: this is what the refusal keeps from happening
    assert weak_machine["weak"] == 1
    assert weak_machine["own"] == 1


def test_the_doctor_names_what_a_weak_sandbox_lets_through(weak_machine):
    costs = {name: cost for name, status, cost in weak_machine["doctor"] if status != "ok"}
    assert "environment" in costs["sandbox: namespaces"]
    assert "--env.settings.sandbox weak" in costs["sandbox: untrusted tools"]


def test_the_setting_reaches_the_sandbox():
    for name in ("python", "ftrl", "toolhop"):
        for value in ("strict", "weak"):
            env = make_env(name, {"sandbox": value})
            assert env.sandbox.weak == (value == "weak")
            env.close()
        with pytest.raises(ValueError, match=f"env.{name}.sandbox"):
            make_env(name, {"sandbox": "none"})


def test_an_environment_refuses_its_records_before_anything_is_trained(tmp_path, monkeypatch):
    env = make_env("python", {"train_path": str(ROOT / "missing.jsonl")})
    protections = dict.fromkeys(("namespaces", "root", "seccomp", "capabilities"), "not here")
    monkeypatch.setattr(type(env.sandbox), "protections", property(lambda self: protections))
    with pytest.raises(SandboxTooWeak):
        env.records("train")
    env.close()
