"""Random tries and tiny Hugging Face models, shared by the tests of packing, attention and scoring."""

import random

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}


def random_sequences(seed: int, count: int = 6, alphabet: int = 5, longest: int = 20) -> list[list[int]]:
    """Sequences that branch off one another anywhere, with duplicates, prefixes of others, several roots."""
    draw = random.Random(seed)
    sequences: list[list[int]] = []
    for _ in range(count):
        stem = draw.choice(sequences) if sequences and draw.random() < 0.8 else []
        stem = stem[: draw.randint(0, len(stem))]
        sequences.append(
            stem + [draw.randrange(alphabet) for _ in range(draw.randint(0 if stem else 1, longest))]
        )
    return sequences


def pact_sequences(seed: int, prompt=30, trace=20, rollout=15, group=4, vocab=60) -> list[list[int]]:
    """The tree of a PACT step: the trace under x, and each rollout under x and under c(x, h)."""
    draw = random.Random(seed)

    def tokens(n):
        return [draw.randrange(1, vocab) for _ in range(n)]

    x, h, shown = tokens(prompt), tokens(trace), tokens(trace)
    rollouts = [tokens(rollout + draw.randint(-3, 3)) for _ in range(group)]
    return [x + h, *(x + y for y in rollouts), *(x + shown + y for y in rollouts)]


def tiny_model(family: str, *, tied: bool = False, seed: int = 0, **overrides):
    """A random fp32 model on the eager attention; weights large enough that a wrong mask shows."""
    torch.manual_seed(seed)
    make = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }
    config, cls = make[family]
    settings = {**SHAPE, "tie_word_embeddings": tied, "initializer_range": 0.3, **overrides}
    model = cls(config(**settings, attn_implementation="sdpa"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight") or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def one_by_one(model, sequences):
    """Log-probs of every sequence, each alone: the definition."""
    out = []
    for sequence in sequences:
        ids = torch.tensor(sequence)
        logprobs = model(ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        out.append(logprobs.gather(1, ids[1:, None])[:, 0])
    return out


def weighted_sum(logprobs):
    """A scalar in which every log-prob has its own weight, so that no gradient can hide."""
    flat = torch.cat(logprobs)
    return (flat * torch.linspace(0.2, 1.7, flat.numel())).sum()


def assert_gradients_equal(model, loss, expected, floor=1e-7):
    names, parameters = zip(*model.named_parameters(), strict=True)
    got = torch.autograd.grad(loss, parameters, allow_unused=True)
    want = torch.autograd.grad(expected, parameters, allow_unused=True)
    for name, a, b in zip(names, got, want, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + floor, name
