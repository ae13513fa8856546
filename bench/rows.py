"""The CSV rows of every bench: one writer, one description of the machine, one place where they go."""

import csv
import datetime
import functools
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

Row = dict[str, str]
COLUMNS = (
    "op", "provider", "impl", "mode", "shape", "dtype", "metric", "unit", "p20", "p50", "p80",
    "gpu", "driver", "torch", "triton", "date", "commit",
)  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent
LOCAL = ROOT / "bench" / "results" / "local.csv"  # git ignores it: tracked rows are added on purpose only
OUT_HELP = "CSV file to append to, or a folder: <device>.csv in it (default bench/results/local.csv)"


class Rows:
    """Appends rows to one CSV file, each when it is added: a bench that is cut keeps what it has measured.

    Args:
        out: the file, if it ends in .csv; else a folder, in which the file is named after the device.
        device: "cuda" or "cpu", where the measured code runs.
        echo: print each row, too.
        resume: `has` knows the rows that this commit has already in the file, of this device.
    """

    def __init__(self, out: Path, device: str, *, echo: bool = True, resume: bool = False) -> None:
        self.where = machine(device)
        name = self.where["gpu"].replace(" ", "-").lower()
        self.path = out if out.suffix == ".csv" else out / f"{name}.csv"
        self.echo = echo
        self.rows: list[Row] = []
        self.failed: list[str] = []  # of ours: what could run here and did not, or gave wrong results
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists() or not self.path.stat().st_size:
            self._append(COLUMNS)
        with self.path.open(newline="") as file:
            if tuple(next(csv.reader(file))) != COLUMNS:
                raise ValueError(f"--out: {self.path} has other columns than a bench's; name another file")
        same = ("gpu", "commit", "torch", "triton")
        self._old = {
            (row["op"], row["mode"], row["shape"])
            for row in (read_csv(self.path) if resume else [])
            if all(row[name] == self.where[name] for name in same)
        }

    def has(self, op: str, mode: str, shape: object) -> bool:
        """Whether a call before, which this one goes on with, has measured it."""
        return (op, mode, str(shape)) in self._old

    def add(
        self, op: str, name: str, mode: str, shape: object, dtype: torch.dtype, metric: str, unit: str,
        values: Sequence[float],
    ) -> None:  # fmt: skip
        """A row of the measurements `values`; `name` is "provider/impl"."""
        marks = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else [*values] * 4
        provider, impl = name.split("/", 1)
        row = {"op": op, "provider": provider, "impl": impl, "mode": mode, "shape": str(shape)}
        row |= {"dtype": str(dtype).removeprefix("torch."), "metric": metric, "unit": unit}
        row |= {"p20": f"{marks[0]:.4g}", "p50": f"{statistics.median(values):.4g}", "p80": f"{marks[3]:.4g}"}
        row |= self.where
        self._append([row[column] for column in COLUMNS])
        self.rows.append(row)
        if self.echo:
            print(f"{op:20s} {name:30s} {mode:17s} {shape}: {row['p50']} {unit} {metric}", flush=True)

    def leave_out(self, op: str, name: str, why: str) -> None:
        """A line of the output for a provider that was not measured. A peer may fail; one of ours may only be
        unavailable ("not here: ...")."""
        print(f"  left out: {op} {name}: {why}", flush=True)
        if name.startswith("pact_fast") and not why.startswith("not here"):
            self.failed.append(f"{op} {name}")

    def status(self) -> int:
        """Exit status of the bench: 1 where one of ours failed or nothing was measured, now or before."""
        print(f"{len(self.rows)} rows appended to {self.path}")
        for what in self.failed:
            print(f"FAILED {what}")
        return 1 if self.failed or not (self.rows or self._old) else 0

    def _append(self, values: Sequence[str]) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(values)


def read_csv(out: Path) -> list[Row]:
    """Rows of a CSV file, or of all in a folder."""
    paths: Iterable[Path] = [out] if out.suffix == ".csv" else sorted(out.glob("*.csv"))
    return [row for path in paths if path.exists() for row in csv.DictReader(path.open(newline=""))]


@functools.cache
def machine(device: str) -> Row:
    """The columns that say where a row comes from; "cpu" as the gpu of what ran on the CPU."""

    def ask(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return ""
        return done.stdout.strip().split("\n")[0]

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    on_gpu = device != "cpu"
    dirty = "+" if ask("git", "-C", str(ROOT), "status", "--porcelain", "-uno") else ""
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else "cpu",
        "driver": ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else "",
        "torch": torch.__version__,
        "triton": triton_version,
        "date": datetime.date.today().isoformat(),
        "commit": ask("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") + dirty,
    }
