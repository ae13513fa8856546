"""Where the keys of a batch lie: lists of work for decode and extend attention, built on the host.

Keys and values of a layer lie in a cache [S, Hkv, D]; slot = page * page_size + offset. A **segment** is a
node of the prefix trie: a run of tokens in pages of its own, the last page perhaps not full. A row's keys are
a path of segments from the root down, and last its **own segment**, which grows by one token a step.

`decode_tasks` cuts segments into **tasks**: (up to `tile_rows` rows that share the segment, `split_keys` of
its keys). A task is one program a key/value head: it reads its keys once for all its rows, and writes a
partial (out, lse) for each; a row's partials are merged by lse. The cuts depend on the segments alone, never
on how many rows are in flight, so neither do a row's roundings.

The list is made where rows come and go, with room in the own segments for the steps to come. How many of
those keys exist is read from `row_length` on the device, so between two lists nothing changes, and a CUDA
graph that holds its address stays valid: `DecodeTasks.copy_` refills one buffer with one copy. Room for more
than `split_keys` further tokens is a task a head that finds nothing (about a microsecond): make a new list
every few hundred steps rather than one for thousands. Pages of 64 tokens suit the kernels best: a tile of
keys is then one page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Columns of DecodeTasks.tasks.
ROW_START, ROW_COUNT, PAGE_START, FIRST_KEY, KEY_COUNT, POSITION, OWN_ROW = range(7)
TASK_WIDTH = 8  # 32 bytes: one sector
SPLIT_KEYS = 512
TILE_ROWS = 8


class Segment(NamedTuple):
    """A trie node: `length` tokens in `pages`, in order."""

    pages: Sequence[int]
    length: int


class RowPath(NamedTuple):
    """A row's keys: indices of shared segments from the root down, and pages with room for its whole turn."""

    segments: Sequence[int]
    own_pages: Sequence[int]


class TaskCapacity(NamedTuple):
    """Sizes of the buffers: rows of the batch, tasks, rows summed over tasks, pages listed."""

    rows: int
    tasks: int
    task_rows: int
    pages: int

    @property
    def ints(self) -> int:
        return 1 + TASK_WIDTH * self.tasks + 2 * self.task_rows + self.pages + 2 * self.rows + 1


class TaskCapacityError(ValueError):
    """The list needs a larger buffer; `needed` says how large."""

    def __init__(self, needed: TaskCapacity, capacity: TaskCapacity) -> None:
        super().__init__(
            f"tasks need {needed}, but the capacity is {capacity}: give decode_tasks a larger one"
        )
        self.needed = needed


@dataclass
class DecodeTasks:
    """A task list in one int32 buffer of fixed capacity; the fields below are views of it.

    count [1]                tasks in use
    tasks [tasks, 8]         row_start, row_count (into `rows`), page_start (into `pages`), first_key,
                             key_count (within the segment), position (of the segment's first token),
                             own_row (-1: shared)
    rows [task_rows]         rows of each task; an index into it is also the number of a partial result
    row_partials [task_rows] partials of each row, row after row
    pages [pages]
    row_start [rows]         position of the first token of a row's own segment
    row_ptr [rows + 1]       a row's range in `row_partials`; empty for padding rows
    """

    buffer: Tensor
    capacity: TaskCapacity
    page_size: int
    tile_rows: int
    split_keys: int
    plan: object = field(default=None, repr=False)  # the torch reference's, made at its first call

    def __post_init__(self) -> None:
        rows, tasks, task_rows, pages = self.capacity
        sizes = [1, TASK_WIDTH * tasks, task_rows, task_rows, pages, rows, rows + 1]
        parts = self.buffer.split(sizes)
        self.count, flat, self.rows, self.row_partials, self.pages, self.row_start, self.row_ptr = parts
        self.tasks = flat.view(tasks, TASK_WIDTH)

    def to(self, device: torch.device | str) -> DecodeTasks:
        return DecodeTasks(
            self.buffer.to(device), self.capacity, self.page_size, self.tile_rows, self.split_keys
        )

    def copy_(self, other: DecodeTasks) -> DecodeTasks:
        """Refills this list in place (graphs keep its address). Both were made with equal sizes."""
        mine, theirs = ((t.capacity, t.page_size, t.tile_rows, t.split_keys) for t in (self, other))
        if mine != theirs:
            raise ValueError(f"a list made with {theirs} cannot refill one made with {mine}")
        self.buffer.copy_(other.buffer, non_blocking=True)
        self.plan = None
        return self


def decode_tasks(
    segments: Sequence[Segment],
    rows: Sequence[RowPath],
    *,
    page_size: int,
    capacity: TaskCapacity | None = None,
    split_keys: int = SPLIT_KEYS,
    tile_rows: int = TILE_ROWS,
    pin_memory: bool = False,
) -> DecodeTasks:
    """The task list of a batch, on the CPU (`.to(device)` or `.copy_` bring it to a device).

    Args:
        segments: shared trie nodes; those of length 0 or below no row make no task.
        rows: one path a row of the batch; rows past these, up to `capacity.rows`, are padding.
        page_size: tokens a page.
        capacity: sizes of the buffers; None: just as large as needed.
        split_keys: keys of a task, a multiple of 16.
        tile_rows: most rows of a task; tile_rows * (Hq / Hkv) query rows make one tile.

    Raises:
        ValueError: naming the segment or row. TaskCapacityError: with the capacity needed.
    """
    if split_keys < 16 or split_keys % 16:
        raise ValueError(f"split_keys must be a multiple of 16, got {split_keys}")
    if tile_rows < 1 or page_size < 1:
        raise ValueError(f"tile_rows and page_size must be at least 1, got {tile_rows} and {page_size}")
    below: list[list[int]] = [[] for _ in segments]
    starts = np.zeros(len(segments), np.int64)
    row_start = np.zeros(len(rows), np.int32)
    for i_row, row in enumerate(rows):
        at = 0
        for i in row.segments:
            if not 0 <= i < len(segments):
                raise ValueError(f"row {i_row} names segment {i}, but there are {len(segments)}")
            if below[i] and starts[i] != at:
                raise ValueError(f"segment {i} starts at {starts[i]} for one row and at {at} for row {i_row}")
            starts[i] = at
            below[i].append(i_row)
            at += segments[i].length
        row_start[i_row] = at

    tasks: list[tuple[int, ...]] = []
    members: list[int] = []
    pages: list[int] = []

    def add(rows_below: list[int], page_list: Sequence[int], length: int, position: int, own: int) -> None:
        for first in range(0, length, split_keys):
            for i in range(0, len(rows_below), tile_rows):
                tile = rows_below[i : i + tile_rows]
                keys = min(split_keys, length - first)
                tasks.append((len(members), len(tile), len(pages), first, keys, position, own, 0))
                members.extend(tile)
        pages.extend(page_list)

    for i, (segment, rows_below) in enumerate(zip(segments, below, strict=True)):
        if not 0 <= segment.length <= len(segment.pages) * page_size:
            raise ValueError(
                f"segment {i}: {segment.length} tokens do not fit {len(segment.pages)} pages of {page_size}"
            )
        if rows_below:
            used = segment.pages[: -(-segment.length // page_size)]
            add(rows_below, used, segment.length, int(starts[i]), -1)
    for i_row, row in enumerate(rows):
        if not len(row.own_pages):
            raise ValueError(f"row {i_row} has no page of its own")
        add([i_row], row.own_pages, len(row.own_pages) * page_size, int(row_start[i_row]), i_row)

    needed = TaskCapacity(len(rows), len(tasks), len(members), len(pages))
    capacity = capacity or needed
    if any(n > c for n, c in zip(needed, capacity, strict=True)):
        raise TaskCapacityError(needed, capacity)
    made = DecodeTasks(
        torch.zeros(capacity.ints, dtype=torch.int32, pin_memory=pin_memory),
        capacity, page_size, tile_rows, split_keys,
    )  # fmt: skip
    made.count[0] = len(tasks)
    made.tasks.numpy()[: len(tasks)] = np.array(tasks, np.int32).reshape(-1, TASK_WIDTH)
    made.pages.numpy()[: len(pages)] = pages
    made.row_start.numpy()[: len(rows)] = row_start
    member_rows = np.array(members, np.int32)
    made.rows.numpy()[: len(members)] = member_rows
    made.row_partials.numpy()[: len(members)] = np.argsort(member_rows, kind="stable")
    counts = np.bincount(member_rows, minlength=capacity.rows)
    made.row_ptr.numpy()[1:] = counts.cumsum()
    return made


@dataclass
class ExtendTasks:
    """New tokens and what each tree of them continues; shared by all layers. Made by `extend_tasks`.

    subtree_end [T], positions [T], roots [R + 1] (first token of each tree, then T) int64 on the host;
    `path_slots[r]` the cached slots of root r's ancestors, in order of position.
    """

    subtree_end: np.ndarray
    positions: np.ndarray
    roots: np.ndarray
    paths: list[list[Segment]]
    page_size: int
    plans: dict = field(default_factory=dict, repr=False)  # of each implementation, by device and tile

    def path_slots(self, i_root: int) -> np.ndarray:
        return segment_slots(self.paths[i_root], self.page_size)


def segment_slots(path: Sequence[Segment], page_size: int) -> np.ndarray:
    """Slots of all tokens of a path, int64."""
    offsets = np.arange(page_size)
    slots = [(np.asarray(s.pages, np.int64)[:, None] * page_size + offsets).ravel()[: s.length] for s in path]
    return np.concatenate(slots) if slots else np.zeros(0, np.int64)


def extend_tasks(
    subtree_end: Sequence[int] | np.ndarray | Tensor, paths: Sequence[Sequence[Segment]], *, page_size: int
) -> ExtendTasks:
    """Work of `extend_attention`: a forest of new tokens in pre-order below cached paths.

    Args:
        subtree_end: [T]; new token j is seen by new token i iff j <= i < subtree_end[j].
        paths: for each tree of the forest, in order, the cached segments above it, from the trie's root down.

    A plain run of n tokens of one row is `subtree_end = [n] * n`, and several rows follow one another.
    `positions` of the result are the tokens' position ids: cached tokens above plus depth in the tree.
    """
    end = np.asarray(subtree_end, np.int64)
    roots = [0]
    while roots[-1] < end.size:
        if not roots[-1] < end[roots[-1]] <= end.size:
            raise ValueError(
                f"subtree_end[{roots[-1]}] = {end[roots[-1]]} is not in ({roots[-1]}, {end.size}]"
            )
        roots.append(int(end[roots[-1]]))
    if len(paths) != len(roots) - 1:
        raise ValueError(f"{len(paths)} paths were given for {len(roots) - 1} trees of new tokens")
    for i, path in enumerate(paths):
        for s in path:
            if not 0 <= s.length <= len(s.pages) * page_size:
                raise ValueError(
                    f"path {i}: {s.length} tokens do not fit {len(s.pages)} pages of {page_size}"
                )
    # tokens whose interval is still open at i, less itself
    depth = np.arange(end.size) - np.bincount(end, minlength=end.size + 1).cumsum()[: end.size]
    above = np.array([sum(s.length for s in path) for path in paths], np.int64)
    # Earlier trees are closed at a root, so the depth counts from it.
    positions = depth + np.repeat(above, np.diff(roots))
    return ExtendTasks(end, positions, np.array(roots, np.int64), [list(p) for p in paths], page_size)
