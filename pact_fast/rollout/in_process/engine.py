"""The in-process rollout engine: token ids in, token ids and log-probs out, with the weights of this process.

    engine     Engine protocol: batches of prompts, sessions, weights
    scheduler  which rows run; admission, preemption, ends
    batch      the rows that decode together; dense (CPU) or paged (GPU, CUDA graphs)
    runner     embedding, layers, logits; prefill against the pages
    cache      pages, the prefix trie, reference counts
    weights    the fused copy, refilled after each update
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import psutil
import torch
from torch.distributed.tensor import DTensor

from pact_fast.rollout.engine import Generation, RolloutError
from pact_fast.rollout.in_process.runner import KVPool
from pact_fast.rollout.in_process.scheduler import Request, Scheduler
from pact_fast.rollout.in_process.weights import EngineWeights

CPU_BYTES = 4 * 2**30  # of keys and values, at most
