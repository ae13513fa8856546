"""Registration of the LM-head ops: opcheck of schema, fakes and autograd; one node under torch.compile."""

import pytest
import torch
from torch.library import opcheck

from pact_fast import linear_logprob, linear_pact_loss
from pact_fast.kernels.lm_head.logprob import linear_logprob_op
from pact_fast.ops.pact_loss import linear_pact_loss_op
from tests.helpers.head_oracle import problem


def single_precision(setting):
    leaves, args = problem(setting, dtype=torch.float32)
    return leaves, {
        k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in args.items()
    }


def test_opcheck_of_the_loss():
    (x, w, b), args = single_precision("all")
    values = [args[k] for k in ("policy_weight", "advantages", "old_logprobs", "ref_logprobs", "sft_weight")]
    scalars = (0.2, 0.2, 2.0, 0.1, 0.05, b, 1.2, torch.full_like(values[0], 0.9), 4.0)
    needs = (True, True, True)
    inputs = (x, w, args["target"], args["row_index"], *values, *scalars, "", 0, 1, *needs, "torch")
    opcheck(linear_pact_loss_op, inputs)


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck_of_the_logprobs(bias):
    (x, w, b), args = single_precision("sft")
    target = args["target"].clamp(min=0)[:40]
    each = torch.full((40,), 0.9) if bias else None
    opcheck(linear_logprob_op, (x, w, target, b if bias else None, 1.2, each, None, "", 0, 1, "torch"))


def compiled(function):
    """`function` as one graph, and the names of the calls in it."""
    calls = []

    def backend(graph, inputs):
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend), calls


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_loss_is_one_node_of_a_full_graph(impl):
    if impl == "triton":
        pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    leaves, args = single_precision("all")
    leaves = [t.detach().to(device).requires_grad_() for t in leaves]
    args = {k: v[:9].to(device) if torch.is_tensor(v) else v for k, v in args.items()}

    def function(x, w, b):
        return linear_pact_loss(x * 1.5, w, bias=b, impl=impl, **args).loss * 2

    graph, calls = compiled(function)
    got = graph(*leaves)
    want = function(*leaves)
    assert [name for name in calls if "linear_pact_loss" in name] == ["pact_fast.linear_pact_loss.default"]
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_the_logprobs_are_one_node_of_a_full_graph():
    leaves, args = single_precision("sft")
    target = args["target"].clamp(min=0)[:40]

    def function(x, w, b):
        logprobs, entropy = linear_logprob(x, w, target, bias=b, return_entropy=True)
        return logprobs.sum() + entropy.square().sum()

    graph, calls = compiled(function)
    got, want = graph(*leaves), function(*leaves)
    assert [name for name in calls if "linear_logprob" in name] == ["pact_fast.linear_logprob.default"]
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b)
