"""Rollouts of a step over the ranks of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pact_fast.data.chat import ChatFormat, Tokens
from pact_fast.data.records import Record
from pact_fast.distributed import Sharded, World
from pact_fast.envs.base import ToolEnv
from pact_fast.rollout.engine import Engine, RolloutError
from pact_fast.rollout.loop import Rollout, collect_rollouts


def spread_rollouts(
    sharded: Sharded,
    engine: Engine,
    env: ToolEnv,
    chat: ChatFormat,
    records: Sequence[Record],
    **options: Any,
) -> list[Rollout]:
    """`collect_rollouts` with the current weights, a share of the records a rank; all rollouts, in order,
    come back on every one. Options as those of `sample_share`.

    RolloutError on every rank where one of them has no rollouts.
    """
    sharded.world.begin("rollouts", [record.id for record in records])
    engine.prepare()

    def share() -> list[Rollout]:
        return sample_share(sharded.world, engine, env, chat, records, **options)

    return join_shares(sharded.world, share, options["num_generations"])


def sample_share(
    world: World,
    engine: Engine,
    env: ToolEnv,
    chat: ChatFormat,
    records: Sequence[Record],
    *,
    prompts: Sequence[Tokens],
    **options: Any,
) -> list[Rollout]:
    """`collect_rollouts` of this rank's share of the records; exchanges nothing with other ranks."""
    return collect_rollouts(
        engine,
        env,
        chat,
        world.shard(records),
        prompts=world.shard(prompts),
        keys=world.shard(range(len(records))),
        **options,
    )


def join_shares(world: World, share: Callable[[], list[Rollout]], num_generations: int) -> list[Rollout]:
    """The shares of all ranks, in the order of one process, on every rank.

    share: gives this rank's. RolloutError on every rank where it raises one on any.
    """
    mine, problem = [], None
    try:
        mine = share()
    except RolloutError as error:  # the others must not wait for rollouts that never come
        if world.size == 1:
            raise
        problem = str(error)
    if first := next(filter(None, world.gather(problem)), None):
        raise RolloutError(first)
    groups = [mine[i : i + num_generations] for i in range(0, len(mine), num_generations)]
    return [rollout for group in world.join(groups) for rollout in group]
