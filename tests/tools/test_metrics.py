import io
import json
import math

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pact_fast import metrics
from pact_fast.metrics import MetricsLogger, ProgressDisplay, read_metrics


def scalars(run_dir):
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_rows_are_one_json_object_a_line_and_reach_the_disk_at_once(tmp_path):
    logger = MetricsLogger(tmp_path, tensorboard=False)
    logger.log(1, {"loss": torch.tensor(0.5), "num_tokens": 12})
    logger.log(2, {"loss": 0.25, "eval/split": "validation", "eval/solved": 0.5})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # not closed: flushed row by row
    rows = [json.loads(line) for line in lines]
    assert rows[0]["step"] == 1
    assert rows[0]["loss"] == 0.5
    assert rows[0]["num_tokens"] == 12
    assert isinstance(rows[0]["num_tokens"], int)
    assert rows[1]["eval/split"] == "validation"
    assert rows[0]["time"] <= rows[1]["time"]
    logger.close()


def test_a_non_finite_number_is_null_and_counted(tmp_path):
    with MetricsLogger(tmp_path, tensorboard=True) as logger:
        row = logger.log(3, {"loss": float("nan"), "grad_norm": math.inf, "reward": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert (
        json.loads(text)
        == row
        == {"step": 3, "time": row["time"], "loss": None, "grad_norm": None, "reward": 1.0, "nonfinite": 2}
    )
    assert scalars(tmp_path) == {"reward": {3: 1.0}, "nonfinite": {3: 2.0}}


def test_an_unknown_name_is_refused_with_the_nearest_one(tmp_path):
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        with pytest.raises(ValueError, match=r"'rewards'; nearest: 'reward'"):
            logger.log(1, {"rewards": 1.0})
        logger.log(1, {"eval/failure/unknown_tool": 0.1})
        with pytest.raises(ValueError, match="unknown metric 'eval/failure/'"):
            logger.log(1, {"eval/failure/": 0.1})
    assert len(read_metrics(tmp_path)) == 1


def test_resume_drops_rows_beyond_the_checkpoint_and_a_cut_last_line(tmp_path):
    with MetricsLogger(tmp_path) as logger:
        for step in range(1, 6):
            logger.log(step, {"loss": float(step)})
    path = tmp_path / "metrics.jsonl"
    before = read_metrics(path)
    with open(path, "a") as file:
        file.write('{"step": 6, "ti')
    assert read_metrics(path) == before
    with MetricsLogger(tmp_path, resume_step=3) as logger:
        row = logger.log(4, {"loss": 40.0})
    rows = read_metrics(path)
    assert [(r["step"], r["loss"]) for r in rows] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert row["time"] >= before[2]["time"]
    assert scalars(tmp_path)["loss"] == {1: 1.0, 2: 2.0, 3: 3.0, 4: 40.0}


def test_a_new_run_moves_an_earlier_one_aside(tmp_path):
    for value in (1.0, 2.0, 3.0):
        with MetricsLogger(tmp_path) as logger:
            logger.log(1, {"loss": value})
    assert [
        read_metrics(tmp_path / f)[0]["loss"] for f in ("metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl")
    ] == [1, 2, 3]
    assert scalars(tmp_path)["loss"] == {1: 3.0}
    assert (tmp_path / "tensorboard.2").is_dir()


def test_a_broken_line_in_the_middle_names_file_and_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: .*'not json'"):
        read_metrics(tmp_path)


def test_a_clock_set_back_does_not_turn_time_back(tmp_path, monkeypatch):
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        first = logger.log(1, {"loss": 1.0})
        monkeypatch.setattr(metrics.time, "time", lambda: 0.0)
        assert logger.log(2, {"loss": 1.0})["time"] >= first["time"]


def test_evaluation_rows_get_a_tag_per_split_and_temperature(tmp_path):
    with MetricsLogger(tmp_path) as logger:
        for temperature in (0.0, 1.0):
            logger.log(5, {"eval/solved": 0.5, "eval/split": "test", "eval/temperature": temperature})
    assert {"eval_test_greedy/solved", "eval_test_T1/solved"} <= set(scalars(tmp_path))


def test_every_metric_has_a_meaning_and_the_contract_names_are_in_the_table():
    assert all(metric.meaning for metric in metrics.METRICS.values())
    contract = (
        "loss policy_loss sft_loss grad_norm learning_rate num_tokens reward reward_std",
        "solved entropy clip_ratio",
        "completions/mean_length completions/calls tokens_per_second time/rollout time/update time/score",
        "pact/ppo_kl pact/trace_logprob pact/trace_gain pact/logprob_mismatch pact/anchored",
        "pact/tool_call_scale",
        "pact/reasoning_level pact/skipped_steps eval/solved eval/reward eval/calls eval/solved_low",
        "eval/solved_high eval/reward_low eval/calls_high eval/split eval/temperature eval/tasks",
        "eval/failure/no_call",
    )
    for name in " ".join(contract).split():
        metrics.describe(name)


def test_progress_without_a_terminal_prints_plain_lines():
    out = io.StringIO()
    with ProgressDisplay(4, console=Console(file=out), plain_every=0.0) as progress:
        for step in range(1, 5):
            progress.update(step, {"reward": 0.25, "solved": None, "tokens_per_second": 1234.5})
    lines = out.getvalue().splitlines()
    assert len(lines) == 4
    assert "\x1b" not in out.getvalue()
    assert lines[0].startswith("step 1/4  reward 0.250  solved -  1,234 tok/s  left ")
    assert lines[3].endswith("left 00:00")


def test_progress_on_a_terminal_is_a_live_bar():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with ProgressDisplay(10, start_step=5, console=console) as progress:
        progress.update(7, {"reward": 0.25, "solved": 0.5, "tokens_per_second": 10.0})
        progress.message("validation solved 0.5")
    assert "7/10" in out.getvalue()
    assert "reward 0.250" in out.getvalue()
    assert "validation solved" in out.getvalue()


def test_an_optional_tracker_that_is_not_installed_or_unknown_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="wandb"):
        MetricsLogger(tmp_path, tensorboard=False, report_to=["mlflow"])
    with pytest.raises(ImportError, match="pip install trackio"):
        MetricsLogger(tmp_path, tensorboard=False, report_to=["trackio"])
