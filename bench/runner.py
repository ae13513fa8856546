"""Measures one op: correctness gate first, then time, providers interleaved, then memory apart from it."""

import datetime
import functools
import gc
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from registry import Op, Run, Shape, Unavailable

COLUMNS = (
    "op", "provider", "impl", "mode", "shape", "dtype", "metric", "unit", "p20", "p50", "p80",
    "gpu", "driver", "torch", "triton", "date", "commit",
)  # fmt: skip
FLUSH_BYTES = 256 << 20  # more than any L2


@functools.cache
def machine() -> dict[str, str]:
    """The columns that say where a row comes from."""

    def ask(*command: str) -> str:
        try:
            return (
                subprocess.run(command, capture_output=True, text=True, check=True)
                .stdout.strip()
                .split("\n")[0]
            )
        except (OSError, subprocess.CalledProcessError):
            return ""

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    root = str(Path(__file__).resolve().parent.parent)
    dirty = "+" if ask("git", "-C", root, "status", "--porcelain", "-uno") else ""
    return {
        "gpu": gpu,
        "driver": ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if gpu != "cpu"
        else "",
        "torch": torch.__version__,
        "triton": triton_version,
        "date": datetime.date.today().isoformat(),
        "commit": ask("git", "-C", root, "rev-parse", "--short", "HEAD") + dirty,
    }


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def gate(op: Op, name: str, mode: str, dtype: torch.dtype, device: str) -> None:
    """RuntimeError unless each output is within four times plain torch's error of the fp64 one, plus 0.2%."""
    if name.startswith("gemms/"):
        return
    inputs = op.make_inputs(op.gate_shape, dtype, device)
    exact = op.exact(inputs, mode)
    plain = op.providers["torch/logits"](inputs, mode)()
    got = op.providers[name](inputs, mode)()
    for key, value in exact.items():
        error, allowed = relative_error(got[key], value), 4 * relative_error(plain[key], value) + 2e-3
        if not error <= allowed:
            raise RuntimeError(f"gate: {key} is off by {error:.1e}, allowed {allowed:.1e}")


def prepare(op: Op, shape: Shape, mode: str, dtype: torch.dtype, device: str, wanted: Callable[[str], bool]):
    """Providers that can run and pass the gate, with their inputs; and the reason of each that cannot."""
    inputs = op.make_inputs(shape, dtype, device)
    runs: dict[str, Run] = {}
    left_out: dict[str, str] = {}
    for name, maker in op.providers.items():
        if not wanted(name) or not (shape.peers or name in op.ours):
            continue
        try:
            gate(op, name, mode, dtype, device)
            run = maker(inputs, mode)
            run()  # compiles, and shows at the real size what cannot run
            runs[name] = run
        except (ImportError, Unavailable, NotImplementedError) as error:
            left_out[name] = f"not here: {error}"
        except Exception as error:  # a peer's failure is a row of the report, not the end of the run
            left_out[name] = (
                f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
            )
        free()
    return inputs, runs, left_out


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def timings(
    runs: dict[str, Run], device: str, seconds: float, least: int = 5
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds per kind of time and run; on a CPU also the processor's time, which load hardly touches.

    All runs in turn, round after round, so that drift of clocks, temperature and load meets all alike.
    """
    kinds = ("time",) if device != "cpu" else ("time", "processor time")
    samples: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in runs} for kind in kinds}
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device != "cpu" else None
    start, rounds = time.perf_counter(), 0
    while rounds < least or (time.perf_counter() - start < seconds and rounds < 50):
        for name, run in runs.items():
            measured = cpu_timed(run) if scratch is None else (gpu_timed(run, scratch),)
            for kind, ms in zip(kinds, measured, strict=True):
                samples[kind][name].append(ms)
        rounds += 1
    return samples


def cpu_timed(run: Run) -> tuple[float, float]:
    """Milliseconds of one call on the wall, and of the processor."""
    wall, used = time.perf_counter(), time.process_time()
    run()
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - used) * 1e3


def gpu_timed(run: Run, scratch: torch.Tensor) -> float:
    """Milliseconds of one call with a cold L2, which writing `scratch` empties."""
    scratch.zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def memory(run: Run) -> dict[str, float]:
    """GiB: the peak of one call, inputs included; and what it takes beyond inputs and outputs."""
    free()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = run()
    peak = torch.cuda.max_memory_allocated()
    results = sum(t.numel() * t.element_size() for t in outputs.values())
    del outputs
    return {"peak_memory": peak / 2**30, "extra_memory": (peak - before - results) / 2**30}


def measure(
    op: Op,
    shape: Shape,
    mode: str,
    dtype: torch.dtype,
    device: str,
    *,
    seconds: float = 2.0,
    wanted: Callable[[str], bool] = lambda name: True,
) -> tuple[list[dict[str, object]], dict[str, str]]:
    """CSV rows of one op, shape and mode, and the providers that were left out, with the reason."""
    inputs, runs, left_out = prepare(op, shape, mode, dtype, device, wanted)
    where = machine()
    rows: list[dict[str, object]] = []

    def add(name: str, metric: str, unit: str, values: list[float]) -> None:
        marks = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
        owner, impl = name.split("/", 1)
        row = {"op": op.name, "provider": owner, "impl": impl, "mode": mode, "shape": str(shape)}
        row |= {"dtype": str(dtype).removeprefix("torch."), "metric": metric, "unit": unit}
        row |= {"p20": f"{marks[0]:.4g}", "p50": f"{statistics.median(values):.4g}", "p80": f"{marks[3]:.4g}"}
        rows.append(row | where)

    floor = next((name for name in runs if name.startswith("gemms/")), None)
    for what, samples in timings(runs, device, seconds).items():
        for name, values in samples.items():
            add(name, what, "ms", values)
            if floor and name != floor:  # of neighbours in time
                ratios = [a / b for a, b in zip(values, samples[floor], strict=True)]
                add(name, f"{what} over the bare GEMMs", "x", ratios)
    if device != "cpu":
        for name, run in runs.items():
            for metric, value in memory(run).items():
                add(name, metric, "GiB", [value])
    del inputs, runs
    free()
    return rows, left_out
