"""Sets the Triton interpreter before anything imports triton (it is read at import)."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    import pytest

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; run by `make gpu`"))


def pytest_runtest_logreport(report):
    _note_skip(report)


def pytest_collectreport(report):
    _note_skip(report)


def _note_skip(report):
    """Adds each skipped test or module, with its reason, to the file $PACT_FAST_SKIPS: .ci/run reads it."""
    path = os.environ.get("PACT_FAST_SKIPS")
    if path and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        with open(path, "a") as file:
            file.write(f"{report.nodeid}: {' '.join(reason.split())}\n")
