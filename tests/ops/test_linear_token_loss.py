"""linear_token_loss: losses of one's own against plain autograd, and the mistakes they can make."""

import pytest
import torch

from pact_fast import linear_pact_loss, linear_token_loss
from pact_fast.kernels.lm_head import gemm, reference
from tests.helpers import head_oracle
from tests.helpers.head_oracle import R, T, problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["torch", "triton"]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty is filled with NaN, so reading what was never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def case(dtype=torch.float64, rows=R, **shape):
    """hidden, weight, bias; target, row_index and a temperature per row; per-row inputs of a loss."""
    leaves, args = problem("all", dtype=dtype, rows=rows, dead=0.0, **shape)
    g = torch.Generator().manual_seed(3)
    heat = (0.5 + torch.rand(rows, generator=g, dtype=torch.float64)).to(dtype)
    gain = torch.randn(rows, generator=g, dtype=torch.float64).to(dtype)
    leaves = [t.detach().to(DEVICE).requires_grad_() for t in leaves]
    return leaves, *(t.to(DEVICE) for t in (args["target"], args["row_index"], heat, gain))


def focal(gain):
    """A loss nobody wrote a kernel for: it uses the log-prob, the entropy and an input per row."""
    return lambda logprobs, entropy, rows: (
        gain[rows] * (-logprobs * (1 - logprobs.exp()) ** 2 + 0.1 * entropy.square())
    )


def autograd(leaves, target, index, heat, loss_fn, softcap=None):
    x, w, b = leaves
    z = torch.nn.functional.linear(x[index], w, b)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = (z / (heat[:, None] if torch.is_tensor(heat) else heat)).log_softmax(-1)
    lp, entropy = logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    loss = loss_fn(lp, entropy, torch.arange(len(target), device=target.device)).sum()
    return [loss.detach(), lp.detach(), entropy.detach(), *torch.autograd.grad(loss, leaves)]


def ours(leaves, target, index, loss_fn, **options):
    x, w, b = leaves
    out = linear_token_loss(x, w, target, loss_fn, row_index=index, bias=b, **options)
    return [*(t.detach() for t in out), *torch.autograd.grad(out.loss, leaves)]


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("each", [False, True])
def test_a_loss_of_ones_own_matches_autograd_in_fp64(memory, softcap, each):
    leaves, target, index, heat, gain = case()
    heat = heat if each else 0.8
    got = ours(leaves, target, index, focal(gain), temperature=heat, softcap=softcap, memory=memory)
    want = autograd(leaves, target, index, heat, focal(gain), softcap)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_the_kernels_match_autograd(memory, softcap):
    pytest.importorskip("triton")
    leaves, target, index, heat, gain = case(torch.float32, rows=13, hidden_rows=9)
    options = {"temperature": heat, "softcap": softcap, "memory": memory, "impl": "triton"}
    got = ours(leaves, target, index, focal(gain), **options)
    want = autograd(leaves, target, index, heat, focal(gain), softcap)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_chunks_are_hidden_and_every_row_is_asked_for_once(impl, monkeypatch):
    if impl == "triton":
        pytest.importorskip("triton")
    leaves, target, index, _, gain = case(torch.float32, rows=20, hidden_rows=9)
    seen = []

    def loss_fn(logprobs, entropy, rows):
        seen.append(rows)
        return gain[rows] * logprobs

    whole = ours(leaves, target, index, loss_fn, impl=impl)
    first = len(seen)
    monkeypatch.setattr(gemm, "CPU_BYTES", 1)
    monkeypatch.setattr(gemm, "ALIGN_ROWS", 8)
    monkeypatch.setattr(reference, "CPU_CHUNK_BYTES", 1)
    monkeypatch.setattr(reference, "MIN_ROWS", 7)
    for a, b in zip(ours(leaves, target, index, loss_fn, impl=impl), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(seen) - first > 1
    assert torch.equal(torch.cat(seen[first:]).cpu(), torch.arange(20))


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("impl", IMPLS)
def test_the_pact_loss_at_a_temperature_per_row_is_the_sum_of_two_calls(memory, impl):
    if impl == "triton":
        pytest.importorskip("triton")
    leaves, args = problem("all", dtype=torch.float32, rows=15, hidden_rows=9)
    leaves = [t.detach().to(DEVICE).requires_grad_() for t in leaves]
    args = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in args.items()}
    del args["temperature"]
    hot = torch.arange(15, device=DEVICE) % 2 == 0

    def run(rows, heat):
        chosen = {k: v[rows] if torch.is_tensor(v) else v for k, v in args.items()}
        chosen |= {"temperature": heat, "impl": impl, "memory": memory}
        out = linear_pact_loss(leaves[0], leaves[1], bias=leaves[2], **chosen)
        return [*out[:5], *torch.autograd.grad(out.loss, leaves)]

    one = run(torch.ones_like(hot), torch.where(hot, 0.7, 1.0))
    for got, *parts in zip(one, run(hot, 0.7), run(~hot, 1.0), strict=True):
        torch.testing.assert_close(got, sum(parts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_low_memory_gives_the_same_loss_and_gradients(impl):
    if impl == "triton":
        pytest.importorskip("triton")
    leaves, args = problem("all", dtype=torch.float32, rows=15, hidden_rows=9)
    leaves = [t.detach().to(DEVICE).requires_grad_() for t in leaves]
    args = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in args.items()}
    pair = []
    for memory in ("fast", "low"):
        out = linear_pact_loss(leaves[0], leaves[1], bias=leaves[2], memory=memory, impl=impl, **args)
        pair.append([*out, *torch.autograd.grad(out.loss, leaves, retain_graph=memory == "low")])
    again = torch.autograd.grad(out.loss, leaves)  # it may go backward as often as asked
    for a, b in zip(*pair, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(again, pair[1][-3:], strict=True):
        assert torch.equal(a, b)


def test_low_memory_asks_once_with_all_rows(monkeypatch):
    monkeypatch.setattr(reference, "MIN_ROWS", 7)
    monkeypatch.setattr(reference, "CPU_CHUNK_BYTES", 1)
    leaves, target, index, _, gain = case()
    sizes = []

    def coupled(logprobs, entropy, rows):
        sizes.append(len(rows))
        return gain[rows] * (logprobs - logprobs.mean()).exp()

    got = ours(leaves, target, index, coupled, memory="low")
    assert sizes == [R]
    for a, b in zip(got, autograd(leaves, target, index, 1.0, coupled), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("impl", IMPLS)
def test_rows_whose_loss_is_cut_off_may_hold_nan(impl, memory):
    if impl == "triton":
        pytest.importorskip("triton")
    leaves, target, _, _, _ = case(torch.float32, rows=9, hidden_rows=9)
    rows = torch.arange(9, device=DEVICE)
    loss_fn = lambda logprobs, entropy, r: torch.where(r != 4, -logprobs, 0.0)  # noqa: E731
    _, _, _, *want = ours(leaves, target, rows, loss_fn, impl=impl, memory=memory)
    leaves[0].data[4] = float("nan")
    loss, _, _, *got = ours(leaves, target, rows, loss_fn, impl=impl, memory=memory)
    assert torch.isfinite(loss)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_no_rows_give_zero(memory):
    leaves, target, index, _, _ = case()
    out = ours(leaves, target[:0], index[:0], lambda lp, h, rows: -lp, memory=memory)
    assert all(not t.any() for t in out)
    assert out[1].shape == (0,)


def test_a_second_backward_names_the_way_out():
    (x, w, _), target, index, _, _ = case()
    loss = linear_token_loss(x, w, target, lambda lp, h, rows: -lp, row_index=index).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r'linear_token_loss makes its gradient .* memory="low"'):
        loss.backward()


def test_under_torch_compile_the_op_is_a_break_of_the_graph():
    leaves, target, index, _, gain = case(torch.float32)

    def function(x, w, b):
        out = linear_token_loss(x * 1.5, w, target, focal(gain), row_index=index, bias=b)
        return out.loss * 2

    torch._dynamo.reset()
    got, want = torch.compile(function, backend="aot_eager")(*leaves), function(*leaves)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_without_gradients_the_loss_is_only_evaluated():
    (x, w, b), target, index, _, gain = case()
    with torch.no_grad():
        out = linear_token_loss(x, w, target, focal(gain), row_index=index, bias=b)
    assert not out.loss.requires_grad
    want = autograd([x, w, b], target, index, 1.0, focal(gain))
    torch.testing.assert_close(out.loss, want[0])


MISTAKES = {
    "return the losses of its 57 rows as a tensor .57., got torch.float64 ..;": lambda lp, h, r: lp.mean(),
    "as a tensor .57., got float": lambda lp, h, r: 1.0,
    "depend on neither logprobs nor entropy": lambda lp, h, r: lp.detach() * h.detach(),
    "depend on neither": lambda lp, h, r: torch.from_numpy(lp.detach().numpy() * 2),
    "a loss that is not finite at row 3: nan": lambda lp, h, r: torch.where(r == 3, float("nan"), lp),
    "a loss that is not finite at row 5: inf": lambda lp, h, r: lp + torch.where(r == 5, torch.inf, 0.0),
    "a derivative by logprobs that is not finite at row 0": lambda lp, h, r: (lp - lp.detach()).abs().sqrt(),
}


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_in_the_loss_function_is_named(message, memory):
    (x, w, _), target, index, _, _ = case()
    x, w, target, index = (t.detach().cpu() for t in (x, w, target, index))
    with pytest.raises(ValueError, match=f"loss_fn .*{message}"):
        linear_token_loss(x.requires_grad_(), w, target, MISTAKES[message], row_index=index, memory=memory)


def test_a_diverged_model_is_not_the_loss_functions_mistake():
    (x, w, _), target, index, _, _ = case()
    x.data.fill_(float("nan"))
    loss = linear_token_loss(x, w, target, lambda lp, h, rows: -lp, row_index=index).loss
    assert torch.isnan(loss)


BAD = {
    "loss_fn must be a function": (TypeError, {"loss_fn": 3}),
    'memory must be "fast" or "low"': (ValueError, {"memory": "small"}),
    "temperature must be .57.": (ValueError, {"temperature": torch.ones(R - 1)}),
    "temperature must be finite and > 0, got 0": (ValueError, {"temperature": torch.zeros(R)}),
    "temperature must be finite and > 0, got -1": (ValueError, {"temperature": -1.0}),
    "target must be in .0, 53., got 53": (ValueError, {"target": torch.full((R,), 53)}),
    "row_index must be in .0, 40., got 40": (ValueError, {"row_index": torch.full((R,), T)}),
    "target must be .40.": (ValueError, {"row_index": None}),
    "tp_group must be a torch.distributed process group": (TypeError, {"tp_group": "world"}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    (x, w, b), target, index, _, _ = case()
    args = {"hidden": x, "weight": w, "bias": b, "target": target, "row_index": index}
    args = {k: v.detach().cpu() for k, v in args.items()}
    error, change = BAD[message]
    with pytest.raises(error, match=message):
        linear_token_loss(**args | {"loss_fn": lambda lp, h, rows: -lp} | change)


def test_the_pact_loss_is_this_op_of_the_one_formula():
    from pact_fast.objective.losses import PolicyLossConfig, RowTerms, row_losses

    leaves, args = problem("kl")
    config = PolicyLossConfig(beta=args.pop("beta"))
    target, index = args.pop("target"), args.pop("row_index")
    terms = RowTerms(**args)
    live = terms.live().nonzero()[:, 0]

    def loss_fn(logprobs, entropy, rows):
        return row_losses(logprobs, entropy, terms.select(live[rows]), config).total(config)

    x, w, b = leaves
    out = linear_token_loss(x, w, target[live], loss_fn, row_index=index[live], bias=b)
    want, *_ = head_oracle.pact_loss(x, w, target, row_index=index, bias=b, beta=config.beta, **args)
    torch.testing.assert_close(out.loss, want)
    for a, e in zip(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, e)


def test_chunks_of_real_sizes():
    """Of an 80 GB card: one chunk where it fits, else equal ones of whole GEMM tiles; 256 MiB to score."""
    like, card = torch.empty(0, dtype=torch.bfloat16), 85_000_000_000 // gemm.DEVICE_SHARE
    assert gemm.chunk_rows(8192, 151_936, like, card) == 8192
    step = gemm.chunk_rows(32_768, 151_936, like, card)
    assert step % 256 == 0
    assert 2 * step * 151_936 <= card
    assert -(-32_768 // step) == 3
    assert gemm.chunk_rows(8192, 151_936, like, gemm.LOW_BYTES) == 1024
    assert gemm.chunk_rows(0, 151_936, like, card) == 0
