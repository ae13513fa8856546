"""Which rows run: requests enter and leave the batch between any two tokens.

    waiting --admit (find prefix, take pages)--> prefill pass --first token--> running --decode step--> ended
       ^------------------ preempted: pages given up, tokens kept, prefilled again ------|

A row's draw of a token is a function of (its seed, the token's position), its log-prob of the tokens before
it: who shares the batch decides nothing beyond rounding. One thread at a time may call a scheduler.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pact_fast.kernels.decode.ops import sample
from pact_fast.rollout.in_process.batch import STEPS, DenseBatch
from pact_fast.rollout.in_process.cache import PAGE, PagedTokens, PageTable
from pact_fast.rollout.in_process.dense import DensePrefill
from pact_fast.rollout.in_process.paged import PagedBatch, Slates
from pact_fast.rollout.in_process.runner import Chunk, KVPool, Runner
from pact_fast.rollout.in_process.weights import EngineWeights

log = logging.getLogger(__name__)

PREFILL_TOKENS = 4096  # of one pass
ADMIT_EVERY = 8  # decode steps between two admissions that make a dense batch anew
FIRST_PAGES = 256  # of a pool on a CPU, which grows
DONE = ("stop", "length")
NOT_FINITE = "the model's logits are not finite: its weights are damaged or its dtype is too narrow"


@dataclass(eq=False)
class Request:
    """One row to sample, and what became of it.

    tokens: prompt and sampled tokens. token_ids, logprobs: those sampled, at temperature 1 where temperature
    is 0 (greedy). finish_reason: "stop", "length", "abort" (cancelled) or "error" (then `error` says why).
    versions: weight versions that sampled its first and its last token. salt: prefixes are shared with rows
    of the same salt alone. session: keeps the row's keys for a longer prompt under the same name. on_end: is
    called when it has ended.
    """

    prompt: list[int]
    max_tokens: int
    temperature: float
    seed: int
    stops: frozenset[int]
    salt: str = ""
    session: Hashable = None
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""
    error: str = ""
    versions: tuple[str, str] | None = None
    cancelled: bool = False
    on_end: Callable[[Request], None] | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.end = len(self.prompt) + self.max_tokens
        self.kv: PagedTokens | None = None
        self.version: str | None = None

    @property
    def token_ids(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def ended(self) -> bool:
        return bool(self.finish_reason)


class Scheduler:
    """Samples requests with one set of weights.

    Args:
        weights: filled before the first step, and again at will between two steps (then `weights_changed`).
        max_rows: rows in flight at once. max_pages: pages of keys and values, at most.
        paged: decode against the pages, as a GPU does; None: where there are no dense tensors for it.
        cuda_graphs: capture those steps where that can be done.
    """

    def __init__(
        self,
        weights: EngineWeights,
        *,
        max_rows: int,
        max_pages: int,
        paged: bool | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        self.weights, self.max_rows, self.max_pages = weights, max_rows, max(2, max_pages)
        grows = weights.device.type == "cpu"
        pages = min(self.max_pages, FIRST_PAGES) if grows else self.max_pages
        self.pool, self.table = KVPool(weights, pages), PageTable(pages)
        self.runner = Runner(weights, self.pool)
        paged = not self.runner.lean if paged is None else paged
        self.slates = Slates(self.runner, graphs=cuda_graphs) if paged else None
        if not paged:
            self.runner.prefill_attention = DensePrefill
        self.version = "default"
        self.waiting: deque[Request] = deque()
        self.joining: list[Request] = []  # prefilled, not yet in the batch
        self.batch: DenseBatch | PagedBatch | None = None
        self.parked: OrderedDict[Hashable, tuple[list[int], PagedTokens]] = OrderedDict()
        self.served = self.preempted = self.prefilled = 0
        self._since_admission = 0
        self._hold = False  # a row was preempted, and none has left since
        self._said = False  # that memory is short

    # -- what the outside may do between two steps -------------------------------------------------

    @property
    def running(self) -> list[Request]:
        """Rows in flight."""
        return (self.batch.rows if self.batch else []) + self.joining

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.joining or (self.batch and self.batch.alive))

    def submit(self, requests: Sequence[Request]) -> None:
        """Puts requests in line. ValueError for one that can never run."""
        for row in requests:
            self._check(row)
        self.waiting.extend(requests)

    def abort_all(self) -> None:
        """Ends every row that waits or runs."""
        for row in [*self.running, *self.waiting]:
            row.cancelled = True
        self._drop_cancelled()

    def forget(self, version: str | None = None) -> None:
        """Forgets every key. Rows in flight go on from keys computed anew, with the present weights."""
        self._collect(self.batch.drain() if self.batch else None)
        rows, self.batch, self.joining = self.running, None, []
        for row in reversed(rows):
            self._back_to_line(row)
        for row in self.waiting:
            self._give_up(row)
        self.forget_sessions()
        self.table.forget()
        self.version = version or self.version

    def forget_sessions(self) -> None:
        for _, kv in self.parked.values():
            self.table.release(kv)
        self.parked.clear()

    def fail_all(self, error: BaseException) -> None:
        """After a step that broke: its rows end with the error, the cache starts empty."""
        rows = self.running + [row for row in self.waiting if row.kv is not None]
        self.waiting = deque(row for row in self.waiting if row.kv is None)
        self.batch, self.joining = None, []
        self.forget_sessions()
        for row in rows:
            row.error = row.error or f"{type(error).__name__}: {error}"
            self._leave(row, "error")
        self.table.forget()

    # -- one step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        """One prefill pass where rows can enter, then one token for every row in flight."""
        self._drop_cancelled()
        if self.waiting and self._may_admit():
            self._since_admission = 0
            self._prefill()
        self._since_admission += 1
        if self.joining or (self.batch and (self.batch.left < 1 or 2 * self.batch.alive <= self.batch.size)):
            self._make_batch()
        if self.batch:
            self._collect(self.batch.step())

    def _may_admit(self) -> bool:
        alive = self.batch.alive if self.batch else 0
        # Each admission makes the batch anew.
        soon = len(self.waiting) * 4 < alive and self._since_admission < ADMIT_EVERY
        return alive + len(self.joining) < self.max_rows and not soon and not (self._hold and alive)

    def _prefill(self) -> None:
        """Admits waiting rows up to the pass's token budget and computes what is not cached of them."""
        chunks: list[Chunk] = []
        partial: Request | None = None  # computed by the last chunk in part
        leaders: dict[Hashable, tuple[int, PagedTokens]] = {}  # prompt -> its chunk and pages
        ready: list[tuple[Request, int]] = []  # rows whose prompt is whole after this pass, and their chunk
        copies: list[tuple[int, int]] = []
        budget, room = PREFILL_TOKENS, self.max_rows - len(self.running)
        while self.waiting and budget > 0 and len(ready) < room:
            row = self.waiting[0]
            size, key = len(row.tokens), (row.salt, tuple(row.tokens))
            new = row.kv is None and row.session not in self.parked
            leader = leaders.get(key) if new else None
            kv = row.kv = row.kv or self._find(row, size if leader else size - 1)
            take = size - kv.count if leader else min(budget, size - kv.count)
            if not self._extend(kv, kv.count + take, len(self.running) + len(ready)):
                if chunks or self.running:
                    self._give_up(row)
                    self._say_full()
                    break
                self.waiting.popleft()
                row.error = self._too_long(size)
                self._leave(row, "error")
                continue
            start = kv.count
            kv.count += take
            # In the trie before it is computed: rows of the same pass may build on it.
            self.table.index(kv, row.tokens)
            if leader and take:  # the page that is not full belongs to one row
                copies.append((leader[1].pages[-1], kv.pages[-1]))
            elif not leader:
                chunks.append(Chunk(row.tokens[start : kv.count], start, list(kv.pages)))
                budget -= take
            if kv.count < size:
                partial = row
                break
            leaders.setdefault(key, (len(chunks) - 1, kv))
            ready.append((row, leaders[key][0]))
            self.waiting.popleft()
        if not chunks:
            return
        self.prefilled += sum(len(chunk.ids) for chunk in chunks)
        self.joining += [row for row, _ in ready]  # in flight from here on, should the pass fail
        hidden, bad = self.runner.prefill(chunks)
        if bad:
            lost: set[int] = set()  # pages from there on, and what builds on them
            for i, chunk in enumerate(chunks):
                if i in bad or lost & set(chunk.pages):
                    lost |= set(chunk.pages[(chunk.start + bad.get(i, 0)) // PAGE :])
                    hidden[i] = torch.nan
            if partial is not None and bool(hidden[-1].isnan().any()):
                self.waiting.remove(partial)
                partial.error = NOT_FINITE
                self._leave(partial, "error")
        if copies:
            self.pool.copy_pages(*zip(*copies, strict=True))
        if ready:
            self._first_tokens([row for row, _ in ready], hidden[[i for _, i in ready]])

    def _first_tokens(self, rows: list[Request], hidden: Tensor) -> None:
        tokens, logprobs, _ = sample(
            self.runner.logits(hidden),
            torch.tensor([float(row.temperature) for row in rows], device=hidden.device),
            *(None, None, None),
            torch.tensor([row.seed for row in rows], device=hidden.device),
            torch.tensor([len(row.tokens) for row in rows], device=hidden.device),
        )
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            if not self._record(row, token, logprob):
                self.joining.remove(row)
                self._leave(row, row.finish_reason)

    def _make_batch(self) -> None:
        """Puts the rows in flight together, with pages for as many tokens as memory allows."""
        self._collect(self.batch.drain() if self.batch else None)
        if self.batch:
            self.batch.store([place for place, row in enumerate(self.batch.places) if row is not None])
        rows, self.joining, self.batch = self.running, [], None
        steps = STEPS
        while rows and not self._room_for(rows, steps):
            if steps > 1:
                steps = max(1, steps // 4)
            elif len(rows) > 1:
                self._back_to_line(rows.pop())
                self._hold = True  # else it would come back at once, and leave again
                self._say_full()
            else:
                row = rows.pop()
                row.error = self._too_long(len(row.tokens))
                self._leave(row, "error")
        if rows:
            slates = self.slates
            self.batch = PagedBatch(slates, rows, steps) if slates else DenseBatch(self.runner, rows, steps)

    def _room_for(self, rows: Sequence[Request], steps: int) -> bool:
        """Gives every row pages for `steps` more tokens, or none to any."""
        ends = [min(len(row.tokens) + steps, row.end) for row in rows]
        kvs = [row.kv for row in rows if row.kv is not None]
        more = sum(-(-end // PAGE) - len(kv.pages) for kv, end in zip(kvs, ends, strict=True))
        if not self._available(more, None):
            return False
        for kv, end in zip(kvs, ends, strict=True):
            self.table.extend(kv, end)
        return True

    def _collect(self, sampled: tuple[list[int], list[float]] | None) -> None:
        """Takes down what a step sampled; rows that ended leave the batch."""
        batch = self.batch
        if sampled is None or batch is None:
            return
        ended = [
            place
            for place, (row, token, logprob) in enumerate(zip(batch.places, *sampled, strict=True))
            if row is not None and not self._record(row, token, logprob)
        ]
        if ended:
            self._remove(ended)

    def _remove(self, places: Sequence[int]) -> None:
        """Takes the rows at these places, which have ended, out of the batch."""
        batch = self.batch
        assert batch is not None
        rows = [(place, row) for place in places if (row := batch.places[place]) is not None]
        batch.store([place for place, row in rows if row.finish_reason in DONE])
        for place, row in rows:
            batch.places[place] = None
            self._leave(row, row.finish_reason)
        batch.alive -= len(places)
        if not batch.alive:
            self.batch = None

    # -- rows --------------------------------------------------------------------------------------

    def _check(self, row: Request) -> None:
        context, vocabulary = self.weights.context_length, self.weights.family.vocabulary
        if not row.prompt:
            raise ValueError("prompt is empty: the first token needs one before it")
        if row.max_tokens < 1:
            raise ValueError(f"max_tokens={row.max_tokens}: every row needs room for at least one token")
        if len(row.prompt) >= context:
            raise ValueError(
                f"a prompt of {len(row.prompt)} tokens leaves no room in the model's context of {context}: "
                "shorten it (rollout.max_prompt_length)"
            )
        for name, ids in (("prompt", row.prompt), ("stop_token_ids", row.stops)):
            if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
                bad = next(i for i in ids if not 0 <= i < vocabulary)
                raise ValueError(f"{name} holds {bad}: token ids are integers from 0 to {vocabulary - 1}")
        if not (row.temperature >= 0 and math.isfinite(row.temperature)):
            raise ValueError(f"temperature={row.temperature}: give a number >= 0 (0 is greedy)")
        row.end = min(row.end, context)
        row.seed %= 2**63

    def _find(self, row: Request, limit: int) -> PagedTokens:
        """What is known of a row's tokens: its session's keys, or the longest prefix of whole pages."""
        if row.session in self.parked:
            tokens, kv = self.parked.pop(row.session)
            if kv.count <= len(row.tokens) - 1 and row.tokens[: kv.count] == tokens[: kv.count]:
                return kv
            self.table.release(kv)  # the prompt was rewritten
        return self.table.find(row.salt, row.tokens, limit)

    def _record(self, row: Request, token: int, logprob: float) -> bool:
        """Appends a sampled token; True while the row goes on."""
        if logprob != logprob:  # NaN
            row.error, row.finish_reason = NOT_FINITE, "error"
            return False
        tokens = row.tokens
        tokens.append(token)
        row.logprobs.append(logprob)
        if row.version is not self.version:
            row.version = self.version
            row.versions = (row.versions[0] if row.versions else self.version, self.version)
        if token in row.stops:
            row.finish_reason = "stop"
        elif len(tokens) >= row.end:
            row.finish_reason = "length"
        else:
            return True
        return False

    def _leave(self, row: Request, reason: str) -> None:
        """A row's end: its full pages stay findable, a session's pages stay its own."""
        row.finish_reason = reason
        self._hold = False
        kv, row.kv = row.kv, None
        if kv is not None and reason == "error":
            # NaN would reach whoever gets the page next.
            self.pool.wipe(self.table.discard(kv))
            self.runner.wipe()
        elif kv is not None:
            self.table.index(kv, row.tokens)
            if row.session is None or reason not in DONE:
                self.table.release(kv)
            else:
                self.parked[row.session] = (row.tokens, kv)
        self.served += reason in DONE
        if row.on_end is not None:
            row.on_end(row)

    def _give_up(self, row: Request) -> None:
        """Lets the keys of a waiting row go; they are computed again."""
        if row.kv is not None:
            self.table.release(row.kv)
            row.kv = None

    def _back_to_line(self, row: Request) -> None:
        self._give_up(row)
        self.waiting.appendleft(row)
        self.preempted += 1

    def _drop_cancelled(self) -> None:
        if any(row.cancelled for row in self.waiting):
            gone = [row for row in self.waiting if row.cancelled]
            self.waiting = deque(row for row in self.waiting if not row.cancelled)
            for row in gone:
                self._leave(row, "abort")
        for row in [row for row in self.joining if row.cancelled]:
            self.joining.remove(row)
            self._leave(row, "abort")
        if self.batch:
            ended = []
            for place, held in enumerate(self.batch.places):
                if held is not None and held.cancelled:
                    held.finish_reason = "abort"
                    ended.append(place)
            if ended:
                self._remove(ended)

    # -- memory ------------------------------------------------------------------------------------

    def _extend(self, kv: PagedTokens, tokens: int, spare: int) -> bool:
        """Pages for so many tokens, `spare` more pages staying free; False where memory is short."""
        more = -(-tokens // PAGE) - len(kv.pages)
        if not self._available(more + spare, kv):
            return False
        self.table.extend(kv, tokens)
        return True

    def _available(self, pages: int, keep: PagedTokens | None) -> bool:
        """Sees to it that so many pages can be had: the pool grows, sessions and rows in line give theirs
        up; True if they can."""
        if self.table.unused < pages and self.table.num_pages < self.max_pages:
            size = min(self.max_pages, 2 * (self.table.num_pages + pages))
            self.pool.grow(size)
            self.table.grow(size)
        while self.table.available < pages and self.parked:
            self.table.release(self.parked.popitem(last=False)[1][1])
        for row in reversed(self.waiting):
            if self.table.available >= pages:
                break
            if row.kv is not None and row.kv is not keep:
                self._give_up(row)
        return self.table.available >= pages

    def _say_full(self) -> None:
        if not self._said:
            self._said = True
            log.warning(
                "keys and values of %d rows do not fit the memory for them (%d tokens): fewer run at a time. "
                "More of rollout.kv_memory would make rollouts faster",
                len(self.running) + len(self.waiting),
                (self.max_pages - 1) * PAGE,
            )

    def _too_long(self, tokens: int) -> str:
        return (
            f"the keys and values of one sequence of {tokens} tokens and what follows do not fit the memory "
            f"for them ({(self.max_pages - 1) * PAGE} tokens): raise rollout.kv_memory or shorten the limits"
        )
