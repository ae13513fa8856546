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
            seed: makes the draw repeatable for the same rows in the same order; one seed per row makes the
                draw of each row its own, whichever rows stand beside it.
            sessions: a key per row; a prompt that extends what was seen under its key may reuse cached keys
                and values.
        """
        ...

    per_sequence_seed: bool  # whether every row must be drawn from a seed of its own
    in_process: bool  # whether it samples with this process's model, whose weights must then be whole

    def reset(self) -> None:
        """Forgets every session."""
        ...

    def weights_changed(self) -> None:
        """Must be called after the weights have changed."""
        ...

    def prepare(self) -> None:
        """Must be called before a batch of rollouts, by every rank at once: hands over changed weights."""
        ...


class RolloutError(RuntimeError):
    """Rollouts cannot be had; the message names the server, the request and the way out."""
