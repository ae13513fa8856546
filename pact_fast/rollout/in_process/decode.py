"""One decoding step of a Llama-shaped decoder without its modules: the same weights, a third of the calls.

A small model's step is not arithmetic but the way through some hundred module calls, a boolean mask turned
into numbers once a layer, and a rotary embedding cut in halves. Here a layer is sixteen operations. The
result is the model's own (a test compares them); whatever this does not know runs through the model itself.

Left out on purpose: half precision (its roundings differ from the model's), prefill, models on several
devices.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def decodes(model: PreTrainedModel) -> bool:
    """Whether `decode_step` computes what this model computes: a known family, fp32, plain linear layers
    (no adapters, no shards, no quantisation) and no hooks."""
    if type(model).__name__ not in FAMILIES or model.dtype != torch.float32:
        return False
    if getattr(model.config, "hidden_act", None) != "silu":
        return False
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return False
        if name.endswith("_proj") and type(module) is not nn.Linear:
            return False
    return all(type(p) is nn.Parameter for p in model.parameters())


@torch.no_grad()
def decode_step(model: PreTrainedModel, ids: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> Tensor:
    """Appends one token a row to the cache -> hidden state after it (final norm applied), [B, H].

    Args:
        model: one for which `decodes` holds.
        ids, positions: [B] token and its position.
        mask: [B, 1, 1, slots + 1] added to the attention scores: 0 or -inf, the new slot last.
        cache: the layers' buffers; `update(keys, values)` [B, heads, 1, D] -> all keys, all values.
    """
    body: Any = model.get_decoder()
    x = body.embed_tokens(ids)
    cos, sin = body.rotary_emb(x, positions[:, None])  # [B, 1, D]
    half = cos.shape[-1] // 2
    sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)  # the rotation's signs, once for all layers
    for layer, buffer in zip(body.layers, cache, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        y = _norm(layer.input_layernorm, x)
        q = _rotated(_heads(attention.q_proj, y, attention), getattr(attention, "q_norm", None), cos, sin)
        k = _rotated(_heads(attention.k_proj, y, attention), getattr(attention, "k_norm", None), cos, sin)
        keys, values = buffer.update(k[:, :, None], _heads(attention.v_proj, y, attention)[:, :, None])
        y = F.scaled_dot_product_attention(
            q[:, :, None],
            keys,
            values,
            attn_mask=mask,
            scale=attention.scaling,
            enable_gqa=q.shape[1] != keys.shape[1],
        )
        x = x + _linear(attention.o_proj, y.flatten(1))
        y = _norm(layer.post_attention_layernorm, x)
        x = x + _linear(mlp.down_proj, F.silu(_linear(mlp.gate_proj, y)) * _linear(mlp.up_proj, y))
    return _norm(body.norm, x)


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, module.weight, module.bias)


def _norm(module: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def _heads(module: nn.Linear, x: Tensor, attention: Any) -> Tensor:
    return _linear(module, x).view(x.shape[0], -1, attention.head_dim)  # [B, heads, D]


def _rotated(x: Tensor, norm: Any, cos: Tensor, sin: Tensor) -> Tensor:
    if norm is not None:
        x = _norm(norm, x)
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
