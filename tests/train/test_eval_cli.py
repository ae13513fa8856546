"""pact-fast eval on the bundled environment: tables, saved rows, and resuming where it stopped."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from pact_fast.cli import main
from pact_fast.data.chat import ChatFormat
from pact_fast.envs.base import make_env
from pact_fast.envs.toolbox.base_model import base_model_path
from pact_fast.evaluation.evaluate import transcript
from pact_fast.rollout import InProcessEngine, RolloutLimits, collect_rollouts


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
    sampled = ["--temperature", "1.0", "--samples", "2"]
    run(tmp_path / "whole", *sampled)
    run(tmp_path / "cut", *sampled)
    for name, whole_lines in (("results.jsonl", 4), ("transcripts.jsonl", 9)):
        lines = (tmp_path / "cut" / name).read_text().splitlines(keepends=True)
        (tmp_path / "cut" / name).write_text("".join(lines[:whole_lines]) + lines[whole_lines][:9])
    run(tmp_path / "cut", *sampled)
    for name in ("results.jsonl", "transcripts.jsonl", "summary.json"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text(), name


def test_tables_and_summary_tell_the_rows_by_category(tmp_path, capsys):
    run(tmp_path, "--setting", "two_part_share=0.5")
    summary = json.loads((tmp_path / "summary.json").read_text())
    printed = capsys.readouterr().out
    categories = {row["category"] for row in rows(tmp_path)}
    assert len(categories) > 1
    assert set(summary) == categories | {"all"}
    assert all(category in printed for category in categories)
    for category, numbers in summary.items():
        chosen = [row for row in rows(tmp_path) if category in ("all", row["category"])]
        assert numbers["tasks"] == len(chosen)
        assert numbers["solved"][0] == pytest.approx(sum(row["solved"] for row in chosen) / len(chosen))
        assert sum(numbers["failures"].values()) == sum(row["solved"] < 1 for row in chosen)


@pytest.mark.parametrize("room", [0, 9])
def test_rollouts_stay_within_the_models_context(room):
    env = make_env("toolbox", {})
    engine = InProcessEngine(AutoModelForCausalLM.from_pretrained(base_model_path()).eval())
    chat = ChatFormat.for_tokenizer(AutoTokenizer.from_pretrained(base_model_path()))
    for record in env.records("test")[:3]:
        limits = RolloutLimits(10, 512, 64, len(chat.prompt(record.prompt, record.tools)) + room)
        (rollout,) = collect_rollouts(engine, env, chat, [record], num_generations=1, limits=limits)
        assert len(rollout.token_ids) == rollout.num_sampled == room
        assert rollout.outcome.failure == "length_limit"  # nine tokens hold no call
        assert transcript(rollout, chat)[0]["role"] == "system"
    env.close()


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
