"""A head spread over the ranks of a group: 2 and 4 gloo processes give what one process gives."""

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pact_fast import linear_cross_entropy, linear_logprob, linear_pact_loss, linear_token_loss
from tests.helpers.head_oracle import problem

RANKS, VOCAB = 4, 52


def logprob(leaves, args, **how):
    x, w, b = leaves
    target = args["target"].clamp(min=0)
    out = linear_logprob(x[args["row_index"]], w, target, bias=b, temperature=0.8, return_entropy=True, **how)
    return (out[0].sum() + out[1].square().sum(), *out)


def pact(leaves, args, **how):
    return linear_pact_loss(leaves[0], leaves[1], bias=leaves[2], **args, **how)


def low(leaves, args, **how):
    return pact(leaves, args, memory="low", **how)


def cross_entropy(leaves, args, **how):
    rows = {"row_index": args["row_index"], "token_weight": args["sft_weight"]}
    return (linear_cross_entropy(leaves[0], leaves[1], args["target"], bias=leaves[2], **rows, **how),)


def own(leaves, args, **how):
    target = args["target"].clamp(min=0)
    heat = torch.linspace(0.5, 1.5, len(target), dtype=leaves[0].dtype)
    return linear_token_loss(
        leaves[0],
        leaves[1],
        target,
        lambda lp, entropy, rows: lp.exp() - 0.1 * entropy,
        row_index=args["row_index"],
        temperature=heat,
        bias=leaves[2],
        **how,
    )


def outcome(function, leaves, args, **how):
    out = function(leaves, args, **how)
    return [*(t.detach() for t in out), *torch.autograd.grad(out[0], leaves)]


def compare(rank, group, names, dtype, impl):
    """Everything of one rank's part of `group` beside the whole head in this process."""
    leaves, args = problem("all", vocab=VOCAB, rows=19, hidden_rows=13, dtype=dtype)
    args = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in args.items()}
    width, place = VOCAB // group.size(), group.rank()
    mine = slice(place * width, (place + 1) * width)
    part = [t.detach()[mine] if i else t.detach() for i, t in enumerate(leaves)]
    part = [t.clone().requires_grad_() for t in part]
    close = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for function in names:
        *values, d_hidden, d_weight, d_bias = outcome(function, leaves, args, impl="torch")
        got = outcome(function, part, args, impl=impl, tp_group=group)
        want = (*values, d_hidden, d_weight[mine], d_bias[mine])
        for index, (a, b) in enumerate(zip(got, want, strict=True)):
            torch.testing.assert_close(
                a, b, **close, msg=lambda m, i=index, f=function: f"{f.__name__} {impl} output {i}: {m}"
            )


def far_logits(rank, group):
    """Logits of -1e4, and of one rank 1e4 above the others: no NaN, and the log-probs of one process."""
    torch.manual_seed(0)
    x, w = torch.randn(5, 4), torch.randn(VOCAB, 4)
    bias = torch.full((VOCAB,), -1e4)
    bias[3] = 1e3
    width = VOCAB // group.size()
    mine = slice(group.rank() * width, (group.rank() + 1) * width)
    target = torch.tensor([3, 0, 51, 17, 30])
    want = linear_logprob(x, w, target, bias=bias, return_entropy=True)
    got = linear_logprob(x, w[mine], target, bias=bias[mine], return_entropy=True, tp_group=group)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-3)


def errors(rank, group):
    x, w = torch.randn(3, 4), torch.randn(13 + (group.rank() == 0), 4)
    target = torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="every rank of tp_group must hold equally many rows of weight"):
        linear_logprob(x, w, target, tp_group=group)
    with pytest.raises(ValueError, match=r"target must be in \[0, 52\), got 52"):
        linear_logprob(x, w[:13], target + 52, tp_group=group)


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    everything = (logprob, pact, low, cross_entropy, own)
    for group in (dist.group.WORLD, pairs[rank // 2]):
        compare(rank, group, everything, torch.float64, "torch")
        far_logits(rank, group)
    errors(rank, dist.group.WORLD)
    if os.environ.get("TRITON_INTERPRET") == "1":
        compare(rank, pairs[rank // 2], (logprob, pact, low), torch.float32, "triton")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_two_and_four_ranks_equal_one_process():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (folder,), RANKS)


def test_one_rank_alone_is_the_plain_op():
    leaves, args = problem("all")
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            pair = [outcome(pact, leaves, args, tp_group=group) for group in (None, dist.group.WORLD)]
        finally:
            dist.destroy_process_group()
    for a, b in zip(*pair, strict=True):
        assert torch.equal(a, b)
