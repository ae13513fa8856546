"""What an H100 is expected to show, beside what the CSV rows say: a line a target, its value, met or missed.

The bounds follow what the first run measured and what is built since (bench/LOG.md), not figures that others
have published. Beside each value stands the best peer's of the same op, mode, shape and metric.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.rows import Row

TRAIN = "forward+backward"
MAIN = "N=8192 H=4096 V=151936"
SMALL = "N=8192 H=2048 V=151936"
TREE = "x=3000 h=2000 y=1500 G=8"
OURS = "pact_fast"


@dataclass(frozen=True)
class Target:
    """`op`, `mode`, `shape` (how it begins) and `metric` choose rows; `impl` one of ours, else our best.

    over: provider (or provider/impl) whose value of the same rows ours is divided by; None: ours itself.
    bound: at most, or at least where `least`.
    """

    what: str
    op: str
    mode: str
    shape: str
    bound: float
    metric: str = "time"
    impl: str | None = None
    over: str | None = None
    least: bool = False
    mode_over: str | None = None  # of the rows of `over`, where it is another
    inverse: bool = False  # over / ours instead of ours / over


def attention(impl: str, mode: str, bound: float) -> Target:
    """TFLOP/s of visible pairs."""
    what = f"attention {impl}, {mode}, TFLOP/s"
    return Target(what, "tree_attention", mode, TREE, bound, "effective", impl, least=True)


TARGETS = (
    Target("cross-entropy / 3 GEMMs, H=4096", "linear_cross_entropy", TRAIN, MAIN, 1.06, over="gemms"),
    Target("PACT loss / 3 GEMMs, H=4096", "linear_pact_loss", TRAIN, MAIN, 1.06, over="gemms"),
    Target("cross-entropy / 3 GEMMs, H=2048", "linear_cross_entropy", TRAIN, SMALL, 1.10, over="gemms"),
    Target("cross-entropy / QuACK, H=2048", "linear_cross_entropy", TRAIN, SMALL, 1.0, over="quack"),
    Target("cross-entropy, peak GiB", "linear_cross_entropy", TRAIN, MAIN, 4.9, "peak_memory"),
    Target(
        "30% live rows / all rows", "linear_cross_entropy", "live30", MAIN, 0.36, over=OURS, mode_over=TRAIN
    ),
    Target("log-probs / 1 GEMM", "linear_logprob", "forward", MAIN, 1.09, over="gemms"),
    Target("log-probs with gradient / 4 GEMMs", "linear_logprob", TRAIN, MAIN, 1.05, over="gemms"),
    Target("their GiB beyond in- and outputs", "linear_logprob", TRAIN, MAIN, 0.6, "extra_memory"),
    Target("low-memory loss / 4 GEMMs", "linear_pact_loss", "low memory", MAIN, 1.05, over="gemms"),
    Target("low-memory loss, peak GiB", "linear_pact_loss", "low memory", MAIN, 2.9, "peak_memory"),
    Target("reverse KL / 4 GEMMs", "linear_divergence", "reverse_kl", MAIN, 1.15, over="gemms"),
    Target("JSD / 4 GEMMs", "linear_divergence", "jsd", MAIN, 1.15, over="gemms"),
    Target("reverse KL, peak GiB", "linear_divergence", "reverse_kl", MAIN, 6.0, "peak_memory"),
    attention("fa4", "forward", 540),
    attention("fa4", "backward", 360),
    attention("triton", "forward", 380),
    attention("triton", "backward", 325),
    Target("training step, tree, ms", "train_step", "whole", TREE, 950, impl="tree"),
    Target(
        "one by one / tree, same layers", "train_step", "whole", TREE, 2.3, impl="tree", over="transformers",
        least=True, inverse=True,
    ),
    Target(
        "both contexts: one by one / tree", "score_both_contexts", "whole", TREE, 2.3, impl="tree",
        over="transformers", least=True, inverse=True,
    ),
    Target(
        "over the budget: recomputed / streamed", "train_step_over_budget", "whole", "prefix=", 1.2,
        impl="stream", over="pact_fast/recompute", least=True, inverse=True,
    ),
)  # fmt: skip


def value_of(rows: Sequence[Row], target: Target, provider: str, mode: str) -> tuple[float, str] | None:
    """Best median of a provider (or provider/impl), and whose it is; of ours without the torch reference."""
    wanted, _, impl = provider.partition("/")
    found = [
        (float(r["p50"]), f"{r['provider']}/{r['impl']}")
        for r in rows
        if (r["op"], r["mode"], r["metric"]) == (target.op, mode, target.metric)
        and r["shape"].startswith(target.shape)
        and "peaked" not in r["shape"]
        and r["provider"] == wanted
        and (not impl or r["impl"] == impl)
        and not (wanted == OURS and r["impl"] in ("torch", "packed"))
    ]
    return (max if target.metric == "effective" else min)(found, default=None)


def best_peer(rows: Sequence[Row], target: Target) -> tuple[float, str] | None:
    names = {r["provider"] for r in rows if r["op"] == target.op} - {OURS, "gemms"}
    found = [v for name in sorted(names) if (v := value_of(rows, target, name, target.mode)) is not None]
    return (max if target.metric == "effective" else min)(found, default=None)


def measured(rows: Sequence[Row], target: Target) -> float | None:
    ours = value_of(rows, target, OURS + (f"/{target.impl}" if target.impl else ""), target.mode)
    if ours is None or target.over is None:
        return ours and ours[0]
    over = value_of(rows, target, target.over, target.mode_over or target.mode)
    if over is None:
        return None
    return over[0] / ours[0] if target.inverse else ours[0] / over[0]


def line_of(rows: Sequence[Row], target: Target) -> str:
    """Target, value, met or MISSED, and the best peer's value where there is one."""
    value = measured(rows, target)
    sign = ">=" if target.least else "<="
    text = f"  {target.what:40s} {sign} {target.bound:<6g} "
    if value is None:
        return text + "not measured"
    met = value >= target.bound if target.least else value <= target.bound
    text += f"{value:<8.4g} {'met' if met else 'MISSED'}"
    peer = best_peer(rows, target)
    unit = {"time": "ms", "effective": "TFLOP/s"}.get(target.metric, "GiB")
    return text if peer is None else f"{text}   (best peer: {peer[0]:g} {unit}, {peer[1]})"


def print_targets(rows: Sequence[Row], tests: str | None = None) -> None:
    """All targets, from the rows of GPUs. `tests`: what the GPU tests said; red, and nothing counts."""
    if tests is not None:
        print(f"GPU tests: {tests}")
        if tests != "green":
            print("The tests are not green: nothing below is a claim.")
    for machine in dict.fromkeys((r["gpu"], r["torch"], r["triton"], r["commit"]) for r in rows):
        gpu, torch, triton, commit = machine
        here = [r for r in rows if (r["gpu"], r["torch"], r["triton"], r["commit"]) == machine]
        if gpu == "cpu":
            print(f"\n{len(here)} rows of a CPU at {commit}: the targets are a GPU's")
            continue
        print(f"\n{gpu}, torch {torch}, triton {triton}, commit {commit}")
        for target in TARGETS:
            print(line_of(here, target))
