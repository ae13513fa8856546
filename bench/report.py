"""CSV rows to a table and a plot."""

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
