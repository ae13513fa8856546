"""The parsing rules of pact_fast.data.parsing, by number."""

import pytest

from pact_fast.data.formats import HERMES, LLAMA
from pact_fast.data.parsing import parse_turn


def hermes(text, complete=True):
    return parse_turn(text, HERMES, complete=complete)


def llama(text, complete=True):
    return parse_turn(text, LLAMA, complete=complete)


def calls(turn):
    return [(call.name, call.arguments) for call in turn.tool_calls]


A = '<tool_call>\n{"name": "a", "arguments": {"x": 1}}\n</tool_call>'
B = '<tool_call>\n{"name": "b", "arguments": {}}\n</tool_call>'


def test_rule_1_reasoning_with_or_without_opening_tag():
    assert hermes(f"<think>\nwhy\n</think>\n\n{A}").reasoning == "why"
    assert hermes(f"why\n</think>\n\n{A}").reasoning == "why"


def test_rule_1_calls_inside_closed_thinking_are_not_run():
    turn = hermes(f"<think>\nmaybe {B}\n</think>\n\n{A}")
    assert calls(turn) == [("a", {"x": 1})]
    assert B in turn.reasoning


def test_rule_2_unclosed_thinking():
    turn = hermes(f"<think>\nI call it\n{A}")
    assert (turn.reasoning, calls(turn)) == ("I call it", [("a", {"x": 1})])
    cut = hermes(f"<think>\nI call it\n{A}", complete=False)
    assert calls(cut) == []
    assert A in cut.reasoning
    assert hermes("<think>\nonly thoughts").content == ""


def test_rule_3_several_calls_in_order_and_missing_closing_tag():
    assert calls(hermes(A + "\n" + B)) == [("a", {"x": 1}), ("b", {})]
    assert calls(hermes(A.removesuffix("</tool_call>") + B)) == [("a", {"x": 1}), ("b", {})]
    assert calls(hermes(A.removesuffix("</tool_call>"))) == [("a", {"x": 1})]


def test_rule_3_call_cut_by_the_length_limit_is_an_error():
    (call,) = hermes(A.removesuffix("</tool_call>"), complete=False).tool_calls
    assert call.arguments is None
    assert "cut off" in call.error


def test_rule_3_json_without_tags_is_text_in_hermes_and_a_call_in_llama():
    text = '{"name": "a", "parameters": {"x": 1}}'
    assert hermes(text).tool_calls == ()
    assert hermes(text).content == text
    assert calls(llama(text)) == [("a", {"x": 1})]
    assert calls(llama("<|python_tag|>" + text)) == [("a", {"x": 1})]
    assert calls(llama(f"```json\n{text}\n```")) == [("a", {"x": 1})]
    assert calls(llama(f"<think>\nwhy\n</think>\n\n{text}; {text}")) == [("a", {"x": 1})] * 2
    spoken = llama(f"Let me see.\n{text}")
    assert (spoken.content, calls(spoken)) == ("Let me see.", [("a", {"x": 1})])
    assert llama("The answer is {5}.").tool_calls == ()


@pytest.mark.parametrize("separator", ["\n", ", ", "; "])
def test_rule_4_several_objects_in_a_block(separator):
    one, two = '{"name": "a", "arguments": {"x": 1}}', '{"name": "b"}'
    assert calls(hermes(f"<tool_call>{one}{separator}{two}</tool_call>")) == [("a", {"x": 1}), ("b", {})]
    assert calls(hermes(f"<tool_call>[{one}, {two}]</tool_call>")) == [("a", {"x": 1}), ("b", {})]


@pytest.mark.parametrize(
    "body",
    [
        '```json\n{"name": "a", "arguments": {"x": "1\n2"}}\n```',
        '{"name": "a", "arguments": {"x": "1\n2"},}',
        "{'name': 'a', 'arguments': {'x': '1\\n2'}}",
        '{"name": "a", "arguments": {"x": "1\n2"',
        '{"name": "a", "arguments": {"x": "1\n2"}',
    ],
    ids=["fence", "trailing comma", "python", "two brackets missing", "one bracket missing"],
)
def test_rule_5_repairs(body):
    assert calls(hermes(f"<tool_call>\n{body}\n</tool_call>")) == [("a", {"x": "1\n2"})]


@pytest.mark.parametrize(
    ("body", "name", "problem"),
    [
        ('{"name": "a", "arguments": {"x": 1 2}}', "a", "not JSON"),
        ('{"name": "a", "arguments": "x=1"}', "a", "arguments are not JSON"),
        ('{"name": "a", "arguments": [1]}', "a", "must be a JSON object, got list"),
        ('{"arguments": {}}', "", "no name"),
        ('{"name": 3}', "", "no name"),
        ("[]", "", "empty list"),
        ("7", "", "must be a JSON object, got int"),
        ("", "", "empty"),
        ("a(x=1)", "", "not JSON"),
        ("[" * 5000, "", "not JSON"),
    ],
)
def test_rule_6_what_cannot_be_read_is_a_call_with_an_error(body, name, problem):
    (call,) = hermes(f"<tool_call>{body}</tool_call>").tool_calls
    assert call.arguments is None
    assert call.name == name
    assert problem in call.error


def test_rule_6_other_ways_to_write_a_call():
    assert calls(hermes('<tool_call>{"name": "a", "arguments": "{\\"x\\": 1}"}</tool_call>')) == [
        ("a", {"x": 1})
    ]
    assert calls(hermes('<tool_call>{"function": {"name": "a", "parameters": {}}}</tool_call>')) == [
        ("a", {})
    ]


def test_rule_7_content_is_what_is_left():
    turn = hermes(f"<think>\nwhy\n</think>\n\nBefore.\n{A}\nAfter.</tool_call>")
    assert turn.content == "Before.\nAfter."
    assert hermes("plain answer").content == "plain answer"
    assert hermes("").tool_calls == ()
