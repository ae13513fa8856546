"""Which records a run uses, checked before training begins, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pact_fast.batch import SampleBuilder
from pact_fast.config import Config
from pact_fast.data.records import Record, load_records
from pact_fast.envs.base import ToolEnv


def load_split(config: Config, env: ToolEnv, builder: SampleBuilder, split: str) -> list[Record]:
    """Records of "train", "validation" or "test": a file of the config's, else the environment's own.

    Raises ValueError where a record is malformed, its prompt (with the trace, in training) is past
    `rollout.max_prompt_length`, or the split is empty.
    """
    path = getattr(config.env, f"{split}_file")
    o = config.objective
    with_trace = split == "train" and (o.rl_context == "trace" or o.sft_targets != "none")
    if path is None:
        records = env.records(split)
    else:
        loaded = load_records(path, require_trace=with_trace, skip_bad=config.env.skip_bad_records)
        records = list(loaded.records)
        if loaded.skipped:
            print(f"{path}: skipped {len(loaded.skipped)} bad records:", *loaded.skipped, sep="\n  ")
    limit = config.rollout.max_prompt_length
    for record in records:
        longest = len(builder.privileged_prompt(record)) if with_trace else len(builder.prompt(record))
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
