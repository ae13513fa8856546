"""What does a model do when it has read the trace? Whoever distils from it learns that.

    python scripts/teacher.py [--config FILE] [--model NAME=FOLDER ...] [--prompts 120] [--csv FILE]

Rolls out training prompts of the config (default configs/toolbox.yaml), two rollouts each, from x, from x
with the trace as turns (`trace_context: concat`) and from x with the trace as a message, and prints the share
solved, that among prompts whose trace is right, tool calls and sampled tokens of a rollout. `toolbox-base` is
the bundled model.
"""

import argparse
import csv
import tempfile
from pathlib import Path

from pact_fast.config import load_config
from pact_fast.data.tokens import Component, Tokens
from pact_fast.rollout import collect_rollouts
from pact_fast.train.trainer import Trainer

COLUMNS = ("model", "context", "solved", "solved_where_trace_is_right", "calls", "tokens", "rollouts")


def context(ids: list[int]) -> Tokens:
    tokens = Tokens()
    for token in ids:
        tokens.append(token, Component.CONTEXT, -1)
    return tokens


def measure(config: str, name: str, model: str, prompts: int) -> list[tuple]:
    rows = []
    for form in ("none", "concat", "message"):
        with tempfile.TemporaryDirectory() as folder:
            keys = {"model.path": model, "run.dir": folder, "eval.score_test": "false"}
            keys["objective.trace_context"] = "concat" if form == "none" else form
            words = [word for key, value in keys.items() for word in (f"--{key}", value)]
            trainer = Trainer(load_config(config, words))
            records, built = trainer.records[:prompts], trainer.builder
            shown = [
                built.prompt(r) if form == "none" else context(built.privileged_prompt(r)) for r in records
            ]
            rollouts = collect_rollouts(
                trainer.engine,
                trainer.env,
                trainer.chat,
                records,
                num_generations=2,
                limits=trainer.limits,
                prompts=shown,
                seed=1,
            )
            trainer.env.close()
        outcomes = [r.outcome for r in rollouts if r.outcome is not None]
        right = [r.record.env.get("expert", {}).get("solves", True) for r in rollouts]
        solved = [outcome.solved for outcome in outcomes]
        known = [s for s, k in zip(solved, right, strict=True) if k]
        means = (sum(solved) / len(solved), sum(known) / max(len(known), 1))
        calls = sum(outcome.calls for outcome in outcomes) / len(outcomes)
        tokens = sum(r.num_sampled for r in rollouts) / len(rollouts)
        rows.append(
            (name, form, *(f"{m:.3f}" for m in means), f"{calls:.2f}", f"{tokens:.0f}", len(rollouts))
        )
        print(*rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/toolbox.yaml")
    parser.add_argument("--model", action="append", help="NAME=FOLDER; default: base=toolbox-base")
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--csv", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    rows = []
    print(*COLUMNS)
    for text in args.model or ["base=toolbox-base"]:
        name, _, folder = text.partition("=")
        rows += measure(args.config, name, folder or name, args.prompts)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(rows)


if __name__ == "__main__":
    main()
