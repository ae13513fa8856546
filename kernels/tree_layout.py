"""What `subtree_end` alone says of a token tree: depths, parents, and whether it is a tree. Host work, NumPy.

Tokens lie in depth-first pre-order; the subtree of token i is [i, subtree_end[i]).
"""

from __future__ import annotations

import numpy as np


def tree_depth(subtree_end: np.ndarray) -> np.ndarray:
    """Depth of every token [T] int64; ValueError if `subtree_end` is not a tree."""
    end = np.asarray(subtree_end, dtype=np.int64)
    size = end.size
    index = np.arange(size)
    if (bad := np.flatnonzero((end <= index) | (end > size))).size:
        i = int(bad[0])
        why = "ends past the pack" if end[i] > size else "ends before it begins"
        raise ValueError(
            f"subtree_end[{i}] = {end[i]} with T = {size}: the interval {why}; it must lie in (i, T]"
        )
    depth = index - np.cumsum(np.bincount(end, minlength=size + 1))[:size] if size else index
    # Intervals [i, end[i]) are nested iff no token outlives the token just above it on the path.
    parent = parent_index(end, depth, strict=False)
    if (crossing := np.flatnonzero((parent >= 0) & (end > end[parent]))).size or (parent < -1).any():
        i = int(crossing[0]) if crossing.size else int(np.flatnonzero(parent < -1)[0])
        raise ValueError(
            f"subtree_end is not a tree: interval [{i}, {end[i]}) of token {i} crosses that of an earlier one"
        )
    return depth


def parent_index(subtree_end: np.ndarray, depth: np.ndarray, *, strict: bool = True) -> np.ndarray:
    """Parent of every token [T] int64, -1 at roots: the last earlier token one level up.

    `strict=False` marks tokens whose depth fits no earlier token with -2 instead of assuming that all do.
    """
    size = depth.size
    depth = np.asarray(depth, dtype=np.int64)
    index = np.arange(size)
    parent = index - 1
    # In pre-order the token before is the parent, unless a branch ended there.
    jump = np.flatnonzero(depth != np.concatenate(([-1], depth[:-1])) + 1) if size else index
    if jump.size:
        order = np.lexsort((index, depth))  # by depth, then position
        keys = depth[order] * (size + 1) + order
        wanted = (depth[jump] - 1) * (size + 1) + jump
        at = np.searchsorted(keys, wanted) - 1
        found = order[np.maximum(at, 0)]
        fits = (at >= 0) & (depth[found] == depth[jump] - 1)
        parent[jump] = np.where(fits, found, np.where(depth[jump] == 0, -1, -1 if strict else -2))
    return parent
