"""pact-fast bench: the CPU subset runs, gates, writes rows with every column, and knows its targets."""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from pact_fast import bench_cli

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*words):
    code = "import sys; from pact_fast.bench_cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_the_cpu_subset_writes_rows_a_plot_and_targets(tmp_path):
    done = run("--op", "linear_logprob", "--main-shape", "--seconds", "0.05", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"pact_fast/torch", "torch/logits", "gemms/1+3"} <= {f"{r['provider']}/{r['impl']}" for r in rows}
    assert {r["mode"] for r in rows} == {"forward", "forward+backward"}
    for row in rows:
        assert 0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
        assert row["gpu"] == "cpu"
        assert row["commit"]
        assert row["torch"]
    assert (tmp_path / "cpu.png").stat().st_size > 1000
    targets = run("--targets", "--out", str(tmp_path))
    assert "scoring / 1 GEMM" in targets.stdout
    assert "not measured" in targets.stdout  # nothing is claimed for what was not run


def test_a_provider_that_fails_the_gate_is_named_and_not_timed(tmp_path):
    spec = importlib.util.spec_from_file_location("bench_main", ROOT / "bench" / "main.py")
    bench = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    try:
        spec.loader.exec_module(bench)
        op = bench.OPS["linear_logprob"]

        @bench.head.provider(op, "pact_fast/wrong")
        def wrong(inputs, mode):
            right = op.providers["pact_fast/torch"](inputs, mode)
            return lambda: {name: value + 1 for name, value in right().items()}

        assert bench.main(["--op", op.name, "--main-shape", "--seconds", "0.01", "--out", str(tmp_path)]) == 1
    finally:
        op.providers.pop("pact_fast/wrong")
        sys.path[:] = path
    assert "wrong" not in (tmp_path / "cpu.csv").read_text()


def test_an_install_without_the_repository_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_cli, "__file__", str(tmp_path / "pact_fast" / "bench_cli.py"))
    with pytest.raises(FileNotFoundError, match="come with the repository"):
        bench_cli.main([])


def test_no_kernel_spills_registers():
    """The resource report of the default configurations, in a process without the interpreter."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "bench/resources.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 problems" in done.stdout
