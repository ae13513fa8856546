"""What others wrote (models, tools, files): read within bounds, named where it is bad, never taken for
markup.
"""

import json
from collections import Counter

import pytest
from transformers import AutoTokenizer

from pact_fast.data.chat import ChatFormat, Component
from pact_fast.data.formats import HERMES, LLAMA
from pact_fast.data.parsing import parse_turn
from pact_fast.data.reading import MAX_DEPTH, clean_text, read_json
from pact_fast.data.records import RecordError, load_records, parse_record
from pact_fast.envs.toolbox.base_model import base_model_path

TOOL = {
    "type": "function",
    "function": {
        "name": "save",
        "parameters": {"type": "object", "properties": {"text": {"type": "string"}}},
    },
}
CALL = '<tool_call>\n{"name": "save", "arguments": {"text": "x"}}\n</tool_call>'
SPELT = ("<|im_end|>", "<|im_start|>system", "<<|im_end|>", "</tool_response>", "<think>", "a <tool_call> b")


@pytest.fixture(scope="module")
def chat():
    return ChatFormat.for_tokenizer(AutoTokenizer.from_pretrained(base_model_path()))


@pytest.fixture(scope="module")
def control(chat):
    return set(chat.tokenizer.added_tokens_decoder)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("7" * 5000, "too many digits"),
        ("[" * 100_000 + "]" * 100_000, "nested too deep"),
        ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "nested too deep"),
        ("NaN", "not finite"),
        ('{"a": [1e999]}', "not finite"),
        ("{} {}", "extra text"),
        (b'"caf\xe9"', "not UTF-8"),
        ("", "Expecting value"),
    ],
)
def test_whatever_json_cannot_hold_is_one_kind_of_error(text, problem):
    with pytest.raises(ValueError, match=problem):
        read_json(text)


def test_json_up_to_the_depth_limit_is_read():
    assert read_json("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None


@pytest.mark.parametrize("number", ["7" * 5000, "1e999", "NaN", "[" * 50_000])
def test_a_call_that_cannot_be_read_is_a_call_with_an_error(number):
    for syntax, text in (
        (HERMES, '<tool_call>{"name": "save", "arguments": {"x": %s}}</tool_call>'),
        (LLAMA, '{"name": "save", "parameters": {"x": %s}}'),
        (HERMES, '<tool_call>{"name": "save", "arguments": "{\\"x\\": %s}"}</tool_call>'),
    ):
        (call,) = parse_turn(text % number, syntax, complete=True).tool_calls
        assert call.arguments is None
        assert call.name == "save"
        assert call.error


def test_half_a_surrogate_pair_becomes_the_replacement_character(chat):
    assert clean_text("a\ud83d") == "a\ufffd"
    assert chat.decode(chat.tool_results(["a\ud83d"], 0).ids).count("\ufffd") == 1
    assert chat.prompt([{"role": "user", "content": "\udc00?"}], [TOOL]).ids
    (call,) = parse_turn(CALL.replace('"x"', '"\\ud83d"'), HERMES, complete=True).tool_calls
    assert call.arguments == {"text": "\ufffd"}
    with pytest.warns(UserWarning, match="expert_trace.*half a surrogate pair"):
        record = parse_record(
            {
                "prompt": [{"role": "user", "content": "?"}],
                "tools": [],
                "expert_trace": [{"role": "assistant", "content": "cut \ud83d"}],
            },
            file="f.jsonl",
            line=1,
        )
    assert record.expert_trace[0]["content"] == "cut \ufffd"


@pytest.mark.parametrize("spelt", SPELT)
def test_control_tokens_spelt_in_data_stay_text(chat, control, spelt):
    def markup(tokens):
        return [i for i in tokens.ids if i in control]

    def with_text(text):
        described = {"type": "function", "function": {**TOOL["function"], "description": text}}
        return [
            chat.prompt([{"role": "user", "content": text}], []),
            chat.prompt([{"role": "system", "content": text}, {"role": "user", "content": "a"}], []),
            chat.prompt([{"role": "user", "content": "a"}], [described]),
            chat.user(text, 1),
            chat.tool_results([text], 1),
        ]

    for got, wanted in zip(with_text(spelt), with_text("harmless"), strict=True):
        assert markup(got) == markup(wanted)
        assert spelt in chat.decode(got.ids)
    shown = chat.prompt([{"role": "user", "content": "a"}], [], privileged="hint <|im_end|><|im_start|>")
    assert markup(shown) == markup(chat.prompt([{"role": "user", "content": "a"}], []))


def test_a_trace_shown_to_the_model_keeps_its_tags_and_not_those_its_data_spell(chat, control):
    trace = [
        {
            "role": "assistant",
            "tool_calls": [{"name": "save", "arguments": {"text": "</tool_call><|im_end|>"}}],
        },
        {"role": "tool", "name": "save", "content": "</tool_response>"},
    ]
    plain = chat.prompt([{"role": "user", "content": "a"}], [])
    shown = chat.prompt([{"role": "user", "content": "a"}], [], privileged=chat.render_trace(trace))
    counts = [Counter(chat.decode([i]) for i in part.ids if i in control) for part in (shown, plain)]
    tags = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    assert counts[0] - counts[1] == Counter(tags)


@pytest.mark.parametrize(
    "text",
    ["a </tool_call> b", "the <tool_call> opens", "closed by </think> always", "<think> first", "<|im_end|>"],
)
def test_arguments_that_quote_tags_are_read_back_as_they_were_written(chat, text):
    message = {"role": "assistant", "tool_calls": [{"name": "save", "arguments": {"text": text}}]}
    turn = chat.parse(chat.assistant(message, 0).ids, complete=True)
    assert [call.arguments for call in turn.tool_calls] == [{"text": text}]
    assert turn.reasoning == turn.content == ""
    # The same where the tags are no tokens of the tokenizer, and JSON alone can tell.
    bare = f"<tool_call>\n{json.dumps({'name': 'save', 'arguments': {'text': text}})}\n</tool_call>"
    assert [c.arguments for c in parse_turn(bare, HERMES, complete=True).tool_calls] == [{"text": text}]
    llama = json.dumps({"name": "save", "parameters": {"text": text}})
    assert [c.arguments for c in parse_turn(llama, LLAMA, complete=True).tool_calls] == [{"text": text}]


def test_training_and_parsing_agree_on_what_a_turn_is(chat):
    message = {
        "role": "assistant",
        "reasoning_content": 'I would write {"name": 1}.',
        "content": "Done soon.",
        "tool_calls": [{"name": "save", "arguments": {"text": "</think> <tool_call>"}}] * 2,
    }
    tokens = chat.assistant(message, 0)
    turn = chat.parse(tokens.ids, complete=True)
    assert (turn.reasoning, turn.content) == (message["reasoning_content"], message["content"])
    assert [{"name": c.name, "arguments": c.arguments} for c in turn.tool_calls] == message["tool_calls"]
    inside = [i for i, c in zip(tokens.ids, tokens.components, strict=True) if c == Component.TOOL_CALL]
    assert not set(inside) & set(chat.tokenizer.added_tokens_decoder)


def test_a_call_drafted_in_a_later_thinking_block_is_not_run():
    turn = parse_turn(f"<think>a</think>{CALL}<think>or {CALL}</think>Done.", HERMES, complete=True)
    assert [call.arguments for call in turn.tool_calls] == [{"text": "x"}]
    assert turn.content == "Done."
    assert CALL in turn.reasoning


@pytest.mark.parametrize("name", ["hermes", "compact"])
def test_json_schema_as_people_write_it_renders_in_every_template(chat, name):
    schemas = {
        "type list": {"type": ["string", "null"]},
        "anyOf": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "nullable": {"type": "number", "nullable": True},
        "enum": {"type": "string", "enum": ["km", "mi"]},
        "ref": {"$ref": "#/$defs/Point"},
        "object": {"type": "object", "properties": {"u": {"type": "number"}, "v": {"type": "string"}}},
        "array": {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
        "nothing": {},
        "anything": True,
    }
    shown = {
        "type list": "string|null",
        "anyOf": "integer|null",
        "nullable": "number|null",
        "enum": '"km"|"mi"',
        "ref": "Point",
        "object": "{u: number, v}",
        "array": "array[array[integer]]",
        "nothing": "any",
        "anything": "any",
    }
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": schemas}},
    }
    record = parse_record(
        {"prompt": [{"role": "user", "content": "?"}], "tools": [tool], "expert_trace": None},
        file="f",
        line=1,
        require_trace=False,
    )
    form = ChatFormat.for_tokenizer(chat.tokenizer, name)
    text = form.decode(form.prompt(record.prompt, record.tools).ids)
    for key, wanted in shown.items():
        assert f"{key}: {wanted}" in text
    bare = [{"type": "function", "function": {"name": "now", "description": "The time."}}]
    assert "now" in form.decode(form.prompt(record.prompt, bare).ids)


def trace(calls, responses):
    tools = [{"type": "function", "function": {"name": n, "parameters": {}}} for n in ("weather", "clock")]
    raw = {
        "id": "x",
        "prompt": [{"role": "user", "content": "?"}],
        "tools": tools,
        "expert_trace": [
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": i, "function": {"name": n, "arguments": {"city": c}}} for i, n, c in calls
                ],
            },
            *({"role": "tool", "tool_call_id": i, "content": text} for i, text in responses),
            {"role": "assistant", "content": "done"},
        ],
    }
    messages = parse_record(raw, file="f.jsonl", line=1).expert_trace
    return [(m["name"], m["content"]) for m in messages if m["role"] == "tool"]


def test_tool_responses_go_to_the_call_that_their_id_names():
    twice = [("A", "weather", "Oslo"), ("B", "weather", "Rome")]
    assert trace(twice, [("B", "30 C"), ("A", "4 C")]) == [("weather", "4 C"), ("weather", "30 C")]
    two = [("A", "weather", "Oslo"), ("B", "clock", "Rome")]
    assert trace(two, [("B", "12:00"), ("A", "4 C")]) == [("weather", "4 C"), ("clock", "12:00")]
    assert trace(two, [(None, "4 C"), (None, "12:00")]) == [("weather", "4 C"), ("clock", "12:00")]


@pytest.mark.parametrize(
    ("calls", "responses", "problem"),
    [
        ([("A", "weather", "Oslo")], [("Z", "?")], "'Z' is the id of no call"),
        ([("A", "weather", "Oslo"), ("B", "clock", "")], [("A", "?"), ("A", "?")], "has a response already"),
        ([("A", "weather", "Oslo"), ("A", "clock", "")], [("A", "?")], "two calls have the same id"),
        (
            [("A", "weather", "Oslo"), ("B", "clock", "")],
            [("A", "?")],
            "call to 'clock' has no tool response",
        ),
    ],
)
def test_a_response_to_no_call_and_a_call_without_response_are_named(calls, responses, problem):
    with pytest.raises(RecordError, match=problem):
        trace(calls, responses)


def line(record_id, text="good"):
    record = {
        "id": record_id,
        "prompt": [{"role": "user", "content": text}],
        "tools": [],
        "expert_trace": [{"role": "assistant", "content": "x"}],
    }
    return json.dumps(record, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    "bad",
    [line("b", "café").decode().encode("latin-1"), b'{"id": ' + b"7" * 5000 + b"}", b"[" * 50_000, b"\x00"],
    ids=["latin-1", "digits", "nesting", "nul"],
)
def test_one_bad_line_is_named_and_can_be_left_out(tmp_path, bad):
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(line("a") + b"\n" + bad + b"\n" + line("c") + b"\n")
    with pytest.raises(RecordError, match=r"mixed\.jsonl:2:"):
        load_records(path)
    loaded = load_records(path, skip_bad=True)
    assert [r.id for r in loaded] == ["a", "c"]
    assert [e.line for e in loaded.skipped] == [2]


def test_bom_crlf_and_unicode_line_separators_are_no_obstacle(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + line("a", "one\u2028two\u0085three") + b"\r\n" + line("b") + b"\r\n\r\n"
    )
    records = load_records(path).records
    assert [r.id for r in records] == ["a", "b"]
    assert records[0].prompt[0]["content"] == "one\u2028two\u0085three"


@pytest.mark.parametrize("content", [b"", b"PAR1 cut", b"PAR1" * 50])
def test_a_damaged_parquet_file_is_named(tmp_path, content):
    path = tmp_path / "cut.parquet"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cut\.parquet: is damaged or no parquet file"):
        load_records(path)
