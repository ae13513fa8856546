"""Reasoning cut into chunks, levels over them, and what is never in a prefix."""

import pytest

from pact_fast.data.chat import ChatFormat, Component
from pact_fast.data.records import RecordError, parse_record
from pact_fast.data.segments import (
    PREVIEW,
    TYPES,
    conservative,
    level_ends,
    safe_ends,
    segment_reasoning,
    token_levels,
    turn_segments,
)

CALL = {"name": "weather", "arguments": {"city": "Oslo", "days": 3}}


def kinds(text, calls=(CALL,)):
    return [(s.type, text[s.start : s.end]) for s in segment_reasoning(text, calls)[0]]


@pytest.mark.parametrize(
    ("sentence", "kind"),
    [
        ("The user asks for rain.", "task_restate"),
        ("Two tools are available.", "tool_scan"),
        ("The tool is weather.", "tool_selection"),
        ("Its required argument is a place.", "required_arg_grounding"),
        ("That is for Oslo.", "required_arg_grounding"),
        ("The unit is optional.", "optional_arg_analysis"),
        ("News is irrelevant here.", "irrelevant_tool_rejection"),
        ("The last call failed.", "failure_reflection"),
        ("I try another way.", "fallback_plan"),
        ("Therefore one more look.", "decision_summary"),
        ("Now I can answer.", "final_answer_grounding"),
        ("Hm.", "other"),
        ('{"name": "weather", "arguments": {"city": "Oslo"}}', PREVIEW),
        ("```json", PREVIEW),
        ("The tool weather gets Oslo.", PREVIEW),
        ("weather(city) it is.", PREVIEW),
        ("I will call it now.", PREVIEW),
        ("Let me call weather.", PREVIEW),
        ("The function call is this.", PREVIEW),
    ],
)
def test_sentences_are_classed_by_rules(sentence, kind):
    assert kinds(sentence) == [(kind, sentence)]


def test_every_type_but_one_of_the_paper_has_a_name():
    assert len(TYPES) == 12
    assert len(set(TYPES)) == 12


def test_neighbours_of_a_type_are_one_chunk_and_blanks_belong_to_none():
    text = "The user asks for rain. The question is easy.\n\nTwo tools are available."
    assert kinds(text) == [
        ("task_restate", "The user asks for rain. The question is easy."),
        ("tool_scan", "Two tools are available."),
    ]


def test_a_call_written_over_several_lines_is_a_preview_from_its_first_brace():
    text = 'The user asks for rain.\n{\n  "name": "weather",\n  "arguments": {"city": "Oslo"}\n}'
    found = kinds(text)
    assert found[0] == ("task_restate", "The user asks for rain.")
    assert found[1][0] == PREVIEW
    assert found[1][1].startswith("{")


@pytest.mark.parametrize(
    ("chunks", "want"),
    [
        (1, [0, 0, 0, 0]),  # ceil(k / 4) of one: all levels the same
        (2, [0, 0, 1, 1]),  # ceil(k 2 / 4): 1, 1, 2, 2
        (3, [0, 1, 2, 2]),  # ceil(k 3 / 4): 1, 2, 3, 3
        (4, [0, 1, 2, 3]),
        (8, [1, 3, 5, 7]),
    ],
)
def test_levels_grow_evenly_over_the_chunks(chunks, want):
    ends = [10 * (i + 1) for i in range(chunks)]
    message = {"reasoning_levels": ends}
    assert level_ends(message, 4) == [ends[i] for i in want]


def test_the_longest_prefix_ends_before_the_first_preview():
    text = "The user asks for rain. Two tools are available. I will call weather. Therefore one look."
    segments = segment_reasoning(text, [CALL])[0]
    assert [s.type for s in segments] == ["task_restate", "tool_scan", PREVIEW, "decision_summary"]
    assert safe_ends(segments) == [text.index(" Two"), text.index(" I will")]
    assert safe_ends(segment_reasoning("I will call weather. The user asks.", [CALL])[0]) == []
    assert level_ends({"reasoning_content": "I will call weather.", "tool_calls": [CALL]}, 4) == [0] * 4


def test_a_preview_has_no_level_in_the_tokens(chatml_tokenizer):
    chat = ChatFormat.for_tokenizer(chatml_tokenizer)
    text = 'The question is hard. I look. So I call it with {"name": "find"}.'
    message = {"reasoning_content": text, "content": "", "tool_calls": [CALL]}
    tokens = chat.assistant(message, 0)
    reasoning = [i for i, c in enumerate(tokens.components) if c == Component.REASONING]
    safe = chat.decode([tokens.ids[i] for i in reasoning if tokens.levels[i] <= 4])
    assert safe == "The question is hard. I look."
    assert {tokens.levels[i] for i in reasoning} == {1, 3, 5}
    assert all(tokens.levels[i] == 0 for i in range(len(tokens)) if i not in reasoning)


def test_tokens_take_the_lowest_level_that_holds_them():
    assert token_levels([0, 3, 4, 7, 9], [4, 4, 8, 8]) == [1, 1, 3, 3, 5]


def test_a_turn_of_unknown_words_is_hard_and_its_prefix_ends_before_any_hint_at_the_call():
    text = "Hm, well. Sun and rain. Oslo it might be. The user asks."
    segments, hard = segment_reasoning(text, [CALL])
    assert hard
    assert PREVIEW not in {s.type for s in segments}
    cut = conservative(text, [CALL])
    assert [s.type for s in cut].index(PREVIEW) == 1
    message = {"reasoning_content": text, "tool_calls": [CALL]}
    assert turn_segments(message) == cut
    assert text[: level_ends(message, 4)[-1]] == "Hm, well. Sun and rain."


REASONING = "The user asks. I look. I act."
GOOD = [
    {"type": "task_restate", "start": 0, "end": 14},
    {"type": "tool_scan", "start": 15, "end": 22},
    {"type": PREVIEW, "start": 23, "end": 29},
]


def record(reasoning=REASONING, **keys):
    turn = {"role": "assistant", "reasoning_content": reasoning, "tool_calls": [CALL], **keys}
    tools = [{"type": "function", "function": {"name": "weather"}}]
    trace = [turn, {"role": "tool", "content": "wet"}]
    raw = {"id": "one", "prompt": [{"role": "user", "content": "?"}], "tools": tools, "expert_trace": trace}
    return parse_record(raw, file="r.jsonl", line=1)


def test_a_records_own_segments_are_taken():
    message = record(reasoning_segments=GOOD).expert_trace[0]
    assert [s.type for s in turn_segments(message)] == ["task_restate", "tool_scan", PREVIEW]
    assert level_ends(message, 4) == [14, 14, 22, 22]
    assert level_ends(record(reasoning_levels=[3, 9, 14, 22]).expert_trace[0], 4) == [3, 9, 14, 22]


def test_line_breaks_that_the_normal_form_drops_are_not_counted():
    shifted = [{**s, "start": s["start"] + 2, "end": s["end"] + 2} for s in GOOD]
    shifted[-1]["end"] += 1
    message = record(f"\n\n{REASONING}\n", reasoning_segments=shifted).expert_trace[0]
    assert message["reasoning_segments"] == GOOD


def edited(index, **keys):
    return [{**s, **(keys if i == index else {})} for i, s in enumerate(GOOD)]


@pytest.mark.parametrize(
    ("keys", "field", "problem"),
    [
        (
            {"reasoning_segments": edited(2, end=99)},
            "reasoning_segments[2]",
            "does not lie in the turn's reasoning",
        ),
        ({"reasoning_segments": edited(1, start=10)}, "reasoning_segments[1]", "overlaps or stands before"),
        ({"reasoning_segments": GOOD[1::-1]}, "reasoning_segments[0]", "belong to no segment"),
        ({"reasoning_segments": [GOOD[0], GOOD[2]]}, "reasoning_segments[1]", "belong to no segment"),
        ({"reasoning_segments": GOOD[:2]}, "reasoning_segments", "characters 22 to 29 belong to no segment"),
        (
            {"reasoning_segments": edited(0, type="intro")},
            "reasoning_segments[0].type",
            "unknown type 'intro'",
        ),
        ({"reasoning_segments": "all"}, "reasoning_segments", "must be a list of segments"),
        ({"reasoning_segments": [3]}, "reasoning_segments[0]", "must be an object with type, start and end"),
        ({"reasoning_levels": [3, 9, 7, 22]}, "reasoning_levels[2]", "shrinks from 9 to 7"),
        ({"reasoning_levels": [3, 9, 14, 99]}, "reasoning_levels[3]", "does not lie in"),
        ({"reasoning_levels": [3.5]}, "reasoning_levels", "must be a list of whole numbers"),
        ({"reasoning_levels": []}, "reasoning_levels", "must be a list of whole numbers"),
    ],
)
def test_bad_cuts_are_named_with_record_and_field(keys, field, problem):
    with pytest.raises(RecordError) as caught:
        record(**keys)
    assert caught.value.record == "one"
    assert caught.value.field == f"expert_trace[0].{field}"
    assert problem in caught.value.problem
