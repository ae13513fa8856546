"""The real Qwen3 tokenizer and chat template over real records (fetched once into .cache/, else skipped)."""

import json
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pact_fast.data.chat import ChatFormat, Component
from pact_fast.data.traces import trace_from_calls
from pact_fast.envs.base import make_env
from tests.helpers.conversations import SAMPLE_PROMPT, SAMPLE_TOOLS, SAMPLE_TRACE
from tests.helpers.environments import own_ftrl_file, shared_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    folder = ROOT / ".cache" / "tokenizer-qwen3"
    if not (folder / "tokenizer.json").is_file():  # `make setup` fetches it
        command = [sys.executable, str(ROOT / "scripts" / "qwen3_tokenizer.py"), str(folder)]
        fetched = subprocess.run(command, capture_output=True, text=True, timeout=200)
        if fetched.returncode != 0:
            pytest.skip(f"the Qwen3 tokenizer cannot be fetched: {fetched.stderr.strip().splitlines()[-1:]}")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def chat(tokenizer):
    chat = ChatFormat.for_tokenizer(tokenizer)
    assert chat.own_template
    assert chat.name == "hermes"
    return chat


def toolbox_cases():
    env = make_env("toolbox", {"difficulty": 2, "train_tasks": 15})
    records = env.records("train")
    env.close()
    return [(list(r.prompt), list(r.tools), list(r.expert_trace)) for r in records]


@cache
def bfcl_cases():
    """Conversations of several user turns: the ground truths of BFCL's base category, really run."""
    pytest.importorskip("bfcl_eval")
    env = make_env("bfcl", {"short_descriptions": True})
    records = env.records("validation")
    env.close()
    return [(list(r.prompt), list(r.tools), list(r.expert_trace)) for r in records[::3]]


def ftrl_cases():
    """Real prompts and schemas, with a trace over the tools that the task's answers come from."""
    return traced(shared_file("data/ftrl_dev.parquet"), 4)


def own_ftrl_cases():
    with tempfile.TemporaryDirectory() as folder:
        return traced(own_ftrl_file(folder), 1)


def traced(path, stride):
    env = make_env("ftrl", {"test_path": str(path)})
    records = env.records("test")
    env.close()
    cases = []
    for record in records[::stride]:
        answers = [
            (name, str(value)) for name, values in record.env["unsolved_set"].items() for value in values
        ]
        notes = [json.dumps({"result": value, "note": 'ünï "quoted"\n\n'}) for _, value in answers]
        responses = iter(notes)
        calls = [
            (name, {"query": f"{value}\n", "limit": i, "deep": {"x": [None, True]}})
            for i, (name, value) in enumerate(answers)
        ]
        trace = trace_from_calls(
            record.prompt[-1]["content"],
            record.tools,
            calls,
            lambda call, r=responses: next(r),
            record.env["answer"],
        )
        cases.append((list(record.prompt), list(record.tools), list(trace)))
    return cases


def sample_cases():
    return [(SAMPLE_PROMPT, SAMPLE_TOOLS, SAMPLE_TRACE)]


@pytest.mark.parametrize("cases", [sample_cases, toolbox_cases, own_ftrl_cases, ftrl_cases])
def test_tokens_equal_those_of_the_models_own_template(chat, tokenizer, cases):
    """Exactly what Qwen3's template renders and what its tokenizer makes of the whole conversation."""
    for prompt, tools, trace in cases():
        tokens = chat.prompt(prompt, tools) + chat.trace(trace)
        text = tokenizer.apply_chat_template([*prompt, *trace], tools=tools, tokenize=False)
        assert chat.decode(tokens.ids) + "\n" == text
        assert tokens.ids == tokenizer(text, add_special_tokens=False)["input_ids"][:-1]


@pytest.mark.parametrize("cases", [sample_cases, toolbox_cases, own_ftrl_cases, ftrl_cases])
def test_components_cover_every_assistant_token_exactly_once(chat, cases):
    for prompt, tools, trace in cases():
        tokens = chat.prompt(prompt, tools) + chat.trace(trace)
        assert len(tokens.ids) == len(tokens.components) == len(tokens.levels) == len(tokens.turns)
        assistant = [m for m in trace if m["role"] == "assistant"]
        start = 0
        for turn, message in enumerate(assistant):
            own = chat.assistant(message, turn)
            start = next(i for i in range(start, len(tokens)) if tokens.ids[i : i + len(own)] == own.ids)
            assert tokens[start : start + len(own)] == own
            assert not {Component.CONTEXT, Component.TOOL_RESPONSE} & set(own.components)
            start += len(own)
        inside = sum(len(chat.assistant(message, 0)) for message in assistant)
        assert inside == sum(c not in (Component.CONTEXT, Component.TOOL_RESPONSE) for c in tokens.components)


def test_turns_parse_back_from_their_ids(chat):
    for _, _, trace in toolbox_cases() + own_ftrl_cases() + bfcl_cases():
        for message in trace:
            if message["role"] == "assistant":
                turn = chat.parse(chat.assistant(message, 0).ids, complete=True)
                assert turn.reasoning == message["reasoning_content"].strip()
                assert turn.content == message["content"].strip()
                calls = [{"name": call.name, "arguments": call.arguments} for call in turn.tool_calls]
                assert calls == list(message.get("tool_calls") or [])


def test_bundled_hermes_template_renders_what_qwen3_renders(tokenizer):
    bundled = ChatFormat.for_tokenizer(tokenizer, "compact")
    from pact_fast.data import formats

    for prompt, tools, trace in sample_cases() + toolbox_cases():
        messages = [*prompt, *trace]
        own = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        text = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, chat_template=formats.BUNDLED["hermes", formats.CHATML][1]
        )
        assert text == own
        short = bundled.prompt(prompt, tools)
        assert len(short) < len(ChatFormat.for_tokenizer(tokenizer).prompt(prompt, tools))


def test_later_user_turns_keep_earlier_reasoning_in_the_prefix(chat, tokenizer):
    """Qwen3's template drops it when it renders the conversation again; tokens built forward must not."""
    trace = [*SAMPLE_TRACE, {"role": "user", "content": "And the other one?"}, SAMPLE_TRACE[-1]]
    tokens = chat.trace(trace)
    first = chat.trace(SAMPLE_TRACE)
    assert tokens.ids[: len(first)] == first.ids
    again = tokenizer.apply_chat_template([*SAMPLE_PROMPT, *trace], tools=SAMPLE_TOOLS, tokenize=False)
    assert "I look up" not in again
    assert "I look up" in chat.decode(tokens.ids)
