"""Demonstrations that make the base model: the call format, copying, and some solved and some failed tasks.

They live in worlds of their own (seeded by "base"), use every wording, and stand for what an instruct model
knows before it meets the tasks: how calls look, what each word asks for, that values are copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from pact_fast.data.records import Record
from pact_fast.envs.toolbox import tools
from pact_fast.envs.toolbox.env import make_record
from pact_fast.envs.toolbox.expert import Trace, answer_text, describe, write_trace
from pact_fast.envs.toolbox.questions import Step, Task, draw_task, offered_tools, quoted
from pact_fast.envs.toolbox.tools import LOOKUPS, PARAMETERS, RELATIONS
from pact_fast.envs.toolbox.worlds import World, build_world


@dataclass(frozen=True)
class BaseMix:
    """What the demonstrations are: shares of the kinds, and how good the solved tasks are."""

    copy_share: float = 0.1  # answers that repeat quoted names
    command_share: float = 0.3  # the question spells out one call
    hops: tuple[float, float, float] = (0.7, 0.3, 0.0)  # of the remaining look-up tasks
    two_part_share: float = 0.1
    success_rate: float = 0.6
    detour_rate: float = 0.4
    planned_share: float = 0.3  # look-up tasks whose reasoning lists the steps first
    difficulty: int = 1


def base_records(n: int, seed: int = 0, mix: BaseMix | None = None) -> list[Record]:
    """`n` demonstrations; a pure function of (n, seed, mix). Their worlds occur in no split of any seed."""
    mix = mix or BaseMix()
    return [
        _base_record(Random(f"toolbox/base/{seed}/{i}"), f"toolbox/base/{seed}/{i}", mix) for i in range(n)
    ]


def _base_record(rng: Random, record_id: str, mix: BaseMix) -> Record:
    world = build_world(rng, mix.difficulty)
    draw = rng.random()
    if draw < mix.copy_share:
        task, trace = _copy(rng, world)
    elif draw < mix.copy_share + mix.command_share:
        task, trace = _command(rng, world)
    else:
        held_out = rng.random() < 0.5
        task = draw_task(rng, world, mix.difficulty, mix.hops, mix.two_part_share, held_out)
        offered = offered_tools(rng, task, mix.difficulty)
        right, detour = rng.random() < mix.success_rate, rng.random() < mix.detour_rate
        planned = rng.random() < mix.planned_share
        trace = write_trace(rng, world, task, offered, right=right, detour=detour, planned=planned)
        return make_record(record_id, world, task, offered, trace)
    return make_record(record_id, world, task, offered_tools(rng, task, mix.difficulty), trace)


def _answer(reasoning: Sequence[str], answers: Sequence[str]) -> dict:
    return {"role": "assistant", "reasoning_content": " ".join(reasoning), "content": answer_text(answers)}


def _copy(rng: Random, world: World) -> tuple[Task, Trace]:
    """Names said back, without a call."""
    names = rng.sample([name for kind in LOOKUPS for name in world[kind]], rng.choice((1, 2)))
    listed = " and ".join(f'"{name}"' for name in names)
    question = rng.choice(("Say {0}.", "Repeat {0}.", "Write down {0}.")).format(listed)
    reasoning = ["No tool is needed.", f"The names are {listed}."]
    trace = Trace([_answer(reasoning, names)], tuple(names), solves=True)
    return Task("copy", question, tuple(names), (), tuple(names), (), 0, "train"), trace


def _command(rng: Random, world: World) -> tuple[Task, Trace]:
    """One spelled-out call, whose arguments are copied from the question; some of them fail, and the answer
    says so."""
    tool = rng.choice([*LOOKUPS, *LOOKUPS, "search", "weather", "news"])
    kind = tool if tool in LOOKUPS else rng.choice(LOOKUPS)
    name = rng.choice(list(world[kind if rng.random() < 0.9 else rng.choice(LOOKUPS)]))
    field = rng.choice(list(RELATIONS[kind]))
    values = {
        "name": name,
        "field": field,
        "value": world[kind].get(name, {}).get(field, name),
        "topic": name,
    }
    values["place"] = rng.choice(list(world["place"]))
    arguments = {key: values[key] for key in PARAMETERS[tool]}
    listed = " and ".join(f'{key} "{value}"' for key, value in arguments.items())
    question = rng.choice(("Use {0} with {1}.", "Call {0} with {1}.", "Run {0}: {1}.")).format(tool, listed)
    status, text = tools.call(world, tool, arguments)
    call = {"name": tool, "arguments": arguments}
    thought = f"I call {tool}." if rng.random() < 0.5 else f"So {describe(tool, arguments)}."
    messages = [
        {"role": "assistant", "reasoning_content": thought, "content": "", "tool_calls": [call]},
        {"role": "tool", "name": tool, "content": text},
    ]
    found = quoted(text)[:1] if status == "ok" else []
    lead = f'I got "{found[0]}".' if found else "I got nothing."
    answers = found or [name]
    messages.append(_answer([lead, "That is the answer."], answers))
    starts = tuple(v for v in arguments.values())
    steps = (Step(tool, dict(arguments), arguments.get("field", tool), found[0]),) if found else ()
    trace = Trace(messages, tuple(answers), calls=1, solves=bool(found))
    return Task("command", question, starts, steps, tuple(answers), (0,), 1, "train"), trace
