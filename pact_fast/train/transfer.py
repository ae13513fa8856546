"""Transfer: does a step under c = [x; h] move the policy as the same step under x would?

PACT draws rollouts from x and takes the policy's gradient under c. What it teaches about x is the part of
that gradient which points the way of the gradient under x: the cosine of the two, over the same rollouts and
advantages. Whole, by layer, by the sign of the advantage, and by whether a token agrees with the trace (it is
at least as likely under c as under x) or departs from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from pact_fast.config import ObjectiveConfig
from pact_fast.data.records import Record
from pact_fast.train.batch import pack_losses
from pact_fast.train.old_logprobs import ContextScores, score_contexts
from pact_fast.train.samples import Sample, SampleBuilder, trim
from pact_fast.tree.policy import Policy

Gradient = dict[str, Tensor]  # by parameter


@dataclass(frozen=True)
class Transfer:
    """Cosines between the gradients under c and under x, and the length of the former over that of the
    latter.

    parts: "all", "positive", "negative" (advantages), "agree", "depart" (tokens), and the four crossed, as
    "negative depart". A part without a gradient is left out. layers: of "all", by layer. tokens: sampled
    tokens of each part.
    """

    parts: dict[str, float]
    ratios: dict[str, float]
    layers: dict[str, float]
    tokens: dict[str, int]


def context_transfer(
    policy: Policy,
    builder: SampleBuilder,
    samples: Sequence[Sample],
    records: Mapping[str, Record],
    *,
    temperature: float,
    token_budget: int,
) -> Transfer | None:
    """Measures transfer over those policy samples that are under c; None without any.

    On policy: every ratio is 1, whatever old log-probs the samples have. Leaves the model without gradients.

    Args:
        samples: of a step, with advantages and weights; nothing of them is changed.
        records: by id.
    """
    chosen = [s for s in samples if s.is_policy and not s.prompt_only]
    if not chosen:
        return None
    scores = score_contexts(
        policy, builder, chosen, records, temperature=temperature, token_budget=token_budget
    )
    objective = replace(builder.objective, beta=0.0, entropy_coef=0.0)
    cells: dict[tuple[str, str], tuple[Gradient, Gradient]] = {}
    tokens: dict[str, int] = {}
    for sign, way in product(("positive", "negative"), ("agree", "depart")):
        under_c = [_only(s, score, sign, way) for s, score in zip(chosen, scores, strict=True)]
        under_x = [
            _under_x(s, score, builder.prompt(records[s.record_id]).ids)
            for s, score in zip(under_c, scores, strict=True)
        ]
        tokens[f"{sign} {way}"] = sum(len(s.live()) for s in under_c)
        of_c, of_x = (
            _gradient(policy, part, objective, temperature=temperature, token_budget=token_budget)
            for part in (under_c, under_x)
        )
        cells[sign, way] = (of_c, of_x)
    sums = {f"{sign} {way}": pair for (sign, way), pair in cells.items()}
    for name, place in (("positive", 0), ("negative", 0), ("agree", 1), ("depart", 1), ("all", None)):
        inside = [key for key in cells if place is None or key[place] == name]
        sums[name] = (_total(cells[k][0] for k in inside), _total(cells[k][1] for k in inside))
        tokens[name] = sum(tokens[" ".join(key)] for key in inside)
    parts, ratios = {}, {}
    for name, (of_c, of_x) in sums.items():
        found = _cosine(of_c, of_x)
        if found is not None:
            parts[name], ratios[name] = found
    of_c, of_x = sums["all"]
    layers = {}
    for layer in dict.fromkeys(_layer(name) for name in of_c):
        names = [name for name in of_c if _layer(name) == layer]
        found = _cosine({n: of_c[n] for n in names}, {n: of_x[n] for n in names})
        if found is not None:
            layers[layer] = found[0]
    return Transfer(parts, ratios, layers, tokens)


def transfer_metrics(found: Transfer | None) -> dict[str, float]:
    """`pact/context_transfer` and its splits for metrics.jsonl; empty without a measurement."""
    if found is None:
        return {}
    names = {
        "all": "",
        "positive": "_positive",
        "negative": "_negative",
        "agree": "_agree",
        "depart": "_depart",
    }
    return {f"pact/context_transfer{names[k]}": v for k, v in found.parts.items() if k in names}


def _only(sample: Sample, scores: ContextScores, sign: str, way: str) -> Sample:
    """The sample with a loss on tokens of this sign of advantage that agree with the trace, or depart from
    it."""
    start = scores.start
    gain = torch.cat([torch.zeros(start), scores.in_context[start:].cpu() - scores.prompt_only.cpu()])
    wanted = (sample.advantages > 0) if sign == "positive" else (sample.advantages < 0)
    wanted = wanted & ((gain >= 0) if way == "agree" else (gain < 0))
    weight = torch.where(wanted, sample.policy_weight, torch.zeros(()))
    return replace(sample, policy_weight=weight, old_logprobs=None, ref_logprobs=None)


def _under_x(sample: Sample, scores: ContextScores, prompt: Sequence[int]) -> Sample:
    """The sample with x in the place of c."""
    moved: dict[str, Any] = {
        name: torch.cat([torch.zeros(len(prompt)), getattr(sample, name)[scores.start :]])
        for name in ("policy_weight", "advantages", "sft_weight", "engine_logprobs")
    }
    ids = torch.cat([torch.tensor(list(prompt)), sample.ids[scores.start :]])
    return replace(sample, ids=ids, prompt_only=True, start=len(prompt), **moved)


def _gradient(
    policy: Policy,
    samples: Sequence[Sample],
    objective: ObjectiveConfig,
    *,
    temperature: float,
    token_budget: int,
) -> Gradient:
    live = [trim(s) for s in samples if len(s.live())]
    policy.model.zero_grad(set_to_none=True)
    for pack in pack_losses(policy, live, objective, token_budget=token_budget, temperature=temperature):
        pack.loss.backward()
    found = {
        n: p.grad.detach().float().clone() for n, p in policy.model.named_parameters() if p.grad is not None
    }
    policy.model.zero_grad(set_to_none=True)
    return found


def _total(gradients: Iterable[Gradient]) -> Gradient:
    out: Gradient = {}
    for gradient in gradients:
        for name, value in gradient.items():
            out[name] = out[name] + value if name in out else value
    return out


def _cosine(a: Gradient, b: Gradient) -> tuple[float, float] | None:
    """Cosine of two gradients, and the length of `a` over that of `b`; None where one of them is zero."""
    shared = a.keys() & b.keys()
    dot = sum(float((a[n].double() * b[n].double()).sum()) for n in shared)
    lengths = [sum(float(g[n].double().square().sum()) for n in g) ** 0.5 for g in (a, b)]
    return (dot / (lengths[0] * lengths[1]), lengths[0] / lengths[1]) if all(lengths) else None


def _layer(name: str) -> str:
    found = re.search(r"\blayers\.(\d+)\.", name)
    return f"layer {found.group(1)}" if found else ("embeddings" if "embed" in name else "head and norm")
