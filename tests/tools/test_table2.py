"""configs/smollm2-table2.yaml: the four rows of the paper's table 2, at a hundredth of the size."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from pact_fast.commands.train import main as train
from pact_fast.evaluation.sweep import compare, load_plan, score_runs, tune_runs

PLAN = Path(__file__).parent.parent.parent / "configs" / "smollm2-table2.yaml"
ROWS = {"matchtir", "pact-no-sft", "prompt-rl+sft", "pact-no-anchor"}


def steps_of(run):
    return int(run.arguments[run.arguments.index("--train.max_steps") + 1])


def test_all_rows_have_equal_steps_and_as_many_rates():
    plan = load_plan(PLAN)
    rate = {row: {"value": 1e-5} for row in ROWS}
    tuning, scored = tune_runs(plan), score_runs(plan, {"difficulty-2": rate})
    assert {run.preset for run in scored} == {run.preset for run in tuning} == ROWS
    for runs in (tuning, scored):
        assert len({steps_of(run) for run in runs}) == 1
        assert len({sum(run.preset == row for run in runs) for row in ROWS}) == 1
    assert sum(map(steps_of, [*tuning, *scored])) == 256, "what the file's size is reckoned with"


@pytest.mark.timeout(600)
def test_a_dry_run_at_a_hundredth_makes_the_table_and_is_not_done_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(PLAN.parent.parent)
    plan = load_plan(PLAN)
    # The bundled model instead of 135M parameters, a tenth of the steps and of the rollouts.
    small = {
        "model.path": "toolbox-base",
        "run.device": "cpu",
        "run.threads": 1,
        "train.max_steps": 2,
        "train.prompts_per_step": 2,
        "rollout.num_generations": 3,
        "rollout.max_turns": 2,
        "rollout.max_turn_length": 24,
        "rollout.max_completion_length": 96,
        "eval.validation_tasks": 2,
        "eval.test_tasks": 4,
    }
    plan = replace(plan, out=tmp_path, overrides=plan.overrides | small, tune=None, seeds=[0])
    runs = score_runs(plan, {})
    assert [run.preset for run in runs] == [preset.name for preset in plan.presets]
    for run in runs:
        assert train(run.arguments[1:]) == 0
        assert (run.folder / "summary.json").exists()
        (run.folder / "compare.json").write_text(json.dumps(run.arguments))
    said = io.StringIO()
    compare(plan, phase="all", jobs=1, console=Console(file=said, width=200))
    assert "4 runs, 4 of them finished before" in said.getvalue()
    with (tmp_path / "results.csv").open() as file:
        found = {row["preset"] for row in csv.DictReader(file)}
    assert found >= ROWS
