"""From rollouts and traces to loss rows: which sequences a step scores, and each token's weight.

All normalisation is in the weights, from global counts, before anything is packed: the loss does not depend
on how the samples are cut into packs, micro-batches or ranks (docs/method.md, "The loss of a step").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from pact_fast.config import ObjectiveConfig
from pact_fast.data.chat import ChatFormat, Tokens
from pact_fast.data.records import Record
from pact_fast.distributed import Sharded
from pact_fast.objective import (
    SFTStrength,
    policy_token_weight,
    sft_token_strengths,
    sft_token_weights,
)
from pact_fast.ops import PactLossOutput, linear_pact_loss
from pact_fast.rollout import Rollout
from pact_fast.train.forwards import in_part, plan_forwards, rounds_of
from pact_fast.tree.families import attention_pairs
from pact_fast.tree.packing import TreePack, pack_linear, pack_tree
from pact_fast.tree.policy import Policy
from pact_fast.tree.router import RouterLoad, balance_loss, first_uses
from pact_fast.tree.streaming import Part, Prefix

T = TypeVar("T")


@dataclass
class Sample:
    """One sequence and what it contributes. Every tensor is [L], aligned with `ids`; entry p speaks of
    predicting ids[p] from the tokens before it. A sample is either a rollout (policy_weight) or a trace
    (sft_weight)."""

    record_id: str
    ids: Tensor
    policy_weight: Tensor
    advantages: Tensor
    sft_weight: Tensor
    old_logprobs: Tensor | None = None
    engine_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    prompt_only: bool = False

    @property
    def is_policy(self) -> bool:
        return self.engine_logprobs is not None

    def live(self) -> Tensor:
        """Positions with a loss term."""
        return ((self.policy_weight != 0) | (self.sft_weight != 0)).nonzero()[:, 0]


def _made_once(made: dict[int, tuple[Record, T]], record: Record, make: Callable[[], T]) -> T:
    """What was made of this very record, or is now; the record is kept, so that its id stays its own."""
    if id(record) not in made:
        made[id(record)] = record, make()
    return made[id(record)][1]


class SampleBuilder:
    """Builds the samples of a step; the token form of prompts and traces is made once a record and kept."""

    def __init__(self, chat: ChatFormat, objective: ObjectiveConfig, max_completion_length: int) -> None:
        self.chat, self.objective, self.max_length = chat, objective, max_completion_length
        # By the record itself: ids are unique in a split, two files may well have the same ones.
        self._prompts: dict[int, tuple[Record, Tokens]] = {}
        self._traces: dict[int, tuple[Record, Tokens]] = {}
        self._privileged: dict[int, tuple[Record, list[int]]] = {}

    def prompt(self, record: Record) -> Tokens:
        """Tokens of x."""
        return _made_once(self._prompts, record, lambda: self.chat.prompt(record.prompt, record.tools))

    def privileged_prompt(self, record: Record) -> list[int]:
        """Token ids of c(x, h)."""
        return _made_once(self._privileged, record, lambda: self._context(record))

    def _context(self, record: Record) -> list[int]:
        messages = self.shown_trace(record)
        if self.objective.trace_context == "message":
            text = self.chat.render_trace(messages, observations=self.objective.trace_observations)
            return self.chat.prompt(record.prompt, record.tools, privileged=text).ids
        # h ends on a tool response (or a request), and so on the header that the rollout's first turn
        # follows.
        return (self.prompt(record) + self.chat.trace(messages)).ids

    def shown_trace(self, record: Record) -> list[dict]:
        """The messages of h: what of the expert's trace the objective lets through."""
        o, messages = self.objective, list(record.expert_trace)
        last = messages[-1] if messages else {"role": None}
        if not o.trace_answer and last["role"] == "assistant" and not last.get("tool_calls"):
            messages = messages[:-1]
        shown = []
        for message in messages:
            if message["role"] == "tool" and not o.trace_observations:
                message = {**message, "content": ""}
            elif message["role"] == "assistant" and not (o.trace_reasoning and o.trace_calls):
                left_out = [("reasoning_content", "", o.trace_reasoning), ("tool_calls", [], o.trace_calls)]
                message = message | {key: empty for key, empty, kept in left_out if not kept}
            shown.append(message)
        return shown

    def trace(self, record: Record) -> Tokens:
        """x + h as one token sequence with components."""
        return _made_once(
            self._traces, record, lambda: self.prompt(record) + self.chat.trace(self.shown_trace(record))
        )

    def rollout_samples(
        self,
        rollouts: Sequence[Rollout],
        advantages: Sequence[Tensor],
        anchored: dict[str, bool],
        scale: float,
        group: int,
    ) -> list[Sample]:
        """One sample a rollout, under c(x,h) or, where its prompt is anchored, under x.

        Args:
            rollouts: of a mini-batch, the `group` ones of a prompt beside each other.
            advantages: per rollout, one value a turn.
            anchored: per record id, whether the prompt-only ratio stands in for the trace-conditioned one.
            scale: factor on the whole policy term (1, or 1 - mu).
        """
        counts = [r.num_sampled for r in rollouts]
        in_context = self.objective.ratio_denominator == "context"
        under_x = self.objective.rl_context != "trace"
        samples = []
        for i, (rollout, advantage) in enumerate(zip(rollouts, advantages, strict=True)):
            record = rollout.record
            prompt_only = under_x or anchored[record.id]
            head = rollout.prompt.ids if prompt_only else self.privileged_prompt(record)
            first = i - i % group
            weight = scale * policy_token_weight(
                self.objective.normalization,
                counts[i],
                total_tokens=sum(counts),
                num_sequences=len(rollouts),
                max_length=self.max_length,
                prompt_tokens=sum(counts[first : first + group]),
                num_prompts=len(rollouts) // group,
            )
            start = len(head)
            ids = torch.tensor([*head, *rollout.token_ids])
            policy_weight, values, engine = torch.zeros(3, len(ids))
            policy_weight[start:] = torch.tensor(rollout.sampled).float() * weight
            values[start:] = advantage[torch.tensor(rollout.turns)]
            engine[start:] = torch.tensor(rollout.logprobs)
            samples.append(
                Sample(
                    record.id,
                    ids,
                    policy_weight,
                    values,
                    torch.zeros(len(ids)),
                    old_logprobs=None if in_context else engine,
                    engine_logprobs=engine,
                    prompt_only=prompt_only,
                )
            )
        return samples

    def trace_samples(
        self, records: Sequence[Record], strength: SFTStrength, scale: float, anchored: dict[str, bool]
    ) -> list[Sample]:
        """One sample a record of the mini-batch that has an SFT term: teacher forcing of h after x.

        Args:
            anchored: per record id; such a record has no SFT term (unless `sft_on_anchored`) but counts as a
                prompt of the batch.
            scale: factor on the whole SFT term.
        """
        taught = [r for r in records if self.objective.sft_on_anchored or not anchored[r.id]]
        tokens = [self.trace(r) for r in taught]
        strengths = [sft_token_strengths(t.components, t.turns, t.levels, strength) for t in tokens]
        weights = sft_token_weights(strengths, self.objective.sft_normalization, len(records))
        return [
            Sample(
                record.id,
                torch.tensor(t.ids),
                torch.zeros(len(t)),
                torch.zeros(len(t)),
                w * scale,
            )
            for record, t, w in zip(taught, tokens, weights, strict=True)
        ]


def needed(sample: Sample, objective: ObjectiveConfig) -> bool:
    """Whether a sample can change the loss or its gradient."""
    if not sample.is_policy:
        return bool((sample.sft_weight != 0).any())
    if not objective.skip_zero_advantage or objective.entropy_coef or objective.beta:
        return True
    return bool(((sample.advantages != 0) & (sample.policy_weight != 0)).any())


def trim(sample: Sample) -> Sample:
    """Drops the tokens behind the last one with a loss term: they are predicted by nobody and seen by
    nobody."""
    live = sample.live()
    end = int(live[-1]) + 1 if len(live) else 1
    cut: dict[str, Any] = {k: v[:end] for k, v in vars(sample).items() if isinstance(v, Tensor)}
    return replace(sample, **cut)


@dataclass
class PackLoss:
    """Loss of one pack; `output` is of the live tokens of `samples`, one after another (None without any)."""

    samples: list[Sample]
    num_tokens: int
    num_pairs: int  # of a token and one it attends to, over all layers
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    output: PactLossOutput | None = None
    router_loss: Tensor | None = None  # part of `loss`; of models whose config asks for it

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
    """
    tree = packing == "tree"
    plan, streamed = plan_forwards(policy.family, samples, token_budget, share=tree, prefix=prefix)
    rounds = rounds_of(streamed, sharded)
    if sharded is not None:
        plan = sharded.world.rounds("update", plan, [])
    backwards = len(plan) + sum(len(split.parts) + 1 for _, split in rounds)

    def lay_out(indices: Sequence[int]) -> TreePack:
        ids = [samples[i].ids for i in indices] or [torch.zeros(1, dtype=torch.int64)]
        return (pack_tree if tree else pack_linear)(ids)

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
    for number, indices in enumerate(plan):
        chosen = [samples[i] for i in indices]
        pack = lay_out(indices)
        out = PackLoss.of(policy, pack, chosen)
        compute = partial(_pack_loss, policy, pack, loss, out, temperature, balance, indices)
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
    out: PackLoss,
    temperature: float,
    balance: _Balance | None,
    indices: Sequence[int],
) -> Tensor:
    """Loss of one pack; its outputs and its part of the router's auxiliary loss, where `balance` is given, go
    into `out`; `indices`: of the samples."""
    rows = _loss_rows(pack, out.samples, temperature, policy.device)
    if balance is None:
        return torch.stack(loss(rows, policy.hidden(pack), out)).sum()
    hidden, load = policy.hidden_and_load(pack, balance.counted(pack, indices))
    out.router_loss = policy.family.router_coef * balance_loss(load.probs, balance.counts, balance.routings)
    return torch.stack([*loss(rows, hidden, out), out.router_loss]).sum()


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
    for sample, index in zip(samples, pack.token_index, strict=True):
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
