"""The rollouts of a training step: what decides them beside the weights, and who samples them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pact_fast.batch import SampleBuilder
from pact_fast.config import Config
from pact_fast.data.records import Record
from pact_fast.distributed import Sharded
from pact_fast.envs.base import ToolEnv
from pact_fast.rollout import Engine, Rollout, RolloutLimits, sample_share, spread_rollouts
from pact_fast.tasks import batch_records


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
        """Rollouts with the present weights, all of them on every rank."""
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
            "row_seeds": config.row_seeds,
        }
