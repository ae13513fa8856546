"""Small random worlds: people, places, companies, and the facts that tie them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, timedelta
from random import Random
from typing import Any

from pact_fast.envs.toolbox.names import draw_names
from pact_fast.envs.toolbox.tools import ATTRIBUTES, LOOKUPS, PARAMETERS, RELATIONS

World = dict[str, dict[str, dict[str, str]]]

SIZES = {"person": 6, "place": 5, "company": 5}
JOBS = ("baker", "pilot", "judge", "nurse")


def build_world(rng: Random, difficulty: int) -> World:
    """Facts of 6 people, 5 places and 5 companies; no relation ties an entity to itself.

    Plain attributes (ages, sizes, dates, jobs) are part of the world from difficulty 2 on.
    """
    names = draw_names(rng, sum(SIZES.values()))
    members = {kind: [names.pop() for _ in range(size)] for kind, size in SIZES.items()}
    world: World = {}
    for kind in LOOKUPS:
        attributes = _attributes(rng, kind, members[kind]) if difficulty > 1 else {}
        world[kind] = {}
        for name in members[kind]:
            facts = {
                relation: rng.choice([other for other in members[target] if other != name])
                for relation, target in RELATIONS[kind].items()
            }
            world[kind][name] = facts | {field: values[name] for field, values in attributes.items()}
    return world


def _attributes(rng: Random, kind: str, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Numbers and dates differ between all entities of a kind, so that comparisons have one answer."""
    columns: dict[str, dict[str, str]] = {}
    for field in ATTRIBUTES[kind]:
        values: list[Any]
        if field == "job":
            values = [rng.choice(JOBS) for _ in names]
        elif field in ("born", "opened"):
            values = [date(1950, 1, 1) + timedelta(days=d) for d in rng.sample(range(18_000), len(names))]
        else:
            values = rng.sample(range(11, 99), len(names))
        columns[field] = dict(zip(names, map(str, values), strict=True))
    return columns


_DESCRIPTIONS = {
    "search": "names by field value",
    "weather": "the weather",
    "news": "the news",
    "convert": "km, mi, kg, lb",
    "calculator": "op: + - * /",
    "days_between": "dates as 1990-04-21",
}


def schema(tool: str, world: World) -> dict[str, Any]:
    """The tool's JSON schema in the form of chat templates. A look-up's description lists its fields."""
    if tool in LOOKUPS:
        description = ", ".join(next(iter(world[tool].values())))
    else:
        description = _DESCRIPTIONS[tool]
    parameters = {
        "type": "object",
        "properties": {name: {"type": "string"} for name in PARAMETERS[tool]},
        "required": list(PARAMETERS[tool]),
    }
    return {
        "type": "function",
        "function": {"name": tool, "description": description, "parameters": parameters},
    }
