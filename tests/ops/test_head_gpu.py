"""The LM-head kernels on a GPU at real sizes: bf16, offsets past 2^31, no synchronisation, memory."""

import pytest
import torch
from torch.nn import functional as F

from pact_fast import linear_cross_entropy, linear_divergence, linear_logprob, linear_pact_loss
from pact_fast.kernels.lm_head import gemm
from pact_fast.kernels.lm_head import logprob as logprob_driver

pytestmark = pytest.mark.gpu
V = 151_936


def inputs(n, h, dtype=torch.bfloat16, vocab=V):
    g = torch.Generator("cuda").manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, device="cuda")  # noqa: E731
    x, w = draw(n, h).to(dtype).requires_grad_(), (draw(vocab, h) / h**0.5).to(dtype).requires_grad_()
    return x, w, torch.randint(0, vocab, (n,), generator=g, device="cuda"), draw(n), draw(n).abs() / n


def assert_within(got, plain, exact):
    """At most twice the error of plain torch in the same dtype, plus 1e-4 of the value's scale."""
    for value, same, want in zip(got, plain, exact, strict=True):
        error, allowed = (value.float() - want).abs().max(), 2 * (same.float() - want).abs().max()
        assert error <= allowed + 1e-4 * want.abs().max().clamp(min=1), f"{error:.2e} against {allowed:.2e}"


def plain_loss(x, w, target, advantages, weight):
    lp = (x @ w.T).float().log_softmax(-1).gather(1, target[:, None])[:, 0]
    ratio = (lp - (lp.detach() - 0.1 * advantages)).exp()
    policy = -torch.min(ratio * advantages, ratio.clip(0.8, 1.2) * advantages)
    return (weight * policy).sum()


@pytest.mark.parametrize("vocab", [V, 50_257])
def test_the_loss_in_bf16(vocab):
    x, w, target, advantages, weight = inputs(1500, 512, vocab=vocab)

    def plain(x, w):
        loss = plain_loss(x, w, target, advantages, weight)
        return [loss.detach(), *torch.autograd.grad(loss, (x, w))]

    exact = plain(x.detach().float().requires_grad_(), w.detach().float().requires_grad_())
    lp = linear_logprob(x, w, target).detach()
    out = linear_pact_loss(
        x,
        w,
        target,
        policy_weight=weight,
        advantages=advantages,
        old_logprobs=lp - 0.1 * advantages,
    )
    assert_within([out.loss, *torch.autograd.grad(out.loss, (x, w))], plain(x, w), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_logprobs_and_their_gradients(dtype):
    x, w, target, grad, _ = inputs(1500, 512, dtype)

    def plain(x, w):
        logp = (x @ w.T).float().log_softmax(-1)
        lp, entropy = logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
        return [lp, entropy, *torch.autograd.grad((lp + entropy,), (x, w), (grad,))]

    exact = plain(x.detach().float().requires_grad_(), w.detach().float().requires_grad_())
    lp, entropy = linear_logprob(x, w, target, return_entropy=True)
    got = [lp, entropy, *torch.autograd.grad(lp + entropy, (x, w), grad)]
    assert_within([t.detach() for t in got], [t.detach() for t in plain(x, w)], [t.detach() for t in exact])


def test_offsets_past_two_to_the_31(monkeypatch):
    """One chunk of 16,384 rows holds 2.5e9 logits; the same rows in small chunks must agree."""
    x, w, target, advantages, weight = inputs(16_384, 256)

    def run():
        out = linear_pact_loss(x, w, target, policy_weight=weight, advantages=advantages)
        return [out.logprobs, *torch.autograd.grad(out.loss, (x, w))]

    monkeypatch.setattr(gemm, "logits_budget", lambda like: 1 << 30)
    small = run()
    monkeypatch.setattr(gemm, "logits_budget", lambda like: 8 << 30)
    for got, want in zip(run(), small, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-5)


def test_scoring_past_two_to_the_31(monkeypatch):
    x, w, target, _, _ = inputs(16_384, 256)
    # Logits that bf16 holds exactly: a GEMM of another size may sum in another order.
    x, w = x.detach().sign(), w.detach().sign() / 8
    small = linear_logprob(x, w, target)
    monkeypatch.setattr(logprob_driver, "FORWARD_BYTES", 8 << 30)
    torch.testing.assert_close(linear_logprob(x, w, target), small, rtol=1e-5, atol=1e-5)


def test_named_rows_need_no_synchronisation():
    x, w, target, advantages, weight = inputs(512, 128)
    rows = torch.arange(0, 512, 2, device="cuda")
    terms = {"policy_weight": weight[rows], "advantages": advantages[rows], "row_index": rows}
    linear_pact_loss(x, w, target[rows], **terms).loss.backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_pact_loss(x, w, target[rows], **terms).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_repeated_runs_are_bitwise_equal():
    x, w, target, _, weight = inputs(4096, 256)
    rows = torch.randint(0, 4096, (4096,), device="cuda")

    def run():
        loss = linear_cross_entropy(x, w, target, token_weight=weight, row_index=rows)
        return torch.autograd.grad(loss, (x, w))

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_the_loss_can_be_captured_in_a_cuda_graph():
    x, w, target, _, weight = inputs(300, 128, vocab=5000)
    step = lambda: torch.autograd.grad(linear_cross_entropy(x, w, target, token_weight=weight), (x, w))  # noqa: E731
    want = [g.clone() for g in step()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for got, exact in zip(captured, want, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-2, atol=1e-6)


def extra_memory(run):
    """GiB at the peak of a call, beyond its inputs and the gradients that it returns."""
    run()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = sum(g.numel() * g.element_size() for g in run())
    return (torch.cuda.max_memory_allocated() - before - outputs) / 2**30


def test_logprob_memory_stays_within_its_bound():
    """At most 0.5 GiB beyond inputs and outputs at N=8192, H=4096."""
    x, w, target, grad, _ = inputs(8192, 4096)
    assert extra_memory(lambda: torch.autograd.grad(linear_logprob(x, w, target), (x, w), grad)) <= 0.5


@pytest.mark.parametrize("named", [True, False])
def test_memory_of_the_low_form_and_of_one_chunk(named):
    """memory="low": 0.5 GiB; "fast": one chunk of all rows, whose logits take 2.3 GiB and dW no fp32 sum."""
    x, w, target, advantages, weight = inputs(8192, 4096)
    rows = torch.arange(8192, device="cuda") if named else None
    terms = {"policy_weight": weight, "advantages": advantages, "row_index": rows}
    for memory, bound in (("low", 0.5), ("fast", 2.6)):

        def run(memory=memory):
            return torch.autograd.grad(linear_pact_loss(x, w, target, **terms, memory=memory).loss, (x, w))

        assert extra_memory(run) <= bound, memory


def test_both_forms_of_the_loss_agree():
    x, w, target, advantages, weight = inputs(1500, 512)
    pair = []
    for memory in ("fast", "low"):
        terms = {"policy_weight": weight, "advantages": advantages, "memory": memory}
        out = linear_pact_loss(x, w, target, **terms)
        pair.append([out.loss, out.logprobs, *torch.autograd.grad(out.loss, (x, w))])
    for fast, low in zip(*pair, strict=True):
        torch.testing.assert_close(fast, low, rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("top_k", [None, 20])
def test_divergences_in_bf16(kind, top_k):
    x, w, _, _, weight = inputs(700, 512)
    rows = torch.arange(700, device="cuda")

    def run(x, w, impl):
        options = {"kind": kind, "top_k": top_k, "row_weight": weight, "impl": impl}
        loss = linear_divergence(x, w, rows, rows.roll(1), **options)
        return [loss.detach(), *torch.autograd.grad(loss, (x, w))]

    exact = run(x.detach().float().requires_grad_(), w.detach().float().requires_grad_(), "torch")
    assert_within(run(x, w, "triton"), run(x, w, "torch"), exact)
    loss = linear_divergence(x, w, rows, rows, kind=kind, top_k=top_k)
    assert loss == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, (x, w)))


def test_divergence_memory_stays_within_its_bound():
    """Peak under 6 GiB at N=8192, H=4096: 1.2 GiB of inputs, 1.2 of gradients, logits of one side."""
    x, w, _, _, weight = inputs(8192, 4096)
    rows = torch.arange(8192, device="cuda")
    run = lambda: torch.autograd.grad(  # noqa: E731
        linear_divergence(x, w, rows, rows.roll(1), row_weight=weight), (x, w)
    )
    assert extra_memory(run) <= 3.0


def test_a_target_out_of_range_is_nan_and_never_read():
    """On a device the range is only checked under PACT_FAST_DEBUG=1, whose assert would end the process."""
    x, w, target, _, _ = inputs(64, 64, vocab=1000)
    target[3] = 1000
    lp = linear_logprob(x, w, target)
    assert torch.isnan(lp[3])
    assert torch.isfinite(lp[:3]).all()


def test_cross_entropy_equals_torch_in_fp32():
    x, w, target, _, _ = inputs(512, 128, torch.float32, vocab=8000)
    want = F.cross_entropy(x @ w.T, target)
    torch.testing.assert_close(linear_cross_entropy(x, w, target, reduction="mean"), want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_ops_run_where_their_tensors_are():
    x, w, target, _, weight = inputs(64, 64, vocab=1000)
    there = [t.detach().to("cuda:1").requires_grad_(t.requires_grad) for t in (x, w)]
    pair = []
    for (a, b), device in (((x, w), "cuda:0"), (there, "cuda:1")):
        loss = linear_cross_entropy(a, b, target.to(device), token_weight=weight.to(device))
        logprobs = linear_logprob(a, b, target.to(device))
        pair.append([logprobs, *torch.autograd.grad(loss + logprobs.sum(), (a, b))])
    for here, other in zip(*pair, strict=True):
        torch.testing.assert_close(here, other.to("cuda:0"))
