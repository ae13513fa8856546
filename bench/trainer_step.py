"""One CPU training step of the default config on real rollouts: one token tree against one-by-one packing.

    python bench/trainer_step.py [CONFIG] [--steps 5] [--rounds 3] [--out FOLDER]

Both lay out the same samples and run the same forward, loss and backward; they are timed in turn, in one
process, after their losses and gradients have been compared: on the wall, and by the processor's time, which
other load on the machine hardly touches.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from report import write_csv  # noqa: E402
from runner import timings  # noqa: E402
from tree_common import Rows  # noqa: E402

from pact_fast.config import load_config  # noqa: E402
from pact_fast.train.batch import Sample, pack_losses  # noqa: E402
from pact_fast.train.rollouts import batch_records  # noqa: E402
from pact_fast.train.trainer import Trainer  # noqa: E402

PACKINGS = ("tree", "none")
RESULTS = Path(__file__).resolve().parent / "results"


def step_samples(trainer: Trainer, step: int) -> list[Sample]:
    config = trainer.config
    records = batch_records(trainer.records, step, config.train.prompts_per_step, config.run.seed)
    rollouts = trainer.rollout(records, step)
    anchored = trainer.schedule.anchored([r.id for r in records], step)
    batches = trainer.mini_batches(records, rollouts, anchored, trainer.schedule.sft_strength(0.0), 0.0)
    return [sample for samples in batches for sample in samples]


def run(trainer: Trainer, samples: list[Sample], packing: str) -> dict[str, torch.Tensor]:
    """Loss, flat gradient and packed tokens of one forward and backward."""
    trainer.model.zero_grad()
    loss, tokens, config = 0.0, 0, trainer.config
    for pack in pack_losses(
        trainer.policy, samples, config.objective, token_budget=config.train.token_budget, packing=packing
    ):
        pack.loss.backward()
        loss, tokens = loss + float(pack.loss.detach()), tokens + pack.num_tokens
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    return {"loss": torch.tensor(loss), "gradient": gradient, "tokens": torch.tensor(tokens)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", nargs="?", default="configs/toolbox.yaml")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="of each step (default 3)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    args = parser.parse_args()
    overrides = {"run.dir": "runs/bench", "run.device": "cpu", "eval.score_test": "false"}
    trainer = Trainer(load_config(args.config, [w for k, v in overrides.items() for w in (f"--{k}", v)]))
    rows = Rows()
    samples_of: dict[str, dict[str, list[float]]] = {}
    tokens: dict[str, list[int]] = {p: [] for p in PACKINGS}
    for step in range(args.steps):
        samples = step_samples(trainer, step)
        runs = {packing: partial(run, trainer, samples, packing) for packing in PACKINGS}
        results = {packing: once() for packing, once in runs.items()}
        tree, none = results["tree"], results["none"]
        difference = float((tree["gradient"] - none["gradient"]).norm() / none["gradient"].norm())
        assert abs(tree["loss"] - none["loss"]) < 1e-5, (tree["loss"], none["loss"])
        assert difference < 1e-4, difference
        for packing in PACKINGS:
            tokens[packing].append(int(results[packing]["tokens"]))
        for kind, times in timings(runs, "cpu", 0.0, args.rounds).items():
            for packing, values in times.items():
                samples_of.setdefault(kind, {}).setdefault(packing, []).extend(values)
    trainer.env.close()
    shape = " ".join(f"{packing}={statistics.mean(tokens[packing]):.0f}" for packing in PACKINGS)
    for kind, times in samples_of.items():
        for packing, values in times.items():
            rows.add("trainer_step", f"pact_fast/{packing}", "whole", shape, kind, "ms", values)
        ratios = [none / tree for tree, none in zip(times["tree"], times["none"], strict=True)]
        rows.add("trainer_step", "pact_fast/none", "whole", shape, f"{kind} over the tree's", "x", ratios)
    write_csv(args.out / "cpu.csv", rows.rows)
    print("losses are equal to 1e-5, gradients to 1e-4")


if __name__ == "__main__":
    main()
