import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from pact_fast import metrics
from pact_fast.data.colours import css
from pact_fast.evaluation import report
from pact_fast.evaluation.stats import evaluation_block, wilson
from pact_fast.metrics import MetricsLogger


@pytest.fixture
def run_dir(tmp_path):
    block = evaluation_block([1, 0, 1, 1], [1.0, 0.1, 0.5, 1.0], [2, 3, 1, 2])
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        for step in range(1, 31):
            logger.log(
                step,
                {"loss": 1 / step, "reward": step / 30, "pact/trace_gain": float("nan"), "num_tokens": step},
            )
        scores = {f"eval/{k}": v for k, v in block.items() if not k.startswith("per_task")}
        scores |= {"eval/split": "validation", "eval/temperature": 1.0, "eval/failure/wrong_answer": 0.25}
        logger.log(30, scores)
    modes = {"sampled": block, "greedy": block}
    summary = {
        "preset": "pact",
        "seed": 3,
        "config": {"run": {"seed": 3}},
        "base": {"test": modes},
        "final": {"test": modes},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    pieces = [
        {"role": "user", "component": "context", "text": "Who is <b>?\n"},
        {"role": "assistant", "component": "tool_call", "text": '{"name": "find"}'},
        {"role": "tool", "component": "tool_response", "text": "Mora & Keld"},
    ]
    (tmp_path / "transcript.json").write_text(json.dumps({"task": "t-1", "solved": True, "pieces": pieces}))
    return tmp_path


class Balanced(HTMLParser):
    VOID = ("meta", "path", "use", "br")

    def __init__(self):
        super().__init__()
        self.open, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_well_formed_and_fetches_nothing(run_dir):
    page = report.write_report(run_dir).read_text()
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert not any(tag in ("script", "link", "img", "iframe") for tag, _ in parser.tags)
    assert not re.search(r"(src|href)=[\"']https?:", page)


def test_the_page_shows_scores_curves_failures_transcript_and_config(run_dir):
    page = report.write_report(run_dir).read_text()
    interval = wilson(3, 4)
    assert f"0.750 [{interval.low:.3f}, {interval.high:.3f}]" in page
    assert page.count("<svg") == 5  # three of the evaluation, reward and loss; trace_gain was never finite
    assert "wrong answer" in page
    assert "0.250" in page
    assert "Who is &lt;b&gt;?" in page
    assert "Mora &amp; Keld" in page
    assert "class='tool_response'" in page
    assert "seed: 3" in page
    assert "<dt>non-finite numbers</dt><dd>30</dd>" in page


def test_the_report_counts_all_steps_and_takes_the_colours_of_the_one_table(tmp_path):
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        for step in range(120):
            logger.log(step, {"loss": 1.0})
    page = report.write_report(tmp_path).read_text()
    assert "<dt>steps</dt><dd>120</dd>" in page
    assert css() in page


def test_every_colour_of_a_chart_follows_light_and_dark(run_dir):
    page = report.write_report(run_dir).read_text()
    assert "#0102" not in page
    assert "#0a0b" not in page
    assert "var(--series-0)" in page
    assert "prefers-color-scheme: dark" in page


def test_a_run_that_was_cut_short_still_gets_a_page(tmp_path):
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        logger.log(1, {"loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    page = report.write_report(tmp_path).read_text()
    assert page.count("<svg") == 1
    assert "has not been scored" in page


def test_a_folder_without_metrics_or_with_a_broken_file_is_named(run_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is .* a run folder"):
        report.write_report(tmp_path / "nothing")
    (run_dir / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json"):
        report.write_report(run_dir)


def test_final_table_fits_80_columns_and_compares_base_and_trained(run_dir):
    out = io.StringIO()
    Console(file=out, width=80).print(report.final_table(json.loads((run_dir / "summary.json").read_text())))
    text = out.getvalue()
    assert "pact on 4 held-out tasks" in text
    assert "…" not in text
    assert all(row in text for row in ("base, T=1", "base, greedy", "trained, T=1", "trained, greedy"))
    assert "0.75 [0.30, 0.95]" in text


def test_scores_without_per_task_lists_keep_their_own_limits():
    block = {"solved": 0.5, "solved_low": 0.4, "solved_high": 0.6, "reward": 0.1, "tasks": 9}
    rows = report.score_rows({"final": {"validation": {"greedy": block}}}, "validation")
    assert rows == [("trained", "greedy", 9, ["0.500 [0.400, 0.600]", "0.100", "-"])]


def test_charts_draw_only_metrics_of_the_frozen_table():
    for _, names in report.CHARTS:
        for name in names:
            metrics.describe(name)
        assert len(names) <= len(report._SERIES)
