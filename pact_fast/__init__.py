"""pact_fast: train multi-turn tool-use agents with privileged expert traces (PACT, arXiv 2606.16215)."""

from pact_fast.version import __version__

__all__ = ["__version__"]
