"""The packer: sequence tokens a second."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from runner import timings
from tree_common import Rows

from pact_fast import pack_tree
from pact_fast.kernels.tree_attention import native
from pact_fast.train.build import keep_freed_memory


def bench_packer(seconds: float, least: int = 5) -> Iterator[list[dict[str, object]]]:
    """2,048 sequences of 5,000 tokens, 32 behind each of 64 prompts of 3,500, on at most 2 cores.

    By the wall, and by the processor's time of all threads: what one core that does nothing else would do.
    """
    rows = Rows()
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, 150_000, 3500) for _ in range(64)]
    sequences = [np.concatenate((x, draw.integers(0, 150_000, 1500))) for x in prompts for _ in range(32)]
    total = sum(map(len, sequences))
    impls = ("native", "numpy") if native.library() is not None else ("numpy",)
    runs = {f"pact_fast/{impl}": lambda impl=impl: pack_tree(sequences, impl=impl) for impl in impls}
    keep_freed_memory()  # as a trainer on a CPU does: 150 MB a call are not faulted in again
    with at_most_cores(2):
        for run in runs.values():
            run()
        kinds = timings(runs, "cpu", seconds, least)
    for what, samples in kinds.items():
        for name, values in samples.items():
            rates = [total / ms / 1e3 for ms in values]
            rows.add("pack_tree", name, "whole", "2048 x 5000", f"tokens over {what}", "Mtoken/s", rates)
    yield rows.take()


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
