"""What `subtree_end` alone says of a token tree: depths, parents, and whether it is a tree. Host work, NumPy.

Tokens lie in depth-first pre-order; the subtree of token i is [i, subtree_end[i]).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pact_fast.kernels.tree_attention import native as tree_pack


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


@dataclass(frozen=True)
class TileList:
    """For each query tile (block_m rows) the key tiles (block_n rows) that it has to visit.

    Key tiles of query tile i: `cols[ptr[i]:ptr[i + 1]]`, ascending in each part; those before `split[i]` are
    visible to every query of the tile and need no mask. `order`: query tiles, longest list first. All int32.
    """

    block_m: int
    block_n: int
    order: np.ndarray  # [query tiles]
    ptr: np.ndarray  # [query tiles + 1]
    split: np.ndarray  # [query tiles]
    cols: np.ndarray  # [visited tile pairs]


def tile_bounds(end: np.ndarray, depth: np.ndarray, block: int) -> tuple[np.ndarray, ...]:
    """Least and greatest subtree_end, least and greatest depth of every tile of `block` tokens."""
    starts = np.arange(0, end.size, block)
    return (
        np.minimum.reduceat(end, starts),
        np.maximum.reduceat(end, starts),
        np.minimum.reduceat(depth, starts),
        np.maximum.reduceat(depth, starts),
    )


def tile_list(
    end: np.ndarray, depth: np.ndarray, block_m: int, block_n: int, window: int | None, *, native: bool = True
) -> TileList:
    """Key tiles of every query tile. `end`, `depth`: [T], T >= 1, of a tree (`tree_depth`).

    `native`: use csrc/tree_pack.cpp where it was built; the result is the same.
    """
    library = tree_pack.library() if native else None
    if library is not None:
        end, depth = (np.ascontiguousarray(x, dtype=np.int32) for x in (end, depth))
        ptr, split, cols = tree_pack.tile_lists(library, end, depth, block_m, block_n, window)
    else:
        ptr, split, cols = _tile_list_numpy(end, depth, block_m, block_n, window)
    order = np.argsort(-np.diff(ptr), kind="stable").astype(np.int32)
    return TileList(block_m, block_n, order, ptr, split, cols)


def visible_tiles(
    end: np.ndarray, depth: np.ndarray, block_m: int, block_n: int, window: int | None, first_query: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(seen, full), both bool [query tiles, key tiles]: some, and all, pairs of the two tiles are visible.

    `first_query`: query tiles begin there; keys always at 0. A tile that reaches past T is never full.
    """
    size = end.size
    n_end_min, n_end_max, n_depth_min, n_depth_max = tile_bounds(end, depth, block_n)
    _, _, m_depth_min, m_depth_max = tile_bounds(end[first_query:], depth[first_query:], block_m)
    n_first = np.arange(n_end_min.size) * block_n
    n_last = n_first + block_n - 1
    first = (first_query + np.arange(m_depth_min.size) * block_m)[:, None]
    last = np.minimum(first + block_m, size) - 1
    seen = (n_first <= last) & (n_end_max > first)
    full = seen & (n_last <= first) & (n_end_min > last)
    if window is not None:
        seen &= m_depth_min[:, None] - n_depth_max < window
        full &= m_depth_max[:, None] - n_depth_min < window
    return seen, full & seen


def _tile_list_numpy(end, depth, block_m: int, block_n: int, window: int | None) -> tuple[np.ndarray, ...]:
    """ptr, split and cols of a TileList: the reference of the native form."""
    seen, full = visible_tiles(end, depth, block_m, block_n, window)
    both = np.concatenate((full, seen & ~full), axis=1)
    ptr = np.concatenate(([0], np.cumsum(both.sum(1))))
    split = ptr[:-1] + full.sum(1)
    return tuple(x.astype(np.int32) for x in (ptr, split, np.nonzero(both)[1] % full.shape[1]))


def key_tile_order(end: np.ndarray, block_n: int) -> np.ndarray:
    """Key tiles, the one seen by most queries first: shared prefixes hold most of the dK/dV work. int32."""
    starts = np.arange(0, end.size, block_n)
    return np.argsort(starts - np.maximum.reduceat(end, starts), kind="stable").astype(np.int32)
