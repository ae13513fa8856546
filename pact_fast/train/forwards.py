"""Which forwards a batch takes, on which rank: packs of whole trees, and larger trees as trunk and parts.

Planned alike on every rank from the same samples. Nothing here computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pact_fast.distributed import Sharded
from pact_fast.tree.families import Family, attention_pairs, model_flops
from pact_fast.tree.packing import TreePack, pack_tree, plan_packs
from pact_fast.tree.streaming import SplitTree, empty_part, empty_split, split_tree

if TYPE_CHECKING:
    from pact_fast.train.samples import Sample


def plan_forwards(
    family: Family,
    samples: Sequence[Sample],
    token_budget: int,
    *,
    share: bool = True,
    prefix: str = "auto",
    live_teacher: bool = True,
) -> tuple[list[list[int]], list[tuple[list[int], SplitTree]]]:
    """Samples of every pack, and of every record whose tree is streamed, with its trunk and parts.

    prefix: what happens to a record's tree over the budget: "recompute" cuts it and computes its shared
    prefix in every pack, "stream" (tree/streaming.py) computes it once, "auto" takes what needs fewer
    operations. A record whose distributions are distilled is not streamed: student and teacher rows are
    compared in one forward.
    live_teacher: the teacher's sequences go through the same forward and count.
    """
    everyone = range(len(samples))
    paired = {s.record_id for s in samples if len(s.distilled())}
    if paired and prefix == "stream":
        raise ValueError("train.prefix=stream: distributions are not distilled in streamed trees; use auto")
    streamed: list[tuple[list[int], SplitTree]] = []
    by_record: dict[str, list[int]] = {}
    for i in everyone if share and prefix != "recompute" else ():
        if samples[i].record_id in paired:
            continue
        by_record.setdefault(samples[i].record_id, []).append(i)
    for members in by_record.values():
        ids = [samples[i].ids for i in members]
        pack = pack_tree(ids)
        split = split_tree(pack, token_budget) if pack.num_tokens > token_budget else None
        if split is None:
            continue
        if prefix == "auto":
            packs = [pack_tree([ids[i] for i in part]) for part in plan_packs(ids, token_budget)]
            pieces = [split.trunk, *(part.pack for part in split.parts)]
            if family.router_coef or _operations(family, pieces) >= _operations(family, packs):
                continue
        elif family.router_coef:
            raise ValueError(
                f"train.prefix=stream: the router's auxiliary loss of {family.name} is not streamed; "
                "use recompute"
            )
        streamed.append((members, split))
    gone = {i for members, _ in streamed for i in members}
    rest = [i for i in everyone if i not in gone]
    groups = [samples[i].record_id for i in rest]
    partners = [
        samples[i].teacher_ids if live_teacher and len(samples[i].distilled()) else None for i in rest
    ]
    plan = plan_packs(
        [samples[i].ids for i in rest], token_budget, groups=groups, share=share, partners=partners
    )
    return [[rest[i] for i in indices] for indices in plan], streamed


def _operations(family: Family, packs: Sequence[TreePack]) -> float:
    tokens = sum(pack.num_tokens for pack in packs)
    return model_flops(family, tokens, sum(attention_pairs(family, p.position_ids) for p in packs), 0)


def rounds_of(
    streamed: Sequence[tuple[list[int], SplitTree]], sharded: Sharded | None
) -> list[tuple[list[int], SplitTree]]:
    """This rank's share of the streamed trees, each with as many parts as the other ranks' have at that time:
    ranks exchange weights and gradients in every forward and backward, so all must run equally many."""
    size, rank = (sharded.world.size, sharded.world.rank) if sharded is not None else (1, 0)
    out = []
    for first in range(0, len(streamed), size):
        together = streamed[first : first + size]
        parts = max(len(split.parts) for _, split in together)
        indices, split = together[rank] if rank < len(together) else ([], empty_split(0))
        out.append(
            (indices, SplitTree(split.trunk, split.parts + [empty_part()] * (parts - len(split.parts))))
        )
    return out


def in_part(samples: Sequence[Sample], pack: TreePack) -> list[Sample]:
    """The samples with weights only where the predicting token is in this part."""
    out = []
    for sample, index in zip(samples, pack.token_index, strict=False):
        here = torch.zeros(len(sample.ids), dtype=torch.bool)
        here[1:] = index[:-1] >= 0
        out.append(
            replace(sample, policy_weight=sample.policy_weight * here, sft_weight=sample.sft_weight * here)
        )
    return out
