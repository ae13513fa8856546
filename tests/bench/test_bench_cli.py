"""pact-fast bench: the CPU subset runs, gates, writes rows with every column, and knows its targets."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pact_fast.commands import bench as bench_cli

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def bench(monkeypatch):
    """bench/main.py as `pact-fast bench` loads it; what it puts on sys.path goes again."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    torch.set_num_threads(1)
    return bench_cli.load()


def test_the_cpu_subset_writes_rows_a_plot_and_targets(bench, tmp_path, capsys):
    words = ["--op", "linear_logprob", "--shapes", "main", "--seconds", "0.05", "--out", str(tmp_path)]
    assert bench.main(words) == 0
    with (tmp_path / "cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"pact_fast/torch", "torch/logits", "gemms/1+3"} <= {f"{r['provider']}/{r['impl']}" for r in rows}
    assert {r["mode"] for r in rows} == {"forward", "forward+backward"}
    for row in rows:
        assert 0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
        assert row["commit"]
        assert row["torch"]
    assert (tmp_path / "cpu.png").stat().st_size > 1000
    assert bench.main(["--targets", "--out", str(tmp_path)]) == 0
    assert "not measured" in capsys.readouterr().out  # nothing is claimed for what was not run


def test_a_provider_that_fails_the_gate_is_named_and_not_timed(bench, tmp_path, capsys):
    op = bench.OPS["linear_logprob"]

    @bench.head.provider(op, "pact_fast/wrong")
    def wrong(inputs, mode):
        right = op.providers["pact_fast/torch"](inputs, mode)
        return lambda: {name: value + 1 for name, value in right().items()}

    words = ["--op", op.name, "--provider", "pact_fast", "--shapes", "main", "--seconds", "0.01"]
    assert bench.main([*words, "--out", str(tmp_path)]) == 1
    assert "pact_fast/wrong: RuntimeError: gate: logprobs is off" in capsys.readouterr().out
    assert "wrong" not in (tmp_path / "cpu.csv").read_text()


def test_targets_without_rows_say_what_to_do(bench, tmp_path, capsys):
    assert bench.main(["--targets", "--out", str(tmp_path)]) == 1
    assert "run pact-fast bench first" in capsys.readouterr().err


def test_an_install_without_the_repository_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_cli, "__file__", str(tmp_path / "pact_fast" / "bench_cli.py"))
    with pytest.raises(FileNotFoundError, match="come with the repository"):
        bench_cli.main([])


HIDE = """
import importlib, importlib.machinery, sys
hidden = set("hypothesis jsonargparse scipy pyarrow tensorboard matplotlib psutil peft".split())
hidden |= set("liger_kernel trl prefix_grouper accelerate datasets pytest_timeout xdist".split())
find = importlib.machinery.PathFinder.find_spec
def find_spec(cls, name, path=None, target=None):
    return None if name.split(".")[0] in hidden else find(name, path, target)
importlib.machinery.PathFinder.find_spec = classmethod(find_spec)
sys.path[:0] = [".", "bench", "tests/ops"]
for module in "main tree test_head_gpu test_head_kernels tests.tree.test_tree_kernels".split():
    importlib.import_module(module)
assert not hidden & set(sys.modules)
"""


def test_make_gpu_imports_no_more_than_torch_triton_transformers_and_pytest():
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", HIDE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(900)
def test_no_kernel_spills_registers():
    """The resource report of the default configurations, in a process without the interpreter."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "bench/resources.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=880,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 problems" in done.stdout
