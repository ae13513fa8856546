"""The ops beside their peers: times, prints a table, writes CSV rows and a plot.

    pact-fast bench ops [--op NAME] [--provider TEXT] [--seconds 2] [--shapes main|others|all] [--out PATH]
    pact-fast bench ops --targets    the targets, from the CSV rows that are there

On a GPU: bf16 at real sizes. Elsewhere: fp32 at small ones, to see that everything runs. A provider must pass
the correctness gate (against fp64) before it is timed; one that is not installed is listed with the reason.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import bench.decode
import bench.head
import bench.tree_attention  # noqa: F401  they register their ops
from bench.registry import OPS
from bench.report import plot, print_table
from bench.rows import LOCAL, OUT_HELP, Rows, read_csv
from bench.runner import DEVICE, DTYPE, GPU, measure, reason
from bench.targets import print_targets


def parse(argv: Sequence[str]) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="pact-fast bench ops", description=__doc__, formatter_class=formatter
    )
    parser.add_argument("--op", action="append", choices=sorted(OPS), help="only this op (may be repeated)")
    parser.add_argument("--provider", default="", help="only providers whose name contains this")
    parser.add_argument("--seconds", type=float, default=2.0, help="time per op, shape and mode (default 2)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, at least (default 5)")
    parser.add_argument(
        "--shapes",
        choices=("main", "others", "all"),
        default="all",
        help="the first shape of an op, the rest, or all",
    )
    parser.add_argument("--out", type=Path, default=LOCAL, help=f"{OUT_HELP}; the plot lies beside it")
    parser.add_argument("--targets", action="store_true", help="print the targets from the rows in --out")
    parser.add_argument("--tests", choices=("green", "red", "not run"), help="with --targets: the GPU tests")
    parser.add_argument(
        "--resume", action="store_true", help="leave out what this commit has rows of in --out"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    if args.targets:
        rows = read_csv(args.out)
        if not rows:
            print(f"no CSV rows in {args.out}: run pact-fast bench first", file=sys.stderr)
            return 1
        print_targets(rows, args.tests)
        return 0
    out = Rows(args.out, DEVICE, echo=False, resume=args.resume)
    bench_ops(out, args.op or OPS, args.shapes, args.seconds, args.rounds, args.provider)
    try:
        plot(out.rows, out.path.with_suffix(".png"))
    except ImportError as error:
        print(f"no plot: {error}")
    return out.status()


def bench_ops(
    out: Rows, names: Iterable[str], shapes: str, seconds: float, rounds: int, provider: str = ""
) -> None:
    """Measures ops at their "main" shape, the "others" or "all", with providers whose name has `provider`."""
    for name in names:
        op = OPS[name]
        every = op.gpu_shapes if GPU else op.cpu_shapes
        for shape in {"main": every[:1], "others": every[1:], "all": every}[shapes]:
            for mode in op.modes:
                if out.has(op.name, mode, shape):
                    continue
                begin = len(out.rows)
                try:
                    measure(
                        out, op, shape, mode, DTYPE, DEVICE, seconds=seconds, least=rounds,
                        wanted=lambda n: provider in n,
                    )  # fmt: skip
                except Exception as error:  # the inputs, say, do not fit: the rest still runs
                    out.leave_out(f"{op.name} {mode} {shape}", "pact_fast and its peers", reason(error))
                print_table(out.rows[begin:])
