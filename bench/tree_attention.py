"""Tree attention beside FlexAttention, flash-attn, a one-level prefix grouper and SDPA one by one.

In effective TFLOP/s: floating-point operations of the visible pairs of the tree only, whatever a provider
computes beside them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from runner import timings
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence
from tree_common import DEVICE, DTYPE, GPU, SWEEP, Geometry, Rows, free

from pact_fast import TreePack, pack_tree
from pact_fast.ops import tree_attention, tree_plan


@dataclass(frozen=True)
class Provider:
    """`run` returns outputs; output n holds the packed tokens rows[n] (a token may be in several)."""

    run: Callable[[], list[Tensor]]
    rows: list[Tensor]


def sdpa_one_by_one(q, k, v, pack: TreePack) -> Provider:
    """What tree packing replaces: every sequence alone, its prefix again each time."""
    rows = list(pack.token_index)
    return Provider(lambda: [causal(*(x[index] for x in (q, k, v))) for index in rows], rows)


def split_group(pack: TreePack, group: range) -> list[Tensor]:
    """Packed tokens of the longest common prefix of a group of sequences, and of each one's suffix."""
    paths = [pack.token_index[s] for s in group]
    shortest = min(path.numel() for path in paths)
    same = torch.stack([path[:shortest] == paths[0][:shortest] for path in paths]).all(0)
    length = int(same.long().cumprod(0).sum())
    return [paths[0][:length], *(path[length:] for path in paths)]


def prefix_sdpa(q, k, v, pack: TreePack, groups: list[range]) -> Provider:
    """One level of sharing: in each group the common prefix attends to itself once, each suffix to prefix and
    suffix. A prefix that several groups share is computed for each."""
    rows, keys = [], []
    for prefix, *suffixes in (split_group(pack, group) for group in groups):
        rows += [prefix, *suffixes]
        keys += [prefix, *(torch.cat((prefix, suffix)) for suffix in suffixes)]

    def run():
        return [causal(q[own], k[seen], v[seen]) for own, seen in zip(rows, keys, strict=True)]

    return Provider(run, rows)


def prefix_grouper(q, k, v, pack: TreePack, groups: list[range]) -> Provider:
    """The same scheme by the package prefix-grouper: groups are rows of a batch, suffixes are padded."""
    from prefix_grouper import PrefixGrouper

    split = [split_group(pack, group) for group in groups]
    rows = [torch.cat(pieces) for pieces in split]
    index = pad_sequence(rows, batch_first=True)
    grouper = PrefixGrouper([[piece.numel() for piece in pieces] for pieces in split], q.device, "right")
    group = q.shape[1] // k.shape[1]

    def attend(q, k, v, padding):  # padding [B, keys]: True at tokens; queries are the last of the keys
        below = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        mask = below.tril(k.shape[2] - q.shape[2]) & padding[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)

    def run():
        wide = (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
        out = grouper.forward(attend, *(x[index].transpose(1, 2) for x in wide))
        return [o[: r.numel()] for o, r in zip(out, rows, strict=True)]

    return Provider(run, rows)


def causal(q, k, v) -> Tensor:
    """Attention of the last q.shape[0] of the tokens of k and v, [n, Hq, D], by SDPA."""
    group = q.shape[1] // k.shape[1]
    heads = [
        x.transpose(0, 1)[None] for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
    ]
    if q.shape[0] == k.shape[0]:
        out = F.scaled_dot_product_attention(*heads, is_causal=True)
    else:
        out = F.scaled_dot_product_attention(*heads, attn_mask=causal_lower_right(q.shape[0], k.shape[0]))
    return out[0].transpose(0, 1)


def attention_providers(q, k, v, pack: TreePack):
    """Name -> Provider of a pack of `Geometry.sequences("both")`; and why the absent ones are left out."""
    makers: dict[str, Callable[[], Provider]] = {}
    providers, left_out = {}, {}
    everything = torch.arange(pack.num_tokens, device=q.device)
    for impl in ("triton", "flex", "flash") if GPU else ("torch",):
        try:
            plan = tree_plan(pack.subtree_end, impl=impl)
            name = f"{'pact_fast' if impl in ('triton', 'torch') else impl}/{impl}"
            run = lambda plan=plan: [tree_attention(q, k, v, pack.subtree_end, plan=plan)]  # noqa: E731
            makers[name] = lambda run=run: Provider(run, [everything])
        except Exception as error:
            if impl == "triton":
                raise
            left_out[impl] = reason(error)
    group = (len(pack.token_index) - 1) // 2  # x+h and x+y share x; the others c(x, h)
    contexts = [range(group + 1), range(group + 1, 2 * group + 1)]
    makers["prefix_grouper/package"] = lambda: prefix_grouper(q, k, v, pack, contexts)
    makers["torch/sdpa_prefix_once"] = lambda: prefix_sdpa(q, k, v, pack, contexts)
    makers["torch/sdpa_one_by_one"] = lambda: sdpa_one_by_one(q, k, v, pack)
    for name, make in makers.items():
        try:
            provider = make()
            provider.run()  # compiles, and shows at the real size what cannot run
            providers[name] = provider
        except Exception as error:  # a peer's failure is a line of the report, not the end of the run
            if name.startswith("pact_fast"):
                raise
            left_out[name] = reason(error)
    return providers, left_out


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def check_attention(head_dim: int, heads: tuple[int, int]) -> dict[str, str]:
    """Peers that differ from the fp32 reference on a small tree, or in a gradient; RuntimeError for ours."""
    wrong = {}
    sequences, _ = Geometry(200, 120, 90, 3).sequences("both", 1000)
    pack = pack_tree(sequences).to(DEVICE)
    q, k, v = attention_inputs(pack.num_tokens, heads, head_dim)
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    reference = tree_attention(*exact, pack.subtree_end, impl="torch")
    d_out = torch.randn_like(reference)
    want = [reference, *torch.autograd.grad(reference, exact, d_out)]
    for name, provider in attention_providers(q, k, v, pack)[0].items():
        out, rows = provider.run(), torch.cat(provider.rows)
        # A token that several outputs hold takes part once for each: weigh it by how many do.
        count = torch.bincount(rows, minlength=pack.num_tokens)[:, None, None]
        upstream = [(d_out / count)[index].to(DTYPE) for index in provider.rows]
        grads = torch.autograd.grad(out, (q, k, v), upstream)
        full = torch.empty_like(reference).index_copy_(0, rows, torch.cat(out).detach().float())
        for what, got, exact_value in zip(("out", "dq", "dk", "dv"), [full, *grads], want, strict=True):
            error = ((got.float() - exact_value).norm() / exact_value.norm()).item()
            if not error < (2e-2 if GPU else 1e-4):
                wrong[name] = f"gate: {what} is off by {error:.1e}"
                if name.startswith("pact_fast"):
                    raise RuntimeError(f"{name}: {wrong[name]}")
    return wrong


def attention_inputs(tokens: int, heads: tuple[int, int], head_dim: int):
    torch.manual_seed(0)
    shapes = [(tokens, n, head_dim) for n in (heads[0], heads[1], heads[1])]
    return [torch.randn(s, device=DEVICE).to(DTYPE).requires_grad_() for s in shapes]


def bench_attention(seconds: float, least: int = 5) -> Iterator[list[dict[str, object]]]:
    rows = Rows()
    models = {"Qwen3-1.7B": (16, 8), "Qwen3-4B": (32, 8)} if GPU else {"tiny": (4, 2)}
    head_dim, what = (128, "time") if GPU else (32, "processor time")
    for model, heads in models.items():
        wrong = check_attention(head_dim, heads)
        for geometry in SWEEP:
            pack = pack_tree(geometry.sequences("both", 1000)[0]).to(DEVICE)
            q, k, v = attention_inputs(pack.num_tokens, heads, head_dim)
            providers, left_out = attention_providers(q, k, v, pack)
            left_out |= {name: why for name, why in wrong.items() if providers.pop(name, None)}
            flops = 4 * int((pack.position_ids + 1).sum()) * heads[0] * head_dim
            shape = f"{model} {geometry} T={pack.num_tokens}"
            for mode, factor in (("forward", 1.0), ("backward", 2.5), ("forward+backward", 3.5)):
                runs = attention_runs(providers, (q, k, v), mode)
                for name, samples in timings(runs, DEVICE, seconds, least)[what].items():
                    rows.add("tree_attention", name, mode, shape, what, "ms", samples)
                    rates = [factor * flops / ms / 1e9 for ms in samples]
                    rows.add("tree_attention", name, mode, shape, "effective", "TFLOP/s", rates)
            for name, why in left_out.items():
                print(f"tree_attention: {name} left out: {why}")
            yield rows.take()
            del q, k, v, providers
            free()


def attention_runs(providers, inputs, mode: str):
    def forward(run):
        with torch.no_grad():
            return {"out": run()[0]}

    def both(run):
        out = run()
        return dict(enumerate(torch.autograd.grad(out, inputs, [torch.ones_like(o) for o in out])))

    def backward(out, upstream):
        return dict(enumerate(torch.autograd.grad(out, inputs, upstream, retain_graph=True)))

    runs = {}
    for name, provider in providers.items():
        run = provider.run
        if mode == "backward":
            out = run()
            upstream = [torch.ones_like(o) for o in out]
            runs[name] = lambda out=out, upstream=upstream: backward(out, upstream)
        else:
            step = forward if mode == "forward" else both
            runs[name] = lambda run=run, step=step: step(run)
    return runs
