"""What the rollout loop asks of an inference engine: token ids in, token ids and log-probs out."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Generation:
    """One sampled turn.

    token_ids: as sampled, the stop token included.
    logprobs: log-prob of each token under the sampling distribution (the temperature applied), same length.
    finish_reason: "stop" (a stop token was sampled) or "length".
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


class Engine(Protocol):
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: Sequence[int],
        temperature: float,
        stop_token_ids: Sequence[int],
        seed: int | Sequence[int],
        sessions: Sequence[Hashable] | None = None,
    ) -> list[Generation]:
        """Continues every prompt.

        Args:
            prompts: token ids of each row, everything that stands before the new tokens.
            max_new_tokens: limit of each row, at least 1.
            temperature: 0 is greedy; log-probs are then those at temperature 1.
            stop_token_ids: any of them ends a row.
            seed: one per row: with a token's position it decides the draw, whichever rows stand beside it. A
                single one is spread over the rows by their index (`row_seeds`).
            sessions: a key per row; a prompt that extends what was seen under its key may reuse cached keys
                and values.
        """
        ...

    def reset(self) -> None:
        """Forgets every session."""
        ...

    def weights_changed(self) -> None:
        """Must be called after the weights have changed."""
        ...

    def prepare(self) -> None:
        """Must be called before a batch of rollouts, by every rank at once: hands over changed weights."""
        ...


def row_seeds(seed: int, rows: int) -> list[int]:
    """A seed a row from one of a batch."""
    return [(seed * 1_000_003 + i) % 2**63 for i in range(rows)]


class RolloutError(RuntimeError):
    """Rollouts cannot be had; the message names the server, the request and the way out."""
