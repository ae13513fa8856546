"""`pact-fast report DIR`: report.html of a run's folder, transcripts.html of an evaluation's."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pact_fast.evaluation.report import write_report
from pact_fast.evaluation.transcripts import TRANSCRIPTS, write_transcripts
from pact_fast.metrics import METRICS_FILE


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("pact-fast report", description=__doc__)
    parser.add_argument("run_dir", help="folder of a run or of an evaluation (eval --out)")
    folder = Path(parser.parse_args(argv).run_dir)
    evaluation = (folder / TRANSCRIPTS).is_file() and not (folder / METRICS_FILE).is_file()
    try:
        print(write_transcripts(folder) if evaluation else write_report(folder))
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0
