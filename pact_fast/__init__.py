"""pact_fast: train multi-turn tool-use agents with privileged expert traces (PACT, arXiv 2606.16215)."""

from pact_fast.ops import PactLossOutput, linear_cross_entropy, linear_logprob, linear_pact_loss
from pact_fast.version import __version__

__all__ = ["PactLossOutput", "__version__", "linear_cross_entropy", "linear_logprob", "linear_pact_loss"]
