"""Every model family: a tree pass equals running its sequences alone, and its description is the model's."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SmolLM3Config,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from pact_fast.config import ObjectiveConfig
from pact_fast.train.batch import pack_losses
from pact_fast.train.samples import Sample
from pact_fast.tree.families import (
    READERS,
    attention_pairs,
    check_model,
    decoder_layers,
    family_of,
    final_norm,
    head_params,
    layer_weights,
    model_flops,
    rope_frequencies,
)
from pact_fast.tree.packing import pack_tree
from pact_fast.tree.policy import Policy
from pact_fast.tree.router import balance_loss
from pact_fast.tree.scoring import sequence_logprobs
from tests.helpers.trees import (
    assert_gradients_equal,
    one_by_one,
    pact_sequences,
    random_sequences,
    weighted_sum,
)

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = {**SHAPE, "head_dim": 16}  # heads x head_dim is not the hidden size
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GRANITE = {
    "embedding_multiplier": 2.5,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.2,
    "logits_scaling": 3.0,
}
GEMMA = {
    "query_pre_attn_scalar": 24,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
}
# name -> config; every setting that a family's reader reads is at work in one of them.
CONFIGS = {
    "llama": LlamaConfig(**WIDE, attention_bias=True, mlp_bias=True),
    "llama-rope": LlamaConfig(
        **SHAPE,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen2": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": Qwen3Config(**WIDE, attention_bias=True, tie_word_embeddings=True),
    "qwen3_moe": Qwen3MoeConfig(**WIDE, **EXPERTS, norm_topk_prob=True),
    "qwen3_moe-mixed": Qwen3MoeConfig(
        **WIDE, **EXPERTS, mlp_only_layers=[0], use_sliding_window=True, sliding_window=9
    ),
    "mistral": MistralConfig(**WIDE, sliding_window=7),
    "mistral-full": MistralConfig(**SHAPE, sliding_window=None),
    "gemma3_text": Gemma3TextConfig(**WIDE, **GEMMA, attention_bias=True, final_logit_softcapping=4.0),
    "gemma3_text-linear": Gemma3TextConfig(
        **WIDE,
        **GEMMA,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "olmo2": Olmo2Config(**SHAPE, attention_bias=True),
    "phi3": Phi3Config(**SHAPE, sliding_window=8),
    "phi3-partial": Phi3Config(**SHAPE, partial_rotary_factor=0.5),
    "granite": GraniteConfig(**SHAPE, **GRANITE, attention_bias=True, mlp_bias=True),
    "smollm3": SmolLM3Config(**SHAPE, no_rope_layers=[1, 0], attention_bias=True),
    "smollm3-sliding": SmolLM3Config(
        **SHAPE, no_rope_layers=[1, 0], use_sliding_window=True, sliding_window=5
    ),
}
# The norm of a gradient that is zero but for rounding (a key's bias without RoPE); others are far above.
FLOOR = 3e-5
WINDOWED = [name for name, c in CONFIGS.items() if any(layer.window for layer in family_of(c).layers)]


def tiny(config):
    torch.manual_seed(0)
    config = deepcopy(CONFIGS[config] if isinstance(config, str) else config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases: off their start, so that a wrong use shows
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def sequences_of(seed):
    branching = [s for s in random_sequences(seed, count=4, longest=12) if len(s) > 1]
    return branching + pact_sequences(seed, prompt=14, trace=10, rollout=8, group=2)


def test_every_family_has_a_config_here():
    assert {name.split("-")[0] for name in CONFIGS} == set(READERS)


@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_and_every_gradient_equal_one_by_one(name):
    model = tiny(name)
    sequences = sequences_of(1)
    want = one_by_one(model, sequences)
    got = sequence_logprobs(model, sequences)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    assert_gradients_equal(model, weighted_sum(got), weighted_sum(want), FLOOR)


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma3_text", "phi3", "granite"])
def test_checkpointed_gradients_equal_one_by_one(name):
    model = tiny(name)
    sequences = sequences_of(2)
    got = sequence_logprobs(Policy(model, gradient_checkpointing=True), sequences)
    assert_gradients_equal(model, weighted_sum(got), weighted_sum(one_by_one(model, sequences)), FLOOR)


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_count_depth_in_one_pass_and_in_chunks(name):
    model = tiny(name)
    sequences = pact_sequences(3, prompt=14, trace=10, rollout=8, group=2)
    policy = Policy(model)
    with torch.no_grad():
        want = one_by_one(model, sequences)
        for a, b in zip(sequence_logprobs(policy, sequences, token_budget=23), want, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    # The windows are at work: with wider ones the log-probs are others.
    model.config.sliding_window = 1000
    for layer in decoder_layers(model):
        if getattr(layer.self_attn, "sliding_window", None):
            layer.self_attn.sliding_window = 1000
    with torch.no_grad():
        other = one_by_one(model, sequences)
    assert max(float((a - b).abs().max()) for a, b in zip(other, want, strict=True)) > 1e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_description_names_every_parameter_and_what_the_layers_call_attention_with(name, monkeypatch):
    model = tiny(name)
    family = check_model(model)
    assert family.parameters == sum(p.numel() for p in model.parameters())
    for spec, layer in zip(family.layers, decoder_layers(model), strict=True):
        have = dict(layer.named_parameters())
        weights = layer_weights(family, spec)
        assert sorted(s for w in weights.values() for s in w.sources) == sorted(have)
        for weight in weights.values():
            assert torch.cat([have[s] for s in weight.sources]).shape == weight.shape
    calls = []

    def attention(q, k, v, end, *, scale, window, plan):
        calls.append((window, scale))
        return q

    monkeypatch.setattr("pact_fast.tree.policy.tree_attention", attention)
    Policy(model).hidden(pack_tree([[3, 4, 5]]))
    assert calls == [(spec.window, family.attention_scale) for spec in family.layers]


def described_logits(model, ids):
    """Logits [T, V] of one sequence, from the family's description and the fused weights alone."""
    family = family_of(model.config)
    T, D = len(ids), family.head_dim

    def norm(x, weight):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + family.norm_eps)
        return x * scale * (weight + family.norm_offset)

    def rotated(x, frequencies, factor):  # x [T, heads, D]
        angle = torch.arange(T)[:, None] * frequencies
        cos, sin = (f(torch.cat([angle, angle], -1))[:, None] * factor for f in (torch.cos, torch.sin))
        part, rest = x.split([family.rotary_dim, D - family.rotary_dim], -1)
        one, two = part.chunk(2, -1)
        return torch.cat([part * cos + torch.cat([-two, one], -1) * sin, rest], -1)

    act = {"silu": F.silu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}[family.activation]
    x = model.get_input_embeddings().weight[ids] * family.embedding_scale
    for spec, layer in zip(family.layers, decoder_layers(model), strict=True):
        have = dict(layer.named_parameters())
        w = {role: torch.cat([have[s] for s in g.sources]) for role, g in layer_weights(family, spec).items()}
        h = norm(x, w["attention_norm"]) if "attention_norm" in w else x
        qkv = F.linear(h, w["qkv"], w.get("qkv_bias"))
        q, k, v = qkv.split([family.heads * D, family.kv_heads * D, family.kv_heads * D], -1)
        if family.qk_norm == "all":
            q, k = norm(q, w["q_norm"]), norm(k, w["k_norm"])
        q, k, v = (t.view(T, -1, D) for t in (q, k, v))
        if family.qk_norm == "head":
            q, k = norm(q, w["q_norm"]), norm(k, w["k_norm"])
        if (rope := rope_frequencies(model, spec)) is not None:
            q, k = rotated(q, *rope), rotated(k, *rope)
        k, v = (t.repeat_interleave(family.heads // family.kv_heads, 1) for t in (k, v))
        back = torch.arange(T)[:, None] - torch.arange(T)
        seen = (back >= 0) & (back < (spec.window or T))
        scores = torch.einsum("qhd,khd->hqk", q, k) * family.attention_scale
        h = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
        h = F.linear(h.flatten(1), w["out"], w.get("out_bias"))
        x = x + family.residual_scale * (
            norm(h, w["attention_post_norm"]) if "attention_post_norm" in w else h
        )
        h = norm(x, w["mlp_norm"]) if "mlp_norm" in w else x
        if spec.experts:
            p, chosen = F.linear(h, w["router"]).softmax(-1).topk(family.experts_per_token, -1)
            p = p / p.sum(-1, keepdim=True) if family.norm_topk else p
            gate, up = torch.einsum("th,tkfh->tkf", h, w["expert_gate_up"][chosen]).chunk(2, -1)
            h = torch.einsum("tk,tkf,tkhf->th", p, act(gate) * up, w["expert_down"][chosen])
        else:
            gate, up = F.linear(h, w["gate_up"], w.get("gate_up_bias")).chunk(2, -1)
            h = F.linear(act(gate) * up, w["down"], w.get("down_bias"))
        x = x + family.residual_scale * (norm(h, w["mlp_post_norm"]) if "mlp_post_norm" in w else h)
    return head_params(model).logits(norm(x, final_norm(model).weight))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_description_alone_gives_the_models_logits(name):
    model = tiny(name)
    ids = torch.arange(40) * 7 % 61
    torch.testing.assert_close(described_logits(model, ids), model(ids[None]).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "gemma3_text", "olmo2", "phi3", "smollm3"])
def test_flops_are_those_that_pytorch_counts(name):
    model = tiny(name)
    # Eager: of the fused attention on a CPU PyTorch counts twice the products that there are.
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")  # grouped products it does not count at all
    tokens = 40
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(5, 5 + tokens)[None], use_cache=False).logits.sum().backward()
    family = family_of(model.config)
    pairs = len(family.layers) * tokens * tokens  # PyTorch counts masked pairs, too
    # transformers 5.17 makes the angles of RoPE by a matrix product, which counts too.
    assert model_flops(family, tokens, pairs, tokens) == pytest.approx(counter.get_total_flops(), rel=1e-3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(5, 5 + tokens)[None], use_cache=False)
    forward = model_flops(family, tokens, pairs, tokens, backward=False)
    assert forward == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert model_flops(family, tokens, 0, 0, frozen=True) == pytest.approx(
        model_flops(family, tokens, 0, 0) * 2 / 3
    )


def test_pairs_are_those_that_each_layer_sees():
    pack = pack_tree(pact_sequences(4))
    family = family_of(CONFIGS["gemma3_text"])
    seen = sum(
        sum(min(int(p) + 1, spec.window or 10**9) for p in pack.position_ids) for spec in family.layers
    )
    assert attention_pairs(family, pack.position_ids) == seen


def test_flops_of_qwen3_are_weights_and_pairs():
    family = family_of(CONFIGS["qwen3"])
    weights = sum(p.numel() for p in tiny("qwen3").model.layers.parameters() if p.dim() == 2)
    assert model_flops(family, 7, 11, 3) == 6 * (weights * 7 + 32 * 61 * 3) + 12 * 4 * 16 * 11


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GPT2Config(), "'gpt2' is not supported: known: llama, .*pact_fast/tree/families.py"),
        (Gemma2Config(), "'gemma2' is not supported: it caps attention scores"),
        (GptOssConfig(), "'gpt_oss' is not supported: attention sinks"),
        (Gemma3Config(), "'gemma3' is not supported: .*Gemma3ForCausalLM"),
        (Qwen3NextConfig(), "linear_attention carry state"),
        (Gemma3TextConfig(attn_logit_softcapping=50.0), "attn_logit_softcapping = 50.0"),
        (Gemma3TextConfig(use_bidirectional_attention=True), "use_bidirectional_attention"),
        (
            Gemma3TextConfig(
                rope_parameters={
                    "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            ),
            "'dynamic' depends on the sequence's length",
        ),
        (
            Phi3Config(
                **SHAPE,
                rope_parameters={
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                },
            ),
            "'longrope' depends on the sequence's length",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_a_tree_cannot_go_through_is_refused_by_name(config, words):
    with pytest.raises(ValueError, match=words):
        family_of(config)


MOE = Qwen3MoeConfig(**WIDE, **EXPERTS, output_router_logits=True, router_aux_loss_coef=0.3)


def distinct_router_loss(model, sequences):
    """transformers' own auxiliary loss over every token of the tree once, from sequences run alone."""
    seen, picked = set(), [[] for _ in decoder_layers(model)]
    for sequence in sequences:
        logits = model(torch.tensor([sequence]), output_router_logits=True).router_logits
        fresh = [i for i in range(len(sequence)) if tuple(sequence[: i + 1]) not in seen]
        seen |= {tuple(sequence[: i + 1]) for i in fresh}
        for layer, values in zip(picked, logits, strict=True):
            layer.append(values[fresh])
    whole = tuple(torch.cat(layer) for layer in picked)
    return load_balancing_loss_func(whole, MOE.num_experts, MOE.num_experts_per_tok)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_router_loss_counts_every_token_of_the_tree_once(checkpointing):
    model = tiny(MOE)
    sequences = pact_sequences(5)
    pack = pack_tree(sequences)
    _, load = Policy(model, gradient_checkpointing=checkpointing).hidden_and_load(pack)
    assert load.routings == 2 * pack.num_tokens
    loss = balance_loss(load.probs, load.counts, load.routings)
    want = distinct_router_loss(model, sequences)
    torch.testing.assert_close(loss, want)
    got = torch.autograd.grad(loss, list(model.model.layers.parameters()), allow_unused=True)
    expected = torch.autograd.grad(want, list(model.model.layers.parameters()), allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


def samples_of(sequences, start):
    """The first sequence as a trace, the others as rollouts, every token after `start` with a loss."""
    samples = []
    for s, ids in enumerate(map(torch.tensor, sequences)):
        live = (torch.arange(len(ids)) >= start).float()
        none = torch.zeros(len(ids))
        weight = live * torch.linspace(0.01, 0.03, len(ids))
        rollout = {"old_logprobs": None, "engine_logprobs": none} if s else {}
        advantages = torch.full((len(ids),), 0.5 + s)
        samples.append(Sample("r", ids, weight if s else none, advantages, none if s else weight, **rollout))
    return samples


@pytest.mark.parametrize("config", ["granite", "gemma3_text", MOE], ids=["scale", "softcap", "router"])
@pytest.mark.parametrize(("budget", "packing"), [(10_000, "tree"), (60, "tree"), (60, "none")])
def test_the_trainers_loss_and_gradients_equal_one_by_one(config, budget, packing):
    """At ratio 1 the gradient of the policy term is that of -sum weight advantage logprob."""
    model = tiny(config)
    sequences = pact_sequences(6, prompt=12, trace=8, rollout=10, group=2)
    samples = samples_of(sequences, 12)
    temperature = 0.7
    want = torch.zeros(())
    for sample in samples:
        logits = model(sample.ids[None]).logits[0, :-1] / (temperature if sample.is_policy else 1.0)
        logprobs = logits.log_softmax(-1).gather(1, sample.ids[1:, None])[:, 0]
        want = want - ((sample.policy_weight * sample.advantages + sample.sft_weight)[1:] * logprobs).sum()
    router, packs = 0.0, 0
    how = {"token_budget": budget, "packing": packing, "temperature": temperature}
    for pack in pack_losses(Policy(model), samples, ObjectiveConfig(), **how):
        pack.loss.backward()  # before the next one, as a streamed tree needs it
        router += 0.0 if pack.router_loss is None else float(pack.router_loss.detach())
        packs += 1
    assert (packs > 1) == (budget == 60)
    if config is MOE:
        aux = distinct_router_loss(model, sequences)
        assert router == pytest.approx(0.3 * float(aux.detach()), rel=1e-4)
        want = want + 0.3 * aux
    else:
        assert router == 0.0
    names, parameters = zip(*model.named_parameters(), strict=True)
    wanted = torch.autograd.grad(want, parameters, allow_unused=True)
    for name, parameter, b in zip(names, parameters, wanted, strict=True):
        assert (parameter.grad - b).norm() <= 1e-4 * b.norm() + FLOOR, name


def test_what_needs_more_than_the_family_has_is_refused_by_name():
    with pytest.raises(ValueError, match=r"kernels=liger: fused layers of 'granite'"):
        Policy(tiny("granite"), kernels="liger")
    with pytest.raises(ValueError, match="olmo2 has no expert layers"):
        Policy(tiny("olmo2")).hidden_and_load(pack_tree([[1, 2]]))
    with pytest.raises(ValueError, match=r"granite: logits_scale .* beside logits_softcap"):
        replace(family_of(CONFIGS["granite"]), logits_softcap=3.0)
