"""The table, CSV and plot of a comparison, from its runs' summary.json files (fields: sweep.py)."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from rich import box
from rich.console import Console
from rich.table import Table

from pact_fast.evaluation.stats import (
    Interval,
    bootstrap_difference,
    paired_difference,
    score_mean,
    seed_mean,
)

MODES = {"sampled": "T=1", "greedy": "greedy"}
SCORES = ("solved", "reward", "calls")
COLUMNS = (
    "setting", "preset", "mode", "score", "tuned_value", "seeds", "tasks", "mean", "low", "high",
    "difference", "difference_low", "difference_high", "bootstrap_low", "bootstrap_high",
)  # fmt: skip


class FinishedRun(Protocol):
    @property
    def setting(self) -> str: ...
    @property
    def preset(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def value(self) -> Any: ...
    def summary(self) -> dict[str, Any] | None: ...


def result_rows(runs: Sequence[FinishedRun], reference: str) -> list[dict[str, Any]]:
    """One row per setting x preset x mode x score, on the held-out split (else on validation).

    mean, low, high: over seeds (t interval); for `base` over tasks. difference: reference minus preset,
    paired by the seeds of both (t interval over seeds), and a bootstrap over seeds and tasks beside it.
    """
    rows = []
    for setting in dict.fromkeys(run.setting for run in runs):
        of_setting = [run for run in runs if run.setting == setting]
        presets = list(dict.fromkeys(run.preset for run in of_setting))
        for mode in MODES:
            for score in SCORES:
                blocks = {name: _blocks(of_setting, name, mode) for name in presets}
                rows += _base_rows(of_setting[0], mode, score)
                for name in presets:
                    means = [block[score] for block in blocks[name].values()]
                    interval = seed_mean(score, means)
                    value = next(run.value for run in of_setting if run.preset == name)
                    row = _row(setting, name, mode, score, interval, len(means), blocks[name])
                    row["tuned_value"] = "" if value is None else value
                    if name != reference:
                        row |= _difference(blocks[reference], blocks[name], score)
                    rows.append(row)
    return rows


def write_results(out: Path, runs: Sequence[FinishedRun], reference: str, console: Console) -> Path:
    """Writes results.csv, runs.csv, results.md and results.png, prints the tables, returns the CSV."""
    rows = result_rows(runs, reference)
    out.mkdir(parents=True, exist_ok=True)
    _write_csv(out / "results.csv", COLUMNS, rows)
    per_run = [
        {
            "setting": run.setting,
            "preset": run.preset,
            "seed": run.seed,
            "mode": mode,
            "tuned_value": run.value,
        }
        | {score: _block(run, mode)[score] for score in SCORES}
        for run in runs
        for mode in MODES
    ]
    _write_csv(out / "runs.csv", tuple(per_run[0]), per_run)
    (out / "results.md").write_text(markdown(rows, reference))
    plot(rows, out / "results.png")
    for setting in dict.fromkeys(row["setting"] for row in rows):
        console.print(_table(setting, [row for row in rows if row["setting"] == setting], reference))
    return out / "results.csv"


def markdown(rows: Sequence[dict[str, Any]], reference: str) -> str:
    """Solved shares of every setting as Markdown tables."""
    parts = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        parts.append(f"### {setting}\n")
        head = [
            "preset",
            "tuned",
            *(f"{MODES[m]} solved" for m in MODES),
            *(f"{reference} minus it, {MODES[m]}" for m in MODES),
            "calls",
        ]
        parts += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        parts += ["| " + " | ".join(cells) + " |" for cells in _cells(rows, setting)]
        parts.append("")
    return "\n".join(parts)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Solved share with interval over seeds: one panel a setting, T=1 and greedy side by side."""
    from matplotlib.figure import Figure

    settings = list(dict.fromkeys(row["setting"] for row in rows))
    presets = list(dict.fromkeys(row["preset"] for row in rows))
    figure = Figure(figsize=(4.2 * len(settings) + 1, 0.42 * len(presets) + 1.4), layout="constrained")
    panels = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
    for axes, setting in zip(panels, settings, strict=True):
        for offset, (mode, label) in zip((-0.13, 0.13), MODES.items(), strict=True):
            solved = {
                row["preset"]: row
                for row in rows
                if (row["setting"], row["mode"], row["score"]) == (setting, mode, "solved")
            }
            y = [presets.index(name) + offset for name in solved]
            mean = [row["mean"] for row in solved.values()]
            ends = [
                [abs(row["mean"] - _or(row[end], row["mean"])) for row in solved.values()]
                for end in ("low", "high")
            ]
            axes.errorbar(
                mean,
                y,
                xerr=ends,
                fmt="o" if mode == "sampled" else "D",
                markersize=4,
                capsize=2,
                label=label,
            )
        axes.set(title=setting, xlim=(0, 1), xlabel="held-out tasks solved", yticks=range(len(presets)))
        axes.set_yticklabels(presets)
        axes.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    panels[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def _blocks(runs: Sequence[FinishedRun], preset: str, mode: str) -> dict[int, dict[str, Any]]:
    return {run.seed: _block(run, mode) for run in runs if run.preset == preset}


def _block(run: FinishedRun, mode: str, model: str = "final") -> dict[str, Any]:
    summary = run.summary()
    assert summary is not None
    split = "test" if "test" in summary["final"] else "validation"
    return summary[model][split][mode]


def _base_rows(run: FinishedRun, mode: str, score: str) -> list[dict[str, Any]]:
    """The untrained model, the same for every preset of a setting; none where it was not scored."""
    summary = run.summary()
    if summary is None or not summary.get("base"):
        return []
    block = _block(run, mode, "base")
    per_task = block[f"per_task_{score}"]
    interval = score_mean(score, per_task)
    return [_row(run.setting, "base", mode, score, interval, 1, {run.seed: block})]


def _row(
    setting: str,
    preset: str,
    mode: str,
    score: str,
    interval: Interval,
    seeds: int,
    blocks: dict[int, dict[str, Any]],
) -> dict[str, Any]:
    limits = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    tasks = min(block["tasks"] for block in blocks.values())
    names = {"setting": setting, "preset": preset, "mode": mode, "score": score, "tuned_value": ""}
    return dict.fromkeys(COLUMNS, "") | names | {"seeds": seeds, "tasks": tasks} | limits


def _difference(a: dict[int, dict[str, Any]], b: dict[int, dict[str, Any]], score: str) -> dict[str, float]:
    both = [seed for seed in a if seed in b]
    if not both:
        raise ValueError(f"no seed in common: {sorted(a)} and {sorted(b)}; give both presets the same ones")
    a, b = ({seed: blocks[seed] for seed in both} for blocks in (a, b))
    paired = paired_difference({s: x[score] for s, x in a.items()}, {s: x[score] for s, x in b.items()})
    tasks = f"per_task_{score}"
    spread = bootstrap_difference({s: x[tasks] for s, x in a.items()}, {s: x[tasks] for s, x in b.items()})
    return {
        "difference": paired.mean,
        "difference_low": paired.low,
        "difference_high": paired.high,
        "bootstrap_low": spread.low,
        "bootstrap_high": spread.high,
    }


def _table(setting: str, rows: Sequence[dict[str, Any]], reference: str) -> Table:
    seeds = max(row["seeds"] for row in rows)
    table = Table(title=f"{setting}: solved share, {seeds} seeds, 95% intervals", box=box.SIMPLE_HEAD)
    for column in ("preset", "solved T=1", f"{reference} - it, T=1", "greedy"):
        table.add_column(column, overflow="fold")
    # Four columns fit a terminal of 80; results.md has the others.
    for preset, _, sampled, greedy, difference, *_ in _cells(rows, setting, digits=2):
        table.add_row(
            preset, sampled, difference, greedy.split(" ")[0], style="bold" if preset == reference else ""
        )
    return table


def _cells(rows: Sequence[dict[str, Any]], setting: str, digits: int = 3) -> list[list[str]]:
    """preset, tuned value, solved per mode, difference per mode, calls at T=1."""
    by_key = {(row["preset"], row["mode"], row["score"]): row for row in rows if row["setting"] == setting}
    cells = []
    for preset in dict.fromkeys(row["preset"] for row in rows if row["setting"] == setting):
        solved = [by_key[preset, mode, "solved"] for mode in MODES]
        tuned = solved[0]["tuned_value"]
        cells.append(
            [preset, f"{tuned:g}" if tuned != "" else ""]
            + [_text(row, "", digits) for row in solved]
            + [_text(row, "difference", digits) for row in solved]
            + [f"{by_key[preset, 'sampled', 'calls']['mean']:.2f}"]
        )
    return cells


def _text(row: dict[str, Any], kind: str, digits: int) -> str:
    """Mean (kind "") or signed difference (kind "difference") with limits; empty where there is none."""
    keys = (kind, f"{kind}_low", f"{kind}_high") if kind else ("mean", "low", "high")
    mean, low, high = (row[key] for key in keys)
    if mean == "":
        return ""
    form = f"{'+' if kind else ''}.{digits}f"
    return f"{mean:{form}}" + (
        "" if low != low else f" [{low:{form}}, {high:{form}}]"
    )  # NaN limits: one seed


def _or(value: float, default: float) -> float:
    return default if value != value else value


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
