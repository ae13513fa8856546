"""Tool environments behind one protocol: `make_env("toolbox", {...})` gives a `ToolEnv`."""

from pact_fast.envs.base import FAILURE_KINDS, Episode, Outcome, StepResult, ToolEnv, make_env, settings_from

__all__ = ["FAILURE_KINDS", "Episode", "Outcome", "StepResult", "ToolEnv", "make_env", "settings_from"]
