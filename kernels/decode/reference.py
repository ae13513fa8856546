"""The ops of a decoder layer and of sampling in plain PyTorch: what each Triton kernel here must equal, and
the CPU path of the in-process engine.

Roundings are those of the Hugging Face layers: a norm in fp32, rounded, then times its weight (`plus_one`:
times 1 + weight in fp32, then rounded); a sum with the residual rounded before its norm; rotary products
rounded one by one unless cos and sin are fp32.

Attention is dense pieces merged by lse: a row's shared path, one call for all rows that share it, and its own
keys, one padded call for all rows. Nothing here is differentiable.

Draws: token = argmax_j (l_j - log E_j), l = logits / T, E_j = -log(1 - u_j) exponential (Gumbel-max trick).
u_j is a function of (seed, position, j) alone, by integer arithmetic that is the same on every device:

    key = mix(mix(seed) + position * PHI)  64 bits;  k0, k1 = its low and high half
    x = j * C0 + k0;  x ^= x >> 16;  x *= C1;  x ^= x >> 15;  x ^= k1;  x *= C2;  x ^= x >> 15     32 bits
    u = ((x mod 2^31) + 0.5) / 2^31 in fp32, always below 1

The winner changes only where two candidates are equal to within rounding, so a row's tokens hold still where
another batch moves its logits by 1e-6; a draw by cumulative sums would shift every boundary.

N rows or new tokens, Hq and Hkv heads, D head dim, S slots, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pact_fast.kernels.decode.tasks import (
    FIRST_KEY,
    KEY_COUNT,
    OWN_ROW,
    PAGE_START,
    ROW_COUNT,
    ROW_START,
    DecodeTasks,
    ExtendTasks,
)  # fmt: skip
from pact_fast.kernels.tree_attention.reference import block_plan, tree_attention

FUSED_DEVICES = ("cpu",)  # where torch ships a fused kernel that also returns the log-sum-exp
PADDING = 1.5  # most padded work of a batch of pieces, over the real work

PHI = 0x9E3779B97F4A7C15  # odd constants of splitmix64 and of a 32-bit mixer with low bias
MIX1, MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
C0, C1, C2 = 0x9E3779B1, 0x21F0AAAD, 0x735A2D97
TO_UNIT = 2.0**-31 * (1.0 - 2.0**-24)  # takes 2^31, to which the largest round in fp32, to the fp32 below 1


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _normed(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    """RMS norm over the last dimension of x; `weight` broadcasts."""
    y = F.rms_norm(x.to(_wide(x)), x.shape[-1:], None, eps)
    if plus_one:
        return (y * (1.0 + weight.to(y.dtype))).to(x.dtype)
    return weight * y.to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, plus_one: bool = False
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual) * weight, x + residual), both [N, H]; without a residual (.., x)."""
    if residual is not None:
        x = residual + x
    return _normed(x, weight, eps, plus_one), x


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
) -> Tensor:
    """q [N, Hq, D], normed and rotated; k, normed and rotated, and v go to their slots of the cache."""
    num_q, num_kv = heads
    x = qkv.unflatten(-1, (num_q + 2 * num_kv, -1))  # [N, Hq + 2 Hkv, D]
    dim = x.shape[-1]
    qk = x[:, : num_q + num_kv]
    if q_norm is not None and k_norm is not None:
        if q_norm.numel() == dim:
            weight = torch.cat([q_norm.expand(num_q, dim), k_norm.expand(num_kv, dim)])
            qk = _normed(qk, weight, eps, plus_one)
        else:  # over all heads at once
            q, k = (qk[:, :num_q].flatten(1), qk[:, num_q:].flatten(1))
            q, k = _normed(q, q_norm, eps, plus_one), _normed(k, k_norm, eps, plus_one)
            qk = torch.cat([q, k], 1).unflatten(1, (-1, dim))
    cos, sin = (x.index_select(0, positions)[:, None] for x in (cos, sin))
    qk = _rotated(qk, cos, sin)
    live = slots >= 0
    k, v = qk[:, num_q:], x[:, num_q + num_kv :]
    if not bool(live.all()):
        slots, k, v = slots[live], k[live], v[live]
    k_cache.index_copy_(0, slots, k)
    v_cache.index_copy_(0, slots, v)
    return qk[:, :num_q]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin on the first cos.shape[-1] dimensions."""
    rot = cos.shape[-1]
    turned = x[..., :rot]
    half = rot // 2
    swapped = torch.cat([turned[..., half:], turned[..., :half]], -1)
    signed = torch.cat([-sin[..., :half], sin[..., half:]], -1)
    out = (turned * cos + swapped * signed).to(x.dtype)
    return out if rot == x.shape[-1] else torch.cat([out, x[..., rot:]], -1)


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def gelu_mul(gate_up: Tensor) -> Tensor:
    """With the tanh form of gelu."""
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


class _Piece(NamedTuple):
    """Queries that share a list of keys."""

    queries: list[int] | np.ndarray
    slots: np.ndarray


class _Batch(NamedTuple):
    """Pieces padded to one dense call. Padding repeats a piece's first query or key."""

    queries: Tensor  # [B, Q]
    live: Tensor  # [sum of query counts], index into B * Q
    rows: Tensor  # queries[live]
    slots: Tensor  # [B * K]
    keys: Tensor  # [B] how many of them each piece has
    size: int  # K
    ragged: bool  # some piece has fewer than K keys


def _batches(pieces: Sequence[_Piece], device: torch.device) -> list[_Batch]:
    """Pieces of similar shape together, so that few calls do little more than the real work."""
    order = sorted(
        (p for p in pieces if len(p.queries) and len(p.slots)), key=lambda p: (len(p.slots), len(p.queries))
    )
    groups: list[list[_Piece]] = []
    real = 0
    for piece in order:
        work = len(piece.queries) * len(piece.slots)
        if groups:
            group = groups[-1]
            widest = max(len(piece.queries), *(len(p.queries) for p in group))
            if widest * len(piece.slots) * (len(group) + 1) <= PADDING * (real + work):
                group.append(piece)
                real += work
                continue
        groups.append([piece])
        real = work
    return [_padded(group, device) for group in groups]


def _padded(group: list[_Piece], device: torch.device) -> _Batch:
    wide, size = (max(len(p[i]) for p in group) for i in (0, 1))
    queries = np.empty((len(group), wide), np.int64)
    slots = np.empty((len(group), size), np.int64)
    live = np.zeros((len(group), wide), bool)
    for i, piece in enumerate(group):
        queries[i], slots[i] = piece.queries[0], piece.slots[0]
        queries[i, : len(piece.queries)], slots[i, : len(piece.slots)] = piece.queries, piece.slots
        live[i, : len(piece.queries)] = True
    count = np.array([len(p.slots) for p in group])
    arrays = queries, np.flatnonzero(live), queries[live], slots.ravel(), count
    made = [torch.from_numpy(a).to(device) for a in arrays]
    return _Batch(made[0], made[1], made[2], made[3], made[4], size, bool((count < size).any()))


class _DecodePlan(NamedTuple):
    path: list[_Batch]
    own: Tensor  # [rows, own keys] slots
    rows: Tensor  # rows that have keys


def _decode_plan(tasks: DecodeTasks) -> _DecodePlan:
    """The rows' paths, read back from the tasks."""
    records = tasks.tasks[: int(tasks.count[0])].tolist()
    members, pages = tasks.rows.tolist(), tasks.pages.cpu().numpy().astype(np.int64)
    paths: dict[int, list[int]] = {}
    own: dict[int, np.ndarray] = {}
    seen: dict[int, np.ndarray] = {}
    for i, task in enumerate(records):
        keys = task[FIRST_KEY] + np.arange(task[KEY_COUNT])
        seen[i] = pages[task[PAGE_START] + keys // tasks.page_size] * tasks.page_size + keys % tasks.page_size
        if task[OWN_ROW] >= 0:
            row = task[OWN_ROW]
            own[row] = np.concatenate([own[row], seen[i]]) if row in own else seen[i]
        else:
            for row in members[task[ROW_START] : task[ROW_START] + task[ROW_COUNT]]:
                paths.setdefault(row, []).append(i)
    groups: dict[tuple, list[int]] = {}
    for row, path in paths.items():
        # A segment's other tiles have the same keys: rows are together by what they read, not by tile.
        key = tuple((records[i][PAGE_START], records[i][FIRST_KEY]) for i in path)
        groups.setdefault(key, []).append(row)
    pieces = [_Piece(rows, np.concatenate([seen[i] for i in paths[rows[0]]])) for rows in groups.values()]
    size = max((len(s) for s in own.values()), default=0)
    table = np.zeros((len(own), size), np.int64)
    for i, slots in enumerate(own.values()):
        table[i], table[i, : len(slots)] = slots[0], slots
    device = tasks.buffer.device
    made = torch.from_numpy(table).to(device), torch.tensor(list(own), dtype=torch.int64, device=device)
    return _DecodePlan(_batches(pieces, device), *made)


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
) -> Tensor:
    """softmax(scale q K^T) V of each row over its path and the first `row_length` keys of its own segment."""
    plan = tasks.plan = tasks.plan or _decode_plan(tasks)
    assert isinstance(plan, _DecodePlan)
    heads = q.unflatten(1, (k_cache.shape[1], -1))  # [N, Hkv, G, D]
    rows = plan.rows
    length = row_length[rows][:, None]
    size = min(int(length.max()), plan.own.shape[1]) if len(rows) else 0
    place = torch.arange(size, device=q.device)
    written = place < length
    # Slots past a row's length hold anything, NaN too: read its first instead.
    slots = torch.where(written, plan.own[:, :size], plan.own[:, :1])
    hidden = ~written if window is None else ~written | (place < length - window)
    out, lse = _attend(
        heads[rows][:, None], k_cache, v_cache, slots.flatten(), size, hidden[:, None], scale, softcap
    )
    out, lse = out[:, 0], lse[:, 0]
    if len(rows) < len(q):  # padding rows
        out = torch.zeros(heads.shape, dtype=out.dtype, device=q.device).index_copy_(0, rows, out)
        lse = torch.zeros(heads.shape[:3], dtype=out.dtype, device=q.device).index_copy_(0, rows, lse)
    position = None if window is None else tasks.row_start[: len(q)].long() + row_length - 1
    for batch in plan.path:
        _merge_batch(out, lse, heads, k_cache, v_cache, batch, scale, softcap, position, window)
    return out.to(q.dtype).flatten(1, 2)


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
) -> Tensor:
    """Attention of new tokens over the cached path of their tree and their ancestors among themselves."""
    key = ("torch", q.device, window)
    if key not in tasks.plans:
        bounds = list(zip(tasks.roots, tasks.roots[1:], strict=False))
        pieces = [_Piece(np.arange(a, b), tasks.path_slots(i)) for i, (a, b) in enumerate(bounds)]
        end = torch.from_numpy(tasks.subtree_end.astype(np.int32)).to(q.device)
        position = torch.from_numpy(tasks.positions).to(q.device)
        tasks.plans[key] = _batches(pieces, q.device), block_plan(end, window=window), end, position
    batches, blocks, end, position = tasks.plans[key]
    heads = q.unflatten(1, (k_cache.shape[1], -1))
    if softcap is None:
        o, l = tree_attention(
            q,
            k_cache.index_select(0, slots),
            v_cache.index_select(0, slots),
            end,
            scale=scale,
            window=window,
            plan=blocks,
        )
        out, lse = o.to(l.dtype).view(heads.shape), l.view(heads.shape[:3])
    else:
        rows = torch.arange(len(end), device=q.device)
        hidden = (rows > rows[:, None]) | (rows[:, None] >= end)
        if window is not None:
            hidden |= position[:, None] - position >= window
        o, l = _attend(heads[None], k_cache, v_cache, slots, len(end), hidden[None], scale, softcap)
        out, lse = o[0], l[0]
    for batch in batches:
        _merge_batch(out, lse, heads, k_cache, v_cache, batch, scale, softcap, position, window)
    return out.to(q.dtype).flatten(1, 2)


def _merge_batch(out, lse, heads, k_cache, v_cache, batch: _Batch, scale, softcap, position, window) -> None:
    """Adds a batch of paths, whose keys stand at positions 0, 1, ..., to what its queries have seen:
    out += (o - out) e^l / (e^l + e^lse), in place. Every query has seen a key, its own."""
    hidden = blind = None
    if batch.ragged or window is not None:
        place = torch.arange(batch.size, device=out.device)
        hidden = (place >= batch.keys[:, None])[:, None]  # [B, 1, K]
        if window is not None:
            hidden = hidden | (place <= (position[batch.queries] - window)[:, :, None])
            blind = hidden.all(-1)  # a softmax over nothing
            hidden = hidden & ~blind[..., None]
    o, l = _attend(heads[batch.queries], k_cache, v_cache, batch.slots, batch.size, hidden, scale, softcap)
    if blind is not None:
        l = l.masked_fill(blind[..., None, None], -math.inf)
    o, l = o.flatten(0, 1)[batch.live], l.flatten(0, 1)[batch.live]
    so_far = lse[batch.rows]
    out.index_copy_(0, batch.rows, torch.lerp(out[batch.rows], o, torch.sigmoid(l - so_far)[..., None]))
    lse.index_copy_(0, batch.rows, torch.logaddexp(so_far, l))


def _attend(q, k_cache, v_cache, slots, size: int, hidden, scale: float, softcap) -> tuple[Tensor, Tensor]:
    """q [B, Q, Hkv, G, D], slots [B * size], hidden [B, 1 or Q, size] -> o as q, lse [B, Q, Hkv, G]."""
    batch, queries, kv, group, dim = q.shape
    k, v = (x.index_select(0, slots).view(batch, size, kv, dim).transpose(1, 2) for x in (k_cache, v_cache))
    q = q.permute(0, 2, 1, 3, 4).reshape(batch, kv, queries * group, dim)
    wide = _wide(q)
    if hidden is not None:
        if hidden.shape[1] > 1:
            hidden = hidden.repeat_interleave(group, 1)
        hidden = hidden[:, None]  # [B, 1, Q * G or 1, size]
    if q.device.type in FUSED_DEVICES and softcap is None:
        bias = None
        if hidden is not None:
            bias = torch.zeros(hidden.shape, dtype=wide, device=q.device).masked_fill_(hidden, -math.inf)
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=bias, scale=scale
        )
        o = o.to(wide)
    else:
        score = q.to(wide) @ k.to(wide).mT * scale
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if hidden is not None:
            score = score.masked_fill(hidden, -math.inf)
        lse = score.logsumexp(-1)
        o = (score - lse[..., None]).exp() @ v.to(wide)
    o = o.view(batch, kv, queries, group, dim).permute(0, 2, 1, 3, 4)
    return o, lse.view(batch, kv, queries, group).permute(0, 2, 1, 3)


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def _mix64(x: Tensor) -> Tensor:
    for shift, factor in ((30, MIX1), (27, MIX2)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor, 64)  # wraps
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def uniform_bits(seed: Tensor, position: Tensor, vocab: int) -> Tensor:
    """[N, V] int32, 32 random bits a token and row: a function of (seed, position, token) alone."""
    key = _mix64(_mix64(seed) + position * _signed(PHI, 64))
    k0, k1 = key.to(torch.int32), (key >> 32).to(torch.int32)
    x = torch.arange(vocab, dtype=torch.int32, device=seed.device) * _signed(C0, 32) + k0[:, None]
    x ^= (x >> 16) & 0xFFFF
    x *= C1
    x ^= (x >> 15) & 0x1FFFF
    x ^= k1[:, None]
    x *= C2
    return x.bitwise_xor_((x >> 15) & 0x1FFFF)


def exponential(bits: Tensor) -> Tensor:
    """E = -log(1 - u), exact to fp32 for small u, which is where winners come from."""
    u = (bits & 0x7FFFFFFF).float().add_(0.5).mul_(TO_UNIT)
    return u.neg_().log1p_().neg_()


def sampling_floor(
    logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None
) -> Tensor:
    """[N] fp32: the least logit that may be drawn. Filters in Hugging Face's order: top-k, top-p of what is
    left (the fewest tokens whose probabilities reach top_p), min-p (at least min_p times the largest).
    Equals of the last token kept stay too. Off: top_k 0, top_p 1, min_p 0. Greedy rows: -inf."""
    ordered = logits.float().sort(-1, descending=True).values
    scale = torch.where(temperature > 0, 1.0 / temperature, 1.0)[:, None]
    floor = torch.full_like(scale, -math.inf)
    if top_k is not None:
        k = torch.where(top_k > 0, top_k, ordered.shape[1]).clamp(max=ordered.shape[1])
        floor = ordered.gather(1, k[:, None] - 1)
    if top_p is not None:
        kept = ordered.masked_fill(ordered < floor, -math.inf)
        before = (kept * scale).softmax(-1).cumsum(-1, dtype=torch.float64).roll(1, -1)
        before[:, 0] = 0
        last = (before < top_p[:, None]).sum(-1, keepdim=True).clamp(min=1) - 1
        floor = torch.where(top_p[:, None] < 1, torch.maximum(floor, ordered.gather(1, last)), floor)
    if min_p is not None:
        floor = torch.maximum(floor, ordered[:, :1] + min_p.float().log()[:, None] / scale)
    return torch.where(temperature > 0, floor[:, 0], -math.inf)


def log_exponential(seed: Tensor, position: Tensor, vocab: int) -> Tensor:
    """log E [N, V], which a draw subtracts from its logits."""
    return exponential(uniform_bits(seed, position, vocab)).log_()


def sample(
    logits: Tensor,
    temperature: Tensor,
    floor: Tensor | None,
    seed: Tensor,
    position: Tensor,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(token [N] int64, logprob [N], finite [N] bool); `floor` [N] or None as of `sampling_floor`; `noise` is
    `log_exponential` of seed and position, where it was made ahead."""
    hot = temperature > 0
    l = logits.float() * torch.where(hot, 1.0 / temperature, 1.0)[:, None]
    score = l
    if logits.device.type != "cpu" or bool(hot.any()):
        if noise is None:
            noise = log_exponential(seed, position, logits.shape[1])
        score = l - noise * hot[:, None]
    if floor is not None:
        score = score.masked_fill(logits.float() < floor[:, None], -math.inf)
    token = score.argmax(-1)  # the first of equals
    lse = l.logsumexp(-1)
    finite = lse.isfinite()
    logprob = l.gather(1, token[:, None])[:, 0] - lse
    return torch.where(finite, token, -1), torch.where(finite, logprob, math.nan), finite
