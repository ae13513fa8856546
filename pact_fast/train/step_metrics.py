"""The row of metrics.jsonl of a step: what it did, the time and memory of its phases, the share of the
device's arithmetic that its updates used. Names are those of `pact_fast.metrics`."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from pact_fast.rollout import Rollout
from pact_fast.train.batch import PackLoss
from pact_fast.tree.families import Family, model_flops

GIB = 2**30
# Dense bf16 TFLOP/s of the data sheets, by a part of the name that CUDA gives; the first that fits counts.
PEAK_TFLOPS = {
    "B300": 2500.0,
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.2,
}


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
    if pack.router_loss is not None:
        out["router_loss"] = float(pack.router_loss.detach())
    if pack.distill_loss is not None and pack.divergences is not None:
        out["distill_loss"] = float(pack.distill_loss)
        out["pairs_compared"] = len(pack.divergences)
        out["divergence"] = float(pack.divergences.sum())
        out["over_clip"] = int((pack.divergences > pack.divergence_clip).sum())
    if pack.output is None:
        return out
    policy, logprobs = pack.policy_rows(), pack.output.logprobs.cpu()
    out["rows"], count = len(logprobs), int(policy.sum())
    if count:
        rollouts = [s for s in pack.samples if s.is_policy]
        out |= {
            "policy_loss": float(pack.output.policy_loss),
            "policy_rows": count,
            "policy_weight": float(sum(s.policy_weight.sum() for s in rollouts)),
            "kl": float(pack.output.kl),
            "entropy": float(pack.output.entropy),
            "clipped": float(pack.output.clip_fraction) * count,
        }
        old = [s.old_logprobs[s.live()] for s in rollouts if s.old_logprobs is not None]
        if old:
            out["ppo_kl"] = float((torch.cat(old) - logprobs[policy]).sum())
    if count < len(logprobs):
        out |= {
            "sft_loss": float(pack.output.sft_loss),
            "sft_rows": len(logprobs) - count,
            "sft_logprob": float(logprobs[~policy].sum()),
        }
    return out


def update_metrics(updates: Sequence[Update]) -> dict[str, float]:
    packs = [p for u in updates for p in u.losses]

    def total(key: str) -> float:
        return sum(p.get(key, 0.0) for p in packs)

    row = {
        "loss": total("loss") / len(updates),
        "grad_norm": sum(u.grad_norm for u in updates) / len(updates),
    }
    if any("router_loss" in p for p in packs):
        row["router_loss"] = total("router_loss") / len(updates)
    if total("pairs_compared"):
        row["distill_loss"] = total("distill_loss") / len(updates)
        row["pact/divergence"] = total("divergence") / total("pairs_compared")
        row["pact/divergence_clipped"] = total("over_clip") / total("pairs_compared")
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


class Phases:
    """Seconds and peak memory of each phase of one step, as metrics: `time/<phase>`, `memory/<phase>`.

    On a GPU the peak of what PyTorch allocated; on CPU the resident size at the phase's end.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.row: dict[str, float] = {}
        self._begin = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # else a phase is charged with the work of the one before
            torch.cuda.reset_peak_memory_stats(self.device)
        begin = time.perf_counter()
        yield
        memory = self._memory()
        self.row[f"time/{name}"] = time.perf_counter() - begin
        self.row[f"memory/{name}"] = memory
        self.row["memory/peak"] = max(memory, self.row.get("memory/peak", 0.0))

    def finish(self) -> dict[str, float]:
        """The row, with the time of the whole step."""
        return self.row | {"time/step": time.perf_counter() - self._begin}

    def _memory(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) / GIB
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
        except OSError:  # no /proc: the peak of the process so far
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
        return pages * resource.getpagesize() / GIB


def peak_flops(device: torch.device, given: float | None, devices: int = 1) -> float | None:
    """FLOP/s of all devices: `given` TFLOP/s each, else the data sheet's of a known GPU, else None."""
    if given is None and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        given = next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
    return None if given is None else given * 1e12 * devices


def speed(
    packs: Sequence[Mapping[str, float]],
    row: Mapping[str, float],
    family: Family,
    peak: float | None,
    *,
    frozen: bool,
) -> dict[str, float]:
    """`tokens_per_second` of the step whose packs and times these are, and `mfu` where a peak is known."""
    tokens, pairs, rows = (sum(p.get(k, 0.0) for p in packs) for k in ("tokens", "pairs", "rows"))
    out = {"tokens_per_second": tokens / row["time/step"]}
    if peak is not None:
        out["mfu"] = model_flops(family, tokens, pairs, rows, frozen=frozen) / (row["time/update"] * peak)
    return out
