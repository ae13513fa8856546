"""A training step on a tree over the budget: what its sequences share streamed once, or in every pack."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from bench.registry import Run
from bench.rows import Rows
from bench.runner import DEVICE, DTYPE, GPU, memory, reason, timings
from bench.tree_model import check_equal, make_model
from pact_fast import Policy
from pact_fast.objective import ObjectiveConfig
from pact_fast.train.batch import pack_losses
from pact_fast.train.samples import Sample

WAYS = ("stream", "recompute")


@dataclass(frozen=True)
class Over:
    """`prefix` tokens that all `group` rollouts of `y` tokens share, and the budget of one forward."""

    prefix: int
    y: int
    group: int
    budget: int

    def __str__(self) -> str:
        return f"prefix={self.prefix} y={self.y} G={self.group} budget={self.budget}"


# The paper's lengths on a GPU; on a CPU a prefix of 60% of a pack.
SIZES = (Over(10_000, 16_000, 8, 30_000),) if GPU else (Over(600, 400, 8, 1000),)


def samples_of(size: Over, vocab: int) -> list[Sample]:
    draw = torch.Generator().manual_seed(0)
    head = torch.randint(vocab, (size.prefix,), generator=draw)
    out = []
    for _ in range(size.group):
        ids = torch.cat((head, torch.randint(vocab, (size.y,), generator=draw)))
        weight, zero = torch.zeros(2, len(ids))
        weight[size.prefix :] = 1 / (size.group * size.y)
        advantages = torch.randn(len(ids), generator=draw)
        out.append(Sample("one", ids, weight, advantages, zero, engine_logprobs=zero))
    return out


def step(policy: Policy, samples: list[Sample], size: Over, way: str) -> dict[str, torch.Tensor]:
    policy.model.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=DEVICE)
    for pack in pack_losses(policy, samples, ObjectiveConfig(), token_budget=size.budget, prefix=way):
        pack.loss.backward()
        loss += pack.loss.detach()
    layer = policy.model.model.layers[0].self_attn  # type: ignore[union-attr]
    return {"loss": loss, "grad": layer.k_proj.weight.grad}


def bench_streaming(out: Rows, seconds: float, least: int = 5, sizes: Sequence[Over] = SIZES) -> None:
    model = make_model()
    policy = Policy(model, gradient_checkpointing="keep_attention" if GPU else "none", kernels="auto")
    for size in sizes:
        if out.has("train_step_over_budget", "whole", size):
            continue
        samples = samples_of(size, model.config.vocab_size)
        runs: dict[str, Run] = {f"pact_fast/{way}": partial(step, policy, samples, size, way) for way in WAYS}
        failed = check_equal(runs)
        runs = {name: run for name, run in runs.items() if name not in failed}
        kinds, more = timings(runs, DEVICE, seconds, least)
        failed |= more
        add = partial(out.add, "train_step_over_budget", mode="whole", shape=size, dtype=DTYPE)
        for kind, times in kinds.items():
            for name, values in times.items():
                add(name=name, metric=kind, unit="ms", values=values)
            if len(times) == len(WAYS):
                slow, fast = (times[f"pact_fast/{way}"] for way in ("recompute", "stream"))
                ratios = [a / b for a, b in zip(slow, fast, strict=True)]
                add(name="pact_fast/recompute", metric=f"{kind} over the streamed", unit="x", values=ratios)
        for name in kinds["time"] if GPU else ():
            try:
                add(name=name, metric="peak_memory", unit="GiB", values=[memory(runs[name])["peak_memory"]])
            except Exception as error:
                failed[name] = reason(error)
        for name, why in failed.items():
            out.leave_out(f"train_step_over_budget {size}", name, why)
