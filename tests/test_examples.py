"""Every example runs as it stands, and what it prints is what it is there to show."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def run(words, folder):
    """Standard output of a command in `folder`; it finds this repository and this Python first."""
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def numbers(pattern, text):
    found = [tuple(map(float, match.groups())) for match in re.finditer(pattern, text)]
    assert found, f"nothing like {pattern!r} in:\n{text}"
    return found


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.iterdir()} - {"__pycache__"} == {
        "own_loop.py",
        "own_tools",
        "tree_logprobs.py",
        "trl_grpo.py",
    }


def test_own_loop_learns_from_rollouts_and_expert_over_shared_tokens(tmp_path):
    printed = run([sys.executable, EXAMPLES / "own_loop.py"], tmp_path)
    steps = numbers(
        r"(\d+) packed tokens instead of (\d+), even tokens ([\d.]+), expert's log-prob (\S+)", printed
    )
    assert all(packed < apart / 2 for packed, apart, _, _ in steps)
    assert steps[-1][2] > steps[0][2] + 0.2
    assert steps[-1][3] > steps[0][3] + 0.5


def test_tree_logprobs_equal_those_of_ordinary_forwards(tmp_path):
    printed = run([sys.executable, EXAMPLES / "tree_logprobs.py"], tmp_path)
    ((apart, packed),) = numbers(r"(\d+) tokens one by one, (\d+) as a tree", printed)
    assert apart > 5 * packed
    ((gap,),) = numbers(r"largest difference of a log-prob: (\S+)", printed)
    assert gap < 1e-4
    assert "mean of log pi(y|x,h) - log pi(y|x) over 480 tokens" in printed


def test_trl_takes_its_logprobs_from_the_fused_op(tmp_path):
    pytest.importorskip("trl", reason="examples/trl_grpo.py needs TRL: pip install 'pact-fast[bench]'")
    printed = run([sys.executable, EXAMPLES / "trl_grpo.py"], tmp_path)
    rows = numbers(r"step \d: reward (\S+), entropy (\S+), loss (\S+)", printed)
    assert len(rows) == 3
    assert any(loss != 0 for _, _, loss in rows)
    assert all(0 <= reward <= 1 and entropy > 0 for reward, entropy, _ in rows)
    assert numbers(r"(\d+) passes took their log-probs from", printed)[0][0] >= 3


def test_trl_exchanges_gradients_of_adapters_between_processes(tmp_path):
    """Two processes, DDP around a PEFT model: without the exchange each would take a step of its own."""
    for package in ("trl", "peft"):
        pytest.importorskip(package, reason="needs TRL and PEFT: pip install 'pact-fast[bench,lora]'")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    printed = run([*torchrun, EXAMPLES / "trl_grpo.py", "--lora"], tmp_path)
    assert "2 processes, largest difference of a weight between them 0\n" in printed
    assert any(loss != 0 for (loss,) in numbers(r"loss (\S+)", printed))


def test_own_tools_go_from_records_to_a_trained_model(tmp_path):
    folder = shutil.copytree(
        EXAMPLES / "own_tools", tmp_path / "own_tools", ignore=shutil.ignore_patterns("runs")
    )
    printed = run(["bash", "run.sh", "--run.device", "cpu"], folder)
    assert "traces run through their tools: 12, solved 12" in printed
    assert "12 good records, 0 bad" in printed
    out = folder / "runs" / "own-tools"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [0, 1, 2]
    assert (out / "model" / "model.safetensors").is_file()
