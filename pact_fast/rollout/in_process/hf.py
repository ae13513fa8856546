"""In-process engine over a Hugging Face causal LM: one growing KV cache for all rows of a batch.

Rows keep their keys and values from turn to turn, so a tool response costs one short prefill. Slots of the
cache are shared by position in time, not by position in the sequence: a row that has nothing to feed leaves
an invalid slot, and every turn starts by squeezing those out. Rows that finish leave the batch once half of
it is idle.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from pact_fast.rollout.engine import Generation
from pact_fast.rollout.in_process.decode import decode_step, decodes
from pact_fast.tree.families import Family, check_full_attention, family_of

DRAWS = 32  # uniform numbers made at a time for a row
GROWTH = 64  # slots added at a time, so that appending a token rarely copies the cache


class _BufferLayer(DynamicLayer):
    """A cache layer that appends into a buffer with spare room instead of concatenating at every token."""

    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self.used = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        end = self.used + key_states.shape[-2]
        self.grow_to(end, key_states)
        self.keys[:, :, self.used : end] = key_states
        self.values[:, :, self.used : end] = value_states
        self.used = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def grow_to(self, slots: int, like: Tensor) -> None:
        capacity = self.keys.shape[-2] if self.is_initialized else 0
        if slots <= capacity:
            return
        batch, heads, _, dim = like.shape
        shape = (batch, heads, slots + GROWTH, dim)
        keys, values = like.new_zeros(shape), like.new_zeros(shape)
        if self.is_initialized:
            keys[:, :, : self.used] = self.keys[:, :, : self.used]
            values[:, :, : self.used] = self.values[:, :, : self.used]
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = like.dtype, like.device, True

    def get_seq_length(self) -> int:
        return self.used

    def rebuilt(self, keys: Tensor, values: Tensor) -> _BufferLayer:
        layer = _BufferLayer()
        layer.keys, layer.values, layer.used = keys, values, keys.shape[-2]
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        return layer


class _Batch:
    """Rows with their cache. valid [B, slots] marks the slots that hold a token of the row; length [B]
    counts them."""

    def __init__(self, layers: list[_BufferLayer], valid: Tensor, tokens: list[list[int]]) -> None:
        self.layers, self.valid, self.tokens = layers, valid, tokens
        self.length = valid.sum(1)

    @classmethod
    def empty(cls, model: PreTrainedModel, rows: int) -> _Batch:
        layers = [_BufferLayer() for _ in range(model.config.num_hidden_layers)]
        return cls(
            layers, torch.zeros(rows, 0, dtype=torch.bool, device=model.device), [[] for _ in range(rows)]
        )

    def select(self, rows: Tensor) -> _Batch:
        layers = [
            layer.rebuilt(layer.keys[rows, :, : layer.used], layer.values[rows, :, : layer.used])
            for layer in self.layers
        ]
        return _Batch(layers, self.valid[rows], [list(self.tokens[i]) for i in rows.tolist()])

    def squeeze(self) -> None:
        """Moves the valid slots of every row to the front and drops the rest."""
        width = int(self.length.max())
        order = torch.sort((~self.valid).int(), dim=1, stable=True).indices[:, :width]
        self.valid = self.valid.gather(1, order)
        for i, layer in enumerate(self.layers):
            index = order[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            self.layers[i] = layer.rebuilt(layer.keys.gather(2, index), layer.values.gather(2, index))

    def absorb(self, rows: Tensor, part: _Batch) -> None:
        """Takes back rows that went on alone: `part` was selected from here and then grew."""
        start, end = self.valid.shape[1], part.valid.shape[1]
        self.valid = torch.cat([self.valid, self.valid.new_zeros(len(self.tokens), end - start)], dim=1)
        self.valid[rows, start:] = part.valid[:, start:]
        self.length = self.valid.sum(1)
        for layer, other in zip(self.layers, part.layers, strict=True):
            layer.grow_to(end, layer.keys)
            layer.keys[rows, :, start:end] = other.keys[:, :, start:end]
            layer.values[rows, :, start:end] = other.values[:, :, start:end]
            layer.used = end
        for i, tokens in zip(rows.tolist(), part.tokens, strict=True):
            self.tokens[i] = tokens

    @torch.no_grad()
    def feed(self, model: PreTrainedModel, chunks: Sequence[Sequence[int]], lean: bool = False) -> Tensor:
        """Feeds each row its tokens (possibly none) -> hidden state after the last one, [B, H]. `lean`: by
        `decode_step` where it is one token a row."""
        device, width = model.device, max(len(c) for c in chunks)
        ids = torch.tensor([list(c) + [0] * (width - len(c)) for c in chunks], device=device)
        counts = torch.tensor([len(c) for c in chunks], device=device)
        if width == 1 and lean:
            return self._step(model, ids[:, 0], counts, chunks)
        steps = torch.arange(width, device=device)
        new = steps[None, :] < counts[:, None]  # [B, width]
        positions = (self.length[:, None] + steps[None, :]).where(new, 0)
        before = self.valid[:, None, :].expand(-1, width, -1)
        causal = (steps[None, :] <= steps[:, None]) & new[:, None, :]  # [B, query, new key]
        mask = torch.cat([before, causal], dim=2)[:, None]
        if bool((counts == 0).any()):
            mask[counts == 0, :, :, -width:] |= torch.eye(width, dtype=torch.bool, device=device)
        body: nn.Module = model.get_decoder()
        # By position: transformers 5.17 calls the fourth argument past_key_values, later ones cache.
        hidden = body(ids, mask, positions, Cache(layers=list(self.layers)), use_cache=True).last_hidden_state
        self._grown(new, counts, chunks)
        return hidden[torch.arange(len(chunks), device=device), (counts - 1).clamp(min=0)]

    def _step(self, model: PreTrainedModel, ids: Tensor, counts: Tensor, chunks) -> Tensor:
        new = (counts > 0)[:, None]
        positions = torch.where(new[:, 0], self.length, 0)
        # An idle row sees its new slot too, so that it has one to see; what it computes is never used.
        seen = torch.cat([self.valid, torch.ones_like(new)], dim=1)
        mask = torch.zeros(seen.shape, device=ids.device).masked_fill_(~seen, -torch.inf)
        hidden = decode_step(model, ids, positions, mask[:, None, None], self.layers)
        self._grown(new, counts, chunks)
        return hidden

    def _grown(self, new: Tensor, counts: Tensor, chunks: Sequence[Sequence[int]]) -> None:
        self.valid = torch.cat([self.valid, new], dim=1)
        self.length = self.length + counts
        for tokens, chunk in zip(self.tokens, chunks, strict=True):
            tokens.extend(chunk)


class HFEngine:
    """Samples with the model in this process.

    Args:
        model: a decoder-only causal LM whose layers all use full attention.
    """

    per_sequence_seed, in_process = False, True

    def __init__(self, model: PreTrainedModel) -> None:
        self.family = family_of(model.config)
        check_full_attention(self.family, "HFEngine")
        self.model = model
        self.lean = decodes(model)
        self._sessions: list[Hashable] = []
        self._batch: _Batch | None = None

    def reset(self) -> None:
        self._sessions, self._batch = [], None

    def weights_changed(self) -> None:
        self.reset()

    def prepare(self) -> None:
        pass  # it samples with the model itself

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: Sequence[int],
        temperature: float,
        stop_token_ids: Sequence[int],
        seed: int | Sequence[int],
        sessions: Sequence[Hashable] | None = None,
    ) -> list[Generation]:
        """See `Engine.generate`."""
        if not prompts:
            return []
        if min(max_new_tokens) < 1:
            raise ValueError(
                f"max_new_tokens={min(max_new_tokens)}: every row needs room for at least one token"
            )
        hidden = self._resume(prompts, sessions) if sessions is not None else None
        if hidden is None:
            hidden = self._start(prompts)
        self._sessions = list(sessions) if sessions is not None else []
        assert self._batch is not None
        sampler = _Sampler(
            self.model, self.family, self.lean, max_new_tokens, temperature, stop_token_ids, seed
        )
        sampler.run(self._batch, torch.arange(len(prompts)), hidden)
        return sampler.generations()

    def _start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Prefills each distinct prompt once and repeats its cache for the rows that share it."""
        distinct: dict[tuple[int, ...], int] = {}
        row_of = [distinct.setdefault(tuple(p), len(distinct)) for p in prompts]
        batch = _Batch.empty(self.model, len(distinct))
        hidden = batch.feed(self.model, list(distinct))
        rows = torch.tensor(row_of, device=hidden.device)
        self._batch = batch.select(rows)
        return hidden[rows]

    def _resume(self, prompts: Sequence[Sequence[int]], sessions: Sequence[Hashable]) -> Tensor | None:
        """Feeds what each session has not seen; None where a session is unknown or its prompt was
        rewritten."""
        if self._batch is None:
            return None
        where = {key: i for i, key in enumerate(self._sessions)}
        if any(key not in where for key in sessions):
            return None
        seen = [self._batch.tokens[where[key]] for key in sessions]
        if any(len(p) <= len(s) or list(p[: len(s)]) != s for p, s in zip(prompts, seen, strict=True)):
            return None
        rows = torch.tensor([where[key] for key in sessions], device=self.model.device)
        self._batch = self._batch.select(rows)
        self._batch.squeeze()
        return self._batch.feed(self.model, [p[len(s) :] for p, s in zip(prompts, seen, strict=True)])


class _Sampler:
    """The decode loop of one turn over a batch and, recursively, over the rows that are left of it."""

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        lean: bool,
        max_new_tokens: Sequence[int],
        temperature: float,
        stop_token_ids: Sequence[int],
        seed: int | Sequence[int],
    ) -> None:
        self.model, self.family, self.lean, self.temperature = model, family, lean, temperature
        self.generator = self.generators = None
        if isinstance(seed, int):
            self.generator = torch.Generator(device=model.device).manual_seed(seed)
        else:  # on the host, so that a seed means the same draw on any device
            self.generators = [torch.Generator().manual_seed(row) for row in seed]
            self.uniforms: list[list[float]] = [[] for _ in seed]
        self.limits, self.stops = list(max_new_tokens), set(stop_token_ids)
        self.ids: list[list[int]] = [[] for _ in self.limits]
        self.logprobs: list[list[float]] = [[] for _ in self.limits]
        self.reasons = [""] * len(self.limits)

    def generations(self) -> list[Generation]:
        return [Generation(*row) for row in zip(self.ids, self.logprobs, self.reasons, strict=True)]

    def run(self, batch: _Batch, rows: Tensor, hidden: Tensor) -> None:
        """rows [b] names the result each row of `batch` belongs to; hidden [b, H] is the state to sample
        from."""
        names = rows.tolist()
        alive = [not self.reasons[n] for n in names]
        while any(alive):
            if 2 * sum(alive) <= len(names):
                keep = torch.tensor([i for i, a in enumerate(alive) if a], device=hidden.device)
                part = batch.select(keep)
                self.run(part, rows[keep.cpu()], hidden[keep])
                batch.absorb(keep, part)
                return
            tokens, logprobs = self._draw(hidden, names)
            for i, name in enumerate(names):
                if alive[i]:
                    alive[i] = self._record(name, tokens[i], logprobs[i])
            if any(alive):
                hidden = batch.feed(
                    self.model, [[t] if a else [] for t, a in zip(tokens, alive, strict=True)], self.lean
                )

    def _draw(self, hidden: Tensor, names: Sequence[int]) -> tuple[list[int], list[float]]:
        logits = self.family.logits(self.model.get_output_embeddings()(hidden)).float()
        if self.temperature > 0:
            logits = logits / self.temperature
        logp = torch.log_softmax(logits, dim=-1)
        if self.temperature > 0:
            token = self._sample(logp.exp(), names)
        else:
            token = logp.argmax(-1, keepdim=True)
        return token[:, 0].tolist(), logp.gather(1, token)[:, 0].tolist()

    def _sample(self, probs: Tensor, names: Sequence[int]) -> Tensor:
        """One token a row, [B, 1], from probs [B, V]."""
        if self.generators is None:
            mass = probs.cumsum(-1)
            u = torch.rand(len(names), 1, generator=self.generator, device=mass.device)
        else:
            # Ranks must draw as one process does, from log-probs that differ in the last bit. An fp32 running
            # sum alone moves the borders between tokens by 1e-7: 11 of 800,000 draws fell elsewhere, here 3.
            mass = probs.double().cumsum(-1)
            u = mass.new_tensor([self._uniform(n) for n in names])[:, None]
        # Inverse of the distribution function; just below 1, lest rounding reach past the last token.
        token = torch.searchsorted(mass, u * mass[:, -1:] * (1 - 1e-7), right=True)
        return token.clamp(max=mass.shape[1] - 1)

    def _uniform(self, name: int) -> float:
        """The uniform draw of a row's next token: a function of its seed and the token's place alone."""
        place, drawn = len(self.ids[name]), self.uniforms[name]
        if place >= len(drawn):
            assert self.generators is not None
            drawn.extend(torch.rand(DRAWS, generator=self.generators[name]).tolist())
        return drawn[place]

    def _record(self, name: int, token: int, logprob: float) -> bool:
        """Appends a sampled token; True while the row goes on."""
        self.ids[name].append(token)
        self.logprobs[name].append(logprob)
        if token in self.stops:
            self.reasons[name] = "stop"
        elif len(self.ids[name]) >= self.limits[name]:
            self.reasons[name] = "length"
        return not self.reasons[name]
