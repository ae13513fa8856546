"""What a run measures and where it goes: metrics.jsonl, TensorBoard events, the live progress display.

`metrics.jsonl` holds one JSON object a line: {"step": int, "time": float, <name>: number, ...}. Train rows
and evaluation rows (those with `eval/solved`) share the file. `METRICS` is the frozen table of names; a name
outside it is an error, so that the report, TensorBoard and other readers never see two spellings of a thing.

A number that is not finite is written as null (NaN is no JSON) and counted in the row under `nonfinite`:
a row without that key is clean, and no reader mistakes a diverged loss for a missing one.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pact_fast.files import writing

METRICS_FILE = "metrics.jsonl"
EVENTS_DIR = "tensorboard"
REPORT_TO = ("wandb", "trackio")


@dataclass(frozen=True)
class Metric:
    meaning: str
    unit: str = ""


# Names follow TRL's where TRL has one; what only PACT has stands under pact/.
METRICS: dict[str, Metric] = {
    "loss": Metric("total loss: policy_loss + beta_SFT * sft_loss (+ distill_loss, router_loss)"),
    "policy_loss": Metric("clipped surrogate of the rollouts (with KL and entropy terms where on)"),
    "sft_loss": Metric("component-weighted cross-entropy of the expert trace"),
    "distill_loss": Metric("divergence of y under x from y under c, weighted and clipped"),
    "router_loss": Metric(
        "auxiliary loss of expert routers, with its coefficient, where the model asks for it"
    ),
    "kl": Metric("KL to the reference policy, k3 estimator (0 where beta is 0)", "nats"),
    "grad_norm": Metric("norm of the whole gradient before clipping"),
    "learning_rate": Metric("learning rate of the step"),
    "num_tokens": Metric("packed tokens trained on so far", "tokens"),
    "reward": Metric("mean reward of the step's rollouts"),
    "reward_std": Metric("mean over prompts of the reward's standard deviation in the group"),
    "solved": Metric("share of the step's rollouts that solved their task", "share"),
    "completions/mean_length": Metric("sampled tokens of a rollout", "tokens"),
    "completions/max_length": Metric("sampled tokens of the longest rollout", "tokens"),
    "completions/calls": Metric("tool calls of a rollout", "calls"),
    "completions/turns": Metric("assistant turns of a rollout", "turns"),
    "completions/clipped_ratio": Metric("share of rollouts cut by the length or turn limit", "share"),
    "frac_reward_zero_std": Metric("share of prompts whose rollouts all got the same reward", "share"),
    "entropy": Metric("mean entropy of the policy at the trained tokens", "nats"),
    "clip_ratio": Metric("share of policy tokens whose clipped branch is active", "share"),
    "tokens_per_second": Metric("packed tokens trained on per second of the whole step", "tokens/s"),
    "rollout_tokens_per_second": Metric("sampled tokens per second of rollout", "tokens/s"),
    "mfu": Metric("model FLOP utilisation of the update", "share"),
    "memory/peak": Metric("peak memory: of the GPU, or resident size on CPU", "GiB"),
    "memory/rollout": Metric("peak of the rollouts; on CPU the resident size after them", "GiB"),
    "memory/score": Metric("peak of the scoring passes; on CPU the resident size after them", "GiB"),
    "memory/update": Metric("peak of the update; on CPU the resident size after it", "GiB"),
    "time/rollout": Metric("rollouts, tools included; of those sampled ahead the wait for them", "s"),
    "time/score": Metric("scoring passes (old log-probs, gauges)", "s"),
    "time/update": Metric("forward, backward, optimizer step", "s"),
    "time/eval": Metric("evaluation", "s"),
    "time/checkpoint": Metric("training time spent on saving", "s"),
    "time/step": Metric("the whole training step", "s"),
    "pact/ppo_kl": Metric("mean of old - new log-prob; 0 on the first update after a rollout", "nats"),
    "pact/trace_logprob": Metric("mean log-prob of the trace's supervised tokens, log pi(h|x)", "nats"),
    "pact/trace_gain": Metric("mean of log pi(y|x,h) - log pi(y|x) over sampled tokens", "nats"),
    "pact/trace_gain_positive": Metric("trace_gain over tokens of positive advantage", "nats"),
    "pact/trace_gain_negative": Metric("trace_gain over tokens of negative advantage", "nats"),
    "pact/context_share": Metric("share of rollouts that have a privileged context", "share"),
    "pact/context_words": Metric("share of the rollouts' words that stand in c and not in x", "share"),
    "pact/divergence": Metric(
        "mean divergence of pi(.|x) from pi(.|c) over y; sampled: log-prob gap", "nats"
    ),
    "pact/divergence_wrong": Metric("the same to wrong contexts, by sampled tokens", "nats"),
    "pact/divergence_clipped": Metric("share of positions whose divergence is over the clip", "share"),
    "pact/gap": Metric("mean gap that sampled tokens learn by (objective.distillation)", "nats"),
    "pact/context_transfer": Metric("cosine of the policy gradients under (x,h) and under x, same rollouts"),
    "pact/context_transfer_positive": Metric("context_transfer of tokens of positive advantage"),
    "pact/context_transfer_negative": Metric("context_transfer of tokens of negative advantage"),
    "pact/context_transfer_agree": Metric("context_transfer of tokens that the trace makes no less likely"),
    "pact/context_transfer_depart": Metric("context_transfer of tokens that the trace makes less likely"),
    "pact/logprob_mismatch": Metric(
        "mean |engine - trainer| prompt-only log-prob over sampled tokens", "nats"
    ),
    "pact/logprob_mismatch_max": Metric("largest |engine - trainer| prompt-only log-prob", "nats"),
    "pact/anchored": Metric("share of prompts trained with the prompt-only ratio", "share"),
    "pact/tool_call_scale": Metric("lambda: strength of tool-call tokens in the SFT term"),
    "pact/reasoning_level": Metric("L: reasoning segments still supervised", "segments"),
    "pact/sft_coef": Metric("weight of the SFT term (alpha, or CHORD's mu)"),
    "pact/is_correction": Metric("mean importance weight that corrects the engine's mismatch"),
    "pact/skipped_steps": Metric("updates skipped so far for a non-finite loss or gradient", "steps"),
    "pact/staleness": Metric("updates between the weights that sampled and those that train", "updates"),
    "eval/solved": Metric("share of held-out tasks solved", "share"),
    "eval/reward": Metric("mean reward on held-out tasks"),
    "eval/calls": Metric("tool calls per held-out task", "calls"),
    "eval/tasks": Metric("held-out tasks behind the row", "tasks"),
    "eval/temperature": Metric("sampling temperature of the row (0: greedy)"),
    "eval/split": Metric("validation or test"),
    "nonfinite": Metric("numbers of the row that were not finite and stand as null", "numbers"),
}
# eval/solved_low and eval/solved_high are the 95% limits of eval/solved, and so for the other two.
METRICS |= {
    f"eval/{name}_{end}": Metric(f"{end}er 95% limit of eval/{name}", METRICS[f"eval/{name}"].unit)
    for name in ("solved", "reward", "calls")
    for end in ("low", "high")
}
PREFIXES = {
    "eval/failure/": Metric("share of held-out tasks that failed this way", "share"),
}


RENAMED = {  # old name: what it is called now
    "pact/engine_gap": "pact/logprob_mismatch",
    "pact/engine_gap_max": "pact/logprob_mismatch_max",
}


def describe(name: str) -> Metric:
    """Meaning and unit of a metric. Raises ValueError for a name outside the table, with the nearest one."""
    if name in METRICS:
        return METRICS[name]
    for prefix, metric in PREFIXES.items():
        if name.startswith(prefix) and len(name) > len(prefix):
            return metric
    if name in RENAMED:
        raise ValueError(f"metric {name!r} was renamed to {RENAMED[name]!r}")
    near = difflib.get_close_matches(name, METRICS, n=1)
    hint = f"; nearest: {near[0]!r}" if near else ""
    raise ValueError(f"unknown metric {name!r}{hint}. Names are frozen in pact_fast.metrics.METRICS")


class MetricsLogger:
    """Appends rows to `run_dir/metrics.jsonl` and to TensorBoard, each flushed as it is written.

    resume_step=None: a new run. Rows and events of an earlier run in the folder are moved aside
    (`metrics.1.jsonl`, `tensorboard.1`), never mixed or lost.
    resume_step=s: the run goes on from a checkpoint taken after step s; rows beyond s are dropped (they will
    be written again), and so is a last line that a crash cut short.

    write=False: for the ranks beside the first; rows are checked and returned, nothing is written.

    "time" is seconds of training so far by the monotonic clock, carried over a resume: a clock that is set
    back cannot make it run backwards.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        resume_step: int | None = None,
        tensorboard: bool = True,
        report_to: Iterable[str] = (),
        run_config: Mapping[str, Any] | None = None,
        tracker_options: Mapping[str, Any] | None = None,
        write: bool = True,
    ) -> None:
        self._write = write
        self._start = time.monotonic()
        self._events: Any = None
        self._trackers: list[Any] = []
        if not write:
            return
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / METRICS_FILE
        elapsed = 0.0
        if resume_step is None:
            _move_aside(path)
            _move_aside(self.run_dir / EVENTS_DIR)
        elif path.exists():
            kept = [row for row in read_metrics(path) if row["step"] <= resume_step]
            elapsed = max((row.get("time") or 0.0 for row in kept), default=0.0)
            _rewrite(path, kept)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._start -= elapsed
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # a second of imports, only where wanted

            purge = None if resume_step is None else resume_step + 1
            self._events = SummaryWriter(str(self.run_dir / EVENTS_DIR), purge_step=purge)
        self._trackers = [
            _tracker(name, self.run_dir, run_config, tracker_options or {}, resumed=resume_step is not None)
            for name in report_to
        ]

    def log(self, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Writes one row and returns it as written. Values: numbers, 0-dim tensors, or text (eval/split)."""
        row: dict[str, Any] = {"step": int(step), "time": round(time.monotonic() - self._start, 3)}
        nonfinite = 0
        for name, value in values.items():
            describe(name)
            if isinstance(value, str):
                row[name] = value
                continue
            number = float(value)
            if not math.isfinite(number):
                nonfinite += 1
                row[name] = None
            else:
                row[name] = int(number) if isinstance(value, int) else number
        if nonfinite:
            row["nonfinite"] = nonfinite
        if not self._write:
            return row
        with writing(self.run_dir / METRICS_FILE):
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        numbers = {_tag(name, row): value for name, value in row.items() if _plotted(name, value)}
        if self._events is not None:
            with writing(self.run_dir / EVENTS_DIR):
                for tag, value in numbers.items():
                    self._events.add_scalar(tag, value, row["step"])
                self._events.flush()
        for tracker in self._trackers:
            tracker.log(numbers, step=row["step"])
        return row

    def close(self) -> None:
        if not self._write:
            return
        with writing(self.run_dir / METRICS_FILE):
            self._file.close()
        if self._events is not None:
            with writing(self.run_dir / EVENTS_DIR):
                self._events.close()
        for tracker in self._trackers:
            tracker.finish()

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl (or of the run folder that holds one), in the order they were written.

    A last line without its newline is what a crash leaves: it is dropped. Any other line that is no JSON
    object with a step raises ValueError with file and line.
    """
    path = Path(path)
    if path.is_dir():
        path /= METRICS_FILE
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # after the last newline: nothing, or a cut line
        try:
            row = json.loads(line.decode())
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("no JSON object with an integer step")
        except (ValueError, RecursionError) as error:
            told = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
            raise ValueError(f"{path}:{number}: {told}: {line[:80].decode(errors='replace')!r}") from error
        rows.append(row)
    return rows


class ProgressDisplay:
    """Live line of a run: step, reward, solved share, tokens/s, time left; plain lines without a terminal.

    with ProgressDisplay(total_steps, start_step=0) as progress: ... progress.update(step, row)
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        console: Console | None = None,
        plain_every: float = 10.0,
    ) -> None:
        self.console = console or Console()
        self.total, self.start_step, self.plain_every = total_steps, start_step, plain_every
        self._begin = time.monotonic()
        self._last_plain = -math.inf
        self._bar: Progress | None = None
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("reward {task.fields[reward]}  solved {task.fields[solved]}"),
                TextColumn("{task.fields[speed]} tok/s"),
                TimeElapsedColumn(),
                TextColumn("left {task.fields[left]}"),
                console=self.console,
            )
            empty: dict[str, Any] = dict.fromkeys(("reward", "solved", "speed", "left"), "-")
            self._task = self._bar.add_task("training", total=total_steps, completed=start_step, **empty)

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        """Shows that `step` steps are done; `row` as returned by MetricsLogger.log."""
        left = self._time_left(step)
        fields: dict[str, Any] = {
            "reward": _short(row.get("reward"), "{:.3f}"),
            "solved": _short(row.get("solved"), "{:.2f}"),
            "speed": _short(row.get("tokens_per_second"), "{:,.0f}"),
            "left": left,
        }
        if self._bar is not None:
            self._bar.update(self._task, completed=step, **fields)
            return
        now = time.monotonic()
        if now - self._last_plain >= self.plain_every or step >= self.total:
            self._last_plain = now
            self.console.print(
                f"step {step}/{self.total}  reward {fields['reward']}  solved {fields['solved']}  "
                f"{fields['speed']} tok/s  left {left}",
                highlight=False,
                soft_wrap=True,
            )

    def message(self, text: str) -> None:
        """A line above the bar (evaluation results, warnings)."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def _time_left(self, step: int) -> str:
        done = step - self.start_step
        if done <= 0:
            return "-"
        seconds = round((time.monotonic() - self._begin) / done * max(0, self.total - step))
        hours, rest = divmod(seconds, 3600)
        return (f"{hours}:" if hours else "") + f"{rest // 60:02d}:{rest % 60:02d}"

    def __enter__(self) -> ProgressDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _short(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)


def _plotted(name: str, value: Any) -> bool:
    return name not in ("step", "time") and isinstance(value, (int, float))


def _tag(name: str, row: Mapping[str, Any]) -> str:
    """TensorBoard keeps one curve a tag, so evaluation rows carry split and temperature in it."""
    if not name.startswith("eval/") or "eval/split" not in row:
        return name
    temperature = row.get("eval/temperature")
    mode = "greedy" if temperature == 0 else f"T{temperature:g}" if temperature is not None else "T?"
    return f"eval_{row['eval/split']}_{mode}/{name.removeprefix('eval/')}"


def _move_aside(path: Path) -> None:
    if not path.exists():
        return
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)


def _rewrite(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def check_trackers(names: Iterable[str]) -> None:
    """ValueError for a tracker that there is not, ImportError for one that is not installed."""
    for name in names:
        if name not in REPORT_TO:
            raise ValueError(f"report_to={name!r}: TensorBoard is always written; the others are {REPORT_TO}")
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"report_to={name!r} needs `pip install {name}`")


def _tracker(
    name: str, run_dir: Path, config: Mapping[str, Any] | None, options: Mapping[str, Any], *, resumed: bool
) -> Any:
    """wandb and trackio share init/log/finish; both are optional packages. Grouping, tags and going on under
    the same id are wandb's."""
    check_trackers([name])
    given: dict[str, Any] = {"project": options.get("project") or "pact_fast"}
    if name == "wandb":
        identity = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
        if (marker := run_dir / "run.json").exists():
            identity = json.loads(marker.read_text(encoding="utf-8"))["id"][:16]
        given |= {"dir": str(run_dir), "group": options.get("group"), "tags": list(options.get("tags") or [])}
        given |= {"id": identity, "resume": "allow" if resumed else None}
    return importlib.import_module(name).init(name=run_dir.name, config=dict(config or {}), **given)
