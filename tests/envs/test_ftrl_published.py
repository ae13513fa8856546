"""FTRL as others publish it: calls with `parameters`, truths that fail, tools with packages, stray tags."""

import json

import pytest

from pact_fast.data.chat import AssistantTurn
from pact_fast.data.formats import HERMES
from pact_fast.data.parsing import parse_turn
from pact_fast.envs import make_env

PRICE = "def price(item):\n    return {'tea': 250, 'jam': 480}[item]"
ZONE = "def zone(name):\n    import pytz\n    return str(pytz.timezone(name))"


def row(number, truth, **codes):
    codes = codes or {"price": PRICE}
    schema = {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]}
    tools = [
        {"type": "function", "function": {"name": n, "description": "", "parameters": schema}} for n in codes
    ]
    return {
        "id": f"row-{number}",
        "messages": [{"role": "user", "content": "What is the price of tea?"}],
        "tools": json.dumps(tools),
        "codes": json.dumps(codes),
        "unsolved_set": json.dumps({next(iter(codes)): ["250"]}),
        "answer": "250",
        **({} if truth is None else {"ground_truth": json.dumps(truth)}),
    }


def opened(tmp_path, *rows, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return make_env("ftrl", {"test_path": str(path), "workers": 1} | settings)


@pytest.mark.parametrize("key", ["parameters", "arguments"])
@pytest.mark.parametrize("wrap", [lambda call: call, lambda call: {"type": "function", "function": call}])
def test_the_truth_is_read_under_either_name(tmp_path, key, wrap):
    truth = [wrap({"name": "price", key: {"item": "tea"}}), wrap({"name": "price", key: '{"item": "jam"}'})]
    env = opened(tmp_path, row(0, truth))
    (record,) = env.records("test")
    assert record.env["true_calls"] == [("price", {"item": "tea"}), ("price", {"item": "jam"})]
    assert [m["content"] for m in record.expert_trace if m["role"] == "tool"] == ["250", "480"]
    (episode,) = env.start([record])
    empty = parse_turn('<tool_call>{"name": "price", "arguments": {}}</tool_call>', HERMES, complete=True)
    # Where the truth was read as {}, this empty call earned all there was.
    assert env.step([episode], [empty])[0].reward == 0
    env.close()


def test_a_truth_that_fails_when_it_is_made_is_a_bad_record(tmp_path):
    good = row(0, [{"name": "price", "parameters": {"item": "tea"}}])
    bad = row(1, [{"name": "price", "parameters": {"item": "gold"}}])
    worse = row(2, [{"name": "price", "parameters": {"thing": "tea"}}])
    env = opened(tmp_path, good, bad, worse)
    with pytest.warns(UserWarning, match=r"2 of 3 records are left out.*row-1.*gold.*row-2"):
        assert [r.id for r in env.records("test")] == ["row-0"]
    env.close()
    env = opened(tmp_path, bad)
    with pytest.raises(ValueError, match=r"rows.jsonl: no ground truth can be replayed.*row-1"):
        env.records("test")
    env.close()


def test_the_packages_that_published_tools_import_are_there(tmp_path):
    pytest.importorskip("pytz")
    env = opened(tmp_path, row(0, [{"name": "zone", "parameters": {"name": "Europe/Paris"}}], zone=ZONE))
    (record,) = env.records("test")
    assert [m["content"] for m in record.expert_trace if m["role"] == "tool"] == ["Europe/Paris"]
    env.close()


def test_tools_that_cannot_run_are_named_when_they_are_loaded(tmp_path):
    broken = "def price(item):\n    import no_such_package.inner\n    from os import path\n    return 250"
    env = opened(tmp_path, row(0, None, price=broken))
    with pytest.warns(UserWarning, match=r"tools import no_such_package.*price of record 'row-0'"):
        env.records("test")
    env.close()


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("It costs 250 cents.</tool_call>", -0.3),
        ("</tool_call>", -0.3),
        ("<think>first</think>\n\n</tool_call> 250", -0.3),
        ("<think>a </tool_call> thought</think>\n\nIt costs 250 cents.", 1 / 2),
        ("It costs 250 cents.", 1 / 2),
        ("", -0.5),
        ("<think>only a thought</think>", -0.5),
        ("I do not know.", 0.0),
    ],
)
def test_a_closing_turn_with_a_stray_tag_is_seen_through_the_parser(tmp_path, text, reward):
    env = opened(tmp_path, row(0, [{"name": "price", "parameters": {"item": "tea"}}]))
    (episode,) = env.start(env.records("test"))
    turn = parse_turn(text, HERMES, complete=True)
    assert isinstance(turn, AssistantTurn)
    assert env.step([episode], [turn])[0].reward == pytest.approx(reward)
    env.close()
