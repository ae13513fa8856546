"""Runs the fused weights over tokens: embedding, layers, final norm, logits; prefill against the pages.

One forward serves prefill and decoding. What differs is the attention: an object with `attend(spec, q, k, v)`
that stores keys and values and reads what each token may see.

Legend: T tokens, H hidden, D head_dim, Hq query heads, Hkv key heads, B rows, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pact_fast.rollout.in_process.cache import PAGE
from pact_fast.rollout.in_process.weights import EngineWeights, LayerWeights
from pact_fast.tree.families import LayerSpec


class Attention(Protocol):
    def attend(self, spec: LayerSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D], rotated -> [T, Hq D]."""
        ...


class KVPool:
    """The tensors behind a `PageTable`: [L, 2, pages * PAGE, Hkv, D], keys and values. Page 0 stays zero."""

    def __init__(self, weights: EngineWeights, num_pages: int) -> None:
        family = weights.family
        self.shape = (len(weights.layers), 2, num_pages * PAGE, family.kv_heads, family.head_dim)
        # Zeros: a masked place still meets a product, where rubbish could be NaN.
        self.data = torch.zeros(self.shape, dtype=weights.dtype, device=weights.device)

    @staticmethod
    def page_bytes(weights: EngineWeights) -> int:
        family = weights.family
        return 2 * len(weights.layers) * PAGE * family.kv_heads * family.head_dim * weights.dtype.itemsize

    def grow(self, num_pages: int) -> None:
        more = num_pages * PAGE - self.data.shape[2]
        self.data = torch.cat((self.data, self.data.new_zeros(*self.shape[:2], more, *self.shape[3:])), dim=2)

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        pages = self.data.unflatten(2, (-1, PAGE))
        pages[:, :, list(targets)] = pages[:, :, list(sources)]

    def wipe(self, pages: Sequence[int]) -> None:
        self.data.unflatten(2, (-1, PAGE))[:, :, list(pages)] = 0


class Chunk(NamedTuple):
    """Tokens of a sequence to be computed: ids at positions start, start + 1, ...; its pages cover them."""

    ids: list[int]
    start: int
    pages: list[int]


class Runner:
    """Args: weights: filled before the first forward. pool: keys and values."""

    def __init__(self, weights: EngineWeights, pool: KVPool) -> None:
        self.weights, self.pool, self.family = weights, pool, weights.family
        f = self.family
        self._scratch: Tensor | None = None
        self.simple = f.residual_scale == 1.0 and f.post_norms is None
        self.embedding_scale = f.embedding_scale
        if f.rounded_embedding_scale:
            self.embedding_scale = float(torch.tensor(f.embedding_scale, dtype=weights.dtype))

    def scratch(self, *shape: int) -> Tensor:
        """A tensor that stays as it was left, so always finite: masked places meet products, too. The next
        call takes its memory."""
        size = math.prod(shape)
        if self._scratch is None or self._scratch.numel() < size:
            self._scratch = torch.zeros(size, dtype=self.weights.dtype, device=self.weights.device)
        return self._scratch[:size].view(shape)

    def wipe(self) -> None:
        """Rows had keys that are not finite: no scratch is used again."""
        self._scratch = None

    # -- forward -----------------------------------------------------------------------------------

    def forward(self, ids: Tensor, positions: Tensor, attention: Attention, rows: Tensor | None) -> Tensor:
        """Hidden states [T, H], or [len(rows), H] of these tokens, after the final norm.

        ids, positions: int64 [T].
        """
        w, f = self.weights, self.family
        x = w.embedding.index_select(0, ids)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        angles = {
            key: (cos.index_select(0, positions), sin.index_select(0, positions))
            for key, (cos, sin) in w.rope.items()
        }
        for layer in w.layers:
            y = x if layer.attention_norm is None else self._norm(x, layer.attention_norm)
            q, k, v = self._qkv(layer, y, angles.get(layer.spec.rope))
            y = attention.attend(layer.spec, q, k, v)
            x = self._add(x, y, layer.out_t, layer.out_bias, layer.attention_post_norm)
            y = x if layer.mlp_norm is None else self._norm(x, layer.mlp_norm)
            if layer.router is None:
                y = self._gated(F.linear(y, layer.gate_up, layer.gate_up_bias))
                x = self._add(x, y, layer.down_t, layer.down_bias, layer.mlp_post_norm)
            else:
                x = torch.add(x, self._experts(layer, y), alpha=f.residual_scale)
        if rows is not None:
            x = x.index_select(0, rows)
        return self._norm(x, w.final_norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V], fp32 or wider."""
        logits = F.linear(hidden, self.weights.head, self.weights.head_bias)
        return self.family.logits(logits if logits.dtype == torch.float64 else logits.float())

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self.family.norm_eps)

    def _qkv(
        self, layer: LayerWeights, y: Tensor, angles: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        f = self.family
        both = f.heads + f.kv_heads
        qkv = F.linear(y, layer.qkv, layer.qkv_bias)
        if f.qk_norm == "all":
            at = f.heads * f.head_dim
            q, k, v = qkv.split((at, f.kv_heads * f.head_dim, f.kv_heads * f.head_dim), dim=1)
            qkv = torch.cat((self._norm(q, layer.q_norm), self._norm(k, layer.k_norm), v), dim=1)
        heads = qkv.view(len(y), both + f.kv_heads, f.head_dim)
        qk, v = heads[:, :both], heads[:, both:]
        if layer.qk_norm is not None:
            qk = self._norm(qk, None) * layer.qk_norm
        if angles is not None:
            cos, sin = angles
            half, rotary = f.rotary_dim // 2, f.rotary_dim
            if rotary == f.head_dim:
                turned = qk.roll(half, -1)
            else:
                turned = torch.cat((qk[..., :rotary].roll(half, -1), qk[..., rotary:]), dim=-1)
            qk = torch.addcmul(qk * cos, turned, sin)
        return qk[:, : f.heads], qk[:, f.heads :], v

    def _add(
        self, x: Tensor, y: Tensor, weight_t: Any, bias: Tensor | None, post_norm: Tensor | None
    ) -> Tensor:
        """x + s post_norm(y @ weight_t + bias)."""
        if self.simple and bias is None:
            return torch.addmm(x, y, weight_t)
        y = torch.mm(y, weight_t) if bias is None else torch.addmm(bias, y, weight_t)
        y = y if post_norm is None else self._norm(y, post_norm)
        return torch.add(x, y, alpha=self.family.residual_scale)

    def _gated(self, gate_up: Tensor) -> Tensor:
        half = gate_up.shape[-1] // 2
        gate, up = gate_up[..., :half], gate_up[..., half:]
        if self.family.activation == "silu":
            return F.silu(gate).mul_(up)
        return F.gelu(gate, approximate="tanh").mul_(up)

    def _experts(self, layer: LayerWeights, y: Tensor) -> Tensor:
        """The experts' sum [T, H], expert by expert (the host learns who is chosen: no graph)."""
        probs = torch.softmax(F.linear(y, layer.router).float(), dim=-1)
        share, chosen = probs.topk(self.family.experts_per_token, dim=-1)
        if self.family.norm_topk:
            share = share / share.sum(-1, keepdim=True)
        out = torch.zeros_like(y)
        for expert in chosen.unique().tolist():
            token, place = (chosen == expert).nonzero(as_tuple=True)
            hidden = self._gated(F.linear(y[token], layer.expert_gate_up[expert]))
            part = F.linear(hidden, layer.expert_down[expert])
            out.index_add_(0, token, part * share[token, place, None].to(y.dtype))
        return out

    # -- prefill -----------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        """Computes all chunks in one pass -> hidden state after the last token of each, [chunks, H].

        Keys and values are written before any are read: a chunk may build on pages that another one fills in
        the same pass. So prompts that begin alike are one token tree.
        """
        device = self.weights.device
        ids = [token for chunk in chunks for token in chunk.ids]
        positions = [chunk.start + i for chunk in chunks for i in range(len(chunk.ids))]
        last = torch.tensor([len(chunk.ids) for chunk in chunks]).cumsum(0) - 1
        attention = PagedPrefill(self, chunks)
        return self.forward(
            torch.tensor(ids, device=device),
            torch.tensor(positions, device=device),
            attention,
            last.to(device),
        )


class _Group(NamedTuple):
    """Chunks of about the same size, padded: n sequences, W queries, S keys."""

    tokens: Tensor  # [n W] token of the pass behind each query, padding: any
    real: Tensor  # the queries that are no padding
    targets: Tensor  # their tokens
    places: Tensor  # [n S] slots of the keys, padding: 0
    position: Tensor  # [n, W]
    shape: tuple[int, int, int]  # n, W, S


class PagedPrefill:
    """Attention of chunks against their pages. See `Attention`."""

    def __init__(self, runner: Runner, chunks: Sequence[Chunk]) -> None:
        self.pool, self.family = runner.pool.data, runner.family
        device = runner.weights.device
        first, slots = 0, []
        sized: dict[tuple[int, int], list[tuple[int, Chunk]]] = {}
        for chunk in chunks:
            end = chunk.start + len(chunk.ids)
            slots.append(slots_of(chunk.pages, chunk.start, end))
            size = (len(chunk.ids).bit_length(), end.bit_length())
            sized.setdefault(size, []).append((first, chunk))
            first += len(chunk.ids)
        self.slots = torch.cat(slots).to(device)
        self.groups = [_group(members, device) for members in sized.values()]
        self._masks: dict[int | None, list[Tensor]] = {}

    def attend(self, spec: LayerSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        f, layer = self.family, self.pool[spec.index]
        layer[0].index_copy_(0, self.slots, k)
        layer[1].index_copy_(0, self.slots, v)
        out = q.new_empty(len(q), f.heads * f.head_dim)
        repeat = f.heads // f.kv_heads
        for group, mask in zip(self.groups, self._mask(spec.window), strict=True):
            n, wide, keys = group.shape
            # [n, Hkv, repeat W, D]: the query heads of a key head are more queries.
            qs = q.index_select(0, group.tokens).view(n, wide, f.kv_heads, repeat, f.head_dim)
            qs = qs.permute(0, 2, 3, 1, 4).reshape(n, f.kv_heads, repeat * wide, f.head_dim)
            kv = layer.index_select(1, group.places).view(2, n, keys, f.kv_heads, f.head_dim).transpose(2, 3)
            y = F.scaled_dot_product_attention(qs, kv[0], kv[1], attn_mask=mask, scale=f.attention_scale)
            y = y.view(n, f.kv_heads, repeat, wide, f.head_dim).permute(0, 3, 1, 2, 4)
            out[group.targets] = y.reshape(n * wide, -1).index_select(0, group.real)
        return out

    def _mask(self, window: int | None) -> list[Tensor]:
        if window not in self._masks:
            self._masks[window] = []
            for group in self.groups:
                key = torch.arange(group.shape[2], device=self.slots.device)
                seen = key <= group.position[..., None]
                if window is not None:
                    seen &= key > group.position[..., None] - window
                repeat = self.family.heads // self.family.kv_heads
                self._masks[window].append(seen[:, None].repeat(1, 1, repeat, 1))
        return self._masks[window]


def _group(members: list[tuple[int, Chunk]], device: torch.device) -> _Group:
    n = len(members)
    lengths = torch.tensor([len(chunk.ids) for _, chunk in members])
    starts = torch.tensor([chunk.start for _, chunk in members])
    firsts = torch.tensor([first for first, _ in members])
    wide, keys = int(lengths.max()), int((starts + lengths).max())
    steps = torch.arange(wide)
    real = steps < lengths[:, None]
    tokens = firsts[:, None] + steps.where(real, 0)
    places = torch.zeros(n, keys, dtype=torch.int64)
    for row, (_, chunk) in enumerate(members):
        end = chunk.start + len(chunk.ids)
        places[row, :end] = slots_of(chunk.pages, 0, end)
    return _Group(
        tokens.flatten().to(device),
        real.flatten().nonzero()[:, 0].to(device),
        tokens[real].to(device),
        places.flatten().to(device),
        (starts[:, None] + steps.where(real, 0)).to(device),
        (n, wide, keys),
    )


def slots_of(pages: Sequence[int], start: int, end: int) -> Tensor:
    """Slots of the positions start .. end - 1 of a sequence with these pages, int64 on the host."""
    first = start // PAGE
    slots = torch.tensor(pages[first : -(-end // PAGE)])[:, None] * PAGE + torch.arange(PAGE)
    return slots.flatten()[start - first * PAGE : end - first * PAGE]
