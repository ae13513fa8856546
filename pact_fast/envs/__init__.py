"""Tool environments behind one protocol: `make_env("toolbox", {...})` gives a `ToolEnv`."""

from pact_fast.envs.base import FAILURE_KINDS, Episode, Outcome, StepResult, ToolEnv, make_env, settings_from
from pact_fast.envs.plugins import CallMade, RewardFunction, RewardInput

__all__ = [
    "FAILURE_KINDS",
    "CallMade",
    "Episode",
    "Outcome",
    "RewardFunction",
    "RewardInput",
    "StepResult",
    "ToolEnv",
    "make_env",
    "settings_from",
]
