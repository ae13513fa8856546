"""Real faults at random moments of small real runs, each followed by a resume that must lose nothing.

    python -m tests.helpers.faults ROOT REPEATS [SCENARIO ...]

Runs are forked from this interpreter: starting one anew takes longer than such a run. Prints one JSON object:
per scenario the number of repetitions survived, what was seen on the way, and the traceback of a failure.
"""

import contextlib
import functools
import inspect
import json
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

from pact_fast import cli
from pact_fast.envs.sandbox import protect
from pact_fast.evaluation import report
from pact_fast.metrics import MetricsLogger, read_metrics
from pact_fast.train.checkpoint import Checkpointer
from pact_fast.train.trainer import Trainer
from tests.helpers.ranks import start_ranks, wait_for
from tests.helpers.runs import config, curve, same_weights, tiny_model, weights, words

torch.set_num_threads(1)  # OpenMP's pool does not survive a fork
PHASES = ("rollout", "update", "checkpoint")
SHORT = {"train__max_steps": 4, "eval__every": 0, "rollout__max_turn_length": 10, "rollout__max_turns": 1}
SHORT |= {"checkpoint__every": 1, "checkpoint__keep_last": 9}
RANKS = SHORT | {"train__token_budget": 900, "train__max_steps": 3}
BOUND = 120  # seconds within which a rank must notice that the other is gone, however loaded the machine
RNG = random.Random()


class Marks:
    """Where a forked run is, seen from here: per phase times entered, times left, last duration."""

    def __init__(self):
        self.values = memoryview(mmap.mmap(-1, 4096)).cast("d")

    def __call__(self, *_):
        """Called in the run's process."""
        for phase, (owner, name) in enumerate(
            [(Trainer, "rollout"), (Trainer, "update"), (Checkpointer, "_write")]
        ):
            self.around(owner, name, phase)

    def around(self, owner, name, phase):
        real = getattr(owner, name)

        def marked(*arguments, **options):
            self.values[phase] += 1
            begin = time.monotonic()
            try:
                return real(*arguments, **options)
            finally:
                self.values[8 + phase] += 1
                self.values[16 + phase] = time.monotonic() - begin

        setattr(owner, name, marked)

    def inside(self, phase):
        return self.values[phase] > self.values[8 + phase]

    def await_entry(self, phase, count, pid):
        """Until the run enters the phase for the count-th time; False where it ends before."""
        while self.values[phase] < count:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return False
            time.sleep(0.0003)
        return True


def fork(run_dir, before=lambda: None, by_command=False, after=lambda run_dir: None, **changes):
    """Starts a run that resumes what is in its folder; `before` is called in its process, and `after` at the
    end. -> pid"""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(f"{run_dir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        before()
        options = SHORT | {"checkpoint__resume": (run_dir / "run.json").exists()} | changes
        if by_command:
            code = cli.main(["train", *words(run_dir, **options)])
        else:
            Trainer(config(run_dir, **options)).train()
            code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        after(run_dir)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check_same(run_dir, undisturbed):
    assert same_weights(weights(run_dir), weights(undisturbed)), f"{run_dir}: other weights"
    assert curve(run_dir) == curve(undisturbed), f"{run_dir}: other curves"


def resume_and_check(run_dir, undisturbed, **changes):
    assert ended(fork(run_dir, **changes)) == 0, Path(f"{run_dir}.log").read_text()[-2000:]
    check_same(run_dir, undisturbed)


class Scenarios:
    """Each method runs one fault `repeats` times, yields after each, and returns what it saw."""

    def __init__(self, root, repeats):
        self.root, self.repeats = root, repeats
        self.undisturbed = root / "undisturbed"
        self.usual = Marks()
        assert ended(fork(self.undisturbed, self.usual)) == 0, (root / "undisturbed.log").read_text()

    def kill(self):
        """kill -9 of the trainer in rollouts, updates and checkpoint writes."""
        cut, resumed = Counter(), 0
        for attempt in range(self.repeats):
            run_dir, marks, phase = self.root / f"kill-{attempt}", Marks(), attempt % 3
            pid = fork(run_dir, marks)
            if marks.await_entry(phase, RNG.randint(1, int(self.usual.values[phase])), pid):
                time.sleep(RNG.uniform(0, self.usual.values[16 + phase]))
            os.kill(pid, signal.SIGKILL)
            assert ended(pid) in (-9, 0)
            cut.update(name for i, name in enumerate(PHASES) if marks.inside(i))
            resumed += bool(list(run_dir.glob("checkpoints/step-*")))
            resume_and_check(run_dir, self.undisturbed)
            yield
        return f"killed inside {dict(cut)}, {resumed} had a checkpoint"

    def kill_rank(self):
        """kill -9 of one rank of two: the other stops with a message, the run resumes bit for bit."""
        reference = self.root / "two"
        assert wait_for(start_ranks({"run_dir": str(reference), "size": 2, "changes": RANKS})) == [0, 0]
        slowest, cut = 0.0, Counter()
        for attempt in range(self.repeats):
            run_dir, marks, victim = self.root / f"rank-{attempt}", Marks(), RNG.randrange(2)
            phase = attempt % 3
            job = {"run_dir": str(run_dir), "size": 2, "changes": RANKS, "timeout": 600}
            pids = start_ranks(job, lambda number, v=victim, m=marks: m() if number == v else None)
            if marks.await_entry(phase, RNG.randint(1, 3), pids[victim]):
                time.sleep(RNG.uniform(0, self.usual.values[16 + phase]))
            os.kill(pids[victim], signal.SIGKILL)
            begin = time.monotonic()
            codes = wait_for(pids)
            slowest = max(slowest, time.monotonic() - begin)
            assert slowest < BOUND, f"the other rank went on for {slowest:.0f} s"
            if codes[victim] == -9 and codes != [-9, 0] and codes != [0, -9]:
                cut.update(name for i, name in enumerate(PHASES) if marks.inside(i))
                log = Path(f"{run_dir}.rank{1 - victim}.log").read_text()
                assert codes[1 - victim] not in (0, -9), codes
                assert "start all ranks again with --resume" in log or "saving a checkpoint failed" in log, (
                    log
                )
            again = job | {"changes": RANKS | {"checkpoint__resume": True}}
            assert wait_for(start_ranks(again)) == [0, 0], Path(f"{run_dir}.rank0.log").read_text()[-2000:]
            check_same(run_dir, reference)
            yield
        return f"killed inside {dict(cut)}, the other rank ended within {slowest:.1f} s"

    def sigterm(self):
        """SIGTERM to the real command: saved, exit status 0, within 30 s."""
        slowest, finished = 0.0, 0
        for attempt in range(self.repeats):
            run_dir, marks = self.root / f"sigterm-{attempt}", Marks()
            pid = fork(run_dir, marks, by_command=True)
            phase = attempt % 2
            assert marks.await_entry(phase, RNG.randint(1, 4), pid)
            time.sleep(RNG.uniform(0, self.usual.values[16 + phase]))
            os.kill(pid, signal.SIGTERM)
            begin = time.monotonic()
            assert ended(pid) == 0, Path(f"{run_dir}.log").read_text()[-2000:]
            slowest = max(slowest, time.monotonic() - begin)
            assert slowest < 30
            finished += (run_dir / "summary.json").exists()
            assert list(run_dir.glob("checkpoints/step-*"))
            resume_and_check(run_dir, self.undisturbed)
            yield
        return f"slowest {slowest:.1f} s, {finished} had finished before"

    def disk_full(self):
        """No byte more than a random number fits while one checkpoint is saved, then kill -9."""
        bare = self.undisturbed / "checkpoints" / "step-000002"
        largest = max(file.stat().st_size for file in bare.iterdir())
        warned = 0
        for attempt in range(self.repeats):
            run_dir, fails, room = self.root / f"full-{attempt}", RNG.randint(1, 3), RNG.randrange(1, largest)

            def before(fails=fails, room=room):
                real, saves = Checkpointer._write, []

                def write(saver, *arguments):
                    saves.append(1)
                    if len(saves) == fails + 1:
                        sys.stderr.flush()
                        os.kill(os.getpid(), signal.SIGKILL)
                    if len(saves) < fails:
                        return real(saver, *arguments)
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write past the limit fails
                    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
                    try:
                        return real(saver, *arguments)
                    finally:
                        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

                Checkpointer._write = write

            assert ended(fork(run_dir, before, checkpoint__asynchronous=False)) == -9
            warned += "older checkpoints are untouched" in Path(f"{run_dir}.log").read_text()
            resume_and_check(run_dir, self.undisturbed)
            yield
        return f"{warned} saves failed with a warning"

    def damage(self):
        """The newest checkpoint truncated, or one bit of it flipped."""
        whole, kinds = self.root / "whole", Counter()
        shutil.copytree(self.undisturbed, whole)
        shutil.rmtree(whole / "checkpoints" / "step-000004")
        for attempt in range(self.repeats):
            run_dir = self.root / f"damage-{attempt}"
            shutil.copytree(whole, run_dir)
            file = RNG.choice(sorted((run_dir / "checkpoints" / "step-000003").iterdir()))
            content = bytearray(file.read_bytes())
            place = RNG.randrange(len(content))
            if attempt % 2:
                content = content[:place]
            else:
                content[place] ^= 1 << RNG.randrange(8)
            file.write_bytes(content)
            kinds.update(["truncated" if attempt % 2 else "flipped"])
            resume_and_check(run_dir, self.undisturbed)
            yield
        passed = sum("passed over" in (self.root / f"damage-{i}.log").read_text() for i in range(attempt + 1))
        return f"{dict(kinds)}, {passed} passed over with a warning"

    def nan(self):
        """NaN or infinity in one rank's gradient: skipped on all ranks, whichever it was."""
        references = {}
        for attempt in range(self.repeats):
            rank, step = attempt % 2, RNG.randrange(3)
            value = RNG.choice([float("nan"), float("inf")])
            if step not in references:
                references[step] = self.root / f"nan-at-{step}"
                job = {"run_dir": str(references[step]), "size": 2, "changes": RANKS, "poison": [0, step]}
                assert wait_for(start_ranks(job)) == [0, 0]
            run_dir = self.root / f"nan-{attempt}"
            job = {"run_dir": str(run_dir), "size": 2, "changes": RANKS, "poison": [rank, step]}
            assert wait_for(start_ranks(job | {"poison_value": value})) == [0, 0]
            rows = [row for row in read_metrics(run_dir) if "loss" in row]
            assert [row["pact/skipped_steps"] for row in rows] == [2 * (row["step"] >= step) for row in rows]
            assert same_weights(weights(run_dir), weights(references[step]))
            assert all(bool(torch.isfinite(t).all()) for t in weights(run_dir).values())
            yield
        return f"steps {sorted(references)}"

    def clock(self):
        """The clock of the day jumps back at random."""
        for attempt in range(self.repeats):
            run_dir, rng = self.root / f"clock-{attempt}", random.Random(RNG.random())

            def before(rng=rng):
                real, back = time.time, [0.0]

                def jumping():
                    back[0] += rng.choice([0, 0, 0, 3600, 86400])
                    return real() - back[0]

                time.time = jumping

            assert ended(fork(run_dir, before)) == 0, Path(f"{run_dir}.log").read_text()[-2000:]
            check_same(run_dir, self.undisturbed)
            times = [row["time"] for row in read_metrics(run_dir)]
            assert times == sorted(times)
            yield
        return "time in metrics.jsonl never fell"

    def tool_worker(self):
        """kill -9 of tool workers during training: no call is lost, the rollouts are the same."""
        changes = {
            "model__path": "toolbox-base",
            "train__max_steps": 2,
            "rollout__max_completion_length": 128,
        }
        changes |= {"rollout__max_turn_length": 48, "rollout__max_turns": 3, "checkpoint__every": 0}
        reference, kills = self.root / "tools", Marks()
        assert ended(fork(reference, **changes)) == 0, (self.root / "tools.log").read_text()[-2000:]
        assert max(row.get("completions/calls", 0) for row in read_metrics(reference)) > 0, (
            "no tool was called"
        )
        for attempt in range(self.repeats):
            run_dir, rng = self.root / f"tools-{attempt}", random.Random(RNG.random())

            def before(rng=rng):
                from pact_fast.envs.sandbox.sandbox import Sandbox

                real = Sandbox.run

                def run(sandbox, calls):
                    def kill():
                        time.sleep(rng.uniform(0, 0.01))
                        for worker in list(sandbox.workers):
                            worker.process.kill()
                            kills.values[0] += 1

                    thread = threading.Thread(target=kill)
                    thread.start()
                    try:
                        return real(sandbox, calls)
                    finally:
                        thread.join()

                Sandbox.run = run

            assert ended(fork(run_dir, before, **changes)) == 0, Path(f"{run_dir}.log").read_text()[-2000:]
            check_same(run_dir, reference)
            yield
        return f"{int(kills.values[0])} workers killed"

    def last_save(self):
        """A disk, a real one, that fills up while the last checkpoint is written beside training."""
        bare = self.undisturbed / "checkpoints" / "step-000002"
        size, failed = sum(file.stat().st_size for file in bare.iterdir()), 0
        for attempt in range(self.repeats):
            run_dir = self.root / f"last-{attempt}"
            before = functools.partial(full_at_the_end, run_dir, int(size * RNG.uniform(0.0, 0.9)))
            pid = fork(run_dir, before, by_command=True, after=keep)
            code, log = ended(pid), Path(f"{run_dir}.log").read_text()
            assert code == 1, (code, log[-2000:])
            assert "No space left on device" in log.splitlines()[-1], log[-2000:]
            assert str(run_dir) in log.splitlines()[-1]
            assert log.count("Traceback") == 0, log[-3000:]
            failed += 1
            run_dir.rmdir()
            Path(f"{run_dir}-kept").rename(run_dir)
            assert "step-000004" not in os.listdir(run_dir / "checkpoints")
            resume_and_check(run_dir, self.undisturbed)
            yield
        return f"{failed} runs ended with an error that names the disk"

    def folders(self):
        """Folders and files that cannot be written or read: one line, which names the file, and no
        traceback."""

        def read_only(run_dir):
            small_disk(run_dir.parent, 1 << 20)
            flags = protect.MS_REMOUNT | protect.MS_RDONLY
            protect.mount(None, str(run_dir.parent), "tmpfs", flags)

        def full(run_dir, owner, name):
            """All space is taken while `owner.name` runs."""
            small_disk(run_dir, 64 << 20)
            real = getattr(owner, name)

            def late(*arguments, **options):
                free = os.statvfs(run_dir)
                with contextlib.suppress(OSError):
                    (run_dir / "filler").write_bytes(bytes(free.f_bavail * free.f_bsize))
                return real(*arguments, **options)

            setattr(owner, name, late)

        def spoiled(run_dir, content):
            shutil.copytree(self.undisturbed, run_dir)
            with open(run_dir / "metrics.jsonl", "r+b") as file:
                file.write(content)

        cases = {
            "read-only": (read_only, "Read-only file system", ""),
            "model": (lambda d: full(d, Trainer, "save"), "No space left on device", "model"),
            "report": (lambda d: full(d, report, "write_report"), "No space left on device", "report.html"),
            "row": (lambda d: full(d, MetricsLogger, "log"), "No space left on device", "metrics.jsonl"),
            "no UTF-8": (lambda d: spoiled(d, b"\xff\xfe"), "metrics.jsonl:1: not UTF-8", "metrics.jsonl"),
            "deep": (lambda d: spoiled(d, b"[" * 90), "metrics.jsonl:1: ", "metrics.jsonl"),
        }
        for attempt in range(self.repeats):
            for name, (before, told, file) in cases.items():
                run_dir = self.root / f"folder-{attempt}-{name}" / "run"
                run_dir.parent.mkdir()
                code = ended(fork(run_dir, functools.partial(before, run_dir), by_command=True))
                log = Path(f"{run_dir}.log").read_text()
                last = log.splitlines()[-1]
                assert code in (1, 2), (name, code, log[-2000:])
                assert told in last, (name, log[-3000:])
                assert str(run_dir / file).rstrip("/") in last.replace("/.report", "/report"), (name, last)
                assert "Traceback" not in log, (name, log[-3000:])
            yield
        return f"{len(cases)} kinds"

    def two_processes(self):
        """A second process on a run folder: refused, whenever it comes; the first loses nothing, also when it
        is killed and its lock is left behind."""
        refused, stale = 0, 0
        for attempt in range(self.repeats):
            run_dir, marks, phase = self.root / f"twice-{attempt}", Marks(), attempt % 3
            pid = fork(run_dir, marks)
            assert marks.await_entry(phase, RNG.randint(1, int(self.usual.values[phase])), pid)
            os.kill(pid, signal.SIGSTOP)  # it is alive, and still there when the second one looks
            log = Path(f"{run_dir}.log")
            before = len(log.read_text())
            assert ended(fork(run_dir, by_command=True)) == 2
            told = log.read_text()[before:]
            assert f"is in use by process {pid} on" in told, told[-2000:]
            assert "Traceback" not in told
            refused += 1
            if attempt % 2:
                os.kill(pid, signal.SIGKILL)
                assert ended(pid) == -9
                assert (run_dir / ".lock").exists()
                stale += 1
                resume_and_check(run_dir, self.undisturbed)
            else:
                os.kill(pid, signal.SIGCONT)
                assert ended(pid) == 0, log.read_text()[-2000:]
                check_same(run_dir, self.undisturbed)
            assert not (run_dir / ".lock").exists()
            yield
        return f"{refused} refused, {stale} stale locks taken over"


def small_disk(folder, room):
    """Mounts a file system of `room` bytes at `folder`, in this process alone."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0 or protect.libc.unshare(protect.CLONE_NEWNS) != 0:
        uid, gid = os.geteuid(), os.getegid()
        protect.check(protect.libc.unshare(protect.CLONE_NEWUSER | protect.CLONE_NEWNS), "unshare")
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    protect.mount("none", "/", None, protect.MS_REC | protect.MS_PRIVATE)
    protect.mount("tmpfs", str(folder), "tmpfs", 0, f"size={room}")


def full_at_the_end(run_dir, room):
    """A disk of its own for a run, of which others take all but `room` bytes while the last checkpoint is
    written."""
    small_disk(run_dir, 64 << 20)
    real = Checkpointer._write

    def write(saver, step, *arguments):
        if step < SHORT["train__max_steps"]:
            return real(saver, step, *arguments)
        free = os.statvfs(run_dir)
        filler = run_dir / "filler"
        filler.write_bytes(bytes(max(0, free.f_bavail * free.f_bsize - room)))
        try:
            return real(saver, step, *arguments)
        finally:
            filler.unlink()

    Checkpointer._write = write


def keep(run_dir):
    """Copies what the small disk holds to where others see it."""
    shutil.copytree(run_dir, f"{run_dir}-kept")


def main(root, repeats, *names):
    tiny_model()
    scenarios, out = Scenarios(Path(root), int(repeats)), {}
    for name, method in inspect.getmembers(scenarios, inspect.isgeneratorfunction):
        if names and name not in names:
            continue
        survived, seen, error = 0, "", None
        generator = method()
        try:
            while True:
                next(generator)
                survived += 1
        except StopIteration as stop:
            seen = stop.value
        except BaseException:
            error = traceback.format_exc()
        out[name] = {"survived": survived, "of": int(repeats), "seen": seen, "error": error}
        print(f"{name}: {survived} of {repeats} survived; {seen}", file=sys.stderr, flush=True)
    print(json.dumps(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
