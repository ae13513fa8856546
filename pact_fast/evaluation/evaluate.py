"""Prompt-only scoring of a policy on an environment: solved share, reward, calls and what went wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from pact_fast.data.chat import AssistantTurn, ChatFormat, Component, Tokens
from pact_fast.data.colours import name_of
from pact_fast.data.records import Record
from pact_fast.distributed import Sharded, World
from pact_fast.envs.base import FAILURE_KINDS, ToolEnv
from pact_fast.evaluation.stats import evaluation_block
from pact_fast.rollout import Engine, Rollout, RolloutLimits, spread_rollouts


def evaluate(
    engine: Engine,
    env: ToolEnv,
    chat: ChatFormat,
    records: Sequence[Record],
    *,
    prompts: Sequence[Tokens] | None = None,
    limits: RolloutLimits,
    temperature: float,
    samples: int = 1,
    seed: int = 0,
    batch_size: int = 256,
    sharded: Sharded | None = None,
) -> tuple[dict[str, Any], list[Rollout]]:
    """Scores every record `samples` times; with `sharded`, a share of the records on each rank.

    Returns:
        A summary (`stats.evaluation_block`, and "failures": share of rollouts by kind) and the rollouts.
    """
    rollouts = spread_rollouts(
        sharded or Sharded(nn.Module(), World()),
        engine,
        env,
        chat,
        records,
        num_generations=samples,
        prompts=prompts if prompts is not None else [chat.prompt(r.prompt, r.tools) for r in records],
        limits=limits,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
    )
    outcomes = [r.outcome for r in rollouts if r.outcome is not None]

    def per_task(values: Sequence[float]) -> list[float]:
        return [sum(values[i : i + samples]) / samples for i in range(0, len(values), samples)]

    summary = evaluation_block(
        per_task([o.solved for o in outcomes]),
        per_task([o.reward for o in outcomes]),
        per_task([o.calls for o in outcomes]),
    )
    failures = Counter(o.failure for o in outcomes if o.failure)
    summary["failures"] = {kind: failures.get(kind, 0) / len(outcomes) for kind in FAILURE_KINDS}
    return summary, rollouts


def eval_row(summary: dict[str, Any], split: str, temperature: float) -> dict[str, Any]:
    """A summary as a row of metrics.jsonl."""
    row = {f"eval/{k}": v for k, v in summary.items() if isinstance(v, float | int)}
    row |= {f"eval/failure/{k}": v for k, v in summary["failures"].items()}
    return row | {"eval/split": split, "eval/temperature": temperature}


def turn_pieces(turn: AssistantTurn) -> list[tuple[Component, str]]:
    """What a turn holds, in the order in which it is shown."""
    pieces = [(Component.REASONING, turn.reasoning)]
    pieces += [(Component.TOOL_CALL, call.raw.strip()) for call in turn.tool_calls]
    return [piece for piece in (*pieces, (Component.ANSWER, turn.content)) if piece[1]]


def transcript(rollout: Rollout, chat: ChatFormat) -> list[dict[str, str]]:
    """One rollout as readable pieces {"role", "component", "text"}, in order."""
    pieces = [
        {"role": m["role"], "component": "context", "text": str(m["content"])} for m in rollout.record.prompt
    ]
    for turn in range(max(rollout.turns, default=-1) + 1):
        at = [i for i, t in enumerate(rollout.turns) if t == turn]
        sampled = [rollout.token_ids[i] for i in at if rollout.sampled[i]]
        parsed = chat.parse(sampled, complete=True)
        for component, text in turn_pieces(parsed):
            pieces.append({"role": "assistant", "component": name_of(component), "text": text})
        reply = [i for i in at if not rollout.sampled[i]]
        if reply:
            text = chat.decode([rollout.token_ids[i] for i in reply])
            pieces.append({"role": "tool", "component": "tool_response", "text": text.strip()})
    return pieces
