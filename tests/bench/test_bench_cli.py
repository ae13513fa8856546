"""pact-fast bench: sub-commands run, gate, write rows with every column, and outlive providers that throw."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import main, ops, rows
from bench import tiles as bench_tiles
from bench.registry import OPS, provider
from pact_fast.commands import bench as bench_cli
from pact_fast.kernels.tree_attention import tiles

ROOT = Path(__file__).resolve().parent.parent.parent
QUICK = ("--shapes", "main", "--seconds", "0.01", "--rounds", "2")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def add(monkeypatch):
    """Registers a provider of linear_logprob for this test alone."""
    op = OPS["linear_logprob"]
    monkeypatch.setattr(op, "providers", dict(op.providers))
    return lambda name, maker: provider(op, name)(maker)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_cpu_subset_writes_rows_a_plot_and_targets(tmp_path, capsys):
    words = ["--op", "linear_logprob", "--shapes", "main", "--seconds", "0.05", "--out", str(tmp_path)]
    assert bench_cli.main(words) == 0  # without a sub-command: ops
    found = rows_of(tmp_path / "cpu.csv")
    assert {"pact_fast/torch", "torch/logits", "gemms/1+3"} <= {f"{r['provider']}/{r['impl']}" for r in found}
    assert {r["mode"] for r in found} == {"forward", "forward+backward"}
    for row in found:
        assert tuple(row) == rows.COLUMNS
        assert 0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
        assert row["commit"]
        assert row["torch"]
    assert (tmp_path / "cpu.png").stat().st_size > 1000
    assert main.main(["ops", "--targets", "--out", str(tmp_path)]) == 0
    assert "not measured" in capsys.readouterr().out  # nothing is claimed for what was not run


def test_a_provider_that_fails_the_gate_is_named_and_not_timed(add, tmp_path, capsys):
    right = OPS["linear_logprob"].providers["pact_fast/torch"]

    def wrong(inputs, mode):
        run = right(inputs, mode)
        return lambda: {name: value * 1.002 for name, value in run().items()}

    add("pact_fast/wrong", wrong)
    words = ["ops", "--op", "linear_logprob", "--provider", "pact_fast", *QUICK]
    assert main.main([*words, "--out", str(tmp_path)]) == 1
    assert "pact_fast/wrong: RuntimeError: gate: logprobs is off" in capsys.readouterr().out
    assert "wrong" not in (tmp_path / "cpu.csv").read_text()


@pytest.mark.parametrize(("name", "status"), [("peer/moody", 0), ("pact_fast/moody", 1)])
def test_a_provider_that_throws_while_it_is_timed_is_a_line_and_the_rest_go_on(
    add, tmp_path, capsys, name, status
):
    right = OPS["linear_logprob"].providers["torch/logits"]

    def moody(inputs, mode):
        run, calls = right(inputs, mode), []

        def once():
            calls.append(1)
            if len(calls) == 3:  # the first is of the trial before, this one of the second round
                raise MemoryError("no more of it")
            return run()

        return once

    add(name, moody)
    words = ["ops", "--op", "linear_logprob", "--op", "linear_pact_loss", *QUICK]
    assert main.main([*words, "--out", str(tmp_path / "some.csv")]) == status
    out = capsys.readouterr().out
    assert f"left out: linear_logprob forward {name}: MemoryError: no more of it" in out
    found = rows_of(tmp_path / "some.csv")
    assert not any(row["impl"] == "moody" for row in found)
    assert {row["op"] for row in found} == {"linear_logprob", "linear_pact_loss"}


def test_inputs_that_do_not_fit_end_their_shape_and_not_the_bench(monkeypatch, tmp_path, capsys):
    def full(*_):
        raise MemoryError("[V, H]")

    monkeypatch.setattr(OPS["linear_cross_entropy"], "make_inputs", full)
    words = ["ops", "--op", "linear_cross_entropy", "--op", "linear_logprob", *QUICK]
    assert main.main([*words, "--out", str(tmp_path)]) == 1
    assert "MemoryError: [V, H]" in capsys.readouterr().out
    assert {row["op"] for row in rows_of(tmp_path / "cpu.csv")} == {"linear_logprob"}


def test_a_row_is_in_the_file_when_it_is_added(tmp_path):
    out = rows.Rows(tmp_path / "some.csv", "cpu")
    for n in (1, 2):
        out.add("an_op", "a/b", "whole", "N=1", torch.float32, "time", "ms", [1.0, 2.0, 3.0])
        assert [row["p50"] for row in rows_of(tmp_path / "some.csv")] == ["2"] * n
    assert len(rows_of(tmp_path / "some.csv")) == len(rows.read_csv(tmp_path)) == 2


def test_a_file_with_other_columns_is_refused_and_left_as_it_is(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"mine.csv has other columns"):
        rows.Rows(path, "cpu")
    assert path.read_text() == "a,b\n1,2\n"


def test_without_out_no_tracked_file_is_written(capsys):
    for command in ("ops", "tree", "step"):
        with pytest.raises(SystemExit):
            main.main([command, "--help"])
        assert f"default {rows.LOCAL.relative_to(ROOT)}" in " ".join(capsys.readouterr().out.split())
    assert ops.parse([]).out == rows.LOCAL
    ignored = subprocess.run(["git", "check-ignore", str(rows.LOCAL)], cwd=ROOT, capture_output=True)
    assert ignored.returncode == 0 or not (ROOT / ".git").exists()


def test_every_sub_command_is_reached_through_pact_fast_from_anywhere(tmp_path):
    code = """
import sys
from pact_fast.cli import main
from pact_fast.commands.bench import load
for command in load().COMMANDS:
    try:
        main(["bench", command, "--help"])
    except SystemExit as end:
        assert end.code == 0
assert main(["bench", "nothing"]) == 2
assert not any(path.endswith("bench") for path in sys.path)
"""
    # The package as an editable install has it: on sys.path without the repository's other folders.
    (tmp_path / "pact_fast").symlink_to(ROOT / "pact_fast")
    places = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=places, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for command in main.COMMANDS:
        assert f"usage: pact-fast bench {command}" in done.stdout


def test_targets_without_rows_say_what_to_do(tmp_path, capsys):
    assert main.main(["ops", "--targets", "--out", str(tmp_path)]) == 1
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
sys.path[:0] = [".", "tests/ops"]
modules = "bench.ops bench.tree test_head_gpu test_head_kernels test_decode_kernels"
for module in [*modules.split(), "tests.tree.test_tree_kernels"]:
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


def test_the_default_tiles_are_the_first_candidates():
    """What `bench tiles` prints beside the default is compared with what is really run."""
    for head_dim, candidates in tiles.CANDIDATES.items():
        chosen = tiles.choose_tiles(head_dim, torch.bfloat16, (9, 0))
        for name, default in chosen._asdict().items():
            if head_dim == 96:  # runs with the tiles of 128 until its own are measured
                continue
            assert getattr(candidates, name)[0] == default, (head_dim, name)
            assert len(set(getattr(candidates, name))) == len(getattr(candidates, name)) >= 4


def test_tiles_are_timed_after_they_gave_the_defaults_result(tmp_path, monkeypatch, capsys):
    pytest.importorskip("triton")
    few = tiles._tiles("16x16 w1 s1", "16x32 w1 s1", "32x16 w1 s1")
    monkeypatch.setattr(bench_tiles, "CANDIDATES", {16: tiles.Candidates(few, few, few)})
    out = rows.Rows(tmp_path / "tiles.csv", "cpu", echo=False)
    good = bench_tiles.Work.run

    def wrong(self, what, chosen):
        return [x * (1.1 if chosen.fwd == few[1] else 1) for x in good(self, what, chosen)]

    monkeypatch.setattr(bench_tiles.Work, "run", wrong)
    bench_tiles.time_kernel(out, 16, "fwd", 0.0, 1, None)
    assert [row["impl"] for row in out.rows] != []
    assert {row["impl"] for row in out.rows} == {"16x16 w1 s1", "32x16 w1 s1"}
    assert "16x32 w1 s1: not here: RuntimeError: gate" in capsys.readouterr().out
