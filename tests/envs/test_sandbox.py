"""The sandbox against tools that mean harm, tools that break, and thousands that do neither."""

import gc
import os
import time

import psutil
import pytest

from pact_fast.envs.sandbox.sandbox import Program, Sandbox, SandboxCall


def program(body, **options):
    return Program(
        "def tool(**arguments):\n" + "\n".join("    " + line for line in body.splitlines()), **options
    )


def run_one(sandbox, body, **arguments):
    return sandbox.run([SandboxCall(program(body), "tool", arguments)])[0]


@pytest.fixture(scope="module", params=[True, False], ids=["isolated", "limits-only"])
def sandbox(request):
    with Sandbox(workers=1, time_limit=1.5, memory_mb=256, isolate=request.param) as sandbox:
        yield sandbox


def works(sandbox):
    return run_one(sandbox, "return arguments['x'] + 1", x=1).value == 2


def test_the_machine_says_which_protections_hold(sandbox):
    protections = sandbox.protections
    assert set(protections) == {"namespaces", "root", "limits", "capabilities", "seccomp"}
    for name, holds in protections.items():
        assert holds is True or (isinstance(holds, str) and holds), name
    assert protections["limits"] is True


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("while True: pass", "timeout"),
        ("import time; time.sleep(60)", "timeout"),
        (
            "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
            "timeout",
        ),
        ("import os; os._exit(3)", "died"),
        ("import ctypes; ctypes.string_at(0)", "died"),
        ("import os; [os.close(fd) for fd in range(3, 20)]", "died"),
    ],
    ids=["spins", "sleeps", "spins with signals blocked", "exits hard", "segfaults", "closes the pipes"],
)
def test_a_tool_that_hangs_or_ends_its_process_costs_one_worker(sandbox, body, kind):
    before = sandbox.restarts
    started = time.monotonic()
    results = sandbox.run(
        [SandboxCall(program(body), "tool", {}), SandboxCall(program("return 7"), "tool", {})]
    )
    assert results[0].kind == kind
    assert results[0].error
    assert results[1].value == 7  # the call queued behind it is run on the next worker
    assert sandbox.restarts == before + 1
    assert time.monotonic() - started < 20
    assert works(sandbox)


@pytest.mark.parametrize(
    ("body", "fragment"),
    [
        ("import sys; sys.exit(1)", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("return len(bytearray(1 << 30))", "MemoryError"),
        ("return object()", "TypeError"),
        ("return {1, 2}", "TypeError"),
        ("return 'x' * (1 << 22)", "at most"),
        ("def f(): return f()\nreturn f()", "RecursionError"),
        ("return arguments['missing']", "KeyError"),
        ("x = []; x.append(x); return x", "ValueError"),
        ("class E(Exception):\n    def __str__(self): raise ValueError\nraise E", "E"),
    ],
)
def test_a_tool_that_fails_yields_its_error_and_nothing_else(sandbox, body, fragment):
    result = run_one(sandbox, body)
    assert result.kind == "error"
    assert fragment in result.error
    assert len(result.error) <= 300
    assert works(sandbox)


@pytest.mark.parametrize("isolate", [True, False])
def test_a_tool_that_gathers_memory_gets_an_error_and_its_worker_is_replaced(isolate):
    with Sandbox(time_limit=30, memory_mb=96, isolate=isolate) as sandbox:
        result = run_one(sandbox, "data = []\nwhile True: data.append(bytearray(1 << 22))")
        assert (result.kind, result.error) == ("error", "MemoryError")
        assert sandbox.restarts == 1
        assert works(sandbox)


def test_a_syntax_error_or_a_missing_function_is_the_tools_error(sandbox):
    assert "SyntaxError" in sandbox.run([SandboxCall(Program("def tool(:"), "tool", {})])[0].error
    assert "KeyError" in sandbox.run([SandboxCall(Program("x = 1"), "tool", {})])[0].error
    assert (
        "TypeError" in sandbox.run([SandboxCall(Program("def tool(a): return a"), "tool", {"b": 1})])[0].error
    )


def test_printing_gigabytes_reaches_nobody(sandbox, capfd):
    result = run_one(
        sandbox, "import sys\nfor _ in range(2000): sys.stdout.write('x' * (1 << 20))\nreturn 'done'"
    )
    assert result.value == "done" or result.kind == "timeout"
    assert capfd.readouterr().out == ""


def test_no_fork_no_exec_no_socket_no_signal_to_others(sandbox):
    if sandbox.protections["seccomp"] is not True:
        pytest.skip("no system-call filter here")
    for body in (
        "import os; return os.fork()",
        "import os; os.execv('/bin/true', ['true'])",
        "import subprocess; subprocess.run(['/bin/true'])",
        "import socket; socket.socket()",
        "import os; os.kill(os.getppid() or 2, 9)",
        "import os; os.killpg(0, 9)",
        "import os; os.setsid()",
    ):
        result = run_one(sandbox, body)
        assert result.kind == "error", body
        assert "PermissionError" in result.error, (body, result.error)


def test_threads_left_behind_end_the_worker(sandbox):
    before = sandbox.restarts
    result = run_one(
        sandbox, "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\nreturn 1"
    )
    assert result.value == 1
    assert sandbox.restarts == before + 1
    assert works(sandbox)


def test_a_tool_sees_no_environment_variable_of_the_trainer(sandbox, monkeypatch):
    monkeypatch.setenv("PACT_FAST_SECRET", "hidden")
    seen = run_one(sandbox, "import os; return dict(os.environ)").value
    assert "PACT_FAST_SECRET" not in seen
    assert "hidden" not in str(run_one(sandbox, "return open('/proc/1/environ').read()"))


def test_a_tool_writes_nowhere_but_in_its_scratch_folder(sandbox, tmp_path):
    targets = [tmp_path / "x", "/usr/lib/x", "/x", os.path.join(os.path.dirname(os.__file__), "x.py")]
    for target in targets:
        result = run_one(sandbox, f"open({str(target)!r}, 'w').write('x')")
        assert result.kind == "error", target
        assert not os.path.exists(target)
    victim = tmp_path / "victim"
    victim.write_text("kept")
    for body in (
        f"import os; os.unlink({str(victim)!r})",
        f"import os; os.rename({str(victim)!r}, '/tmp/y')",
    ):
        assert run_one(sandbox, body).kind == "error"
    assert victim.read_text() == "kept"


def test_isolated_tools_cannot_read_the_users_files(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("hidden")
    with Sandbox(time_limit=5.0) as sandbox:
        if sandbox.protections["root"] is not True:
            pytest.skip(f"no root of its own here: {sandbox.protections}")
        for path in (secret, __file__, "/etc/passwd", "/proc/self/environ"):
            assert "FileNotFoundError" in run_one(sandbox, f"return open({str(path)!r}).read()").error
        scratch = "open('/tmp/a', 'w').write('b'); return open('/tmp/a').read()"
        assert run_one(sandbox, scratch).value == "b"
        assert run_one(sandbox, "open('/tmp/a', 'w').write('b' * (1 << 25))").kind == "error"
        assert run_one(sandbox, "import os; return os.getpid()").value == 1


def test_fresh_programs_share_no_globals_and_kept_ones_do():
    source = "count = 0\ndef tool():\n    global count\n    count += 1\n    return count"
    with Sandbox() as sandbox:
        fresh = [SandboxCall(Program(source), "tool", {})] * 3
        kept = [SandboxCall(Program(source, {"count": 10}, fresh=False), "tool", {})] * 3
        assert [r.value for r in sandbox.run(fresh)] == [1, 1, 1]
        assert [r.value for r in sandbox.run(kept)] == [11, 12, 13]


def cpu_seconds(pids):
    return sum(sum(psutil.Process(pid).cpu_times()[:4]) for pid in pids)  # own and of calls that ended


def test_two_cores_do_a_thousand_calls_a_second_without_leak():
    calls = [SandboxCall(program(f"return arguments['x'] + {i % 50}"), "tool", {"x": i}) for i in range(1000)]
    me = psutil.Process()
    others = {p.pid for p in me.children(recursive=True)}
    with Sandbox(workers=2) as sandbox:
        assert [r.value for r in sandbox.run(calls)] == [i + i % 50 for i in range(1000)]
        children = {p.pid for p in me.children(recursive=True)} - others
        gc.collect()
        worker_memory = [psutil.Process(pid).memory_info().rss for pid in children]
        own_memory, own_files = me.memory_info().rss, me.num_fds()
        spent = cpu_seconds([me.pid, *children]) - me.cpu_times().children_user
        started = time.perf_counter()
        for _ in range(2):
            sandbox.run(calls)
        wall = time.perf_counter() - started
        # CPU time, not wall time: what else runs on the machine is no matter of the sandbox.
        spent = cpu_seconds([me.pid, *children]) - me.cpu_times().children_user - spent
        print(f"{2000 / wall:.0f} calls/s, {spent / 2:.2f} ms of CPU a call")
        assert {p.pid for p in me.children(recursive=True)} - others == children
        grown = sum(psutil.Process(pid).memory_info().rss for pid in children) - sum(worker_memory)
        assert grown < 4 << 20
        assert me.memory_info().rss - own_memory < 16 << 20
        assert me.num_fds() == own_files
        assert sandbox.restarts == 0
        assert spent / 2000 <= 2 / 1000
    assert not [p for p in me.children(recursive=True) if p.pid in children]


def test_workers_end_with_a_trainer_that_is_killed(tmp_path):
    code = (
        "import sys, time\nfrom pact_fast.envs.sandbox.sandbox import *\n"
        "s = Sandbox(time_limit=60); s.run([SandboxCall(Program('def f(): return 1'), 'f', {})])\n"
        "print(s.workers[0].process.pid, flush=True)\n"
        "s.run([SandboxCall(Program('import time\\ndef f(): time.sleep(60)'), 'f', {})])\n"
    )
    trainer = psutil.Popen([os.sys.executable, "-c", code], stdout=-1)
    worker = psutil.Process(int(trainer.stdout.readline()))
    while len(family := [worker, *worker.children(recursive=True)]) < 3:
        time.sleep(0.01)
    assert len(family) == 3  # the outer process, the worker, the call
    time.sleep(0.3)
    trainer.kill()
    trainer.wait()
    _gone, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def test_the_doctor_names_every_protection_and_what_its_lack_costs():
    from pact_fast.commands.doctor import examine

    findings = {f.name: f for f in examine() if f.area == "sandbox"}
    with Sandbox() as sandbox:
        for name, holds in sandbox.protections.items():
            finding = findings[f"sandbox: {name}"]
            assert (finding.status == "ok") == (holds is True)
            assert finding.cost
