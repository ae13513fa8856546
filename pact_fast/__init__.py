"""pact_fast: train multi-turn tool-use agents with privileged expert traces (PACT, arXiv 2606.16215)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pact_fast.ops import (
    PactLossOutput,
    linear_cross_entropy,
    linear_logprob,
    linear_pact_loss,
    tree_attention,
)
from pact_fast.packing import TreePack, pack_linear, pack_tree, plan_packs
from pact_fast.version import __version__

if TYPE_CHECKING:
    from pact_fast.policy import Policy
    from pact_fast.scoring import context_logprobs, sequence_logprobs

# These import transformers, which takes seconds: only when they are used.
_LAZY = {
    "Policy": "pact_fast.policy",
    "context_logprobs": "pact_fast.scoring",
    "sequence_logprobs": "pact_fast.scoring",
}

__all__ = [
    "PactLossOutput",
    "Policy",
    "TreePack",
    "__version__",
    "context_logprobs",
    "linear_cross_entropy",
    "linear_logprob",
    "linear_pact_loss",
    "pack_linear",
    "pack_tree",
    "plan_packs",
    "sequence_logprobs",
    "tree_attention",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'pact_fast' has no attribute {name!r}")
