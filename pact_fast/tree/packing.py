"""Token trees: many sequences that share prefixes, laid out once.

A trie of the sequences is written in depth-first pre-order, children in the order in which the sequences
first need them. The descendants of every token are then contiguous, and the whole attention mask is one int32
per token:

    token i attends to j   iff   j <= i < subtree_end[j]

Shapes: T packed tokens, len_s tokens of sequence s. Everything here is host work on integers; no model is
needed.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from pact_fast.kernels.tree_attention import native
from pact_fast.kernels.tree_attention.layout import parent_index, tree_depth

IMPLS = ("auto", "numpy", "native")


@dataclass(frozen=True)
class TreePack:
    """Sequences packed as one token tree (or several side by side).

    `input_ids` [T] int64; `position_ids` [T] int64, the depth of each token; `subtree_end` [T] int32, one
    past the last descendant of each token; `token_index`: for each sequence, [len_s] int64, where its tokens
    lie in the pack. The hidden state at `token_index[s][t]` predicts token t + 1 of sequence s.
    """

    input_ids: torch.Tensor  # [T] int64
    position_ids: torch.Tensor  # [T] int64
    subtree_end: torch.Tensor  # [T] int32
    token_index: tuple[torch.Tensor, ...]  # per sequence [len_s] int64

    @property
    def num_tokens(self) -> int:
        """T: tokens that go through the model."""
        return self.input_ids.numel()

    @property
    def num_sequence_tokens(self) -> int:
        """Tokens of all sequences one by one; `num_sequence_tokens / num_tokens` is what sharing saves."""
        return sum(index.numel() for index in self.token_index)

    @cached_property
    def parent(self) -> torch.Tensor:
        """[T] int64: the token before each token on its path, -1 at the start of a sequence."""
        parent = parent_index(self.subtree_end.cpu().numpy(), self.position_ids.cpu().numpy())
        return torch.from_numpy(parent).to(self.input_ids.device)

    def to(self, device: torch.device | str) -> TreePack:
        """The same pack with its tensors on `device`."""
        if self.input_ids.device == torch.device(device):
            return self
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            subtree_end=self.subtree_end.to(device),
            token_index=tuple(index.to(device) for index in self.token_index),
        )

    def check(self) -> None:
        """Raise ValueError unless intervals are nested, positions equal depth and sequences are paths."""
        end = self.subtree_end.cpu().numpy()
        for name, tensor, dtype in (
            ("input_ids", self.input_ids, torch.int64),
            ("position_ids", self.position_ids, torch.int64),
            ("subtree_end", self.subtree_end, torch.int32),
        ):
            if tensor.shape != self.input_ids.shape or tensor.dim() != 1 or tensor.dtype != dtype:
                raise ValueError(
                    f"{name} must be [{self.num_tokens}] {dtype}, got {list(tensor.shape)} {tensor.dtype}"
                )
        depth = self.check_positions()
        parent = parent_index(end, depth)
        for s, index in enumerate(self.token_index):
            path = index.cpu().numpy()
            if path.size and (path.min() < 0 or path.max() >= end.size):
                raise ValueError(f"token_index[{s}] points outside the pack of {end.size} tokens")
            before = np.concatenate(([-1], path[:-1])) if path.size else path
            if (parent[path] != before).any():
                raise ValueError(f"token_index[{s}] is not a path from a root of the tree")

    def check_vocabulary(self, vocabulary: int) -> None:
        """ValueError, naming the sequence, where a token id is none of a model's `vocabulary` tokens."""
        if self.num_tokens and int(self.input_ids.max()) >= vocabulary:
            for s, index in enumerate(self.token_index):
                check_ids(self.input_ids[index], vocabulary, f"sequences[{s}]")
            check_ids(self.input_ids, vocabulary, "input_ids")

    def check_positions(self) -> np.ndarray:
        """Depth of every token [T]; ValueError unless `subtree_end` is a tree and positions equal depths."""
        depth = tree_depth(self.subtree_end.cpu().numpy())
        position = self.position_ids.cpu().numpy()
        if (wrong := np.flatnonzero(depth != position)).size:
            i = int(wrong[0])
            raise ValueError(
                f"position_ids[{i}] = {position[i]}, but token {i} has depth {depth[i]}: in a token tree the "
                "position is the depth; build the pack with pack_tree"
            )
        return depth


def _as_array(sequence, s: int) -> np.ndarray:
    """One sequence as int64 [len]; ValueError names the sequence and what is wrong."""
    if isinstance(sequence, torch.Tensor):
        sequence = sequence.detach().cpu().numpy()
    try:
        array = np.asarray(sequence)
    except ValueError:
        raise ValueError(f"sequences[{s}] must be a flat list of token ids, got a ragged one") from None
    if array.size == 0 and array.ndim == 1:
        return np.empty(0, np.int64)
    if array.ndim == 0:
        raise ValueError(
            f"sequences[{s}] is {sequence!r:.40}, not a list or tensor of token ids: a single sequence is "
            "given as [ids], a batch as a list of them"
        )
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"sequences[{s}] must be a flat list or tensor of token ids, got {array.dtype} {array.shape}"
        )
    return np.ascontiguousarray(array, dtype=np.int64)


def _refuse_negative(input_ids: np.ndarray, arrays: list[np.ndarray]) -> None:
    """ValueError naming the sequence, if the packed ids, which hold every token of `arrays`, are not ids."""
    if not input_ids.size or input_ids.min() >= 0:
        return
    s = next(s for s, array in enumerate(arrays) if array.size and array.min() < 0)
    i = int(np.argmax(arrays[s] < 0))
    raise ValueError(
        f"sequences[{s}][{i}] = {arrays[s][i]}: token ids cannot be negative (labels such as -100 are not)"
    )


def check_ids(ids: torch.Tensor, vocabulary: int, name: str) -> None:
    """ValueError where one of `ids` [n] is none of a model's tokens. An embedding's own error names no id,
    and on a GPU it ends the process."""
    if (wrong := ((ids < 0) | (ids >= vocabulary)).nonzero()).numel():
        i = int(wrong[0])
        raise ValueError(
            f"{name}[{i}] = {int(ids[i])}, but the model's vocabulary has {vocabulary} tokens (0 to "
            f"{vocabulary - 1}): do tokenizer and model belong together?"
        )


class _Trie:
    """Radix trie of token sequences: a node is an unbranched run of tokens; node 0 is the empty root."""

    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = [np.empty(0, np.int64)]
        self.children: list[dict[int, int]] = [{}]
        self.parent: list[int] = [-1]
        self.num_tokens = 0

    def insert(self, tokens: np.ndarray) -> None:
        """Add a sequence."""
        node, at = 0, 0
        while at < tokens.size:
            child = self.children[node].get(int(tokens[at]))
            if child is None:
                self.num_tokens += tokens.size - at
                self._add(node, tokens[at:])
                return
            run = self.tokens[child]
            common = _common_prefix(run, tokens[at:])
            if common < run.size and at + common < tokens.size:
                self._split(child, common)
            node, at = child, at + common

    def _add(self, parent: int, tokens: np.ndarray) -> None:
        node = len(self.tokens)
        self.tokens.append(tokens)
        self.children.append({})
        self.parent.append(parent)
        self.children[parent][int(tokens[0])] = node

    def _split(self, node: int, length: int) -> None:
        """Cut `node` after `length` tokens; the tail becomes its only child."""
        tail = len(self.tokens)
        self.tokens.append(self.tokens[node][length:])
        self.tokens[node] = self.tokens[node][:length]
        self.children.append(self.children[node])
        self.children[node] = {int(self.tokens[tail][0]): tail}
        self.parent.append(node)
        for child in self.children[tail].values():
            self.parent[child] = tail

    def match(self, tokens: np.ndarray) -> int:
        """Length of the longest prefix of `tokens` that is already in the trie."""
        node, at = 0, 0
        while at < tokens.size and (child := self.children[node].get(int(tokens[at]))) is not None:
            common = _common_prefix(self.tokens[child], tokens[at:])
            node, at = child, at + common
            if common < self.tokens[child].size:
                break
        return at


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    size = min(a.size, b.size)
    differ = a[:size] != b[:size]
    first = int(differ.argmax()) if size else 0
    return first if size and differ[first] else size


def _pack_numpy(arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
    """input_ids, depth, subtree_end, token_index of the trie: the reference of the native packer."""
    trie = _Trie()
    for array in arrays:
        trie.insert(array)
    count = len(trie.tokens)
    order: list[int] = []  # nodes in pre-order
    stack = [0]
    while stack:
        node = stack.pop()
        order.append(node)
        stack.extend(reversed(trie.children[node].values()))
    length = [run.size for run in trie.tokens]
    start, depth, end = [0] * count, [0] * count, [0] * count
    at = 0
    for node in order:
        start[node] = end[node] = at
        depth[node] = depth[trie.parent[node]] + length[trie.parent[node]] if node else 0
        at += length[node]
        end[node] = at
    for node in reversed(order[1:]):
        end[trie.parent[node]] = max(end[trie.parent[node]], end[node])
    lengths = np.array([length[node] for node in order])
    input_ids = np.concatenate([trie.tokens[node] for node in order])
    shift = np.array([depth[node] - start[node] for node in order])
    position = np.arange(at) + np.repeat(shift, lengths)
    subtree_end = np.repeat(np.array([end[node] for node in order], dtype=np.int32), lengths)
    return input_ids, position, subtree_end, [_walk(trie, start, array) for array in arrays]


def _walk(trie: _Trie, start: list[int], tokens: np.ndarray) -> np.ndarray:
    """Packed index of every token of a sequence that is in the trie."""
    pieces, node, at = [np.empty(0, np.int64)], 0, 0
    while at < tokens.size:
        node = trie.children[node][int(tokens[at])]
        take = min(trie.tokens[node].size, tokens.size - at)
        pieces.append(np.arange(start[node], start[node] + take))
        at += take
    return np.concatenate(pieces)


def pack_tree(sequences: Sequence[Sequence[int] | torch.Tensor], *, impl: str = "auto") -> TreePack:
    """Pack token sequences as a trie in depth-first pre-order: every shared prefix is kept once.

    `sequences`: lists or [len] integer tensors of token ids >= 0, empty ones allowed. `impl`: "numpy",
    "native" (csrc/tree_pack.cpp; an error if it was not built) or "auto", native where built. Both give
    identical packs, on the CPU. ValueError names the sequence that is not a flat list of token ids.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    arrays = [_as_array(sequence, s) for s, sequence in enumerate(sequences)]
    library = native.library() if impl != "numpy" else None
    if impl == "native" and library is None:
        raise ValueError(f'impl="native" needs {native.LIBRARY}: run `make setup` where a C++ compiler is')
    if library is not None:
        *fields, joined = native.pack(library, arrays)
        token_index = torch.from_numpy(joined).split([array.size for array in arrays])
    else:
        *fields, indices = _pack_numpy(arrays)
        token_index = tuple(torch.from_numpy(index) for index in indices)
    _refuse_negative(fields[0], arrays)
    input_ids, position_ids, subtree_end = map(torch.from_numpy, fields)
    return TreePack(input_ids, position_ids, subtree_end, tuple(token_index) if arrays else ())


def pack_linear(sequences: Sequence[Sequence[int] | torch.Tensor]) -> TreePack:
    """Pack sequences one after the other, nothing shared: what a tree is compared with."""
    arrays = [_as_array(sequence, s) for s, sequence in enumerate(sequences)]
    lengths = np.array([array.size for array in arrays], dtype=np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if arrays else 0
    token_index = torch.arange(total).split(lengths.tolist()) if arrays else ()
    input_ids = np.concatenate([np.empty(0, np.int64), *arrays])
    _refuse_negative(input_ids, arrays)
    return TreePack(
        torch.from_numpy(input_ids),
        torch.from_numpy(np.arange(total) - np.repeat(ends - lengths, lengths)),
        torch.from_numpy(np.repeat(ends, lengths).astype(np.int32)),
        tuple(token_index),
    )


@dataclass
class _Bin:
    """A pack in the making: members, an upper bound of its tokens, prefixes that later ones may share."""

    members: list[int]
    tokens: int
    roots: _Trie


def plan_packs(
    sequences: Sequence[Sequence[int] | torch.Tensor],
    token_budget: int,
    *,
    groups: Sequence[Hashable] | None = None,
    share: bool = True,
    partners: Sequence[Sequence[int] | torch.Tensor | None] | None = None,
) -> list[list[int]]:
    """Indices of `sequences` for each pack, so that each pack's tree has at most `token_budget` tokens.

    Sequences of one group (say, all of one prompt) stay together while they fit; a group that does not fit is
    cut along its tree, so that long shared prefixes are repeated as rarely as possible. A sequence longer
    than the budget gets a pack alone. `groups`: one key a sequence, None for a single group. `share=False`
    counts tokens as `pack_linear` lays them out. `partners`: of each sequence another one, or None, that
    goes into the same pack and counts. Deterministic; the loss does not depend on the plan
    (docs/method.md, "The loss of a step").
    """
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1, got {token_budget}")
    if groups is not None and len(groups) != len(sequences):
        raise ValueError(f"groups has {len(groups)} keys for {len(sequences)} sequences; give one a sequence")
    arrays = [_as_array(sequence, s) for s, sequence in enumerate(sequences)]
    others = [
        None if partner is None else _as_array(partner, s)
        for s, partner in enumerate(partners or [None] * len(arrays))
    ]
    by_group: dict[Hashable, list[int]] = {}
    for s in range(len(arrays)):
        by_group.setdefault(groups[s] if groups is not None else None, []).append(s)
    pieces: list[tuple[list[int], int]] = []  # (members, tokens): what stays together
    for members in by_group.values():
        pieces += _cut(arrays, others, members, token_budget, share)
    pieces.sort(key=lambda piece: -piece[1])  # first fit decreasing; the sort is stable
    bins: list[_Bin] = []
    for members, tokens in pieces:
        root = _shared_prefix([arrays[s] for s in members]) if share else np.empty(0, np.int64)
        for b in bins:
            if b.tokens + tokens - b.roots.match(root) <= token_budget:
                break
        else:
            bins.append(b := _Bin([], 0, _Trie()))
        b.members += members
        b.tokens += tokens - b.roots.match(root)
        b.roots.insert(root)
    return [sorted(b.members) for b in bins]


def _shared_prefix(arrays: list[np.ndarray]) -> np.ndarray:
    prefix = arrays[0]
    for array in arrays[1:]:
        prefix = prefix[: _common_prefix(prefix, array)]
    return prefix


def _cut(
    arrays: list[np.ndarray],
    partners: list[np.ndarray | None],
    members: list[int],
    budget: int,
    share: bool,
) -> list[tuple[list[int], int]]:
    """Cut one group into pieces of at most `budget` tokens, neighbours in the tree together."""

    def insert(trie: _Trie, s: int) -> None:
        trie.insert(arrays[s])
        if (partner := partners[s]) is not None:
            trie.insert(partner)

    def size(trie: _Trie, s: int) -> int:
        """Tokens that a sequence and its partner add."""
        array, partner = arrays[s], partners[s]
        new = array.size - (trie.match(array) if share else 0)
        if partner is not None:
            new += partner.size
            new -= max(trie.match(partner), _common_prefix(array, partner)) if share else 0
        return new

    trie = _Trie()
    if share:
        order = sorted(
            members, key=lambda s: (arrays[s].tolist(), s)
        )  # neighbours share the longest prefixes
        for s in members:
            insert(trie, s)
        if trie.num_tokens <= budget:
            return [(members, trie.num_tokens)]
    else:
        order = members
    pieces: list[tuple[list[int], int]] = []
    current: list[int] = []
    trie, linear = _Trie(), 0
    for s in order:
        new = size(trie, s)
        if current and linear + new > budget:
            pieces.append((current, linear))
            current, trie, linear = [], _Trie(), 0
            new = size(trie, s)
        current.append(s)
        linear += new
        if share:
            insert(trie, s)
    return [*pieces, (current, linear)]
