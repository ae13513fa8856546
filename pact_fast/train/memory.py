"""Memory and communication of a run on N GPUs from the model's shapes: the accounting of docs/scaling.md.

Full training, weights computed in bf16, fp32 master weights, gradients and AdamW states, every decoder layer
checkpointed ("full"), FSDP2 a layer at a time (distributed.py). Bytes per GPU:

    states       16 P / N                         master 4, gradient 4, AdamW 4 + 4
    gathered     2 (2 P_layer + P_root)           bf16: the layer in use, the next, and embedding, norm, head
    checkpoints  2 T H L                          the input of every layer
    attention    (2 D + 4) T Hq L                 out and lse of every layer, with keep_attention
    one layer    2 T (7 H + 4 (Hq + Hkv) D + 4 F) kept while one layer is recomputed and sent backward
    loss         6 chunk V + 4 V H                a chunk of logits with its fp32 row work; dW of the head

T packed tokens on this GPU, H hidden, L layers, F intermediate, V vocabulary, Hq and Hkv heads of size D.
The same on one GPU under torchrun: a layer's fp32 shard, there the whole layer, becomes bf16 when it is used.
"""

from __future__ import annotations

import os

import torch
from transformers import Qwen3Config

from pact_fast.tree.families import Family, family_of, layer_parameters

GIB = 2**30
LOSS_CHUNK = 4096  # rows of logits at a time (ops)


def _qwen3(hidden: int, layers: int, intermediate: int, heads: int, *, tied: bool) -> Family:
    return family_of(
        Qwen3Config(
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=intermediate,
            num_attention_heads=heads,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
            tie_word_embeddings=tied,
        )
    )


QWEN3 = {
    "1.7B": _qwen3(2048, 28, 6144, 16, tied=True),
    "4B": _qwen3(2560, 36, 9728, 32, tied=True),
    "8B": _qwen3(4096, 36, 12288, 32, tied=False),
    "32B": _qwen3(5120, 64, 25600, 64, tied=False),
}


def state_bytes(family: Family, gpus: int) -> float:
    """Master weights, gradients and AdamW states of one GPU."""
    return 16 * family.parameters / gpus


def memory(family: Family, gpus: int, tokens: int, checkpointing: str = "full") -> dict[str, float]:
    """Bytes per GPU during an update with `tokens` packed tokens in one forward, by part and in "total".

    checkpointing: "full"; "keep_attention"; "none", where every layer keeps what "one layer" counts.
    """
    if gpus < 1 or tokens < 1:
        raise ValueError(f"gpus={gpus}, tokens={tokens}: both must be at least 1")
    f = family
    gathered = 2 * (2 * max(layer_parameters(f, layer) for layer in f.layers) + f.root_parameters)
    # A token passes experts_per_token MLPs of an expert layer.
    wide = max(layer.intermediate * (f.experts_per_token if layer.experts else 1) for layer in f.layers)
    width = 7 * f.hidden + 4 * (f.heads + f.kv_heads) * f.head_dim + 4 * wide
    parts = {
        "states": state_bytes(f, gpus),
        "gathered": gathered,
        "checkpoints": 2 * tokens * f.hidden * len(f.layers),
        "one layer": 2 * tokens * width,
        "loss": 6 * LOSS_CHUNK * f.vocabulary + 4 * f.vocabulary * f.hidden,
    }
    layers = len(f.layers)
    if checkpointing == "keep_attention":
        parts["attention"] = (2 * f.head_dim + 4) * tokens * f.heads * layers
    elif checkpointing == "none":
        parts |= {"checkpoints": 0.0, "one layer": layers * parts["one layer"]}
    return parts | {"total": sum(parts.values())}


def choose_checkpointing(family: Family, gpus: int, tokens: int, capacity: float) -> str:
    """The way that recomputes least and fits `capacity` bytes a GPU; "full" where none does."""
    for way in ("none", "keep_attention"):
        if memory(family, gpus, tokens, way)["total"] <= capacity:
            return way
    return "full"


def device_capacity(device: torch.device) -> float:
    """Bytes that an update may take: nine tenths of a GPU, half of the host's memory."""
    if device.type == "cuda":
        return 0.9 * torch.cuda.get_device_properties(device).total_memory
    return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def traffic(family: Family, gpus: int, packs: int) -> dict[str, float]:
    """Bytes a GPU receives in a step of one update with `packs` packs a GPU, by part.

    forward and backward gather the layers anew for every pack (bf16); the root is gathered once a pack;
    gradients are reduced once (fp32); rollouts gather all weights once.
    """
    share = (gpus - 1) / gpus
    layers = family.parameters - family.root_parameters
    return {
        "gather weights": share * 2 * packs * (2 * layers + family.root_parameters),
        "reduce gradients": share * 4 * family.parameters,
        "gather for rollouts": share * 2 * family.parameters,
    }
