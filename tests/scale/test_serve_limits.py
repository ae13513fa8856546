"""Requests that no server should have to carry out: each is refused before it costs anything."""

import http.client
import json
import socket
import threading
import time

import psutil
import pytest

from pact_fast.envs.toolbox.base_model import base_model_path
from pact_fast.serve.protocol import BadRequest, jobs_of
from tests.helpers.servers import ask, call, served, url_of


def raw(url, head, body=b"", *, send_all=True, timeout=30):
    """(status, answer) to bytes as they are; the connection is closed afterwards."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=timeout) as connection:
        connection.sendall(head.encode("latin-1") + b"\r\n\r\n" + body)
        response = http.client.HTTPResponse(connection)
        response.begin()
        return response.status, json.loads(response.read())


def peak_growth(work):
    """MiB that this process grows by at most while `work` runs."""
    me, done, seen = psutil.Process(), threading.Event(), []

    def watch():
        while not done.wait(0.01):
            seen.append(me.memory_info().rss)

    thread = threading.Thread(target=watch)
    before = me.memory_info().rss
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return (max(seen, default=before) - before) / 2**20


def test_rows_past_the_line_are_a_bad_request_and_never_made(url):
    answers = []
    body = {"prompt": [[5, 6, 7]] * 1500, "n": 1024, "max_tokens": 4}
    assert peak_growth(lambda: answers.append(ask(url, **body))) < 200
    status, answer = answers[0]
    assert status == 400
    assert "1,536,000 rows" in answer["error"]["message"]


def test_tokens_past_the_limit_are_a_bad_request():
    limits = {"model": "m", "vocabulary": 700, "max_model_len": 40_000, "eos": [], "max_rows": 4096}
    body = {"prompt": [[5] * 20_000] * 4, "n": 1024, "max_tokens": 20_000}
    with pytest.raises(BadRequest, match="163,840,000 tokens"):
        jobs_of(body, **limits)
    assert len(jobs_of(body | {"n": 2}, **limits)) == 8


@pytest.mark.parametrize(
    "body",
    [
        {"temperature": 1e-300},
        {"temperature": 5e-324},
        {"temperature": 1e-6},
        {"temperature": 10**400},
        {"max_tokens": 10**4000},
        {"stop": ["x"] * 100_000},
        {"prompt": [[5], 6]},
        {"prompt": [{"a": 1}]},
        {"prompt": [5, "6"]},
        {"stop_token_ids": [[1]]},
        {"x" * 100_000: 1},
        {"n": 1e300},
        {"seed": -1},
        {"cache_salt": "\ud800", "n": 0},
    ],
    ids=lambda body: str(body)[:40],
)
def test_a_strange_value_is_a_bad_request_with_a_short_message(url, body):
    status, answer = ask(url, **body)
    assert status == 400
    assert len(answer["error"]["message"]) < 500


@pytest.mark.parametrize("path", ["a\0b", "\ud800", "x/" * 5000, "y" * 300])
def test_a_path_that_no_file_system_knows_is_a_bad_request(url, path):
    assert call(url, "POST", "/pause?mode=abort")[0] == 200
    body = {"method": "reload_weights", "kwargs": {"weights_path": path}}
    assert call(url, "POST", "/collective_rpc", body)[0] == 400
    body["kwargs"] = [path]
    assert call(url, "POST", "/collective_rpc", body)[0] == 400


@pytest.mark.parametrize("length", ["\xb2", "-1", "+5", "0x5", "5, 5", "1e3", "five", "", "9" * 30, "5 5"])
def test_a_strange_content_length_is_a_bad_request(url, length):
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}"
    assert raw(url, head, b"{}")[0] == 400


def test_two_content_lengths_are_a_bad_request(url):
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3"
    assert raw(url, head, b"{} ")[0] == 400


@pytest.mark.parametrize("target", ["//[x", "/v1/completions?%00", "/%00", "//", "/\xff"])
def test_a_strange_address_is_not_the_servers_error(url, target):
    status, _ = raw(url, f"GET {target} HTTP/1.1\r\nHost: x")
    assert status in (400, 404)


def test_the_token_is_asked_for_before_the_body_is_read():
    with served(base_model_path(), token="secret") as server:
        url = url_of(server)
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 60000000"
        started = time.monotonic()
        assert raw(url, head)[0] == 401  # not a byte of the body is sent
        assert raw(url, head, b"x" * 2**20)[0] == 401
        assert time.monotonic() - started < 20
        assert raw(url, head.replace("60000000", str(2**30)))[0] == 413
        authorized = head.replace("60000000", "2") + "\r\nAuthorization: Bearer secret"
        assert raw(url, authorized, b"{}")[0] == 400  # no prompt: the body was read


def test_a_connection_goes_on_after_a_request_that_was_read_and_refused(url):
    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=30)
    for _ in range(3):
        connection.request("POST", "/v1/completions", json.dumps({"prompt": [5], "n": 0}))
        response = connection.getresponse()
        assert response.status == 400
        assert response.read()
        assert response.getheader("Connection") != "close"
    connection.close()
