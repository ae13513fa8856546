"""Tile shapes of the Triton tree attention, and the tile lists of a tree on its device."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pact_fast.kernels.tree_attention.layout import key_tile_order, tile_list


class Tile(NamedTuple):
    """Queries x keys of a tile, warps and pipeline stages of the launch."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Candidates(NamedTuple):
    """Tiles to be timed for each kernel."""

    fwd: tuple[Tile, ...]
    dq: tuple[Tile, ...]
    dkv: tuple[Tile, ...]


class Tiles(NamedTuple):
    """Tiles of the three kernels for one head_dim, dtype and architecture."""

    fwd: Tile
    dq: Tile
    dkv: Tile


# D = 128 on sm_90: the fastest measured on an H100 (`python -m bench tiles`; bench/LOG.md), whatever they
# spill. The others: the largest that do not spill at bf16 in ahead-of-time compiles (`python -m bench
# resources`), a rule that missed the fastest by up to a third; CANDIDATES are there to be timed.
_SM90 = {
    64: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
    128: Tiles(Tile(128, 32, 4, 4), Tile(128, 64, 8, 3), Tile(32, 64, 4, 3)),
    256: Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
}
# With a window the depths need registers, too; timed without one only.
_SM90_WINDOW = {128: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 8, 2))}
_SM100 = _SM90 | {128: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 2))}
_SM80 = {
    64: Tiles(Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
    128: Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 8, 2)),
    256: Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
}
_FP32 = Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))  # checks only: no tensor cores
_INTERPRETER = Tiles(Tile(16, 16, 1, 1), Tile(16, 16, 1, 1), Tile(16, 16, 1, 1))


def choose_tiles(
    head_dim: int, dtype: torch.dtype, capability: tuple[int, int] | None, window: bool = False
) -> Tiles:
    """Tiles by shape and architecture, never by timing. `capability` None: the interpreter on a CPU."""
    if capability is None:
        return _INTERPRETER
    if dtype == torch.float32:
        return _FP32
    table = {9: _SM90, 10: _SM100}.get(capability[0], _SM80)
    if table is not _SM80 and window:
        table = table | _SM90_WINDOW
    return table[64 if head_dim <= 64 else 128 if head_dim <= 128 else 256]


def _tiles(*sizes: str) -> tuple[Tile, ...]:
    """Tiles from "128x64 w8 s3"."""
    return tuple(Tile(*map(int, re.findall(r"\d+", size))) for size in sizes)


# What `python -m bench tiles` times, by the widest head_dim; the first of each is the default.
CANDIDATES = {
    64: Candidates(
        _tiles("128x64 w8 s3", "128x64 w4 s3", "128x128 w8 s3", "64x64 w4 s3", "128x32 w4 s4"),
        _tiles("128x64 w8 s3", "128x64 w4 s3", "64x64 w4 s3", "128x128 w8 s2", "128x32 w4 s3"),
        _tiles("64x128 w8 s3", "32x64 w4 s3", "64x64 w4 s3", "64x128 w4 s3", "128x128 w8 s2", "32x128 w8 s3"),
    ),
    96: Candidates(
        _tiles("128x64 w8 s3", "128x32 w4 s4", "64x64 w4 s3", "128x32 w4 s3", "128x128 w8 s2"),
        _tiles("128x64 w8 s3", "64x64 w4 s2", "128x32 w4 s3", "128x128 w8 s2"),
        _tiles("64x128 w8 s2", "32x64 w4 s3", "64x64 w4 s2", "64x128 w8 s3", "32x128 w8 s3"),
    ),
    128: Candidates(
        _tiles("128x32 w4 s4", "64x64 w4 s3", "128x128 w8 s3", "128x64 w8 s3", "64x32 w4 s4", "64x64 w4 s4"),
        _tiles("128x64 w8 s3", "128x128 w8 s2", "64x64 w4 s2", "128x32 w4 s3", "64x32 w4 s3"),
        _tiles("32x64 w4 s3", "64x128 w8 s3", "64x64 w4 s2", "32x64 w4 s4", "32x128 w8 s3", "16x64 w4 s4"),
    ),
    256: Candidates(
        _tiles("128x32 w8 s2", "64x32 w4 s2", "64x64 w4 s2", "64x32 w4 s3", "128x64 w8 s2"),
        _tiles("64x32 w8 s2", "64x32 w4 s2", "128x32 w8 s2", "64x64 w8 s2"),
        _tiles("32x32 w8 s2", "32x64 w8 s2", "32x32 w4 s2", "32x64 w4 s2", "16x64 w4 s2"),
    ),
}  # fmt: skip


class TilePlan:
    """Tile lists of one tree on the device, made at the first call and shared by all layers."""

    def __init__(
        self, subtree_end: Tensor, depth: np.ndarray, window: int | None, first_query: int = 0
    ) -> None:
        self.end = subtree_end
        self.depth = torch.from_numpy(depth.astype(np.int32)).to(subtree_end.device)
        self.window = window
        self.first_query = first_query  # tiles of earlier queries are left out
        self._host = (subtree_end.cpu().numpy(), depth)
        self._made: dict[tuple, list[Tensor]] = {}

    def lists(self, tile: Tile) -> list[Tensor]:
        """order, ptr, split and cols of the query tiles of `tile`."""
        key = ("m", tile.block_m, tile.block_n)
        if key not in self._made:
            made = tile_list(*self._host, tile.block_m, tile.block_n, self.window)
            order = made.order[made.order >= self.first_query // tile.block_m]
            self._made[key] = self._to_device(order, made.ptr, made.split, made.cols)
        return self._made[key]

    def key_order(self, tile: Tile) -> Tensor:
        key = ("n", tile.block_n)
        if key not in self._made:
            self._made[key] = self._to_device(key_tile_order(self._host[0], tile.block_n))
        return self._made[key][0]

    def _to_device(self, *arrays: np.ndarray) -> list[Tensor]:
        joined = torch.from_numpy(np.concatenate(arrays)).to(self.end.device)  # one copy
        return list(joined.split([array.size for array in arrays]))
