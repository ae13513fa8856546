"""One CPU training step of the default config on real rollouts: one token tree against one-by-one packing.

    pact-fast bench step [CONFIG] [--preset pact] [--steps 5] [--rounds 3] [--out PATH]

Both lay out the same samples and run the same forward, loss and backward; they are timed in turn, in one
process, after their losses and gradients have been compared: on the wall, and by the processor's time, which
other load on the machine hardly touches.
"""

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from bench.rows import LOCAL, OUT_HELP, Rows
from bench.runner import timings
from pact_fast.config import load_config
from pact_fast.train.batch import pack_losses
from pact_fast.train.rollouts import batch_records
from pact_fast.train.samples import Sample
from pact_fast.train.trainer import Trainer

PACKINGS = ("tree", "none")


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
        trainer.policy,
        samples,
        config.objective,
        token_budget=config.train.token_budget,
        packing=packing,
        teacher=trainer.teacher,
    ):
        pack.loss.backward()
        loss, tokens = loss + float(pack.loss.detach()), tokens + pack.num_tokens
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    return {"loss": torch.tensor(loss), "gradient": gradient, "tokens": torch.tensor(tokens)}


def main(argv: Sequence[str]) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="pact-fast bench step", description=__doc__, formatter_class=formatter
    )
    parser.add_argument("config", nargs="?", default="configs/toolbox.yaml")
    parser.add_argument("--preset", default="pact", help="method (default pact)")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="of each step (default 3)")
    parser.add_argument("--out", type=Path, default=LOCAL, help=OUT_HELP)
    args = parser.parse_args(argv)
    out = Rows(args.out, "cpu")
    overrides = {"run.dir": "runs/bench", "run.device": "cpu", "eval.score_test": "false"}
    words = [word for key, value in overrides.items() for word in (f"--{key}", value)]
    trainer = Trainer(load_config(args.config, ["--preset", args.preset, *words]))
    mode = "whole" if args.preset == "pact" else args.preset
    samples_of: dict[str, dict[str, list[float]]] = {}
    tokens: dict[str, list[int]] = {p: [] for p in PACKINGS}
    for step in range(args.steps):
        samples = step_samples(trainer, step)
        runs = {f"pact_fast/{packing}": partial(run, trainer, samples, packing) for packing in PACKINGS}
        tree, none = (once() for once in runs.values())
        check_equal(tree, none)
        for packing, result in zip(PACKINGS, (tree, none), strict=True):
            tokens[packing].append(int(result["tokens"]))
        kinds, failed = timings(runs, "cpu", 0.0, args.rounds)
        if failed:
            raise RuntimeError(f"step {step}: {failed}")
        for kind, times in kinds.items():
            for name, values in times.items():
                samples_of.setdefault(kind, {}).setdefault(name, []).extend(values)
    trainer.env.close()
    shape = " ".join(f"{packing}={statistics.mean(tokens[packing]):.0f}" for packing in PACKINGS)
    for kind, times in samples_of.items():
        for name, values in times.items():
            out.add("trainer_step", name, mode, shape, torch.float32, kind, "ms", values)
        pairs = zip(times["pact_fast/tree"], times["pact_fast/none"], strict=True)
        ratios, metric = [none / tree for tree, none in pairs], f"{kind} over the tree's"
        out.add("trainer_step", "pact_fast/none", mode, shape, torch.float32, metric, "x", ratios)
    print("losses are equal to 1e-5, gradients to 1e-4")
    return out.status()


def check_equal(tree: dict[str, torch.Tensor], none: dict[str, torch.Tensor]) -> None:
    """RuntimeError where the two packings differ in the loss or the gradient."""
    loss = float((tree["loss"] - none["loss"]).abs())
    gradient = float((tree["gradient"] - none["gradient"]).norm() / none["gradient"].norm())
    if not (loss < 1e-5 and gradient < 1e-4):
        raise RuntimeError(
            f"tree and one-by-one packing differ: loss by {loss:.1e}, gradient by {gradient:.1e}"
        )
