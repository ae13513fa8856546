"""Measures: correctness gate first, then time, providers interleaved, then memory apart from it."""

import gc
import time
from collections.abc import Callable

import torch

from bench.registry import Op, Run, Shape, Unavailable
from bench.rows import Rows

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
FLUSH_BYTES = 256 << 20  # more than any L2


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def gate(op: Op, name: str, mode: str, dtype: torch.dtype, device: str) -> None:
    """RuntimeError unless each output is within four times plain torch's error of the fp64 one, plus 0.2%
    (0.01% in fp32)."""
    if name.startswith("gemms/"):
        return
    inputs = op.make_inputs(op.gate_shape, dtype, device)
    exact = op.exact(inputs, mode)
    got, plain = (outputs(op, inputs, op.providers[n](inputs, mode)) for n in (name, op.plain))
    slack = 2e-3 if dtype.itemsize < 4 else 1e-4
    for key, value in exact.items():
        error, allowed = relative_error(got[key], value), 4 * relative_error(plain[key], value) + slack
        if not error <= allowed:
            raise RuntimeError(f"gate: {key} is off by {error:.1e}, allowed {allowed:.1e}")


def outputs(op: Op, inputs: object, run: Run) -> dict[str, torch.Tensor]:
    return op.collect(inputs, run, run())


def reason(error: Exception) -> str:
    """An exception as a line: why a provider is left out."""
    if isinstance(error, ImportError | Unavailable | NotImplementedError):
        return f"not here: {error}"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


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
        except Exception as error:  # a peer's failure is a line of the report, not the end of the run
            left_out[name] = reason(error)
        free()
    return inputs, runs, left_out


def free() -> None:
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


def timings(
    runs: dict[str, Run], device: str, seconds: float, least: int = 5
) -> tuple[dict[str, dict[str, list[float]]], dict[str, str]]:
    """Milliseconds per kind of time and run; and the runs that threw, with the reason.

    On a CPU also the processor's time, which load hardly touches. All runs in turn, round after round, so
    that drift of clocks, temperature and load meets all alike. A run that throws leaves, and the rest go on.
    """
    kinds = ("time",) if device == "cuda" else ("time", "processor time")
    samples: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in runs} for kind in kinds}
    failed: dict[str, str] = {}
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device == "cuda" else None
    start, rounds = time.perf_counter(), 0
    while rounds < least or (time.perf_counter() - start < seconds and rounds < 50):
        for name, run in runs.items():
            if name in failed:
                continue
            try:
                measured = cpu_timed(run) if scratch is None else (gpu_timed(run, scratch),)
            except Exception as error:
                failed[name] = reason(error)
                free()
                continue
            for kind, ms in zip(kinds, measured, strict=True):
                samples[kind][name].append(ms)
        rounds += 1
    return {k: {n: v for n, v in of.items() if n not in failed} for k, of in samples.items()}, failed


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
    out: Rows,
    op: Op,
    shape: Shape,
    mode: str,
    dtype: torch.dtype,
    device: str,
    *,
    seconds: float = 2.0,
    least: int = 5,
    wanted: Callable[[str], bool] = lambda name: True,
) -> None:
    """Adds the rows of one op, shape and mode; names the providers that are left out, with the reason."""
    inputs, runs, left_out = prepare(op, shape, mode, dtype, device, wanted)
    samples_of, failed = timings(runs, device, seconds, least)

    def add(name: str, metric: str, unit: str, values: list[float]) -> None:
        out.add(op.name, name, mode, shape, dtype, metric, unit, values)

    floor = next((name for name in runs if name.startswith("gemms/") and name not in failed), None)
    for what, samples in samples_of.items():
        for name, values in samples.items():
            add(name, what, "ms", values)
            if floor and name != floor:  # of neighbours in time
                ratios = [a / b for a, b in zip(values, samples[floor], strict=True)]
                add(name, f"{what} over the bare GEMMs", "x", ratios)
    if op.flops is not None:
        done = op.flops(inputs, mode)
        for name, values in list(samples_of.values())[-1].items():  # on a CPU of the processor's time
            add(name, "effective", "TFLOP/s", [done / ms / 1e9 for ms in values])
    if device == "cuda":
        for name, run in runs.items():
            if name in failed:
                continue
            try:
                for metric, value in memory(run).items():
                    add(name, metric, "GiB", [value])
            except Exception as error:
                failed[name] = reason(error)
    for name, why in (left_out | failed).items():
        out.leave_out(f"{op.name} {mode}", name, why)
    del inputs, runs
    free()
