"""95% intervals for all that is reported: shares, means over tasks, means over seeds, paired differences.

Which interval where:
    share of solved tasks, one attempt each      Wilson score interval (never leaves [0, 1], sane at 0 and n)
    mean over tasks (reward, calls, shares of     Student t over the tasks' means; several attempts at a task
      several attempts a task)                     are averaged first, since they are not independent
    mean over seeds                               Student t over the seeds' means
    of those, solved and calls                    cut to what a share and a count can be
    preset A minus preset B                       paired by seed: the difference of each seed, then Student t
                                                   over seeds; `bootstrap` also resamples the tasks
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
BOUNDS = {"solved": (0.0, 1.0), "calls": (0.0, np.inf)}  # of scores that have some


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence limits; `n` is the number of independent units behind it."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson(successes: float, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson score interval of the share successes / n; ValueError unless 0 <= successes <= n and n > 0."""
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"wilson: successes={successes} of n={n}; need n > 0 and 0 <= successes <= n")
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * float(np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)))
    # The limits equal 0 and 1 at the ends only up to rounding.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(share, low, high, n)


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Student t interval of the mean of independent values. One value has no interval: its limits are NaN."""
    data = _finite(values, "values")
    mean = float(data.mean())
    if len(data) == 1:
        return Interval(mean, float("nan"), float("nan"), 1)
    half = float(stats.t.ppf(0.5 + confidence / 2, len(data) - 1) * data.std(ddof=1) / np.sqrt(len(data)))
    return Interval(mean, mean - half, mean + half, len(data))


def share_interval(per_task: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Interval of the mean of the tasks' own shares: Wilson where all are 0 or 1, else t cut to [0, 1]."""
    data = _finite(per_task, "per_task")
    if data.min() < 0 or data.max() > 1:
        raise ValueError(f"share_interval: per_task must lie in [0, 1], got {data.min()} to {data.max()}")
    if np.isin(data, (0.0, 1.0)).all():
        return wilson(float(data.sum()), len(data), confidence)
    t = mean_interval(per_task, confidence)
    return Interval(t.mean, max(0.0, t.low), min(1.0, t.high), t.n)


def score_mean(name: str, per_task: Sequence[float]) -> Interval:
    """Interval of the mean over tasks of an evaluation's "solved" (a share), "calls" (a count) or another
    score."""
    return share_interval(per_task) if name == "solved" else _within(name, mean_interval(per_task))


def seed_mean(name: str, means: Sequence[float]) -> Interval:
    """Student t interval over the means of seeds, within what the score can be; few seeds carry it out."""
    return _within(name, mean_interval(means))


def _within(name: str, t: Interval) -> Interval:
    low, high = np.clip([t.low, t.high], *BOUNDS.get(name, (-np.inf, np.inf))).tolist()
    return Interval(t.mean, low, high, t.n)


def paired_difference(
    a: Mapping[Any, float], b: Mapping[Any, float], confidence: float = CONFIDENCE
) -> Interval:
    """Mean of a - b over seeds, paired by seed: {seed: score}. Student t over the per-seed differences.

    Raises ValueError where the two were not run on the same seeds: an unpaired difference is another number.
    """
    if set(a) != set(b):
        raise ValueError(f"paired_difference: seeds differ: {sorted(map(str, a))} and {sorted(map(str, b))}")
    return mean_interval([a[seed] - b[seed] for seed in a], confidence)


def bootstrap_difference(
    a: Mapping[Any, Sequence[float]],
    b: Mapping[Any, Sequence[float]],
    *,
    resamples: int = 10_000,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Mean of a - b over seeds x tasks, {seed: per-task scores}: percentile bootstrap over both at once.

    The tasks must be the same, in the same order, for every seed and both sides. Answers "would it hold on
    other tasks too", where `paired_difference` takes the tasks as given. With few seeds it is too narrow.
    """
    if set(a) != set(b):
        raise ValueError(
            f"bootstrap_difference: seeds differ: {sorted(map(str, a))} and {sorted(map(str, b))}"
        )
    lengths = {len(row) for side in (a, b) for row in side.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"bootstrap_difference: every seed needs the same tasks, got {sorted(lengths)} of them"
        )
    table = np.array([np.subtract(a[key], b[key]) for key in a], dtype=float)  # [seeds, tasks]
    rng = np.random.default_rng(seed)
    seeds, tasks = table.shape
    # The mean over resampled seeds and tasks is bilinear in the two draws' counts.
    seed_counts = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    task_counts = rng.multinomial(tasks, np.full(tasks, 1 / tasks), size=resamples) / tasks
    means = np.einsum("rs,st,rt->r", seed_counts, table, task_counts, optimize=True)
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(table.mean()), float(low), float(high), tasks)


def evaluation_block(
    per_task_solved: Sequence[float], per_task_reward: Sequence[float], per_task_calls: Sequence[float]
) -> dict[str, Any]:
    """The block of `summary.json` and of an evaluation row for one split at one temperature.

    Each argument holds one number a task (several attempts at a task: their mean). Returns solved, reward,
    calls, each with `_low` and `_high` (95%), `tasks`, and the per-task lists themselves.
    """
    lengths = {len(per_task_solved), len(per_task_reward), len(per_task_calls)}
    if len(lengths) != 1:
        raise ValueError(f"evaluation_block: the three lists differ in length: {sorted(lengths)}")
    block: dict[str, Any] = {"tasks": len(per_task_solved)}
    scores = {"solved": per_task_solved, "reward": per_task_reward, "calls": per_task_calls}
    for name, per_task in scores.items():
        interval = score_mean(name, per_task)
        block |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    block["per_task_solved"] = [float(value) for value in per_task_solved]
    block["per_task_reward"] = [float(value) for value in per_task_reward]
    block["per_task_calls"] = [float(value) for value in per_task_calls]
    return block


def _finite(values: Sequence[float], name: str) -> np.ndarray:
    data = np.asarray(values, dtype=float)
    if data.ndim != 1 or len(data) == 0:
        raise ValueError(f"{name} must be a non-empty list of numbers, got shape {data.shape}")
    if not np.isfinite(data).all():
        raise ValueError(f"{name} holds {int((~np.isfinite(data)).sum())} non-finite numbers")
    return data
