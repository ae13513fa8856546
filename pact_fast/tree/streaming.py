"""Trees larger than a forward may hold, with exact gradients and nothing computed twice.

The trunk of a tree is what two or more of its sequences share; the rest are tails, unbranched runs of one
sequence each. The trunk runs first, and its keys and values become leaves, per layer. Then the tails run
against them, a few at a time: forward, loss, backward, freed. Their dK and dV of the trunk add up in the
leaves. At last the trunk's own loss is sent backward together with those sums:

    hidden, K, V = trunk            dK, dV = 0
    for tails:  loss(tails, K, V) backward         -> gradients of the weights, and dK, dV +=
    (loss(trunk), K, V) backward with (1, dK, dV)  -> gradients of the weights

That is the gradient of the whole tree by the chain rule, with the trunk computed once. What stays beside one
chunk's activations is the trunk's own graph and its keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pact_fast.tree.packing import TreePack


@dataclass(frozen=True)
class Part:
    """Tails that run together behind one path of the trunk.

    `pack`: the tails' own tokens, except that `pack.subtree_end` [P + n] covers the P tokens of the path,
    too, and that `pack.token_index` is -1 where a sequence's token is not in this part. `path` [P] int64:
    those tokens in the trunk.
    """

    pack: TreePack
    path: Tensor

    @property
    def num_tokens(self) -> int:
        return self.pack.num_tokens

    def to(self, device: torch.device | str) -> Part:
        return Part(self.pack.to(device), self.path.to(device))


@dataclass(frozen=True)
class SplitTree:
    """A tree as its trunk and parts. The trunk's `token_index` is -1 where a token is in a part."""

    trunk: TreePack
    parts: list[Part]


@dataclass
class _Tail:
    start: int
    stop: int
    attach: int  # the token above, -1 for a root


def split_tree(pack: TreePack, token_budget: int) -> SplitTree | None:
    """The trunk and its parts, each with the trunk within `token_budget` tokens where a tail alone is.

    `pack` on the CPU. None where no token is shared or the trunk alone is over the budget.
    """
    end = pack.subtree_end.numpy().astype(np.int64)
    parent = pack.parent.numpy()
    users = torch.bincount(torch.cat(list(pack.token_index)), minlength=pack.num_tokens).numpy()
    shared = users >= 2
    trunk = np.flatnonzero(shared)
    if not 0 < trunk.size < token_budget:
        return None
    before = np.concatenate(([0], np.cumsum(shared)))  # tokens of the trunk before each token
    trunk_pack = _sub_pack(pack, trunk, before[end[trunk]].astype(np.int32))
    parts = [
        _lay_out(pack, end, before, tails)
        for tails in _chunks(_tails(shared, parent), end, token_budget - trunk.size)
    ]
    return SplitTree(trunk_pack, parts)


def empty_split(parts: int) -> SplitTree:
    """A trunk of one token and `parts` parts of one, without samples: what a rank runs that has none."""
    one = torch.zeros(1, dtype=torch.int64)
    trunk = TreePack(one, one, torch.ones(1, dtype=torch.int32), ())
    return SplitTree(trunk, [empty_part()] * parts)


def empty_part() -> Part:
    """One token behind the trunk's first."""
    one = torch.zeros(1, dtype=torch.int64)
    return Part(TreePack(one, one + 1, torch.full((2,), 2, dtype=torch.int32), ()), one)


def _tails(shared: np.ndarray, parent: np.ndarray) -> list[_Tail]:
    index = np.arange(shared.size)
    private = ~shared
    begins = private & ((parent != index - 1) | np.concatenate(([True], shared[:-1])))
    starts = np.flatnonzero(begins)
    borders = np.flatnonzero(begins | shared)  # a tail ends where another, or the trunk, goes on
    stops = np.append(borders, shared.size)[np.searchsorted(borders, starts, side="right")]
    return [_Tail(int(a), int(b), int(parent[a])) for a, b in zip(starts, stops, strict=True)]


def _chunks(tails: Sequence[_Tail], end: np.ndarray, capacity: int) -> list[list[_Tail]]:
    """First fit, longest first; the tokens that a chunk's tails hang on lie on one path of the trunk."""
    chunks: list[tuple[list[_Tail], int, int]] = []  # tails, tokens, deepest token of the path
    for tail in sorted(tails, key=lambda t: t.start - t.stop):
        size, at = tail.stop - tail.start, tail.attach
        for i, (members, tokens, deepest) in enumerate(chunks):
            low, high = sorted((at, deepest))
            if tokens + size <= capacity and (low < 0 or high < end[low]):
                chunks[i] = ([*members, tail], tokens + size, high)
                break
        else:
            chunks.append(([tail], size, at))
    return [members for members, _, _ in chunks]


def _lay_out(pack: TreePack, end: np.ndarray, before: np.ndarray, tails: list[_Tail]) -> Part:
    """The path, then the tails, those that hang deepest first: pre-order."""
    deepest = max(tail.attach for tail in tails)
    path = np.flatnonzero(end[: deepest + 1] > deepest) if deepest >= 0 else np.empty(0, np.int64)
    tails = sorted(tails, key=lambda t: (-t.attach, t.start))
    tokens = np.concatenate([np.arange(t.start, t.stop) for t in tails])
    stops = path.size + np.cumsum([t.stop - t.start for t in tails])
    attached = np.array([t.attach for t in tails])  # descending
    below = np.searchsorted(-attached, -path, side="right")  # tails at or below each token of the path
    path_end = np.concatenate(([path.size], stops))[below]
    own_end = np.repeat(stops, [t.stop - t.start for t in tails])
    local_end = np.concatenate((path_end, own_end)).astype(np.int32)
    return Part(_sub_pack(pack, tokens, local_end), torch.from_numpy(before[path].astype(np.int64)))


def _sub_pack(pack: TreePack, tokens: np.ndarray, subtree_end: np.ndarray) -> TreePack:
    """Some tokens of a pack; entries of token_index that name others become -1."""
    where = torch.full((pack.num_tokens,), -1, dtype=torch.int64)
    chosen = torch.from_numpy(tokens)
    where[chosen] = torch.arange(tokens.size)
    return TreePack(
        pack.input_ids[chosen],
        pack.position_ids[chosen],
        torch.from_numpy(subtree_end),
        tuple(where[index] for index in pack.token_index),
    )


class Prefix:
    """The trunk after its forward: hidden states, and keys and values per layer, for parts to run against.

    hidden [T, H] and the tensors of `made` hang in the trunk's graph; `leaves` are cut off from it and gather
    the gradients of the parts.
    """

    def __init__(self, hidden: Tensor, made: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.hidden = hidden
        self.made = made
        self.leaves = {
            layer: tuple(x.detach().requires_grad_(x.requires_grad) for x in pair)
            for layer, pair in made.items()
        }

    def send_back(self, loss: Tensor) -> Tensor:
        """The trunk's own loss; its backward also sends the parts' gradients of keys and values on."""
        pairs = [
            (made, leaf)
            for layer, tensors in self.made.items()
            for made, leaf in zip(tensors, self.leaves[layer], strict=True)
            if made.requires_grad
        ]
        if not pairs:
            return loss
        return _SendBack.apply(loss, [leaf for _, leaf in pairs], *(made for made, _ in pairs))


class _SendBack(torch.autograd.Function):
    """The loss unchanged; backward gives the made tensors what their leaves have gathered by then."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, leaves: list[Tensor], *made: Tensor) -> Tensor:
        ctx.leaves = leaves
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None, *(leaf.grad for leaf in ctx.leaves)
