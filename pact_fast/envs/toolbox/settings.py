"""All settings of the toolbox environment."""

from __future__ import annotations

from dataclasses import dataclass

from pact_fast.envs.call_matching import REWARDS


@dataclass(frozen=True)
class ToolboxSettings:
    """Tasks, their shift between training and held-out, and the expert.

    Shares are in [0, 1]. `hops` tuples are weights of 1, 2 and 3 dependent look-ups.
    """

    seed: int = 0
    train_tasks: int = 160  # each with an expert trace
    train_path: str | None = None  # records of training tasks in their place, as `traces make` writes them
    validation_tasks: int = 64
    test_tasks: int = 200

    difficulty: int = 1  # 1 look-up chains; 2 adds numbers, units, comparisons, search; 3 adds sums and dates
    train_hops: tuple[float, float, float] = (0.3, 0.4, 0.3)
    eval_hops: tuple[float, float, float] = (0.3, 0.4, 0.3)
    two_part_share: float = 0.0  # tasks that ask two things; the bundled base is too small for them
    shift: float = 0.5  # share of validation and test tasks worded as no training task is

    success_rate: float = 0.7  # share of expert traces that solve their task
    detour_rate: float = 0.4  # share of expert traces with a repeated, needless, or wrong and repaired call

    # "solve_f1" over sub-answers and answers, or calls matched with those of the shortest way and the quoted
    # answers by words: "call_matching", "call_matching_greedy" (pact_fast.envs.call_matching)
    reward: str = "solve_f1"
    unmatched_penalty: float = 0.0  # of call matching: what a call without a match loses
    answer_weight: float = 2.0  # a final answer weighs as much as this many calls
    no_format_reward: float = -0.2  # an episode with neither a valid call nor a quoted answer
    max_consecutive_invalid: int = 3  # calls; then the episode ends

    workers: int = 1
    time_limit: float = 2.0  # seconds per tool call

    def __post_init__(self) -> None:
        for name in ("two_part_share", "shift", "success_rate", "detour_rate"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"env.toolbox.{name}: a share in [0, 1], got {getattr(self, name)!r}")
        if self.reward not in ("solve_f1", *REWARDS):
            known = ", ".join(("solve_f1", *REWARDS))
            raise ValueError(f"env.toolbox.reward: one of {known}, got {self.reward!r}")
        if self.difficulty not in (1, 2, 3):
            raise ValueError(f"env.toolbox.difficulty: 1, 2 or 3, got {self.difficulty!r}")
        for name in ("train_hops", "eval_hops"):
            weights = getattr(self, name)
            if min(weights) < 0 or sum(weights) <= 0:
                raise ValueError(f"env.toolbox.{name}: three weights, not all zero, got {weights!r}")
        for name in ("train_tasks", "validation_tasks", "test_tasks", "workers", "max_consecutive_invalid"):
            if getattr(self, name) < 1:
                raise ValueError(f"env.toolbox.{name}: at least 1, got {getattr(self, name)!r}")
        for name in ("answer_weight", "time_limit"):
            if getattr(self, name) <= 0:
                raise ValueError(f"env.toolbox.{name}: above 0, got {getattr(self, name)!r}")
