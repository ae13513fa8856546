"""In-process engine over transformers' continuous batching (`rollout.engine: hf-batching`).

Its log-probs are the model's own (measured: 9e-6 from a plain forward in fp32) and a seed repeats a batch.
What it cannot do is draw each row from a seed of its own: all rows share one generator, so who is beside a
row decides its tokens. Runs on several ranks need that and are refused. On a CPU it is slower than `hf`
(measured: 3.5 times, 64 rows, 312k parameters); it is meant for GPUs, where its paged cache wastes no memory
on ragged rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from pact_fast.rollout.engine import Generation, RolloutError

PAGE = 64  # tokens of a page of the cache
# transformers 5.17 calls the size of a page block_size, later ones page_size.
PAGE_FIELD = (
    "page_size" if "page_size" in {f.name for f in fields(ContinuousBatchingConfig)} else "block_size"
)
NO_RESULT_TIMEOUT_S = 600.0  # seconds without a finished row before the engine gives up


class BatchingEngine:
    """See `Engine`.

    Args:
        model: a causal LM of transformers with a KV cache.
        max_batch_tokens: tokens of one forward.
    """

    per_sequence_seed, in_process = False, True

    def __init__(self, model: PreTrainedModel, *, max_batch_tokens: int = 4096) -> None:
        self.model, self.max_batch_tokens = model, max_batch_tokens

    def prepare(self) -> None:
        pass

    def weights_changed(self) -> None:
        pass

    def reset(self) -> None:
        pass  # nothing outlives a call

    @torch.no_grad()
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
        """See `Engine.generate`. Raises RolloutError for a seed a row."""
        if not isinstance(seed, int):
            raise RolloutError(
                "rollout.engine=hf-batching draws all rows from one generator and cannot take a seed a row: "
                "set rollout.per_sequence_seed to false and use one process, or choose the engine hf or http"
            )
        if not prompts:
            return []
        longest = max(len(p) + n for p, n in zip(prompts, max_new_tokens, strict=True))
        options: dict[str, Any] = {"temperature": temperature} if temperature > 0 else {}
        generation = GenerationConfig(
            do_sample=temperature > 0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max(max_new_tokens),
            eos_token_id=list(stop_token_ids) or -1,
            pad_token_id=0,
            **options,
        )
        paging: dict[str, Any] = {PAGE_FIELD: PAGE}
        batching = ContinuousBatchingConfig(
            **paging,
            num_blocks=None if self.model.device.type == "cuda" else len(prompts) * (longest // PAGE + 2),
            max_batch_tokens=self.max_batch_tokens,
            max_requests_per_batch=len(prompts),
            return_logprobs=True,
            # Waiting rows would be admitted by the clock: the draws would not repeat.
            use_async_batching=False,
            seed=seed % 2**63,
        )
        with _generators_kept(self.model.device):
            return self._run(prompts, max_new_tokens, stop_token_ids, generation, batching)

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        stops: Sequence[int],
        generation: GenerationConfig,
        batching: ContinuousBatchingConfig,
    ) -> list[Generation]:
        model: Any = self.model
        manager = model.init_continuous_batching(generation, batching)
        try:
            # All rows are in line before the first step: the batches, and so the draws, repeat.
            names = [
                manager.add_request(list(prompt), max_new_tokens=limit, eos_token_id=list(stops) or -1)
                for prompt, limit in zip(prompts, limits, strict=True)
            ]
            manager.start()
            found: dict[str, Any] = {}
            while len(found) < len(names):
                result = manager.get_result(timeout=NO_RESULT_TIMEOUT_S)
                if result is None or result.error is not None:
                    problem = getattr(result, "error", None) or "no row ended in time"
                    raise RolloutError(
                        f"rollout.engine=hf-batching: {problem}: lower rollout.batch_size, or choose "
                        "the engine hf"
                    )
                if result.is_finished():
                    found[result.request_id] = result
        finally:
            manager.stop(block=True)
        return [_generation(found[name], set(stops)) for name in names]


def _generation(result: Any, stops: set[int]) -> Generation:
    ids, logprobs = list(result.generated_tokens), [float(v) for v in result.logprobs]
    if len(ids) != len(logprobs):
        raise RolloutError(f"transformers returned {len(ids)} tokens and {len(logprobs)} log-probs for a row")
    return Generation(ids, logprobs, "stop" if ids[-1] in stops else "length")


@contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    """Seeding its generator, transformers seeds everybody's: puts the states back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
