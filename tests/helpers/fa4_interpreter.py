"""flash-attn-4's use of masks and block lists in plain PyTorch: walks a Fa4Plan as its kernels do.

Forward: per query block the key blocks of its lists; backward: per key block the query blocks of its lists.
Blocks of `full` are not masked; those of `partial` by the tensors that the compiled mask reads. What is in no
list is not computed.
"""

import torch


def _visible(plan, queries, keys):
    """The masks of kernels/tree_attention/fa4.py, on index tensors."""
    end, *rest = plan.aux
    start = rest[0][keys] if rest else keys
    mask = (start[None] <= queries[:, None]) & (queries[:, None] < end[keys][None])
    if plan.window is not None:
        mask &= rest[1][queries][:, None] < rest[2][keys][None] + plan.window
    return mask


def _blocks(lists, row):
    for kind, masked in ((lists.partial, True), (lists.full, False)):
        for at in range(int(kind[0][0, 0, row])):
            yield int(kind[1][0, 0, row, at]), masked


def _range(block, size, total):
    return torch.arange(block * size, min((block + 1) * size, total))


def _scores(q, k, plan, queries, keys, masked, scale):
    s = torch.einsum("ihd,jhd->hij", q[queries], k[keys]) * scale
    return s.masked_fill(~_visible(plan, queries, keys), -torch.inf) if masked else s


def forward(q, k, v, plan, scale):
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    block_m, block_n = plan.forward.block
    out, lse = torch.full_like(q, torch.nan), q.new_full((q.shape[1], q.shape[0]), torch.nan)
    for i in range(-(-q.shape[0] // block_m)):
        queries = _range(i, block_m, q.shape[0])
        parts = [(_range(j, block_n, k.shape[0]), masked) for j, masked in _blocks(plan.forward, i)]
        s = torch.cat([_scores(q, k, plan, queries, keys, masked, scale) for keys, masked in parts], 2)
        keys = torch.cat([keys for keys, _ in parts])
        lse[:, queries] = s.logsumexp(-1)
        out[queries] = torch.einsum("hij,jhd->ihd", s.softmax(-1), v[keys])
    return out, lse


def backward(d_out, d_lse, q, k, v, out, lse, plan, scale, deterministic=False):
    group, kv_heads = q.shape[1] // k.shape[1], k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    delta = (d_out * out).sum(-1).T - (0 if d_lse is None else d_lse)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    block_m, block_n = plan.backward.block
    for j in range(-(-k.shape[0] // block_n)):
        keys = _range(j, block_n, k.shape[0])
        for i, masked in _blocks(plan.backward, j):
            queries = _range(i, block_m, q.shape[0])
            p = (_scores(q, k, plan, queries, keys, masked, scale) - lse[:, queries, None]).exp()
            dp = torch.einsum("ihd,jhd->hij", d_out[queries], v[keys])
            ds = p * (dp - delta[:, queries, None]) * scale
            dq[queries] += torch.einsum("hij,jhd->ihd", ds, k[keys])
            dk[keys] += torch.einsum("hij,ihd->jhd", ds, q[queries])
            dv[keys] += torch.einsum("hij,ihd->jhd", p, d_out[queries])
    return dq, *(x.unflatten(1, (kv_heads, group)).sum(2) for x in (dk, dv))
