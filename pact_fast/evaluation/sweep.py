"""Several presets x seeds x settings, each a training run of its own, brought together in one table and plot.

    pact-fast compare PLAN.yaml [--phase all|tune|run|table] [--jobs 2] [--dry-run]

A plan:

    config: configs/toolbox.yaml           # relative to the working folder
    out: runs/compare                      # all runs, tuned.yaml, results.csv, results.md, results.png
    reference: pact                        # differences are the reference minus another (default pact)
    overrides: {train.max_steps: 160}      # for every run
    presets:                               # name: {} or {preset: its trainer preset, overrides: {...}}
      pact: {seeds: [0, 1, 2, 3, 4]}       # instead of run.seeds
      pact-q1: {preset: pact, overrides: {objective.anchor_probability: 0.1}}
    settings:                              # name: overrides
      default: {}
      perfect: {env.settings.success_rate: 1.0}
    tune:                                  # optional. Values are chosen on validation alone
      key: train.learning_rate
      values: [1.0e-4, 3.0e-4, 1.0e-3]     # or {preset: [...]}: as many for each preset
      seeds: [100]
      settings: [default]                  # left out: all; one not tuned takes the first one's choice
      score: sampled.solved                # what of final.validation is maximised
      overrides: {}
    run:
      seeds: [0, 1, 2]
      overrides: {}

Each run is `python -m pact_fast.cli train CONFIG --preset P --run.seed S --<key> value ...` on one thread.
eval.score_test is off while tuning, and a tuning run that scored the held-out split is refused. Finished runs
(those with a summary.json) are not run again; one made with other options is an error, never mixed in.

What the trainer writes to `<run folder>/summary.json` when it ends:

    {"preset": str, "seed": int, "config": {...},
     "base":  {"validation": SCORES, "test": SCORES},      # before training; a split not scored is left out
     "final": {"validation": SCORES, "test": SCORES}}      # after training
    SCORES = {"sampled": BLOCK, "greedy": BLOCK}           # T=1 and T=0
    BLOCK = stats.evaluation_block(...): solved, reward, calls (each with _low, _high), tasks, and
            per_task_solved, per_task_reward, per_task_calls, tasks in the same order in every run
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from pact_fast.evaluation.comparison import write_results

PHASES = ("all", "tune", "run", "table")
TRAINER = (sys.executable, "-m", "pact_fast.cli")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Preset:
    name: str
    preset: str
    overrides: dict[str, Any]
    seeds: list[int] | None = None  # in the place of run.seeds


@dataclass(frozen=True)
class Tune:
    key: str
    values: dict[str, list[Any]]  # by preset name
    seeds: list[int]
    settings: list[str]
    score: str = "sampled.solved"
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    config: Path
    out: Path
    presets: list[Preset]
    settings: dict[str, dict[str, Any]]
    seeds: list[int]
    reference: str
    tune: Tune | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    run_overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One training run of the comparison: where it lies, and the options that make it."""

    phase: str
    setting: str
    preset: str
    seed: int
    value: Any
    folder: Path
    arguments: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.phase} {self.setting} {self.preset} seed {self.seed}" + (
            "" if self.value is None else f" value {self.value:g}"
        )

    def summary(self) -> dict[str, Any] | None:
        path = self.folder / "summary.json"
        return json.loads(path.read_text()) if path.exists() else None

    def minutes(self) -> float | None:
        """How long the run took, by the clock of its folder; None before it has ended."""
        begun, ended = self.folder / "compare.json", self.folder / "summary.json"
        return (
            (ended.stat().st_mtime - begun.stat().st_mtime) / 60
            if ended.exists() and begun.exists()
            else None
        )


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Reads and checks a plan file. Raises ValueError naming the file, the key and what is allowed."""
    raw = yaml.safe_load(Path(path).read_text())
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: a plan is a mapping with config, presets and run")
    known = {"config", "out", "reference", "overrides", "presets", "settings", "tune", "run"}
    _check_keys(path, "plan", raw, known, {"config", "presets", "run"})
    presets = []
    for name, entry in raw["presets"].items():
        entry = entry or {}
        _check_keys(path, f"presets.{name}", entry, {"preset", "overrides", "seeds"}, set())
        presets.append(
            Preset(name, entry.get("preset", name), _flat(entry.get("overrides")), entry.get("seeds"))
        )
    names = [preset.name for preset in presets]
    settings = {
        name: _flat(overrides) for name, overrides in (raw.get("settings") or {"default": {}}).items()
    }
    reference = raw.get("reference", "pact" if "pact" in names else names[0])
    if reference not in names:
        raise ValueError(f"{path}: reference: {reference!r} is none of the presets {names}")
    _check_keys(path, "run", raw["run"], {"seeds", "overrides"}, {"seeds"})
    return Plan(
        config=Path(raw["config"]),
        out=Path(raw.get("out", "runs/compare")),
        presets=presets,
        settings=settings,
        seeds=list(raw["run"]["seeds"]),
        reference=reference,
        tune=_load_tune(path, raw["tune"], names, list(settings)) if raw.get("tune") else None,
        overrides=_flat(raw.get("overrides")),
        run_overrides=_flat(raw["run"].get("overrides")),
    )


def _load_tune(path: Any, raw: dict[str, Any], presets: list[str], settings: list[str]) -> Tune:
    allowed = {"key", "values", "seeds", "settings", "score", "overrides"}
    _check_keys(path, "tune", raw, allowed, {"key", "values", "seeds"})
    values = raw["values"] if isinstance(raw["values"], dict) else dict.fromkeys(presets, raw["values"])
    if set(values) != set(presets) or len({len(grid) for grid in values.values()}) != 1:
        raise ValueError(f"{path}: tune.values: every preset needs its list, all of one length; got {values}")
    chosen = raw.get("settings", settings)
    for name in chosen:
        if name not in settings:
            raise ValueError(f"{path}: tune.settings: {name!r} is none of the settings {settings}")
    score, overrides = raw.get("score", "sampled.solved"), _flat(raw.get("overrides"))
    return Tune(
        raw["key"], {k: list(v) for k, v in values.items()}, list(raw["seeds"]), chosen, score, overrides
    )


def tune_runs(plan: Plan) -> list[Run]:
    if plan.tune is None:
        return []
    return [
        _make_run(plan, "tune", setting, preset, seed, value)
        for setting in plan.tune.settings
        for preset in plan.presets
        for value in plan.tune.values[preset.name]
        for seed in plan.tune.seeds
    ]


def score_runs(plan: Plan, tuned: Mapping[str, Any]) -> list[Run]:
    runs = []
    for setting in plan.settings:
        for preset in plan.presets:
            value = None
            if plan.tune is not None:
                source = setting if setting in tuned else plan.tune.settings[0]
                value = tuned[source][preset.name]["value"]
            seeds = plan.seeds if preset.seeds is None else preset.seeds
            runs += [_make_run(plan, "run", setting, preset, seed, value) for seed in seeds]
    return runs


def _make_run(plan: Plan, phase: str, setting: str, preset: Preset, seed: int, value: Any) -> Run:
    folder = plan.out / phase / setting / preset.name
    if phase == "tune":
        folder /= f"{value:g}"
    folder /= f"seed-{seed}"
    phase_overrides = plan.run_overrides if phase == "run" else plan.tune.overrides if plan.tune else {}
    options = plan.overrides | plan.settings[setting] | preset.overrides | phase_overrides
    if value is not None and plan.tune is not None:
        options[plan.tune.key] = value
    options |= {"run.seed": seed, "run.dir": str(folder.parent), "run.name": folder.name}
    options["eval.score_test"] = phase == "run"
    arguments = ["train", str(plan.config), "--preset", preset.preset]
    for key, option in options.items():
        arguments += [f"--{key}", _as_argument(option)]
    return Run(phase, setting, preset.name, seed, value, folder, tuple(arguments))


def execute(
    runs: Sequence[Run], *, jobs: int, console: Console, command: Sequence[str] = TRAINER, threads: int = 1
) -> list[Run]:
    """Runs what is not finished yet, `jobs` at a time, each a subprocess. Returns the runs that failed."""
    todo = [run for run in runs if not _finished(run)]
    console.print(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished before, {jobs} at a time")
    if todo:
        console.print(f"  {cost(runs, todo, jobs)}")
    children: set[subprocess.Popen[bytes]] = set()
    lock = threading.Lock()
    stopping = threading.Event()
    failed: list[Run] = []
    done = [0]

    def one(run: Run) -> None:
        if stopping.is_set():
            return
        begin = time.monotonic()
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "compare.json").write_text(json.dumps(run.arguments))
        environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))
        with open(_log(run), "wb") as log:
            words = [*command, *run.arguments]
            child = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment)
            with lock:
                children.add(child)
            code = child.wait()
        with lock:
            children.discard(child)
            done[0] += 1
            if code != 0 or run.summary() is None:
                failed.append(run)
                console.print(f"FAILED (exit {code}) {run.label}: see {_log(run)}")
            else:
                minutes = (time.monotonic() - begin) / 60
                console.print(f"{done[0]}/{len(todo)} {run.label}: {_headline(run)} ({minutes:.1f} min)")

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(one, run) for run in todo]
        try:
            for future in futures:
                future.result()
        except BaseException:  # Ctrl-C, SIGTERM or a bug: no run may outlive us
            stopping.set()
            with lock:
                for child in children:
                    child.terminate()
            raise
    return failed


def cost(runs: Sequence[Run], todo: Sequence[Run], jobs: int) -> str:
    """What `todo` will take, from the minutes that finished runs of the same plan took."""
    minutes = [m for run in runs if (m := run.minutes()) is not None]
    if not minutes:
        return "how long: not known before the first has ended (each prints its minutes)"
    each = sum(minutes) / len(minutes)
    return f"how long: about {each * -(-len(todo) // jobs):.0f} minutes ({each:.1f} a run so far)"


def choose(plan: Plan, runs: Sequence[Run]) -> dict[str, Any]:
    """Per setting and preset the value with the best mean validation score; a tie goes to the smaller value.

    A value one of whose runs failed (training that diverged and stopped) cannot win and is listed as failed.
    Raises RuntimeError where no value of a preset is left, ValueError where a run scored the held-out split.
    """
    assert plan.tune is not None
    tuned: dict[str, Any] = {}
    for setting in plan.tune.settings:
        for preset in plan.presets:
            scores, failed = {}, []
            for value in plan.tune.values[preset.name]:
                wanted = (setting, preset.name, value)
                of_value = [run for run in runs if (run.setting, run.preset, run.value) == wanted]
                score = _validation_score(of_value, plan.tune.score)
                if score is None:
                    failed.append(value)
                else:
                    scores[value] = score
            if not scores:
                raise RuntimeError(
                    f"tune: every value of preset {preset.name!r} failed in setting {setting!r}"
                )
            best = max(scores, key=lambda value: (scores[value], -value))
            entry = {"key": plan.tune.key, "value": best, "scores": scores, "failed": failed}
            tuned.setdefault(setting, {})[preset.name] = entry
    return tuned


def _validation_score(runs: Sequence[Run], score: str) -> float | None:
    """Mean over runs (seeds) of a score such as "sampled.solved"; None where a run did not finish."""
    mode, name = score.split(".")
    found = []
    for run in runs:
        summary = run.summary()
        if summary is None:
            return None
        if "test" in summary["final"]:
            raise ValueError(f"{run.folder}: a tuning run scored the held-out split")
        found.append(summary["final"]["validation"][mode][name])
    return sum(found) / len(found)


def planned_runs(plan: Plan, phase: str) -> list[Run]:
    """What a phase would run now; `all` with values yet to be chosen is its tuning part alone."""
    runs = tune_runs(plan) if phase in ("all", "tune") else []
    if phase != "tune" and (plan.tune is None or (plan.out / "tuned.yaml").exists()):
        runs += score_runs(plan, _load_tuned(plan))
    return runs


def _load_tuned(plan: Plan) -> dict[str, Any]:
    if plan.tune is None:
        return {}
    path = plan.out / "tuned.yaml"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no values chosen yet; run --phase tune first")
    return yaml.safe_load(path.read_text())


def compare(
    plan: Plan,
    *,
    phase: str = "all",
    jobs: int = 2,
    console: Console | None = None,
    command: Sequence[str] = TRAINER,
) -> Path:
    """Runs the asked phases and returns the path of results.csv (of tuned.yaml after `tune`)."""
    console = console or Console()
    tuned_file = plan.out / "tuned.yaml"
    if plan.tune is not None and phase in ("all", "tune"):
        runs = tune_runs(plan)
        execute(runs, jobs=jobs, console=console, command=command)
        plan.out.mkdir(parents=True, exist_ok=True)
        tuned_file.write_text(yaml.safe_dump(choose(plan, runs), sort_keys=False))
        if phase == "tune":
            return tuned_file
    runs = score_runs(plan, _load_tuned(plan))
    if phase in ("all", "run"):
        failed = execute(runs, jobs=jobs, console=console, command=command)
        if failed:
            raise RuntimeError(f"{len(failed)} runs failed; run compare again to repeat only those")
    missing = [run.label for run in runs if run.summary() is None]
    if missing:
        raise FileNotFoundError(f"{len(missing)} runs are not finished, first: {missing[0]}")
    return write_results(plan.out, runs, plan.reference, console)


def _finished(run: Run) -> bool:
    record = run.folder / "compare.json"
    if run.summary() is None:
        return False
    if not record.exists() or tuple(json.loads(record.read_text())) != run.arguments:
        raise ValueError(
            f"{run.folder}: finished with other options than the plan's; remove it or change `out`"
        )
    return True


def _log(run: Run) -> Path:
    return run.folder / "console.log"


def _headline(run: Run) -> str:
    summary = run.summary()
    assert summary is not None
    split = "test" if "test" in summary["final"] else "validation"
    scores = summary["final"][split]
    return f"{split} solved {scores['sampled']['solved']:.3f} at T=1, {scores['greedy']['solved']:.3f} greedy"


def _check_keys(path: Any, where: str, raw: Any, known: set[str], needed: set[str]) -> None:
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: {where} must be a mapping, got {raw!r}")
    for key in raw:
        if key not in known:
            raise ValueError(f"{path}: {where}: unknown key {key!r}; known: {sorted(known)}")
    if missing := needed - set(raw):
        raise ValueError(f"{path}: {where}: missing {sorted(missing)}")


def _flat(overrides: Mapping[str, Any] | None, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}, "c.d": 2} -> {"a.b": 1, "c.d": 2}."""
    flat: dict[str, Any] = {}
    for key, value in (overrides or {}).items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _as_argument(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
