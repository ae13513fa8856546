"""The CPU subset through pytest-benchmark: `pytest bench/ --benchmark-only`. A case passes the gate first."""

import pytest
import torch

import bench.decode
import bench.head
import bench.tree_attention  # noqa: F401  they register their ops
from bench.registry import OPS, Unavailable
from bench.runner import gate

NEEDS_GPU = ("cut-cross-entropy/", "quack/", "flex/")
PACKAGES = {"trl": "trl", "liger": "liger_kernel", "prefix_grouper": "prefix_grouper"}

CASES = [
    pytest.param(op, shape, mode, name, id=f"{op.name}-{mode}-{shape}-{name}".replace(" ", ","))
    for op in OPS.values()
    for shape in op.cpu_shapes[:1]
    for mode in op.modes
    for name in op.providers
    if not name.startswith(NEEDS_GPU) and not name.endswith(("/triton", "/fa4"))
]


@pytest.mark.parametrize(("op", "shape", "mode", "name"), CASES)
def test_benchmark(benchmark, op, shape, mode, name):
    pytest.importorskip(PACKAGES.get(name.split("/")[0], "torch"))
    torch.set_num_threads(1)
    try:
        gate(op, name, mode, torch.float32, "cpu")
        run = op.providers[name](op.make_inputs(shape, torch.float32, "cpu"), mode)
    except (Unavailable, NotImplementedError) as error:
        pytest.skip(str(error))
    benchmark.group = f"{op.name} {mode} {shape}"
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
