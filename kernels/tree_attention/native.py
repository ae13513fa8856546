"""csrc/tree_pack.cpp through ctypes: the packer and the tile lists. Absent where it was not built."""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path

import numpy as np

LIBRARY = Path(__file__).parent.parent.parent / "_native" / "libtree_pack.so"
_I64, _P = ctypes.c_int64, ctypes.c_void_p


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The loaded library, or None where it was not built. OSError if it is there but cannot be loaded."""
    if not LIBRARY.exists():
        return None
    lib = ctypes.CDLL(str(LIBRARY))
    lib.tree_pack_build.restype = _P
    lib.tree_pack_build.argtypes = [_P, _P, _I64, _P]
    lib.tree_pack_write.restype = None
    lib.tree_pack_write.argtypes = [_P, ctypes.c_int, _P, _P, _P, _P]
    lib.tree_pack_free.restype = None
    lib.tree_pack_free.argtypes = [_P]
    lib.tree_tile_list.restype = _I64
    lib.tree_tile_list.argtypes = [_P, _P, _I64, _I64, _I64, _I64, ctypes.c_int, _P, _P, _P]
    return lib


def num_threads() -> int:
    """Threads of a call: those this process may use, at most 8 (the work is bound by memory)."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, 8)


def pack(lib: ctypes.CDLL, arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """input_ids, depth, subtree_end, and the token indices of all sequences joined (`arrays`: int64)."""
    lengths = np.array([array.size for array in arrays], dtype=np.int64)
    pointers = np.array([array.ctypes.data for array in arrays], dtype=np.uint64)
    num_tokens = _I64()
    handle = lib.tree_pack_build(
        pointers.ctypes.data, lengths.ctypes.data, len(arrays), ctypes.byref(num_tokens)
    )
    if not handle:
        raise MemoryError(f"no memory for the trie of {len(arrays)} sequences")
    try:
        size = num_tokens.value
        if size >= 2**31:
            raise ValueError(
                f"{size} packed tokens do not fit subtree_end (int32); pack fewer sequences at once"
            )
        ids, position, index = (np.empty(n, np.int64) for n in (size, size, int(lengths.sum())))
        end = np.empty(size, np.int32)
        lib.tree_pack_write(
            handle, num_threads(), ids.ctypes.data, position.ctypes.data, end.ctypes.data, index.ctypes.data
        )
    finally:
        lib.tree_pack_free(handle)
    return ids, position, end, index


def tile_lists(
    lib: ctypes.CDLL, end: np.ndarray, depth: np.ndarray, block_m: int, block_n: int, window: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ptr, split and cols of `layout.tile_list`. `end`, `depth`: [T] contiguous int32, T >= 1."""
    tiles = -(-end.size // block_m)
    ptr, split = np.empty(tiles + 1, np.int32), np.empty(tiles, np.int32)

    def call(cols: int | None) -> int:
        done = lib.tree_tile_list(
            end.ctypes.data,
            depth.ctypes.data,
            end.size,
            block_m,
            block_n,
            window or 0,
            num_threads(),
            ptr.ctypes.data,
            split.ctypes.data,
            cols,
        )
        if done < 0:
            raise MemoryError(f"no memory for the tile lists of {end.size} tokens")
        return done

    cols = np.empty(call(None), np.int32)
    call(cols.ctypes.data)
    return ptr, split, cols
