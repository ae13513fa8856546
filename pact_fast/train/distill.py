"""Distillation of distributions: the divergence of each position of y under x from the same one under c.

A live teacher's rows lie in the policy's own pack: x and c of one rollout are branches of one tree, so x, h
and two times y go through the model once. Other weights take a second forward over c and y, which shares its
prefixes, too. The teacher has no gradient either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pact_fast.objective import ObjectiveConfig
from pact_fast.ops import linear_divergence
from pact_fast.train.samples import Sample
from pact_fast.train.teacher import Teacher
from pact_fast.tree.families import HeadParams
from pact_fast.tree.packing import TreePack, pack_tree
from pact_fast.tree.policy import Policy


@dataclass
class Pairs:
    """Rows of a student and of its teacher that belong together, and the weight of each pair: [R]."""

    student: Tensor
    teacher: Tensor
    weight: Tensor

    @classmethod
    def of(cls, samples: Sequence[Sample], own: Sequence[Tensor], theirs: Sequence[Tensor]) -> Pairs:
        """own: where each sample's tokens lie (`TreePack.token_index`); theirs: its `teacher_ids`'."""
        students, teachers, weights = [], [], []
        for sample, index, other in zip(samples, own, theirs, strict=True):
            rows = sample.distilled()
            assert sample.distill_weight is not None
            students.append(index[rows - 1])
            teachers.append(other[rows - 1 + len(other) - len(index)])
            weights.append(sample.distill_weight[rows])
        return cls(torch.cat(students), torch.cat(teachers), torch.cat(weights))


def distillation_loss(
    hidden: Tensor,
    head: HeadParams,
    pairs: Pairs,
    objective: ObjectiveConfig,
    temperature: float,
    impl: str,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted divergence [] and that of each pair [R], before weight and clip."""
    loss, divergences = linear_divergence(
        hidden,
        head.weight,
        pairs.student.to(hidden.device),
        pairs.teacher.to(hidden.device),
        kind=objective.distillation,
        beta=objective.distillation_beta,
        top_k=objective.distillation_topk,
        row_weight=pairs.weight.to(hidden.device),
        clip=objective.distillation_clip,
        temperature=temperature / head.scale,
        teacher_temperature=temperature / head.scale,
        softcap=head.softcap,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        return_rows=True,
        impl=impl,
    )
    return loss, divergences


def teacher_pack(samples: Sequence[Sample]) -> TreePack:
    """c and y of those that have a teacher, as one tree; of one token where none has: ranks run equally many
    forwards."""
    return pack_tree([s.teacher_ids for s in samples] or [torch.zeros(1, dtype=torch.int64)])


def pack_distillation(
    policy: Policy,
    hidden: Tensor,
    pack: TreePack,
    samples: Sequence[Sample],
    objective: ObjectiveConfig,
    temperature: float,
    impl: str,
    teacher: Teacher | None,
) -> tuple[Tensor, Tensor] | None:
    """The distillation loss of a pack and its divergences; None where no sample of it is distilled.

    pack: of the tokens of `samples`, and behind them, with a live teacher, of the `teacher_ids` of those that
    are distilled.
    """
    if not objective.diverges:
        return None
    chosen = [(s, index) for s, index in zip(samples, pack.token_index, strict=False) if len(s.distilled())]
    learning, own = [s for s, _ in chosen], [index for _, index in chosen]
    arguments = (objective, temperature, impl)
    if teacher is None:
        if not learning:
            return None
        pairs = Pairs.of(learning, own, pack.token_index[len(samples) :])
        return distillation_loss(hidden, policy.head, pairs, *arguments)
    read = teacher_pack(learning)
    made: list[tuple[Tensor, Tensor]] = []

    def compare() -> Tensor:
        with teacher.reading():
            theirs, head = teacher.policy.hidden(read), teacher.policy.head
        if learning:
            pairs = Pairs.of(learning, own, read.token_index)
            other = () if teacher.policy is policy else (head.weight,)  # adapters off: the head is the same
            made.append(distillation_loss(hidden, policy.head, pairs, *arguments, theirs, *other))
        # The loss goes past FSDP: its hooks would fetch the teacher's weights in the backward, where no rank
        # needs them and not every rank has a loss.
        return torch.zeros(())

    _ = compare() if teacher.policy is policy else teacher.sharded.run(compare)
    return made[0] if made else None


def check_head(head: HeadParams, objective: ObjectiveConfig) -> None:
    """ValueError where the model's head is none that distributions can be distilled through."""
    if objective.diverges and head.bias is not None:
        raise ValueError(
            f"objective.distillation={objective.distillation}: this model's LM head has a bias, which "
            "divergences do not know: use sampled or modulate"
        )
