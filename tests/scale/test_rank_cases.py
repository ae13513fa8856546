"""Whatever a step holds, ranks make the same collectives, and the gradient of one process."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
CASES = int(os.environ.get("PACT_RANK_CASES", "200"))
SIZES = (1, 2, 3)
BOUND = 3e-6  # of a gradient, relative to its largest entry: fp32 sums in another order
# The divergence from a reference that the policy still equals has gradient 0, of which rounding leaves beta
# (0.05 here) times the last bits of a log-prob: nothing but that, where all advantages are 0.
NOISE = 3e-8


def run(folder, size, cases, *fault, timeout=1500):
    words = ("-m", "tests.helpers.rank_cases", str(folder), str(size), str(cases), *fault)
    places = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], env=places, timeout=timeout, cwd=ROOT)
    logs = "\n".join(p.read_text()[-3000:] for p in sorted(folder.glob(f"{size}-*.log")))
    return done.returncode, logs


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """{size: per rank (case, gradients)} of all random cases."""
    folder = tmp_path_factory.mktemp("cases")
    found = {}
    for size in SIZES:
        code, logs = run(folder, size, CASES)
        assert code == 0, logs
        found[size] = [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)]
    return found


@pytest.mark.timeout(1800)
def test_no_random_step_deadlocks_and_all_ranks_end_alike(cases):
    for size in SIZES:
        assert len(cases[size]) == size
        for rank in cases[size]:
            assert sorted(number for number, _ in rank) == list(range(CASES))
            for (_, ours), (_, theirs) in zip(rank, cases[size][0], strict=True):
                assert [g is None for g in ours] == [g is None for g in theirs]
                for a, b in zip(ours, theirs, strict=True):
                    assert (a or {}).keys() == (b or {}).keys()
                    assert all(torch.equal(a[name], b[name]) for name in a or {})


@pytest.mark.parametrize("size", SIZES[1:])
def test_several_ranks_have_the_gradient_of_one_process(cases, size):
    worst, compared = 0.0, 0
    for (number, one), (_, several) in zip(cases[1][0], cases[size][0], strict=True):
        assert len(one) == len(several)
        for a, b in zip(one, several, strict=True):
            assert (a is None) == (b is None), number
            largest = max((float(g.abs().max()) for g in (a or {}).values()), default=0.0)
            for name in a or {}:
                gap = float((a[name] - b[name]).abs().max())
                assert gap <= BOUND * largest + NOISE, (number, name, gap, largest)
                worst, compared = max(worst, gap / largest if largest > NOISE else 0.0), compared + 1
    print(f"{size} ranks, {CASES} cases, {compared} gradients: largest relative difference {worst:.1e}")
    assert compared > CASES


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("fault", "message"),
    [("collectives", "every rank has waited"), ("plans", "the ranks do not do the same")],
)
def test_ranks_that_do_different_things_are_named_within_a_minute(tmp_path, fault, message):
    started = time.monotonic()
    code, logs = run(tmp_path, 2, 0, fault, timeout=240)
    assert code != 0
    assert "RanksDisagree" in logs
    assert message in logs
    assert "rank 1:" in logs
    assert time.monotonic() - started < 120  # the time to build a trainer twice is in it
