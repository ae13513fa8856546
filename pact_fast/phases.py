"""Time and memory of the phases of a step, and how much of the device's arithmetic an update used."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

GIB = 2**30
# Dense bf16 TFLOP/s of the data sheets, by a part of the name that CUDA gives; the first that fits counts.
PEAK_TFLOPS = {
    "B300": 2500.0,
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.2,
}


class Phases:
    """Seconds and peak memory of each phase of one step, as metrics: `time/<phase>`, `memory/<phase>`.

    On a GPU the peak of what PyTorch allocated; on CPU the resident size at the phase's end.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.row: dict[str, float] = {}
        self._begin = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # else a phase is charged with the work of the one before
            torch.cuda.reset_peak_memory_stats(self.device)
        begin = time.perf_counter()
        yield
        memory = self._memory()
        self.row[f"time/{name}"] = time.perf_counter() - begin
        self.row[f"memory/{name}"] = memory
        self.row["memory/peak"] = max(memory, self.row.get("memory/peak", 0.0))

    def finish(self) -> dict[str, float]:
        """The row, with the time of the whole step."""
        return self.row | {"time/step": time.perf_counter() - self._begin}

    def _memory(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) / GIB
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
        except OSError:  # no /proc: the peak of the process so far
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
        return pages * resource.getpagesize() / GIB


def peak_flops(device: torch.device, given: float | None, devices: int = 1) -> float | None:
    """FLOP/s of all devices: `given` TFLOP/s each, else the data sheet's of a known GPU, else None."""
    if given is None and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        given = next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
    return None if given is None else given * 1e12 * devices


def speed(
    packs: Sequence[Mapping[str, float]],
    row: Mapping[str, float],
    config: Any,
    peak: float | None,
    *,
    frozen: bool,
) -> dict[str, float]:
    """`tokens_per_second` of the step whose packs and times these are, and `mfu` where a peak is known."""
    tokens, pairs, rows = (sum(p.get(k, 0.0) for p in packs) for k in ("tokens", "pairs", "rows"))
    out = {"tokens_per_second": tokens / row["time/step"]}
    if peak is not None:
        out["mfu"] = update_flops(config, tokens, pairs, rows, frozen=frozen) / (row["time/update"] * peak)
    return out


def update_flops(config: Any, tokens: float, pairs: float, rows: float, *, frozen: bool = False) -> float:
    """Model FLOPs of forward and backward over packed tokens, nothing recomputed counted.

    2 per weight and token and pass, 3 passes (forward, gradient of the input, gradient of the weights); with
    a frozen base (adapters) 2, adapters themselves not counted. Attention: 4 Hq D per pair and pass.

    Args:
        config: of a Llama- or Qwen-shaped model.
        tokens: packed tokens T. pairs: of a token and one it attends to. rows: tokens with a loss, which
            alone pass the head.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    layer = config.hidden_size * (head_dim * 2 * (heads + kv_heads) + 3 * config.intermediate_size)
    passes = 2 if frozen else 3
    linear = 2 * passes * (config.num_hidden_layers * layer * tokens)
    head = 2 * passes * config.hidden_size * config.vocab_size * rows
    return linear + head + 3 * 4 * heads * head_dim * config.num_hidden_layers * pairs
