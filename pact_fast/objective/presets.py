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


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is optimised; every preset is a choice of these.

    The policy term:

    rl_context: context of the policy ratio: "trace" c, "prompt" x, "none" no policy term.
    anchor_probability: q, share of prompts that use the prompt-only ratio although rl_context is "trace".
    trace_context: how h follows x in c. "concat": as turns of the conversation, the very sequence that the
    SFT
        term teaches; "message": as text at the end of the last user message.
    trace_reasoning, trace_calls, trace_observations: whether reasoning, calls and tool responses stay in h.
    trace_answer: whether the final answer is part of h. The paper leaves it out: under c it would be known.
    ratio_denominator: "context" is pi_old under the ratio's own context; "rollout" is pi_old as the tokens
        were drawn, under x: the clip then also brakes a token that c has already made unlikely (or likely).
    rl_start: share of the steps before which no policy term is used (sft-then-grpo).
    advantages: "turn" adds a turn's part to the trajectory's, "group" and "group_mean" know the trajectory
        alone. advantage_mix: "sum" or "mean" of the two parts. turn_discount: gamma of the turn returns.
    normalization: of the policy term. "prompt": mean over a prompt's sampled tokens, then over prompts;
        "token", "sequence", "constant": over the whole mini-batch.
    beta: KL penalty to the policy before training, k3 estimator, under the context of the ratio.
    importance_ratio_cap: C; every advantage is multiplied by min(pi_old(y|x) / pi_engine(y|x), C), the
        trainer's over the engine's probability of the token as it was drawn (TIS). None: off.
    skip_zero_advantage: rollouts whose advantage is exactly 0 leave the pass (they still count in the
        normalisation).

    The SFT term:

    sft_targets: "components" (annealed), "all" (every assistant token), "none".
    sft_weight: beta_SFT. sft_end: share of the steps after which no SFT term is used. mu_start, mu_end:
    CHORD's
        global weight, loss (1-mu) RL + mu SFT.
    sft_on_anchored: whether an anchored prompt has an SFT term too.
    sft_normalization: "prompt" divides by the sum of the prompt's own strengths, then by the prompts;
        "token" by the number of supervised tokens of the mini-batch.
    reasoning_anneal: "segment" supervises the prefix of semantic chunks of the present level, "token" a share
        of a turn's reasoning tokens, "sequence" (with the same call_anneal) a share of all supervised tokens
        of the trace as one sequence, "fixed" the longest prefix throughout, "none" nothing.
    reasoning_levels: levels above 0 that reasoning falls through.
    call_anneal: "scale" gives calls lambda, from tool_call_start to tool_call_end; "token" a share of the
        tokens of a turn's calls, "sequence" see above, "fixed" tool_call_start throughout, "none" 0.
    structure_strength: "call" gives the tags around a call and the end of a calling turn the strength of
        calls, "all" think tags and the end of every turn too, "none" leaves all tags out.
    answer_strength: of text beside or after the calls.
    """

    rl_context: Literal["trace", "prompt", "none"] = "trace"
    anchor_probability: float = 0.4
    trace_context: Literal["concat", "message"] = "concat"
    trace_reasoning: bool = True
    trace_calls: bool = True
    trace_observations: bool = True
    trace_answer: bool = False
    ratio_denominator: Literal["context", "rollout"] = "context"
    rl_start: float = 0.0
    advantages: str = "turn"
    advantage_mix: Literal["sum", "mean"] = "sum"
    turn_discount: float = 0.9
    normalization: str = "prompt"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    dual_clip: float | None = None
    beta: float = 0.0
    importance_ratio_cap: float | None = None
    entropy_coef: float = 0.0
    skip_zero_advantage: bool = True
    sft_targets: Literal["components", "all", "none"] = "components"
    sft_weight: float = 0.1
    sft_end: float = 1.0
    sft_on_anchored: bool = False
    sft_normalization: Literal["prompt", "token"] = "prompt"
    mu_start: float | None = None
    mu_end: float | None = None
    reasoning_anneal: Literal["segment", "token", "sequence", "fixed", "none"] = "segment"
    reasoning_levels: int = 4
    call_anneal: Literal["scale", "token", "sequence", "fixed", "none"] = "scale"
    tool_call_start: float = 0.8
    tool_call_end: float = 0.2
    structure_strength: Literal["call", "all", "none"] = "call"
    answer_strength: float = 0.0


# Plain SFT: every assistant token of the whole trace, its answer too, each token of the batch alike.
_SFT: dict[str, Any] = {"sft_targets": "all", "trace_answer": True, "sft_normalization": "token"}
_SFT_ALONE = {**_SFT, "rl_context": "none", "sft_weight": 1.0}
_SFT_THEN = {**_SFT, "rl_context": "prompt", "sft_weight": 1.0, "rl_start": 0.5, "sft_end": 0.5}
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
    "grpo": {"rl_context": "prompt", "sft_targets": "none", "advantages": "group"},
    "matchtir": {"rl_context": "prompt", "sft_targets": "none"},  # table 2, prompt-only RL
    "sft": _SFT_ALONE,
    "sft-then-grpo": {**_SFT_THEN, "advantages": "group"},
    "sft-then-matchtir": _SFT_THEN,
    "chord": {**_SFT, "rl_context": "prompt", "advantages": "group", "mu_start": 0.9, "mu_end": 0.05},
}
