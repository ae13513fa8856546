"""One pass without gradient over both contexts of a step's rollouts: old log-probs, and what they tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pact_fast.batch import Sample, SampleBuilder
from pact_fast.data.records import Record
from pact_fast.distributed import Sharded, World
from pact_fast.policy import Policy
from pact_fast.scoring import sequence_logprobs


@torch.no_grad()
def score_rollouts(
    policy: Policy,
    builder: SampleBuilder,
    samples: Sequence[Sample],
    records: Mapping[str, Record],
    *,
    temperature: float,
    token_budget: int,
    sharded: Sharded | None = None,
) -> dict[str, float]:
    """Fills `old_logprobs` of every policy sample that has none, under its own context; returns the gauges.

    Returns:
        `pact/engine_gap`, `pact/engine_gap_max`: |engine - trainer|, prompt-only, sampled tokens.
        `pact/trace_gain`: mean of log pi(y|x,h) - log pi(y|x) over sampled tokens of the rollouts that are
        trained under the trace (METHOD section 7). Empty without policy samples.
    """
    chosen = [s for s in samples if s.is_policy]
    if not chosen:
        return {}
    prompts = {s.record_id: torch.tensor(builder.prompt(records[s.record_id]).ids) for s in chosen}
    heads = [
        len(prompts[s.record_id]) if s.prompt_only else len(builder.privileged_prompt(records[s.record_id]))
        for s in chosen
    ]
    bare = [torch.cat([prompts[s.record_id], s.ids[head:]]) for s, head in zip(chosen, heads, strict=True)]
    sequences = [s.ids for s in chosen] + bare
    # A rank scores the prompts that are its own, so that their sequences still share a tree.
    place = {record_id: i for i, record_id in enumerate(prompts)}
    sharded = sharded or Sharded(policy.model, World())
    world = sharded.world
    mine = [
        i
        for i in range(len(sequences))
        if place[chosen[i % len(chosen)].record_id] % world.size == world.rank
    ]
    with sharded.whole():
        part = sequence_logprobs(
            policy, [sequences[i] for i in mine], temperature=temperature, token_budget=token_budget
        )
    found = world.gather({i: scores.cpu() for i, scores in zip(mine, part, strict=True)})
    scored = {i: scores for share in found for i, scores in share.items()}
    gains, gaps = [], []
    for i, (sample, head) in enumerate(zip(chosen, heads, strict=True)):
        in_context = torch.cat([torch.zeros(1), scored[i]])
        if sample.old_logprobs is None:
            sample.old_logprobs = in_context
        prompt_only = scored[len(chosen) + i][len(prompts[sample.record_id]) - 1 :]
        sampled = sample.policy_weight[head:] != 0
        assert sample.engine_logprobs is not None
        gaps.append((prompt_only - sample.engine_logprobs[head:])[sampled].abs())
        if not sample.prompt_only:
            gains.append((in_context[head:] - prompt_only)[sampled])
    gap = torch.cat(gaps)
    row = {"pact/engine_gap": float(gap.mean()), "pact/engine_gap_max": float(gap.max())}
    if gains:
        row["pact/trace_gain"] = float(torch.cat(gains).mean())
    return row
