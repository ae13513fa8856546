"""Rollout servers for tests: real ones, in this process or in one of their own, and one that misbehaves."""

import http.client
import json
import os
import random
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pact_fast.envs.toolbox.base_model import base_model_path
from pact_fast.serve.server import Server, Service, serve_in_thread
from pact_fast.tree.scoring import sequence_logprobs

ROOT = Path(__file__).parent.parent.parent


def url_of(server):
    return "http://{}:{}".format(*server.server_address[:2])


@contextmanager
def served(path, token=None, tokenizer=True, model=None, **options):
    """A server over a real socket, in this process."""
    model = model or AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    words = AutoTokenizer.from_pretrained(path) if tokenizer else None
    server = Server(Service(model, "policy", words, **options), ("127.0.0.1", 0), token)
    serve_in_thread(server)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def call(url, verb, path, body=None, headers=None, raw=None):
    """-> (status, JSON answer)."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    data = raw if raw is not None else None if body is None else json.dumps(body)
    connection.request(verb, path, data, {"Content-Type": "application/json"} | (headers or {}))
    response = connection.getresponse()
    answer = json.loads(response.read() or b"{}")
    connection.close()
    return response.status, answer


class ServerProcess:
    """`pact-fast serve` in a process of its own, on a port that stays when it is started again."""

    def __init__(self, model, root, *, prefix=(), env=None, **options):
        options = {"dtype": "float64", "threads": 1} | options
        words = [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", str(v))]
        self.words = [*(prefix or (sys.executable, "-m", "pact_fast.cli")), "serve", str(model), *words]
        self.words += ["--model-root", str(root), "--name", "policy"]
        self.env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (env or {})
        self.port = 0
        self.start()

    def start(self):
        words = [*self.words, "--port", str(self.port)]
        self.process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=self.env
        )
        line = self.process.stdout.readline()
        assert line.startswith("serving"), (line, self.process.poll())
        self.url = line.split(" on ")[1].strip()
        self.port = int(self.url.rsplit(":", 1)[1])

    def kill(self):
        self.process.kill()
        self.process.wait()

    def close(self):
        self.process.terminate()
        self.process.wait(60)
        self.process.stdout.close()


class Misbehaving:
    """A server between client and server: passes calls on, and now and then does `fault` to the answer.

    fault(status, answer, handler) -> (status, answer), or None to send nothing and hang up. share: of the
    completions that it happens to; `only`: how often at most.
    """

    def __init__(self, target, fault, *, share=1.0, only=10**9, seed=0):
        self.target, self.fault, self.share, self.left = target, fault, share, only
        self.rng, self.lock, self.done, self.calls = random.Random(seed), threading.Lock(), 0, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self):
                outer.handle(self, "GET")

            def do_POST(self):
                outer.handle(self, "POST")

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = url_of(self.http)

    def handle(self, handler, verb):
        raw = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        status, answer = call(self.target, verb, handler.path, raw=raw or None)
        with self.lock:
            self.calls.append(handler.path.partition("?")[0])
            chosen = self.wants(handler.path, raw) and self.left > 0 and self.rng.random() < self.share
            self.left -= chosen
            self.done += chosen
        result = self.fault(status, answer, handler) if chosen else (status, answer)
        if result is None:
            handler.close_connection = True
            return
        data = json.dumps(result[1]).encode() if not isinstance(result[1], bytes) else result[1]
        handler.send_response(result[0])
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def wants(self, path, raw):
        # Probes ask many prompts at once; the faults here are meant for rollouts.
        return path.startswith("/v1/completions") and not raw.startswith(b'{"model": "policy", "prompt": [[')

    def close(self):
        self.http.shutdown()
        self.http.server_close()


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def restart_after(server, proxy, completions):
    """A thread that kills a server once that many completions have passed the proxy, and starts it again."""

    def restart():
        wait_for(lambda: proxy.calls.count("/v1/completions") >= completions)
        server.kill()
        server.start()

    thread = threading.Thread(target=restart)
    thread.start()
    return thread


def spoil(**changes):
    """A fault that changes the choice of an answer."""

    def fault(status, answer, handler):
        choice = answer["choices"][0]
        for name, change in changes.items():
            if name == "token_logprobs":
                choice["logprobs"][name] = change(choice["logprobs"][name])
            else:
                choice[name] = change(choice[name])
        return status, answer

    return fault


def base_model():
    return AutoModelForCausalLM.from_pretrained(base_model_path(), dtype=torch.float32).eval()


def prompts_of(count, seed=0, low=20, high=120):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (count,), generator=generator).tolist()
    return [torch.randint(5, 700, (n,), generator=generator).tolist() for n in lengths]


def draw(engine, prompts, tokens=8, temperature=1.0, seed=5, stops=(1, 2, 3)):
    engine.prepare()
    return engine.generate(
        prompts,
        max_new_tokens=[tokens] * len(prompts),
        temperature=temperature,
        stop_token_ids=stops,
        seed=seed,
    )


def gap(model, prompts, generations, temperature=1.0):
    """Largest difference of a log-prob between the engine's and the trainer's own scoring pass."""
    with torch.no_grad():
        scores = sequence_logprobs(
            model,
            [p + g.token_ids for p, g in zip(prompts, generations, strict=True)],
            temperature=temperature,
            token_budget=8192,
        )
    return max(
        float((score[len(p) - 1 :] - torch.tensor(g.logprobs)).abs().max())
        for p, g, score in zip(prompts, generations, scores, strict=True)
    )


def flat(generations):
    return [value for generation in generations for value in generation.logprobs]


def ask(url, **body):
    return call(url, "POST", "/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 4} | body)
