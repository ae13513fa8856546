"""Does the gradient under the trace point where the gradient under the prompt alone points?

    python scripts/transfer.py [--config FILE] --model NAME=FOLDER [--model ...] [--prompts 16] [--csv FILE]
    [--demonstrations] [KEYS]

Draws the rollouts of one step of the config (default configs/toolbox.yaml; no anchors) with each model and
prints the cosine between the gradients of L_RL(c) and L_RL(x) over them (pact_fast.train.transfer): whole,
by the sign of the advantage, by whether a token agrees with the trace or departs from it, and by layer.
`toolbox-base` is the bundled model. --demonstrations takes in the place of rollouts four ways in which an
expert does each toolbox task, right and wrong, straight and with a detour, rewarded where they solve it: for
a model none of whose own rollouts earns more than another. KEYS: of the config, as
--objective.trace_context message.
"""

import argparse
import csv
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pact_fast.config import load_config
from pact_fast.data.records import Record
from pact_fast.data.tokens import Component
from pact_fast.envs.base import Outcome, make_env
from pact_fast.rollout import Rollout
from pact_fast.train.rollouts import batch_records
from pact_fast.train.trainer import Trainer
from pact_fast.train.transfer import Transfer, context_transfer

PARTS = ("all", "positive", "negative", "agree", "depart")
CROSSED = ("positive agree", "positive depart", "negative agree", "negative depart")


WAYS = [{"success_rate": right, "detour_rate": detour} for right in (1.0, 0.0) for detour in (1.0, 0.0)]
WRITTEN = (
    Component.REASONING,
    Component.STRUCTURE,
    Component.TOOL_CALL,
    Component.ANSWER,
    Component.THINK_TAG,
)


def demonstrations(trainer: Trainer, records: list[Record]) -> list[Rollout]:
    """What an expert might have done with each prompt, `WAYS` of it, as if it were rollouts."""
    out = []
    of_way = []
    for way in WAYS:
        env = make_env("toolbox", trainer.config.env.settings | way)
        of_way.append({r.id: r for r in env.records("train")})
        env.close()
    for record in records:
        for shown in of_way:
            other = shown[record.id]
            assert other.prompt == record.prompt
            rollout = Rollout(record, trainer.builder.prompt(record))
            tokens = trainer.chat.trace(other.expert_trace)
            turns = [max(turn, 0) for turn in tokens.turns]
            rollout.token_ids, rollout.turns = tokens.ids, turns
            rollout.sampled = [component in WRITTEN for component in tokens.components]
            rollout.logprobs = [0.0] * len(turns)
            solves = bool(other.env["expert"]["solves"])
            rollout.turn_rewards = [0.0] * max(turns) + [float(solves)]
            rollout.outcome = Outcome(float(solves), solves)
            out.append(rollout)
    return out


def measure(config: str, model: str, words: list[str], seed: int, demonstrated: bool) -> Transfer | None:
    """Transfer of one step's rollouts with this model."""
    with tempfile.TemporaryDirectory() as folder:
        keys = {"model.path": model, "run.dir": folder, "run.seed": seed, "eval.score_test": "false"}
        keys |= {"objective.anchor_probability": 0.0, "eval.validation_tasks": 1}
        given = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
        trainer = Trainer(load_config(config, [*given, *words]))
        try:
            size = trainer.config.train.prompts_per_step
            records = batch_records(trainer.records, 0, size, seed)
            rollouts = demonstrations(trainer, records) if demonstrated else trainer.rollout(records, 0)
            free = {r.id: False for r in records}
            batches = trainer.mini_batches(records, rollouts, free, None, 0.0)
            return context_transfer(
                trainer.policy,
                trainer.builder,
                [s for batch in batches for s in batch],
                {r.id: r for r in records},
                temperature=trainer.config.rollout.temperature,
                token_budget=trainer.config.train.token_budget,
            )
        finally:
            trainer.env.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/toolbox.yaml")
    parser.add_argument("--model", action="append", help="NAME=FOLDER; default: base=toolbox-base")
    parser.add_argument("--prompts", type=int, default=16, help="of the step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="also write the rows to this file")
    parser.add_argument("--demonstrations", action="store_true", help="an expert's ways for rollouts")
    args, words = parser.parse_known_args()
    words += ["--train.prompts_per_step", str(args.prompts)]
    if args.demonstrations:
        words += ["--rollout.num_generations", str(len(WAYS))]
    found = {}
    for text in args.model or ["base=toolbox-base"]:
        name, _, folder = text.partition("=")
        transfer = measure(args.config, folder or name, words, args.seed, args.demonstrations)
        if transfer is None:
            print(f"{name}: no rollout has an advantage")
            continue
        found[name] = transfer
    layers = sorted({layer for t in found.values() for layer in t.layers}, key=_order)
    table = Table("cosine of gradients", *(f"{name} (|c|/|x|, tokens)" for name in found))
    rows = []
    for part in (*PARTS, *CROSSED):
        cells = []
        for name, t in found.items():
            if part not in t.parts:
                cells.append("-")
                continue
            cells.append(f"{t.parts[part]:+.3f} ({t.ratios[part]:.2f}, {t.tokens[part]:,})")
            rows.append((name, part, t.parts[part], t.ratios[part], t.tokens[part]))
        table.add_row(part, *cells)
    for layer in layers:
        table.add_row(
            layer, *(f"{t.layers[layer]:+.3f}" if layer in t.layers else "-" for t in found.values())
        )
        rows += [(name, layer, t.layers[layer], "", "") for name, t in found.items() if layer in t.layers]
    Console(width=160).print(table)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("model", "part", "cosine", "length_ratio", "tokens"))
            writer.writerows(rows)


def _order(layer: str) -> tuple[bool, int, str]:
    digits = "".join(c for c in layer if c.isdigit())
    return (not digits, int(digits or 0), layer)


if __name__ == "__main__":
    main()
