"""One training step of the default config on real rollouts: one token tree against one-by-one packing.

    python bench/trainer_step.py [CONFIG] [--steps 5]

Both lay out the same samples and run the same forward, loss and backward; they are timed in turn, in one
process, after their losses and gradients have been compared.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from pact_fast.batch import Sample, pack_losses
from pact_fast.config import load_config
from pact_fast.tasks import batch_records
from pact_fast.trainer import Trainer

PACKINGS = ("tree", "none")


def step_samples(trainer: Trainer, step: int) -> list[Sample]:
    config = trainer.config
    records = batch_records(trainer.records, step, config.train.prompts_per_step, config.run.seed)
    rollouts = trainer.rollout(records, step)
    anchored = trainer._anchored(records, step)
    batches = trainer.mini_batches(records, rollouts, anchored, trainer._sft_strength(0.0), 0.0)
    return [sample for samples in batches for sample in samples]


def run(trainer: Trainer, samples: list[Sample], packing: str) -> tuple[float, torch.Tensor, float, int]:
    """(loss, flat gradient, seconds, packed tokens) of forward and backward."""
    trainer.model.zero_grad()
    loss, tokens, begin = 0.0, 0, time.perf_counter()
    config = trainer.config
    for pack in pack_losses(
        trainer.policy, samples, config.objective, token_budget=config.train.token_budget, packing=packing
    ):
        pack.loss.backward()
        loss, tokens = loss + float(pack.loss.detach()), tokens + pack.num_tokens
    seconds = time.perf_counter() - begin
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    return loss, gradient, seconds, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", nargs="?", default="configs/toolbox.yaml")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    trainer = Trainer(load_config(args.config, ["--run.dir", "runs/bench", "--eval.score_test", "false"]))
    seconds: dict[str, list[float]] = {p: [] for p in PACKINGS}
    tokens: dict[str, list[int]] = {p: [] for p in PACKINGS}
    for step in range(args.steps):
        samples = step_samples(trainer, step)
        results = {packing: run(trainer, samples, packing) for packing in PACKINGS}
        (loss, gradient, *_), (other, reference, *_) = results["tree"], results["none"]
        difference = float((gradient - reference).norm() / reference.norm())
        assert abs(loss - other) < 1e-5, (loss, other)
        assert difference < 1e-4, difference
        for _ in range(3):
            for packing in PACKINGS:
                *_, elapsed, count = run(trainer, samples, packing)
                seconds[packing].append(elapsed)
                tokens[packing].append(count)
    trainer.env.close()
    for packing in PACKINGS:
        median = statistics.median(seconds[packing])
        count = statistics.mean(tokens[packing])
        print(f"{packing:>5}: {1e3 * median:8.1f} ms a step, {count:9.0f} packed tokens")
    ratio = statistics.median(seconds["none"]) / statistics.median(seconds["tree"])
    print(f"the tree is {ratio:.2f}x faster; losses equal to 1e-5, gradients to 1e-4")


if __name__ == "__main__":
    main()
