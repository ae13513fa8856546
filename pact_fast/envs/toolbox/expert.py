"""The expert: conversations in which the calls are really run, as good or as bad as the settings say.

A trace may take a detour (a repeated call, a needless one, or a wrong one that an error message corrects)
and may go wrong for good (it stops early, reads the wrong fact, or answers with the wrong value).
Independent parts of a task are worked on in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from pact_fast.envs.toolbox import tools
from pact_fast.envs.toolbox.questions import Step, Task, conclude, quoted, resolve
from pact_fast.envs.toolbox.tools import LOOKUPS, RELATIONS
from pact_fast.envs.toolbox.worlds import World

FLAWS = {"stop_early": 0.35, "wrong_fact": 0.5, "wrong_answer": 0.15}
DETOURS = ("repeat", "needless", "repair")


@dataclass
class Trace:
    """The messages of a trace and what is known of it: its answers, calls, and the detours it took."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    answers: tuple[str, ...] = ()
    calls: int = 0
    detours: int = 0
    solves: bool = False


class _Writer:
    """Runs calls and writes them down; `lead` is the sentence that reacts to the last response."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.trace = Trace()
        self.lead = ""
        self.worked: list[dict[str, Any]] = []  # the calls that gave something

    def call(self, thought: Sequence[str], tool: str, arguments: dict[str, str]) -> tuple[str, str]:
        status, text = tools.call(self.world, tool, arguments)
        sentences = [self.lead, *thought] if self.lead else list(thought)
        self.trace.messages.append(
            {
                "role": "assistant",
                "reasoning_content": " ".join(sentences),
                "content": "",
                "tool_calls": [{"name": tool, "arguments": arguments}],
            }
        )
        self.trace.messages.append({"role": "tool", "name": tool, "content": text})
        self.trace.calls += 1
        values = quoted(text)
        if status == "ok" and values:
            self.worked.append({"name": tool, "arguments": arguments})
        self.lead = f'I got "{values[0]}".' if status == "ok" and values else "I got nothing."
        return status, text

    def answer(self, thought: Sequence[str], answers: Sequence[str]) -> Trace:
        content = answer_text(answers)
        reasoning = " ".join([self.lead, *thought] if self.lead else thought)
        self.trace.messages.append({"role": "assistant", "reasoning_content": reasoning, "content": content})
        self.trace.answers = tuple(answers)
        return self.trace


def answer_text(answers: Sequence[str]) -> str:
    if len(answers) == 1:
        return f'The answer is "{answers[0]}".'
    return "The answers are " + " and ".join(f'"{a}"' for a in answers) + "."


def describe(tool: str, arguments: dict[str, str]) -> str:
    """A call in words, for the reasoning."""
    a = arguments
    if tool in LOOKUPS:
        return f'the {a["field"]} of "{a["name"]}"'
    if tool == "search":
        return f'who has {a["field"]} "{a["value"]}"'
    if tool == "convert":
        return f'"{a["value"]}" {a["unit"]} in {a["to"]}'
    if tool == "calculator":
        return f'the sum of "{a["a"]}" and "{a["b"]}"'
    if tool == "days_between":
        return f'the days from "{a["start"]}" to "{a["end"]}"'
    return f"the {tool}"


def write_trace(
    rng: Random,
    world: World,
    task: Task,
    offered: Sequence[str],
    *,
    right: bool,
    detour: bool,
    planned: bool = True,
) -> Trace:
    """One trace. `right`: it solves the task (checked by what it answers, not by intention). `detour`: it
    makes at least one call more than its way needs. `planned`: the first turn's reasoning lists the steps."""
    while True:
        flaw = None if right else rng.choices(list(FLAWS), list(FLAWS.values()))[0]
        detours = (2 if rng.random() < 0.2 else 1) if detour else 0
        trace = _attempt(rng, world, task, offered, flaw, detours, planned)
        trace.solves = set(trace.answers) == set(task.answers) and len(trace.answers) == len(task.answers)
        if trace.solves == right and (trace.detours > 0) == detour:
            return trace


def _attempt(rng, world, task: Task, offered, flaw: str | None, detours: int, planned: bool) -> Trace:
    writer = _Writer(world)
    order = _any_order(rng, task.steps)
    if flaw == "stop_early":
        order = order[: rng.randint(1, max(1, len(order) - 1))]
    wrong_at = rng.choice(order) if flaw == "wrong_fact" else -1
    detour_at = [rng.choice(order) for _ in range(detours)]
    values: dict[int, list[str]] = {}
    for position, index in enumerate(order):
        step = task.steps[index]
        arguments = resolve(step, values)
        if index == wrong_at:
            arguments = _other_fact(rng, step, arguments)
        if position == 0:
            thought = opening(task, order) if planned else []
        else:
            thought = [f"Next is {step.label}."] if planned else []
        for _ in range(detour_at.count(index)):
            thought = _detour(rng, writer, task, offered, step, arguments, thought, values)
        first = position == 0 and planned and not writer.trace.messages
        lead_in = "First" if first else "So"
        status, text = writer.call(
            [*thought, f"{lead_in} {describe(step.tool, arguments)}."], step.tool, arguments
        )
        values[index] = quoted(text)
        if status != "ok" or not values[index]:
            return _give_up(writer, task, values)
    return _conclude(rng, writer, task, order, values, flaw)


def opening(task: Task, order: Sequence[int]) -> list[str]:
    starts = " and ".join(f'"{name}"' for name in task.starts)
    return [f"The question starts at {starts}.", f"Steps: {', '.join(task.steps[i].label for i in order)}."]


def _any_order(rng: Random, steps: Sequence[Step]) -> list[int]:
    """A random order in which every step follows those it needs. Probes of search hits keep their order."""
    left = list(range(len(steps)))
    order: list[int] = []
    while left:
        ready = [i for i in left if steps[i].needs() <= set(order)]
        if steps[0].tool == "search":
            ready = ready[:1]
        chosen = rng.choice(ready)
        order.append(chosen)
        left.remove(chosen)
    return order


def _other_fact(rng: Random, step: Step, arguments: dict[str, str]) -> dict[str, str]:
    """The same call about another field of the same kind of value where there is one."""
    if step.tool not in LOOKUPS:
        return arguments
    field = arguments["field"]
    relations = RELATIONS[step.tool]
    others = [f for f in relations if f != field and relations[f] == relations.get(field)]
    others = others or [f for f in relations if f != field]
    return arguments | {"field": rng.choice(others)}


def _detour(rng, writer: _Writer, task, offered, step: Step, arguments, thought, values) -> list[str]:
    """Makes one call too many before `step`; returns the thought that leads back to the step."""
    kind = rng.choice([d for d in DETOURS if d != "repeat" or writer.worked])
    if kind == "repair" and step.tool in LOOKUPS:
        wrong = rng.choice([tool for tool in LOOKUPS if tool != step.tool])
        writer.call([*thought, f"So {describe(step.tool, arguments)}."], wrong, arguments)
        writer.lead = "That was an error."
        back = [f"The tool is {step.tool}."]
    elif kind == "repeat":
        again = rng.choice(writer.worked)
        writer.call(["I am not sure.", "I check again."], again["name"], dict(again["arguments"]))
        back = [f"Next is {step.label}."] if thought else []
    else:
        tool, needless = _needless_call(rng, writer.world, task, offered, step, values)
        writer.call([*thought, f"Maybe {describe(tool, needless)} helps."], tool, needless)
        writer.lead = "That does not help."
        back = [f"Next is {step.label}."] if thought else []
    writer.trace.detours += 1
    return back


def _needless_call(rng, world: World, task: Task, offered, step: Step, values) -> tuple[str, dict[str, str]]:
    known = [*task.starts, *(v for hits in values.values() for v in hits)]
    name = rng.choice([n for n in known if any(n in world[kind] for kind in LOOKUPS)])
    kind = next(k for k in LOOKUPS if name in world[k])
    wanted = {s.label for s in task.steps}
    if "news" in offered and rng.random() < 0.25:
        return "news", {"topic": name}
    if kind == "place" and "weather" in offered and rng.random() < 0.5:
        return "weather", {"place": name}
    return kind, {
        "name": name,
        "field": rng.choice([f for f in RELATIONS[kind] if f not in wanted] or ["friend"]),
    }


def _give_up(writer: _Writer, task: Task, values) -> Trace:
    """A wrong fact led to a call that fails: the trace answers with the last thing it knows."""
    known = [hits[0] for hits in values.values() if hits] or [task.starts[0]]
    return writer.answer(["I cannot go on."], [known[-1]])


def _conclude(rng: Random, writer: _Writer, task: Task, order, values, flaw: str | None) -> Trace:
    if flaw == "stop_early":
        last = values[order[-1]][0]
        return writer.answer(["That looks like the answer.", "I stop here."], [last])
    try:
        answers = list(conclude(task.kind, task.starts, task.answer_steps, values))
    except ValueError:  # a comparison of what are no numbers
        return _give_up(writer, task, values)
    if flaw == "wrong_answer":
        seen = [*task.starts, *(v for hits in values.values() for v in hits)]
        answers[-1] = rng.choice([v for v in seen if v not in task.answers] or seen)
    closing = "That is the answer." if len(answers) == 1 else "I have both answers."
    return writer.answer(["All steps are done.", closing], answers)
