"""`pact-fast eval` on every environment: one command, the same files and tables, the categories its own."""

import json

import pytest

from pact_fast.cli import main
from pact_fast.envs.base import FAILURE_KINDS
from tests.helpers.environments import own_ftrl_file

SHORT = ["--max-turns", "2", "--max-turn-length", "12", "--batch-tasks", "2"]


def toolhop_file(folder):
    schema = {"name": "first_letter", "description": "d", "parameters": {"type": "object", "properties": {}}}
    source = "def first_letter(text):\n    return text[0]"
    row = {"question": "Who?", "answer": "Ann", "tools": {"What letter?": schema}, "functions": [source]}
    path = folder / "toolhop.json"
    path.write_text(json.dumps([row | {"id": i} for i in range(3)]))
    return path


def score(folder, env, *words):
    """The printed text, the rows, and the summary of two tasks with the bundled model."""
    command = ["eval", "toolbox-base", "--env", env, "--tasks", "2", "--out", str(folder / "out"), *SHORT]
    assert main(command + list(words)) == 0
    rows = [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert len((folder / "out" / "transcripts.jsonl").read_text().splitlines()) == len(rows) == 2
    assert set(summary["all"]["failures"]) == set(FAILURE_KINDS)
    assert sum(summary["all"]["failures"].values()) == 2 - sum(row["solved"] for row in rows)
    return rows, summary


def test_ftrl(tmp_path, capsys):
    rows, _ = score(tmp_path, "ftrl", "--setting", f"test_path={own_ftrl_file(tmp_path)}")
    printed = capsys.readouterr().out
    assert [row["category"] for row in rows] == ["single_hop", "multi_hop"]
    assert set(rows[0]["scores"]) == {"solve_p", "solve_r", "solve_f1", "answer"}
    assert all(text in printed for text in ("single_hop", "multi_hop", "solve_f1", "no_call", "length_limit"))


def test_toolhop(tmp_path):
    path = toolhop_file(tmp_path)
    rows, summary = score(tmp_path, "toolhop", "--setting", f"test_path={path}", "--setting", "scenario=free")
    assert rows[0]["category"] == "1 tools"
    assert set(summary["all"]["scores"]) == {"answer_correctness"}


def test_bfcl(tmp_path):
    pytest.importorskip("bfcl_eval")
    settings = ["--setting", "categories=[base, miss_func]", "--setting", "short_descriptions=true"]
    rows, _ = score(tmp_path, "bfcl", *settings)
    assert {row["category"] for row in rows} == {"base"}
    assert set(rows[0]["scores"]) == {"accuracy", "turns"}
    assert all(row["sampled_tokens"] > 0 for row in rows)


def test_a_prompt_past_the_context_is_said_and_counts_as_length_limit(tmp_path, capsys):
    """The bundled model reads 4,096 tokens."""
    path = toolhop_file(tmp_path)
    tasks = json.loads(path.read_text())
    tasks[1]["question"] = "Who? " * 3000
    path.write_text(json.dumps(tasks))
    rows, _ = score(tmp_path, "toolhop", "--setting", f"test_path={path}")
    assert "1 of 2 prompts do not fit the model's context of 4096 tokens" in capsys.readouterr().out
    assert rows[0]["sampled_tokens"] > 0
    assert (rows[1]["sampled_tokens"], rows[1]["failures"]) == (0, {"length_limit": 1})


def test_bfcl_memory_is_filled_first(tmp_path, capsys):
    pytest.importorskip("bfcl_eval")
    words = ["--setting", "scenarios=[notetaker]", "--setting", "short_descriptions=true"]
    rows, _ = score(tmp_path, "bfcl_memory", *words)
    assert capsys.readouterr().out.count("preparing: memory_kv_prereq_") == 5
    assert {row["category"] for row in rows} == {"notetaker"}
    held = json.loads((tmp_path / "out" / "memory.json").read_text())
    assert held["notetaker"]["conversations"] == 5
    (tmp_path / "out" / "results.jsonl").unlink()
    score(tmp_path, "bfcl_memory", *words)  # interrupted before the first task was saved
    assert "preparing" not in capsys.readouterr().out
