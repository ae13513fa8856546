"""Rows of metrics.jsonl from what a step did; names are those of `pact_fast.metrics`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pact_fast.batch import PackLoss
from pact_fast.rollout import Rollout


@dataclass
class Update:
    """What one optimizer update did."""

    losses: list[dict[str, float]]
    grad_norm: float
    skipped: bool


def rollout_metrics(rollouts: Sequence[Rollout], group: int) -> dict[str, float]:
    """Metrics of a step's rollouts, `group` of a prompt beside each other; empty without rollouts."""
    outcomes = [r.outcome for r in rollouts if r.outcome is not None]
    if not outcomes:
        return {}
    rewards = torch.tensor([o.reward for o in outcomes]).view(-1, group)
    spread = rewards.std(1) if group > 1 else torch.zeros(len(rewards))
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(spread.mean()),
        "frac_reward_zero_std": float((spread == 0).float().mean()),
        "solved": sum(o.solved for o in outcomes) / len(outcomes),
        "completions/max_length": max(r.num_sampled for r in rollouts),
        "completions/turns": sum(len(r.turn_rewards) for r in rollouts) / len(rollouts),
        "completions/mean_length": sum(r.num_sampled for r in rollouts) / len(rollouts),
        "completions/calls": sum(o.calls for o in outcomes) / len(outcomes),
        "completions/clipped_ratio": sum(r.truncated is not None for r in rollouts) / len(rollouts),
    }


def pack_metrics(pack: PackLoss) -> dict[str, float]:
    """Sums over one pack, on the host."""
    out = {
        "loss": float(pack.loss.detach()),
        "tokens": float(pack.num_tokens),
        "pairs": float(pack.num_pairs),
    }
    if pack.policy is not None:
        chosen = [s for s in pack.samples if s.is_policy]
        live = [s.live() for s in chosen]
        rows = sum(len(i) for i in live)
        out["rows"] = rows
        out |= {
            "policy_loss": float(pack.policy.policy_loss),
            "policy_rows": rows,
            "policy_weight": float(sum(s.policy_weight.sum() for s in chosen)),
            "kl": float(pack.policy.kl),
            "entropy": float(pack.policy.entropy),
            "clipped": float(pack.policy.clip_fraction) * rows,
        }
        if chosen[0].old_logprobs is not None:
            old = torch.cat([s.old_logprobs[i] for s, i in zip(chosen, live, strict=True)])  # type: ignore[index]
            out["ppo_kl"] = float((old - pack.policy.logprobs.cpu()).sum())
    if pack.sft is not None:
        logprobs = pack.sft.logprobs
        out |= {
            "sft_loss": float(pack.sft.sft_loss),
            "sft_rows": len(logprobs),
            "sft_logprob": float(logprobs.sum()),
        }
        out["rows"] = out.get("rows", 0.0) + len(logprobs)
    return out


def update_metrics(updates: Sequence[Update]) -> dict[str, float]:
    packs = [p for u in updates for p in u.losses]

    def total(key: str) -> float:
        return sum(p.get(key, 0.0) for p in packs)

    row = {
        "loss": total("loss") / len(updates),
        "grad_norm": sum(u.grad_norm for u in updates) / len(updates),
    }
    if total("policy_rows"):
        row["policy_loss"] = total("policy_loss") / len(updates)
        row["kl"] = total("kl") / total("policy_weight")
        row["entropy"] = total("entropy") / total("policy_weight")
        row["clip_ratio"] = total("clipped") / total("policy_rows")
        row["pact/ppo_kl"] = total("ppo_kl") / total("policy_rows")
    if total("sft_rows"):
        row["sft_loss"] = total("sft_loss") / len(updates)
        row["pact/trace_logprob"] = total("sft_logprob") / total("sft_rows")
    return row
