"""What is optimised, and the presets: every training method is a choice of these values.

The defaults are PACT as its paper has it (arXiv 2606.16215, equations 4 to 14 and algorithm 1). Per prompt
i of P, with the prompt x, the expert trace h, c = [x; h], and one draw z_i ~ Bernoulli(q) shared by its
rollouts:

    L_i = L_RL(c) + sft_weight L_SFT     where z_i = 0
    L_i = L_RL(x)                        where z_i = 1
    loss = mean of L_i over the prompts of a mini-batch
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pact_fast.keys import count, key, share

SOURCES = ("trace", "peer", "feedback", "hint")  # of privileged context
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is optimised; every preset is a choice of these"""

    # The policy term.
    rl_context: Literal["trace", "prompt", "both", "none"] = key(
        "trace", "context of the policy ratio: trace (c = [x; h]), prompt (x), both, none (no policy term)"
    )
    trace_share: float = share(0.5, "weight of the term under c where rl_context is both; x has the rest")
    reward_weight: float = key(1.0, "factor on the advantages that come from rewards", low=0)
    anchor_probability: float = share(0.4, "q, share of prompts with the prompt-only ratio where it is trace")
    trace_context: Literal["concat", "message"] = key(
        "concat",
        "h in c: turns of the conversation, as the SFT term teaches them, or text in the user message",
    )
    trace_reasoning: bool = key(True, "reasoning stays in h")
    trace_calls: bool = key(True, "tool calls stay in h")
    trace_observations: bool = key(True, "tool responses stay in h")
    trace_answer: bool = key(
        False, "the final answer is part of h; the paper leaves it out: it would be known"
    )
    ratio_denominator: Literal["context", "rollout"] = key(
        "context", "pi_old under the ratio's own context, or as the tokens were drawn, under x"
    )
    rl_start: float = share(0.0, "share of the steps before which there is no policy term (sft-then-grpo)")
    advantages: str = key(
        "turn", "turn (the trajectory's and a turn's part), group, or group_mean (no division)"
    )
    advantage_mix: Literal["sum", "mean"] = key("sum", "of the trajectory's and the turn's part")
    turn_discount: float = share(0.9, "gamma of the turn returns")
    normalization: str = key(
        "prompt",
        "of the policy term: prompt (mean in a prompt, then over prompts), token, sequence, constant",
    )
    epsilon: float = key(0.2, "clip range of the ratio; a large one (1e6) switches clipping off", above=0)
    epsilon_high: float | None = key(None, "upper clip range; none: epsilon", above=0)
    dual_clip: float | None = key(
        None, "bound on the loss where the advantage is negative; none: off", above=1
    )
    beta: float = key(0.0, "KL penalty to the policy before training (k3), under the ratio's context", low=0)
    importance_ratio_cap: float | None = key(
        None, "cap of pi_old(y|x) / pi_engine(y|x), which then multiplies every advantage; none: off", above=0
    )
    entropy_coef: float = key(0.0, "bonus for entropy", low=0)
    skip_zero_advantage: bool = key(
        True, "rollouts with advantage 0 leave the pass (they still count in means)"
    )
    # Privileged contexts and what is distilled from them.
    privileged: list[str] = key(
        ["trace"], "what c shows after x, the first there is: trace, peer (best rollout), feedback, hint"
    )
    contrast: Literal["none", "peer", "trace"] = key(
        "none", "wrong contexts that c is set against: failed rollouts, another prompt's trace"
    )
    contrast_count: int = count(4, "wrong contexts of a rollout at most; their probabilities are averaged")
    distillation: Literal["none", "sampled", "modulate", "reverse_kl", "forward_kl", "jsd"] = key(
        "none", "what y under x learns from y under c: by advantages, or by a divergence of distributions"
    )
    distillation_weight: float = key(1.0, "weight of what is distilled", above=0)
    distillation_beta: float = key(0.5, "of jsd: share of the teacher in the mixture", above=0, below=1)
    distillation_topk: int | None = count(
        None, "likeliest tokens of the teacher that a divergence tells apart, the rest as one; none: all"
    )
    distillation_clip: float | None = key(None, "a row's divergence counts at most this; none: off", above=0)
    distillation_gate: float | None = key(
        None, "beta of the factor sigmoid(beta gap) on what is distilled from a token; none: off", above=0
    )
    modulation_scale: float = key(0.02, "tau of modulate, which adds tanh(gap / tau)", above=0)
    teacher: Literal["live", "ema", "frozen"] = key(
        "live", "weights that read c: the policy's, their moving average, or those before training"
    )
    teacher_update_rate: float = share(0.05, "share of the policy in the average at each update; 1 copies it")
    teacher_sync_steps: int = count(1, "steps between updates of the average")
    # The SFT term.
    sft_targets: Literal["components", "all", "none"] = key(
        "components", "components (annealed), all (every assistant token), none"
    )
    sft_weight: float = key(0.1, "beta_SFT", low=0)
    sft_end: float = share(1.0, "share of the steps after which there is no SFT term")
    sft_on_anchored: bool = key(False, "an anchored prompt has an SFT term, too")
    sft_normalization: Literal["prompt", "token"] = key(
        "prompt", "by the sum of a prompt's strengths, then prompts; or by the batch's supervised tokens"
    )
    mu_start: float | None = share(None, "CHORD's weight at the start: loss (1-mu) RL + mu SFT; none: off")
    mu_end: float | None = share(None, "CHORD's weight at the end")
    reasoning_anneal: Literal["segment", "token", "sequence", "fixed", "none"] = key(
        "segment",
        "what of a turn's reasoning is supervised: a prefix of chunks, of tokens, ... (docs/method.md)",
    )
    reasoning_levels: int = count(4, "levels above 0 that reasoning falls through")
    call_anneal: Literal["scale", "token", "sequence", "fixed", "none"] = key(
        "scale", "strength of calls: falls from tool_call_start to tool_call_end, ... (docs/method.md)"
    )
    tool_call_start: float = share(0.8, "lambda at the start")
    tool_call_end: float = share(0.2, "lambda at the end")
    structure_strength: Literal["call", "all", "none"] = key(
        "call",
        "tags around calls and the end of a calling turn as calls; think tags and every end, too; none",
    )
    answer_strength: float = share(0.0, "of text beside or after the calls")

    @property
    def diverges(self) -> bool:
        """Whether distributions are distilled, not the log-probs of sampled tokens."""
        return self.distillation in DIVERGENCES

    @property
    def needs_gaps(self) -> bool:
        """Whether the log-probs of sampled tokens under c are asked for before the update."""
        return self.distillation in ("sampled", "modulate") or self.distillation_gate is not None

    @property
    def shows_privileged(self) -> bool:
        """Whether anything is computed under c."""
        return self.rl_context in ("trace", "both") or self.distillation != "none"

    @property
    def has_reward_rows(self) -> bool:
        """Whether sampled tokens have a policy term of their own, beside what distributions teach."""
        by_advantage = self.reward_weight or self.distillation in ("sampled", "modulate")
        return bool(by_advantage or self.beta or self.entropy_coef)


# Plain SFT: every assistant token of the whole trace, its answer too, each token of the batch alike.
_SFT: dict[str, Any] = {"sft_targets": "all", "trace_answer": True, "sft_normalization": "token"}
_SFT_ALONE = {**_SFT, "rl_context": "none", "sft_weight": 1.0}
_SFT_THEN = {**_SFT, "rl_context": "prompt", "sft_weight": 1.0, "rl_start": 0.5, "sft_end": 0.5}
_GRPO: dict[str, Any] = {"rl_context": "prompt", "sft_targets": "none", "advantages": "group"}
_DISTILLED: dict[str, Any] = {**_GRPO, "reward_weight": 0.0}  # what c shows is the only signal
_NO_ANCHOR: dict[str, Any] = {"anchor_probability": 0.0}  # all ablations of the paper

PRESETS: dict[str, dict[str, Any]] = {
    "pact": {},
    "pact-no-anchor": _NO_ANCHOR,  # table 2, "both"
    "pact-no-sft": {**_NO_ANCHOR, "sft_targets": "none"},  # table 2, trace-conditioned RL alone
    "prompt-rl+sft": {"rl_context": "prompt"},  # table 2, third row
    "pact-no-reasoning": {**_NO_ANCHOR, "trace_reasoning": False},  # table 3
    "pact-no-calls": {**_NO_ANCHOR, "trace_calls": False},
    "pact-no-observation": {**_NO_ANCHOR, "trace_observations": False},
    "pact-fixed-reasoning": {**_NO_ANCHOR, "reasoning_anneal": "fixed"},  # table 4
    "pact-fixed-calls": {**_NO_ANCHOR, "call_anneal": "fixed"},
    "pact-token-reasoning": {**_NO_ANCHOR, "reasoning_anneal": "token"},
    "pact-token-calls": {**_NO_ANCHOR, "call_anneal": "token"},
    "pact-reasoning-only": {**_NO_ANCHOR, "call_anneal": "none"},  # table 6
    "pact-calls-only": {**_NO_ANCHOR, "reasoning_anneal": "none"},
    "pact-one-sequence": {**_NO_ANCHOR, "reasoning_anneal": "sequence", "call_anneal": "sequence"},
    "component-sft": {"rl_context": "none", "sft_weight": 1.0},
    "grpo": _GRPO,
    "matchtir": {"rl_context": "prompt", "sft_targets": "none"},  # table 2, prompt-only RL
    "sft": _SFT_ALONE,
    "sft-then-grpo": {**_SFT_THEN, "advantages": "group"},
    "sft-then-matchtir": _SFT_THEN,
    "sdft": {**_DISTILLED, "distillation": "sampled", "teacher": "ema", "teacher_update_rate": 0.01},
    "opsd-sampled": {**_DISTILLED, "distillation": "sampled", "teacher": "frozen"},
    "opsd": {**_DISTILLED, "distillation": "jsd", "teacher": "frozen"},
    "sdpo": {
        **_DISTILLED,
        **{"distillation": "jsd", "distillation_topk": 100, "teacher": "ema"},
        "privileged": ["peer", "feedback"],
    },
    "sdar": {
        **_GRPO,
        **{"distillation": "reverse_kl", "distillation_weight": 0.01, "distillation_gate": 5.0},
    },
    "pi-distill": {**_GRPO, "rl_context": "both"},
    "rlcsd": {
        **_GRPO,
        **{
            "distillation": "modulate",
            "distillation_weight": 0.5,
            "privileged": ["peer"],
            "contrast": "peer",
        },
        **{"teacher": "ema", "teacher_update_rate": 1.0, "teacher_sync_steps": 10},
    },
    "chord": {**_SFT, "rl_context": "prompt", "advantages": "group", "mu_start": 0.9, "mu_end": 0.05},
}
