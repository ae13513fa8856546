"""ToolHop: the scenarios, the answer rule, and files that lack something."""

import json

import pytest

from pact_fast.envs import make_env
from tests.helpers.environments import calls, play, says


def row(**changes):
    schema = {"name": "first_letter", "description": "d", "parameters": {"type": "object", "properties": {}}}
    return {
        "id": 7,
        "question": "Who wrote it?",
        "answer": "Jane Q, Austen",
        "tools": {"What is the first letter?": schema},
        "functions": [
            "import re\ndef first_letter(text):\n    return text[0] if text else {'found': 'Jane Q Austen'}"
        ],
    } | changes


@pytest.fixture(params=["json", "jsonl"])
def path(request, tmp_path):
    file = tmp_path / f"ToolHop.{request.param}"
    file.write_text(json.dumps([row()]) if request.param == "json" else json.dumps(row()) + "\n")
    return str(file)


def test_scenarios_differ_in_prompt_and_tools(path):
    prompts = set()
    for scenario in ("direct", "mandatory", "free"):
        env = make_env("toolhop", {"test_path": path, "scenario": scenario})
        record = env.records("test")[0]
        assert "Who wrote it?" in record.prompt[0]["content"]
        assert len(record.tools) == (0 if scenario == "direct" else 1)
        prompts.add(record.prompt[0]["content"])
    assert len(prompts) == 3
    own = make_env("toolhop", {"test_path": path, "prompt_template": "Q: {question}"})
    assert own.records("test")[0].prompt[0]["content"] == "Q: Who wrote it?"


def test_the_answer_counts_in_the_last_message_or_in_the_response_before_it(path):
    env = make_env("toolhop", {"test_path": path})
    record = env.records("test")[0]
    gives, other = calls(("first_letter", {"text": ""})), calls(("first_letter", {"text": "x"}))
    cases = [
        ([says("jane q austen")], 1.0),  # all parts, case and commas aside
        ([says("Jane")], 0.0),
        ([gives, says("see above")], 1.0),
        ([gives, says("")], 0.0),  # an empty message is no answer
        ([gives, other, says("see above")], 0.0),
        ([gives], 0.0),
    ]
    for turns, expected in cases:
        outcome, *_ = play(
            env, record, turns, truncated="turn_limit" if len(turns) == 1 and turns[0].tool_calls else None
        )
        assert outcome.reward == outcome.scores["answer_correctness"] == expected, turns
        assert outcome.solved == (expected == 1.0)
    responses = play(env, record, [other, says("x")])[1]
    assert responses[0] == ('"x"',)  # text, too, comes back as JSON
    env.close()


def test_no_tool_runs_in_the_direct_scenario(path):
    env = make_env("toolhop", {"test_path": path, "scenario": "direct"})
    outcome, responses, _ = play(
        env, env.records("test")[0], [calls(("first_letter", {"text": ""})), says("x")]
    )
    assert "no tool named" in responses[0][0]
    assert outcome.failure == "unknown_tool"
    env.close()


def test_bad_files_and_settings_are_named(tmp_path):
    file = tmp_path / "ToolHop.jsonl"
    for change, message in (
        ({"question": None}, "question: must be a str"),
        ({"functions": ["x = 1"]}, r"functions\[0\]: defines no function"),
        ({"functions": ["def other(): pass"]}, "codes: no source for tool 'first_letter'"),
    ):
        file.write_text(json.dumps(row(**change)))
        with pytest.raises(ValueError, match=message):
            make_env("toolhop", {"test_path": str(file)}).records("test")
    file.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        make_env("toolhop", {"test_path": str(file)}).records("test")
    with pytest.raises(ValueError, match=r"toolhop\.scenario: one of"):
        make_env("toolhop", {"scenario": "forced"})
    with pytest.raises(ValueError, match="question"):
        make_env("toolhop", {"prompt_template": "x"})
