"""Token trees beside one-by-one packing: attention, training step, scoring pass, packer.

    python bench/tree.py [attention] [model] [packer] [--seconds 3] [--rounds 5] [--main-shape] [--out FOLDER]

On a GPU: attention at the head counts of Qwen3-1.7B and 4B, and a Qwen3-1.7B-shaped model with random
weights.
Elsewhere: a 4-layer model on the CPU, in fp32, on the wall and by the processor's time, which other load on
the machine hardly touches. All variants of a comparison are checked against each other first, and then timed
in turn in one process. Without an argument: everything.
"""

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from report import write_csv  # noqa: E402
from tree_attention import bench_attention  # noqa: E402
from tree_common import CONTEXTS, GPU, SWEEP  # noqa: E402
from tree_model import bench_model  # noqa: E402
from tree_packer import bench_packer  # noqa: E402

BENCHES = {"attention": bench_attention, "model": bench_model, "packer": bench_packer}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", help=f"of {', '.join(BENCHES)}; default: all")
    parser.add_argument("--seconds", type=float, default=3.0, help="time per comparison (default 3)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, at least (default 5)")
    parser.add_argument("--main-shape", action="store_true", help="only the main lengths and contexts")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    args = parser.parse_args(argv)
    if unknown := set(args.what) - set(BENCHES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(BENCHES)}")
    if args.main_shape:
        SWEEP[1:], CONTEXTS[1:] = [], []
    label = torch.cuda.get_device_name().replace(" ", "-").lower() if GPU else "cpu"
    for what in args.what or BENCHES:
        # Comparison by comparison: a run that is cut keeps those done.
        for rows in BENCHES[what](args.seconds, args.rounds):
            write_csv(args.out / f"{label}.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
