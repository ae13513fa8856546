"""Fused ops for any training loop: argument checks and the choice of implementation; the work is in kernels/.

Dims: N rows, R loss rows, T packed tokens, H hidden, V vocabulary.
"""

from pact_fast.kernels.tree_attention.plan import TreePlan, tree_plan
from pact_fast.ops.attention import tree_attention
from pact_fast.ops.cross_entropy import linear_cross_entropy
from pact_fast.ops.divergence import linear_divergence
from pact_fast.ops.logprob import linear_logprob
from pact_fast.ops.pact_loss import PactLossOutput, linear_pact_loss
from pact_fast.ops.token_loss import TokenLossOutput, linear_token_loss

__all__ = [
    "PactLossOutput",
    "TokenLossOutput",
    "TreePlan",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_logprob",
    "linear_pact_loss",
    "linear_token_loss",
    "tree_attention",
    "tree_plan",
]
