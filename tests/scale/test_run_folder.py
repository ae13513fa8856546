"""A run folder holds one run: another is moved aside or overwritten on request, never mixed in."""

import json
import signal
import subprocess
import sys
import time

import pytest

from pact_fast.commands import eval as eval_command
from pact_fast.commands.export import main as export
from pact_fast.config import ConfigError
from pact_fast.metrics import read_metrics
from pact_fast.train.trainer import Trainer
from tests.helpers.runs import config, words


def train(run_dir, **changes):
    trainer = Trainer(config(run_dir, **changes))
    try:
        return trainer.train()
    finally:
        trainer.env.close()


def seeds(folder):
    return {
        json.loads((path / "state.json").read_text())["state"]["config"]["run"]["seed"]
        for path in folder.glob("step-*")
    }


SHORT = {"train__max_steps": 2, "checkpoint__every": 1, "eval__every": 0, "checkpoint__asynchronous": False}


def test_a_second_run_in_a_folder_keeps_its_own_checkpoints_and_the_first_is_aside(tmp_path, capsys):
    run_dir = tmp_path / "r"
    train(run_dir, **(SHORT | {"train__max_steps": 5}))
    train(run_dir, **SHORT, run__seed=7)
    assert "previous-1" in capsys.readouterr().out
    assert seeds(run_dir / "checkpoints") == {7}
    assert seeds(run_dir / "previous-1" / "checkpoints") == {0}
    assert [row["step"] for row in read_metrics(run_dir) if "loss" in row] == [0, 1]
    train(run_dir, **(SHORT | {"train__max_steps": 3}), run__seed=7, checkpoint__resume=True)
    assert [row["step"] for row in read_metrics(run_dir) if "loss" in row] == [0, 1, 2]
    assert seeds(run_dir / "checkpoints") == {7}


def test_overwrite_deletes_the_run_that_was_there(tmp_path, capsys):
    run_dir = tmp_path / "r"
    train(run_dir, **SHORT)
    train(run_dir, **SHORT, run__seed=7, checkpoint__overwrite=True)
    assert "is overwritten" in capsys.readouterr().out
    assert seeds(run_dir / "checkpoints") == {7}
    assert not list(run_dir.glob("previous-*"))


def test_resume_with_a_mistyped_name_names_the_run_that_was_meant(tmp_path, capsys):
    train(tmp_path / "toolbox-one", **SHORT)
    with pytest.raises(ConfigError, match=r"did you mean --run\.name toolbox-one\?"):
        train(tmp_path / "toolbox-onr", **SHORT, checkpoint__resume=True)
    assert not (tmp_path / "toolbox-onr").exists()
    train(tmp_path / "other", **SHORT, checkpoint__resume=True)
    assert "holds no run yet: a new one begins" in capsys.readouterr().out


def test_a_start_that_fails_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="max_prompt_length"):
        train(tmp_path / "r", rollout__max_prompt_length=3)
    assert not (tmp_path / "r").exists()


def test_a_run_shorter_than_the_checkpoint_interval_can_be_exported_and_scored(tmp_path, capsys, monkeypatch):
    run_dir = tmp_path / "r"
    train(run_dir, **(SHORT | {"checkpoint__every": 50}))
    assert [path.name for path in (run_dir / "checkpoints").glob("step-*")] == ["step-000002"]
    assert export([str(run_dir), str(tmp_path / "whole")]) == 0
    assert "step 2" in capsys.readouterr().out
    assert export([str(run_dir / "model"), str(tmp_path / "of-model")]) == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "of-model")]
    assert files[0] == files[1]
    monkeypatch.chdir(tmp_path)
    assert eval_command.main([str(run_dir), "--tasks", "1", "--device", "cpu"]) == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(tmp_path, number, status):
    run_dir = tmp_path / "r"
    command = [sys.executable, "-m", "pact_fast", "train", *words(run_dir, train__max_steps=400)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (run_dir / "metrics.jsonl").exists():
        time.sleep(0.05)
    process.send_signal(number)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == status, out
    assert "Traceback" not in out
    assert "go on with --resume" in out
    assert list((run_dir / "checkpoints").glob("step-*"))


def test_files_with_the_same_ids_keep_their_own_questions(tmp_path):
    """Default ids are "<file stem>:<line>": those of train/tasks.jsonl and val/tasks.jsonl are the same."""
    tool = {"name": "price", "parameters": {"type": "object", "properties": {"item": {"type": "string"}}}}
    for split, item, answer in (("train", "tea", "250"), ("val", "jam", "480")):
        record = {
            "prompt": [{"role": "user", "content": f"{split}: what is {item}?"}],
            "tools": [{"type": "function", "function": tool}],
            "codes": {"price": "def price(item):\n    return {'tea': 250, 'jam': 480}[item]\n"},
            "answer": answer,
            "expert_trace": [
                {"role": "assistant", "tool_calls": [{"name": "price", "arguments": {"item": item}}]},
                {"role": "tool", "name": "price", "content": answer},
                {"role": "assistant", "content": answer},
            ],
        }
        (tmp_path / split).mkdir()
        (tmp_path / split / "tasks.jsonl").write_text((json.dumps(record) + "\n") * 2)
    settings = {
        f"env.settings.{name}_path": str(tmp_path / part / "tasks.jsonl")
        for name, part in (("train", "train"), ("validation", "val"))
    }
    trainer = Trainer(config(tmp_path / "r", env__name="python", **settings))
    try:
        for split, records in trainer.splits.items():
            for record in records:
                assert record.prompt[0]["content"] in trainer.chat.decode(
                    trainer.builder.prompt(record).ids
                ), split
                assert record.prompt[0]["content"] in trainer.chat.decode(
                    trainer.builder.trace(record).ids
                ), split
    finally:
        trainer.env.close()
