"""Decoding against the pages, in a CUDA graph on a GPU; the same step runs launch by launch elsewhere.

A shared prefix is a segment of the task list (kernels/decode/tasks.py), read once for all rows below it. All
that a step reads lies in buffers of one `Slate`, as wide as the batch rounded up to a bucket: rows come and
go by being copied into it, so what was captured once is replayed from then on. The host launches step t + 1
before it looks at the tokens of step t; a row that ended there has sampled one token more, which is dropped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pact_fast.kernels.decode import ops
from pact_fast.kernels.decode.tasks import RowPath, Segment, TaskCapacity, decode_tasks
from pact_fast.rollout.engine import RolloutError
from pact_fast.rollout.in_process.cache import PAGE, PagedTokens
from pact_fast.rollout.in_process.runner import Runner
from pact_fast.rollout.in_process.weights import LayerWeights

if TYPE_CHECKING:
    from pact_fast.rollout.in_process.scheduler import Request

SMALL_BUCKETS = (1, 2, 4)  # then multiples of 8


def bucket_of(rows: int) -> int:
    return next((b for b in SMALL_BUCKETS if rows <= b), -(-rows // 8) * 8)


class Slate:
    """Fixed buffers of `rows` rows, and the step over them. See `runner.Attention`.

    Padding rows own nothing: their slot is -1. tokens, logprobs [rows] hold what the last step sampled.
    """

    def __init__(self, runner: Runner, rows: int, own_pages: int, capacity: TaskCapacity) -> None:
        self.runner, self.rows = runner, rows
        device = runner.weights.device

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.ids, self.positions, self.seeds, self.length = ints(rows), ints(rows), ints(rows), ints(rows)
        self.live, self.own_pages = ints(rows).bool(), ints(rows, own_pages)
        self.temperatures = torch.zeros(rows, device=device)
        self.tokens, self.logprobs = ints(rows), torch.zeros(rows, device=device)
        self.tasks = decode_tasks([], [], page_size=PAGE, capacity=capacity).to(device)
        self.graph: Any = None

    def fill(self, name: str, values: Sequence[Any]) -> None:
        """The first rows of a buffer; the others become zero."""
        buffer = getattr(self, name)
        host = torch.zeros(buffer.shape, dtype=buffer.dtype)
        if len(values):
            host[: len(values)] = torch.tensor(values, dtype=buffer.dtype)
        buffer.copy_(host, non_blocking=True)

    def step(self) -> None:
        """One token a row, everything on the device."""
        index = (self.length // PAGE).clamp(max=self.own_pages.shape[1] - 1)
        page = self.own_pages.gather(1, index[:, None])[:, 0]
        # Page 0 stands for none: of padding, and of a row that has ended and is stepped on.
        self.slots = torch.where(page > 0, page * PAGE + self.length % PAGE, -1)
        self.length.add_(self.live)
        hidden = self.runner.forward(self.ids, self)
        self.positions.add_(self.live)
        tokens, logprobs, _ = ops.sample(
            self.runner.logits(hidden), self.temperatures, None, None, None, self.seeds, self.positions
        )
        self.tokens.copy_(tokens)
        self.logprobs.copy_(logprobs)
        self.ids.copy_(tokens.clamp(min=0))

    def attend(self, layer: LayerWeights, qkv: Tensor) -> Tensor:
        q, keys, values = self.runner.write(layer, qkv, self.positions, self.slots)
        scale, window = self.runner.family.attention_scale, layer.spec.window
        return ops.shared_prefix_attention(
            q, keys, values, self.tasks, self.length, scale=scale, window=window
        ).flatten(1)

    def capture(self) -> None:
        """Records the step as a graph. Its state is put back: a replay is the first step that counts."""
        state = {name: getattr(self, name).clone() for name in ("ids", "positions", "length")}

        def restore() -> None:
            for name, value in state.items():
                getattr(self, name).copy_(value)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles kernels, sizes workspaces
            self.step()
        torch.cuda.current_stream().wait_stream(side)
        restore()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        restore()
        self.graph = graph


class Slates:
    """Slates by everything a captured step depends on; made when first needed, kept for good.

    graphs: whether steps are captured, which only a GPU can; record: called with a slate before each launch.
    """

    def __init__(self, runner: Runner, *, graphs: bool) -> None:
        device = runner.weights.device
        self.runner, self.graphs = runner, graphs and device.type == "cuda"
        self.record: Callable[[Slate], Any] = lambda slate: contextlib.nullcontext()
        self._slates: dict[tuple, Slate] = {}

    def get(self, rows: int, own_pages: int, capacity: TaskCapacity) -> Slate:
        runner = self.runner
        key = (
            rows,
            own_pages,
            capacity,
            runner.weights.dtype,
            tuple(sorted({layer.spec.window or 0 for layer in runner.weights.layers})),
            runner.pool.data.data_ptr(),
            runner.weights.embedding.data_ptr(),
        )
        if key not in self._slates:
            self._slates[key] = Slate(runner, rows, own_pages, capacity)
        return self._slates[key]

    def launch(self, slate: Slate) -> None:
        try:
            if self.graphs and slate.graph is None:
                slate.capture()
            with self.record(slate):
                if slate.graph is not None:
                    slate.graph.replay()
                else:
                    slate.step()
        except Exception as error:
            raise RolloutError(
                f"the decoding step of {slate.rows} rows of a {self.runner.family.name} in "
                f"{self.runner.weights.dtype} failed on {self.runner.weights.device}: "
                f"{type(error).__name__}: {error}. rollout.cuda_graphs=false launches its kernels one "
                "by one; rollout.engine=http samples elsewhere"
            ) from error


class PagedBatch:
    """The rows that decode together; the same face as `batch.DenseBatch`."""

    def __init__(self, slates: Slates, rows: Sequence[Request], steps: int) -> None:
        self.slates, self.left, self.alive = slates, steps, len(rows)
        self.size = len(rows)
        self._reading: tuple[Tensor, Tensor, Any] | None = None
        kvs = [row.kv for row in rows if row.kv is not None]
        self.kvs: list[PagedTokens] = kvs
        runs, paths, depths = segments_of([kv.pages[: kv.count // PAGE] for kv in kvs])
        owned = [kv.pages[depth:] for kv, depth in zip(kvs, depths, strict=True)]
        segments = [Segment(pages, len(pages) * PAGE) for pages in runs]
        keys = [RowPath(path, own) for path, own in zip(paths, owned, strict=True)]
        # Rounded up, so that batches of about the same shape share a slate.
        needed = decode_tasks(segments, keys, page_size=PAGE).capacity
        bucket, wide = bucket_of(len(rows)), _round(max(map(len, owned)))
        capacity = TaskCapacity(bucket, *map(_round, needed[1:]))
        self.slate = slate = slates.get(bucket, wide, capacity)
        pinned = slate.tokens.is_cuda
        slate.tasks.copy_(decode_tasks(segments, keys, page_size=PAGE, capacity=capacity, pin_memory=pinned))
        slate.fill("ids", [row.tokens[-1] for row in rows])
        slate.fill("positions", [len(row.tokens) - 1 for row in rows])
        slate.fill("seeds", [row.seed for row in rows])
        slate.fill("temperatures", [row.temperature for row in rows])
        slate.fill("length", [kv.count - d * PAGE for kv, d in zip(kvs, depths, strict=True)])
        slate.fill("live", [True] * len(rows))
        slate.fill("own_pages", [own + [0] * (wide - len(own)) for own in owned])
        self.places: list[Request | None] = list(rows)

    @property
    def rows(self) -> list[Request]:
        return [row for row in self.places if row is not None]

    def step(self) -> tuple[list[int], list[float]] | None:
        """Launches a step -> what the one before it sampled (on a GPU; else this one), None at first."""
        self.left -= 1
        self.slates.launch(self.slate)
        before, self._reading = self._reading, self._read()
        return self._take(before) if self.slate.tokens.is_cuda else self.drain()

    def drain(self) -> tuple[list[int], list[float]] | None:
        """What was sampled and not looked at yet."""
        reading, self._reading = self._reading, None
        return self._take(reading)

    def _read(self) -> tuple[Tensor, Tensor, Any]:
        """The step's outcome on its way to the host."""
        slate = self.slate
        if not slate.tokens.is_cuda:
            return slate.tokens, slate.logprobs, None
        tokens = torch.empty_like(slate.tokens, device="cpu", pin_memory=True)
        logprobs = torch.empty_like(slate.logprobs, device="cpu", pin_memory=True)
        tokens.copy_(slate.tokens, non_blocking=True)
        logprobs.copy_(slate.logprobs, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return tokens, logprobs, event

    def _take(self, reading: tuple[Tensor, Tensor, Any] | None) -> tuple[list[int], list[float]] | None:
        if reading is None:
            return None
        tokens, logprobs, event = reading
        if event is not None:
            event.synchronize()
        for row, kv in zip(self.places, self.kvs, strict=True):
            if row is not None:
                kv.count = len(row.tokens)  # the token fed has its keys now
        return tokens.tolist()[: self.size], logprobs.tolist()[: self.size]

    def store(self, places: Sequence[int]) -> None:
        """Keys are in their pages already."""


def _round(n: int) -> int:
    """The next power of two, 16 at least."""
    return max(16, 1 << max(0, n - 1).bit_length())


def segments_of(pages: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Runs of pages that several rows share -> (pages of each segment, each row's path of segments from the
    root down, pages on each row's path). pages: the full ones of each row."""
    segments: list[list[int]] = []
    paths: list[list[int]] = [[] for _ in pages]
    depths = [0] * len(pages)
    left = [(list(range(len(pages))), 0)]
    while left:
        rows, depth = left.pop()
        below: dict[int, list[int]] = {}
        for row in rows:
            if depth < len(pages[row]):
                below.setdefault(pages[row][depth], []).append(row)
        for page, members in below.items():
            if len(members) < 2:
                continue
            run, end = [page], depth + 1
            while all(end < len(pages[m]) and pages[m][end] == pages[members[0]][end] for m in members):
                run.append(pages[members[0]][end])
                end += 1
            for m in members:
                paths[m].append(len(segments))
                depths[m] = end
            segments.append(run)
            left.append((members, end))
    return segments, paths, depths
