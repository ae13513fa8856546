"""Random batches for the tests of the decode ops, and the same attention written down densely in fp64."""

from __future__ import annotations

import numpy as np
import torch

from pact_fast.kernels.decode.tasks import RowPath, Segment, segment_slots

NAN = float("nan")


class Cache:
    """Pages of one layer, NaN wherever no token was written."""

    def __init__(
        self, pages: int, page_size: int, kv_heads: int, head_dim: int, dtype, seed: int, device="cpu"
    ):
        self.page_size, self.random = page_size, np.random.default_rng(seed)
        shape = (pages * page_size, kv_heads, head_dim)
        self.k = torch.full(shape, NAN, dtype=dtype, device=device)
        self.v = torch.full(shape, NAN, dtype=dtype, device=device)
        self.free = self.random.permutation(pages).tolist()

    def take(self, tokens: int, room: int | None = None) -> list[int]:
        """Pages for `room` tokens, the first `tokens` of them written."""
        pages = [self.free.pop() for _ in range(-(-max(tokens, room or 0) // self.page_size))]
        self.write(segment_slots([Segment(pages, tokens)], self.page_size))
        return pages

    def write(self, slots: np.ndarray) -> None:
        for x in (self.k, self.v):
            made = torch.from_numpy(self.random.normal(size=(len(slots), *x.shape[1:])))
            x[torch.from_numpy(slots).to(x.device)] = made.to(x)


def trie_batch(cache: Cache, lengths, row_specs):
    """Segments of the given lengths, and rows of (path of segment numbers, own tokens, room for them)."""
    segments = [Segment(cache.take(n), n) for n in lengths]
    rows = [RowPath(path, cache.take(own, room)) for path, own, room in row_specs]
    return (
        segments,
        rows,
        torch.tensor([own for _, own, _ in row_specs], dtype=torch.int32, device=cache.k.device),
    )


def dense_rows(q, cache: Cache, segments, rows, row_length, scale, window=None, softcap=None):
    """The definition, row by row."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for i, row in enumerate(rows):
        path = [*(segments[s] for s in row.segments), Segment(row.own_pages, int(row_length[i]))]
        slots = torch.from_numpy(segment_slots(path, cache.page_size))
        seen = torch.arange(len(slots)) if window is None else torch.arange(len(slots))[-window:]
        out[i] = dense(q[i : i + 1], cache, slots[seen], None, scale, softcap)[0]
    return out


def dense(q, cache: Cache, slots, mask, scale, softcap=None):
    """softmax(scale q K^T) V in fp64, q [n, Hq, D] over K, V at `slots` [m]; mask [n, m] or None."""
    group = q.shape[1] // cache.k.shape[1]
    k, v = (x.cpu()[slots].double().repeat_interleave(group, 1) for x in (cache.k, cache.v))
    score = torch.einsum("ihd,jhd->hij", q.cpu().double(), k) * scale
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    if mask is not None:
        score = score.masked_fill(~mask, -float("inf"))
    return torch.einsum("hij,jhd->ihd", score.softmax(-1), v)


def random_forest(random: np.random.Generator, sizes) -> np.ndarray:
    """subtree_end of one random tree a size, in pre-order."""
    ends: list[int] = []
    for size in sizes:
        base = len(ends)
        depth = [0]
        for _ in range(size - 1):
            depth.append(int(random.integers(1, depth[-1] + 2)) if random.random() < 0.3 else depth[-1] + 1)
        for i in range(size):
            later = [j for j in range(i + 1, size) if depth[j] <= depth[i]]
            ends.append(base + (later[0] if later else size))
    return np.array(ends, np.int64)


def dense_forest(q, cache: Cache, slots, end, positions, paths, roots, scale, window=None, softcap=None):
    out = torch.zeros(q.shape, dtype=torch.float64)
    for r, path in enumerate(paths):
        a, b = roots[r], roots[r + 1]
        above = torch.from_numpy(segment_slots(path, cache.page_size))
        rows, columns = torch.arange(a, b)[:, None], torch.arange(a, b)
        new = (columns <= rows) & (rows < torch.from_numpy(end[a:b]))
        mask = torch.cat([torch.ones(b - a, len(above), dtype=torch.bool), new], 1)
        if window is not None:
            place = torch.cat([torch.arange(len(above)), torch.from_numpy(positions[a:b])])
            mask &= torch.from_numpy(positions[a:b])[:, None] - place < window
        out[a:b] = dense(q[a:b], cache, torch.cat([above, slots[a:b].cpu()]), mask, scale, softcap)
    return out
