"""Weights that are read and not trained: the policy before training, or a moving average of it.

The KL penalty's reference and the teacher that reads privileged contexts are both of this kind. A live
teacher is none: its rows are in the policy's own pass (train/distill.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pact_fast.config import Config
from pact_fast.distributed import Sharded, World
from pact_fast.train.build import build_policy, build_sharded
from pact_fast.tree.policy import Policy


@dataclass
class Teacher:
    """A policy that only reads. `update_rate` above 0: an average that follows the trained weights."""

    policy: Policy
    sharded: Sharded
    update_rate: float = 0.0
    sync_steps: int = 1

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, forwards are this teacher's: adapters that are being trained are switched off."""
        model: Any = self.policy.model
        off = hasattr(model, "disable_adapter") and any(p.requires_grad for p in model.parameters())
        with model.disable_adapter() if off else nullcontext(), torch.no_grad():
            yield

    @torch.no_grad()
    def follow(self, model: nn.Module, step: int) -> None:
        """After step `step`: moves an average towards the trained weights of `model`, where it is due."""
        if not self.update_rate or (step + 1) % self.sync_steps:
            return
        mine = dict(self.policy.model.named_parameters())
        for name, trained in model.named_parameters():
            if trained.requires_grad:
                mine[name].mul_(1.0 - self.update_rate).add_(trained, alpha=self.update_rate)


def shard_policy(
    policy: Policy, config: Config, world: World
) -> tuple[Sharded, Teacher | None, Teacher | None]:
    """The policy over the ranks of `world`, in place; the reference of the KL penalty; the teacher that reads
    contexts. The latter two are None where there is none, or the teacher is live. A frozen teacher and the
    reference are the same copy; with adapters no copy at all, but the policy without them.
    """
    o = config.objective
    reads = o.distillation != "none"
    copies = {}  # made before the policy is cut into shards
    if (o.beta or (reads and o.teacher == "frozen")) and not config.lora.rank:
        copies["frozen"] = _copy(policy, config)
    if reads and o.teacher == "ema":
        copies["ema"] = _copy(policy, config)
    sharded = build_sharded(policy.model, world, config.distributed)
    teachers = {
        name: Teacher(copied, build_sharded(copied.model, world, config.distributed))
        for name, copied in copies.items()
    }
    frozen = teachers.get("frozen", Teacher(policy, sharded))
    if "ema" in teachers:
        teachers["ema"].update_rate, teachers["ema"].sync_steps = o.teacher_update_rate, o.teacher_sync_steps
    teacher = teachers.get("ema", frozen) if reads and o.teacher != "live" else None
    return sharded, frozen if o.beta else None, teacher


def _copy(policy: Policy, config: Config) -> Policy:
    model: Any = copy.deepcopy(policy.model)
    return build_policy(model.requires_grad_(False).eval(), config.model, config.train.token_budget)
