"""`pact-fast report` of an evaluation's folder: one page of all conversations."""

import json
import re

import pytest

from pact_fast.cli import main
from pact_fast.data.colours import css
from pact_fast.evaluation.transcripts import write_transcripts
from tests.tools.test_report import Balanced


def piece(component, text, role="assistant"):
    return {"role": role, "component": component, "text": text}


LINES = [
    {
        "id": "t/0",
        "sample": 0,
        "reward": 1.0,
        "failure": None,
        "pieces": [
            piece("context", "Who is <b>?", "user"),
            piece("reasoning", "I look & see."),
            piece("tool_call", '{"name": "find"}'),
            piece("tool_response", '"Mora\u2028Keld"', "tool"),
            piece("answer", "Mora."),
        ],
    },
    {"id": "t/1", "sample": 1, "reward": 0.0, "failure": "wrong_answer", "pieces": [piece("answer", "No")]},
    {"id": "t/2", "sample": 0, "reward": -0.2, "failure": "no_call", "pieces": []},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "transcripts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    rows = [{"id": f"t/{i}", "category": ["single", "two <part>"][i % 2]} for i in range(3)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_report_writes_every_conversation_with_what_the_filter_needs(folder, capsys):
    assert main(["report", str(folder)]) == 0
    path = folder / "transcripts.html"
    assert capsys.readouterr().out.strip() == str(path)
    page = path.read_text()
    parser = Balanced()
    parser.VOID = (*Balanced.VOID, "input")
    parser.feed(page)
    assert parser.open == []
    shown = [attributes for tag, attributes in parser.tags if tag == "details"]
    assert [row["data-outcome"] for row in shown] == ["solved", "wrong_answer", "no_call"]
    assert [row["data-category"] for row in shown] == ["single", "two <part>", "single"]
    options = [attributes.get("value") for tag, attributes in parser.tags if tag == "option"]
    assert options == ["", "solved", "unsolved", "wrong_answer", "no_call", "", "single", "two <part>"]
    assert "Who is &lt;b&gt;?" in page
    assert "I look &amp; see." in page
    assert "sample 1, wrong answer, reward 0.000" in page
    assert css() in page
    assert not re.search(r"(src|href|url)[=(]", page)
    assert not any(tag in ("link", "img", "iframe") for tag, _ in parser.tags)


def test_a_transcript_cut_short_is_left_out_and_a_damaged_one_named(folder):
    path = folder / "transcripts.jsonl"
    whole = path.read_text()
    path.write_text(whole + whole[:40])
    assert write_transcripts(folder).read_text().count("<details") == 3
    for line, problem in (
        ("{", "is not JSON"),
        ("3", "must be an object"),
        ('{"id": "x", "pieces": 1}', "pieces: must be a list"),
        ('{"id": "x", "pieces": [{"role": "user"}]}', r"pieces\[0\] needs role"),
        (json.dumps({"id": "x", "pieces": [piece("thought", "")]}), "component 'thought' is none of"),
    ):
        path.write_text(whole + line + "\n")
        with pytest.raises(ValueError, match=rf"transcripts\.jsonl:4: {problem}"):
            write_transcripts(folder)


def test_a_folder_of_neither_kind_is_told(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "is" in capsys.readouterr().err
