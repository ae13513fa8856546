import importlib.metadata
import json
import subprocess
import sys

import pytest
import torch

from pact_fast.commands import doctor


def test_json_holds_what_the_interpreter_itself_says():
    out = subprocess.run(
        [sys.executable, "-m", "pact_fast.commands.doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    report = json.loads(out.stdout)
    found = {f["name"]: f for f in report["findings"]}
    assert out.returncode == 0
    assert report["usable"] is True
    assert found["torch"]["detail"] == importlib.metadata.version("torch")
    assert ("cuda" in found) == (not torch.cuda.is_available())
    assert all(f["cost"] for f in report["findings"] if f["status"] != "ok")


def test_a_missing_required_package_makes_the_exit_status_1(monkeypatch, capsys):
    real = importlib.metadata.version

    def without_transformers(name):
        if name == "transformers":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", without_transformers)
    assert doctor.main([]) == 1
    assert "training cannot run here" in capsys.readouterr().out


def test_a_package_below_the_floor_is_an_error_that_names_the_floor(monkeypatch):
    floors = doctor._floors()
    assert floors["torch"] == "2.11"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.9.1+cpu")
    finding = doctor._package("torch", "required", "")
    assert finding.status == "error"
    assert "2.11" in finding.cost


@pytest.mark.parametrize(("older", "newer"), [("2.9.1", "2.11"), ("2.11.0", "2.13.0+cpu"), ("5.9", "5.17.2")])
def test_versions_compare_by_number(older, newer):
    assert doctor._numbers(older) < doctor._numbers(newer)


def test_a_broken_library_is_an_error_and_an_absent_one_missing(monkeypatch, tmp_path):
    (tmp_path / "libtree_pack.so").write_bytes(b"not a library")
    monkeypatch.setattr(doctor, "NATIVE", tmp_path)
    found = {f.name: f for f in doctor._native_parts()}
    assert found["tree_pack"].status == "error"
    assert "build it again" in found["tree_pack"].cost
    (tmp_path / "libtree_pack.so").unlink()
    found = {f.name: f for f in doctor._native_parts()}
    assert found["tree_pack"].status == "missing"


def test_a_look_that_fails_is_a_finding_and_not_a_crash():
    def _broken():
        raise RuntimeError("driver too old")

    (finding,) = doctor._guard("devices", _broken)
    assert (finding.status, finding.name) == ("error", "broken")
    assert "driver too old" in finding.detail
