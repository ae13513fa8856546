"""`pact-fast report RUN`: report.html of a run folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pact_fast.evaluation.report import write_report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("pact-fast report", description="Writes report.html of a run folder.")
    parser.add_argument("run_dir", help="the run's folder, such as runs/toolbox-pact")
    try:
        print(write_report(parser.parse_args(argv).run_dir))
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0
