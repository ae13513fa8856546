"""CSV rows to a table, a plot, and the targets of the LM head with the floor of the same run."""

from pathlib import Path

from bench.rows import Row


def print_table(rows: list[Row]) -> None:
    if not rows:
        return
    from rich.console import Console
    from rich.table import Table

    first = rows[0]
    title = " ".join(first[column] for column in ("op", "mode", "shape", "dtype"))
    table = Table(title=title, title_justify="left")
    on_cpu = first["gpu"] == "cpu"
    extra = {f"{'processor ' if on_cpu else ''}time over the bare GEMMs": "x GEMMs"}
    if any(row["metric"] == "effective" for row in rows):
        extra = {"effective": "TFLOP/s"}
    extra |= {} if on_cpu else {"peak_memory": "peak GiB", "extra_memory": "extra GiB"}
    for column in ("provider", "p20", "median", "p80", *extra.values()):
        table.add_column(column, justify="left" if column == "provider" else "right")
    by_name: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_name.setdefault(f"{row['provider']}/{row['impl']}", {})[row["metric"]] = row
    for name, metrics in sorted(by_name.items(), key=lambda item: float(item[1]["time"]["p50"])):
        time = metrics["time"]
        others = [metrics[m]["p50"] if m in metrics else "" for m in extra]
        table.add_row(name, time["p20"], f"{time['p50']} ms", time["p80"], *others)
    Console().print(table)


def plot(rows: list[Row], path: Path) -> None:
    """One bar per provider (median, p20 to p80) for each op, mode and shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["metric"] == "time":
            groups.setdefault(tuple(row[k] for k in ("op", "mode", "shape")), []).append(row)
    if not groups:
        return
    figure, axes = pyplot.subplots(len(groups), 1, figsize=(8, 2.2 * len(groups)), squeeze=False)
    for axis, (title, group) in zip(axes[:, 0], groups.items(), strict=True):
        group = sorted(group, key=lambda row: float(row["p50"]))
        middle = [float(row["p50"]) for row in group]
        spread = [[m - float(r["p20"]) for m, r in zip(middle, group, strict=True)],
                  [float(r["p80"]) - m for m, r in zip(middle, group, strict=True)]]  # fmt: skip
        names = [f"{row['provider']}/{row['impl']}" for row in group]
        colors = ["#2a6f97" if name.startswith("pact_fast") else "#b0b0b0" for name in names]
        axis.barh(names, middle, xerr=spread, color=colors)
        axis.set_title(" ".join(title), fontsize=9)
        axis.set_xlabel("ms")
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# (what, ours, beside, most): median of ours over median of the other in the same run, at the main shape.
TRAIN = "forward+backward"
TARGETS = (
    ("loss, forward+backward / 3 GEMMs", ("linear_pact_loss", TRAIN, "pact_fast"), "gemms", 1.15),
    (
        "cross-entropy, forward+backward / 3 GEMMs",
        ("linear_cross_entropy", TRAIN, "pact_fast"),
        "gemms",
        1.15,
    ),
    ("low-memory loss / 4 GEMMs", ("linear_pact_loss", "low memory", "pact_fast"), "gemms", 1.05),
    ("divergence, reverse KL / 4 GEMMs", ("linear_divergence", "reverse_kl", "pact_fast"), "gemms", 1.15),
    ("divergence, JSD / 4 GEMMs", ("linear_divergence", "jsd", "pact_fast"), "gemms", 1.15),
    ("cross-entropy / Liger", ("linear_cross_entropy", TRAIN, "pact_fast"), "liger", 1 / 3.5),
    ("cross-entropy / TRL chunked", ("linear_cross_entropy", TRAIN, "pact_fast"), "trl", 1 / 3.0),
    ("scoring / 1 GEMM", ("linear_logprob", "forward", "pact_fast"), "gemms", 1.12),
    ("log-prob, forward+backward / 4 GEMMs", ("linear_logprob", TRAIN, "pact_fast"), "gemms", 1.15),
)


def best(rows: list[Row], op: str, mode: str, provider: str, metric: str) -> float | None:
    """The lowest median of a provider's implementations, plain torch references aside."""
    values = [
        float(r["p50"])
        for r in rows
        if (r["op"], r["mode"], r["provider"], r["metric"]) == (op, mode, provider, metric)
        and not (provider == "pact_fast" and r["impl"] == "torch" and r["gpu"] != "cpu")
    ]
    return min(values) if values else None


def print_targets(rows: list[Row]) -> None:
    """Per shape: each target's ratio, and whether it is met. Nothing is claimed where a row is missing."""
    ops = {op for _, (op, _, _), _, _ in TARGETS}
    rows = [row for row in rows if row["op"] in ops]
    for shape in dict.fromkeys(r["shape"] for r in rows):
        here = [r for r in rows if r["shape"] == shape]
        on_cpu = here[0]["gpu"] == "cpu"
        time = "processor time" if on_cpu else "time"
        note = "; ratios only, the targets are a GPU's" if on_cpu else ""
        print(f"\n{shape} ({here[0]['gpu']}, torch {here[0]['torch']}, triton {here[0]['triton']}{note})")
        for what, (op, mode, provider), other, most in TARGETS:
            a, b = best(here, op, mode, provider, time), best(here, op, mode, other, time)
            value = "not measured" if a is None or b is None else verdict(a / b, most, on_cpu)
            print(f"  {what:45s} {value}")
        a = best(here, "linear_cross_entropy", "live30", "pact_fast", time)
        b = best(here, "linear_cross_entropy", TRAIN, "pact_fast", time)
        if a is not None and b is not None:
            print(f"  {'30% live rows / all rows':45s} {verdict(a / b, 0.36, on_cpu)}")
        for what, op, metric, limit in (
            ("peak GiB, cross-entropy, at most Liger's", "linear_cross_entropy", "peak_memory", "liger"),
            ("extra GiB, log-prob forward+backward", "linear_logprob", "extra_memory", 0.6),
        ):
            a = best(here, op, TRAIN, "pact_fast", metric)
            b = best(here, op, TRAIN, limit, metric) if isinstance(limit, str) else limit
            if a is not None and b is not None:
                print(f"  {what:45s} {verdict(a, b, on_cpu)}")


def verdict(value: float, most: float, on_cpu: bool) -> str:
    if on_cpu:
        return f"{value:.3f}"
    return f"{value:.3f} (target {most:.3f}) {'met' if value <= most else 'MISSED'}"
