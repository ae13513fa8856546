"""Twelve small tasks with tools of one's own and an expert trace each: tasks.jsonl, one record a line.

Put your tools and questions in the place of these. The tools' source travels in the record and runs in a
sandbox; the expert's tool responses come from really calling the tools. docs/your-own-tools.md says more.
"""

import inspect
import itertools
import json
import sys

from transformers.utils import get_json_schema

CITIES = ["Oslo", "Rome", "Lima", "Cairo"]


def weather(city: str) -> dict:
    """
    The weather in a city, as {"sky": ..., "celsius": degrees}.

    Args:
        city: name of the city
    """
    degrees = {"Oslo": 4, "Rome": 19, "Lima": 22, "Cairo": 31}[city]
    return {"sky": "clear" if degrees > 20 else "cloudy", "celsius": degrees}


def subtract(a: int, b: int) -> int:
    """
    a minus b.

    Args:
        a: first number
        b: second number
    """
    return a - b


def as_text(value):
    """What the model is shown of a tool's result: lists and dicts as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)


def turn(reasoning, tool, **arguments):
    """One turn of the expert: a thought, a call, and what the tool really answers."""
    call = {"name": tool.__name__, "arguments": arguments}
    return [
        {"role": "assistant", "reasoning_content": reasoning, "content": "", "tool_calls": [call]},
        {"role": "tool", "name": tool.__name__, "content": as_text(tool(**arguments))},
    ]


def task(warm, cold):
    a, b = weather(warm)["celsius"], weather(cold)["celsius"]
    answer = subtract(a, b)
    return {
        "id": f"{warm}-{cold}",
        "prompt": [{"role": "user", "content": f"How much warmer is it in {warm} than in {cold}?"}],
        "tools": [get_json_schema(weather), get_json_schema(subtract)],
        "codes": {"weather": inspect.getsource(weather), "subtract": inspect.getsource(subtract)},
        "answer": answer,
        "unsolved_set": {"weather": [a, b], "subtract": [answer]},
        "expert_trace": [
            *turn(f"I look up {warm} first.", weather, city=warm),
            *turn(f"Now {cold}.", weather, city=cold),
            *turn("I take the difference.", subtract, a=a, b=b),
            {"role": "assistant", "reasoning_content": "That is it.", "content": f"{answer} degrees."},
        ],
    }


path = sys.argv[1] if len(sys.argv) > 1 else "tasks.jsonl"
with open(path, "w") as file:
    for warm, cold in itertools.permutations(CITIES, 2):
        file.write(json.dumps(task(warm, cold)) + "\n")
print(f"{path}: {len(CITIES) * (len(CITIES) - 1)} tasks")
