"""Loading, checking and writing records."""

import copy
import json

import pytest

from pact_fast.data.records import RecordError, check_prompt_lengths, load_records, write_records
from tests.helpers.conversations import SAMPLE_PROMPT, SAMPLE_TOOLS, SAMPLE_TRACE

GOOD = {
    "id": "one",
    "prompt": SAMPLE_PROMPT,
    "tools": SAMPLE_TOOLS,
    "expert_trace": SAMPLE_TRACE,
    "env": {"answer": "41"},
}


def write_lines(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def changed(edit):
    record = copy.deepcopy(GOOD)
    edit(record)
    return record


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_written_records_load_back_equal(tmp_path, suffix):
    source = write_lines(tmp_path / "in.jsonl", [GOOD, {**GOOD, "id": "two", "level": 3}])
    records = load_records(source).records
    assert records[1].env == {"answer": "41", "level": 3}
    assert records[0].source == f"{source}:1"
    write_records(tmp_path / f"out{suffix}", records)
    loaded = load_records(tmp_path / f"out{suffix}").records
    for before, after in zip(records, loaded, strict=True):
        assert (before.id, before.prompt, before.tools, before.env) == (
            after.id,
            after.prompt,
            after.tools,
            after.env,
        )
        assert before.expert_trace == after.expert_trace == tuple(SAMPLE_TRACE)


def test_nested_parquet_columns_load(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    trace = [{"role": "assistant", "content": "hi", "tool_calls": None}]
    rows = [
        {"prompt": SAMPLE_PROMPT, "tools": json.dumps(SAMPLE_TOOLS), "expert_trace": trace, "answer": "41"}
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "nested.parquet")
    (record,) = load_records(tmp_path / "nested.parquet").records
    assert record.id == "nested:1"
    assert record.prompt == tuple(SAMPLE_PROMPT)
    assert record.env == {"answer": "41"}


def test_openai_shapes_come_to_the_normal_form(tmp_path):
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"name": "Mora"}'}}
    messages = [
        *SAMPLE_PROMPT,
        {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nok", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "x"},
        {"role": "assistant", "content": "done"},
    ]
    bare_tools = [tool["function"] for tool in SAMPLE_TOOLS]
    path = write_lines(tmp_path / "r.jsonl", [{"messages": messages, "tools": bare_tools}])
    (record,) = load_records(path).records
    assert record.prompt == tuple(SAMPLE_PROMPT)
    assert record.tools == tuple(SAMPLE_TOOLS)
    assert record.expert_trace[0] == {
        "role": "assistant",
        "reasoning_content": "why",
        "content": "ok",
        "tool_calls": [{"name": "find", "arguments": {"name": "Mora"}}],
    }
    assert record.expert_trace[1]["name"] == "find"


BAD = [
    ("missing prompt", lambda r: r.pop("prompt"), "prompt", "is missing"),
    ("missing tools", lambda r: r.pop("tools"), "tools", "is missing"),
    (
        "misspelt trace",
        lambda r: r.update(expert_trce=r.pop("expert_trace")),
        "expert_trace",
        "found 'expert_trce': misspelt",
    ),
    ("empty trace", lambda r: r.update(expert_trace=[]), "expert_trace", "is empty"),
    (
        "unknown tool",
        lambda r: r["expert_trace"][0]["tool_calls"][0].update(name="fnd"),
        "expert_trace[0].tool_calls[0].name",
        "calls unknown tool 'fnd'.*did you mean 'find'",
    ),
    (
        "arguments not JSON",
        lambda r: r["expert_trace"][0]["tool_calls"][0].update(arguments="{name: Mora}"),
        "expert_trace[0].tool_calls[0].arguments",
        "is not JSON",
    ),
    (
        "arguments not an object",
        lambda r: r["expert_trace"][0]["tool_calls"][0].update(arguments=[1]),
        "expert_trace[0].tool_calls[0].arguments",
        "must be a JSON object",
    ),
    (
        "response without call",
        lambda r: r["expert_trace"].insert(3, {"role": "tool", "content": "x"}),
        "expert_trace[3]",
        "tool response without its call",
    ),
    (
        "response of another tool",
        lambda r: r["expert_trace"][1].update(name="age_of"),
        "expert_trace[1].name",
        "'age_of' without its call",
    ),
    ("call without response", lambda r: r["expert_trace"].pop(2), "expert_trace[2]", "has no tool response"),
    (
        "half answered end",
        lambda r: r.update(expert_trace=r["expert_trace"][:2]),
        "expert_trace[1]",
        "no tool response",
    ),
    (
        "ends on a call",
        lambda r: r.update(expert_trace=r["expert_trace"][:4]),
        "expert_trace[3]",
        "a trace ends on a tool response or an answer",
    ),
    ("content not text", lambda r: r["prompt"][1].update(content=5), "prompt[1].content", "must be text"),
    ("prompt ends wrong", lambda r: r["prompt"].reverse(), "prompt", "must end with a user message"),
    ("unknown role", lambda r: r["prompt"][0].update(role="sytem"), "prompt[0].role", "'sytem'"),
    ("trace starts wrong", lambda r: r["expert_trace"].pop(0), "expert_trace[0].role", "must be 'assistant'"),
    ("tool twice", lambda r: r["tools"].append(r["tools"][0]), "tools[2].function.name", "listed twice"),
    (
        "tag in reasoning",
        lambda r: r["expert_trace"][5].update(reasoning_content="so </think> there"),
        "expert_trace[5].reasoning_content",
        "contains the tag </think>",
    ),
    (
        "empty turn",
        lambda r: r["expert_trace"].append({"role": "assistant"}),
        "expert_trace[6].role",
        "cannot follow",
    ),
    ("env not an object", lambda r: r.update(env=[1]), "env", "must be an object"),
]


@pytest.mark.parametrize(
    ("edit", "field", "problem"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
def test_bad_record_names_file_line_record_and_field(tmp_path, edit, field, problem):
    path = write_lines(tmp_path / "r.jsonl", [{**GOOD, "id": "fine"}, changed(edit)])
    with pytest.raises(RecordError, match=problem) as caught:
        load_records(path)
    error = caught.value
    assert (error.file, error.line, error.record, error.field) == (str(path), 2, "one", field)
    assert str(error).startswith(f"{path}:2: record 'one': {field}: ")
    assert "env.settings.skip_bad_records" in str(error)


def test_skip_bad_records_counts_and_lists_each(tmp_path):
    rows = [GOOD, changed(lambda r: r.pop("tools")), "{broken", "", GOOD, {**GOOD, "id": "last"}]
    loaded = load_records(write_lines(tmp_path / "r.jsonl", rows), skip_bad=True)
    assert [record.id for record in loaded] == ["one", "last"]
    assert [(error.line, error.field) for error in loaded.skipped] == [
        (2, "tools"),
        (3, "(whole line)"),
        (5, "id"),
    ]
    with pytest.raises(RecordError, match="2 more bad records"):
        load_records(tmp_path / "r.jsonl")


def test_all_records_bad_is_an_error_even_when_skipping(tmp_path):
    with pytest.raises(ValueError, match="all 1 are bad"):
        load_records(write_lines(tmp_path / "r.jsonl", ["{"]), skip_bad=True)


def test_trace_may_be_absent_only_where_none_is_needed(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", [changed(lambda r: r.pop("expert_trace"))])
    assert load_records(path, require_trace=False).records[0].expert_trace == ()
    with pytest.raises(RecordError, match="expert_trace: is missing"):
        load_records(path)


def test_tools_that_arrive_later_may_be_called_from_then_on(tmp_path):
    def edit(record):
        record["tools"] = record["tools"][:1]
        record["expert_trace"] = [
            {"role": "assistant", "content": "I lack a tool."},
            {"role": "user", "content": "Here is one.", "tools": SAMPLE_TOOLS[1:]},
            {"role": "assistant", "tool_calls": [{"name": "age_of", "arguments": {}}]},
            {"role": "tool", "content": "41"},
        ]

    path = write_lines(tmp_path / "r.jsonl", [changed(edit)])
    assert load_records(path).records[0].expert_trace[1]["tools"] == SAMPLE_TOOLS[1:]


def test_prompt_past_the_length_limit_is_named(tmp_path):
    records = load_records(write_lines(tmp_path / "r.jsonl", [GOOD, {**GOOD, "id": "two"}])).records
    with pytest.raises(
        RecordError, match=r"r\.jsonl:2: record 'two': prompt: prompt has 301 tokens, the limit is 300"
    ):
        check_prompt_lengths(records, [300, 301], 300)
    checked = check_prompt_lengths(records, [300, 301], 300, skip_bad=True)
    assert [record.id for record in checked] == ["one"]
    assert [error.record for error in checked.skipped] == ["two"]


def test_unknown_file_type_and_missing_file(tmp_path):
    (tmp_path / "r.csv").write_text("x")
    with pytest.raises(ValueError, match=r"\.csv"):
        load_records(tmp_path / "r.csv")
    with pytest.raises(FileNotFoundError, match="no such record file"):
        load_records(tmp_path / "none.jsonl")
