"""`pact-fast serve`: what a server computes, what it refuses, who may speak to it."""

import socket
import threading

import pytest
import torch
from safetensors.torch import save_file

from pact_fast.envs.toolbox.base_model import base_model_path
from pact_fast.rollout import RolloutError
from pact_fast.rollout.http.publish import write_weights
from pact_fast.rollout.in_process.engine import InProcessEngine
from pact_fast.serve.thread import EngineThread, Job
from tests.helpers.servers import ServerProcess, ask, call, draw, gap, prompts_of, served, url_of, wait_for


def test_turns_reuse_the_prefix_and_change_nothing(model):
    engine = EngineThread(InProcessEngine(model))
    scheduler = engine.engine.scheduler
    (prompt,) = prompts_of(1, low=100, high=101)
    for turn in range(3):
        before = scheduler.prefilled
        job = Job(list(prompt), 6, 1.0, turn, frozenset())
        engine.submit([job])
        assert job.done.wait(60)
        # Whole pages of 16 are found: at most a page and what is new is computed.
        assert scheduler.prefilled - before == len(prompt) - (
            0 if turn == 0 else (len(prompt) - 4) // 16 * 16
        )
        row = [type("G", (), {"token_ids": job.token_ids, "logprobs": job.logprobs})]
        assert gap(model, [job.prompt], row) < 1e-4
        prompt = [*job.prompt, *job.token_ids, 9, 8, 7]
    engine.close()
    assert scheduler.table.held == 0


@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_temperature_and_greedy_have_the_models_logprobs(url, engine_on, model, temperature):
    prompts = prompts_of(12, seed=3)
    generations = draw(engine_on(url), prompts, temperature=temperature, stops=())
    assert gap(model, prompts, generations, temperature or 1.0) < 1e-4
    if not temperature:
        best = model(torch.tensor([prompts[0]])).logits[0, -1].argmax()
        assert generations[0].token_ids[0] == int(best)


def test_equal_prompts_long_prompts_and_short_ones_share_a_batch(model):
    engine = EngineThread(InProcessEngine(model, max_rows=9))
    prompts = prompts_of(6, low=1, high=12) + [prompts_of(1, seed=9, low=900, high=901)[0]] * 8
    jobs = [Job(p, 1 + i % 7, 1.0, i, frozenset([3])) for i, p in enumerate(prompts * 3)]
    engine.submit(jobs)
    for job in jobs:
        assert job.done.wait(120)
    assert gap(model, [j.prompt for j in jobs], jobs) < 1e-4
    assert all(len(j.token_ids) == j.max_tokens or j.token_ids[-1] == 3 for j in jobs)
    engine.close()


@pytest.mark.parametrize("mode", ["abort", "keep"])
def test_pause_ends_or_keeps_what_is_in_flight(url, server, weights_root, model, mode):
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(ask(url, max_tokens=3000, ignore_eos=True, seed=1))
    )
    thread.start()
    engine = server.service.engine
    wait_for(lambda: engine.running and len(engine.running[0].token_ids) > 20)
    assert call(url, "POST", f"/pause?mode={mode}&clear_cache=true")[0] == 200
    assert ask(url)[0] == 503
    write_weights(
        folder := weights_root / f"pause-{mode}", {k: v * 1.01 for k, v in model.named_parameters()}
    )
    rpc = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    if mode == "abort":
        thread.join(30)
        choice = answers[0][1]["choices"][0]
        assert choice["finish_reason"] == "abort"
        assert 20 < len(choice["token_ids"]) < 3000
    assert call(url, "POST", "/collective_rpc", rpc) == (200, {"results": [None]})
    assert call(url, "POST", "/update_weight_version", {"new_version": mode})[1]["new_version"] == mode
    assert call(url, "POST", "/resume")[0] == 200
    if mode == "keep":
        # Let it end soon: what is shown is that it goes on.
        wait_for(lambda: engine.running)
        at = len(engine.running[0].token_ids)
        wait_for(lambda: len(engine.running[0].token_ids) > at + 20)
        call(url, "POST", "/pause?mode=abort")
        thread.join(30)
        versions = answers[0][1]["choices"][0]["weight_versions"]
        assert versions[1] == "keep" != versions[0]
        call(url, "POST", "/resume")
    assert ask(url)[0] == 200


def test_reload_refuses_what_is_not_these_weights_and_leaves_the_model_alone(
    url, weights_root, model, server
):
    weights = {k: v.detach().clone() for k, v in model.named_parameters()}
    good = weights_root / "good"
    write_weights(good, weights)
    cases = {
        "missing": {k: v for i, (k, v) in enumerate(weights.items()) if i},
        "shape": weights | {"model.norm.weight": torch.ones(3)},
        "unknown": weights | {"extra": torch.ones(3)},
        "nan": weights | {"model.norm.weight": torch.full((64,), torch.nan)},
    }
    (weights_root / "empty").mkdir()
    (weights_root / "torn").mkdir()
    file = next(good.glob("*.safetensors"))
    (weights_root / "torn" / "model.safetensors").write_bytes(file.read_bytes()[:-1000])
    for name, tensors in cases.items():
        (weights_root / name).mkdir()
        save_file(tensors, weights_root / name / "model.safetensors")
    (weights_root / "link").symlink_to("/tmp", target_is_directory=True)
    before = ask(url, seed=1)[1]["choices"][0]["logprobs"]

    def reload(path):
        rpc = {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
        status, answer = call(url, "POST", "/collective_rpc", rpc)
        return status, answer.get("error", {}).get("message", "")

    assert reload(good)[0] == 503, "weights change only while paused"
    call(url, "POST", "/pause?mode=abort")
    for path, status, message in [
        ("/etc", 403, "outside this server's model root"),
        (weights_root / ".." , 403, "outside"),
        (weights_root / "link", 403, "outside"),
        (weights_root / "nowhere", 400, "holds no"),
        (weights_root / "empty", 400, "holds no"),
        (weights_root / "torn", 400, "cannot be read"),
        (weights_root / "missing", 400, "is missing"),
        (weights_root / "shape", 400, r"is [3], the model's [64]"),
        (weights_root / "unknown", 400, "extra is no tensor"),
        (weights_root / "nan", 400, "not finite"),
    ]:  # fmt: skip
        found = reload(path)
        assert found[0] == status, (path, found)
        assert message in found[1], (path, found)
    call(url, "POST", "/resume")
    assert ask(url, seed=1)[1]["choices"][0]["logprobs"] == before
    call(url, "POST", "/pause?mode=abort")
    assert reload(good)[0] == 200
    call(url, "POST", "/resume")
    assert ask(url, seed=1)[1]["choices"][0]["logprobs"] != before


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "text"}, "send token ids"),
        ({"prompt": [5, 10**6]}, "token ids are integers from 0 to 767"),
        ({"prompt": [5, True]}, "holds True"),
        ({"prompt": [[5], []]}, "prompt is empty"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": 4096}, "max_model_len=4096"),
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.9}, "top_p=0.9 is not supported: send 1"),
        ({"logprobs": 5}, "logprobs=5"),
        ({"seed": 2**63}, "seed="),
        ({"best_of": 3}, "field 'best_of'"),
        ({"model": "other"}, "model='other'"),
        ({"stop_token_ids": 3}, "stop_token_ids=3"),
    ],
)
def test_a_bad_request_is_named_in_json(url, body, message):
    status, answer = ask(url, **body)
    assert status == 400
    assert message in answer["error"]["message"]


def test_errors_of_http_are_json_too(url):
    assert call(url, "GET", "/nowhere")[0] == 404
    assert call(url, "POST", "/v1/completions", raw="{")[1]["error"]["code"] == 400
    assert call(url, "POST", "/v1/completions", raw="[1]")[0] == 400
    assert call(url, "POST", "/collective_rpc", {"method": "eval"})[0] == 400
    assert call(url, "POST", "/pause?mode=never")[0] == 400
    assert call(url, "POST", "/update_weight_version", {"version": "3"})[0] == 400
    assert ask(url, n=0)[0] == 400
    status, answer = call(url, "GET", "/v1/models", headers={"Origin": "http://evil"})
    assert (status, "web pages" in answer["error"]["message"]) == (403, True)


def test_n_and_lists_of_prompts_answer_in_order_each_with_a_draw_of_its_own(url):
    answer = ask(url, prompt=[[5, 6], [7, 8, 9]], n=2, seed=11, max_tokens=6, ignore_eos=True)[1]
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    assert [c["prompt_token_ids"] for c in answer["choices"]] == [[5, 6]] * 2 + [[7, 8, 9]] * 2
    assert answer["choices"][0]["token_ids"] != answer["choices"][1]["token_ids"]
    alone = ask(url, prompt=[5, 6], seed=12, max_tokens=6, ignore_eos=True)[1]["choices"][0]
    assert alone["token_ids"] == answer["choices"][1]["token_ids"]


def test_a_client_that_leaves_frees_its_row(url, server):
    host, port = url.removeprefix("http://").split(":")
    body = b'{"prompt": [5], "max_tokens": 4000, "ignore_eos": true}'
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    engine = server.service.engine
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        wait_for(lambda: engine.running)
    wait_for(lambda: not engine.running)


def test_the_token_is_asked_for_everywhere_but_health(weights_root, model, engine_on):
    with served(base_model_path(), token="secret", model_root=weights_root) as server:
        url = url_of(server)
        assert call(url, "GET", "/health")[0] == 200
        for verb, path in [("GET", "/v1/models"), ("POST", "/v1/completions"), ("POST", "/pause")]:
            for headers in ({}, {"Authorization": "Bearer wrong"}):
                assert call(url, verb, path, {}, headers=headers)[0] == 401
        with pytest.raises(RolloutError, match=r"401.*PACT_FAST_TOKEN"):
            draw(engine_on(url), [[5, 6]])
        assert len(draw(engine_on(url, token="secret"), [[5, 6]])) == 1


def test_the_command_binds_loopback_and_needs_a_token_elsewhere(tmp_path, capsys):
    from pact_fast.cli import main

    words = ["serve", "toolbox-base", "--port", "0"]
    for host in ("0.0.0.0", "::"):
        assert main([*words, "--host", host]) == 2
        assert "token" in capsys.readouterr().err
    process = ServerProcess("toolbox-base", tmp_path, env={"PACT_FAST_TOKEN": "s3"})
    try:
        assert process.url.startswith("http://127.0.0.1:")
        assert call(process.url, "GET", "/weight_info")[0] == 401
        assert call(process.url, "GET", "/weight_info", headers={"Authorization": "Bearer s3"})[0] == 200
    finally:
        process.close()
    assert process.process.returncode == 0
