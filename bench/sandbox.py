"""Tool calls a second: trivial tools, so that what the sandbox itself costs is all there is.

    pact-fast bench sandbox [--calls 1000] [--workers 2] [--rounds 5] [--out PATH]

Per kind of program (a record's source: a process per call; source of this package: one process) the calls a
second on the wall, and the processor's time per call of trainer, workers and calls together, which other load
on the machine hardly touches: cores / time is what an idle machine of that many cores can do.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from bench.rows import LOCAL, OUT_HELP, Rows
from pact_fast.envs.sandbox.sandbox import Program, Sandbox, SandboxCall

PROGRAMS = 50  # among which the calls are spread, as in a batch of rollouts


def calls_of(count: int, fresh: bool) -> list[SandboxCall]:
    source = "def tool(x):\n    return x + N"
    programs = [Program(source, {"N": i}, fresh=fresh) for i in range(PROGRAMS)]
    return [SandboxCall(programs[i % PROGRAMS], "tool", {"x": i}) for i in range(count)]


def spent(processes: Sequence[psutil.Process]) -> float:
    """Processor seconds of the processes and of their children that have ended."""
    return sum(sum(process.cpu_times()[:4]) for process in processes)


def main(argv: Sequence[str]) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="pact-fast bench sandbox", description=__doc__, formatter_class=formatter
    )
    parser.add_argument("--calls", type=int, default=1000, help="of a round (default 1000)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=LOCAL, help=OUT_HELP)
    args = parser.parse_args(argv)
    out = Rows(args.out, "cpu")
    shape = f"calls={args.calls} workers={args.workers}"
    for impl, fresh in (("record", True), ("own", False)):
        calls = calls_of(args.calls, fresh)
        rates, costs = [], []
        with Sandbox(workers=args.workers, time_limit=60) as sandbox:
            if [r.value for r in sandbox.run(calls)] != [i + i % PROGRAMS for i in range(args.calls)]:
                raise RuntimeError("the sandbox gave wrong results")
            outer = [psutil.Process(worker.process.pid) for worker in sandbox.workers]
            workers = [one for process in outer for one in process.children(recursive=True)]
            for _ in range(args.rounds):
                begin, used, own = time.perf_counter(), spent(workers), time.process_time()
                sandbox.run(calls)
                rates.append(args.calls / (time.perf_counter() - begin))
                costs.append((spent(workers) - used + time.process_time() - own) / args.calls * 1e3)
        for metric, unit, values in (("calls", "1/s", rates), ("cpu time a call", "ms", costs)):
            out.add("sandbox", f"pact_fast/{impl}", "run", shape, torch.int64, metric, unit, values)
    return 0
