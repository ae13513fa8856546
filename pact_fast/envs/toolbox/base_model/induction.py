"""A start in which copying works: one head that looks back by one, and one that finds the same token again.

From a random start a model of this size needs some 500 steps before it copies a name (the loss stays on a
plateau until the two heads have found each other); from this one it copies within 50. Nothing is frozen.

The circuit (Olsson et al. 2022, In-context Learning and Induction Heads) written into the weights:

* layer 0, head 0 attends to the token before: query and key see only a constant dimension of the embedding,
  turned by one step of the fastest rotary frequencies. It writes the content of that token to dimensions of
  its own.
* layer 1, head 0 attends to tokens that follow an earlier copy of the current one: its query reads the
  current token, its key what layer 0 wrote, on the rotary frequencies too slow to notice the distance. It
  adds the content of the found token to the output.
"""

from __future__ import annotations

import torch
from transformers import Qwen3ForCausalLM

CONSTANT = 0  # embedding dimension that is equal for all tokens
PREVIOUS = 24  # the last 24 dimensions hold the previous token's content
FAST_FREQUENCIES = 6
SLOW = 0.01  # radians a token


@torch.no_grad()
def write_induction_circuit(model: Qwen3ForCausalLM, *, gain: float = 2.0, strength: float = 0.1) -> None:
    """Overwrite the first head of layers 0 and 1. `gain`: of the query and key norms, i.e. how sharply they
    attend; `strength`: of what the two heads write, in units of the residual stream."""
    config = model.config
    width, head_dim = config.hidden_size, config.head_dim
    if width < head_dim + 1 + PREVIOUS - 16 or config.num_hidden_layers < 2 or head_dim < PREVIOUS:
        raise ValueError(f"hidden_size={width}, head_dim={head_dim}: too small for the circuit")
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.fill_(gain)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.mul_(0.3)  # what is still random writes little at first
    embedding = model.model.embed_tokens.weight
    embedding[:, CONSTANT] = 0.1
    embedding[:, width - PREVIOUS :] = 0.0

    pairs = head_dim // 2
    rope: dict = dict(config.rope_parameters or {})
    frequencies = float(rope["rope_theta"]) ** (-torch.arange(pairs) / pairs)
    query, key, value, output = _first_head(model, 0)
    for i in range(FAST_FREQUENCIES):
        query[i, CONSTANT] = 1.0
        key[i, CONSTANT] = frequencies[i].cos()
        key[i + pairs, CONSTANT] = frequencies[i].sin()
    value[:PREVIOUS, 1 : 1 + PREVIOUS] = torch.eye(PREVIOUS)
    output[width - PREVIOUS :, :PREVIOUS] = strength * torch.eye(PREVIOUS)

    query, key, value, output = _first_head(model, 1)
    slow = [i for i in range(pairs) if frequencies[i] < SLOW]
    for content, slot in enumerate([*slow, *(i + pairs for i in slow)][:PREVIOUS]):
        query[slot, 1 + content] = 1.0
        key[slot, width - PREVIOUS + content] = 1.0
    value[:, 1 : 1 + head_dim] = torch.eye(head_dim)
    output[1 : 1 + head_dim] = strength * torch.eye(head_dim)


def _first_head(model: Qwen3ForCausalLM, layer: int) -> tuple[torch.Tensor, ...]:
    """Views, zeroed, of the first head's query, key, value [head_dim, H] and output [H, head_dim] weights."""
    attention = model.model.layers[layer].self_attn
    head_dim = model.config.head_dim
    rows = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    views = (*(weight[:head_dim] for weight in rows), attention.o_proj.weight[:, :head_dim])
    for view in views:
        view.zero_()
    return views
