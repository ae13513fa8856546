"""Token trees beside one-by-one packing: attention, training step, step over the budget, scoring, packer.

    pact-fast bench tree [attention] [model] [streaming] [packer] [--seconds 3] [--rounds 5] [--main-shape]
                         [--out PATH]

On a GPU: attention at the head counts of Qwen3-1.7B and 4B, and a Qwen3-1.7B-shaped model with random
weights.
Elsewhere: a 4-layer model on the CPU, in fp32, on the wall and by the processor's time, which other load on
the machine hardly touches. All variants of a comparison are checked against each other first, and then timed
in turn in one process. Without an argument: everything.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.geometry import CONTEXTS, SWEEP
from bench.ops import bench_ops
from bench.rows import LOCAL, OUT_HELP, Rows
from bench.runner import DEVICE, GPU
from bench.tree_model import bench_model
from bench.tree_packer import bench_packer

BENCHES = ("attention", "model", "streaming", "packer")


def main(argv: Sequence[str]) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="pact-fast bench tree", description=__doc__, formatter_class=formatter
    )
    parser.add_argument("what", nargs="*", help=f"of {', '.join(BENCHES)}; default: all")
    parser.add_argument("--seconds", type=float, default=3.0, help="time per comparison (default 3)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, at least (default 5)")
    parser.add_argument("--main-shape", action="store_true", help="only the main lengths and contexts")
    parser.add_argument("--out", type=Path, default=LOCAL, help=OUT_HELP)
    parser.add_argument(
        "--resume", action="store_true", help="leave out what this commit has rows of in --out"
    )
    args = parser.parse_args(argv)
    if unknown := set(args.what) - set(BENCHES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(BENCHES)}")
    if not GPU:
        from pact_fast.train.build import keep_freed_memory

        keep_freed_memory()  # of all variants alike, as a trainer on a CPU does
    out, only = Rows(args.out, DEVICE, resume=args.resume), slice(0, 1 if args.main_shape else None)
    for what in args.what or BENCHES:
        if what == "attention":
            shapes = "main" if args.main_shape else "all"
            bench_ops(out, ["tree_attention"], shapes, args.seconds, args.rounds)
        elif what == "model":
            bench_model(out, args.seconds, args.rounds, SWEEP[only], CONTEXTS[only])
        elif what == "streaming":
            # It goes through the trainer's losses, whose packages a GPU machine may lack.
            from bench.tree_streaming import bench_streaming

            bench_streaming(out, args.seconds, args.rounds)
        else:
            bench_packer(out, args.seconds, args.rounds)
    return out.status()
