"""One rollout server as its client sees it: calls over HTTP, and the weights it is known to hold."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor

from pact_fast.rollout.engine import RolloutError

AGAIN = (408, 429, 500, 502, 503, 504)  # statuses that another try may cure
PROBE_SEED = 20_260_216
CONNECT = 10.0  # seconds to open a connection


class RetryableError(Exception):
    """A call failed in a way that another try, or another server, may cure."""


class InvalidResponse(RetryableError):
    """A server answered, but not what was asked: counted, because more tries rarely help."""


@dataclass(frozen=True)
class Weights:
    """One version of the policy's weights, and how to recognise them.

    folder: safetensors, as the server sees the path. probe: token ids of a fixed sequence; expected [len, V]:
    the trainer's log-probs of every token after each of its prefixes; before: the same of the version before.
    tolerance: largest gap of a log-prob between trainer and server.
    """

    version: str
    folder: Path
    probe: Sequence[int]
    expected: Tensor
    before: Tensor | None
    tolerance: float


def stale_or_wrong(weights: Weights, tokens: Sequence[int], logprobs: Sequence[float]) -> str | None:
    """What a server's log-probs of `tokens` (one after each prefix of the probe) say against it, or None."""
    rows = range(len(tokens))
    want = [float(weights.expected[i, tokens[i]]) for i in rows]
    gaps = [abs(a - b) for a, b in zip(logprobs, want, strict=True)]
    worst = max(rows, key=lambda i: gaps[i])
    if not gaps[worst] <= weights.tolerance:  # NaN is a gap, too
        return (
            f"token {tokens[worst]} after {worst + 1} probe tokens has log-prob {logprobs[worst]:.6f}, the "
            f"trainer's is {want[worst]:.6f}: a gap of {gaps[worst]:.1e}, above rollout.probe_tolerance="
            f"{weights.tolerance:g}"
        )
    if weights.before is None:
        return None
    old = [float(weights.before[i, tokens[i]]) for i in rows]
    moved = max(abs(a - b) for a, b in zip(want, old, strict=True))
    gap_to_old = max(abs(a - b) for a, b in zip(logprobs, old, strict=True))
    if gap_to_old < 0.25 * moved:
        return (
            f"its log-probs are those of the version before (gap {gap_to_old:.1e}) and not of this one (gap "
            f"{gaps[worst]:.1e})"
        )
    return None


@dataclass
class _Connection:
    http: http.client.HTTPConnection
    verified: bool = False  # the server's weights were looked at after this connection was opened


@dataclass
class RemoteServer:
    """Calls to one server; safe to use from many threads.

    url: "http://host:port". token: bearer token or None. timeout: seconds for one answer. keep: let requests
    in flight go on under new weights instead of ending them.
    """

    url: str
    token: str | None = None
    timeout: float = 120.0
    keep: bool = False
    version: str | None = None  # of the weights it was last given or seen to hold
    model: str = ""
    max_model_len: int | None = None  # tokens of prompt and completion that it says it takes
    down_until: float = 0.0  # time.monotonic() before which others are asked first
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _local: threading.local = field(default_factory=threading.local)
    _open: set[http.client.HTTPConnection] = field(default_factory=set)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RolloutError(f"rollout.servers: {self.url!r} is no server: write http://HOST:PORT")
        self._base = parts.path.rstrip("/")
        self._parts = parts

    # -- calls -------------------------------------------------------------------------------------

    def complete(self, body: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
        """POST /v1/completions under these weights; gives them to the server first where it has others."""
        self.ready(weights)
        whole = {"model": self.model, **body, "cache_salt": weights.version}
        return self.call("POST", "/v1/completions", whole)

    def ready(self, weights: Weights) -> None:
        """As `ensure`, once a connection and version of the weights."""
        connection = self._connection()
        if not connection.verified or self.version != weights.version:
            self.ensure(weights)
            connection.verified = True

    def ensure(self, weights: Weights) -> None:
        """Returns when the server is known to hold these weights; else RetryableError, InvalidResponse or
        RolloutError."""
        with self._lock:
            self.version = None
            models = self.call("GET", "/v1/models").get("data")
            if not isinstance(models, list) or not models or not isinstance(models[0].get("id"), str):
                raise InvalidResponse(f"{self.url}: GET /v1/models names no model: {str(models)[:200]}")
            self.model = models[0]["id"]
            limit = models[0].get("max_model_len")
            self.max_model_len = limit if isinstance(limit, int) else None
            if self.call("GET", "/weight_info").get("weight_version") != weights.version:
                self._load(weights)
            self.version = weights.version

    def _load(self, weights: Weights) -> None:
        mode = "keep" if self.keep else "abort"
        self.call("POST", f"/pause?mode={mode}&clear_cache=true")
        # Not transactional everywhere: a server whose reload failed stays paused, lest it be sampled from.
        arguments = {"method": "reload_weights", "kwargs": {"weights_path": str(weights.folder)}}
        done = self.call("POST", "/collective_rpc", arguments)
        if "results" not in done:
            raise InvalidResponse(
                f"{self.url}: reload_weights answered {str(done)[:200]}, expected 'results'"
            )
        self.call("POST", "/reset_prefix_cache")
        self.call("POST", "/update_weight_version", {"new_version": weights.version})
        self.call("POST", "/resume")
        try:
            self._probe(weights)
        except RetryableError:
            # Or else its label alone would pass for the weights at the next look.
            self.call("POST", "/update_weight_version", {"new_version": f"not-{weights.version}"})
            raise

    def _probe(self, weights: Weights) -> None:
        """Compares log-probs of a fixed sequence with the trainer's: a reload may fail without saying so."""
        prompts = [list(weights.probe[: i + 1]) for i in range(len(weights.probe))]
        body = completion_body(prompts, max_tokens=1, temperature=1.0, seed=PROBE_SEED, stops=())
        answer = self.call("POST", "/v1/completions", {"model": self.model, **body, "cache_salt": "probe"})
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            tokens = [int(choice["token_ids"][0]) for choice in choices]
            logprobs = [float(choice["logprobs"]["token_logprobs"][0]) for choice in choices]
            problem = stale_or_wrong(weights, tokens, logprobs) if len(tokens) == len(prompts) else "choices"
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise InvalidResponse(
                f"{self.url}: the probe's answer has no token or log-prob: {error!r}"
            ) from error
        if problem:
            raise InvalidResponse(
                f"{self.url}: after loading weights {weights.version} from {weights.folder}: {problem}. It "
                "serves stale weights, another model, or a narrower dtype: compare its model and dtype with "
                "the trainer's, restart it, or raise rollout.probe_tolerance"
            )

    def call(self, verb: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One call -> its JSON object. RetryableError where another try may help, RolloutError where not."""
        where = f"{self.url}: {verb} {path.partition('?')[0]}"
        connection = self._connection()
        try:
            status, raw = self._exchange(connection.http, verb, path, body)
        except (OSError, http.client.HTTPException) as error:
            self._drop(connection.http)
            raise RetryableError(f"{where}: {type(error).__name__}: {error}") from error
        try:
            answer = json.loads(raw) if raw.strip() else {}
        except ValueError:
            answer = None
        if status in AGAIN:
            raise RetryableError(f"{where}: status {status}: {_message(answer, raw)}")
        if status != 200:
            hint = "; set PACT_FAST_TOKEN to the server's token" if status == 401 else ""
            raise RolloutError(f"{where}: status {status}: {_message(answer, raw)}{hint}")
        if not isinstance(answer, dict):
            raise InvalidResponse(f"{where}: the answer is no JSON object: {raw[:100]!r}")
        return answer

    def _exchange(
        self, connection: http.client.HTTPConnection, verb: str, path: str, body: Mapping[str, Any] | None
    ) -> tuple[int, bytes]:
        deadline = time.monotonic() + self.timeout
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body).encode()
        connection.request(verb, self._base + path, data, headers)
        response = connection.getresponse()
        pieces = []
        while piece := response.read1(1 << 16):
            pieces.append(piece)
            if time.monotonic() > deadline:  # the socket's own limit starts anew with every byte
                raise TimeoutError(f"no whole answer within {self.timeout:g} s")
        response.close()  # read to its end: the connection is free for the next call
        return response.status, b"".join(pieces)

    # -- connections -------------------------------------------------------------------------------

    def _connection(self) -> _Connection:
        """This thread's connection; a new one is not verified: the server may be another process by now."""
        found: _Connection | None = getattr(self._local, "connection", None)
        if found is not None and found.http.sock is not None:
            return found
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        made = kind(self._parts.hostname or "", self._parts.port, timeout=CONNECT)
        try:
            made.connect()
            made.sock.settimeout(self.timeout)
        except OSError as error:
            raise RetryableError(f"{self.url}: cannot connect: {error}") from error
        self._open.add(made)
        self._local.connection = _Connection(made)
        return self._local.connection

    def _drop(self, connection: http.client.HTTPConnection) -> None:
        self._open.discard(connection)
        connection.close()

    def hang_up(self) -> None:
        """Breaks every call that is under way."""
        for connection in list(self._open):
            if (sock := connection.sock) is not None:
                with contextlib.suppress(OSError):  # it was closed already
                    sock.shutdown(socket.SHUT_RDWR)


def completion_body(
    prompt: Sequence[Any], *, max_tokens: int, temperature: float, seed: int, stops: Sequence[int]
) -> dict[str, Any]:
    """A completion request but for model and cache_salt. Every field is sent: a missing one would fall back
    to the server's generation config."""
    return {
        "prompt": list(prompt),
        "n": 1,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": seed,
        "stop_token_ids": list(stops),
        "ignore_eos": True,  # `stop_token_ids` alone end a row
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "skip_special_tokens": False,
    }


def _message(answer: Any, raw: bytes) -> str:
    if isinstance(answer, dict) and isinstance(answer.get("error"), dict):
        return str(answer["error"].get("message", ""))[:500]
    return raw[:200].decode(errors="replace")
