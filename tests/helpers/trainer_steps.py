"""What tests of the trainer share: the samples of a real step, and their loss and gradient."""

import torch

from pact_fast.train.batch import pack_losses
from pact_fast.train.rollouts import batch_records


def gradients(trainer, samples, *, token_budget=1_000_000, packing="tree", parts=1):
    """Loss and flat gradient of samples, cut into `parts` micro-batches of packs of `token_budget` tokens."""
    trainer.model.zero_grad()
    loss, packs = 0.0, 0
    for part in range(parts):
        for pack in pack_losses(
            trainer.policy,
            samples[part::parts],
            trainer.config.objective,
            token_budget=token_budget,
            packing=packing,
        ):
            pack.loss.backward()
            loss += float(pack.loss.detach())
            packs += 1
    flat = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    return loss, flat.clone(), packs


def step_samples(trainer, step=0, progress=0.0):
    """The samples of one real step: rollouts drawn, advantages taken, contexts chosen."""
    config = trainer.config
    records = batch_records(trainer.records, step, config.train.prompts_per_step, config.run.seed)
    rollouts = trainer.rollout(records, step)
    anchored = trainer.schedule.anchored([r.id for r in records], step)
    strength = trainer.schedule.sft_strength(progress)
    batches = trainer.mini_batches(records, rollouts, anchored, strength, progress)
    return [s for batch in batches for s in batch], rollouts, anchored
