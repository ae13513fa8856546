"""The rollouts of a step: its records, what decides the draws beside the weights, who samples them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from pact_fast.config import Config
from pact_fast.data.records import Record
from pact_fast.distributed import Sharded
from pact_fast.envs.base import ToolEnv
from pact_fast.rollout import Engine, Rollout, RolloutLimits, sample_share, spread_rollouts
from pact_fast.train.contexts import hint_of
from pact_fast.train.samples import SampleBuilder


class StepSampler:
    """Samples the rollouts of steps 0, 1, ...; records and draws are functions of config and step."""

    def __init__(
        self,
        config: Config,
        sharded: Sharded,
        engine: Engine,
        env: ToolEnv,
        builder: SampleBuilder,
        records: Sequence[Record],
        limits: RolloutLimits,
    ) -> None:
        self.config, self.sharded, self.engine, self.env = config, sharded, engine, env
        self.builder, self.chat, self.limits, self._records = builder, builder.chat, limits, records

    def records(self, step: int) -> list[Record]:
        """The prompts of a step."""
        config = self.config
        return batch_records(self._records, step, config.train.prompts_per_step, config.run.seed)

    def sample(self, records: Sequence[Record], step: int) -> list[Rollout]:
        """Rollouts with the current weights, all of them on every rank."""
        how = self._how(records, step)
        return spread_rollouts(self.sharded, self.engine, self.env, self.chat, records, **how)

    def share(self, step: int) -> Callable[[], list[Rollout]]:
        """What samples this rank's rollouts of a step; prompts are made here, not in the thread that calls
        it."""
        records = self.records(step)
        how = self._how(records, step)
        return partial(sample_share, self.sharded.world, self.engine, self.env, self.chat, records, **how)

    def _how(self, records: Sequence[Record], step: int) -> dict[str, Any]:
        config = self.config.rollout
        return {
            "num_generations": config.num_generations,
            "prompts": [self.builder.prompt(r) for r in records],
            "limits": self.limits,
            "temperature": config.temperature,
            "seed": self.config.run.seed * 1_000_003 + step,
            "batch_size": config.batch_size,
        }


def load_split(config: Config, env: ToolEnv, builder: SampleBuilder, split: str) -> list[Record]:
    """The environment's records of "train", "validation" or "test".

    Raises ValueError where a record's prompt (with the trace, in training) is past
    `rollout.max_prompt_length`, its hint is no text, or the split is empty.
    """
    o, training = config.objective, split == "train"
    records = list(env.records(split))
    limit = config.rollout.max_prompt_length
    seen: dict[str, Record] = {}
    for record in records:
        if (other := seen.setdefault(record.id, record)) is not record:
            raise ValueError(
                f"{record.source}: record {record.id!r}, field 'id': is the id of {other.source} too; "
                "anchors, packs and scores go by it, so it must be unique in a split"
            )
        longest = len(builder.prompt(record))
        if training and o.shows_privileged and "trace" in o.privileged:
            longest = len(builder.privileged_prompt(record))
        if training and o.shows_privileged and "hint" in o.privileged:
            hint_of(record)
        if training and o.sft_targets != "none":
            longest = max(longest, len(builder.trace(record)))
        if longest > limit:
            raise ValueError(
                f"{record.source}: record {record.id!r}, field 'prompt': {longest} tokens, the limit "
                f"is {limit}: raise rollout.max_prompt_length, or shorten the prompt or the trace"
            )
    if not records:
        raise ValueError(f"split {split!r} of environment {config.env.name!r} has no records")
    return records


def batch_records(records: Sequence[Record], step: int, size: int, seed: int) -> list[Record]:
    """The `size` prompts of a step: epochs over the records, each in an order of its own; a pure function."""
    out = []
    for position in range(step * size, (step + 1) * size):
        epoch, offset = divmod(position, len(records))
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        out.append(records[int(torch.randperm(len(records), generator=generator)[offset])])
    return out
