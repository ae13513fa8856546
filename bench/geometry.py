"""The lengths of a PACT step that the token-tree benches measure."""

from dataclasses import dataclass

import numpy as np

from bench.runner import GPU


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


# The first of each is the main one.
GPU_SWEEP = (
    Geometry(3000, 2000, 1500, 8),
    Geometry(3000, 2000, 1500, 16),
    Geometry(3000, 2000, 1500, 2),
    Geometry(500, 2000, 6000, 8),
    Geometry(12000, 2000, 1500, 8),
)
CPU_SWEEP = (Geometry(600, 400, 300, 8), Geometry(600, 400, 300, 2), Geometry(100, 100, 600, 8))
SWEEP = GPU_SWEEP if GPU else CPU_SWEEP
CONTEXTS = ("both", "trace") if GPU else ("trace", "both")  # of the training step
