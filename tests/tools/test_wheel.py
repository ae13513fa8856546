"""The wheel, installed into a virtual environment of its own and used from an empty folder."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHORT = shlex.split("""
    --train.max_steps 2 --train.prompts_per_step 2 --rollout.num_generations 2 --rollout.max_turns 2
    --rollout.max_completion_length 64 --rollout.max_turn_length 24 --env.settings.train_tasks 4
    --eval.every 0 --eval.validation_tasks 2 --eval.score_base false --eval.score_test false
    --run.threads 1 --run.device cpu --run.name from-wheel
""")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources: an old build/ or _native/ of the checkout cannot get into it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pact_fast", "kernels", "csrc"):
        left_out = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=left_out)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*pip, str(source)], check=True, timeout=200)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """Runs a program of the environment in an empty folder -> (standard output, that folder)."""
    folder = tmp_path_factory.mktemp("user")
    venv, work = folder / "venv", folder / "work"
    work.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=60)
    pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python"), "install", "-q"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True, env=clean, timeout=60)
    # These tests' dependencies, without their editable install: .pth files there are not read.
    (packages,) = venv.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    def call(program, *words):
        command = [str(venv / "bin" / program), *words]
        done = subprocess.run(command, cwd=work, env=clean, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, work

    call.packages = packages
    return call


def test_the_wheel_holds_all_that_the_package_reads(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    tracked = [
        path.relative_to(ROOT)
        for folder in ("pact_fast", "kernels")
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
        and path.suffix not in (".pyc", ".so")
        and (folder == "kernels" or "kernels" not in path.parts)
    ]
    assert len(tracked) > 100
    missing = [
        p for p in tracked if str(Path("pact_fast") / p if p.parts[0] == "kernels" else p) not in inside
    ]
    assert not missing
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in inside)
    if any(map(shutil.which, ("c++", "g++", "clang++"))):
        assert "pact_fast/_native/libtree_pack.so" in inside


def test_the_package_is_imported_from_the_wheel_with_its_kernels_and_types(run):
    code = (
        "import torch, pact_fast, pact_fast.kernels.lm_head.reference as r; from pact_fast import ops;"
        "x, w = torch.randn(4, 8), torch.randn(16, 8);"
        "print(pact_fast.__file__, r.__file__, ops.linear_logprob(x, w, torch.arange(4)).shape)"
    )
    printed, _ = run("python", "-c", code)
    package, kernels, shape = printed.split(maxsplit=2)
    assert Path(package).parent == run.packages / "pact_fast"
    assert run.packages / "pact_fast" in Path(kernels).parents
    assert shape.strip() == "torch.Size([4])"


def test_the_command_names_its_sub_commands(run):
    from pact_fast.cli import COMMANDS

    printed, _ = run("pact-fast", "--help")
    assert all(name in printed for name in COMMANDS)


def test_the_bundled_environment_can_be_trained_on_without_a_config_file(run):
    printed, work = run("pact-fast", "train", *SHORT)
    folder = work / "runs" / "from-wheel"
    assert "from-wheel" in printed
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    assert sum('"loss"' in row for row in rows) == 2
    assert (folder / "report.html").stat().st_size > 1000
    assert (folder / "model" / "model.safetensors").is_file()
