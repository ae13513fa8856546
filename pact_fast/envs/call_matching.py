"""Rewarding calls by how well they match the ground-truth calls, one to one.

similarity(call, truth) is 0 for different tools, else the mean of three: 1 for the name, the Jaccard
overlap of the argument names, and the share of the truth's arguments given with the same value. Each truth
is used once: `bipartite` finds the assignment of the largest total similarity (SciPy), `greedy` lets the
calls choose in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

Call = tuple[str, Mapping[str, Any]]


def similarity(call: Call, truth: Call) -> float:
    """In [0, 1]; 1 for the same tool with the same arguments."""
    if call[0] != truth[0]:
        return 0.0
    given, wanted = call[1], truth[1]
    names = set(given) | set(wanted)
    overlap = len(set(given) & set(wanted)) / len(names) if names else 1.0
    equal = sum(key in given and given[key] == value for key, value in wanted.items())
    return (1.0 + overlap + (equal / len(wanted) if wanted else 1.0)) / 3


def match_calls(
    calls: Sequence[Call], truths: Sequence[Call], *, greedy: bool = False
) -> list[tuple[int, int, float]]:
    """(call, truth, similarity) of the matched pairs; pairs of similarity 0 are no match."""
    if not calls or not truths:
        return []
    table = np.array([[similarity(call, truth) for truth in truths] for call in calls])  # [calls, truths]
    if greedy:
        pairs = []
        free = set(range(len(truths)))
        for i in range(len(calls)):
            if free:
                j = max(sorted(free), key=lambda k: table[i, k])
                pairs.append((i, j))
                if table[i, j] > 0:
                    free.discard(j)
    else:
        rows, columns = linear_sum_assignment(table, maximize=True)
        pairs = list(zip(rows.tolist(), columns.tolist(), strict=True))
    return [(i, j, float(table[i, j])) for i, j in pairs if table[i, j] > 0]
