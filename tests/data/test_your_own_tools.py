"""docs/your-own-tools.md as a newcomer follows it: its script and its commands, in order, in a fresh folder.

Only MODEL and REPO are filled in, and the training is cut to two small steps.
"""

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

from pact_fast.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "your-own-tools.md").read_text()
SHORT = shlex.split("""
    --train.max_steps 2 --train.prompts_per_step 2 --rollout.num_generations 2 --rollout.max_turns 3
    --rollout.max_completion_length 1024 --rollout.max_turn_length 24
    --eval.every 0 --eval.validation_tasks 2 --eval.score_base false --run.threads 1
""")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def commands():
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert lines.pop(0) == "python make_tasks.py"
    assert all(line.startswith("pact-fast ") for line in lines)
    return [
        shlex.split(line.replace("MODEL", "toolbox-base").replace("REPO", str(ROOT)))[1:] for line in lines
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (script,) = blocks("python")
    Path("make_tasks.py").write_text(script)
    runpy.run_path("make_tasks.py")
    return tmp_path


def test_every_command_of_the_page_runs_and_does_what_the_page_says(folder, capsys):
    check, check_held_out, train, before, after = commands()
    assert main(check) == 0
    printed = capsys.readouterr().out
    assert "20 good records, 0 bad" in printed
    assert "traces run through their tools: 20, solved 20, mean reward 1.00, contradicted 0" in printed
    assert "What do tea and" in Path("first_task.html").read_text()
    assert main(check_held_out) == 0
    assert "8 good records, 0 bad" in capsys.readouterr().out

    assert main(train + SHORT) == 0
    run = Path("runs/your-own-tools")
    for name in (
        "metrics.jsonl",
        "report.html",
        "transcript.json",
        "model/config.json",
        "model/tokenizer.json",
    ):
        assert (run / name).is_file(), name
    steps = [
        row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row
    ]
    assert len(steps) == 2

    short = ["--max-turns", "2", "--max-turn-length", "16"]
    for command in (before, after):
        assert main(command + short) == 0
        out = Path(command[command.index("--out") + 1])
        rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        assert [row["id"] for row in rows] == [f"shop-{n}" for n in range(20, 28)]
        summary = json.loads((out / "summary.json").read_text())["all"]
        assert summary["tasks"] == 8
        assert sum(summary["failures"].values()) == 8 - 8 * summary["solved"][0]
        assert len((out / "transcripts.jsonl").read_text().splitlines()) == 8


def test_a_trace_that_its_tools_contradict_is_named(folder, capsys):
    rows = [json.loads(line) for line in Path("tasks.jsonl").read_text().splitlines()]
    given = rows[3]["expert_trace"][1]["content"]
    assert "250" in given
    rows[3]["expert_trace"][1]["content"] = "251"
    rows[4]["answer"] = "7"
    rows[5]["codes"] = {"add": rows[5]["codes"]["add"]}
    Path("spoilt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "check", "spoilt.jsonl"]) == 1
    printed = capsys.readouterr().out
    assert "solved 18, mean reward 0.97, contradicted 2" in printed
    told = f"tool 'price' gives {given!r}, the trace says '251'"
    assert f"spoilt.jsonl:4: record 'shop-3': expert_trace[1]: {told}" in printed
    assert "record 'shop-4': answer '7' is not in the trace's last message" in printed
    assert "spoilt.jsonl:6: record 'shop-5': codes: no source for tool 'price'" in printed
    assert main(["data", "check", "spoilt.jsonl", "--no-replay"]) == 0
