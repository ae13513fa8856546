"""What the token-tree benches share: the lengths of a PACT step, CSV rows, and the device."""

import gc
import statistics
from dataclasses import dataclass

import numpy as np
import torch
from runner import machine

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32


@dataclass(frozen=True)
class Geometry:
    """Lengths of the prompt x, the trace h and a rollout y, and rollouts per prompt."""

    x: int
    h: int
    y: int
    group: int

    def __str__(self) -> str:
        return f"x={self.x} h={self.h} y={self.y} G={self.group}"

    def sequences(self, contexts: str, vocab: int) -> tuple[list[np.ndarray], list[int]]:
        """Sequences of one prompt, where their scored part begins; contexts "trace", "both" or "score"."""
        draw = np.random.default_rng(0)
        x, h, shown = (draw.integers(0, vocab, n) for n in (self.x, self.h, self.h))
        rollouts = [draw.integers(0, vocab, self.y) for _ in range(self.group)]
        plain = [np.concatenate((x, y)) for y in rollouts]
        conditioned = [np.concatenate((x, shown, y)) for y in rollouts]
        chosen = conditioned if contexts == "trace" else plain + conditioned
        starts = [len(s) - self.y for s in chosen]
        if contexts == "score":
            return chosen, starts
        return [np.concatenate((x, h)), *chosen], [self.x, *starts]


MAIN = Geometry(3000, 2000, 1500, 8) if GPU else Geometry(600, 400, 300, 8)
OTHERS = (
    ((3000, 2000, 1500, 16), (3000, 2000, 1500, 2), (500, 2000, 6000, 8), (12000, 2000, 1500, 8))
    if GPU
    else ((600, 400, 300, 2), (100, 100, 600, 8))
)
CONTEXTS = ["both", "trace"] if GPU else ["trace", "both"]  # of the training step; the first is the main one
SWEEP = [MAIN, *(Geometry(*lengths) for lengths in OTHERS)]


class Rows:
    """CSV rows of one comparison."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        self.where = machine()

    def add(self, op, name, mode, shape, metric, unit, values) -> None:
        marks = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
        provider, impl = name.split("/")
        row = {"op": op, "provider": provider, "impl": impl, "mode": mode, "shape": str(shape)}
        row |= {"dtype": str(DTYPE).removeprefix("torch."), "metric": metric, "unit": unit}
        row |= {"p20": f"{marks[0]:.4g}", "p50": f"{statistics.median(values):.4g}", "p80": f"{marks[3]:.4g}"}
        self.rows.append(row | self.where)
        print(f"{op:20s} {name:30s} {mode:17s} {shape}: {row['p50']} {unit} {metric}", flush=True)

    def take(self) -> list[dict[str, object]]:
        """The rows since the last call."""
        taken, self.rows = self.rows, []
        return taken


def free() -> None:
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
