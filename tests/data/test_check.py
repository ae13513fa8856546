"""`pact-fast data check`: what it prints, its exit status, and the page it writes."""

import json
import re

import pytest

from pact_fast.commands.data import coloured, encode, main
from pact_fast.data.chat import ChatFormat
from pact_fast.data.records import load_records
from tests.helpers.conversations import SAMPLE_PROMPT, SAMPLE_TOOLS, SAMPLE_TRACE

GOOD = {"prompt": SAMPLE_PROMPT, "tools": SAMPLE_TOOLS, "expert_trace": SAMPLE_TRACE}


@pytest.fixture
def file(tmp_path):
    def write(*records):
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


def test_good_file_prints_counts_shares_and_one_record(file, capsys, tmp_path):
    path = file({**GOOD, "id": "a"}, {**GOOD, "id": "b <b>"})
    page = tmp_path / "page.html"
    assert main(["check", str(path), "--record", "b <b>", "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "2 good records, 0 bad" in out
    assert "6 assistant turns, 6 tool calls: age_of 4, find 2" in out
    shares = [float(share) for share in re.findall(r"(\d+\.\d)%", out)]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert 'How old is the friend of "Mora Keld"?' in out
    text = page.read_text()
    assert "b &lt;b&gt;" in text
    assert '<span class="tool_response"' in text
    assert "Tila Vosk&quot;}" in text


def test_bad_records_are_listed_and_fail_unless_skipped(file, capsys):
    path = file(GOOD, {"prompt": SAMPLE_PROMPT, "tools": SAMPLE_TOOLS}, "not an object")
    assert main([str(path)]) == 1
    out = capsys.readouterr().out
    assert "records.jsonl:2: record 'records:2': expert_trace: is missing" in out
    assert "records.jsonl:3" in out
    assert "1 good records, 2 bad" in out
    assert main([str(path), "--skip-bad-records"]) == 0


def test_prompt_limit_and_absent_trace(file, capsys):
    path = file({"prompt": SAMPLE_PROMPT, "tools": SAMPLE_TOOLS})
    assert main([str(path), "--no-trace"]) == 0
    assert main([str(path), "--no-trace", "--prompt-limit", "5"]) == 1
    assert "prompt has" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["missing.jsonl"], ["{file}", "--record", "nobody"], ["{file}", "--tokenizer", "/none"]]
)
def test_what_cannot_be_read_is_one_line_and_status_2(file, capsys, words):
    path = file(GOOD)
    assert main([word.format(file=path) for word in words]) == 2
    assert "error: " in capsys.readouterr().out


def test_coloured_text_is_the_conversation_with_marked_segments(file, chatml_tokenizer):
    chat = ChatFormat.for_tokenizer(chatml_tokenizer)
    item = encode(chat, load_records(file(GOOD)).records[0])
    tokens = item.prompt + item.trace
    borders = sum(a != b and b > 1 for a, b in zip(tokens.levels, tokens.levels[1:], strict=False))
    plain = coloured(chat, tokens).plain
    assert borders > 0
    assert len(plain) == len(chat.decode(tokens.ids)) + borders


def test_levels_and_what_no_level_holds_are_shown(file, capsys):
    text = "The user asks for an age. Two tools are available. I will call find."
    trace = [{**SAMPLE_TRACE[0], "reasoning_content": text}, *SAMPLE_TRACE[1:]]
    assert main([str(file({**GOOD, "expert_trace": trace}))]) == 0
    out = capsys.readouterr().out
    held = {name: int(count) for name, count in re.findall(r"(L\d|in no level) +│ +(\d+)", out)}
    assert held["L0"] == 0 < held["L1"] < held["L4"]
    assert held["in no level"] > 0
    assert "explicit_call_preview 1" in out
    assert "turns cut by: " in out
