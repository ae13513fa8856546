"""The in-process rollout engine: token ids in, token ids and log-probs out, with the weights of this process.

engine     Engine protocol: batches of prompts, sessions, weights
scheduler  which rows run; admission, preemption, ends
batch      the rows that decode together; dense (CPU) or paged (GPU, CUDA graphs)
runner     embedding, layers, logits; prefill against the pages
cache      pages, the prefix trie, reference counts
weights    the fused copy, refilled after each update
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from pact_fast.rollout.engine import Generation, RolloutError, row_seeds
from pact_fast.rollout.in_process.runner import KVPool
from pact_fast.rollout.in_process.scheduler import DONE, Request, Scheduler
from pact_fast.rollout.in_process.weights import EngineWeights
from pact_fast.tree.families import causal_lm

CPU_BYTES = 4 * 2**30  # of keys and values on a CPU, at most


class InProcessEngine:
    """Samples with a copy of the weights of the model in this process. See `Engine`.

    Args:
        model: a causal LM of a known family (pact_fast/tree/families.py): plain, with LoRA, or sharded by
            FSDP2.
        dtype: to sample in; None takes the model's (of a sharded model: give the compute dtype).
        device: to sample on; None takes the model's.
        kv_memory: share of the free device memory for keys and values; on a CPU of all memory, 4 GiB at most.
        cuda_graphs: capture decoding steps on a GPU; False launches the same kernels one by one.
        paged: decode against the pages, as on a GPU; None: on a CPU in full precision the dense form instead.
        max_rows: rows in flight at once. context_length: of prompt and completion; None takes the model's.

    ValueError for a model that it does not know, with what to do.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        kv_memory: float = 0.3,
        cuda_graphs: bool = True,
        paged: bool | None = None,
        max_rows: int = 512,
        context_length: int | None = None,
    ) -> None:
        if not 0 < kv_memory <= 1:
            raise ValueError(f"rollout.kv_memory={kv_memory}: give a share of the free memory, in (0, 1]")
        longest = getattr(causal_lm(model).config, "max_position_embeddings", None)
        context = min(x for x in (context_length, longest, 2**20) if x)
        self.weights = EngineWeights(
            model, dtype=dtype, device=device or _device(model), context_length=context
        )
        self.kv_memory = kv_memory
        self._options: Any = {"max_rows": max_rows, "paged": paged, "cuda_graphs": cuda_graphs}
        self.stale, self.closed = True, False
        self._scheduler: Scheduler | None = None

    @property
    def scheduler(self) -> Scheduler:
        """Made when it is first needed: the memory that is free then is what there is."""
        if self._scheduler is None:
            size = KVPool.page_bytes(self.weights)
            pages = int(self.kv_memory * _memory(self.weights.device) / size)
            if pages < 2:
                raise RolloutError(
                    f"rollout.kv_memory={self.kv_memory} leaves no room for one page of keys and values "
                    f"({size} bytes): raise it, or free memory on {self.weights.device}"
                )
            self._scheduler = Scheduler(self.weights, max_pages=pages, **self._options)
        return self._scheduler

    def weights_changed(self) -> None:
        self.stale = True

    def prepare(self) -> None:
        """Takes over changed weights; every rank of a sharded model must call it."""
        if self.closed:
            raise RolloutError("the rollout engine is closed: build another one")
        if self.stale:
            self.weights.refill()
            self.scheduler.forget()
            self.stale = False

    def reset(self) -> None:
        if self._scheduler is not None:
            self._scheduler.forget_sessions()

    def close(self) -> None:
        """Frees the memory; requests in flight end as cancelled."""
        if self._scheduler is not None:
            self._scheduler.abort_all()
        self._scheduler, self.closed = None, True

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
        """See `Engine.generate`. A single seed is spread over the rows by their index.

        ValueError for a row that cannot be sampled (named), RolloutError for one whose logits are not finite.
        """
        self.prepare()
        seeds = row_seeds(seed, len(prompts)) if isinstance(seed, int) else seed
        stops = frozenset(stop_token_ids)
        names = sessions if sessions is not None else [None] * len(prompts)
        rows = [
            Request(list(prompt), limit, temperature, row_seed, stops, session=name)
            for prompt, limit, row_seed, name in zip(prompts, max_new_tokens, seeds, names, strict=True)
        ]
        self.run(rows)
        for i, row in enumerate(rows):
            if row.finish_reason not in DONE:
                raise RolloutError(f"row {i} of {len(rows)}: {row.error or row.finish_reason}")
        return [Generation(row.token_ids, row.logprobs, row.finish_reason) for row in rows]

    def run(self, rows: Sequence[Request]) -> None:
        """Samples requests to their ends. What interrupts it (an error, a signal) ends those left."""
        scheduler = self.scheduler
        try:
            scheduler.submit(rows)
            while scheduler.busy:
                scheduler.step()
        except BaseException as error:
            scheduler.fail_all(error)
            scheduler.abort_all()
            raise


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters())
    if not isinstance(parameter, DTensor):
        return parameter.device
    kind = parameter.device_mesh.device_type  # shards may be offloaded to the host
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _memory(device: torch.device) -> int:
    """Bytes to take a share of."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(CPU_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
