"""The multi-turn loop: sample a turn for every row, run its tools, append what came back, until all are done.

Token ids are kept exactly as sampled. Environment text is tokenised once, when it arrives; nothing is ever
decoded and tokenised again, so the ids scored by the trainer are the ids the engine drew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pact_fast.data.chat import AssistantTurn, ChatFormat, Tokens
from pact_fast.data.records import Record
from pact_fast.envs.base import Outcome, StepResult, ToolEnv
from pact_fast.rollout.engine import Engine


@dataclass(frozen=True)
class RolloutLimits:
    """max_turns: assistant turns. max_completion_length: tokens after the prompt, tool responses included.
    max_turn_length: tokens sampled in one turn. context_length: tokens of prompt and completion together that
    the model can read (None: no such limit)."""

    max_turns: int = 10
    max_completion_length: int = 512
    max_turn_length: int = 128
    context_length: int | None = None

    def left(self, rollout: Rollout) -> int:
        """Tokens that may still follow; 0 or less where the prompt alone fills the context."""
        left = self.max_completion_length - len(rollout.token_ids)
        if self.context_length is not None:
            left = min(left, self.context_length - len(rollout.prompt) - len(rollout.token_ids))
        return left


@dataclass
class Rollout:
    """One episode from prompt x.

    token_ids y: everything after the prompt. sampled marks the model's own tokens; logprobs holds their
    log-probs under the engine (0 elsewhere) and turns the assistant turn each token belongs to.
    """

    record: Record
    prompt: Tokens
    token_ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    turn_rewards: list[float] = field(default_factory=list)
    outcome: Outcome | None = None
    truncated: str | None = None

    @property
    def num_sampled(self) -> int:
        return sum(self.sampled)

    def add_sampled(self, ids: Sequence[int], logprobs: Sequence[float], turn: int) -> None:
        self._add(ids, True, logprobs, turn)

    def add_context(self, tokens: Tokens, turn: int) -> None:
        self._add(tokens.ids, False, [0.0] * len(tokens), turn)

    def _add(self, ids, sampled, logprobs, turn) -> None:
        self.token_ids.extend(ids)
        self.sampled.extend([sampled] * len(ids))
        self.logprobs.extend(logprobs)
        self.turns.extend([turn] * len(ids))


def collect_rollouts(
    engine: Engine,
    env: ToolEnv,
    chat: ChatFormat,
    records: Sequence[Record],
    *,
    num_generations: int,
    limits: RolloutLimits,
    prompts: Sequence[Tokens] | None = None,
    keys: Sequence[int] | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
) -> list[Rollout]:
    """Rolls out every record `num_generations` times, prompt-only.

    Args:
        engine, env, chat: the policy's engine, the environment and the token format.
        records: prompts; their expert traces are not shown.
        prompts: their prompts as tokens, where the caller has them already.
        limits: turn and token limits; an episode that meets one is ended with that failure kind.
        temperature: of the sampling; 0 is greedy.
        keys: a number a record that, with `seed`, decides the draws of its rollouts alone: a part of the
            records rolled out elsewhere gives the same rollouts. None: its index.
        seed: makes the draw repeatable.
        batch_size: rows in flight at once.

    Returns:
        Rollouts in the order of `records`, the G of a record beside each other, outcomes filled in.
    """
    if prompts is None:
        prompts = [chat.prompt(r.prompt, r.tools) for r in records]
    rollouts = [Rollout(r, p) for r, p in zip(records, prompts, strict=True) for _ in range(num_generations)]
    keys = range(len(records)) if keys is None else keys
    seeds = [seed * 1_000_003 + k * num_generations + g for k in keys for g in range(num_generations)]
    for start in range(0, len(rollouts), batch_size):
        wave = slice(start, start + batch_size)
        _run_wave(engine, env, chat, rollouts[wave], limits, temperature, seeds[wave])
    return rollouts


def _run_wave(
    engine: Engine,
    env: ToolEnv,
    chat: ChatFormat,
    rollouts: list[Rollout],
    limits: RolloutLimits,
    temperature: float,
    seeds: Sequence[int],
) -> None:
    episodes = env.start([r.record for r in rollouts])
    engine.reset()
    active = [i for i, rollout in enumerate(rollouts) if limits.left(rollout) > 0]
    for i in set(range(len(rollouts))) - set(active):
        rollouts[i].truncated = "length_limit"
    for turn in range(limits.max_turns if active else 0):
        generations = engine.generate(
            [rollouts[i].prompt.ids + rollouts[i].token_ids for i in active],
            max_new_tokens=[_room(rollouts[i], limits) for i in active],
            temperature=temperature,
            stop_token_ids=chat.stop_token_ids,
            seed=[_of_turn(seeds[i], turn) for i in active],
            sessions=active,
        )
        finished = []
        for i, generation in zip(active, generations, strict=True):
            rollouts[i].add_sampled(generation.token_ids, generation.logprobs, turn)
            if generation.finish_reason != "stop":
                rollouts[i].truncated = "length_limit"
                continue
            try:
                finished.append((i, chat.parse(generation.token_ids, complete=True)))
            except Exception:  # nothing a model writes may end a run
                rollouts[i].truncated = "unreadable"
        results = env.step([episodes[i] for i, _ in finished], [parsed for _, parsed in finished])
        active = []
        for (i, parsed), result in zip(finished, results, strict=True):
            rollouts[i].turn_rewards.append(result.reward)
            if not result.done and _append_reply(rollouts[i], chat, parsed, result, turn, limits):
                active.append(i)
        if not active:
            break
    for i in active:
        rollouts[i].truncated = "turn_limit"
    outcomes = env.finish(episodes, [r.truncated for r in rollouts])
    for rollout, outcome in zip(rollouts, outcomes, strict=True):
        if outcome.turn_rewards is not None:
            rollout.turn_rewards = list(outcome.turn_rewards)
        # A turn cut off by a limit has no step of its own; turn-level advantages need one value for it.
        rollout.turn_rewards += [0.0] * (1 + max(rollout.turns, default=-1) - len(rollout.turn_rewards))
        rollout.outcome = outcome


def _of_turn(seed: int, turn: int) -> int:
    return (seed * 1009 + turn) % 2**63


def _room(rollout: Rollout, limits: RolloutLimits) -> int:
    return min(limits.max_turn_length, limits.left(rollout))


def reply_tokens(chat: ChatFormat, parsed: AssistantTurn, result: StepResult, turn: int) -> Tokens:
    """The environment's answer to a turn, with the generation header of turn `turn`."""
    reply = Tokens()
    if result.tool_responses:
        names = [call.name for call in parsed.tool_calls]
        every = len(names) == len(result.tool_responses)  # an environment may pass over some
        reply = chat.tool_results(result.tool_responses, turn, names=names if every else None)
    if result.user_message is not None:
        reply = chat.user(result.user_message, turn)
    return reply


def _append_reply(
    rollout: Rollout, chat: ChatFormat, parsed: Any, result: Any, turn: int, limits: RolloutLimits
) -> bool:
    """Adds the environment's answer and the next generation header; False where no room is left for a
    turn, or the answer cannot be written as tokens."""
    try:
        reply = reply_tokens(chat, parsed, result, turn + 1)
    except Exception:  # nothing a tool writes may end a run
        rollout.truncated = "unreadable"
        return False
    if len(reply) >= limits.left(rollout):
        rollout.truncated = "length_limit"
        return False
    rollout.add_context(reply, turn)
    return True
