"""Keys and values: of the rows in flight, and of prefixes that may come again.

Row r holds its tokens at places 0 .. lengths[r] - 1 of buffers [rows, kv heads, places, D], one pair a layer,
whatever its neighbours hold. So a row can enter or leave between any two tokens, and what it computes does
not depend on the others beyond the rounding of a wider matrix product.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from pact_fast.rollout.in_process.decode import decode_step

PLACES = 128  # added at a time, so that buffers are rarely copied
BLOCK = 16  # tokens; stored prefixes are found by their whole blocks


class _Write(NamedTuple):
    """Where the tokens of a forward go: row[i], place[i] take what stands at row[i] - first, column[i].
    Attention sees the places below `end` of rows first .. last - 1."""

    first: int
    last: int
    row: Tensor
    place: Tensor
    column: Tensor
    end: int


class _SlotLayer(DynamicLayer):
    """One layer's buffers. `update` writes where the forward's `_Write` says."""

    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self.write: _Write

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        w = self.write
        self.reserve(w.last, w.end, key_states)
        self.keys[w.row, :, w.place] = key_states[w.row - w.first, :, w.column]
        self.values[w.row, :, w.place] = value_states[w.row - w.first, :, w.column]
        return self.keys[w.first : w.last, :, : w.end], self.values[w.first : w.last, :, : w.end]

    def reserve(self, rows: int, places: int, like: Tensor) -> None:
        """Makes room for `rows` rows of `places` places, of like [.., kv heads, .., D]."""
        have = self.keys.shape if self.is_initialized else (0, 0, 0, 0)
        if rows <= have[0] and places <= have[2]:
            return
        wide = have[2] if places <= have[2] else places + PLACES
        shape = (max(rows, have[0]), like.shape[1], wide, like.shape[3])
        # Zeros: a masked place still meets a product, where rubbish could be NaN.
        keys, values = like.new_zeros(shape), like.new_zeros(shape)
        if self.is_initialized:
            keys[: have[0], :, : have[2]] = self.keys
            values[: have[0], :, : have[2]] = self.values
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = like.dtype, like.device, True

    def get_seq_length(self) -> int:
        return 0


class Slots:
    """The rows in flight, always 0 .. len(lengths) - 1: a row that leaves is replaced by the last one.

    Args:
        model: a decoder-only causal LM with full attention in every layer.
        lean: decode through `rollout.in_process.decode`, where that computes what the model does.
    """

    def __init__(self, model: PreTrainedModel, *, lean: bool = False) -> None:
        self.model, self.lean = model, lean
        self.lengths: list[int] = []
        self.layers = [_SlotLayer() for _ in range(model.config.num_hidden_layers)]

    def __len__(self) -> int:
        return len(self.lengths)

    def add(self, prefix: Tensor | None = None) -> None:
        """A new last row, with the keys and values of a known prefix [layers, 2, kv heads, tokens, D]."""
        self.lengths.append(0)
        if prefix is None:
            return
        count = prefix.shape[3]
        for layer, (keys, values) in zip(self.layers, prefix, strict=True):
            layer.reserve(len(self.lengths), count, keys[None])
            layer.keys[len(self.lengths) - 1, :, :count] = keys
            layer.values[len(self.lengths) - 1, :, :count] = values
        self.lengths[-1] = count

    def remove(self, row: int) -> None:
        """Takes a row out; the last one takes its place."""
        last = len(self.lengths) - 1
        if row != last:
            count = self.lengths[last]
            for layer in self.layers:
                layer.keys[row, :, :count] = layer.keys[last, :, :count]
                layer.values[row, :, :count] = layer.values[last, :, :count]
            self.lengths[row] = count
        self.lengths.pop()

    def wipe(self, row: int) -> None:
        """Zeroes a row's places: NaN there would reach whoever uses them next."""
        for layer in self.layers:
            layer.keys[row].zero_()
            layer.values[row].zero_()

    def read(self, row: int) -> Tensor:
        """A copy of a row's keys and values, [layers, 2, kv heads, tokens, D]."""
        count = self.lengths[row]
        pairs = [
            torch.stack([layer.keys[row, :, :count], layer.values[row, :, :count]]) for layer in self.layers
        ]
        return torch.stack(pairs)

    @torch.no_grad()
    def feed(self, first: int, chunks: Sequence[Sequence[int]]) -> Tensor:
        """Feeds rows first, first + 1, ... a token each or more -> hidden state after the last [rows, H]"""
        device, rows, width = self.model.device, len(chunks), max(len(c) for c in chunks)
        counts = torch.tensor([len(c) for c in chunks])
        starts = torch.tensor(self.lengths[first : first + rows])
        steps = torch.arange(width)
        positions = starts[:, None] + steps
        row, column = (steps < counts[:, None]).nonzero(as_tuple=True)
        end = int((starts + counts).max())
        row, place, column = (x.to(device) for x in (row + first, positions[row, column], column))
        write = _Write(first, first + rows, row, place, column, end)
        for layer in self.layers:
            layer.write = write
        ids = torch.tensor([list(c) + [0] * (width - len(c)) for c in chunks], device=device)
        positions = positions.to(device)
        seen = torch.arange(end, device=device) <= positions[:, :, None]  # [rows, width, places]
        for i, chunk in enumerate(chunks):
            self.lengths[first + i] += len(chunk)
        if width == 1 and self.lean:
            mask = torch.zeros(seen.shape, device=device).masked_fill_(~seen, -torch.inf)
            return decode_step(self.model, ids[:, 0], positions[:, 0], mask[:, None], self.layers)
        body: nn.Module = self.model.get_decoder()
        # By position: transformers 5.17 calls the fourth argument past_key_values, later ones cache.
        cache = Cache(layers=list(self.layers))
        hidden = body(ids, seen[:, None], positions, cache, use_cache=True).last_hidden_state
        return hidden[torch.arange(rows, device=device), (counts - 1).to(device)]


class _Stored(NamedTuple):
    salt: str
    tokens: list[int]
    prefix: Tensor  # [layers, 2, kv heads, tokens, D]
    keys: list[int]


class PrefixStore:
    """Keys and values of sequences seen lately, found again by any prefix of 16 tokens or more.

    Args:
        capacity: tokens held; the least recently used sequences go first. 0 stores nothing.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._stored: OrderedDict[int, _Stored] = OrderedDict()
        self._of_block: dict[int, int] = {}
        self._next = self._tokens = 0

    def clear(self) -> None:
        self._stored.clear()
        self._of_block.clear()
        self._tokens = 0

    def find(self, salt: str, tokens: list[int]) -> tuple[Tensor | None, int]:
        """The longest stored prefix that leaves at least one token to feed, and its length (0: none)."""
        best = None
        for key in _block_keys(salt, tokens):
            if key not in self._of_block:
                break
            best = self._of_block[key]
        if best is None or (stored := self._stored[best]).salt != salt:
            return None, 0
        self._stored.move_to_end(best)
        limit = min(len(tokens) - 1, len(stored.tokens))
        # Equal hashes are a hint: the tokens decide.
        count = next((i for i in range(limit) if tokens[i] != stored.tokens[i]), limit)
        return (stored.prefix[:, :, :, :count], count) if count else (None, 0)

    def add(self, salt: str, tokens: list[int], prefix: Tensor) -> None:
        """Stores keys and values [layers, 2, kv heads, len(tokens), D], unless they are there already."""
        keys = list(_block_keys(salt, tokens))
        if not keys or len(tokens) > self.capacity:
            return
        known = self._stored.get(self._of_block.get(keys[-1], -1))
        if known is not None and known.tokens[: len(tokens)] == tokens:
            return
        name, self._next = self._next, self._next + 1
        self._stored[name] = _Stored(salt, tokens, prefix, keys)
        self._of_block |= dict.fromkeys(keys, name)
        self._tokens += len(tokens)
        while self._tokens > self.capacity:
            oldest, gone = self._stored.popitem(last=False)
            self._tokens -= len(gone.tokens)
            for key in gone.keys:
                if self._of_block.get(key) == oldest:
                    del self._of_block[key]


def _block_keys(salt: str, tokens: list[int]) -> Iterator[int]:
    key = hash(salt)
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        key = hash((key, *tokens[start : start + BLOCK]))
        yield key
