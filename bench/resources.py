"""Ahead-of-time resource report of every Triton kernel, without a GPU; fails on a spill that is not stated.

    pact-fast bench resources [--arch 80 90 100] [--all] [--filter TEXT] [--csv FILE]
    python bench/resources.py ...    the same

Compiles each case of kernel_cases.py, tree_kernel_cases.py and decode_cases.py for sm_80, sm_90 and sm_100,
reads registers and stack from the cubin, spills from ptxas, and counts the tensor-core and bulk-copy
instructions in the PTX. Each case is compiled in a process of its own, because a crash of the compiler would
end this one.
TRITON_INTERPRET is unset first: it replaces the compiler.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
if TYPE_CHECKING:
    from bench.kernel_cases import Case

COLUMNS = (
    "kernel",
    "arch",
    "registers",
    "spill_bytes",
    "stack_bytes",
    "shared_kb",
    "wgmma",
    "tcgen05",
    "tma",
    "seconds",
)
TIME_LIMIT = 300  # seconds a case; the slowest takes about 10 s of an idle core


def default_cases() -> list[Case]:
    """Every kernel as Qwen3 runs it, in bf16."""
    from bench.decode_cases import decode_cases
    from bench.kernel_cases import QWEN_VOCAB, gradient_cases, row_cases
    from bench.tree_kernel_cases import tree_cases

    tree = [*tree_cases("bf16", 128), *tree_cases("bf16", 64)]
    # Of the windowed kernels the one whose tile has the least room: it spilled with a larger one.
    tree += [c for c in tree_cases("bf16", 128, window=True) if c.arch == 90 and " dkv " in c.name]
    return [*row_cases("bf16", QWEN_VOCAB), *gradient_cases("bf16"), *tree, *decode_cases()]


def all_cases() -> list[Case]:
    """Other dtypes, vocabularies and head dimensions, too."""
    from bench.decode_cases import more_decode_cases
    from bench.kernel_cases import QWEN_VOCAB, gradient_cases, row_cases
    from bench.tree_kernel_cases import tree_cases

    more = [
        case for dtype in ("fp16", "fp32") for case in (*row_cases(dtype, QWEN_VOCAB), *gradient_cases(dtype))
    ]
    small = [case for dtype in ("bf16", "fp32") for case in row_cases(dtype, 512)]
    tree = [*tree_cases("fp16", 128), *tree_cases("bf16", 96), *tree_cases("bf16", 256)]
    tree += tree_cases("bf16", 128, window=True)
    return default_cases() + more + small + list(row_cases("bf16", 50_257)) + tree + more_decode_cases()


def compile_case(case: Case, arch: int) -> dict[str, object]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    aligned = [name for name, kind in case.types.items() if kind.startswith("*") or name in case.aligned]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(case.kernel, signature, constants, attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    start = time.perf_counter()
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    seconds = time.perf_counter() - start
    ptx = built.asm["ptx"]
    target = re.search(r"^\.target (sm_\w+)", ptx, re.M)[1]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "k.ptx").write_text(ptx)
        command = [get_ptxas(arch).path, "-v", f"-arch={target}", "k.ptx", "-o", "k.cubin"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    log = done.stdout + done.stderr
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    if done.returncode or spills is None or registers is None:
        raise RuntimeError(f"ptxas ended with {done.returncode}:\n{log}")
    missing = [word for word in case.want if word not in ptx]
    if missing:
        raise RuntimeError(f"the PTX lacks {', '.join(missing)}")
    return {
        "kernel": case.name,
        "arch": f"sm_{arch}",
        "registers": int(registers[1]),
        "spill_bytes": int(spills[2]) + int(spills[3]),
        "stack_bytes": int(spills[1]),
        "shared_kb": round(built.metadata.shared / 1024, 1),
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "tcgen05": len(re.findall(r"tcgen05\.mma", ptx)),
        "tma": len(re.findall(r"cp\.async\.bulk", ptx)),
        "seconds": round(seconds, 1),
    }


def _child(case: Case, arch: int, pipe) -> None:
    try:
        pipe.send(compile_case(case, arch))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def measure(case: Case, arch: int) -> dict[str, object]:
    """compile_case in a forked process; RuntimeError with the reason where it crashes, fails or hangs."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(case, arch, theirs))
    process.start()
    theirs.close()
    try:
        answer = ours.recv() if ours.poll(TIME_LIMIT) else f"no answer within {TIME_LIMIT} s"
    except EOFError:
        answer = "the compiler crashed"
    if process.is_alive() and isinstance(answer, str) and answer.startswith("no answer"):
        process.terminate()
    process.join()
    if isinstance(answer, str):
        raise RuntimeError(f"{case.name} sm_{arch}: {answer} (exit code {process.exitcode})")
    return answer


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="pact-fast bench resources",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--all", action="store_true", help="other dtypes and vocabularies too")
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument("--csv", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported
    # multiply-add, as every release up to 3.9 does unasked
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    import triton

    cases = [case for case in (all_cases() if args.all else default_cases()) if args.filter in case.name]
    if not cases:
        parser.error(f"no case contains {args.filter!r}")
    print(f"triton {triton.__version__}")
    print(f"{'kernel':48s} {'arch':7s} " + " ".join(f"{name:>11s}" for name in COLUMNS[2:]))
    rows, problems = [], []
    for case in cases:
        for arch in args.arch:
            if case.arch not in (None, arch):
                continue
            try:
                row = measure(case, arch)
            except RuntimeError as error:
                problems.append(str(error))
                print(error)
                continue
            rows.append(row)
            if row["spill_bytes"] > case.spills:
                stated = f", {case.spills} are stated" if case.spills else ""
                problems.append(f"{case.name} sm_{arch}: {row['spill_bytes']} bytes spilled{stated}")
            values = " ".join(f"{row[name]!s:>11s}" for name in COLUMNS[2:])
            print(f"{case.name:48s} {row['arch']:7s} {values}", flush=True)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    print(f"{len(rows)} kernels compiled, {len(problems)} problems")
    for problem in problems:
        print(f"FAIL {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
