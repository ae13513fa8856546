"""Prompt-only multi-turn rollouts: the loop, and inference engines behind one protocol."""

from pact_fast.rollout.build import build_engine, local_engine
from pact_fast.rollout.engine import Engine, Generation, RolloutError
from pact_fast.rollout.in_process.engine import InProcessEngine
from pact_fast.rollout.loop import Rollout, RolloutLimits, collect_rollouts, reply_tokens
from pact_fast.rollout.overlap import Overlap
from pact_fast.rollout.spread import sample_share, spread_rollouts

__all__ = [
    "Engine",
    "Generation",
    "InProcessEngine",
    "Overlap",
    "Rollout",
    "RolloutError",
    "RolloutLimits",
    "build_engine",
    "collect_rollouts",
    "local_engine",
    "reply_tokens",
    "sample_share",
    "spread_rollouts",
]
