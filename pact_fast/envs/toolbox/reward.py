"""The toolbox reward: Solve-F1 over sub-answers and final answers.

With u sub-answers (the values of the steps of the task), s of them solved by calls, c calls made, k final
answers, a of them right, and w the weight of a final answer:

    reward = 2 (s + w a) / ((c + w k) + (u + w k))

A short right path scores 1 (s = u = c, a = k); every further call lowers it, so the way of an expert that
takes detours is beaten by a shorter one; a right step counts even where the answer is wrong. Calls of all
kinds count in c, malformed ones too. An episode without a valid call and without a quoted answer gets a
small negative reward.
"""

from __future__ import annotations

from collections.abc import Sequence

from pact_fast.envs.toolbox.questions import quoted


def solve_f1(
    *, solved: int, sub_answers: int, calls: int, right: int, answers: int, answer_weight: float
) -> float:
    """The formula above; 1 for the shortest right path, 0 where nothing is solved."""
    gained = solved + answer_weight * right
    return 2 * gained / ((calls + answer_weight * answers) + (sub_answers + answer_weight * answers))


def right_answers(message: str, answers: Sequence[str], mentioned: int) -> int:
    """How many of `answers` the message gives, by value, in any order: its last len(answers) quoted values
    count.

    `mentioned`: names the question mentions, which the message may repeat. A message that quotes more than
    these and its answers is a guess at large and gets 0.
    """
    given = quoted(message)
    if len(given) > len(answers) + mentioned:
        return 0
    return len(set(given[-len(answers) :]) & set(answers))


def newly_solved(response: str, open_values: list[str]) -> str | None:
    """The first unsolved sub-answer that stands quoted in the response, if any; one call solves one at
    most."""
    values = set(quoted(response))
    return next((value for value in open_values if value in values), None)
