"""`report.html` of a run folder: one self-contained page (inline SVG, no scripts, no fonts or files fetched).

Reads, all written by the trainer and each optional but the first:
    metrics.jsonl     see metrics.py
    summary.json      scores of the base and the trained model; see sweep.py for its fields
    transcript.json   one held-out task as the trained model did it:
                      {"task": str, "solved": bool, "reward": float, "failure": str | None,
                       "expected": str | None, "pieces": [{"role", "component", "text"}, ...]}
                      or just the list of pieces. Pieces follow each other as the model saw or wrote them and
                      join to the whole text; role is system | user | assistant | tool, component a name of
                      data.Component in lower case
    config.json       the run's whole configuration

`write_report(run_dir)` returns the page's path; `final_table(summary)` is the table at the end of training.
"""

from __future__ import annotations

import html
import io
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import yaml
from rich import box
from rich.table import Table

from pact_fast.data.colours import css
from pact_fast.evaluation.stats import Interval, score_mean
from pact_fast.evaluation.transcripts import conversation, key_line
from pact_fast.files import writing
from pact_fast.metrics import METRICS_FILE, describe, read_metrics

SCORES = (("solved", "solved share"), ("reward", "mean reward"), ("calls", "calls per task"))
MODES = (("sampled", "T=1"), ("greedy", "greedy"))

# (title, metrics drawn in it); a metric the run did not log is left out, an empty chart too.
CHARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Reward of rollouts", ("reward", "reward_std")),
    ("Solved share of rollouts", ("solved",)),
    ("Loss parts", ("loss", "policy_loss", "sft_loss")),
    ("Gradient norm", ("grad_norm",)),
    ("Trace log-prob", ("pact/trace_logprob",)),
    ("Trace gain", ("pact/trace_gain",)),
    ("Annealing", ("pact/tool_call_scale", "pact/reasoning_level", "pact/anchored")),
    ("Engine against trainer", ("pact/logprob_mismatch", "pact/logprob_mismatch_max")),
    ("Policy shift", ("pact/ppo_kl", "clip_ratio", "kl")),
    ("Entropy", ("entropy",)),
    ("Length of a rollout", ("completions/mean_length", "completions/max_length")),
    ("Calls of a rollout", ("completions/calls", "completions/turns")),
    ("Throughput", ("tokens_per_second", "rollout_tokens_per_second")),
    ("Time of a step", ("time/rollout", "time/score", "time/update", "time/step")),
    ("Peak memory", ("memory/peak",)),
)
SCHEDULES = ("Annealing",)  # drawn as they are: smoothing would bend their steps
# Placeholders that matplotlib draws with; the page puts CSS colours in their place: one SVG, light and dark.
_INK, _GRID = "#010203", "#010204"
_SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04")


def score_interval(block: Mapping[str, Any], name: str) -> Interval | None:
    """Interval of solved, reward or calls in a score block: from its tasks, else its own limits."""
    if name not in block:
        return None
    per_task = block.get(f"per_task_{name}")
    if per_task:
        return score_mean(name, per_task)
    low, high = (block.get(f"{name}_{end}") for end in ("low", "high"))
    nan = float("nan")
    return Interval(
        block[name], nan if low is None else low, nan if high is None else high, block.get("tasks", 0)
    )


def score_rows(
    summary: Mapping[str, Any], split: str, *, digits: int = 3
) -> list[tuple[str, str, int, list[str]]]:
    """(model, mode, tasks, [solved, reward, calls] with 95% limits) of base and trained on one split."""
    rows = []
    for model, scores in (("base", summary.get("base") or {}), ("trained", summary.get("final") or {})):
        for mode, label in MODES:
            block = (scores.get(split) or {}).get(mode)
            if block:
                cells = [_cell(score_interval(block, name), digits) for name, _ in SCORES]
                rows.append((model, label, int(block.get("tasks", 0)), cells))
    return rows


def final_table(summary: Mapping[str, Any], split: str | None = None) -> Table:
    """Base against trained on the held-out tasks, at T=1 and greedy, with 95% intervals; fits 80 columns."""
    split = split or _scored_split(summary)
    rows = score_rows(summary, split, digits=2)
    tasks = f"{rows[0][2]} " if rows else ""
    name = "held-out tasks" if split == "test" else "validation tasks"
    table = Table(
        title=f"{summary.get('preset', 'run')} on {tasks}{name} (95% intervals)", box=box.SIMPLE_HEAD
    )
    table.add_column("model")
    for _, label in SCORES:
        table.add_column(label, justify="right", no_wrap=True)
    for model, mode, _, cells in rows:
        table.add_row(f"{model}, {mode}", *cells, style="bold" if model == "trained" else "")
    return table


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Writes run_dir/report.html, returns its path. FileNotFoundError where the folder holds no metrics."""
    run_dir = Path(run_dir)
    if not (run_dir / METRICS_FILE).exists():
        raise FileNotFoundError(f"{run_dir / METRICS_FILE}: no such file; is {run_dir} a run folder?")
    rows = read_metrics(run_dir)
    summary = _load_json(run_dir / "summary.json") or {}
    config = _load_json(run_dir / "config.json") or summary.get("config")
    page = Template(_PAGE).substitute(
        title=html.escape(f"{summary.get('preset', '')} {run_dir.resolve().name}".strip()),
        facts=_facts(rows, summary),
        colours=css(),
        scores=_scores(summary),
        validation=_charts(rows, evaluation=True),
        charts=_charts(rows, evaluation=False),
        failures=_failures(rows),
        transcript=_transcript(_load_json(run_dir / "transcript.json")),
        config=html.escape(yaml.safe_dump(config, sort_keys=False) if config else "not recorded"),
    )
    path = run_dir / "report.html"
    beside = path.with_suffix(".html.tmp")
    with writing(beside):
        beside.write_text(page, encoding="utf-8")
    beside.replace(path)
    return path


def _facts(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    train = [row for row in rows if "eval/solved" not in row]
    last = train[-1] if train else {}
    facts = {
        "preset": summary.get("preset"),
        "seed": summary.get("seed"),
        "steps": last["step"] + 1 if last else None,  # rows count from 0
        "training time": f"{last['time'] / 60:.1f} min" if last.get("time") else None,
        "tokens trained on": f"{last['num_tokens']:,.0f}" if last.get("num_tokens") else None,
        "skipped steps": last.get("pact/skipped_steps"),
        "non-finite numbers": sum(row.get("nonfinite", 0) for row in rows) or None,
    }
    shown = "".join(
        f"<div><dt>{k}</dt><dd>{html.escape(str(v))}</dd></div>" for k, v in facts.items() if v is not None
    )
    return f"<dl class='facts'>{shown}</dl>"


def _scores(summary: Mapping[str, Any]) -> str:
    parts = []
    head = ("model", "sampling", "tasks", *(label for _, label in SCORES))
    for split, caption in (("test", "Held-out tasks"), ("validation", "Validation tasks")):
        rows = score_rows(summary, split)
        if rows:
            body = [(model, mode, str(tasks), *cells) for model, mode, tasks, cells in rows]
            parts.append(_table(f"{caption} (95% intervals)", head, body))
    return "".join(parts) or "<p>The run has not been scored: it holds no summary.json.</p>"


def _charts(rows: Sequence[Mapping[str, Any]], *, evaluation: bool) -> str:
    if evaluation:
        scored = [row for row in rows if "eval/solved" in row]
        figures = [_evaluation_chart(scored, name, label) for name, label in SCORES]
        return "".join(figure for figure in figures if figure) or "<p>No evaluation row in metrics.jsonl.</p>"
    train = [row for row in rows if "eval/solved" not in row]
    return (
        "".join(_line_chart(train, title, names) for title, names in CHARTS)
        or "<p>No training step was logged.</p>"
    )


def _line_chart(rows: Sequence[Mapping[str, Any]], title: str, names: Sequence[str]) -> str:
    series = {name: [(r["step"], r[name]) for r in rows if r.get(name) is not None] for name in names}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""

    def draw(axes: Any) -> None:
        for colour, (name, points) in zip(_SERIES, series.items(), strict=False):
            x, y = [step for step, _ in points], [value for _, value in points]
            if title not in SCHEDULES and len(y) >= 20:
                axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
                y = _running_mean(y, len(y) // 20)
            axes.plot(x, y, color=colour, linewidth=1.6, label=name, marker="." if len(y) < 3 else "")
        axes.set_ylabel(" / ".join(dict.fromkeys(filter(None, (describe(n).unit for n in series)))))

    notes = "; ".join(f"{name}: {describe(name).meaning}" for name in series)
    return _figure(title, notes, draw, legend=len(series) > 1)


def _evaluation_chart(rows: Sequence[Mapping[str, Any]], name: str, label: str) -> str:
    key = f"eval/{name}"
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get(key) is not None:
            curve = f"{row.get('eval/split', 'validation')}, {_mode(row.get('eval/temperature'))}"
            curves.setdefault(curve, []).append(row)
    if not curves:
        return ""

    def draw(axes: Any) -> None:
        for colour, (mode, points) in zip(_SERIES, curves.items(), strict=False):
            x, y = [p["step"] for p in points], [p[key] for p in points]
            axes.plot(x, y, color=colour, linewidth=1.6, marker="o", markersize=3, label=mode)
            limits = [
                (p["step"], p[f"{key}_low"], p[f"{key}_high"])
                for p in points
                if p.get(f"{key}_low") is not None
            ]
            if limits:
                axes.fill_between(*zip(*limits, strict=True), color=colour, alpha=0.15, linewidth=0)
        if name == "solved":
            axes.set_ylim(0, 1)

    return _figure(f"Evaluation: {label}", "bands: 95% interval", draw, legend=True)


def _figure(title: str, notes: str, draw: Callable[[Any], None], *, legend: bool) -> str:
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    settings: Any = {
        "svg.fonttype": "none",  # text stays text, in the page's own font
        "svg.hashsalt": title,  # ids repeat from run to run and differ from chart to chart
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _GRID,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "grid.color": _GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "font.size": 9,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.6, 2.6), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_xlabel("step")
        axes.ticklabel_format(useOffset=False)
        if legend:
            axes.legend(fontsize=8)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace(_INK, "var(--ink)").replace(_GRID, "var(--line)")
    for number, colour in enumerate(_SERIES):
        svg = svg.replace(colour, f"var(--series-{number})")
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}<p>{html.escape(notes)}</p></figure>"


def _failures(rows: Sequence[Mapping[str, Any]]) -> str:
    """Failure kinds of the last evaluation of each split and temperature, as a table."""
    last = {(row.get("eval/split"), row.get("eval/temperature")): row for row in rows if "eval/solved" in row}
    prefix = "eval/failure/"
    kinds = sorted(
        {name.removeprefix(prefix) for row in last.values() for name in row if name.startswith(prefix)}
    )
    if not kinds:
        return "<p>No failure was counted.</p>"
    head = ("split", "sampling", "step", *(kind.replace("_", " ") for kind in kinds))
    body = [
        (
            str(split),
            _mode(temperature),
            str(row["step"]),
            *(f"{row.get(prefix + k) or 0:.3f}" for k in kinds),
        )
        for (split, temperature), row in last.items()
    ]
    return _table("share of tasks", head, body)


def _table(caption: str, head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    rows = "".join(line(row, "td") for row in body)
    return (
        f"<table><caption>{caption}</caption><thead>{line(head, 'th')}</thead><tbody>{rows}</tbody></table>"
    )


def _mode(temperature: float | None) -> str:
    if temperature is None:
        return "T=?"
    return "greedy" if temperature == 0 else f"T={temperature:g}"


def _transcript(record: Any) -> str:
    if not record:
        return "<p>No transcript was recorded.</p>"
    facts, pieces = (record, record["pieces"]) if isinstance(record, dict) else ({}, record)
    shown = {
        k: facts[k] for k in ("task", "solved", "reward", "failure", "expected") if facts.get(k) is not None
    }
    line = ", ".join(f"{k}: {v}" for k, v in shown.items())
    return f"<p>{html.escape(line)}</p>{key_line()}{conversation(pieces, 'transcript.json')}"


def _scored_split(summary: Mapping[str, Any]) -> str:
    return "test" if (summary.get("final") or {}).get("test") else "validation"


def _cell(interval: Interval | None, digits: int) -> str:
    if interval is None:
        return "-"
    mean = f"{interval.mean:.{digits}f}"
    if math.isnan(interval.low):  # one task has no interval
        return mean
    return f"{mean} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i + 1] - sums[max(0, i + 1 - width)]) / min(width, i + 1) for i in range(len(values))]


def _load_json(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


_PAGE = (Path(__file__).parent / "report_page.html").read_text(encoding="utf-8")
