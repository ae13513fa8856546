"""Rollouts of a step over the ranks of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pact_fast.data.chat import ChatFormat, Tokens
from pact_fast.data.records import Record
from pact_fast.distributed import Sharded
from pact_fast.envs.base import ToolEnv
from pact_fast.rollout.engine import Engine, RolloutError
from pact_fast.rollout.loop import Rollout, collect_rollouts


def spread_rollouts(
    sharded: Sharded,
    engine: Engine,
    env: ToolEnv,
    chat: ChatFormat,
    records: Sequence[Record],
    *,
    num_generations: int,
    prompts: Sequence[Tokens],
    row_seeds: bool = False,
    **options: Any,
) -> list[Rollout]:
    """`collect_rollouts`, a share of the records a rank; all rollouts, in order, come back on every one.

    row_seeds: draw in one process as several ranks do, each rollout from a seed of its own.
    RolloutError on every rank where one of them has no rollouts.
    """
    world = sharded.world
    engine.prepare()
    if not world.distributed:
        return collect_rollouts(
            engine,
            env,
            chat,
            records,
            num_generations=num_generations,
            prompts=prompts,
            keys=range(len(records)) if row_seeds or engine.row_seeds else None,
            **options,
        )
    mine, problem = [], None
    try:
        with sharded.whole():
            mine = collect_rollouts(
                engine,
                env,
                chat,
                world.mine(records),
                num_generations=num_generations,
                prompts=world.mine(prompts),
                keys=world.mine(range(len(records))),
                **options,
            )
    except RolloutError as error:  # the others must not wait for rollouts that never come
        problem = str(error)
    if first := next(filter(None, world.gather(problem)), None):
        raise RolloutError(first)
    groups = [mine[i : i + num_generations] for i in range(0, len(mine), num_generations)]
    return [rollout for group in world.join(groups) for rollout in group]
