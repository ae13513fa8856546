"""The draw that anchors some prompts of a step to the ordinary, prompt-only policy ratio."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


def anchor_mask(seed: int, step: int, prompt_ids: Sequence[Hashable], q: float) -> Tensor:
    """Which prompts use the ordinary prompt-only ratio in this step: ``b ~ Bernoulli(q)``, one draw a prompt.

    A pure function of (seed, step, prompt id): a resumed run repeats it, and the order of the prompts, the
    number of ranks and the platform play no part.

    Args:
        seed, step: integers.
        prompt_ids: [P] strings or integers.
        q: probability of anchoring in [0, 1]; 0 anchors none, 1 all.

    Returns:
        bool [P].

    Raises:
        ValueError: q lies outside [0, 1].
    """
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"q={q} is not a probability: give a value in [0, 1]")
    ids = prompt_ids.tolist() if isinstance(prompt_ids, Tensor) else prompt_ids
    draws = []
    for prompt_id in ids:
        digest = hashlib.blake2b(f"{seed}\x1f{step}\x1f{prompt_id}".encode(), digest_size=8).digest()
        draws.append((int.from_bytes(digest, "big") >> 11) * 2.0**-53 < q)
    return torch.tensor(draws, dtype=torch.bool)
