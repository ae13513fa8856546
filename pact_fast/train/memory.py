"""Memory and communication of a run on N GPUs from the model's shapes: the accounting of docs/scaling.md.

Full training, weights computed in bf16, fp32 master weights, gradients and AdamW states, every decoder layer
checkpointed, FSDP2 a layer at a time (distributed.py). Bytes per GPU:

    states       16 P / N                         master 4, gradient 4, AdamW 4 + 4
    gathered     2 (2 P_layer + P_root)           bf16: the layer in use, the next, and embedding, norm, head
    checkpoints  2 T H L                          the input of every layer
    one layer    2 T (7 H + 4 (Hq + Hkv) D + 4 F) kept while one layer is recomputed and sent backward
    loss         6 chunk V + 4 V H                a chunk of logits with its fp32 row work; dW of the head

T packed tokens on this GPU, H hidden, L layers, F intermediate, V vocabulary, Hq and Hkv heads of size D.
The same on one GPU under torchrun: a layer's fp32 shard, there the whole layer, becomes bf16 when it is used.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
LOSS_CHUNK = 4096  # rows of logits at a time (ops)


@dataclass(frozen=True)
class Shape:
    """A Qwen3-shaped decoder."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @property
    def layer_parameters(self) -> int:
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads) + 2 * self.head_dim
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def root_parameters(self) -> int:
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.root_parameters


QWEN3 = {
    "1.7B": Shape(2048, 28, 6144, 16, 8, 128, 151936, True),
    "4B": Shape(2560, 36, 9728, 32, 8, 128, 151936, True),
    "8B": Shape(4096, 36, 12288, 32, 8, 128, 151936, False),
    "32B": Shape(5120, 64, 25600, 64, 8, 128, 151936, False),
}


def state_bytes(shape: Shape, gpus: int) -> float:
    """Master weights, gradients and AdamW states of one GPU."""
    return 16 * shape.parameters / gpus


def memory(shape: Shape, gpus: int, tokens: int) -> dict[str, float]:
    """Bytes per GPU during an update with `tokens` packed tokens in one forward, by part and in "total"."""
    if gpus < 1 or tokens < 1:
        raise ValueError(f"gpus={gpus}, tokens={tokens}: both must be at least 1")
    s = shape
    gathered = 2 * (2 * s.layer_parameters + s.root_parameters)
    width = 7 * s.hidden + 4 * (s.heads + s.kv_heads) * s.head_dim + 4 * s.intermediate
    parts = {
        "states": state_bytes(s, gpus),
        "gathered": gathered,
        "checkpoints": 2 * tokens * s.hidden * s.layers,
        "one layer": 2 * tokens * width,
        "loss": 6 * LOSS_CHUNK * s.vocabulary + 4 * s.vocabulary * s.hidden,
    }
    return parts | {"total": sum(parts.values())}


def traffic(shape: Shape, gpus: int, packs: int) -> dict[str, float]:
    """Bytes a GPU receives in a step of one update with `packs` packs a GPU, by part.

    forward and backward gather the layers anew for every pack (bf16); the root is gathered once a pack;
    gradients are reduced once (fp32); rollouts gather all weights once.
    """
    share = (gpus - 1) / gpus
    layers = shape.layers * shape.layer_parameters
    return {
        "gather weights": share * 2 * packs * (2 * layers + shape.root_parameters),
        "reduce gradients": share * 4 * shape.parameters,
        "gather for rollouts": share * 2 * shape.parameters,
    }
