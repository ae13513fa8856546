"""The decode ops: argument checks and the choice of implementation, "torch" (reference.py) or "triton".

"auto" is Triton on a CUDA device and torch elsewhere; it never falls back after a failure. Nothing here is
differentiable. All shapes and meanings stand at the functions; formulas in reference.py.

N rows (new tokens where it says so), H hidden, F intermediate, Hq and Hkv heads, G = Hq / Hkv, D head dim,
S slots of the cache (slot = page * page_size + offset), V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from pact_fast.kernels.decode import reference
from pact_fast.kernels.decode.tasks import DecodeTasks, ExtendTasks

IMPLS = ("auto", "torch", "triton")


def _triton(impl: str, x: Tensor) -> bool:
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    return impl == "triton" or (impl == "auto" and x.is_cuda)


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    plus_one: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The residual sum and its RMS norm.

    Equals::

        x = x + residual                           # where there is a residual
        y = x.float() * rsqrt(x.float().pow(2).mean(-1) + eps)
        normed = weight * y.to(x.dtype)            # plus_one: (y * (1 + weight.float())).to(x.dtype)

    Args:
        x: [N, H]. residual: [N, H] of the same dtype, or None. weight: [H].

    Returns:
        (normed [N, H], x [N, H]); without a residual the second is the argument itself. Never in place.
    """
    if _triton(impl, x):
        from pact_fast.kernels.decode import elementwise

        return elementwise.add_rms_norm(x, residual, weight, eps, plus_one)
    return reference.add_rms_norm(x, residual, weight, eps, plus_one=plus_one)


def qk_norm_rope_write(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    eps: float,
    heads: tuple[int, int],
    plus_one: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Norms of q and k where the family has them, rotary embedding, new keys and values into the cache.

    Args:
        qkv: [N, (Hq + 2 Hkv) D], the heads of q, then k, then v. Rows may be strided.
        q_norm, k_norm: [D] each (a norm a head), or [Hq D] and [Hkv D] (one norm over all heads), or None.
        cos, sin: [P, rot], rot even and at most D, in the dtype of qkv or fp32 (then the rotation is not
            rounded before its end); only the first rot dimensions of a head turn.
        positions: [N] integer, in [0, P).
        slots: [N] int64, no two the same; -1: a padding row, which writes nothing (its q is still returned).
        k_cache, v_cache: [S, Hkv, D] contiguous, written in place.
        heads: (Hq, Hkv).

    Returns:
        q [N, Hq, D].
    """
    num_q, num_kv = heads
    dim = k_cache.shape[-1]
    if qkv.shape[-1] != (num_q + 2 * num_kv) * dim:
        raise ValueError(
            f"qkv must be [N, {(num_q + 2 * num_kv) * dim}] for heads {heads} of {dim}, got {list(qkv.shape)}"
        )
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm must both be given, or neither")
    if q_norm is not None and k_norm is not None:
        sizes = (q_norm.numel(), k_norm.numel())
        if sizes not in ((dim, dim), (num_q * dim, num_kv * dim)):
            raise ValueError(
                f"q_norm and k_norm must have {dim} weights each (a norm a head) or {num_q * dim} and "
                f"{num_kv * dim} (one over all heads), got {sizes[0]} and {sizes[1]}"
            )
    if cos.shape[-1] % 2 or cos.shape[-1] > dim:
        raise ValueError(f"cos and sin must have an even number of columns up to {dim}, got {cos.shape[-1]}")
    args = (qkv, q_norm, k_norm, cos, sin, positions, slots, k_cache, v_cache)
    if _triton(impl, qkv):
        from pact_fast.kernels.decode import elementwise

        return elementwise.qk_norm_rope_write(*args, eps, heads, plus_one)
    return reference.qk_norm_rope_write(*args, eps=eps, heads=heads, plus_one=plus_one)


def silu_mul(gate_up: Tensor, *, impl: str = "auto") -> Tensor:
    """silu(gate) * up of gate_up [N, 2F] = (gate, up) -> [N, F]; silu is rounded before the product."""
    if _triton(impl, gate_up):
        from pact_fast.kernels.decode import elementwise

        return elementwise.gated(gate_up, "silu")
    return reference.silu_mul(gate_up)


def gelu_mul(gate_up: Tensor, *, impl: str = "auto") -> Tensor:
    """gelu(gate) * up with the tanh form of gelu (`gelu_pytorch_tanh`); [N, 2F] -> [N, F]."""
    if _triton(impl, gate_up):
        from pact_fast.kernels.decode import elementwise

        return elementwise.gated(gate_up, "gelu")
    return reference.gelu_mul(gate_up)


def shared_prefix_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tasks: DecodeTasks,
    row_length: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention of one new token a row over the row's path of segments; shared segments are read once.

    Equals, for each row, with K and V the rows of the cache at its path's slots and then at its own segment's
    first `row_length`::

        score = scale * q @ K.T                                    # softcap: c * tanh(score / c)
        out = softmax(score) @ V                                   # window: the last `window` keys only

    Args:
        q: [N, Hq, D], N at most the capacity's rows.
        k_cache, v_cache: [S, Hkv, D]; the row's newest key and value are already in their slot.
        tasks: made by `decode_tasks`, on q's device.
        row_length: [N] int32 or int64 on the device: tokens in the row's own segment, the newest included.
            The query stands at position row_start + row_length - 1.

    Returns:
        [N, Hq, D]; zeros for padding rows.
    """
    _check_heads(q, k_cache)
    if _triton(impl, q):
        from pact_fast.kernels.decode import attention

        return attention.shared_prefix_attention(
            q, k_cache, v_cache, tasks, row_length, scale, window, softcap
        )
    return reference.shared_prefix_attention(
        q, k_cache, v_cache, tasks, row_length, scale=scale, window=window, softcap=softcap
    )


def extend_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    tasks: ExtendTasks,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention of a forest of new tokens (prompts, tool responses) over cached paths and over themselves.

    New token i sees the cached path above its tree, and new token j iff j <= i < subtree_end[j].

    Args:
        q: [T, Hq, D] of the new tokens, in pre-order.
        k_cache, v_cache: [S, Hkv, D]; the new tokens' keys and values are already in their slots.
        slots: [T] int64, every one >= 0: where the new tokens lie.
        tasks: made by `extend_tasks`; keeps what is derived from it, so one serves all layers.

    Returns:
        [T, Hq, D].
    """
    _check_heads(q, k_cache)
    if len(tasks.subtree_end) != q.shape[0]:
        raise ValueError(f"q has {q.shape[0]} tokens, but the tasks were made for {len(tasks.subtree_end)}")
    if _triton(impl, q):
        from pact_fast.kernels.decode import extend

        return extend.extend_attention(q, k_cache, v_cache, slots, tasks, scale, window, softcap)
    return reference.extend_attention(
        q, k_cache, v_cache, slots, tasks, scale=scale, window=window, softcap=softcap
    )


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: Tensor,
    position: Tensor,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row, its log-probability, and whether the row's logits are sound.

    The draw is a function of (logits row, temperature, seed, position): not of N, of the other rows or of the
    device (to within rounding: see reference.py). Temperature 0 is greedy, the lowest index on ties. The
    plain case, without filters, reads the logits once; pass None for a filter that no row uses, because
    filters sort the rows first.

    Args:
        logits: [N, V] fp32, bf16 or fp16; V may be strided by rows. -inf: a token that cannot be drawn.
        temperature: [N] fp32, >= 0.
        top_k: [N] int64, 0 for off. top_p: [N] fp32, 1 for off. min_p: [N] fp32, 0 for off. Or None.
        seed, position: [N] int64; a token's position counts from its sequence's start.

    Returns:
        token [N] int64: -1 where not finite (clamp it before an embedding).
        logprob [N] fp32: log_softmax(logits / temperature)[token] over all tokens, filtered ones too; at
            temperature 0 log_softmax(logits)[token]; NaN where not finite.
        finite [N] bool: False where a logit is NaN or +inf, or all are -inf.
    """
    floor = None
    if any(x is not None for x in (top_k, top_p, min_p)):
        floor = reference.sampling_floor(logits, temperature, top_k, top_p, min_p)
    if _triton(impl, logits):
        from pact_fast.kernels.decode import sampling

        return sampling.sample(logits, temperature, floor, seed, position)
    return reference.sample(logits, temperature, floor, seed, position)


def _check_heads(q: Tensor, k_cache: Tensor) -> None:
    if q.dim() != 3 or q.shape[2] != k_cache.shape[2] or q.shape[1] % k_cache.shape[1]:
        raise ValueError(
            f"q must be [N, Hq, D] with Hq a multiple of the {k_cache.shape[1]} cached heads and D = "
            f"{k_cache.shape[2]}, got {list(q.shape)}"
        )
    if q.dtype != k_cache.dtype:
        raise ValueError(f"q is {q.dtype}, the cache {k_cache.dtype}: they must have the same dtype")


__all__ = [
    "add_rms_norm",
    "extend_attention",
    "gelu_mul",
    "qk_norm_rope_write",
    "sample",
    "shared_prefix_attention",
    "silu_mul",
]
