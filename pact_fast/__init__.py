"""pact_fast: train multi-turn tool-use agents with privileged expert traces (PACT, arXiv 2606.16215)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pact_fast.ops import (
    PactLossOutput,
    TokenLossOutput,
    linear_cross_entropy,
    linear_divergence,
    linear_logprob,
    linear_pact_loss,
    linear_token_loss,
    tree_attention,
)
from pact_fast.tree.packing import TreePack, pack_linear, pack_tree, plan_packs
from pact_fast.version import __version__

if TYPE_CHECKING:
    from pact_fast.config import Config, load_config
    from pact_fast.objective import (
        anchor_mask,
        group_advantages,
        reasoning_level,
        tool_call_scale,
        turn_advantages,
    )
    from pact_fast.train.trainer import Trainer
    from pact_fast.tree.policy import Policy
    from pact_fast.tree.scoring import context_logprobs, sequence_logprobs

# These import transformers, which takes seconds: only when they are used.
_LAZY = {
    "Config": "pact_fast.config",
    "Policy": "pact_fast.tree.policy",
    "Trainer": "pact_fast.train.trainer",
    "anchor_mask": "pact_fast.objective",
    "context_logprobs": "pact_fast.tree.scoring",
    "group_advantages": "pact_fast.objective",
    "load_config": "pact_fast.config",
    "reasoning_level": "pact_fast.objective",
    "sequence_logprobs": "pact_fast.tree.scoring",
    "tool_call_scale": "pact_fast.objective",
    "turn_advantages": "pact_fast.objective",
}

__all__ = [
    "Config",
    "PactLossOutput",
    "Policy",
    "TokenLossOutput",
    "Trainer",
    "TreePack",
    "__version__",
    "anchor_mask",
    "context_logprobs",
    "group_advantages",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_logprob",
    "linear_pact_loss",
    "linear_token_loss",
    "load_config",
    "pack_linear",
    "pack_tree",
    "plan_packs",
    "reasoning_level",
    "sequence_logprobs",
    "tool_call_scale",
    "tree_attention",
    "turn_advantages",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'pact_fast' has no attribute {name!r}")
