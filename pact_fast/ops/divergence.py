"""Divergence between a student's and a teacher's next-token distributions: checks and choice."""

import math

import torch
from torch import Tensor

from pact_fast.kernels.lm_head.divergence import linear_divergence_op
from pact_fast.kernels.lm_head.reference import KINDS
from pact_fast.ops.checks import (
    autocast,
    check_device,
    check_head,
    check_rows,
    check_temperature,
    choose,
    describe,
    row_values,
)


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    student: Tensor,
    teacher: Tensor,
    *,
    kind: str = "reverse_kl",
    beta: float = 0.5,
    top_k: int | None = None,
    row_weight: Tensor | None = None,
    clip: float | None = None,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    softcap: float | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    return_rows: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Distillation between pairs of rows of an LM head over the whole vocabulary, without [R, V] logits.

    The student's rows learn, the teacher's have no gradient. Equals::

        p_s = softmax(softcap(hidden[student] @ weight.T) / temperature)
        p_t = softmax(softcap(teacher_hidden[teacher] @ teacher_weight.T) / teacher_temperature).detach()
        D = (p_s * (p_s.log() - p_t.log())).sum(-1)                           # "reverse_kl", KL(p_s | p_t)
        D = (p_t * (p_t.log() - p_s.log())).sum(-1)                           # "forward_kl", KL(p_t | p_s)
        m = beta * p_t + (1 - beta) * p_s
        D = beta * KL(p_t | m) + (1 - beta) * KL(p_s | m)                     # "jsd" (arXiv 2306.13649)
        loss = (row_weight * D.clamp(max=clip)).sum()

    top_k compares k + 1 buckets instead of V tokens on both sides: the teacher's k likeliest tokens and all
    others together. The gradient is made in the forward, so the loss can be backpropagated once. A row of
    weight 0 contributes exactly 0, even where its hidden states hold NaN; a row paired with itself at one
    temperature gives exactly 0 and no gradient.

    Args:
        hidden: [T, H] float, any strides. weight: [V, H] of the same dtype.
        student: [R] integer in [0, T), repeats allowed. teacher: [R] integer, rows of teacher_hidden.
        kind: "reverse_kl", "forward_kl" or "jsd". beta: of "jsd", between 0 and 1, neither included.
        top_k: >= 1; None, or at least V: every token.
        row_weight: [R] >= 0; None: all 1. It carries all normalisation. Not differentiable.
        clip: >= 0; a row's divergence counts at most this much, and has no gradient above it.
        temperature, teacher_temperature: > 0. softcap: > 0 or None, of both sides.
        teacher_hidden: [T2, H2] float; None: hidden. teacher_weight: [V, H2]; None: weight.
        return_rows: also return the divergences [R] before weight and clip, without a gradient (0 where the
            weight is 0).
        impl: as in :func:`linear_logprob`.

    Returns:
        loss [], or (loss, divergences [R]); fp32 (fp64 for fp64 hidden). Differentiable in hidden and weight.

    Raises:
        ValueError, TypeError: naming the argument, before anything is computed.
    """
    hidden, weight, _ = autocast(hidden, weight, None)
    check_head(hidden, weight, None, softcap)
    theirs, head = hidden if teacher_hidden is None else teacher_hidden, weight
    if teacher_hidden is not None or teacher_weight is not None:
        theirs, head = check_teacher(hidden, weight, teacher_hidden, teacher_weight)
    rows = check_rows("student", student, None, hidden, integer=True)
    check_rows("teacher", teacher, rows, hidden, integer=True)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(
            f"beta must lie between 0 and 1 for jsd, got {beta}: at its ends the divergence is 0; use "
            'kind="forward_kl" or "reverse_kl" for what some trainers call beta 0 and 1'
        )
    if top_k is not None and not (isinstance(top_k, int) and top_k >= 1):
        raise ValueError(f"top_k must be an integer >= 1, or None for the whole vocabulary, got {top_k!r}")
    if clip is not None and not (clip >= 0 and math.isfinite(clip)):
        raise ValueError(f"clip must be finite and >= 0, or None for none, got {clip}")
    heats = []
    for name, value in (("temperature", temperature), ("teacher_temperature", teacher_temperature)):
        if isinstance(value, Tensor):
            raise TypeError(f"{name} must be one number for all rows, got {describe(value)}")
        heats.append(check_temperature(value, rows, hidden, name)[0])
    strength = None if row_weight is None else row_values("row_weight", row_weight, rows, hidden)
    needs = [t.requires_grad and torch.is_grad_enabled() for t in (hidden, weight)]
    loss, divergences, *_ = linear_divergence_op(
        hidden,
        weight,
        student,
        teacher,
        None if theirs is hidden else theirs.detach(),
        None if head is weight else head.detach(),
        strength,
        kind,
        float(beta),
        top_k,
        None if clip is None else float(clip),
        *heats,
        None if softcap is None else float(softcap),
        *needs,
        choose(impl, hidden),
    )
    return (loss, divergences) if return_rows else loss


def check_teacher(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor | None, teacher_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The teacher's hidden states and head, of the student's dtype."""
    theirs = hidden if teacher_hidden is None else teacher_hidden
    head = weight if teacher_weight is None else teacher_weight
    for name, value in (("teacher_hidden", theirs), ("teacher_weight", head)):
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() != 2:
            raise TypeError(f"{name} must be a 2-d floating-point tensor, got {describe(value)}")
        check_device(name, value, hidden)
    if head.shape != (weight.shape[0], theirs.shape[1]):
        raise ValueError(
            f"teacher_weight must be [V, H2] = [{weight.shape[0]}, {theirs.shape[1]}] for this weight and "
            f"teacher_hidden, got {describe(head)}"
        )
    if theirs is not hidden:
        theirs = theirs.to(hidden.dtype)
    return theirs, head if head is weight else head.to(hidden.dtype)
