"""Helpers of the environment tests."""

import os
from pathlib import Path

import pytest

from pact_fast.data.chat import AssistantTurn, ToolCall


def shared_file(name):
    """A file of the shared/ folder beside (or above) the checkout, or of $PACT_FAST_SHARED; skips where it
    is not."""
    places = [Path(os.environ["PACT_FAST_SHARED"])] if "PACT_FAST_SHARED" in os.environ else []
    places += [parent / "shared" for parent in Path(__file__).resolve().parents]
    for place in places:
        if (place / name).is_file():
            return place / name
    pytest.skip(f"{name}: no shared/ folder beside the checkout (set PACT_FAST_SHARED)")


def calls(*pairs):
    """A turn that makes these calls: (name, arguments), or a text for a call that could not be read."""
    made = tuple(
        ToolCall("", None, "not JSON", pair)
        if isinstance(pair, str)
        else ToolCall(pair[0], pair[1], None, "")
        for pair in pairs
    )
    return AssistantTurn("", "", made, "", True)


def says(text):
    return AssistantTurn("", text, (), text, True)


def play(env, record, turns, truncated=None):
    """Runs one episode to its end: outcome, responses of each turn, turn rewards."""
    episodes = env.start([record])
    responses, rewards = [], []
    for turn in turns:
        result = env.step(episodes, [turn])[0]
        responses.append(result.tool_responses)
        rewards.append(result.reward)
        if result.done:
            break
    return env.finish(episodes, [truncated])[0], responses, rewards
