"""Questions over a world: which calls answer them, what those calls give, and how they are worded.

A task is a small graph of calls (`Step`s). An argument of a step is text, or a `Ref` to a value of an
earlier step's response. The gold values come from running the tools on the world, never from a second copy
of their rules.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from pact_fast.envs.toolbox import tools
from pact_fast.envs.toolbox.tools import LOOKUPS, RELATIONS
from pact_fast.envs.toolbox.worlds import World

QUOTED = re.compile(r'"([^"\n]*)"')
MAX_TOOLS = 6  # offered per task: the look-ups, what the task needs, distractors
MAX_TRIES = 100  # some worlds have no task of some kind

# field -> (training wordings, held-out wordings). Each word names one field, and so one tool.
WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "friend": (("the friend of", "the buddy of"), ("the pal of",)),
    "boss": (("the boss of", "the chief of"), ("the manager of",)),
    "home": (("the home of", "the home town of"), ("the residence of",)),
    "employer": (("the employer of", "the firm that pays"), ("the workplace of",)),
    "mayor": (("the mayor of", "the one who runs"), ("the leader of",)),
    "neighbor": (("the neighbor of", "the town next to"), ("the place beside",)),
    "market": (("the market of", "the store in"), ("the shop in",)),
    "founder": (("the founder of", "the one who started"), ("the creator of",)),
    "seat": (("the seat of", "the town that hosts"), ("the base of",)),
    "rival": (("the rival of", "the competitor of"), ("the opponent of",)),
    "age": (("the age of",), ("the years of",)),
    "job": (("the job of",), ("the profession of",)),
    "born": (("the birth date of",), ("the birthday of",)),
    "size": (("the size of",), ("the length of",)),
    "staff": (("the staff of",), ("the headcount of",)),
    "opened": (("the opening date of",), ("the first day of",)),
}
FRAMES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "chain": (("What is {0}?", "Find {0}."), ("Tell me {0}.", "I want {0}.")),
    "pair": (("Find {0} and {1}.", "What are {0} and {1}?"), ("Tell me {0}, also {1}.",)),
    "compare": (("Who is older, {0} or {1}?",), ("Whose age is higher, that of {0} or {1}?",)),
    "search": (('Who lives in {0} and works as "{1}"?',), ('Name the "{1}" whose home is {0}.',)),
    "convert": (('{0} is in "km". What is it in "mi"?',), ('Turn {0} from "km" into "mi".',)),
    "total": (("How many staff have {0} and {1} together?",), ("Add the staff of {0} to the staff of {1}.",)),
    "days": (
        ("How many days lie between the births of {0} and {1}?",),
        ("By how many days do {0} and {1} differ?",),
    ),
}
KINDS_BY_DIFFICULTY = {
    1: {"chain": 1.0},
    2: {"chain": 0.4, "leaf": 0.15, "compare": 0.15, "search": 0.15, "convert": 0.15},
    3: {
        "chain": 0.3,
        "leaf": 0.1,
        "compare": 0.1,
        "search": 0.15,
        "convert": 0.1,
        "total": 0.125,
        "days": 0.125,
    },
}


@dataclass(frozen=True)
class Ref:
    """The `index`-th quoted value of the response to step `step`."""

    step: int
    index: int = 0


@dataclass(frozen=True)
class Step:
    tool: str
    arguments: Mapping[str, str | Ref]
    label: str  # the word a plan uses for it
    value: str = ""  # gold: what the response must contain

    def needs(self) -> set[int]:
        return {a.step for a in self.arguments.values() if isinstance(a, Ref)}


@dataclass(frozen=True)
class Task:
    kind: str
    question: str
    starts: tuple[str, ...]  # the names the question mentions
    steps: tuple[Step, ...]
    answers: tuple[str, ...]
    answer_steps: tuple[int, ...]
    hops: int
    wording: str  # "train" or "held_out"


def quoted(text: str) -> list[str]:
    return QUOTED.findall(text)


def resolve(step: Step, values: Mapping[int, Sequence[str]]) -> dict[str, str]:
    """The step's arguments with every Ref replaced by what the earlier steps gave (`values`: step -> quoted
    values)."""
    return {
        key: values[a.step][min(a.index, len(values[a.step]) - 1)] if isinstance(a, Ref) else a
        for key, a in step.arguments.items()
    }


def conclude(
    kind: str, starts: Sequence[str], answer_steps: Sequence[int], values: Mapping[int, Sequence[str]]
):
    """The final answers that follow from the values the steps gave."""
    if kind == "compare":
        return (max(zip(starts, answer_steps, strict=True), key=lambda pair: int(values[pair[1]][0]))[0],)
    if kind == "search":  # the last hit looked up is the one that fitted
        return (values[0][max(values) - 1],)
    return tuple(values[i][0] for i in answer_steps)


def draw_task(
    rng: Random, world: World, difficulty: int, hops: Sequence[float], pair_share: float, held_out: bool
):
    """One task whose step values all differ from each other and from the names in the question."""
    kinds = KINDS_BY_DIFFICULTY[difficulty]
    while True:
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        if kind == "chain" and rng.random() < pair_share:
            kind = "pair"
        depth = 1 + rng.choices((0, 1, 2), hops)[0]
        for _ in range(
            MAX_TRIES
        ):  # of one kind and depth, so that what is easily drawn is not drawn more often
            task = _BUILDERS[kind](rng, world, depth, 1 if held_out else 0)
            if task is not None:
                return task


def _chain(rng: Random, world: World, hops: int, base: int, leaf: bool = False):
    """(start name, fields, steps) of one look-up chain, or None where it runs into itself."""
    kind = rng.choice(LOOKUPS)
    start = name = rng.choice(list(world[kind]))
    fields: list[str] = []
    steps: list[Step] = []
    for hop in range(hops):
        attributes = [f for f in world[kind][name] if f not in RELATIONS[kind]]
        at_leaf = leaf and hop == hops - 1
        field = rng.choice(attributes if at_leaf else list(RELATIONS[kind]))
        argument = Ref(base + hop - 1) if hop else start
        value = world[kind][name][field]
        steps.append(Step(kind, {"name": argument, "field": field}, field, value))
        fields.append(field)
        if not at_leaf:
            kind, name = RELATIONS[kind][field], value
    return start, fields, steps


def _phrase(rng: Random, start: str, fields: Sequence[str], wording: int) -> str:
    words = [rng.choice(WORDINGS[field][wording]) for field in reversed(fields)]
    return " ".join([*words, f'"{start}"'])


def _frame(rng: Random, kind: str, wording: int, *parts: str) -> str:
    text = rng.choice(FRAMES[kind][wording]).format(*parts)
    return text[0].upper() + text[1:]


def _finish(
    world: World, kind: str, question: str, starts, steps: Sequence[Step], answer_steps, hops, wording
):
    """Runs the steps for their gold values; None if a value repeats (a detour could not be told from
    progress)."""
    values: dict[int, list[str]] = {}
    gold = []
    for i, step in enumerate(steps):
        status, text = tools.call(world, step.tool, resolve(step, values))
        assert status == "ok", (step, text)
        values[i] = quoted(text)
        gold.append(Step(step.tool, step.arguments, step.label, step.value or values[i][0]))
    answers = conclude(kind, starts, answer_steps, values)
    seen = [*starts, *(step.value for step in gold)]
    if kind != "search" and len(set(seen)) < len(seen):
        return None
    names = ("train", "held_out")
    return Task(
        kind, question, tuple(starts), tuple(gold), answers, tuple(answer_steps), hops, names[wording]
    )


def _build_chain(rng: Random, world: World, hops: int, wording: int, leaf: bool = False) -> Task | None:
    start, fields, steps = _chain(rng, world, hops, 0, leaf)
    question = _frame(rng, "chain", wording, _phrase(rng, start, fields, wording))
    return _finish(world, "chain", question, [start], steps, [hops - 1], hops, wording)


def _build_pair(rng: Random, world: World, hops: int, wording: int) -> Task | None:
    first = _chain(rng, world, min(hops, 2), 0)
    second = _chain(rng, world, 1, len(first[2]))
    steps = first[2] + second[2]
    phrases = [_phrase(rng, start, fields, wording) for start, fields, _ in (first, second)]
    answer_steps = [len(first[2]) - 1, len(steps) - 1]
    question = _frame(rng, "pair", wording, *phrases)
    return _finish(world, "pair", question, [first[0], second[0]], steps, answer_steps, min(hops, 2), wording)


def _two_lookups(rng: Random, world: World, kind: str, field: str) -> tuple[list[str], list[Step]]:
    names = rng.sample(list(world[kind]), 2)
    return names, [Step(kind, {"name": name, "field": field}, field) for name in names]


def _build_compare(rng: Random, world: World, hops: int, wording: int) -> Task | None:
    names, steps = _two_lookups(rng, world, "person", "age")
    question = _frame(rng, "compare", wording, *(f'"{n}"' for n in names))
    return _finish(world, "compare", question, names, steps, [0, 1], 1, wording)


def _build_search(rng: Random, world: World, hops: int, wording: int) -> Task | None:
    """Several people live in a place; one has the job. Hits are looked up in the order the search gives
    them."""
    place = rng.choice(list(world["place"]))
    hits = [name for name, facts in world["person"].items() if facts["home"] == place]
    if not 2 <= len(hits) <= 3:
        return None
    target = rng.choice(hits)
    job = world["person"][target]["job"]
    if sum(world["person"][hit]["job"] == job for hit in hits) > 1:
        return None
    probes = [
        Step("person", {"name": Ref(0, i), "field": "job"}, "job") for i in range(hits.index(target) + 1)
    ]
    steps = [Step("search", {"field": "home", "value": place}, "search", target), *probes]
    question = _frame(rng, "search", wording, f'"{place}"', job)
    return _finish(world, "search", question, [place, job], steps, [0], 2, wording)


def _build_convert(rng: Random, world: World, hops: int, wording: int) -> Task | None:
    hops = min(hops, 2)
    start, fields, steps = _chain(rng, world, hops, 0)
    kind = RELATIONS[steps[-1].tool][fields[-1]]
    if kind != "place":
        return None
    steps = [*steps, Step("place", {"name": Ref(hops - 1), "field": "size"}, "size")]
    steps.append(Step("convert", {"value": Ref(hops), "unit": "km", "to": "mi"}, "convert"))
    question = _frame(rng, "convert", wording, _phrase(rng, start, [*fields, "size"], wording))
    return _finish(world, "convert", question, [start], steps, [len(steps) - 1], len(steps), wording)


def _build_total(rng: Random, world: World, hops: int, wording: int) -> Task | None:
    names, steps = _two_lookups(rng, world, "company", "staff")
    steps.append(Step("calculator", {"a": Ref(0), "op": "+", "b": Ref(1)}, "sum"))
    question = _frame(rng, "total", wording, *(f'"{n}"' for n in names))
    return _finish(world, "total", question, names, steps, [2], 2, wording)


def _build_days(rng: Random, world: World, hops: int, wording: int) -> Task | None:
    names, steps = _two_lookups(rng, world, "person", "born")
    steps.append(Step("days_between", {"start": Ref(0), "end": Ref(1)}, "days"))
    question = _frame(rng, "days", wording, *(f'"{n}"' for n in names))
    return _finish(world, "days", question, names, steps, [2], 2, wording)


_BUILDERS: dict[str, Callable[..., Task | None]] = {
    "chain": _build_chain,
    "pair": _build_pair,
    "leaf": functools.partial(_build_chain, leaf=True),
    "compare": _build_compare,
    "search": _build_search,
    "convert": _build_convert,
    "total": _build_total,
    "days": _build_days,
}


def offered_tools(rng: Random, task: Task, difficulty: int) -> list[str]:
    """The look-ups, what the task needs, and distractors up to MAX_TOOLS, in the order of the tool list."""
    needed = set(LOOKUPS) | {step.tool for step in task.steps}
    known = list(tools.PARAMETERS) if difficulty > 1 else [*LOOKUPS, "search", "weather", "news"]
    spare = [name for name in known if name not in needed]
    rng.shuffle(spare)
    chosen = needed | set(spare[: MAX_TOOLS - len(needed)])
    return [name for name in tools.PARAMETERS if name in chosen]
