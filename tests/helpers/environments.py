"""Helpers of the environment tests."""

import json
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


OWN_TOOL = """
def {name}(place, year, detail=False):
    table = {table!r}
    for row in table:
        if place == row[0] and year == row[1]:
            return {{"place": place, "value": row[2]}} if detail else row[2]
    if place == {broken!r}:
        raise ValueError("no record of " + place)
    return "nothing known"
"""


def own_ftrl_file(folder):
    """Twelve tasks of our own in the published layout (parquet, columns of JSON text), three of a kind."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for number in range(12):
        kind = ("single_hop", "multi_hop", "parallel_single_hop", "parallel_multi_hop")[number % 4]
        names = [f"{topic}_of_{number}" for topic in ("harvest", "census", "tides")][
            : 1 if number % 4 == 0 else 3
        ]
        codes, unsolved, tools = {}, {}, []
        for i, name in enumerate(names):
            values = [f"{1200 + 37 * number + i}", f"Orvik {number}, Telsa {i}"][: 1 + number % 2]
            table = [("Orvik", 1990 + j, value) for j, value in enumerate(values)]
            codes[name] = OWN_TOOL.format(name=name, table=table, broken="Nowhere")
            if i < 2:  # the third tool is a distractor
                unsolved[name] = values
            parameters = {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "enum": ["Orvik", "Nowhere"]},
                    "year": {"type": "integer", "enum": [1990, 1991]},
                    "detail": {"type": "boolean"},
                },
                "required": ["place", "year"],
            }
            described = {
                "name": name,
                "description": f"Looks up {name}. In tables.",
                "parameters": parameters,
            }
            tools.append({"type": "function", "function": described})
        rows.append(
            {
                "messages": [{"role": "user", "content": f"What do the tables of {number} say of Orvik?"}],
                "tools": json.dumps(tools),
                "codes": json.dumps(codes),
                "unsolved_set": json.dumps(unsolved),
                "answer": list(unsolved.values())[-1][-1],
                "data_source": f"self/{kind}",
                "split": "test",
            }
        )
    path = Path(folder) / "own_ftrl.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


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
