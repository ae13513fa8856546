"""Runs the fused weights over tokens: embedding, layers, final norm, logits; prefill against the pages.

One forward serves prefill and decoding. What differs is the attention: an object with `attend(spec, q, k, v)`
that stores keys and values and reads what each token may see.

Legend: T tokens, H hidden, D head_dim, Hq query heads, Hkv key heads, B rows, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pact_fast.kernels.decode import ops
from pact_fast.kernels.decode.tasks import Segment, extend_tasks
from pact_fast.rollout.in_process.cache import PAGE
from pact_fast.rollout.in_process.weights import EngineWeights, LayerWeights


class Attention(Protocol):
    def attend(self, layer: LayerWeights, qkv: Tensor) -> Tensor:
        """qkv [T, (Hq + 2 Hkv) D] as projected -> [T, Hq D]; stores the new keys and values."""
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
        # On a CPU, where calls cost more than sums: fewer of them, same numbers but for rounding.
        self.prefill_attention: Callable[[Runner, Sequence[Chunk]], Attention] = PagedPrefill
        self.lean = weights.exact and weights.device.type == "cpu"
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

    def forward(self, ids: Tensor, attention: Attention) -> Tensor:
        """Hidden states [T, H] of ids [T] after the final norm."""
        return self._norm(self._layers(ids, attention), self.weights.final_norm)

    def _layers(self, ids: Tensor, attention: Attention) -> Tensor:
        w, f = self.weights, self.family
        x = w.embedding.index_select(0, ids)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        for layer in w.layers:
            y = x if layer.attention_norm is None else self._norm(x, layer.attention_norm)
            y = attention.attend(layer, F.linear(y, layer.qkv, layer.qkv_bias))
            x = self._add(x, y, layer.out_t, layer.out_bias, layer.attention_post_norm)
            y = x if layer.mlp_norm is None else self._norm(x, layer.mlp_norm)
            if layer.router is None:
                y = self._gated(F.linear(y, layer.gate_up, layer.gate_up_bias))
                x = self._add(x, y, layer.down_t, layer.down_bias, layer.mlp_post_norm)
            else:
                x = torch.add(x, self._experts(layer, y), alpha=f.residual_scale)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V], fp32 or wider."""
        logits = F.linear(hidden, self.weights.head, self.weights.head_bias)
        return self.family.logits(logits if logits.dtype == torch.float64 else logits.float())

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        w, eps = self.weights, self.family.norm_eps
        if self.lean:
            return F.rms_norm(x, x.shape[-1:], weight, eps)
        return ops.add_rms_norm(x, None, weight, eps, plus_one=w.plus_one)[0]

    def write(
        self, layer: LayerWeights, qkv: Tensor, positions: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Norms, rotates, writes keys and values to their slots -> q [T, Hq, D], all keys, all values."""
        f, (keys, values) = self.family, self.pool.data[layer.spec.index]
        cos, sin = self.weights.rope[layer.spec.rope]
        q = ops.qk_norm_rope_write(
            qkv, layer.q_norm, layer.k_norm, cos, sin, positions, slots, keys, values,
            eps=f.norm_eps, heads=(f.heads, f.kv_heads), plus_one=self.weights.plus_one,
        )  # fmt: skip
        return q, keys, values

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
        gelu = self.family.activation != "silu"
        if not self.lean:
            return (ops.gelu_mul if gelu else ops.silu_mul)(gate_up)
        half = gate_up.shape[-1] // 2
        gate, up = gate_up[..., :half], gate_up[..., half:]
        return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)).mul_(up)

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
    def prefill(self, chunks: Sequence[Chunk]) -> tuple[Tensor, dict[int, int]]:
        """Computes all chunks in one pass -> hidden state after the last token of each [chunks, H], and for
        chunks with states that are not finite the first such token.

        Keys and values are written before any are read: a chunk may build on pages that another one fills in
        the same pass. So prompts that begin alike are one token tree.
        """
        device = self.weights.device
        ids = torch.tensor([token for chunk in chunks for token in chunk.ids], device=device)
        last = torch.tensor([len(chunk.ids) for chunk in chunks]).cumsum(0) - 1
        attention = self.prefill_attention(self, chunks)
        x = self._layers(ids, attention)
        finite = x.isfinite().all(-1).cpu()
        parts = enumerate(finite.split([len(chunk.ids) for chunk in chunks]))
        bad = {i: int(part.int().argmin()) for i, part in parts if not part.all()}
        return self._norm(x.index_select(0, last.to(device)), self.weights.final_norm), bad


class PagedPrefill:
    """Attention of chunks against their pages and themselves. See `Attention`."""

    def __init__(self, runner: Runner, chunks: Sequence[Chunk]) -> None:
        self.runner, device = runner, runner.weights.device
        ends: list[int] = []
        paths, slots = [], []
        for chunk in chunks:
            end = chunk.start + len(chunk.ids)
            slots.append(slots_of(chunk.pages, chunk.start, end))
            ends += [len(ends) + len(chunk.ids)] * len(chunk.ids)
            paths.append([Segment(chunk.pages[: -(-chunk.start // PAGE)], chunk.start)])
        self.slots = torch.cat(slots).to(device)
        self.tasks = extend_tasks(ends, paths, page_size=PAGE)
        self.positions = torch.from_numpy(self.tasks.positions).to(device)

    def attend(self, layer: LayerWeights, qkv: Tensor) -> Tensor:
        # In a product even what is masked counts where it is NaN: no row may lose another.
        qkv = qkv.nan_to_num_()
        q, keys, values = self.runner.write(layer, qkv, self.positions, self.slots)
        window = layer.spec.window
        scale = self.runner.family.attention_scale
        return ops.extend_attention(
            q, keys, values, self.slots, self.tasks, scale=scale, window=window
        ).flatten(1)


def slots_of(pages: Sequence[int], start: int, end: int) -> Tensor:
    """Slots of the positions start .. end - 1 of a sequence with these pages, int64 on the host."""
    first = start // PAGE
    slots = torch.tensor(pages[first : -(-end // PAGE)])[:, None] * PAGE + torch.arange(PAGE)
    return slots.flatten()[start - first * PAGE : end - first * PAGE]
