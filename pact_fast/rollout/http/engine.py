"""Samples on servers that speak the part of vLLM's protocol listed in docs/scaling.md.

One request a row, with a seed of its own: who answers it, beside what, and at which try decides nothing. What
may fail is tried again, on another server where there is one; what a server says is checked, not believed.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pact_fast.rollout.engine import Generation, RolloutError, row_seeds
from pact_fast.rollout.http.client import (
    InvalidResponse,
    RemoteServer,
    RetryableError,
    Weights,
    completion_body,
)

if TYPE_CHECKING:
    from pact_fast.rollout.http.publish import Publisher

log = logging.getLogger(__name__)

MAX_INVALID_RESPONSES = 5  # wrong answers to one request before the run stops
LONGEST_WAIT = 5.0  # seconds between two tries
MIN_LOGPROB = -9999.0  # what servers put where a log-prob is missing


@dataclass(frozen=True)
class _Row:
    index: int
    of: int  # rows of the batch
    prompt: list[int]
    max_tokens: int
    temperature: float
    seed: int
    stops: frozenset[int]


class HTTPEngine:
    """See `Engine`.

    Args:
        servers: base URLs; rows are spread evenly, contiguous rows (a prompt's group) to one server.
        token: bearer token of all of them.
        max_in_flight: requests under way at once.
        request_timeout: seconds for one answer. retry_timeout: seconds that one row is tried for.
        mix_weights: requests in flight at a change of weights go on under the new ones.
        publisher: where changed weights come from; without one, call `load`.
    """

    def __init__(
        self,
        servers: Sequence[str],
        *,
        token: str | None = None,
        max_in_flight: int = 64,
        request_timeout: float = 120.0,
        retry_timeout: float = 600.0,
        mix_weights: bool = False,
        publisher: Publisher | None = None,
    ) -> None:
        if not servers:
            raise RolloutError(
                "rollout.servers is empty: name at least one, http://HOST:PORT (pact-fast serve)"
            )
        self.servers = [
            RemoteServer(url.rstrip("/"), token=token, timeout=request_timeout, keep=mix_weights)
            for url in servers
        ]
        self.max_in_flight, self.retry_timeout, self.mix_weights = max_in_flight, retry_timeout, mix_weights
        self.publisher = publisher
        self.weights: Weights | None = None
        self.retries = 0  # tries beyond each request's first, so far
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(max_in_flight, thread_name_prefix="rollout")

    def reset(self) -> None:
        pass  # servers find prefixes by themselves

    def weights_changed(self) -> None:
        if self.publisher is not None:
            self.publisher.stale = True

    def prepare(self) -> None:
        self._stop.clear()
        if self.publisher is not None:
            self.publisher.publish(self)

    def load(self, weights: Weights, *, push: bool = True) -> None:
        """Samples with these weights from now on. push: give them to the servers now, to at least one; one
        that cannot be reached gets them when it answers again."""
        self.weights = weights
        self._stop.clear()
        if not push:
            return
        futures = [self._pool.submit(self._give, server, weights) for server in self.servers]
        problems = [future.result() for future in futures]
        if all(problems):
            # All are down or wrong: be as patient as with any request, then say so.
            self._persist(lambda attempt: self._offer(attempt, weights), f"weights {weights.version}")

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
        """See `Engine.generate`. A single seed is spread over the rows by their index. After a call that
        failed, `prepare` comes first."""
        if self.weights is None:
            raise RolloutError("no weights yet: call prepare(), or load() without a publisher")
        if max_new_tokens and min(max_new_tokens) < 1:
            raise ValueError(
                f"max_new_tokens={min(max_new_tokens)}: every row needs room for at least one token"
            )
        seeds = row_seeds(seed, len(prompts)) if isinstance(seed, int) else seed
        stops = frozenset(stop_token_ids)
        rows = [
            _Row(i, len(prompts), list(prompts[i]), max_new_tokens[i], temperature, seeds[i] % 2**63, stops)
            for i in range(len(prompts))
        ]
        futures = [self._pool.submit(self._sample, row) for row in rows]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            return [future.result() for future in futures]
        except BaseException:
            self._end(futures)
            raise

    def interrupt(self) -> None:
        """From another thread: ends the call of `generate` that is under way, and later ones, until `prepare`
        or `load`."""
        self._end([])

    def close(self) -> None:
        self._end([])
        self._pool.shutdown(wait=True)

    def _end(self, futures: Sequence[Future]) -> None:
        """Lets go of everything under way: an interrupted run must not wait for a slow server."""
        self._stop.set()
        left = [future for future in futures if not future.cancel()]
        for _ in range(100):
            for server in self.servers:
                server.hang_up()
            if not wait(left, timeout=0.1).not_done:
                return

    # -- one row -----------------------------------------------------------------------------------

    def _sample(self, row: _Row) -> Generation:
        def attempt(number: int) -> Generation:
            server, weights = self._choose(row.index * len(self.servers) // row.of, number), self.weights
            assert weights is not None
            server.ready(weights)
            room = row.max_tokens
            if server.max_model_len is not None:  # less than the model's own context, perhaps
                room = min(room, server.max_model_len - len(row.prompt))
            if room < 1:
                return Generation([], [], "length")
            body = completion_body(
                row.prompt,
                max_tokens=room,
                temperature=row.temperature,
                seed=row.seed,
                stops=[*row.stops],
            )
            with _Watched(server):
                answer = server.complete(body, weights)
                return self._checked(answer, replace(row, max_tokens=room), server, weights)

        return self._persist(attempt, f"row {row.index} of {row.of} (seed {row.seed})")

    def _persist(self, attempt: Any, what: str) -> Any:
        """Calls attempt(0), attempt(1), ... until one returns; RolloutError when patience ends."""
        deadline, delay, bad, number = time.monotonic() + self.retry_timeout, 0.05, 0, 0
        while not self._stop.is_set():
            try:
                return attempt(number)
            except RetryableError as problem:
                bad += isinstance(problem, InvalidResponse)
                if bad >= MAX_INVALID_RESPONSES:
                    raise RolloutError(f"{what}: {bad} wrong answers, the last: {problem}") from problem
                if time.monotonic() + delay > deadline:
                    raise RolloutError(
                        f"{what}: no server of {', '.join(s.url for s in self.servers)} gave an answer in "
                        f"rollout.retry_timeout={self.retry_timeout:g} s, {number + 1} tries; the last: "
                        f"{problem}. Start them (pact-fast serve, or vLLM) and go on with --resume"
                    ) from problem
                if delay >= 1.0:
                    log.warning("trying again: %s: %s", what, problem)
            self.retries += 1
            number += 1
            self._stop.wait(delay)
            delay = min(2 * delay, LONGEST_WAIT)
        raise RolloutError(f"{what}: given up, because another request failed or the run is stopping")

    def _choose(self, preferred: int, attempt: int) -> RemoteServer:
        order = [
            self.servers[(preferred + attempt + i) % len(self.servers)] for i in range(len(self.servers))
        ]
        now = time.monotonic()
        return next((server for server in order if server.down_until <= now), order[0])

    def _give(self, server: RemoteServer, weights: Weights) -> RetryableError | None:
        """Offers weights to one server; a wrong answer is tried again at once, a server out of reach not."""
        for _ in range(MAX_INVALID_RESPONSES):
            try:
                server.ensure(weights)
                return None
            except InvalidResponse as error:
                problem: RetryableError = error
            except RetryableError as error:
                return error
        raise RolloutError(str(problem)) from problem

    def _offer(self, attempt: int, weights: Weights) -> None:
        self.servers[attempt % len(self.servers)].ensure(weights)

    def _checked(
        self, answer: dict[str, Any], row: _Row, server: RemoteServer, weights: Weights
    ) -> Generation:
        """The answer as a Generation; InvalidResponse where it is wrong, RetryableError where it was cut."""
        where = f"{server.url}: row {row.index} of {row.of} (seed {row.seed})"

        def demand(good: bool, what: str) -> None:
            if not good:
                raise InvalidResponse(
                    f"{where}: {what}; the server does not speak this protocol or is damaged"
                )

        choices = answer.get("choices")
        demand(
            isinstance(choices, list) and len(choices) == 1, f"one choice was asked, not {_short(choices)}"
        )
        choice = choices[0]  # type: ignore[index]
        reason, ids, prompt = (choice.get(k) for k in ("finish_reason", "token_ids", "prompt_token_ids"))
        logprobs: Any = (choice.get("logprobs") or {}).get("token_logprobs")
        if reason == "abort":
            raise RetryableError(f"{where}: the server ended it early (finish_reason 'abort')")
        demand(reason in ("stop", "length"), f"finish_reason is {reason!r}, neither 'stop' nor 'length'")
        demand(
            prompt == row.prompt, f"prompt_token_ids {_short(prompt)} are not the prompt {_short(row.prompt)}"
        )
        demand(
            isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids),
            f"token_ids are {_short(ids)}",
        )
        demand(
            isinstance(logprobs, list) and len(logprobs) == len(ids),
            f"{len(ids)} token_ids but {len(logprobs or [])} log-probs",
        )
        for i, value in enumerate(logprobs):
            good = isinstance(value, float | int) and math.isfinite(value) and MIN_LOGPROB < value <= 1e-4
            demand(good, f"log-prob {i} of {len(ids)} is {value!r}")
        stopped = bool(ids) and ids[-1] in row.stops
        demand(1 <= len(ids) <= row.max_tokens, f"{len(ids)} tokens, asked for 1 to {row.max_tokens}")
        demand(stopped or len(ids) == row.max_tokens, f"it ends after {len(ids)} tokens without a stop token")
        demand(not row.stops.intersection(ids[:-1]), "it goes on after a stop token")
        versions: list[str] = choice.get("weight_versions") or []
        if any(v != weights.version for v in versions) and not self.mix_weights:
            server.version = None  # look again before the next request
            raise InvalidResponse(f"{where}: sampled with weights {versions}, asked for {weights.version}")
        return Generation(ids, [float(v) for v in logprobs], "stop" if stopped else "length")


class _Watched:
    """Remembers that a server failed, so that others are asked first for a while."""

    def __init__(self, server: RemoteServer) -> None:
        self.server = server

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RetryableError):
            self.server.down_until = time.monotonic() + 1.0
        elif error is None:
            self.server.down_until = 0.0


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
