"""On a CPU: keys gathered into dense tensors, for decoding once a batch, for prefill once a pass.

What `kernels.decode` does by task lists on a GPU, in decoding here are two matrix products a layer: rows that
share full pages are a group, whose queries meet the shared keys as one matrix; each row meets its own keys
alone. One softmax over both parts, so there is nothing to merge. Own keys end at the same column in every
row, so the next token of all rows is one slice.

    shared  [Hkv, groups, P, D]  gathered once a batch      own  [Hkv, B, columns, D]  |older|  older|  new ->

Pages stay the truth: `store` copies new keys there when a row leaves the batch or the batch is made anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pact_fast.rollout.in_process.cache import PAGE, PagedTokens
from pact_fast.rollout.in_process.runner import Chunk, Runner, slots_of
from pact_fast.rollout.in_process.weights import LayerWeights
from pact_fast.tree.families import Family

BLOCK = 8  # columns that attention widens by
Angles = dict[str | None, tuple[Tensor, Tensor]]
WASTE = 1.25  # padded rows over rows, above which groups are cut


class DenseDecode:
    """Keys and values of a batch. See `runner.Attention`.

    Args:
        sequences: one a row, all keys but the newest token's in their pages.
        steps: tokens to make room for.

    slots: for each place of the batch the index of its sequence, -1 for padding (rows of short groups).
    """

    def __init__(self, runner: Runner, sequences: Sequence[PagedTokens], steps: int) -> None:
        f = self.family = runner.family
        self.pool, self.sequences = runner.pool, sequences
        data = self.pool.data
        device = data.device
        groups, width = _groups([s.pages[: s.count // PAGE] for s in sequences])
        self.slots = [row for _, members in groups for row in members + [-1] * (width - len(members))]
        batch, self.shape = len(self.slots), (f.kv_heads, len(groups), width, f.heads // f.kv_heads)
        shared = [depth * PAGE for depth, members in groups for _ in range(width)]
        counts = [sequences[i].count if i >= 0 else 0 for i in self.slots]
        tails = [
            count - before if i >= 0 else 0
            for count, before, i in zip(counts, shared, self.slots, strict=True)
        ]
        self.start = -(-max(tails) // BLOCK) * BLOCK
        self.column, self.stored = self.start, [self.start] * batch
        # Page 0 is padding and zero: what is masked must still be a number.
        prefix = torch.zeros(len(groups), max(shared), dtype=torch.int64)
        for g, (depth, members) in enumerate(groups):
            prefix[g, : depth * PAGE] = slots_of(sequences[members[0]].pages, 0, depth * PAGE)
        own = torch.zeros(batch, self.start, dtype=torch.int64)
        for b, i in enumerate(self.slots):
            if tails[b]:
                own[b, self.start - tails[b] :] = slots_of(sequences[i].pages, shared[b], counts[b])
        layers = data.shape[0]
        shape = (layers, 2, f.kv_heads * len(groups), -1, f.head_dim)
        self.prefix = self._gather(prefix).contiguous().view(shape)
        columns = self.start + -(-steps // BLOCK) * BLOCK
        self.own = runner.scratch(layers, 2, f.kv_heads, batch, columns, f.head_dim)
        self.own.flatten(0, 1)[:, :, :, : self.start] = self._gather(own)
        # Position of every key of a row, -1 where there is none; new columns count on.
        before, after = torch.arange(max(shared)), torch.arange(-self.start, columns - self.start)
        shared_t, counts_t, tails_t = (torch.tensor(x)[:, None] for x in (shared, counts, tails))
        self.key_position = torch.cat(
            [before.where(before < shared_t, -1), (counts_t + after).where(after >= -tails_t, -1)], dim=1
        ).to(device)
        self.masked = bool((before >= shared_t).any())
        hidden = data.new_zeros(self.key_position.shape).masked_fill_(self.key_position < 0, -torch.inf)
        repeated = hidden.repeat(f.kv_heads, 1)[:, None]  # [Hkv B, 1, keys]
        self.prefix_mask, self.own_mask = repeated[..., : max(shared)], repeated[..., max(shared) :]
        self.windows = {spec.window for spec in self.family.layers if spec.window is not None}
        self.rope = runner.weights.rope
        self._angles: Angles = {}
        self._ready, self._zero = -1, data.new_zeros(1, 1, 1)
        self._window_masks: dict[int | None, Tensor] = {}
        self._new = [(kv[0], kv[1]) for kv in self.own]  # per layer [Hkv, B, columns, D] of keys and values

    def _gather(self, slots: Tensor) -> Tensor:
        """Slots [n, S] -> their keys and values [2 L, Hkv, n, S, D]."""
        data = self.pool.data
        flat = data.flatten(0, 1).index_select(1, slots.flatten().to(data.device))
        return flat.unflatten(1, tuple(slots.shape)).permute(0, 3, 1, 2, 4)

    def begin(self, positions: Tensor) -> None:
        """Before each forward: angles, the columns that attention reads, and masks of sliding windows."""
        self.column += 1
        self._angles = _angles(self.rope, positions)
        end = -(-self.column // BLOCK) * BLOCK
        if end != self._ready:  # once a block of columns
            self._ready = end
            flat = self.own.flatten(2, 3)[:, :, :, :end]  # [L, 2, Hkv B, end, D]
            self._own = [(kv[0].transpose(1, 2), kv[1]) for kv in flat]
            self._prefix = [(kv[0].transpose(1, 2), kv[1]) for kv in self.prefix]
            self._own_mask = self.own_mask[..., :end].clone()
            self._own_mask[..., self.column :] = -torch.inf  # not written yet
        self._own_mask.select(2, self.column - 1).fill_(0)
        for window in self.windows:
            seen = self.key_position[:, : self.prefix_mask.shape[-1] + end] > (positions - window)[:, None]
            mask = self.own.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
            self._window_masks[window] = mask[:, None]  # [B, 1, keys]

    def attend(self, layer: LayerWeights, qkv: Tensor) -> Tensor:
        f, (kv_heads, _, width, repeat) = self.family, self.shape
        batch, dim, at, spec = len(qkv), f.head_dim, self.column - 1, layer.spec
        q, k, v = _rotated(f, layer, qkv, self._angles)
        keys, values = self._new[spec.index]
        keys.select(2, at).copy_(k.transpose(0, 1))
        values.select(2, at).copy_(v.transpose(0, 1))
        # [Hkv, B, repeat, D]: one layout serves both products, as groups of rows and as rows.
        q = q.view(batch, kv_heads, repeat, dim).transpose(0, 1).contiguous()
        own_k, own_v = self._own[spec.index]
        scale = f.attention_scale
        score = torch.baddbmm(self._own_mask, q.view(-1, repeat, dim), own_k, alpha=scale)
        length = self.prefix.shape[3]
        if length:
            prefix_k, prefix_v = self._prefix[spec.index]
            score_p = torch.baddbmm(
                self._zero, q.view(-1, width * repeat, dim), prefix_k, alpha=scale, beta=0
            ).view(-1, repeat, length)
            if self.masked:
                score_p = score_p + self.prefix_mask
            score = torch.cat((score_p, score), dim=-1)
        if spec.window is not None:
            score.view(kv_heads, batch, repeat, -1).add_(self._window_masks[spec.window])
        p = torch.softmax(score, dim=-1)
        if length:
            shared = torch.bmm(p.view(-1, width * repeat, p.shape[-1])[..., :length], prefix_v)
            out = torch.baddbmm(shared.view(-1, repeat, dim), p[..., length:], own_v)
        else:
            out = torch.bmm(p, own_v)
        return out.view(kv_heads, batch, -1).transpose(0, 1).reshape(batch, -1)

    def store(self, places: Sequence[int]) -> None:
        """Copies the keys and values of these places' new tokens to their pages, which must cover them."""
        at: list[int] = []
        columns: list[int] = []
        slots = []
        for place in places:
            sequence, first = self.sequences[self.slots[place]], self.stored[place]
            new = self.column - first
            if new:
                at += [place] * new
                columns += range(first, self.column)
                slots.append(slots_of(sequence.pages, sequence.count, sequence.count + new))
                sequence.count += new
                self.stored[place] = self.column
        if at:
            found = self.own[:, :, :, at, columns]  # [L, 2, Hkv, N, D]
            self.pool.data[:, :, torch.cat(slots).to(found.device)] = found.transpose(2, 3)


class DensePrefill:
    """Attention of chunks against their pages and themselves, chunks of about a size padded to one call. See
    `runner.Attention`."""

    def __init__(self, runner: Runner, chunks: Sequence[Chunk]) -> None:
        self.pool, self.family = runner.pool.data, runner.family
        first, slots, positions = 0, [], []
        sized: dict[tuple[int, int], list[tuple[int, Chunk]]] = {}
        for chunk in chunks:
            end = chunk.start + len(chunk.ids)
            slots.append(slots_of(chunk.pages, chunk.start, end))
            positions.append(torch.arange(chunk.start, end))
            size = (len(chunk.ids).bit_length(), end.bit_length())
            sized.setdefault(size, []).append((first, chunk))
            first += len(chunk.ids)
        self.slots = torch.cat(slots)
        self.angles = _angles(runner.weights.rope, torch.cat(positions))
        self.groups = [_padded(members) for members in sized.values()]
        self._masks: dict[int | None, list[Tensor]] = {}

    def attend(self, layer: LayerWeights, qkv: Tensor) -> Tensor:
        f, pool, spec = self.family, self.pool[layer.spec.index], layer.spec
        # In a product even what is masked counts where it is NaN: no row may lose another.
        q, k, v = _rotated(f, layer, qkv.nan_to_num_(), self.angles)
        pool[0].index_copy_(0, self.slots, k)
        pool[1].index_copy_(0, self.slots, v)
        out = q.new_empty(len(q), f.heads * f.head_dim)
        repeat = f.heads // f.kv_heads
        for group, mask in zip(self.groups, self._mask(spec.window), strict=True):
            n, wide = group.position.shape
            # [n, Hkv, repeat W, D]: the query heads of a key head are more queries.
            qs = q.index_select(0, group.tokens).view(n, wide, f.kv_heads, repeat, f.head_dim)
            qs = qs.permute(0, 2, 3, 1, 4).reshape(n, f.kv_heads, repeat * wide, f.head_dim)
            kv = pool.index_select(1, group.places).view(2, n, -1, f.kv_heads, f.head_dim).transpose(2, 3)
            y = F.scaled_dot_product_attention(qs, kv[0], kv[1], attn_mask=mask, scale=f.attention_scale)
            y = y.view(n, f.kv_heads, repeat, wide, f.head_dim).permute(0, 3, 1, 2, 4)
            out[group.targets] = y.reshape(n * wide, -1).index_select(0, group.real)
        return out

    def _mask(self, window: int | None) -> list[Tensor]:
        if window not in self._masks:
            self._masks[window] = []
            for group in self.groups:
                key = torch.arange(len(group.places) // len(group.position))
                seen = key <= group.position[..., None]
                if window is not None:
                    seen &= key > group.position[..., None] - window
                repeat = self.family.heads // self.family.kv_heads
                self._masks[window].append(seen[:, None].repeat(1, 1, repeat, 1))
        return self._masks[window]


class _Padded(NamedTuple):
    """Chunks of about the same size: n sequences, W queries, S keys."""

    tokens: Tensor  # [n W] token of the pass behind each query; padding: the chunk's first
    real: Tensor  # the queries that are no padding
    targets: Tensor  # their tokens
    places: Tensor  # [n S] slots of the keys, padding: 0
    position: Tensor  # [n, W]


def _padded(members: list[tuple[int, Chunk]]) -> _Padded:
    lengths, starts, firsts = (
        torch.tensor(x) for x in zip(*((len(c.ids), c.start, first) for first, c in members), strict=True)
    )
    steps = torch.arange(int(lengths.max()))
    real = steps < lengths[:, None]
    tokens = firsts[:, None] + steps.where(real, 0)
    places = torch.zeros(len(members), int((starts + lengths).max()), dtype=torch.int64)
    for row, (_, chunk) in enumerate(members):
        end = chunk.start + len(chunk.ids)
        places[row, :end] = slots_of(chunk.pages, 0, end)
    position = starts[:, None] + steps.where(real, 0)
    return _Padded(tokens.flatten(), real.flatten().nonzero()[:, 0], tokens[real], places.flatten(), position)


def _angles(rope: dict[str | None, tuple[Tensor, Tensor]], positions: Tensor) -> Angles:
    """cos and sin [T, 1, rotary_dim] of positions by layer kind, the rotation's signs in sin."""
    angles = {}
    for key, (cos, sin) in rope.items():
        sines = sin.index_select(0, positions)[:, None]
        sines[..., : sines.shape[-1] // 2].neg_()
        angles[key] = (cos.index_select(0, positions)[:, None], sines)
    return angles


def _rotated(f: Family, layer: LayerWeights, qkv: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as `qk_norm_rope_write` makes them, in fewer calls."""
    both, rotary, eps = f.heads + f.kv_heads, f.rotary_dim, f.norm_eps
    if f.qk_norm == "all":
        q, k, v = qkv.split((f.heads * f.head_dim, *[f.kv_heads * f.head_dim] * 2), dim=1)
        q = F.rms_norm(q, q.shape[1:], layer.q_norm, eps)
        k = F.rms_norm(k, k.shape[1:], layer.k_norm, eps)
        qkv = torch.cat((q, k, v), dim=1)
    heads = qkv.view(len(qkv), both + f.kv_heads, f.head_dim)
    qk = heads[:, :both]
    if layer.qk_norm is not None:
        qk = F.rms_norm(qk, (f.head_dim,), None, eps) * layer.qk_norm
    if layer.spec.rope is not None:
        cos, sin = angles[layer.spec.rope]
        turned = qk[..., :rotary]
        turned = torch.addcmul(turned * cos, turned.roll(rotary // 2, -1), sin)
        qk = turned if rotary == f.head_dim else torch.cat((turned, qk[..., rotary:]), dim=-1)
    return qk[:, : f.heads], qk[:, f.heads :], heads[:, both:]


def _groups(pages: Sequence[Sequence[int]]) -> tuple[list[tuple[int, list[int]]], int]:
    """Rows by the full pages they share -> ((shared pages, rows) a group, rows of the widest group).

    A row's depth is the last of its pages that another row has, too; alone, it has all its full pages to
    itself. Wide groups are cut where padding the others to their width would waste more than it saves.
    """
    holders = Counter(page for row in pages for page in row)
    groups: dict[tuple[int, int], list[int]] = {}
    for i, row in enumerate(pages):
        depth = len(row)
        while depth and holders[row[depth - 1]] == 1:
            depth -= 1
        depth = depth or len(row)
        groups.setdefault((depth, row[depth - 1] if depth else -1), []).append(i)
    width = max(len(members) for members in groups.values())
    while width > 1 and sum(-(-len(m) // width) * width for m in groups.values()) > WASTE * len(pages):
        width = -(-width // 2)
    parts = [
        (depth, members[i : i + width])
        for (depth, _), members in groups.items()
        for i in range(0, len(members), width)
    ]
    return parts, width
