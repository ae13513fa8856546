"""The auxiliary loss of expert routers over a token tree: every token counts once, however many share it.

Switch Transformer's load balancing (arXiv 2101.03961, equations 4 to 6), as transformers computes it over all
expert layers together; N routings = expert layers x tokens:

    loss = E sum_e (counts_e / N) (probs_e / N)
    counts_e   routings that chose expert e among their top k; a constant
    probs_e    sum of the routers' probabilities of e; carries the gradient

A product of two means over the batch, so not a sum over packs. It becomes one where counts and N of the whole
batch are known beforehand: `balance_loss` of one pack's probs with them adds up to the loss of all packs. And
a prefix that several packs repeat counts in one of them, which `first_uses` decides: so the loss does not
depend on how packs are cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pact_fast.tree.families import Family, decoder_layers
from pact_fast.tree.packing import pack_tree


class RouterLoad(NamedTuple):
    """Where the tokens of one pack, or of several, were sent."""

    counts: Tensor  # [E] fp32, without gradient
    probs: Tensor  # [E] fp32
    routings: int  # N


def balance_loss(probs: Tensor, counts: Tensor, routings: int) -> Tensor:
    """The share [] of the tokens behind `probs` [E] in the loss of a batch with these counts [E] and N."""
    return counts.numel() * (counts * probs).sum() / routings**2


@contextmanager
def record_router_logits(model: nn.Module, family: Family) -> Iterator[list[Tensor]]:
    """Collects, layer by layer, the routers' logits [T, E] of the forwards inside."""
    logits: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        logits.append(output[0])

    layers: Any = zip(family.layers, decoder_layers(model), strict=True)
    hooks = [layer.mlp.gate.register_forward_hook(keep) for spec, layer in layers if spec.experts]
    try:
        yield logits
    finally:
        for hook in hooks:
            hook.remove()


def router_load(logits: Sequence[Tensor], top_k: int, counted: Tensor | None = None) -> RouterLoad:
    """The load of tokens whose routers said `logits`, one [T, E] a layer; of those `counted` (bool [T])."""
    rows = slice(None) if counted is None else counted
    probs = torch.stack([layer[rows].float().softmax(-1) for layer in logits])  # [layers, T, E]
    chosen = probs.detach().topk(top_k, dim=-1).indices
    counts = torch.bincount(chosen.flatten(), minlength=probs.shape[-1]).float()
    return RouterLoad(counts, probs.sum((0, 1)), probs.shape[0] * probs.shape[1])


def first_uses(sequences: Sequence[Tensor]) -> list[Tensor]:
    """Per sequence a bool [len]: whether no sequence before it has this token after the same tokens."""
    tree = pack_tree(sequences)
    seen = torch.zeros(tree.num_tokens, dtype=torch.bool)
    out = []
    for index in tree.token_index:
        out.append(~seen[index])
        seen[index] = True
    return out
