"""The rows that decode together, a token a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pact_fast.kernels.decode import reference
from pact_fast.rollout.in_process.dense import DenseDecode
from pact_fast.rollout.in_process.runner import Runner

if TYPE_CHECKING:
    from pact_fast.rollout.in_process.scheduler import Request

NOISE = 2**16  # numbers made at a time
STEPS = 64  # tokens a row until a batch is made anew


class DenseBatch:
    """Rows on a CPU.

    Args:
        rows: their pages cover `steps` tokens more, or as many as the row may still have.

    places: the row at each place, None where it has left or where none was. alive: rows among them.
    """

    def __init__(self, runner: Runner, rows: Sequence[Request], steps: int) -> None:
        self.runner, self.left = runner, steps
        self.attention = DenseDecode(runner, [row.kv for row in rows if row.kv is not None], steps)
        self.places = [rows[i] if i >= 0 else None for i in self.attention.slots]
        self.size, self.alive = len(self.places), len(rows)
        known = [
            (row.tokens[-1], len(row.tokens) - 1, row.seed, row.temperature) if row else (0, 0, 0, 0.0)
            for row in self.places
        ]
        ids, positions, seeds, temperatures = zip(*known, strict=True)
        device = runner.weights.device
        self.ids, self.positions, self.seeds = (
            torch.tensor(x, device=device) for x in (ids, positions, seeds)
        )
        self.temperatures = torch.tensor(temperatures, dtype=torch.float32, device=device)
        self._hot = any(temperatures)
        self._noise: list[Tensor] = []

    @property
    def rows(self) -> list[Request]:
        return [row for row in self.places if row is not None]

    def step(self) -> tuple[list[int], list[float]]:
        """One token a place -> (token, log-prob) of each; NaN where the logits are not finite."""
        self.left -= 1
        self.attention.begin(self.positions)
        hidden = self.runner.forward(self.ids, self.attention)
        self.positions += 1
        if self._hot and not self._noise:
            self._make_noise()
        noise = self._noise.pop() if self._hot else None
        tokens, logprobs, _ = reference.sample(
            self.runner.logits(hidden), self.temperatures, None, self.seeds, self.positions, noise
        )
        self.ids = tokens.clamp(min=0)
        return tokens.tolist(), logprobs.tolist()

    def _make_noise(self) -> None:
        """The noise of the next steps' draws: a small batch is all overhead."""
        vocabulary = self.runner.family.vocabulary
        steps = max(1, min(NOISE // (self.size * vocabulary), self.left + 1))
        positions = self.positions + torch.arange(steps - 1, -1, -1)[:, None]
        noise = reference.log_exponential(self.seeds.repeat(steps), positions.flatten(), vocabulary)
        self._noise = list(noise.view(steps, self.size, vocabulary))

    def drain(self) -> tuple[list[int], list[float]] | None:
        """What was sampled and not looked at yet: nothing, the host waits for every step."""
        return None

    def store(self, places: Sequence[int]) -> None:
        """Brings these places' keys to their pages."""
        self.attention.store(places)
