"""`pact-fast traces` against a real HTTP server: kept and dropped, retried, killed and resumed."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from pact_fast.commands.traces import main
from pact_fast.data.journal import Journal
from pact_fast.data.records import load_records, write_records
from pact_fast.data.segments import PREVIEW
from pact_fast.data.traces import read_annotation, trace_problem
from pact_fast.envs.base import make_env
from pact_fast.envs.toolbox.base_model import base_model_path
from tests.helpers.chat_server import ChatServer, expert, in_text

PERFECT = {"train_tasks": 6, "success_rate": 1.0, "detour_rate": 0.0}
FAST = ["--backoff", "0.01", "--timeout", "1", "--retry-timeout", "60", "--concurrency", "3"]


@pytest.fixture
def toolbox(tmp_path):
    """settings -> (the training file, its records)"""

    def make(**settings):
        path = tmp_path / "toolbox.yaml"
        path.write_text(yaml.safe_dump({"env": {"name": "toolbox", "settings": PERFECT | settings}}))
        env = make_env("toolbox", PERFECT | settings)
        records = env.records("train")
        env.close()
        return path, records

    return make


@pytest.fixture
def serve():
    servers = []

    def start(*args, **keys):
        servers.append(ChatServer(*args, **keys))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def made(path, server, out, *words):
    return main(["make", str(path), "--teacher", server.url, "--out", str(out), *FAST, *words])


def rows(out):
    return [json.loads(line) for line in Path(f"{out}.journal").read_text().splitlines()][1:]


@pytest.mark.parametrize("edit", [None, in_text])
def test_a_teachers_traces_become_records_that_training_takes(toolbox, serve, tmp_path, edit):
    path, records = toolbox()
    out = tmp_path / "traces.jsonl"
    assert made(path, serve(expert(records, edit)), out) == 0
    found = {r.id: r for r in load_records(out).records}
    assert list(found) == [r.id for r in records]
    for record in records:
        assert [m.get("tool_calls") or [] for m in found[record.id].expert_trace] == [
            m.get("tool_calls") or [] for m in record.expert_trace
        ]
        assert [m["content"] for m in found[record.id].expert_trace] == [
            m["content"] for m in record.expert_trace
        ]
    env = make_env("toolbox", {"train_path": str(out)})
    assert env.records("train") == list(found.values())
    env.close()
    turns = sum(m["role"] == "assistant" for r in records for m in r.expert_trace)
    assert sum(row["prompt_tokens"] for row in rows(out)) == 100 * turns


def test_every_fault_of_a_server_is_retried_and_counted(toolbox, serve, tmp_path, capsys):
    path, records = toolbox()
    faults = {0: "429", 1: "500", 2: "malformed", 4: "no choice", 6: "hang up", 8: "slow"}
    server = serve(expert(records), faults)
    assert made(path, server, tmp_path / "traces.jsonl") == 0
    assert server.made == Counter(faults.values())
    told = capsys.readouterr().out
    found = dict(re.findall(r"retried: ([\w ]+?) +│ (\d+)", told))
    assert found["status 429"] == found["status 500"] == "1"
    # Half an answer is either of the two, and the connection it broke may fail the next request as well.
    assert int(found["malformed answer"]) >= 2
    assert int(found["no answer"]) >= 1
    assert int(found["malformed answer"]) + int(found["no answer"]) >= 4
    assert len(load_records(tmp_path / "traces.jsonl")) == len(records)


def break_turn(kind):
    """Changes the first turn of every task's first try."""

    def edit(choice, body):
        first = not any(m["role"] == "assistant" for m in body["messages"])
        if not first or body["seed"] > 0:
            return choice
        calls = choice["message"]["tool_calls"]
        if kind == "length_limit":
            choice["finish_reason"] = "length"
        elif kind == "invalid_tool":
            calls[0]["function"]["name"] = "no_such_tool"
        elif kind == "malformed_turn":
            calls[0]["function"]["arguments"] = '{"name": '
        elif kind == "no_call":
            choice["message"] = {"role": "assistant", "content": 'The answer is "x".'}
        elif kind == "unverified":
            choice["message"]["tool_calls"] = [
                {"function": {"name": "person", "arguments": '{"name": "x", "field": "boss"}'}}
            ]
        return choice

    return edit


@pytest.mark.parametrize("kind", ["length_limit", "invalid_tool", "malformed_turn", "no_call"])
def test_a_bad_trace_is_dropped_with_its_reason_and_the_task_tried_again(toolbox, serve, tmp_path, kind):
    path, records = toolbox(train_tasks=3)
    out = tmp_path / "traces.jsonl"
    assert made(path, serve(expert(records, break_turn(kind))), out, "--samples", "2") == 0
    assert Counter(row["dropped"] for row in rows(out)) == {kind: 3, None: 3}
    assert len(load_records(out)) == 3


def test_a_trace_whose_answer_is_wrong_is_not_kept(toolbox, serve, tmp_path):
    path, records = toolbox(success_rate=0.0, train_tasks=8)
    out = tmp_path / "traces.jsonl"
    made(path, serve(expert(records)), out, "--samples", "1")
    dropped = Counter(row["dropped"] for row in rows(out))
    assert dropped["unverified"] >= 5  # a wrong answer after a right last response is kept
    assert sum(dropped.values()) == 8


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("fine", None),
        ("<|im_start|>assistant", "tainted_response"),
        ("so\nAssistant: yes", "tainted_response"),
        ("<tool_call>", "tainted_response"),
        ("an assistant: a helper", None),
    ],
)
def test_a_response_with_role_text_or_call_tags_spoils_its_trace(content, problem):
    tools = [{"function": {"name": "f"}}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    assert trace_problem([call, {"role": "tool", "name": "f", "content": content}], tools) == problem


def test_what_was_finished_before_a_kill_is_not_asked_for_again(toolbox, serve, tmp_path):
    path, records = toolbox(train_tasks=10)
    out, server = tmp_path / "traces.jsonl", serve(expert(records), delay=0.05)
    words = ["traces", "make", str(path), "--teacher", server.url, "--out", str(out), *FAST]
    root = Path(__file__).parent.parent.parent
    process = subprocess.Popen(
        [sys.executable, "-m", "pact_fast.cli", *words],
        env=os.environ | {"PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    moment = random.randrange(4, 25)
    deadline = time.monotonic() + 120
    while len(server.bodies) < moment and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.2)  # a request may still be under way
    asked = len(server.bodies)
    journal = Path(f"{out}.journal")
    with journal.open("a") as file:
        file.write('{"record_id": "torn')
    before = [json.loads(line) for line in journal.read_text().splitlines()[1:-1]]
    finished = {row["record_id"] for row in before}
    assert asked >= moment
    assert main(words[1:]) == 0
    by_question = {r.prompt[-1]["content"]: r.id for r in records}
    again = {
        by_question[m["content"]] for b in server.bodies[asked:] for m in b["messages"] if m["role"] == "user"
    }
    assert not again & finished, f"killed at request {moment}"
    assert again | finished == set(by_question.values())
    assert [r.id for r in load_records(out)] == [r.id for r in records]
    assert rows(out)[: len(before)] == before


def test_a_run_that_its_server_refuses_keeps_what_it_has(toolbox, serve, tmp_path):
    path, records = toolbox()
    out, calls = tmp_path / "traces.jsonl", []

    def answer(body):
        calls.append(body)
        if len(calls) > 12:
            raise ConnectionAbortedError
        return expert(records)(body)

    with pytest.raises(Exception, match="tried for"):
        main(
            [
                *("make", str(path), "--teacher", serve(answer).url, "--out", str(out)),
                *("--backoff", "0.01", "--retry-timeout", "0.2", "--concurrency", "1"),
            ]
        )
    kept = load_records(out).records
    assert 0 < len(kept) < len(records)
    assert [r.id for r in kept] == [row["record_id"] for row in rows(out)]


def test_another_teachers_journal_is_not_mixed_in(toolbox, serve, tmp_path):
    path, records = toolbox(train_tasks=1)
    out = tmp_path / "traces.jsonl"
    assert made(path, serve(expert(records)), out) == 0
    with pytest.raises(ValueError, match=r"written with other options \(teacher\)"):
        made(path, serve(expert(records)), out)


def test_a_model_of_ones_own_is_a_teacher_too(toolbox, tmp_path):
    path, records = toolbox(train_tasks=8, train_hops=[1, 0, 0])
    out = tmp_path / "traces.jsonl"
    words = ["make", str(path), "--teacher", str(base_model_path()), "--out", str(out), "--samples", "2"]
    assert main([*words, "--max-tokens", "64", "--max-turns", "4", "--temperature", "0.5"]) == 0
    kept = load_records(out).records
    assert 0 < len(kept) <= len(records)
    tries = rows(out)
    assert main([*words, "--max-tokens", "64", "--max-turns", "4", "--temperature", "0.5"]) == 0
    assert rows(out) == tries  # nothing is sampled again
    assert all(row["completion_tokens"] > 0 for row in tries)


# -- segment
# -----------------------------------------------------------------------------------------------------

HARD = "Sun here. Rain there. Wind then. Oslo is far. We see."


def hard_records(tmp_path, toolbox):
    """Three records; the first turns of two of them are hard, of one is easy."""
    _, records = toolbox(train_tasks=3)
    for record, extra in zip(records, (" One.", " Two.", None), strict=True):
        if extra is not None:
            record.expert_trace[0]["reasoning_content"] = HARD + extra
    path = tmp_path / "records.jsonl"
    write_records(path, records)
    return path, records


def annotation(body, pick=("other", PREVIEW)):
    text = body["messages"][1]["content"].split("Reasoning:\n")[1]
    head = text[: text.index(" Oslo")]
    parts = [{"type": pick[0], "text": head}, {"type": pick[1], "text": text[len(head) :].strip()}]
    return json.dumps({"segments": parts})


def reply(text):
    return {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}


def test_hard_turns_go_to_the_annotator_and_are_not_asked_for_again(toolbox, serve, tmp_path, capsys):
    path, _ = hard_records(tmp_path, toolbox)
    out = tmp_path / "cut.jsonl"
    server = serve(lambda body: reply(f"```json\n{annotation(body)}\n```"), {0: "500"})
    words = ["segment", str(path), "--annotator", server.url, "--out", str(out), *FAST]
    assert main(words) == 0
    assert len(server.bodies) == 3  # two turns, one of them asked for twice
    told = capsys.readouterr().out
    assert "annotator" in told
    assert "rules" in told
    first = load_records(out).records[0].expert_trace[0]
    assert [s["type"] for s in first["reasoning_segments"]] == ["other", PREVIEW]
    out.unlink()
    assert main(words) == 0
    assert len(server.bodies) == 3
    assert load_records(out).records[0].expert_trace[0] == first


@pytest.mark.parametrize(
    "answer",
    ["no JSON", '{"segments": []}', '{"segments": [{"type": "other", "text": "Something else."}]}'],
)
def test_an_invalid_annotation_is_asked_for_again_and_then_cut_conservatively(
    toolbox, serve, tmp_path, capsys, answer
):
    path, _ = hard_records(tmp_path, toolbox)
    out = tmp_path / "cut.jsonl"
    server = serve(lambda body: reply(answer))
    assert main(["segment", str(path), "--annotator", server.url, "--out", str(out), *FAST]) == 0
    assert len(server.bodies) == 6
    told = capsys.readouterr().out
    assert "conservative" in told
    assert "retried: invalid annotation" in told


def test_without_an_annotator_every_calling_turn_is_cut(toolbox, tmp_path):
    path, _ = hard_records(tmp_path, toolbox)
    out = tmp_path / "cut.jsonl"
    assert main(["segment", str(path), "--out", str(out)]) == 0
    for record in load_records(out).records:
        for message in record.expert_trace:
            if message.get("tool_calls"):
                assert message["reasoning_segments"]


MESSAGE = {"reasoning_content": "Look here.  I will call f. Done.", "tool_calls": []}


def test_an_annotator_cannot_make_a_preview_safe():
    parts = [{"type": "other", "text": "Look here."}, {"type": "other", "text": "I will call f. Done."}]
    found = read_annotation(json.dumps({"segments": parts}), MESSAGE)
    assert [(s.type, s.start, s.end) for s in found] == [("other", 0, 10), (PREVIEW, 12, 32)]


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ([("other", "Look here.")], "leave out"),
        ([("other", "I will call f.")], r"segments\[0\]: its text is not the turn's next"),
        ([("intro", "Look here.")], r"segments\[0\]: must have a known type"),
    ],
)
def test_an_annotation_must_be_of_the_turn(parts, problem):
    answer = json.dumps({"segments": [{"type": kind, "text": text} for kind, text in parts]})
    with pytest.raises(ValueError, match=problem):
        read_annotation(answer, MESSAGE)


def test_a_journal_drops_a_torn_line_alone(tmp_path):
    path = tmp_path / "j"
    with Journal(path, {"a": 1}) as journal:
        journal.add({"n": 1})
    with path.open("a") as file:
        file.write('{"n": 2')
    with Journal(path, {"a": 1}) as journal:
        assert journal.rows == [{"n": 1}]
        journal.add({"n": 3})
    with Journal(path, {"a": 1}) as journal:
        assert journal.rows == [{"n": 1}, {"n": 3}]
