import pytest
import torch

from pact_fast import linear_logprob
from pact_fast.kernels.lm_head import reference
from tests.helpers import head_oracle

HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 3.0, "temperature": 1.3},
}


def inputs(n, hidden, vocab, *, bias=True, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, hidden, generator=g, dtype=torch.float64)
    w = torch.randn(vocab, hidden, generator=g, dtype=torch.float64)
    b = torch.randn(vocab, generator=g, dtype=torch.float64) if bias else None
    target = torch.randint(0, vocab, (n,), generator=g)
    return [None if t is None else t.to(dtype).requires_grad_() for t in (x, w, b)], target


@pytest.mark.parametrize("n", [1, 17, 300])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("bias", [True, False])
def test_logprob_entropy_and_their_gradients_match_autograd_in_fp64(n, head, bias):
    (x, w, b), target = inputs(n, 8, 53, bias=bias)
    leaves = [t for t in (x, w, b) if t is not None]
    got = linear_logprob(x, w, target, bias=b, return_entropy=True, **head)
    want = head_oracle.logprob_and_entropy(x, w, target, bias=b, **head)
    weights = torch.randn(2, n, dtype=torch.float64)
    for part in ((1, 0), (0, 1), (1, 1)):
        total = [
            sum(k * (v * m).sum() for k, v, m in zip(part, pair, weights, strict=True))
            for pair in (got, want)
        ]
        grads = [torch.autograd.grad(t, leaves, retain_graph=True) for t in total]
        for g, e in zip(*grads, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-10)
    for g, e in zip(got, want, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_each_gradient_is_made_alone(wanted):
    leaves, target = inputs(17, 8, 53)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in wanted)
    x, w, b = leaves
    linear_logprob(x, w, target, bias=b).sum().backward()
    got = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.requires_grad_().grad = None
    head_oracle.logprob_and_entropy(x, w, target, bias=b)[0].sum().backward()
    for i, (g, leaf) in enumerate(zip(got, leaves, strict=True)):
        assert (g is not None) == (i in wanted)
        if g is not None:
            torch.testing.assert_close(g, leaf.grad, rtol=1e-9, atol=1e-10)


def test_chunks_do_not_change_the_result(monkeypatch):
    (x, w, b), target = inputs(300, 8, 53)

    def run():
        out = linear_logprob(x, w, target, bias=b)
        return [out, *torch.autograd.grad(out.sum(), (x, w, b))]

    whole = run()
    monkeypatch.setattr(reference, "MIN_ROWS", 7)
    monkeypatch.setattr(reference, "CPU_CHUNK_BYTES", 1)
    for got, want in zip(run(), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_no_rows_give_empty_outputs_and_zero_gradients():
    (x, w, b), target = inputs(0, 8, 53)
    out = linear_logprob(x, w, target, bias=b)
    assert out.shape == (0,)
    out.sum().backward()
    assert x.grad.shape == (0, 8)
    assert not w.grad.any()
    assert not b.grad.any()


def test_logits_of_minus_ten_thousand_stay_finite():
    (x, w, _), target = inputs(17, 8, 53, bias=False, dtype=torch.float32)
    bias = torch.full((53,), -1e4, requires_grad=True)
    logprobs, entropy = linear_logprob(x, w, target, bias=bias, return_entropy=True)
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.isfinite(
        torch.cat([t.flatten() for t in (logprobs, entropy, x.grad, w.grad, bias.grad)])
    ).all()


def test_strided_inputs_give_the_same_bits():
    (x, w, _), target = inputs(17, 8, 53, bias=False)
    spread = torch.empty(34, 16, dtype=x.dtype)
    spread[::2, ::2] = x.detach()
    got = linear_logprob(spread[::2, ::2], w.detach().T.contiguous().T, target.repeat_interleave(2)[::2])
    torch.testing.assert_close(got, linear_logprob(x, w, target).detach(), rtol=1e-12, atol=1e-12)


def test_rows_without_an_incoming_gradient_are_skipped_even_if_they_hold_nan():
    (x, w, _), target = inputs(17, 8, 53, bias=False)
    poisoned = x.detach().clone()
    poisoned[5] = float("nan")
    poisoned.requires_grad_()
    keep = torch.arange(17) != 5
    linear_logprob(poisoned, w, target)[keep].sum().backward()
    want = torch.autograd.grad(head_oracle.logprob_and_entropy(x[keep], w, target[keep])[0].sum(), (x, w))
    torch.testing.assert_close(poisoned.grad, want[0])
    torch.testing.assert_close(w.grad, want[1])


def test_a_graph_kept_alive_can_be_used_again():
    (x, w, b), target = inputs(17, 8, 53)
    out = linear_logprob(x, w, target, bias=b).sum()
    first = torch.autograd.grad(out, (x, w, b), retain_graph=True)
    second = torch.autograd.grad(out, (x, w, b))
    for a, c in zip(first, second, strict=True):
        assert torch.equal(a, c)


def test_autocast_casts_what_a_linear_layer_would():
    (x, w, _), target = inputs(17, 8, 53, bias=False, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_logprob(x, w, target)
        want = torch.nn.functional.linear(x, w).float().log_softmax(-1).gather(1, target[:, None])[:, 0]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    got.sum().backward()
    assert x.grad.dtype == w.grad.dtype == torch.float32


BAD = {
    "hidden must be a floating": (TypeError, lambda a: a | {"hidden": a["hidden"].long()}),
    "hidden must be .N, H.": (ValueError, lambda a: a | {"hidden": a["hidden"][None]}),
    "weight must have the dtype": (TypeError, lambda a: a | {"weight": a["weight"].float()}),
    "weight must be .V, H.": (ValueError, lambda a: a | {"weight": a["weight"][:, 1:]}),
    "weight is on meta": (ValueError, lambda a: a | {"weight": a["weight"].to("meta")}),
    "target must be int64": (TypeError, lambda a: a | {"target": a["target"].double()}),
    "target must be .17.": (ValueError, lambda a: a | {"target": a["target"][1:]}),
    "target must be in .0, 53., got 53": (
        ValueError,
        lambda a: a | {"target": torch.full_like(a["target"], 53)},
    ),
    "target must be in .0, 53., got -100": (ValueError, lambda a: a | {"target": a["target"] * 0 - 100}),
    "bias must be .V.": (ValueError, lambda a: a | {"bias": a["bias"][1:]}),
    "bias must be a floating": (TypeError, lambda a: a | {"bias": a["bias"].long()}),
    "temperature must be finite and > 0, got 0": (ValueError, lambda a: a | {"temperature": 0.0}),
    "temperature must be finite and > 0, got -2": (
        ValueError,
        lambda a: a | {"temperature": torch.full((17,), -2.0)},
    ),
    "temperature must be .17.": (ValueError, lambda a: a | {"temperature": torch.ones(16)}),
    "softcap must be finite and > 0": (ValueError, lambda a: a | {"softcap": -1.0}),
    "impl must be": (ValueError, lambda a: a | {"impl": "fast"}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    (x, w, b), target = inputs(17, 8, 53)
    error, spoil = BAD[message]
    with pytest.raises(error, match=message):
        linear_logprob(**spoil({"hidden": x, "weight": w, "target": target, "bias": b}))
