"""pact-fast eval on the bundled environment: tables, saved rows, and resuming where it stopped."""

import json

import pytest

from pact_fast.cli import main


def run(out, *words):
    return main(["eval", "toolbox-base", "--tasks", "6", "--batch-tasks", "2", "--out", str(out), *words])


def rows(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_eval_scores_saves_and_prints_a_table(tmp_path, capsys):
    assert run(tmp_path) == 0
    printed = capsys.readouterr().out
    assert "solved" in printed
    assert "wrong_answer" in printed
    assert [r["id"] for r in rows(tmp_path)] == [f"toolbox/0/test/{i}" for i in range(6)]
    shown = [json.loads(line) for line in (tmp_path / "transcripts.jsonl").read_text().splitlines()]
    assert shown[0]["pieces"][0]["role"] == "system"


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(tmp_path):
    run(tmp_path / "whole")
    run(tmp_path / "cut")
    results = tmp_path / "cut" / "results.jsonl"
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(lines[:4]) + lines[4][:9])
    run(tmp_path / "cut")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_other_settings_in_the_same_folder_are_refused(tmp_path, capsys):
    run(tmp_path)
    assert run(tmp_path, "--temperature", "1.0") == 2
    assert "another folder" in capsys.readouterr().err


def test_an_unknown_setting_is_named(tmp_path, capsys):
    assert run(tmp_path, "--setting", "train_taks=3") == 2
    assert "train_tasks" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--setting", "shift"], ["--env", "toolbax"]])
def test_bad_words_are_one_line(tmp_path, capsys, words):
    assert run(tmp_path, *words) == 2
    assert capsys.readouterr().err.startswith("error:")
