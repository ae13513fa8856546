"""pact-fast bench: sub-commands run, gate, write rows with every column, and outlive providers that throw."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import main, ops, rows, targets
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
    assert "the targets are a GPU's" in capsys.readouterr().out  # nothing is claimed of a CPU


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


def test_a_second_call_goes_on_where_the_first_ended(tmp_path, monkeypatch, capsys):
    """Rows of this commit are not measured again; those of another commit count for nothing."""
    path, measured = tmp_path / "some.csv", []

    def measure(out, op, shape, mode, *_, **__):
        measured.append(mode)
        out.add(op.name, "pact_fast/any", mode, shape, torch.float32, "time", "ms", [1.0])

    monkeypatch.setattr(ops, "measure", measure)
    monkeypatch.setattr(ops, "print_table", lambda rows: None)
    words = ["ops", "--op", "linear_logprob", "--shapes", "main", "--out", str(path), "--resume"]
    both = ["forward", "forward+backward"]
    for expected in (both, []):
        measured.clear()
        assert main.main(words) == 0
        assert measured == expected
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if ",forward," not in line) + "\n")  # cut in the first
    assert main.main(words) == 0
    assert measured == ["forward"]
    commit = rows_of(path)[0]["commit"]
    path.write_text(path.read_text().replace(f",{commit}\n", ",0000000\n"))
    measured.clear()
    assert main.main(words) == 0
    assert measured == both
    capsys.readouterr()


def h100(**changes):
    """The rows of the first run, with the medians of some (op, mode, provider, metric) changed."""
    found = rows_of(ROOT / "bench" / "results" / "h100-2026-11-26.csv")
    for row in found:
        row["p50"] = changes.get(f"{row['op']} {row['mode']} {row['provider']} {row['metric']}", row["p50"])
    return found


def line(found, what):
    (target,) = (t for t in targets.TARGETS if t.what == what)
    return targets.line_of(found, target)


def test_targets_state_value_verdict_and_the_best_peer():
    assert "6.017    MISSED" in line(h100(), "cross-entropy, peak GiB")
    assert "2.509 GiB, cut-cross-entropy/cce" in line(h100(), "cross-entropy, peak GiB")
    assert "1.059    met" in line(h100(), "PACT loss / 3 GEMMs, H=4096")
    assert "2.1      MISSED" in line(h100(), "one by one / tree, same layers")
    faster = {"train_step whole pact_fast time": "900"}
    assert "900      met" in line(h100(**faster), "training step, tree, ms")
    assert line(h100(), "attention fa4, forward, TFLOP/s").endswith("not measured")


def test_red_tests_leave_no_claim(capsys):
    targets.print_targets(h100(), "red")
    assert "nothing below is a claim" in capsys.readouterr().out
    targets.print_targets(h100(), "green")
    assert "nothing below" not in capsys.readouterr().out


def test_the_script_of_the_gpu_goes_on_after_a_part_that_fails_and_a_second_call_with_what_is_left(tmp_path):
    """bench/gpu.sh with a Python that fails in one bench and is cut in another."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"""#!/bin/bash
echo "$*" >> {tmp_path}/calls
case "$*" in
*"ops --op tree_attention"*) exit 7 ;;
*"tree streaming"*) [ -e {tmp_path}/fast ] || sleep 30 ;;
esac
exit 0
""")
    python.chmod(0o755)
    where = {"DRY_RUN": "1", "VENV_GPU": str(tmp_path / "venv"), "OUT": str(tmp_path / "out")}
    script = (ROOT / "bench" / "gpu.sh").read_text()
    script = script.replace("SCALE=10", "SCALE=1").replace("bench 60 tree", "bench 2 tree")
    copy = tmp_path / "repo" / "bench" / "gpu.sh"
    copy.parent.mkdir(parents=True)
    copy.write_text(script)

    def call():
        done = subprocess.run(
            ["bash", str(copy)], env=os.environ | where, capture_output=True, text=True, timeout=60
        )
        text = (tmp_path / "calls").read_text()
        (tmp_path / "calls").write_text("")
        return done.returncode, done.stderr, text

    code, said, calls = call()
    assert code == 1
    assert "attention failed (status 7); the rest goes on" in said
    assert "streaming was cut short" in said
    for bench in (
        "tree_attention",
        "linear_pact_loss",
        "tree model",
        "tree streaming",
        "others",
        "--targets",
    ):
        assert bench in calls, bench
    (tmp_path / "fast").touch()
    code, said, calls = call()
    assert code == 1
    assert "tree_attention" in calls
    assert "tree streaming" in calls
    assert "tree model" not in calls
    assert "--targets" in calls
    code, said, calls = call()
    assert "tree streaming" not in calls


def test_a_tree_over_the_budget_is_timed_both_ways_after_their_gradients_agreed(tmp_path):
    from bench.tree_streaming import Over, bench_streaming

    out = rows.Rows(tmp_path / "some.csv", "cpu", echo=False)
    bench_streaming(out, 0.0, 1, [Over(prefix=40, y=20, group=3, budget=65)])
    assert not out.failed
    assert {row["impl"] for row in out.rows if row["metric"] == "time"} == {"stream", "recompute"}
    assert "time over the streamed" in {row["metric"] for row in out.rows}
