"""The HTTP side of `pact-fast serve`: the part of vLLM's protocol that `rollout.engine: http` speaks.

    GET  /health  /v1/models  /weight_info
    POST /v1/completions                               token ids in, token ids and log-probs out
    POST /pause?mode=abort|keep&clear_cache=true       503 for completions until /resume
    POST /collective_rpc  {"method": "reload_weights", "kwargs": {"weights_path": DIR}}   only while paused
    POST /reset_prefix_cache
    POST /update_weight_version  {"new_version": NAME}
    POST /resume

Every error is JSON, {"error": {"message", "type", "code"}}. Who may speak: anybody who reaches the loopback
address, or holders of the token; never a page in a browser (an Origin header is refused).
"""

from __future__ import annotations

import hmac
import itertools
import json
import os
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from transformers import PreTrainedModel

from pact_fast.rollout.in_process.engine import InProcessEngine
from pact_fast.serve.protocol import BadRequest, answer_of, jobs_of, shown
from pact_fast.serve.thread import EngineThread, Job, ServerBusy
from pact_fast.serve.weights import WeightsRefused, reload_weights

MAX_BODY = 64 * 2**20  # bytes
IDLE = 600.0  # seconds a connection may be silent
LINGER = 2.0  # seconds that a refused client may go on sending
LOOK = 0.5  # seconds between two looks whether the client still waits
MODES = ("abort", "keep")


class Service:
    """What the server does, without HTTP.

    Args:
        model: the model and its name for clients; tokenizer: for the readable text of an answer, or None.
        max_model_len: prompt and completion together.
        model_root: folder that new weights must lie in; None refuses new weights.
        max_waiting: rows in line before more are refused.
        options: of the `InProcessEngine`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        tokenizer: Any = None,
        *,
        max_model_len: int | None = None,
        model_root: Path | None = None,
        max_waiting: int = 4096,
        **options: Any,
    ) -> None:
        engine = InProcessEngine(model, context_length=max_model_len, **options)
        self.engine = EngineThread(engine, max_waiting=max_waiting)
        self.name, self.tokenizer, self.model_root = name, tokenizer, model_root
        self.max_model_len = engine.weights.context_length
        embeddings: Any = model.get_input_embeddings()
        self.vocabulary = int(embeddings.weight.shape[0])
        eos = model.generation_config.eos_token_id if model.generation_config else None
        self.eos: list[int] = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        self._number = itertools.count()
        self.routes: dict[tuple[str, str], Callable[[dict[str, Any], dict[str, str]], Any]] = {
            ("GET", "/health"): lambda body, query: {},
            ("GET", "/v1/models"): self._models,
            ("GET", "/weight_info"): lambda body, query: {"weight_version": self.engine.version},
            ("POST", "/pause"): self._pause,
            ("POST", "/resume"): self._resume,
            ("POST", "/collective_rpc"): self._rpc,
            ("POST", "/reset_prefix_cache"): self._reset_prefix_cache,
            ("POST", "/update_weight_version"): self._update_version,
        }

    def complete(self, body: dict[str, Any], gone: Callable[[], bool]) -> dict[str, Any]:
        """Serves a completion; `gone` tells whether the client has left, whose rows are then given up."""
        jobs = jobs_of(
            body,
            model=self.name,
            vocabulary=self.vocabulary,
            max_model_len=self.max_model_len,
            eos=self.eos,
            max_rows=self.engine.max_waiting,
        )
        self.engine.submit(jobs)
        for job in jobs:
            while not job.done.wait(LOOK):
                if gone():
                    self.engine.cancel(jobs)
        if broken := next((job for job in jobs if job.finish_reason == "error"), None):
            raise RuntimeError(broken.error)
        return answer_of(
            jobs,
            model=self.name,
            request_id=f"cmpl-{next(self._number)}",
            created=int(time.time()),
            decode=self._text,
        )

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False) if self.tokenizer else ""

    def _models(self, body: dict[str, Any], query: dict[str, str]) -> dict[str, Any]:
        entry = {"id": self.name, "object": "model", "max_model_len": self.max_model_len}
        return {"object": "list", "data": [entry]}

    def _pause(self, body: dict[str, Any], query: dict[str, str]) -> dict[str, Any]:
        mode, clear = query.get("mode", "abort"), query.get("clear_cache", "true")
        if mode not in MODES or clear not in ("true", "false"):
            raise BadRequest(
                f"mode={mode!r}, clear_cache={clear!r}: mode is one of {MODES}, clear_cache true or false"
            )
        self.engine.pause(keep=mode == "keep", clear_cache=clear == "true")
        return {"status": "paused"}

    def _resume(self, body: dict[str, Any], query: dict[str, str]) -> dict[str, Any]:
        self.engine.resume()
        return {"status": "resumed"}

    def _rpc(self, body: dict[str, Any], query: dict[str, str]) -> dict[str, Any]:
        method, arguments = body.get("method"), body.get("kwargs") or {}
        if method != "reload_weights":
            raise BadRequest(f"method={shown(method)} is not supported; there is 'reload_weights'")
        path = arguments.get("weights_path") if isinstance(arguments, dict) else None
        if not isinstance(path, str) or set(arguments) != {"weights_path"}:
            raise BadRequest(f"kwargs={shown(arguments)}: send {{'weights_path': FOLDER}} and nothing else")
        if not is_path(path):
            raise BadRequest(f"weights_path={shown(path)}: is no path of a file system")
        with self.engine.weights() as model:
            reload_weights(model, path, self.model_root)
        return {"results": [None]}

    def _reset_prefix_cache(self, body: dict[str, Any], query: dict[str, str]) -> dict[str, Any]:
        self.engine.reset_prefix_cache()
        return {"success": True}

    def _update_version(self, body: dict[str, Any], query: dict[str, str]) -> dict[str, Any]:
        version = body.get("new_version")
        if not isinstance(version, str) or not version:
            raise BadRequest(f"new_version={shown(version)}: send a name, a string")
        self.engine.version = version
        return {"success": True, "new_version": version}


STATUS: list[tuple[type[Exception], int]] = [
    (BadRequest, 400),
    (WeightsRefused, 400),
    (PermissionError, 403),
    (ServerBusy, 503),
]


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = IDLE
    server: Server

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def _serve(self, verb: str) -> None:
        self.unread = 0  # bytes of the body that are still to come
        try:
            size = self._size()
            path, _, rest = self.path.partition("?")
            self._admit(path)  # before a byte of the body is read
            body = self._body(size)
            query = {name: values[-1] for name, values in parse_qs(rest).items()}
            service = self.server.service
            if (verb, path) == ("POST", "/v1/completions"):
                answer = service.complete(body, self._gone)
            elif (verb, path) in service.routes:
                answer = service.routes[verb, path](body, query)
            else:
                known = ", ".join(" ".join(route) for route in service.routes)
                raise _Refused(404, f"no {verb} {shown(path)} here; there are POST /v1/completions, {known}")
            self._send(200, answer)
        except _Refused as refusal:
            self._fail(refusal.status, refusal)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception as error:
            status = next((code for kind, code in STATUS if isinstance(error, kind)), 500)
            self._fail(status, error)

    def _admit(self, path: str) -> None:
        if "Origin" in self.headers:
            raise _Refused(403, "requests of web pages (with an Origin header) are not served")
        token = self.server.token
        if token is None or path == "/health":
            return
        given = self.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise _Refused(
                401,
                "send the header 'Authorization: Bearer TOKEN' with the token this server was started with",
            )

    def _size(self) -> int:
        """Bytes of the body, from headers that leave no doubt where it ends."""
        if "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise _Refused(411, "send the body with a Content-Length, not in chunks")
        texts = self.headers.get_all("Content-Length") or ["0"]
        if len(set(texts)) > 1 or not re.fullmatch("[0-9]{1,18}", texts[0]):
            self.close_connection = True
            raise _Refused(400, f"Content-Length {shown(', '.join(texts))}: send one number of bytes")
        self.unread = int(texts[0])
        if self.unread > MAX_BODY:
            raise _Refused(413, f"Content-Length {self.unread}: send at most {MAX_BODY} bytes")
        return self.unread

    def _body(self, size: int) -> dict[str, Any]:
        raw = self.rfile.read(size)
        self.unread = 0
        if len(raw) < size:
            raise ConnectionError("the client left within its request")
        if not raw:
            return {}
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise _Refused(400, f"the body is not JSON: {error}") from None
        if not isinstance(body, dict):
            raise _Refused(400, "the body is not a JSON object")
        return body

    def _gone(self) -> bool:
        """Whether the client has closed the connection while it should wait."""
        try:
            if not select.select([self.connection], [], [], 0)[0]:
                return False
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except (OSError, ValueError):
            return True

    def _fail(self, status: int, error: Exception) -> None:
        kind = type(error).__name__.removeprefix("_")
        self.close_connection |= self.unread > 0
        self._send(status, {"error": {"message": str(error), "type": kind, "code": status}})
        if self.unread:
            self._let_go()

    def _let_go(self) -> None:
        """Ends a connection whose body was not read. What still comes is passed over for a moment: closed at
        once, the answer could be lost on its way."""
        deadline = time.monotonic() + LINGER
        try:
            self.connection.shutdown(socket.SHUT_WR)
            while (left := deadline - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.connection.recv(1 << 16):
                    break
        except OSError:
            pass

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer, allow_nan=False).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if self.close_connection:
                self.send_header("Connection", "close")
            if status == 503:
                self.send_header("Retry-After", "1")
            # One write: header and body in two would wait for each other's acknowledgement.
            self._headers_buffer.append(b"\r\n" + data)  # type: ignore[attr-defined]
            self.flush_headers()
        except OSError:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass  # thousands of requests a minute; errors go to the client that made them


class Server(ThreadingHTTPServer):
    """Serves a `Service`.

    Args:
        address: host and port; port 0 takes a free one (`server_address` tells which).
        token: bearer token; needed unless the host is a loopback address.
    """

    daemon_threads = True
    request_queue_size = 512
    allow_reuse_address = True

    def __init__(self, service: Service, address: tuple[str, int], token: str | None = None) -> None:
        if not token and not is_loopback(address[0]):
            raise ValueError(
                f"--host {address[0]}: reachable from other machines, so a token is needed: set "
                "PACT_FAST_TOKEN (or --token), or bind 127.0.0.1"
            )
        self.service, self.token = service, token or None
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    def server_close(self) -> None:
        super().server_close()
        self.service.engine.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that went away; `_serve` answers everything else


def is_path(text: str) -> bool:
    """Whether the file system can be asked about `text`: no NUL, no half of a surrogate pair, no such
    length."""
    try:
        os.lstat(text)
    except FileNotFoundError:
        return True
    except (OSError, ValueError) as error:
        return isinstance(error, PermissionError | NotADirectoryError)
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host` (every address it resolves to)."""
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", None)
    except OSError as error:
        raise ValueError(f"--host {host!r}: no such address ({error})") from None
    addresses: Sequence[str] = [str(entry[4][0]) for entry in found]
    return all(a == "::1" or a.startswith("127.") for a in addresses)


def serve_in_thread(server: Server) -> threading.Thread:
    """Runs a server beside the caller; end it with `server.shutdown()` and `server.server_close()`."""
    thread = threading.Thread(target=server.serve_forever, name="server", daemon=True)
    thread.start()
    return thread


__all__ = ["Job", "Server", "Service", "is_loopback", "serve_in_thread"]
