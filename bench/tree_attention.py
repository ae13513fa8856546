"""Tree attention beside FlexAttention, a one-level prefix grouper and SDPA one by one.

Modes: forward, backward, forward+backward. In effective TFLOP/s, too: floating-point operations of the
visible pairs of the tree only, whatever a provider computes beside them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence

from bench.geometry import CPU_SWEEP, GPU_SWEEP, Geometry
from bench.registry import Op, Run, Shape, Unavailable, provider, register
from pact_fast import TreePack, pack_tree
from pact_fast.kernels.tree_attention import fa4
from pact_fast.ops import tree_attention, tree_plan

FORWARD, BACKWARD, TRAIN = "forward", "backward", "forward+backward"
WORK = {FORWARD: 1.0, BACKWARD: 2.5, TRAIN: 3.5}  # of two GEMMs per visible pair: a backward has five


def shapes(sweep: tuple[Geometry, ...], models: dict[str, dict[str, int]]) -> tuple[Shape, ...]:
    """Every model at the main lengths, then at the others."""
    return tuple(
        Shape({"x": g.x, "h": g.h, "y": g.y, "G": g.group, **heads}, why=model)
        for g in sweep
        for model, heads in models.items()
    )


GPU_SHAPES = shapes(
    GPU_SWEEP,
    {"Qwen3-1.7B": {"Hq": 16, "Hkv": 8, "D": 128}, "Qwen3-4B": {"Hq": 32, "Hkv": 8, "D": 128}},
)
CPU_SHAPES = shapes(CPU_SWEEP, {"tiny": {"Hq": 4, "Hkv": 2, "D": 32}})


@dataclass(frozen=True)
class Inputs:
    """q [T, Hq, D], k, v [T, Hkv, D] of a tree of two contexts, and the gradient of the output [T, Hq, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    pack: TreePack
    groups: list[range]  # sequences that share a prefix: x+h and x+y share x; the others c(x, h)
    d_out: Tensor


def make_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    size = shape.sizes
    geometry = Geometry(size["x"], size["h"], size["y"], size["G"])
    pack = pack_tree(geometry.sequences("both", 1000)[0]).to(device)
    g = torch.Generator(device=device).manual_seed(0)

    def draw(heads: str) -> Tensor:
        return torch.randn(pack.num_tokens, size[heads], size["D"], generator=g, device=device).to(dtype)

    q, k, v = (draw(heads).requires_grad_() for heads in ("Hq", "Hkv", "Hkv"))
    group = size["G"]
    return Inputs(q, k, v, pack, [range(group + 1), range(group + 1, 2 * group + 1)], draw("Hq"))


def exact(i: Inputs, mode: str) -> dict[str, Tensor]:
    """The shipped reference in fp64."""
    q, k, v = (x.detach().double().requires_grad_() for x in (i.q, i.k, i.v))
    out = tree_attention(q, k, v, i.pack.subtree_end, impl="torch")
    gradients = torch.autograd.grad(out, (q, k, v), i.d_out.double())
    return {
        **({"out": out.detach()} if mode != BACKWARD else {}),
        **(dict(zip(("dq", "dk", "dv"), gradients, strict=True)) if mode != FORWARD else {}),
    }


class Attend:
    """One run of a provider. Of the outputs of `attend`, number n holds the packed tokens rows[n]; a token
    may be in several, and then its gradient is divided among them."""

    def __init__(self, i: Inputs, mode: str, attend: Callable[[], list[Tensor]], rows: list[Tensor]) -> None:
        self.mode, self.attend, self.rows, self.leaves = mode, attend, rows, (i.q, i.k, i.v)
        count = torch.bincount(torch.cat(rows), minlength=i.pack.num_tokens)[:, None, None]
        self.upstream = [(i.d_out / count).to(i.q.dtype)[index] for index in rows]
        self.kept = attend() if mode == BACKWARD else []  # whose backward alone is timed

    def __call__(self) -> dict[str, Tensor]:
        if self.mode == FORWARD:
            with torch.no_grad():
                return {str(n): out for n, out in enumerate(self.attend())}
        outputs = self.kept or self.attend()
        gradients = torch.autograd.grad(
            outputs, self.leaves, self.upstream, retain_graph=self.mode == BACKWARD
        )
        out = {} if self.mode == BACKWARD else {str(n): out.detach() for n, out in enumerate(outputs)}
        return out | dict(zip(("dq", "dk", "dv"), gradients, strict=True))


def collect(i: Inputs, run: Run, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs by packed token, as `exact` has them."""
    assert isinstance(run, Attend)
    found = {name: value for name, value in outputs.items() if name.startswith("d")}
    if run.mode != BACKWARD:
        pieces = torch.cat([outputs[str(n)] for n in range(len(run.rows))])
        found["out"] = torch.empty_like(i.q).index_copy_(0, torch.cat(run.rows), pieces).detach()
    return found


def flops(i: Inputs, mode: str) -> float:
    pairs = int((i.pack.position_ids + 1).sum())
    return WORK[mode] * 4 * pairs * i.q.shape[1] * i.q.shape[2]


op = register(
    Op(
        "tree_attention",
        (FORWARD, BACKWARD, TRAIN),
        make_inputs,
        exact,
        GPU_SHAPES,
        CPU_SHAPES,
        Shape({"x": 200, "h": 120, "y": 90, "G": 3, "Hq": 4, "Hkv": 2, "D": 128}),
        plain="torch/sdpa_one_by_one",
        collect=collect,
        flops=flops,
    )
)


def ours(impl: str):
    def make(i: Inputs, mode: str) -> Run:
        if (impl == "torch") == i.q.is_cuda:
            raise Unavailable("the CPU's path" if impl == "torch" else "its kernels need a GPU")
        if impl == "fa4" and not fa4.installed():
            raise Unavailable(f"no {fa4.PACKAGE}")
        plan = tree_plan(i.pack.subtree_end, impl=impl)
        everything = torch.arange(i.pack.num_tokens, device=i.q.device)
        attend = lambda: [tree_attention(i.q, i.k, i.v, i.pack.subtree_end, plan=plan)]  # noqa: E731
        return Attend(i, mode, attend, [everything])

    return make


for name in ("pact_fast/fa4", "pact_fast/triton", "pact_fast/torch", "flex/flex"):
    provider(op, name)(ours(name.split("/")[1]))


@provider(op, "torch/sdpa_one_by_one")
def sdpa_one_by_one(i: Inputs, mode: str) -> Run:
    """What tree packing replaces: every sequence alone, its prefix again each time."""
    rows = list(i.pack.token_index)
    return Attend(i, mode, lambda: [causal(i.q[index], i.k[index], i.v[index]) for index in rows], rows)


def split_group(pack: TreePack, group: range) -> list[Tensor]:
    """Packed tokens of the longest common prefix of a group of sequences, and of each one's suffix."""
    paths = [pack.token_index[s] for s in group]
    shortest = min(path.numel() for path in paths)
    same = torch.stack([path[:shortest] == paths[0][:shortest] for path in paths]).all(0)
    length = int(same.long().cumprod(0).sum())
    return [paths[0][:length], *(path[length:] for path in paths)]


@provider(op, "torch/sdpa_prefix_once")
def prefix_sdpa(i: Inputs, mode: str) -> Run:
    """One level of sharing: in each group the common prefix attends to itself once, each suffix to prefix and
    suffix. A prefix that several groups share is computed for each."""
    rows, keys = [], []
    for prefix, *suffixes in (split_group(i.pack, group) for group in i.groups):
        rows += [prefix, *suffixes]
        keys += [prefix, *(torch.cat((prefix, suffix)) for suffix in suffixes)]

    def run():
        return [causal(i.q[own], i.k[seen], i.v[seen]) for own, seen in zip(rows, keys, strict=True)]

    return Attend(i, mode, run, rows)


@provider(op, "prefix_grouper/package")
def prefix_grouper(i: Inputs, mode: str) -> Run:
    """The same scheme by the package prefix-grouper: groups are rows of a batch, suffixes are padded."""
    from prefix_grouper import PrefixGrouper

    split = [split_group(i.pack, group) for group in i.groups]
    rows = [torch.cat(pieces) for pieces in split]
    index = pad_sequence(rows, batch_first=True)
    grouper = PrefixGrouper([[piece.numel() for piece in pieces] for pieces in split], i.q.device, "right")
    group = i.q.shape[1] // i.k.shape[1]

    def attend(q, k, v, padding):  # padding [B, keys]: True at tokens; queries are the last of the keys
        below = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        mask = below.tril(k.shape[2] - q.shape[2]) & padding[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)

    def run():
        wide = (i.q, i.k.repeat_interleave(group, 1), i.v.repeat_interleave(group, 1))
        out = grouper.forward(attend, *(x[index].transpose(1, 2) for x in wide))
        return [o[: r.numel()] for o, r in zip(out, rows, strict=True)]

    return Attend(i, mode, run, rows)


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
