"""Demonstrations that make the base model: the call format, copying, and some solved and some failed tasks.

They live in worlds of their own (seeded by "base"), use every wording, and stand for what an instruct model
knows before it meets the tasks: how calls look, what each word asks for, that values are copied, how to carry
out steps that are spelled out, how to go by a worked reference. What it is not shown is to put these
together: a question of several steps, planned and worked off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random

from pact_fast.data.records import Record
from pact_fast.envs.toolbox import tools
from pact_fast.envs.toolbox.env import make_record
from pact_fast.envs.toolbox.expert import Trace, answer_text, describe, opening, write_trace
from pact_fast.envs.toolbox.questions import Step, Task, draw_task, offered_tools, quoted
from pact_fast.envs.toolbox.tools import LOOKUPS, PARAMETERS, RELATIONS
from pact_fast.envs.toolbox.worlds import World, build_world

ALL_HOPS = (0.15, 0.4, 0.45)  # of plans, procedures and tasks with a reference


@dataclass(frozen=True)
class BaseMix:
    """What the demonstrations are: shares of the kinds, and how good the solved tasks are."""

    copy_share: float = 0.05  # answers that repeat quoted names
    command_share: float = 0.1  # the question spells out one call
    plan_share: float = 0.27  # the question asks for the steps of a look-up task, not for its answer
    procedure_share: float = 0.17  # the question spells out the steps of a look-up task
    reference_share: float = 0.15  # look-up tasks of all kinds whose prompt shows an expert's trace
    hasty_share: float = 0.1  # questions of several steps, answered after the first
    hops: tuple[float, float, float] = (1.0, 0.0, 0.0)  # of the remaining look-up tasks
    two_part_share: float = 0.0
    success_rate: float = 0.85
    detour_rate: float = 0.2
    planned_share: float = 0.0  # of those: reasoning that lists the steps first
    difficulty: int = 1


def base_records(n: int, seed: int = 0, mix: BaseMix | None = None) -> list[Record]:
    """`n` demonstrations; a pure function of (n, seed, mix). Their worlds occur in no split of any seed."""
    mix = mix or BaseMix()
    return [
        _base_record(Random(f"toolbox/base/{seed}/{i}"), f"toolbox/base/{seed}/{i}", mix) for i in range(n)
    ]


def _base_record(rng: Random, record_id: str, mix: BaseMix) -> Record:
    world = build_world(rng, mix.difficulty)
    kinds = ("copy", "command", "plan", "procedure", "reference", "hasty")
    shares = [getattr(mix, f"{kind}_share") for kind in kinds]
    kind = rng.choices([*kinds, "task"], [*shares, max(0.0, 1.0 - sum(shares))])[0]
    if kind in ("copy", "command", "plan"):
        task, trace = {"copy": _copy, "command": _command, "plan": _plan}[kind](rng, world)
        offered = offered_tools(rng, task, mix.difficulty)
        return _with_reference(make_record(record_id, world, task, offered, trace), None)
    held_out = rng.random() < 0.5
    if kind == "task":
        task = draw_task(rng, world, mix.difficulty, mix.hops, mix.two_part_share, held_out)
        right, detour = rng.random() < mix.success_rate, rng.random() < mix.detour_rate
        planned = rng.random() < mix.planned_share
    elif kind == "hasty":
        task = _first_step_alone(draw_task(rng, world, 1, (0.0, 0.5, 0.5), 0.0, held_out))
        right, detour, planned = True, False, False
    else:
        task = draw_task(rng, world, 1, ALL_HOPS, 0.0, held_out)
        right, detour, planned = True, False, True
    offered = offered_tools(rng, task, mix.difficulty)
    write = partial(write_trace, rng, world, task, offered)
    trace = write(right=right, detour=detour, planned=planned)
    shown = None
    if kind == "procedure":
        task = replace(task, kind="procedure", question=_spelled_out(rng, task))
    elif kind == "reference":  # what is shown is as good as experts are, what is done is clean
        shown = write(right=rng.random() < 0.7, detour=rng.random() < 0.4).messages
    return _with_reference(make_record(record_id, world, task, offered, trace), shown)


def _with_reference(record: Record, messages: list[dict] | None) -> Record:
    """`messages`: a trace that the prompt shows, or None."""
    return replace(record, env={**record.env, "reference": messages})


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


def _plan(rng: Random, world: World) -> tuple[Task, Trace]:
    """What a question asks for, in order and without a call: the wording is understood, the work is not
    done."""
    task = draw_task(rng, world, 1, ALL_HOPS, 0.0, rng.random() < 0.5)
    labels = tuple(step.label for step in task.steps)
    reasoning = opening(task, range(len(task.steps)))
    lead = rng.choice(("Plan only:", "Only name the steps:"))
    question = f"{lead} {task.question}"
    trace = Trace([_answer(reasoning, labels)], labels, solves=True)
    return replace(task, kind="plan", question=question, steps=(), answers=labels, answer_steps=()), trace


def _first_step_alone(task: Task) -> Task:
    """The same question, as if its first step answered it."""
    first = task.steps[0]
    return replace(task, kind="hasty", steps=(first,), answers=(first.value,), answer_steps=(0,))


def _spelled_out(rng: Random, task: Task) -> str:
    """The question as a procedure: the same steps, in words that need no understanding."""
    labels = ", then ".join(step.label for step in task.steps)
    return rng.choice(("Do this: {0}.", "Follow the steps: {0}.")).format(f'{labels} from "{task.starts[0]}"')


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
