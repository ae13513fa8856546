"""Fields of one's own records that scoring rests on: told when they are loaded, never scored by accident."""

import json
from contextlib import closing

import pytest

from pact_fast.data.parsing import AssistantTurn, ToolCall
from pact_fast.envs.base import make_env

TOOL = {
    "type": "function",
    "function": {"name": "price", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}},
}
SOURCE = "def price(x):\n    return 250\n"


def write(path, **fields):
    row = {
        "id": "a",
        "prompt": [{"role": "user", "content": "?"}],
        "tools": [TOOL],
        "codes": {"price": SOURCE},
    }
    path.write_text(json.dumps({k: v for k, v in (row | fields).items() if v is not None}) + "\n")
    return str(path)


def play(path, text):
    with closing(make_env("python", {"test_path": path, "workers": 1})) as env:
        episodes = env.start(env.records("test"))
        env.step(episodes, [AssistantTurn("", "", (ToolCall("price", {"x": "tea"}, None, ""),), "", True)])
        env.step(episodes, [AssistantTurn("", text, (), "", True)])
        return env.finish(episodes, [None])[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"answer": 250},
        {"answer": ["251", 250]},
        {"answer": "250", "unsolved_set": {"price": [250]}},
        {"answer": "250", "unsolved_set": {"price": "250"}},
        {"unsolved_set": {"price": ["250"]}, "answer": "It"},
    ],
)
def test_gold_answers_may_be_numbers_lists_and_single_values(tmp_path, fields):
    assert play(write(tmp_path / "t.jsonl", **fields), "It is 250.").reward == 1.0


RESULTS = [  # source of a result, what the model is shown, gold that stands in it
    ("{'item': 'tea', 'cents': 250}", '{"item": "tea", "cents": 250}', 250),
    ("[250, 'é', None, True]", '[250, "é", null, true]', "250"),
    ("250", "250", 250),
    ("2.5", "2.5", 2.5),
    ("__import__('collections').OrderedDict(cents=250)", '{"cents": 250}', "250"),
    ("{'day': __import__('datetime').date(2024, 5, 6)}", '{"day": "2024-05-06"}', "2024-05-06"),
    ("{'item': {'cents': [250]}}", '{"item": {"cents": [250]}}', '{"cents": [250]}'),
    ("'as it is'", "as it is", "as it is"),
]


@pytest.mark.parametrize(("result", "text", "gold"), RESULTS)
def test_results_of_tools_are_json_for_the_model_and_hold_the_gold(tmp_path, result, text, gold):
    fields = {"codes": {"price": f"def price(x):\n    return {result}\n"}, "answer": gold}
    path = write(tmp_path / "t.jsonl", **fields, unsolved_set={"price": [gold]})
    with closing(make_env("python", {"test_path": path, "workers": 1})) as env:
        episodes = env.start(env.records("test"))
        call = ToolCall("price", {"x": "tea"}, None, "")
        (step,) = env.step(episodes, [AssistantTurn("", "", (call,), "", True)])
        assert step.tool_responses == (text,)
        env.step(episodes, [AssistantTurn("", f"It is {gold}.", (), "", True)])
        (outcome,) = env.finish(episodes, [None])
    assert (outcome.reward, outcome.scores["solve_f1"]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"answer": ""}, "answer: is empty"),
        ({"answer": " , "}, "answer: is empty"),
        ({"answer": []}, "answer: is an empty list"),
        ({"answer": {"a": 1}}, "answer: must be text"),
        ({"answer": True}, "answer: must be text"),
        ({}, "answer: is missing"),
        ({"awnser": "250"}, "answer: is missing; found 'awnser': misspelt"),
        ({"answer": "250", "codes": None, "code": {}}, "codes: is missing; found 'code'"),
        ({"answer": "250", "unsolved_set": {"prise": ["250"]}}, "unsolved_set: answers of tool 'prise'"),
        ({"answer": "250", "unsolved_set": {"price": [""]}}, r"unsolved_set\.price: is empty"),
        (
            {"answer": "250", "codes": {"price": "def cost(x):\n    return 1\n"}},
            r"codes\.price: defines no function 'price'",
        ),
        ({"answer": "250", "codes": {"price": "def price(x:\n"}}, r"codes\.price: is not Python"),
        ({"answer": "250", "codes": {"price": 7}}, r"codes\.price: must be Python source"),
        ({"answer": "250", "codes": "[" * 50_000}, "codes: is text but not JSON: nested too deep"),
    ],
)
def test_fields_that_cannot_be_scored_are_told_when_they_are_loaded(tmp_path, fields, problem):
    path = write(tmp_path / "t.jsonl", **fields)
    with (
        closing(make_env("python", {"test_path": path, "workers": 1})) as env,
        pytest.raises(ValueError, match=rf"t\.jsonl:1: record 'a': {problem}"),
    ):
        env.records("test")


def test_without_sub_answers_there_is_no_share_of_them(tmp_path):
    outcome = play(write(tmp_path / "t.jsonl", answer="250"), "No idea.")
    assert outcome.reward == 0.0
    assert outcome.scores == {"answer": 0.0}


def test_bad_records_are_left_out_where_that_is_asked(tmp_path):
    path = tmp_path / "t.jsonl"
    write(path, answer="250")
    good = path.read_text()
    bad = [
        good.replace('"250"', '""'),
        "{not json}\n",
        good.replace('"a"', '"c"').replace("def price", "def cost"),
    ]
    path.write_text(bad[0].replace('"a"', '"b"') + good + bad[1] + bad[2])
    settings = {"test_path": str(path), "workers": 1, "skip_bad_records": True}
    with closing(make_env("python", settings)) as env, pytest.warns(UserWarning, match="left out"):
        assert [record.id for record in env.records("test")] == ["a"]
    path.write_text(bad[0])
    with (
        closing(make_env("python", settings)) as env,
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match="no record is left"),
    ):
        env.records("test")
