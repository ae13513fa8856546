"""pact-fast bench: times the ops beside their peers, prints a table, writes CSV rows and a plot.

    pact-fast bench [--op NAME] [--provider TEXT] [--seconds 2] [--shapes main|others|all] [--out FOLDER]
    pact-fast bench --targets        the targets, from the CSV rows that are there

On a GPU: bf16 at real sizes. Elsewhere: fp32 at small ones, to see that everything runs. A provider must pass
the correctness gate (against fp64) before it is timed; one that is not installed is listed with the reason.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import head  # noqa: F401  registers the LM-head ops
import torch
from registry import OPS
from report import plot, print_table, print_targets, read_csv, write_csv
from runner import measure

RESULTS = Path(__file__).resolve().parent / "results"


def parse(argv: list[str]) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="pact-fast bench", description=__doc__, formatter_class=formatter)
    parser.add_argument("--op", action="append", choices=sorted(OPS), help="only this op (may be repeated)")
    parser.add_argument("--provider", default="", help="only providers whose name contains this")
    parser.add_argument("--seconds", type=float, default=2.0, help="time per op, shape and mode (default 2)")
    parser.add_argument(
        "--shapes",
        choices=("main", "others", "all"),
        default="all",
        help="the first shape of an op, the rest, or all",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV and the plot")
    parser.add_argument("--targets", action="store_true", help="print the targets from the rows in --out")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.targets:
        rows = read_csv(sorted(args.out.glob("*.csv")))
        if not rows:
            print(f"no CSV rows in {args.out}: run pact-fast bench first", file=sys.stderr)
            return 1
        print_targets(rows)
        return 0
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    label = torch.cuda.get_device_name().replace(" ", "-").lower() if gpu else "cpu"
    every, failed = [], False
    for name in args.op or list(OPS):
        op = OPS[name]
        shapes = op.gpu_shapes if gpu else op.cpu_shapes
        for shape in {"main": shapes[:1], "others": shapes[1:], "all": shapes}[args.shapes]:
            for mode in op.modes:
                rows, left_out = measure(
                    op, shape, mode, dtype, device, seconds=args.seconds, wanted=lambda n: args.provider in n
                )
                print_table(rows, left_out)
                write_csv(args.out / f"{label}.csv", rows)
                every += rows
                # a peer may fail; one of ours may only be unavailable
                ours = [why for name, why in left_out.items() if name.startswith("pact_fast")]
                failed |= not all(why.startswith("not here") for why in ours)
    try:
        plot(every, args.out / f"{label}.png")
    except ImportError as error:
        print(f"no plot: {error}")
    print(f"{len(every)} rows appended to {args.out / f'{label}.csv'}")
    return 1 if failed or not every else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
