"""The engine `http` against real servers: exact, complete, and not to be lied to."""

import os
import socket
import time
from collections import Counter
from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from pact_fast.data.chat import ChatFormat
from pact_fast.distributed import Sharded, World
from pact_fast.envs.base import make_env
from pact_fast.envs.toolbox.base_model import base_model_path
from pact_fast.rollout import RolloutError
from pact_fast.rollout.http.publish import merged, write_weights
from tests.helpers.servers import (
    Misbehaving,
    base_model,
    call,
    draw,
    flat,
    gap,
    prompts_of,
    served,
    spoil,
    url_of,
)

# Random ids, far from what a model was taught, cost fp32 some digits: one row in thousands is 2e-4 off there.
REQUESTS = int(os.environ.get("PACT_FAST_SERVE_REQUESTS", "1000"))


def test_a_row_is_a_function_of_its_seed_whoever_shares_the_batch_or_serves_it(
    weights_root, model, engine_on
):
    # In fp64: the rounding of a wider product moves a draw of fp32 once in some hundred thousand tokens.
    prompts = prompts_of(40)
    runs = []
    for rows, memory, count, in_flight in ((64, 0.5, 1, 64), (3, 5e-4, 1, 64), (5, 3.2e-4, 2, 7)):
        with ExitStack() as stack:
            shape = {"tokenizer": False, "model_root": weights_root, "max_rows": rows, "kv_memory": memory}
            servers = [
                stack.enter_context(served(None, model=base_model().double(), **shape)) for _ in range(count)
            ]
            engine = engine_on(*map(url_of, servers), max_in_flight=in_flight)
            runs.append(
                [g.token_ids for g in draw(engine, prompts, tokens=12, temperature=2.0, seed=range(40))]
            )
            assert all(server.service.engine.served > 30 for server in servers)
    assert runs[0] == runs[1] == runs[2]
    assert len({tuple(ids) for ids in runs[0]}) > 30


def test_new_weights_are_seen_in_the_next_rollout_and_no_request_mixes_two(
    server, url, engine_on, model, weights_root
):
    changing = base_model()
    engine = engine_on(url, source=changing)
    prompts = prompts_of(24, seed=4)
    first = draw(engine, prompts)
    folder = {path.name for path in (weights_root / "w").iterdir()}
    with torch.no_grad():
        for parameter in changing.parameters():
            parameter.mul_(1.05)
    again = draw(engine, prompts)  # nobody said that they changed
    assert flat(again) == pytest.approx(flat(first), abs=1e-4)
    engine.weights_changed()
    second = draw(engine, prompts)
    assert gap(changing, prompts, second) < 1e-4
    assert abs(second[0].logprobs[0] - first[0].logprobs[0]) > 1e-3
    assert {path.name for path in (weights_root / "w").iterdir()}.isdisjoint(folder), (
        "old weights are removed"
    )
    assert call(url, "GET", "/weight_info")[1] == {"weight_version": engine.weights.version}


def test_a_full_line_is_refused_and_the_engine_waits_for_room(model, weights_root, engine_on):
    with served(
        None, tokenizer=False, model=base_model(), model_root=weights_root, max_rows=2, max_waiting=20
    ) as server:
        engine = engine_on(url_of(server))
        prompts = prompts_of(120)
        generations = draw(engine, prompts, tokens=4)
        assert len(generations) == 120
        assert engine.retries > 0
        assert gap(model, prompts, generations) < 1e-4


def toolbox_prompts(count):
    """Prompts as training sees them, four rows each, and what ends a turn."""
    chat = ChatFormat.for_tokenizer(AutoTokenizer.from_pretrained(base_model_path()))
    env = make_env("toolbox", {})
    records = env.records("train")
    env.close()
    prompts = [chat.prompt(record.prompt, record.tools).ids for record in records]
    return [prompts[i // 4 % len(prompts)] for i in range(count)], chat.stop_token_ids


@pytest.mark.timeout(900)
def test_many_requests_64_at_once_come_back_once_exact_and_with_the_trainers_logprobs(
    server, url, engine_on, model
):
    engine = engine_on(url, max_in_flight=64)
    prompts, stops = toolbox_prompts(REQUESTS)
    before, begin = server.service.engine.served, time.monotonic()
    generations = draw(engine, prompts, tokens=32, stops=stops)
    seconds = time.monotonic() - begin
    served_now = server.service.engine.served - before - 16  # the probe
    worst = gap(model, prompts, generations)
    tokens = sum(len(g.token_ids) for g in generations)
    print(
        f"{len(generations)} of {REQUESTS} requests, {tokens} tokens, {served_now} served, 64 at once, "
        f"{engine.retries} retries, {seconds:.1f} s, largest log-prob gap {worst:.1e}"
    )
    # The engine itself compares each answer's echoed prompt with the row it is for.
    assert len(generations) == served_now == REQUESTS
    assert worst < 1e-4
    lengths = Counter(len(g.token_ids) for g in generations)
    assert len(lengths) > 1, "some rows should stop early"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (spoil(token_ids=lambda ids: ids[:-1]), "token_ids but"),
        (spoil(token_logprobs=lambda values: values[:-1]), "log-probs"),
        (spoil(token_logprobs=lambda values: [float("nan"), *values[1:]]), "log-prob 0 of"),
        (spoil(token_logprobs=lambda values: [-9999.0, *values[1:]]), "log-prob 0 of"),
        (spoil(prompt_token_ids=lambda ids: ids[1:]), "are not the prompt"),
        (spoil(finish_reason=lambda reason: "repetition"), "finish_reason is 'repetition'"),
        (spoil(weight_versions=lambda versions: ["old", "old"]), r"sampled with weights \['old', 'old'\]"),
        (lambda status, answer, handler: (200, {"choices": answer["choices"] * 2}), "one choice was asked"),
        (lambda status, answer, handler: (200, b"<html>"), "no JSON object"),
    ],
)
def test_a_wrong_answer_is_asked_again_and_a_server_that_only_lies_is_named(url, engine_on, fault, message):
    prompts = prompts_of(20, seed=6)
    want = [g.token_ids for g in draw(engine_on(url), prompts)]
    now_and_then = Misbehaving(url, fault, share=0.5, only=6)
    assert [g.token_ids for g in draw(engine_on(now_and_then.url), prompts)] == want
    assert now_and_then.done > 0
    now_and_then.close()
    always = Misbehaving(url, fault)
    with pytest.raises(RolloutError, match=message) as caught:
        draw(engine_on(always.url), prompts)
    assert always.url in str(caught.value)
    always.close()


def test_stale_weights_are_found_by_the_probe_though_the_server_says_all_is_well(url, engine_on, model):
    class Deaf(Misbehaving):
        def wants(self, path, raw):
            return False

        def handle(self, handler, verb):
            if handler.path == "/collective_rpc" and self.left > 0:
                self.left -= 1
                handler.rfile.read(int(handler.headers["Content-Length"]))
                data = b'{"results": [null]}'
                handler.send_response(200)
                handler.send_header("Content-Length", str(len(data)))
                handler.end_headers()
                handler.wfile.write(data)
            else:
                super().handle(handler, verb)

    once = Deaf(url, None, only=1)
    changing = base_model()
    engine = engine_on(once.url, source=changing)
    assert len(draw(engine, [[5, 6]])) == 1  # loaded at the second try
    assert once.left == 0
    once.left = 10**9
    with torch.no_grad():  # a small step: well within the tolerance
        changing.model.norm.weight *= 1 + 2e-5
    engine.weights_changed()
    with pytest.raises(RolloutError, match="those of the version before"):
        draw(engine, [[5, 6]])
    with torch.no_grad():
        changing.model.norm.weight *= 1.5
    engine = engine_on(once.url, source=changing)
    with pytest.raises(RolloutError, match=r"above rollout.probe_tolerance"):
        draw(engine, [[5, 6]])
    once.close()


def test_servers_that_are_gone_are_done_without_or_named(url, engine_on):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{closed.getsockname()[1]}"
    prompts = prompts_of(10)
    assert len(draw(engine_on(gone, url), prompts)) == 10
    with pytest.raises(RolloutError, match=r"no server of .*retry_timeout=1 s.*cannot connect.*--resume"):
        draw(engine_on(gone, retry_timeout=1.0), prompts)
    with pytest.raises(RolloutError, match=r"write http://HOST:PORT"):
        engine_on("localhost:8000")


def test_weights_of_adapters_are_merged_as_peft_merges_them(tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(base_model(), settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    write_weights(tmp_path / "w", merged(Sharded(adapted, World()).state_dict(frozen=True), adapted))
    found = load_file(next((tmp_path / "w").glob("*.safetensors")))
    plain = adapted.merge_and_unload()
    want = dict(plain.named_parameters())
    assert found.keys() == want.keys()
    assert all(torch.allclose(found[name], want[name], atol=1e-6) for name in want)
    assert not torch.equal(
        found["model.layers.0.mlp.up_proj.weight"], base_model().model.layers[0].mlp.up_proj.weight
    )


def test_a_server_that_reads_less_than_the_model_is_never_asked_for_more(weights_root, engine_on):
    shape = {"tokenizer": False, "model_root": weights_root, "max_model_len": 24}
    with served(None, model=base_model(), **shape) as server:
        engine = engine_on(url_of(server))
        prompts = [list(range(10, 10 + length)) for length in (4, 20, 24, 30)]
        found = draw(engine, prompts, tokens=12, temperature=1.0, seed=range(4))
    assert [len(g.token_ids) for g in found][2:] == [0, 0]
    assert [g.finish_reason for g in found][2:] == ["length", "length"]
    assert len(found[1].token_ids) <= 4
    assert len(found[0].token_ids) > 0
