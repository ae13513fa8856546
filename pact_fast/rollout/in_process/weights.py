"""The engine's own copy of the policy's weights, fused, at addresses that never change.

Reading the trainer's parameters and writing these is all that happens at an update: the trainer's model is
never run, wrapped or switched for rollouts, and a captured graph stays valid. Adapters are merged while
copying, shards are gathered one at a time, wider master weights are rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pact_fast.distributed import plain
from pact_fast.tree.families import (
    Family,
    LayerSpec,
    causal_lm,
    check_model,
    decoder_layers,
    final_norm,
    layer_weights,
    rope_frequencies,
)


def add_adapters(weight: Tensor, adapters: list[tuple[float, Tensor, Tensor]]) -> Tensor:
    """weight [O, I] + sum of scale * b [O, r] @ a [r, I] over LoRA adapters (scale, a, b)."""
    for scale, a, b in adapters:
        weight = weight + scale * (b @ a)
    return weight


SPARE = 128  # positions past the context, for rows that have ended and are not out of their batch yet


class LayerWeights:
    """Fused tensors of one decoder layer, by the roles of `families.layer_weights`; None where it has none.

    qk_norm: [heads + kv_heads, D] of a norm over each head, for queries and keys at once.
    """

    def __init__(self, family: Family, spec: LayerSpec, dtype: torch.dtype, device: torch.device) -> None:
        self.spec = spec
        roles = layer_weights(family, spec)
        self.tensors = {
            role: torch.empty(weight.shape, dtype=dtype, device=device) for role, weight in roles.items()
        }
        self.sources = {role: weight.sources for role, weight in roles.items()}
        self.qk_norm: Tensor | None = None
        if family.qk_norm == "head":
            shape = (family.heads + family.kv_heads, family.head_dim)
            self.qk_norm = torch.empty(shape, dtype=dtype, device=device)
        for role in (
            *("qkv", "qkv_bias", "out", "out_bias", "gate_up", "gate_up_bias", "down", "down_bias"),
            *("router", "expert_gate_up", "expert_down", "q_norm", "k_norm"),
            *("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm"),
        ):
            setattr(self, role, self.tensors.get(role))
        self.out_t = self.out.t()
        self.down_t = None if self.down is None else self.down.t()

    def __getattr__(self, name: str) -> Any:  # for the type checker: attributes are set by role
        raise AttributeError(name)


class EngineWeights:
    """A model's weights in fused form.

    Args:
        model: a causal LM of a known family, plain, sharded (FSDP2) or with LoRA adapters.
        dtype: of the copy; None takes the model's. device: where the copy lives.
        context_length: positions that RoPE tables are made for.

    Raises ValueError for a family that is not known (`families.family_of` says which are).
    """

    def __init__(
        self, model: nn.Module, *, dtype: torch.dtype | None, device: torch.device, context_length: int
    ) -> None:
        causal = causal_lm(model)
        try:
            self.family = check_model(causal)
        except ValueError as error:
            raise ValueError(
                f"the in-process rollout engine cannot sample from this model: {error}. Or sample elsewhere: "
                "rollout.engine=http on a server that knows it (vllm serve)"
            ) from None
        family, self.model = self.family, model
        self.dtype, self.device = dtype or next(model.parameters()).dtype, device
        if not self.dtype.is_floating_point:
            raise ValueError(f"dtype={self.dtype}: the engine samples in a floating-point dtype")
        self.exact = self.dtype in (torch.float32, torch.float64)
        # In half precision 1 + weight would lose digits: there the norm adds it, in fp32.
        self.norm_offset = family.norm_offset if self.exact else 0.0
        self.plus_one = bool(family.norm_offset) and not self.exact
        self.layers = [LayerWeights(family, spec, self.dtype, device) for spec in family.layers]
        shape = (family.vocabulary, family.hidden)
        self.embedding = torch.empty(shape, dtype=self.dtype, device=device)
        self.head = self.embedding if family.tied else torch.empty_like(self.embedding)
        bias = causal.get_output_embeddings().bias
        self.head_bias = None if bias is None else torch.empty(bias.shape, dtype=self.dtype, device=device)
        self.final_norm = torch.empty(family.hidden, dtype=self.dtype, device=device)
        self.context_length = context_length
        self.rope: dict[str | None, tuple[Tensor, Tensor]] = {}
        self.bytes = sum(t.nbytes for layer in self.layers for t in layer.tensors.values())
        self.bytes += self.head.nbytes  # what a decoding step reads

    @torch.no_grad()
    def refill(self) -> None:
        """Copies the model's present weights. Every rank of a sharded model must call it."""
        causal, family = causal_lm(self.model), self.family
        for layer, module in zip(self.layers, decoder_layers(self.model), strict=True):
            for role, target in layer.tensors.items():
                start = 0
                for name in layer.sources[role]:
                    value = _value(module, name)
                    if target[start : start + len(value)].shape != value.shape:
                        raise ValueError(
                            f"{name} of layer {layer.spec.index} is {list(value.shape)}, which does not fit "
                            f"{role} {list(target.shape)} of a {family.name}: the model was changed"
                        )
                    target[start : start + len(value)].copy_(value)
                    start += len(value)
                if role.endswith("_norm"):
                    target.add_(self.norm_offset)
            if layer.qk_norm is not None:
                layer.qk_norm[: family.heads] = layer.q_norm
                layer.qk_norm[family.heads :] = layer.k_norm
        self.embedding.copy_(_value(causal.get_input_embeddings(), "weight"))
        head = causal.get_output_embeddings()
        if not family.tied:
            self.head.copy_(_value(head, "weight"))
        if self.head_bias is not None:
            self.head_bias.copy_(plain(head.bias))
        self.final_norm.copy_(_value(final_norm(self.model), "weight")).add_(self.norm_offset)
        if not self.rope:
            self._fill_rope()

    def _fill_rope(self) -> None:
        """cos and sin [context_length + SPARE, rotary_dim], halves alike."""
        family = self.family
        for spec in family.layers:
            if spec.rope in self.rope:
                continue
            if (found := rope_frequencies(self.model, spec)) is None:  # a rotation by nothing
                table = torch.zeros(self.context_length + SPARE, 2, dtype=self.dtype, device=self.device)
                self.rope[spec.rope] = (table + 1, table)
                continue
            frequencies, factor = found
            positions = torch.arange(self.context_length + SPARE, device=self.device, dtype=torch.float32)
            angles = positions[:, None] * plain(frequencies).to(self.device, torch.float32)
            cos, sin = angles.cos() * factor, angles.sin() * factor
            self.rope[spec.rope] = (
                torch.cat((cos, cos), dim=1).to(self.dtype),
                torch.cat((sin, sin), dim=1).to(self.dtype),
            )


def _value(module: nn.Module, name: str) -> Tensor:
    """A parameter of a module, whole, adapters added. ValueError for one that is not plain numbers."""
    path, _, leaf = name.rpartition(".")
    owner: Any = module.get_submodule(path)
    holder = getattr(owner, "base_layer", owner)  # peft wraps what it adapts
    value = getattr(holder, leaf, None)
    if value is None or not value.is_floating_point():
        raise ValueError(
            f"{name}: the rollout engine reads plain floating-point weights, not those of a "
            f"{type(holder).__name__}: load the model unquantised, or use rollout.engine=http"
        )
    value = plain(value)
    if leaf == "weight" and hasattr(owner, "lora_A"):
        pairs = [
            (scale, plain(owner.lora_A[adapter].weight), plain(owner.lora_B[adapter].weight))
            for adapter, scale in owner.scaling.items()
        ]
        value = add_adapters(value, pairs)
    return value
