"""Times tile shapes of the Triton tree attention that are worth a try, in one run, and prints the table.

    pact-fast bench tiles [--head-dim 128 ...] [--seconds 2] [--rounds 5] [--first N] [--out PATH]

The candidates stand in kernels/tree_attention/tiles.py, the default of each first. One kernel at a time gets
another tile, the other two keep theirs: a time of dq or dkv is that of the whole backward, so differences
within a table are the kernel's. A candidate must give what the default gives before it is timed. On a GPU:
bf16 at the main lengths with 16 query and 8 kv heads. Elsewhere under TRITON_INTERPRET=1, at a few tokens:
shows that it runs.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.geometry import GPU_SWEEP, Geometry
from bench.rows import LOCAL, OUT_HELP, Rows
from bench.runner import DEVICE, DTYPE, GPU, free, reason, relative_error, timings
from pact_fast import pack_tree
from pact_fast.kernels.tree_attention.layout import tree_depth
from pact_fast.kernels.tree_attention.tiles import CANDIDATES, TilePlan, Tiles

KERNELS = {"fwd": "forward", "dq": "backward", "dkv": "backward"}


def main(argv: Sequence[str]) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="pact-fast bench tiles", description=__doc__, formatter_class=formatter
    )
    parser.add_argument("--head-dim", type=int, nargs="+", default=[128], choices=sorted(CANDIDATES))
    parser.add_argument("--seconds", type=float, default=2.0, help="time per kernel (default 2)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, at least (default 5)")
    parser.add_argument("--first", type=int, help="only the first N candidates of each kernel")
    parser.add_argument("--out", type=Path, default=LOCAL, help=OUT_HELP)
    args = parser.parse_args(argv)
    if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("the tiles are a GPU's; TRITON_INTERPRET=1 shows on a CPU that it runs")
    out = Rows(args.out, DEVICE, echo=False)
    for head_dim in args.head_dim:
        for kernel in KERNELS:
            time_kernel(out, head_dim, kernel, args.seconds, args.rounds, args.first)
    return out.status()


def time_kernel(
    out: Rows, head_dim: int, kernel: str, seconds: float, rounds: int, first: int | None
) -> None:
    """Rows and a table of one kernel's candidates, the fastest first."""
    defaults = Tiles(*(tiles[0] for tiles in CANDIDATES[head_dim]))
    work = Work(head_dim)
    runs: dict[str, Callable[[], list[Tensor]]] = {}
    want: list[Tensor] = []
    for tile in getattr(CANDIDATES[head_dim], kernel)[:first]:
        name = "pact_fast/{}x{} w{} s{}".format(*tile)
        run = partial(work.run, KERNELS[kernel], defaults._replace(**{kernel: tile}))
        try:
            got = run()
            want = want or [x.double() for x in got]
            error = max(relative_error(a, b) for a, b in zip(got, want, strict=True))
            if not error < (1e-2 if GPU else 1e-4):
                raise RuntimeError(f"gate: off by {error:.1e}")
            runs[name] = run
        except Exception as error:  # does not fit the shared memory, say
            out.leave_out(f"tree_attention {kernel}", name, f"not here: {reason(error)}")
            free()
    samples, failed = timings(runs, DEVICE, seconds, rounds)
    for name, why in failed.items():
        out.leave_out(f"tree_attention {kernel}", name, why)
    print(f"\n{kernel}, head_dim {head_dim}, {work.shape}: ms of the whole {KERNELS[kernel]}")
    for name, values in sorted(samples["time"].items(), key=lambda item: sorted(item[1])[len(item[1]) // 2]):
        out.add("tree_attention_tiles", name, kernel, work.shape, DTYPE, "time", "ms", values)
        row = out.rows[-1]
        print(f"  {row['impl']:16s} {row['p50']:>8s}  ({row['p20']} to {row['p80']})")
    free()


class Work:
    """Inputs of one head_dim, and the two calls with tiles of one's choice."""

    def __init__(self, head_dim: int) -> None:
        from pact_fast.kernels.tree_attention import triton as kernels

        self.kernels = kernels
        geometry, heads, kv_heads = (GPU_SWEEP[0], 16, 8) if GPU else (Geometry(12, 8, 8, 1), 2, 1)
        pack = pack_tree(geometry.sequences("both", 1000)[0]).to(DEVICE)
        self.shape = f"{geometry} Hq={heads} Hkv={kv_heads} D={head_dim}"
        self.plan = TilePlan(pack.subtree_end, tree_depth(pack.subtree_end.cpu().numpy()), None)
        g = torch.Generator(device=DEVICE).manual_seed(0)
        self.q, self.k, self.v, self.d_out = (
            torch.randn(pack.num_tokens, h, head_dim, generator=g, device=DEVICE).to(DTYPE)
            for h in (heads, kv_heads, kv_heads, heads)
        )
        self.scale = head_dim**-0.5
        self.forward = self.run("forward", Tiles(*(tiles[0] for tiles in CANDIDATES[head_dim])))

    def run(self, what: str, tiles: Tiles) -> list[Tensor]:
        plan = self.plan
        lists = [*plan.lists(tiles.fwd), *plan.lists(tiles.dq), plan.key_order(tiles.dkv)]
        rest = plan.end, plan.depth, lists, [size for tile in tiles for size in tile], self.scale, 0, 0
        if what == "forward":
            return list(self.kernels.tree_attention_op(self.q, self.k, self.v, *rest))
        backward = self.kernels.tree_attention_backward_op
        return list(backward(self.d_out, None, self.q, self.k, self.v, *self.forward, *rest))
