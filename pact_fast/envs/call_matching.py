"""Rewarding calls by how well they match the reference calls, one to one, over a whole rollout.

The hard assignment of MatchTIR, as PACT uses it (arXiv 2606.16215, appendix B, equations 24 to 29). Any
record with reference calls can be scored so:

    similarity      0 for another tool, else (1 + J + m) / (2 + n): n arguments of the reference call, m of
                    them given with exactly that value, J the Jaccard overlap of the argument names
    assignment      of all calls of the rollout to the reference calls, of the largest total similarity
                    (SciPy); `greedy` takes the most similar pairs one after the other
    tool turn       mean over its calls: the similarity of a matched one, -penalty of another; 0 without a
    call final turn      F1 between the sets of words of the answer given and of the reference answer
    rollout         the sum of its turns
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from pact_fast.data.reading import read_json
from pact_fast.data.records import Record

Call = tuple[str, Mapping[str, Any]]
REWARDS = ("call_matching", "call_matching_greedy")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def similarity(call: Call, reference: Call) -> float:
    """In [0, 1]; 1 for the same tool with the same arguments. The case of the tool's name does not count."""
    if call[0].lower() != reference[0].lower():
        return 0.0
    given, wanted = call[1], reference[1]
    names = set(given) | set(wanted)
    overlap = len(set(given) & set(wanted)) / len(names) if names else 1.0
    equal = sum(key in given and given[key] == value for key, value in wanted.items())
    return (1.0 + overlap + equal) / (2 + len(wanted))


def match_calls(
    calls: Sequence[Call], references: Sequence[Call], *, greedy: bool = False
) -> list[tuple[int, int, float]]:
    """(call, reference, similarity) of the matched pairs; pairs of similarity 0 are no match."""
    if not calls or not references:
        return []
    table = np.array([[similarity(call, reference) for reference in references] for call in calls])
    if not greedy:
        rows, columns = linear_sum_assignment(table, maximize=True)  # table: [calls, references]
        pairs = list(zip(rows.tolist(), columns.tolist(), strict=True))
    else:
        pairs, taken = [], (set[int](), set[int]())
        for flat in np.argsort(-table, axis=None, kind="stable").tolist():
            i, j = divmod(flat, len(references))
            if i not in taken[0] and j not in taken[1]:
                pairs.append((i, j))
                taken[0].add(i)
                taken[1].add(j)
    return [(i, j, float(table[i, j])) for i, j in sorted(pairs) if table[i, j] > 0]


@dataclass(frozen=True)
class MatchedCalls:
    """turn_rewards: of each tool turn. total: similarity of all matched pairs."""

    turn_rewards: tuple[float, ...]
    total: float


def match_turns(
    turns: Sequence[Sequence[Call]], references: Sequence[Call], *, greedy: bool = False, penalty: float = 0.0
) -> MatchedCalls:
    """Rewards of the tool turns of a rollout, its calls matched all together.

    Args:
        turns: the calls of each turn; a call that could not be read is ("", {}) and matches none.
        references: the reference calls.
        greedy: see `match_calls`.
        penalty: what a call without a match loses.
    """
    flat = [(t, call) for t, calls in enumerate(turns) for call in calls]
    pairs = match_calls([call for _, call in flat], references, greedy=greedy)
    gained = {i: s for i, _, s in pairs}
    sums = [0.0] * len(turns)
    for i, (turn, _) in enumerate(flat):
        sums[turn] += gained.get(i, -penalty)
    rewards = tuple(s / len(calls) if calls else 0.0 for s, calls in zip(sums, turns, strict=True))
    return MatchedCalls(rewards, sum(gained.values()))


def tagged_answer(text: str) -> str | None:
    """What stands in the last `<answer>` ... `</answer>`; None without one."""
    found = _ANSWER.findall(text)
    return found[-1] if found else None


def answer_f1(given: str | None, reference: str) -> float:
    """F1 between the sets of words, in lower case and with punctuation as blanks; 0 where nothing is
    given."""
    words, wanted = (
        set(re.sub(r"[^\w\s]|_", " ", text.lower()).split()) for text in (given or "", reference)
    )
    shared = len(words & wanted)
    return 2 * shared / (len(words) + len(wanted)) if shared else 0.0


def reference_calls(record: Record) -> list[Call] | None:
    """The record's `ground_truth` calls as (name, arguments); None where it has none.

    Arguments stand under `arguments` or, as in MatchTIR's published data, under `parameters`; both may be
    JSON text.
    Raises ValueError naming file, record and field.
    """
    value = record.env.get("ground_truth")
    where = f"{record.source}: record {record.id!r}: ground_truth"
    value = _json(value, where)
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{where}: must be a list of calls, got {type(value).__name__}")
    known = {tool["function"]["name"].lower() for tool in record.tools}
    calls: list[Call] = []
    for i, item in enumerate(value):
        call = item.get("function", item) if isinstance(item, dict) else item
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ValueError(f"{where}[{i}]: must be a call with name and arguments, got {item!r:.60}")
        key = "arguments" if "arguments" in call else "parameters"
        arguments = _json(call.get(key), f"{where}[{i}].{key}") or {}
        if not isinstance(arguments, dict):
            raise ValueError(f"{where}[{i}].{key}: must be an object, got {arguments!r:.80}")
        if call["name"].lower() not in known:
            raise ValueError(f"{where}[{i}].name: no tool named {call['name']!r}")
        calls.append((call["name"], arguments))
    return calls


def need_reference_calls(record: Record, calls: Sequence[Call] | None, reward: str) -> Sequence[Call]:
    """`calls`; ValueError where a record has none for a reward that needs them."""
    if calls is None:
        raise ValueError(
            f"{record.source}: record {record.id!r}: ground_truth: is missing; reward={reward!r} matches "
            "calls with the reference calls that stand there: add them, or choose another reward"
        )
    return calls


def _json(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return read_json(value)
    except ValueError as error:
        raise ValueError(f"{where}: is text but not JSON: {error}") from None
