"""The packer: sequence tokens a second."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from bench.rows import Rows
from bench.runner import timings
from pact_fast import pack_tree
from pact_fast.kernels.tree_attention import native


def bench_packer(out: Rows, seconds: float, least: int = 5) -> None:
    """2,048 sequences of 5,000 tokens, 32 behind each of 64 prompts of 3,500, on at most 2 cores.

    By the wall, and by the processor's time of all threads: what one core that does nothing else would do.
    """
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, 150_000, 3500) for _ in range(64)]
    sequences = [np.concatenate((x, draw.integers(0, 150_000, 1500))) for x in prompts for _ in range(32)]
    total = sum(map(len, sequences))
    impls = ("native", "numpy") if native.library() is not None else ("numpy",)
    runs = {f"pact_fast/{impl}": lambda impl=impl: pack_tree(sequences, impl=impl) for impl in impls}
    with at_most_cores(2):
        for run in runs.values():
            run()
        kinds, failed = timings(runs, "cpu", seconds, least)
    for what, samples in kinds.items():
        for name, values in samples.items():
            rates = [total / ms / 1e3 for ms in values]
            metric = f"tokens over {what}"
            out.add("pack_tree", name, "whole", "2048 x 5000", torch.int64, metric, "Mtoken/s", rates)
    for name, why in failed.items():
        out.leave_out("pack_tree", name, why)


@contextmanager
def at_most_cores(count: int) -> Iterator[None]:
    """Binds the process to its first `count` cores, if it can; the packer starts as many threads."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
