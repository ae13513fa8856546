import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from pact_fast.commands.compare import main
from pact_fast.config import load_config
from pact_fast.evaluation.stats import paired_difference
from pact_fast.evaluation.sweep import choose, compare, execute, load_plan, score_runs, tune_runs
from pact_fast.objective import PRESETS

ROOT = Path(__file__).parents[2]

# Takes the trainer's words and writes its summary.json: what is tested here is who runs when, and on what.
STAND_IN = """
import json, os, random, sys, time
from pathlib import Path
words = sys.argv[1:]
assert words[0] == "train" and os.environ["OMP_NUM_THREADS"] == "1"
option = {words[i][2:]: words[i + 1] for i in range(2, len(words), 2)}
folder = Path(option["run.dir"]) / option["run.name"]
with open(folder.parent / (folder.name + ".starts"), "a") as file:
    file.write("x")
time.sleep(float(option.get("sleep", 0)))
rate, seed = float(option.get("rate", 1)), int(option["run.seed"])
if option.get("fail_at") == option.get("rate", "") + "/" + option["run.seed"]:
    sys.exit("diverged")
skill = {"pact": 0.8, "grpo": 0.5}[option["preset"]] - 0.3 * abs(rate - 2) + float(option.get("bonus", 0))
rng = random.Random(seed)
luck = [rng.random() for _ in range(40)]
tasks = {"solved": [float(x < skill) for x in luck], "reward": [x * skill for x in luck], "calls": [2.0] * 40}
block = {"tasks": 40} | {k: sum(v) / 40 for k, v in tasks.items()}
block |= {"per_task_" + k: v for k, v in tasks.items()}
modes = {"sampled": block, "greedy": block}
splits = {"validation": modes} | ({"test": modes} if option["eval.score_test"] == "true" else {})
summary = {"preset": option["preset"], "seed": seed, "config": option, "base": splits, "final": splits}
(folder / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def command(tmp_path):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    return (sys.executable, str(tmp_path / "stand_in.py"))


def write_plan(tmp_path, **changes):
    plan = {
        "config": "toolbox.yaml",
        "out": str(tmp_path / "out"),
        "presets": {"pact": {}, "grpo": {}},
        "settings": {"default": {}, "perfect": {"bonus": 0.05}},
        "tune": {"key": "rate", "values": [1.0, 2.0, 3.0], "seeds": [7], "settings": ["default"]},
        "run": {"seeds": [0, 1, 2]},
    } | changes
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    return load_plan(path)


def quiet():
    return Console(file=io.StringIO(), width=200)


def starts(plan):
    return sum(len(p.read_text()) for p in plan.out.rglob("*.starts"))


def test_both_phases_choose_on_validation_and_score_once(tmp_path, command):
    plan = write_plan(tmp_path)
    path = compare(plan, jobs=4, console=quiet(), command=command)
    tuned = yaml.safe_load((plan.out / "tuned.yaml").read_text())
    assert {name: entry["value"] for name, entry in tuned["default"].items()} == {"pact": 2.0, "grpo": 2.0}
    assert starts(plan) == 2 * 3 * 1 + 2 * 2 * 3
    for summary in plan.out.rglob("summary.json"):
        scored = "test" in json.loads(summary.read_text())["final"]
        assert scored == ("/run/" in str(summary)), "tuning must not see the held-out split"
    rows = list(csv.DictReader(path.read_text().splitlines()))
    solved = {
        (r["setting"], r["preset"]): r for r in rows if (r["mode"], r["score"]) == ("sampled", "solved")
    }
    assert set(solved) == {(s, p) for s in ("default", "perfect") for p in ("base", "pact", "grpo")}
    runs = {run.preset: {} for run in score_runs(plan, tuned)}
    for run in score_runs(plan, tuned):
        if run.setting == "default":
            runs[run.preset][run.seed] = run.summary()["final"]["test"]["sampled"]["solved"]
    expected = paired_difference(runs["pact"], runs["grpo"])
    assert float(solved["default", "grpo"]["difference"]) == pytest.approx(expected.mean, rel=1e-4)
    assert float(solved["default", "grpo"]["difference_low"]) == pytest.approx(expected.low, rel=1e-4)
    assert solved["default", "pact"]["difference"] == ""
    assert float(solved["default", "grpo"]["bootstrap_low"]) > 0
    assert float(solved["perfect", "pact"]["mean"]) > float(solved["default", "pact"]["mean"])
    assert {"results.csv", "runs.csv", "results.md", "results.png"} <= {p.name for p in plan.out.iterdir()}
    assert "| pact | 2 |" in (plan.out / "results.md").read_text()


def test_a_preset_may_have_more_seeds_and_is_paired_on_those_of_both(tmp_path, command):
    presets = {"pact": {"seeds": [0, 1, 2, 3]}, "grpo": {}, "sft": {"preset": "grpo", "seeds": [8]}}
    plan = write_plan(
        tmp_path, tune=None, settings={"default": {}}, presets={"pact": presets["pact"], "grpo": {}}
    )
    path = compare(plan, console=quiet(), command=command)
    assert starts(plan) == 4 + 3
    rows = {
        r["preset"]: r
        for r in csv.DictReader(path.read_text().splitlines())
        if (r["mode"], r["score"]) == ("sampled", "solved")
    }
    assert (rows["pact"]["seeds"], rows["grpo"]["seeds"]) == ("4", "3")
    solved = {
        name: {
            run.seed: run.summary()["final"]["test"]["sampled"]["solved"]
            for run in score_runs(plan, {})
            if run.preset == name and run.seed < 3
        }
        for name in ("pact", "grpo")
    }
    expected = paired_difference(solved["pact"], solved["grpo"])
    assert float(rows["grpo"]["difference"]) == pytest.approx(expected.mean, rel=1e-4)
    apart = write_plan(tmp_path, tune=None, settings={"default": {}}, presets=presets)
    with pytest.raises(ValueError, match=r"no seed in common: \[0, 1, 2, 3\] and \[8\]"):
        compare(apart, console=quiet(), command=command)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*-plan.yaml")), ids=lambda path: path.stem)
def test_every_run_of_a_bundled_plan_is_a_config_that_can_be_used(path):
    plan = load_plan(path)
    tuned = {s: {p.name: {"value": 1e-3} for p in plan.presets} for s in plan.settings}
    for run in {run.arguments[:-6]: run for run in tune_runs(plan) + score_runs(plan, tuned)}.values():
        assert load_config(ROOT / run.arguments[1], run.arguments[2:]).preset in PRESETS


def test_finished_runs_are_not_run_again_and_a_failed_one_is(tmp_path, command):
    plan = write_plan(tmp_path, tune=None, settings={"default": {}}, overrides={"fail_at": "/1"})
    with pytest.raises(RuntimeError, match="2 runs failed"):
        compare(plan, console=quiet(), command=command)
    assert starts(plan) == 6
    repaired = write_plan(tmp_path, tune=None, settings={"default": {}}, overrides={"fail_at": "/9"})
    with pytest.raises(ValueError, match="finished with other options"):
        compare(repaired, console=quiet(), command=command)
    log = plan.out / "run" / "default" / "pact" / "seed-1" / "console.log"
    assert "diverged" in log.read_text()
    good = write_plan(tmp_path, tune=None, settings={"default": {}}, out=str(tmp_path / "good"))
    for expected in (6, 6):
        compare(good, console=quiet(), command=command)
        assert starts(good) == expected


def test_a_value_that_diverged_cannot_win_and_is_listed(tmp_path, command):
    plan = write_plan(tmp_path, overrides={"fail_at": "2.0/7"})
    runs = tune_runs(plan)
    assert len(execute(runs, jobs=4, console=quiet(), command=command)) == 2
    entry = choose(plan, runs)["default"]["pact"]
    assert entry["value"] == 1.0, "1.0 and 3.0 tie: the smaller one"
    assert entry["failed"] == [2.0]


def test_a_tuning_run_that_scored_the_held_out_split_is_refused(tmp_path, command):
    plan = write_plan(tmp_path)
    runs = tune_runs(plan)
    execute(runs, jobs=4, console=quiet(), command=command)
    path = runs[0].folder / "summary.json"
    summary = json.loads(path.read_text())
    summary["final"]["test"] = summary["final"]["validation"]
    path.write_text(json.dumps(summary))
    with pytest.raises(ValueError, match="scored the held-out split"):
        choose(plan, runs)


def test_later_words_win_and_values_reach_the_trainer_as_yaml(tmp_path):
    plan = write_plan(
        tmp_path,
        overrides={"train": {"max_steps": 5}, "env.settings.shift": True},
        presets={"pact": {}, "half": {"preset": "pact", "overrides": {"train.max_steps": 3}}},
    )
    run = next(r for r in tune_runs(plan) if r.preset == "half")
    words = list(run.arguments)
    assert words[:4] == ["train", "toolbox.yaml", "--preset", "pact"]
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert options["--train.max_steps"] == "3"
    assert options["--env.settings.shift"] == "true"
    assert options["--eval.score_test"] == "false"
    assert Path(options["--run.dir"]) / options["--run.name"] == run.folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": {}}, "unknown key 'preset'"),
        ({"reference": "sft"}, "'sft' is none of the presets"),
        ({"presets": {"pact": {"override": {}}}}, "presets.pact: unknown key 'override'"),
        ({"run": {}}, "missing .'seeds'."),
        (
            {"tune": {"key": "r", "seeds": [1], "values": {"pact": [1.0], "grpo": [1.0, 2.0]}}},
            "all of one length",
        ),
        (
            {"tune": {"key": "r", "seeds": [1], "values": [1.0], "settings": ["x"]}},
            "'x' is none of the settings",
        ),
    ],
)
def test_a_mistake_in_the_plan_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_plan(tmp_path, **changes)


def test_the_run_phase_without_tuned_values_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="run --phase tune first"):
        compare(write_plan(tmp_path), phase="run", console=quiet())


def test_dry_run_prints_commands_and_runs_nothing(tmp_path, capsys):
    write_plan(tmp_path)
    assert main([str(tmp_path / "plan.yaml"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert all("-m pact_fast.cli train toolbox.yaml --preset" in line for line in lines)
    assert not (tmp_path / "out").exists()
    assert main([str(tmp_path / "absent.yaml")]) == 1


def test_sigterm_stops_the_runs_with_it(tmp_path, command):
    plan = write_plan(tmp_path, tune=None, settings={"default": {}}, overrides={"sleep": 60})
    code = (
        "import sys; from pact_fast.commands.compare import main; from pact_fast.evaluation import sweep;"
        "sweep.compare.__kwdefaults__['command'] = sys.argv[2:]; sys.exit(main([sys.argv[1], '--jobs', '2']))"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "plan.yaml"), *command]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(list(plan.out.rglob("*.starts"))) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    assert time.monotonic() - begin < 10
    assert starts(plan) == 2, "a run was started after the stop"
    assert not [p for p in _command_lines() if str(tmp_path) in p and "stand_in" in p]


def _command_lines():
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                yield (entry / "cmdline").read_text()
            except OSError:
                continue
