"""A Hugging Face causal LM whose hidden states can be computed for a whole token tree at once.

The model stays what it was: weights, generation, caches and its own attention are untouched. Only inside
`Policy.hidden`, and while its checkpointed layers are recomputed in the backward, is the attention switched
to ours. Any other attention would silently misread the position ids of a tree as packed sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel

from pact_fast.kernels.tree_attention import kept
from pact_fast.ops import tree_attention, tree_plan
from pact_fast.tree import fused_layers as fused
from pact_fast.tree.families import Family, HeadParams, causal_lm, check_model, decoder_layers, head_params
from pact_fast.tree.fused_layers import Kernels
from pact_fast.tree.packing import TreePack
from pact_fast.tree.replicas import check_exchanged, within_forward
from pact_fast.tree.router import RouterLoad, record_router_logits, router_load
from pact_fast.tree.streaming import Part, Prefix

CHECKPOINTING = ("none", "full", "keep_attention")
ATTENTION = "pact_tree"  # no "flash", "sdpa" or "flex" in the name: transformers acts on those


@torch.compiler.disable
def _pact_tree_attention(
    module: nn.Module,
    query: Tensor,  # [1, Hq, T, D], rotated
    key: Tensor,  # [1, Hkv, T, D]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    pact_tree: _TreeCall | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function of a layer, as transformers' AttentionInterface calls it."""
    if pact_tree is None:
        raise RuntimeError(f"attention {ATTENTION!r} runs inside Policy.hidden only: it needs a TreePack")
    unsupported = {"softcap": softcap, "attention sinks": s_aux, "attention_mask": attention_mask}
    if names := [name for name, value in unsupported.items() if value is not None] + ["dropout"] * bool(
        dropout
    ):
        raise ValueError(f"{type(module).__name__}: tree attention does not support {', '.join(names)}")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    pact_tree.layers += 1
    layer: Any = module.layer_idx
    k, v = pact_tree.extend(layer, k, v)
    plan = pact_tree.plan(sliding_window, q)
    out: Any
    if pact_tree.kept is not None and torch.is_grad_enabled():
        out = kept.tree_attention(q, k, v, plan, pact_tree.kept, layer, scale=scaling)
    else:
        end = pact_tree.subtree_end
        out = tree_attention(q, k, v, end, scale=scaling, window=sliding_window, plan=plan)
    return out[None], None


AttentionInterface.register(ATTENTION, _pact_tree_attention)


class _TreeCall:
    """One pack on its way through the layers; plans are made once and shared by all of them.

    `cache`: (keys, values) [P, Hkv, D] of the path above the pack, per layer, and `keep`: the tokens of path
    and pack whose keys and values the next pack needs; both None outside `Policy.stream`. `made`: takes each
    layer's keys and values as they are in the graph; `prefix` and `chosen`: keys and values of a trunk per
    layer, and its tokens that are the path above the pack. `kept`: attention outputs of checkpointed layers.
    """

    def __init__(
        self,
        subtree_end: Tensor,
        impl: str,
        cache: dict | None = None,
        keep: Tensor | None = None,
        path: int = 0,
        made: dict | None = None,
        prefix: dict | None = None,
        chosen: Tensor | None = None,
    ) -> None:
        self.subtree_end = subtree_end
        self.impl = impl
        self.cache = cache
        self.keep = keep
        self.path = path
        self.made = made
        self.prefix = prefix
        self.chosen = chosen
        self.kept: dict | None = None
        self.layers = 0  # layers that have called our attention
        self._plans: dict[int | None, Any] = {}

    def plan(self, window: int | None, query: Tensor):
        """`query`: [T, Hq, D], for what "auto" chooses by."""
        if window not in self._plans:
            self._plans[window] = tree_plan(
                self.subtree_end,
                window=window,
                first_query=self.path,
                impl=self.impl,
                head_dim=query.shape[2],
                dtype=query.dtype,
            )
        return self._plans[window]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the path and the pack; remembers those that `keep` names, or all (`made`)."""
        if self.made is not None:
            self.made.setdefault(layer, (k, v))  # a recomputing backward comes here again
        if self.prefix is not None:
            above = (x[self.chosen] for x in self.prefix[layer])
            return torch.cat((next(above), k)), torch.cat((next(above), v))
        if self.cache is None or self.keep is None:
            return k, v
        if self.path:
            k, v = (torch.cat(pair) for pair in zip(self.cache[layer], (k, v), strict=True))
        self.cache[layer] = k[self.keep], v[self.keep]
        return k, v


class Policy:
    """A causal LM of a family that `pact_fast.tree.families` knows, run on token trees.

    Args:
        model: a transformers causal LM, a PEFT model around one, or DistributedDataParallel around either:
            then the backward exchanges gradients as after `ddp(...)`, and every rank must call `hidden` with
            gradients equally often (`ddp.no_sync()` between). Not `ddp.module`: that is refused.
        attention: implementation of `ops.tree_attention`: "auto", "torch", ...
        gradient_checkpointing: "none"; "full": keep the input of every decoder layer alone and recompute the
            layer in the backward; "keep_attention": keep its attention's output and log-sum-exp besides, so
            that no attention is recomputed (as a bool: full or none).
        kernels: of RMSNorm, RoPE and SwiGLU: "none" (the model's own), "liger" (the package liger-kernel's),
            "auto": liger on a GPU where it is installed, knows the family and nothing is compiled. In effect
            within `hidden` and `stream` alone.
        compile: backend of torch.compile ("inductor") for the decoder layers, within `hidden` and `stream`
            alone; attention itself stays outside of the compiled parts.

    RuntimeError if a layer turns out not to run our attention. ValueError names what a tree cannot go
    through: other families, recurrent or linear-attention layers, attention sinks, RoPE that depends on the
    sequence's length, attention dropout in training.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        *,
        attention: str = "auto",
        gradient_checkpointing: str | bool = "none",
        kernels: str = "none",
        compile: str | None = None,
    ) -> None:
        causal = causal_lm(model)
        self.family = check_model(causal)
        self.kernels = _choose_kernels(kernels, causal, self.family, compile)
        self.model = model
        self.attention = attention
        if isinstance(gradient_checkpointing, bool):
            gradient_checkpointing = "full" if gradient_checkpointing else "none"
        self.gradient_checkpointing: str = gradient_checkpointing
        if self.gradient_checkpointing not in CHECKPOINTING:
            raise ValueError(
                f"gradient_checkpointing={gradient_checkpointing!r}: choose from {', '.join(CHECKPOINTING)}"
            )
        self._causal: Any = causal
        self._alone = False  # whether no DDP around the model was found
        self._layers: list[Any] = [m for m in causal.modules() if hasattr(type(m), "gradient_checkpointing")]
        self._compiled: list[tuple[Any, Any]] = []
        if compile is not None:
            # The forwards, not the modules: hooks (FSDP's, say) then run outside of what is compiled.
            self._compiled = [
                (layer, torch.compile(layer.forward, backend=compile, dynamic=True))
                for layer in decoder_layers(causal)
            ]

    @property
    def device(self) -> torch.device:
        return next(self._causal.parameters()).device

    @property
    def head(self) -> HeadParams:
        """Weights of the LM head, as `ops.linear_logprob` and `ops.linear_pact_loss` take them."""
        return head_params(self._causal, self.family)

    def hidden(self, pack: TreePack) -> Tensor:
        """Hidden states [T, H] of a pack after the final norm: the input of the LM head. Differentiable.

        Row t is what the model computes for token t with its ancestors as the only context, so it equals the
        hidden state of the same token in its sequence run alone.
        """
        if pack.num_tokens == 0:
            return self.head.weight.new_zeros(0, self._causal.config.hidden_size)
        self._check(pack)
        pack = pack.to(self.device)
        call = _TreeCall(pack.subtree_end, self.attention)
        return self._forward(pack.input_ids, pack.position_ids, call)

    def prefix(self, trunk: TreePack) -> Prefix:
        """Hidden states, keys and values of the trunk of a tree that is too large for one forward: see
        `pact_fast.tree.streaming`. Differentiable."""
        trunk.check_positions()
        trunk = trunk.to(self.device)
        made: dict[int, tuple[Tensor, Tensor]] = {}
        call = _TreeCall(trunk.subtree_end, self.attention, made=made)
        return Prefix(self._forward(trunk.input_ids, trunk.position_ids, call), made)

    def hidden_behind(self, part: Part, prefix: Prefix) -> Tensor:
        """Hidden states [n, H] of tokens that hang on a trunk. Differentiable in the weights and, into
        `prefix.leaves`, in the trunk's keys and values."""
        part = part.to(self.device)
        call = _TreeCall(
            part.pack.subtree_end,
            self.attention,
            path=part.path.numel(),
            prefix=prefix.leaves,
            chosen=part.path,
        )
        return self._forward(part.pack.input_ids, part.pack.position_ids, call)

    def hidden_and_load(self, pack: TreePack, counted: Tensor | None = None) -> tuple[Tensor, RouterLoad]:
        """As `hidden`, and where the expert layers sent the packed tokens `counted` (bool [T], default all):
        what the router's auxiliary loss is made of (`pact_fast.tree.router`). For families with experts."""
        if not self.family.experts_per_token:
            raise ValueError(f"{self.family.name} has no expert layers: use Policy.hidden")
        with record_router_logits(self._causal, self.family) as logits:
            hidden = self.hidden(pack)
        where = None if counted is None else counted.to(self.device)
        return hidden, router_load(logits, self.family.experts_per_token, where)

    def _check(self, pack: TreePack) -> None:
        pack.check_positions()
        pack.check_vocabulary(self.family.vocabulary)

    def _forward(self, input_ids: Tensor, position_ids: Tensor, call: _TreeCall) -> Tensor:
        config = self._causal.config
        if self._causal.training and (dropout := getattr(config, "attention_dropout", 0.0)):
            raise ValueError(
                f"attention_dropout = {dropout} in training: tree attention has no dropout; set it to 0 in "
                "the model's config or call model.eval()"
            )
        if self.gradient_checkpointing == "keep_attention":
            call.kept = {}
        if torch.is_grad_enabled():
            self._check_replica()

        def run() -> Tensor:
            decoder: Any = self._causal.model
            out = decoder(
                input_ids=input_ids[None],
                position_ids=position_ids[None],
                use_cache=False,
                pact_tree=call,
            )
            return out.last_hidden_state[0]

        with self._inside(config), self._checkpointing(config):
            hidden = within_forward(self.model, run)
        if call.layers != config.num_hidden_layers:
            raise RuntimeError(
                f"{call.layers} of {config.num_hidden_layers} layers ran the tree attention: another one "
                "would read the tree as something else; remove what replaces the model's attention"
            )
        return hidden

    def _check_replica(self) -> None:
        """ValueError where DDP would not exchange the gradients of what Policy computes."""
        if not isinstance(self.model, DistributedDataParallel):
            if not self._alone:
                check_exchanged(self._causal)
                self._alone = True
        elif self.model.find_unused_parameters and self.head.weight.requires_grad:
            raise ValueError(
                "DistributedDataParallel(..., find_unused_parameters=True) takes the LM head for unused, "
                "which the loss reads beside the forward: leave it False (in the arguments of transformers "
                "and TRL, ddp_find_unused_parameters=False)"
            )

    @torch.no_grad()
    def stream(self, pack: TreePack, chunk_tokens: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Hidden states of a pack of any size, `chunk_tokens` tokens at a time, without gradients.

        Yields (first, last, above, hidden): hidden [last - first, H] of the packed tokens [first, last), and
        above [depth of first, H], those of the ancestors of token `first`. In pre-order a chunk needs no
        other earlier token, so beside one chunk's activations only the keys and values of one path are kept.
        """
        self._check(pack)
        pack = pack.to(self.device)
        end = pack.subtree_end
        total = pack.num_tokens
        path = end.new_empty(0, dtype=torch.int64)
        above = self.head.weight.new_empty(0, self._causal.config.hidden_size)
        cache: dict[int, tuple[Tensor, Tensor]] = {}
        for first in range(0, total, chunk_tokens):
            last = min(first + chunk_tokens, total)
            here = torch.cat((path, torch.arange(first, last, device=end.device)))
            local_end = (end[here].clamp(max=last) - first + path.numel()).int()
            keep = (end[here] > last).nonzero()[:, 0]  # ancestors of token `last`
            call = _TreeCall(local_end, self.attention, cache, keep, path.numel())
            hidden = self._forward(pack.input_ids[first:last], pack.position_ids[first:last], call)
            yield first, last, above, hidden
            above = torch.cat((above, hidden))[keep]
            path = here[keep]

    def fused_layers(self) -> AbstractContextManager[None]:
        """Inside, the model runs on the fused layers that `hidden` runs on, and nothing else is changed."""
        return nullcontext() if self.kernels is None else fused.fused_layers(self._causal, self.kernels)

    @contextmanager
    def _inside(self, config) -> Iterator[None]:
        """Our attention, and fused or compiled layers where asked; what the model has itself comes back."""
        with _tree_attention_on(config), self.fused_layers():
            for layer, compiled in self._compiled:
                layer.forward = compiled
            try:
                yield
            finally:
                for layer, _ in self._compiled:
                    vars(layer).pop("forward", None)

    @contextmanager
    def _checkpointing(self, config) -> Iterator[None]:
        """Checkpoint the layers of this forward where asked, here or on the model; then restore it."""
        wanted = self.gradient_checkpointing != "none" or any(
            layer.gradient_checkpointing for layer in self._layers
        )
        if not (wanted and torch.is_grad_enabled()):
            yield
            return
        # The backward recomputes a layer after `hidden` has returned: the attention must be ours then, too.
        func = partial(
            checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), self._inside(config))
        )
        saved = [
            (
                layer.gradient_checkpointing,
                getattr(layer, "_gradient_checkpointing_func", None),
                layer.training,
            )
            for layer in self._layers
        ]
        for layer in self._layers:
            layer.gradient_checkpointing, layer._gradient_checkpointing_func, layer.training = (
                True,
                func,
                True,
            )
        try:
            yield
        finally:
            for layer, state in zip(self._layers, saved, strict=True):
                layer.gradient_checkpointing, layer._gradient_checkpointing_func, layer.training = state


def _choose_kernels(name: str, model: Any, family: Family, compiled: str | None) -> Kernels | None:
    if name not in ("auto", "liger", "none"):
        raise ValueError(f"kernels={name!r}: choose from auto, liger, none")
    if name == "auto":
        on_gpu = next(model.parameters()).is_cuda
        fits = family.name in fused.FAMILIES and compiled is None
        name = "liger" if on_gpu and fits and fused.installed() else "none"
    if name == "none":
        return None
    if compiled is not None:
        raise ValueError(f"kernels=liger and compile={compiled!r} fuse the same layers: choose one of them")
    fused.check_family(family)
    return fused.liger_kernels()


@contextmanager
def _tree_attention_on(config) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before
