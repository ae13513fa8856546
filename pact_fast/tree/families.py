"""Model families: everything the code knows about an architecture, in one place.

`family_of(config)` reads a Hugging Face config into a `Family`: frozen numbers and names, no modules, no
tensors. The tree policy, the sharding, the FLOP and memory accounting and the rollout engine ask it instead
of the model. A family is accepted where tree log-probs and gradients equal those of its sequences run one by
one (tests/tree/test_families.py). To add one: a function in READERS, a tiny config in that test.

One decoder layer, with s = residual_scale, where a norm whose weight the layer lacks is the identity:

    x += s attention_post_norm(out(attention(qkv(attention_norm(x)))))
    x += s mlp_post_norm(down(activation(gate) * up)),    gate, up = gate_up(mlp_norm(x))

Before the first layer x = embedding_scale * embedding[token]; after the last, logits = head(final_norm(x)) as
`HeadParams` says. An expert layer routes the input of its MLP: p = softmax(router(h)) in fp32, the
experts_per_token largest of p (divided by their sum where norm_topk), each times its own gate_up and down.

Legend: T tokens, H hidden, F intermediate, V vocabulary, D head_dim, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

LAYER_KINDS = ("full_attention", "sliding_attention")


class HeadParams(NamedTuple):
    """The LM head: logits = softcap(scale * (hidden @ weight.T + bias)), softcap(z) = c tanh(z / c).

    At most one of scale and softcap is at work: `Family` refuses both.
    """

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None
    scale: float

    def options(self, temperature: Any = 1.0) -> dict[str, Any]:
        """Keyword arguments of the fused ops for logits divided by `temperature` (a number or a tensor)."""
        return {"bias": self.bias, "softcap": self.softcap, "temperature": temperature / self.scale}

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] of hidden states [N, H], in their dtype."""
        return _finish(nn.functional.linear(hidden, self.weight, self.bias), self.scale, self.softcap)


@dataclass(frozen=True)
class LayerSpec:
    """What may differ between the decoder layers of one model.

    window: a token sees itself and the window - 1 tokens before it (of its own path); None sees all.
    rope: prefix of this layer's buffers in the decoder's rotary embedding ("" or "sliding_attention_"), None
        where queries and keys are not rotated. See `rope_frequencies`.
    intermediate: F of the MLP, or of each expert.
    experts: E; 0 for a dense MLP.
    """

    index: int
    window: int | None
    rope: str | None
    intermediate: int
    experts: int = 0


@dataclass(frozen=True)
class Family:
    """A decoder-only architecture with its sizes. See the module's docstring for the formula of a layer.

    rotary_dim: the first rotary_dim of D dimensions are rotated, halves against each other (NeoX order).
    attention_scale: factor on q k^T.
    embedding_scale: factor on embeddings; with rounded_embedding_scale rounded to the weights' dtype first.
    norm_offset: RMSNorm multiplies by weight + norm_offset (1 for Gemma, else 0).
    norm_in_fp32: the product with the weight is made in fp32 and then rounded (Gemma, OLMo 2), else after.
    qk_norm: RMSNorm of queries and keys before RoPE: "head" over D, "all" over all heads at once, None.
    activation: "silu" or "gelu_pytorch_tanh", as transformers calls them.
    router_coef: factor of the router's auxiliary loss, 0 where the config does not ask for it.
    """

    name: str  # model_type
    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    tied: bool
    norm_eps: float
    attention_scale: float
    rotary_dim: int
    activation: str = "silu"
    fused: bool = False  # the checkpoint itself holds qkv and gate_up in one (Phi-3)
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None
    norm_offset: float = 0.0
    norm_in_fp32: bool = False
    pre_norms: tuple[str, str] | None = ("input_layernorm", "post_attention_layernorm")
    post_norms: tuple[str, str] | None = None
    embedding_scale: float = 1.0
    rounded_embedding_scale: bool = False
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    logits_softcap: float | None = None
    experts_per_token: int = 0
    norm_topk: bool = False
    router_coef: float = 0.0
    attention_dropout: float = field(default=0.0, compare=False)

    def __post_init__(self) -> None:
        if self.logits_scale != 1.0 and self.logits_softcap is not None:
            raise ValueError(
                f"{self.name}: logits_scale {self.logits_scale} beside logits_softcap {self.logits_softcap}: "
                "the fused ops take one of them"
            )

    def logits(self, products: Tensor) -> Tensor:
        """Logits [N, V] from what the head module returns, hidden @ weight.T + bias."""
        return _finish(products, self.logits_scale, self.logits_softcap)

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, a tied head once."""
        return self.root_parameters + sum(layer_parameters(self, layer) for layer in self.layers)

    @property
    def root_parameters(self) -> int:
        """Parameters outside of the decoder layers: embedding, final norm and head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden


class Weight(NamedTuple):
    """One fused weight of a decoder layer: parameters of the layer, concatenated along their first axis."""

    sources: tuple[str, ...]  # names relative to the decoder layer
    shape: tuple[int, ...]


def layer_weights(family: Family, layer: LayerSpec) -> dict[str, Weight]:
    """All weights of a decoder layer by their role, in fused form; a role that the layer lacks is not there.

    qkv [(heads + 2 kv_heads) D, H], out [H, heads D], gate_up [2 F, H] (gate first), down [H, F], each with
    `<role>_bias` where the family has one; q_norm, k_norm; attention_norm, attention_post_norm, mlp_norm,
    mlp_post_norm [H]; in an expert layer router [E, H], expert_gate_up [E, 2 F, H], expert_down [E, H, F]
    instead of gate_up and down.
    """
    f, hidden, wide = family, family.hidden, layer.intermediate
    q, kv = f.heads * f.head_dim, f.kv_heads * f.head_dim
    qkv = ("qkv_proj",) if f.fused else ("q_proj", "k_proj", "v_proj")
    gate_up = ("gate_up_proj",) if f.fused else ("gate_proj", "up_proj")
    weights: dict[str, Weight] = {}

    def add(role: str, names: tuple[str, ...], rows: int, columns: int, bias: bool) -> None:
        weights[role] = Weight(tuple(f"{n}.weight" for n in names), (rows, columns))
        if bias:
            weights[f"{role}_bias"] = Weight(tuple(f"{n}.bias" for n in names), (rows,))

    add("qkv", tuple(f"self_attn.{n}" for n in qkv), q + 2 * kv, hidden, f.qkv_bias)
    add("out", ("self_attn.o_proj",), hidden, q, f.out_bias)
    if layer.experts:
        experts = layer.experts
        weights["router"] = Weight(("mlp.gate.weight",), (experts, hidden))
        weights["expert_gate_up"] = Weight(("mlp.experts.gate_up_proj",), (experts, 2 * wide, hidden))
        weights["expert_down"] = Weight(("mlp.experts.down_proj",), (experts, hidden, wide))
    else:
        add("gate_up", tuple(f"mlp.{n}" for n in gate_up), 2 * wide, hidden, f.mlp_bias)
        add("down", ("mlp.down_proj",), hidden, wide, f.mlp_bias)
    if f.qk_norm:
        whole = f.qk_norm == "all"
        weights["q_norm"] = Weight(("self_attn.q_norm.weight",), (q if whole else f.head_dim,))
        weights["k_norm"] = Weight(("self_attn.k_norm.weight",), (kv if whole else f.head_dim,))
    for norms, suffix in ((f.pre_norms, "norm"), (f.post_norms, "post_norm")):
        for part, name in zip(("attention", "mlp"), norms or (), strict=False):
            weights[f"{part}_{suffix}"] = Weight((f"{name}.weight",), (hidden,))
    return weights


def layer_parameters(family: Family, layer: LayerSpec) -> int:
    return sum(prod(weight.shape) for weight in layer_weights(family, layer).values())


def attention_pairs(family: Family, position_ids: Tensor) -> int:
    """Pairs of a token and one it attends to (itself too), over all layers, of tokens at these depths [T]."""
    seen = position_ids + 1
    counts = {w: int((seen if w is None else seen.clamp(max=w)).sum()) for w in _windows(family)}
    return sum(counts[layer.window] for layer in family.layers)


def model_flops(
    family: Family, tokens: float, pairs: float, rows: float, *, backward: bool = True, frozen: bool = False
) -> float:
    """Useful floating-point operations of a pass over packed tokens; nothing recomputed is counted.

    2 a weight and token and pass (of experts, those a token is routed to), 4 D a pair, query head and pass.
    A forward is one pass, with its backward three (gradient of the input, gradient of the weights); over a
    frozen base (adapters) its weights see two, and adapters are not counted.

    Args:
        tokens: packed tokens. pairs: as `attention_pairs` counts them, over all layers. rows: tokens with a
            loss, which alone pass the head.
    """
    passes = (2 if frozen else 3) if backward else 1
    per_token = 0.0
    for layer in family.layers:
        for role, weight in layer_weights(family, layer).items():
            if len(weight.shape) > 1:
                share = family.experts_per_token / layer.experts if role.startswith("expert_") else 1.0
                per_token += share * prod(weight.shape)
    linear = 2 * passes * (per_token * tokens + family.hidden * family.vocabulary * rows)
    return linear + (3 if backward else 1) * 4 * family.heads * family.head_dim * pairs


def causal_lm(model: nn.Module) -> Any:
    """The transformers causal LM itself: what DDP or PEFT has wrapped, else the model."""
    model = model.module if isinstance(model, DistributedDataParallel) else model
    unwrap: Any = getattr(model, "get_base_model", None)
    return unwrap() if unwrap else model


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, in order."""
    return list(causal_lm(model).get_decoder().layers)


def final_norm(model: nn.Module) -> nn.Module:
    return causal_lm(model).get_decoder().norm


def head_params(model: nn.Module, family: Family | None = None) -> HeadParams:
    """The LM head of a model; `family`: where it is known already."""
    causal = causal_lm(model)
    family = family or family_of(causal.config)
    head = causal.get_output_embeddings()
    return HeadParams(head.weight, head.bias, family.logits_softcap, family.logits_scale)


def rope_frequencies(model: nn.Module, layer: LayerSpec) -> tuple[Tensor, float] | None:
    """(inverse frequencies [rotary_dim / 2] fp32, factor on cos and sin) of a layer; None without RoPE.

    cos(p * frequencies) * factor and sin likewise, made in fp32 and rounded to the activations' dtype.
    """
    if layer.rope is None:
        return None
    rotary = causal_lm(model).get_decoder().rotary_emb
    return getattr(rotary, f"{layer.rope}inv_freq"), getattr(rotary, f"{layer.rope}attention_scaling")


def family_of(config: Any) -> Family:
    """The family of a Hugging Face config.

    ValueError for architectures that are not known and for settings that a token tree cannot go through:
    recurrent layers, RoPE that depends on the sequence's length, softcaps of attention scores.
    """
    name = getattr(config, "model_type", type(config).__name__)
    kinds = set(getattr(config, "layer_types", None) or ())
    if bad := sorted(kinds - set(LAYER_KINDS)):
        raise ValueError(
            f"{name}: layers of kind {', '.join(bad)} carry state from token to token and cannot branch in a "
            "token tree"
        )
    if name in REFUSED:
        raise ValueError(f"model_type {name!r} is not supported: {REFUSED[name]}")
    if name not in READERS:
        raise ValueError(
            f"model_type {name!r} is not supported: known: {', '.join(READERS)}. To add a family, describe "
            "it in pact_fast/tree/families.py and add a tiny config of it to tests/tree/test_families.py"
        )
    _check_rope(name, config)
    return READERS[name](config)


def check_model(model: Any) -> Family:
    """The family of a causal LM (not wrapped); ValueError if it has no LM head or attention sinks."""
    kind = type(model).__name__
    if any(hasattr(m, "sinks") for m in model.modules()):
        raise ValueError(f"{kind}: attention sinks are not supported by tree attention")
    family = family_of(getattr(model, "config", None))
    if model.get_output_embeddings() is None:
        raise ValueError(f"{kind} has no LM head; load it with AutoModelForCausalLM")
    return family


def _sizes(c: Any) -> dict[str, Any]:
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return {
        "name": c.model_type,
        "hidden": c.hidden_size,
        "vocabulary": c.vocab_size,
        "heads": c.num_attention_heads,
        "kv_heads": c.num_key_value_heads,
        "head_dim": head_dim,
        "rotary_dim": head_dim,
        "attention_scale": head_dim**-0.5,
        "tied": bool(c.tie_word_embeddings),
        "norm_eps": c.rms_norm_eps,
        "attention_dropout": getattr(c, "attention_dropout", None) or 0.0,
    } | ({"activation": c.hidden_act} if hasattr(c, "hidden_act") else {})


def _layers(
    c: Any, window: Callable[[int], int | None] = lambda i: None, **each: Any
) -> tuple[LayerSpec, ...]:
    default: dict[str, Callable[[int], Any]] = {
        "rope": lambda i: "",
        "intermediate": lambda i: c.intermediate_size,
    }
    fields = default | each
    return tuple(
        LayerSpec(index=i, window=window(i), **{name: get(i) for name, get in fields.items()})
        for i in range(c.num_hidden_layers)
    )


def _by_kind(c: Any) -> Callable[[int], int | None]:
    kinds = getattr(c, "layer_types", None)
    return lambda i: c.sliding_window if kinds and kinds[i] == "sliding_attention" else None


def _everywhere(c: Any) -> Callable[[int], int | None]:
    return lambda i: getattr(c, "sliding_window", None)


def _llama(c: Any) -> Family:
    bias = c.attention_bias
    return Family(**_sizes(c), layers=_layers(c), qkv_bias=bias, out_bias=bias, mlp_bias=c.mlp_bias)


def _qwen2(c: Any) -> Family:
    return Family(**_sizes(c), layers=_layers(c, _by_kind(c)), qkv_bias=True)


def _qwen3(c: Any) -> Family:
    bias = c.attention_bias
    return Family(**_sizes(c), layers=_layers(c, _by_kind(c)), qkv_bias=bias, out_bias=bias, qk_norm="head")


def _qwen3_moe(c: Any) -> Family:
    bias = c.attention_bias

    def experts(i: int) -> int:
        sparse = i not in c.mlp_only_layers and (i + 1) % c.decoder_sparse_step == 0
        return c.num_experts if sparse else 0

    def wide(i: int) -> int:
        return c.moe_intermediate_size if experts(i) else c.intermediate_size

    return Family(
        **_sizes(c),
        layers=_layers(c, _everywhere(c), intermediate=wide, experts=experts),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="head",
        experts_per_token=c.num_experts_per_tok,
        norm_topk=c.norm_topk_prob,
        router_coef=c.router_aux_loss_coef if c.output_router_logits else 0.0,
    )


def _mistral(c: Any) -> Family:
    return Family(**_sizes(c), layers=_layers(c, _everywhere(c)))


def _gemma3(c: Any) -> Family:
    if c.attn_logit_softcapping is not None:
        raise ValueError(
            f"{c.model_type}: attn_logit_softcapping = {c.attn_logit_softcapping}: tree attention has no "
            "softcap (and transformers' own Gemma 3 ignores it); set it to None"
        )
    if c.use_bidirectional_attention:
        raise ValueError(
            f"{c.model_type}: use_bidirectional_attention = {c.use_bidirectional_attention}: a token tree is "
            "causal; set it to False"
        )
    sizes = _sizes(c) | {"attention_scale": c.query_pre_attn_scalar**-0.5, "activation": c.hidden_activation}
    return Family(
        **sizes,
        layers=_layers(c, _by_kind(c), rope=lambda i: f"{c.layer_types[i]}_"),
        qkv_bias=c.attention_bias,
        out_bias=c.attention_bias,
        qk_norm="head",
        norm_offset=1.0,
        norm_in_fp32=True,
        pre_norms=("input_layernorm", "pre_feedforward_layernorm"),
        post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        embedding_scale=c.hidden_size**0.5,
        rounded_embedding_scale=True,
        logits_softcap=c.final_logit_softcapping,
    )


def _olmo2(c: Any) -> Family:
    return Family(
        **_sizes(c),
        layers=_layers(c),
        qkv_bias=c.attention_bias,
        out_bias=c.attention_bias,
        qk_norm="all",
        norm_in_fp32=True,
        pre_norms=None,
        post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    )


def _phi3(c: Any) -> Family:
    sizes = _sizes(c)
    rotary = int(sizes["head_dim"] * c.rope_parameters.get("partial_rotary_factor", 1.0))
    return Family(**sizes | {"rotary_dim": rotary}, layers=_layers(c, _everywhere(c)), fused=True)


def _granite(c: Any) -> Family:
    return Family(
        **_sizes(c) | {"attention_scale": c.attention_multiplier},
        layers=_layers(c),
        qkv_bias=c.attention_bias,
        out_bias=c.attention_bias,
        mlp_bias=c.mlp_bias,
        embedding_scale=c.embedding_multiplier,
        residual_scale=c.residual_multiplier,
        logits_scale=1.0 / c.logits_scaling,
    )


def _smollm3(c: Any) -> Family:
    by_kind = _by_kind(c)
    return Family(
        **_sizes(c),
        layers=_layers(
            c,
            lambda i: by_kind(i) if c.use_sliding_window else None,
            rope=lambda i: "" if c.no_rope_layers[i] else None,
        ),
        qkv_bias=c.attention_bias,
        out_bias=c.attention_bias,
        mlp_bias=c.mlp_bias,
    )


READERS: dict[str, Callable[[Any], Family]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "mistral": _mistral,
    "gemma3_text": _gemma3,
    "olmo2": _olmo2,
    "phi3": _phi3,
    "granite": _granite,
    "smollm3": _smollm3,
}
REFUSED = {
    "gemma3": "it sees images too; load its text part with Gemma3ForCausalLM (model_type gemma3_text)",
    "gpt_oss": "attention sinks are not supported by tree attention",
    "gemma2": "it caps attention scores, which tree attention does not",
}


def _check_rope(name: str, config: Any) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    for part in rope.values() if rope and all(isinstance(v, dict) for v in rope.values()) else [rope]:
        if (kind := part.get("rope_type", "default")) in ("dynamic", "longrope"):
            raise ValueError(
                f"{name}: rope_type {kind!r} depends on the sequence's length, in which branches of a tree "
                "differ"
            )


def _finish(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _windows(family: Family) -> set[int | None]:
    return {layer.window for layer in family.layers}
