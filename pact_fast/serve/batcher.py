"""Continuous batching: requests enter and leave the batch between any two tokens.

One thread owns the model. It lets waiting requests in (prefill, after whatever prefix is known), samples a
token for every row in flight, hands back those that ended, and begins again. The draw of a row is a function
of its own seed and the token's place: who shares the batch decides nothing but the last bits of a log-prob.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pact_fast.rollout.in_process.decode import decodes
from pact_fast.serve.cache import PrefixStore, Slots
from pact_fast.tree.families import check_full_attention, family_of

DRAWS = 32  # uniform numbers made at a time for a row
PREFILL = 4096  # padded tokens of one prefill; a longer prompt goes alone, in pieces of this length


class ServerBusy(RuntimeError):
    """The server is paused or full: the request may be sent again later."""


@dataclass(eq=False)
class Job:
    """One row to sample, and what became of it.

    token_ids, logprobs: as sampled, at temperature 1 where temperature is 0 (greedy).
    finish_reason: "stop", "length", "abort" (paused or cancelled) or "error" (then `error` says why).
    versions: weight versions that sampled its first and its last token.
    """

    prompt: list[int]
    max_tokens: int
    temperature: float
    seed: int
    stops: frozenset[int]
    salt: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""
    error: str = ""
    versions: tuple[str, str] | None = None
    done: threading.Event = field(default_factory=threading.Event)
    cancelled: bool = False

    def __post_init__(self) -> None:
        # On the host, so that a seed means the same draw on any device.
        self._generator = torch.Generator().manual_seed(self.seed)
        self._uniforms: list[float] = []

    def uniform(self) -> float:
        """The uniform draw of the next token."""
        while len(self._uniforms) <= len(self.token_ids):
            self._uniforms.extend(torch.rand(DRAWS, generator=self._generator).tolist())
        return self._uniforms[len(self.token_ids)]


class Batcher:
    """Samples jobs with one model.

    Args:
        model: decoder-only causal LM with full attention in every layer.
        max_rows: jobs in flight at once; max_waiting: jobs in line before `submit` refuses.
        cache_tokens: tokens whose keys and values are kept for prompts that begin alike.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_rows: int = 64,
        max_waiting: int = 4096,
        cache_tokens: int = 65536,
    ) -> None:
        self.family = family_of(model.config)
        check_full_attention(self.family, "the batcher")
        self.model = model.eval()
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self.version = "default"
        self.served = 0  # jobs that ran to their end
        self._waiting: deque[Job] = deque()
        self._rows: list[Job] = []
        self._slots = Slots(model, lean=decodes(model))
        self._prefixes = PrefixStore(cache_tokens)
        self._state = threading.Condition()  # guards the line and the flags below
        self._paused = self._closing = False
        self._model_lock = threading.Lock()  # held for a step, or for a change of weights
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    # -- called from any thread --------------------------------------------------------------------

    @property
    def paused(self) -> bool:
        return self._paused

    def submit(self, jobs: Sequence[Job]) -> None:
        """Puts jobs in line, all or none. Raises ServerBusy while paused or where the line is full."""
        with self._state:
            if self._paused:
                raise ServerBusy("paused for a change of weights")
            if len(self._waiting) + len(jobs) > self.max_waiting:
                raise ServerBusy(f"{len(self._waiting)} requests are waiting")
            self._waiting.extend(jobs)
            self._state.notify_all()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Gives jobs up: nobody waits for them any more."""
        for job in jobs:
            job.cancelled = True

    def pause(self, *, keep: bool, clear_cache: bool) -> None:
        """Stops sampling, returns when no step is running. Rows in flight stay for `resume` or are cut."""
        with self._state:
            self._paused = True
        with self._model_lock:
            if not keep:
                self._abort()
            if clear_cache:
                self._prefixes.clear()

    def resume(self) -> None:
        with self._state:
            self._paused = False
            self._state.notify_all()

    def reset_prefix_cache(self) -> None:
        with self._model_lock:
            self._prefixes.clear()

    @contextmanager
    def weights(self) -> Iterator[PreTrainedModel]:
        """The model, to be changed while no step runs; only while paused."""
        with self._model_lock:
            if not self._paused:
                raise ServerBusy("weights change only while paused: POST /pause first")
            yield self.model
            self._prefixes.clear()
            self._slots.lean = decodes(self.model)

    def close(self) -> None:
        """Ends all jobs and the thread."""
        with self._state:
            self._closing = True
            self._state.notify_all()
        self._thread.join()
        self._abort()

    # -- the thread that owns the model ------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(
                    lambda: self._closing or (not self._paused and (self._rows or self._waiting))
                )
                if self._closing:
                    return
            with self._model_lock:
                # A pause that came between the two locks has the word.
                if not self._paused:
                    try:
                        self._step()
                    except Exception as error:
                        self._fail_all(error)

    def _step(self) -> None:
        for row in reversed(range(len(self._rows))):
            if self._rows[row].cancelled:
                self._leave(row, "abort")
        while group := self._next_group():
            self._prefill(group)
        if self._rows:
            self._sample(0, self._slots.feed(0, [job.token_ids[-1:] for job in self._rows]))

    def _next_group(self) -> list[tuple[Job, Tensor | None, int]]:
        """Waiting jobs that fit, with their known prefixes. Of equal prompts one: the rest find it later."""
        group: list[tuple[Job, Tensor | None, int]] = []
        prompts: set[tuple[int, ...]] = set()
        later: list[Job] = []
        width = 0
        with self._state:
            while self._waiting and len(self._rows) + len(group) < self.max_rows:
                job = self._waiting.popleft()
                if job.cancelled:
                    _end(job, "abort")
                    continue
                if (key := tuple(job.prompt)) in prompts:
                    later.append(job)
                    continue
                prefix, count = self._prefixes.find(job.salt, job.prompt)
                wider = max(width, len(job.prompt) - count)
                if group and wider * (len(group) + 1) > PREFILL:
                    later.append(job)
                    break
                prompts.add(key)
                group.append((job, prefix, count))
                width = wider
            self._waiting.extendleft(reversed(later))
        return group

    def _prefill(self, group: list[tuple[Job, Tensor | None, int]]) -> None:
        first = len(self._rows)
        for job, prefix, _ in group:
            self._rows.append(job)
            self._slots.add(prefix)
        rest = [job.prompt[count:] for job, _, count in group]
        while max(len(tokens) for tokens in rest) > PREFILL:  # then it is alone
            self._slots.feed(first, [tokens[:PREFILL] for tokens in rest])
            rest = [tokens[PREFILL:] for tokens in rest]
        hidden = self._slots.feed(first, rest)
        for i, (job, _, _) in enumerate(group):
            if self._prefixes.capacity:
                self._prefixes.add(job.salt, job.prompt, self._slots.read(first + i))
        self._sample(first, hidden)

    def _sample(self, first: int, hidden: Tensor) -> None:
        """Draws the next token of rows first, first + 1, ... from the hidden state before it, [rows, H]."""
        jobs = self._rows[first:]
        tokens, logprobs, good = _draw(self.family.logits(self.model.get_output_embeddings()(hidden)), jobs)
        # From the last row on: a row that leaves is replaced by the last one.
        for i in reversed(range(len(jobs))):
            job = jobs[i]
            if not good[i]:
                job.error = (
                    "the model's logits are not finite: its weights are damaged or its dtype is too narrow"
                )
                self._slots.wipe(first + i)
                self._leave(first + i, "error")
                continue
            job.token_ids.append(tokens[i])
            job.logprobs.append(logprobs[i])
            job.versions = (job.versions[0] if job.versions else self.version, self.version)
            if tokens[i] in job.stops:
                self._leave(first + i, "stop")
            elif len(job.token_ids) >= job.max_tokens:
                self._leave(first + i, "length")

    def _leave(self, row: int, reason: str) -> None:
        job = self._rows[row]
        mixed = job.versions is not None and job.versions[0] != job.versions[1]
        if reason in ("stop", "length") and self._prefixes.capacity and not mixed:
            tokens = job.prompt + job.token_ids[:-1]
            self._prefixes.add(job.salt, tokens, self._slots.read(row))
        self._slots.remove(row)
        last = self._rows.pop()
        if row < len(self._rows):
            self._rows[row] = last
        self.served += reason in ("stop", "length")
        _end(job, reason)

    def _abort(self) -> None:
        for row in reversed(range(len(self._rows))):
            self._leave(row, "abort")
        with self._state:
            waiting, self._waiting = list(self._waiting), deque()
        for job in waiting:
            _end(job, "abort")

    def _fail_all(self, error: Exception) -> None:
        """A step that broke (out of memory, say) costs the rows in flight, not the server."""
        rows, self._rows = self._rows, []
        self._slots = Slots(self.model, lean=self._slots.lean)
        self._prefixes.clear()
        for job in rows:
            job.error = f"{type(error).__name__}: {error}"
            _end(job, "error")


def _end(job: Job, reason: str) -> None:
    job.finish_reason = reason
    job.done.set()


def _draw(logits: Tensor, jobs: Sequence[Job]) -> tuple[list[int], list[float], list[bool]]:
    """One token a row from logits [rows, V], its log-prob, and whether the row's logits are finite."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    heat = torch.tensor([job.temperature or 1.0 for job in jobs], device=logits.device)
    logp = torch.log_softmax(logits / heat[:, None], dim=-1)
    # In fp64: V sums of fp32 would move more draws than all the rounding before them.
    mass = logp.double().exp().cumsum(-1)
    u = torch.tensor([job.uniform() for job in jobs], dtype=torch.float64, device=logits.device)[:, None]
    token = torch.searchsorted(mass, u * mass[:, -1:], right=True).clamp(max=mass.shape[1] - 1)
    if not all(job.temperature for job in jobs):
        greedy = torch.tensor([not job.temperature for job in jobs], device=logits.device)[:, None]
        token = torch.where(greedy, logp.argmax(-1, keepdim=True), token)
    chosen = logp.gather(1, token)[:, 0]
    good = logits.isfinite().all(-1) & chosen.isfinite()
    return token[:, 0].tolist(), chosen.tolist(), good.tolist()
