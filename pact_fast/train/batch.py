"""From weighted sequences to the loss of one pack after another.

All normalisation is in the weights (train/samples.py): the loss does not depend on how the samples are cut
into packs, micro-batches or ranks (docs/method.md, "The loss of a step").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pact_fast.config import ObjectiveConfig
from pact_fast.distributed import Sharded
from pact_fast.ops import PactLossOutput, linear_pact_loss
from pact_fast.train.distill import pack_distillation
from pact_fast.train.forwards import in_part, plan_forwards, rounds_of
from pact_fast.train.samples import Sample
from pact_fast.train.teacher import Teacher
from pact_fast.tree.families import attention_pairs
from pact_fast.tree.packing import TreePack, pack_linear, pack_tree
from pact_fast.tree.policy import Policy
from pact_fast.tree.router import RouterLoad, balance_loss, first_uses
from pact_fast.tree.streaming import Part, Prefix


@dataclass
class PackLoss:
    """Loss of one pack; `output` is of the live tokens of `samples`, one after another (None without any)."""

    samples: list[Sample]
    num_tokens: int
    num_pairs: int  # of a token and one it attends to, over all layers
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    output: PactLossOutput | None = None
    router_loss: Tensor | None = None  # part of `loss`; of models whose config asks for it
    distill_loss: Tensor | None = None  # part of `loss`; where distributions are distilled
    divergences: Tensor | None = None  # [pairs], before weight and clip
    divergence_clip: float = float("inf")

    def policy_rows(self) -> Tensor:
        """bool [rows of output]: those of rollouts; the others are of traces."""
        return torch.cat([torch.full((len(s.live()),), s.is_policy) for s in self.samples])

    @classmethod
    def of(cls, policy: Policy, pack: TreePack, samples: list[Sample]) -> PackLoss:
        """Not computed yet."""
        return cls(samples, pack.num_tokens, attention_pairs(policy.family, pack.position_ids))


def pack_losses(
    policy: Policy,
    samples: Sequence[Sample],
    objective: ObjectiveConfig,
    *,
    token_budget: int,
    packing: str = "tree",
    temperature: float = 1.0,
    prefix: str = "auto",
    impl: str = "auto",
    sharded: Sharded | None = None,
    teacher: Teacher | None = None,
) -> Iterator[PackLoss]:
    """Yields the loss of one pack after another; call backward on each before taking the next.

    Args:
        policy: the model.
        samples: sequences with their weights; the sum of all yielded losses is the loss of the batch.
        token_budget: packed tokens a forward may hold.
        packing: "tree" shares prefixes, "none" lays every sequence out alone.
        temperature: of the rollouts; traces are always scored at 1.
        prefix: of a record whose tree is over the budget: "stream", "recompute" or "auto" (`plan_forwards`).
        sharded: with several ranks each takes its share of the packs, equally many: where they do not go
            round, a rank gets an empty one, whose loss and gradient are exactly zero.
        teacher: weights that read the contexts of samples whose distributions are distilled; None: the
            policy's own, in the same pass.
    """
    tree, live = packing == "tree", teacher is None
    plan, streamed = plan_forwards(
        policy.family, samples, token_budget, share=tree, prefix=prefix, live_teacher=live
    )
    rounds = rounds_of(streamed, sharded)
    if sharded is not None:
        plan = sharded.world.rounds("update", plan, [])
    backwards = len(plan) + sum(len(split.parts) + 1 for _, split in rounds)

    def lay_out(indices: Sequence[int]) -> TreePack:
        ids = [samples[i].ids for i in indices]
        if live:
            ids += [samples[i].teacher_ids for i in indices if len(samples[i].distilled())]
        return (pack_tree if tree else pack_linear)(ids or [torch.zeros(1, dtype=torch.int64)])

    def run(compute: Callable[[], Tensor], *, last: bool | None = None) -> Tensor:
        """Where the head's weight is whole; `last`: whether the backward of what comes out is the last."""
        if sharded is None:
            return compute()
        if last is not None:
            sharded.sync_gradients(last)
        return sharded.run(compute)

    balance = None
    if plan and policy.family.router_coef:
        balance = _Balance.of(policy, samples, plan, lay_out, sharded)
    loss = partial(_rows_loss, policy, objective, impl)
    distill = partial(
        pack_distillation,
        policy,
        objective=objective,
        temperature=temperature,
        impl=impl,
        teacher=teacher,
    )
    for number, indices in enumerate(plan):
        chosen = [samples[i] for i in indices]
        pack = lay_out(indices)
        out = PackLoss.of(policy, pack, chosen)
        out.divergence_clip = objective.distillation_clip or out.divergence_clip
        compute = partial(_pack_loss, policy, pack, loss, distill, out, temperature, balance, indices)
        out.loss = run(compute, last=number == backwards - 1)
        yield out
    done = len(plan)
    for indices, split in rounds:
        chosen = [samples[i] for i in indices]
        above: list[Prefix] = []

        def trunk_hidden(trunk: TreePack = split.trunk, above: list[Prefix] = above) -> Tensor:
            above.append(policy.prefix(trunk))
            return above[0].hidden

        run(trunk_hidden)
        for part in split.parts:
            done += 1
            out = PackLoss.of(policy, part.pack, in_part(chosen, part.pack))
            out.loss = run(
                partial(_part_loss, policy, part, above[0], loss, out, temperature), last=done == backwards
            )
            yield out
        done += 1
        out = PackLoss.of(policy, split.trunk, in_part(chosen, split.trunk))
        out.loss = run(
            partial(_trunk_loss, policy, above[0], split.trunk, loss, out, temperature),
            last=done == backwards,
        )
        yield out


@dataclass
class _Balance:
    """What the router's auxiliary loss needs of all packs of all ranks, before the first backward."""

    new: list[Tensor]  # per sample, bool [L]: tokens that count here and not in another sample
    counts: Tensor  # [E]
    routings: int

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        policy: Policy,
        samples: Sequence[Sample],
        plan: Sequence[Sequence[int]],
        lay_out: Callable[[Sequence[int]], TreePack],
        sharded: Sharded | None,
    ) -> _Balance:
        """Costs one more forward of every pack: see tree/router.py."""
        out = cls(first_uses([s.ids for s in samples]), torch.zeros(0), 0)
        loads: list[RouterLoad] = []

        def forward(pack: TreePack, counted: Tensor) -> Tensor:
            hidden, load = policy.hidden_and_load(pack, counted)
            loads.append(load)
            return hidden

        for indices in plan:
            pack = lay_out(indices)
            compute = partial(forward, pack, out.counted(pack, indices))
            _ = compute() if sharded is None else sharded.run(compute)
        mine = [(load.counts.cpu(), load.routings) for load in loads]
        counts, routings = zip(*(mine if sharded is None else sharded.world.concat(mine)), strict=True)
        out.counts, out.routings = torch.stack(counts).sum(0).to(policy.device), sum(routings)
        return out

    def counted(self, pack: TreePack, indices: Sequence[int]) -> Tensor:
        """Which tokens of the pack of these samples count, bool [T]; none of an empty one."""
        mask = torch.zeros(pack.num_tokens, dtype=torch.bool)
        for i, index in zip(indices, pack.token_index, strict=False):
            mask[index[self.new[i]]] = True
        return mask


def _pack_loss(
    policy: Policy,
    pack: TreePack,
    loss: Callable[..., list[Tensor]],
    distill: Callable[..., tuple[Tensor, Tensor] | None],
    out: PackLoss,
    temperature: float,
    balance: _Balance | None,
    indices: Sequence[int],
) -> Tensor:
    """Loss of one pack; its outputs, what is distilled and its part of the router's auxiliary loss, where
    `balance` is given, go into `out`; `indices`: of the samples."""
    rows = _loss_rows(pack, out.samples, temperature, policy.device)
    if balance is None:
        hidden = policy.hidden(pack)
    else:
        hidden, load = policy.hidden_and_load(pack, balance.counted(pack, indices))
        out.router_loss = policy.family.router_coef * balance_loss(
            load.probs, balance.counts, balance.routings
        )
    parts = loss(rows, hidden, out)
    if (taught := distill(hidden=hidden, pack=pack, samples=out.samples)) is not None:
        parts.append(taught[0])
        out.distill_loss, out.divergences = taught[0].detach(), taught[1]
    if out.router_loss is not None:
        parts.append(out.router_loss)
    return torch.stack(parts).sum()


def _part_loss(
    policy: Policy,
    part: Part,
    above: Prefix,
    loss: Callable[..., list[Tensor]],
    out: PackLoss,
    temperature: float,
) -> Tensor:
    rows = _loss_rows(part.pack, out.samples, temperature, policy.device)
    return torch.stack(loss(rows, policy.hidden_behind(part, above), out)).sum()


def _trunk_loss(
    policy: Policy,
    above: Prefix,
    trunk: TreePack,
    loss: Callable[..., list[Tensor]],
    out: PackLoss,
    temperature: float,
) -> Tensor:
    total = torch.stack(
        loss(_loss_rows(trunk, out.samples, temperature, policy.device), above.hidden, out)
    ).sum()
    return above.send_back(total)


def _rows_loss(
    policy: Policy,
    objective: ObjectiveConfig,
    impl: str,
    rows: dict[str, Any],
    hidden: Tensor,
    out: PackLoss,
) -> list[Tensor]:
    """The loss of a pack's rows in a list of one; the op's output goes into `out`, without a gradient."""
    if not rows:  # Ranks must exchange the same gradients: the head's is there too, as zeros.
        return [t.sum() * 0.0 for t in (hidden, *policy.head[:2]) if t is not None]
    output = _call_op(policy, hidden, rows, objective, impl)
    out.output = output._replace(loss=output.loss.detach())
    return [output.loss]


def _loss_rows(
    pack: TreePack, samples: Sequence[Sample], temperature: float, device: torch.device
) -> dict[str, Any]:
    """Per-row arguments of `linear_pact_loss`: a pack's live tokens, sample by sample; empty without any.

    A trace's rows have policy weight 0 and temperature 1; what only rollouts have is 0 there.
    """
    rows: dict[str, list[Tensor]] = {}
    kinds = {s.is_policy for s in samples if len(s.live())}
    if not kinds:
        return {}
    names = ["policy_weight", "advantages"] * (True in kinds) + ["sft_weight"] * (False in kinds)
    names += [
        name
        for name in ("old_logprobs", "ref_logprobs")
        if any(s.is_policy and getattr(s, name) is not None for s in samples)
    ]
    for sample, index in zip(samples, pack.token_index, strict=False):  # teachers' sequences are behind
        live = sample.live()
        values = {"target": sample.ids[live], "row_index": index[live - 1]}
        for name in names:
            value = getattr(sample, name)
            if value is None and sample.is_policy:
                raise ValueError(f"{name} is missing in a rollout of {sample.record_id}, but not in others")
            values[name] = torch.zeros(len(live)) if value is None else value[live]
        if temperature != 1.0:
            values["temperature"] = torch.full((len(live),), temperature if sample.is_policy else 1.0)
        for name, value in values.items():
            rows.setdefault(name, []).append(value)
    return {name: torch.cat(value).to(device) for name, value in rows.items()}


def _call_op(
    policy: Policy, hidden: Tensor, rows: dict[str, Any], objective: ObjectiveConfig, impl: str
) -> PactLossOutput:
    head, temperature = policy.head, rows.pop("temperature", 1.0)
    return linear_pact_loss(
        hidden,
        head.weight,
        **rows,
        epsilon_low=objective.epsilon,
        epsilon_high=objective.epsilon if objective.epsilon_high is None else objective.epsilon_high,
        dual_clip=objective.dual_clip,
        beta=objective.beta if "policy_weight" in rows else 0.0,
        entropy_coef=objective.entropy_coef if "policy_weight" in rows else 0.0,
        impl=impl,
        **head.options(temperature),
    )
