"""csrc/logits_rows.cu: its device functions, run on the host slice by slice, against the reference's rows."""

import pytest
import torch

from pact_fast import linear_pact_loss
from pact_fast.kernels.lm_head import pact_loss as driver
from pact_fast.kernels.lm_head import reference as rows
from pact_fast.kernels.lm_head import rows_cuda
from pact_fast.kernels.lm_head.reference import PolicyLossConfig, RowTerms, row_losses
from tests.helpers.head_oracle import SETTINGS, problem

built = pytest.mark.skipif(rows_cuda.library_path() is None, reason="liblogits_rows.so needs nvcc to build")
DEFAULTS = {"epsilon_low": 0.2, "epsilon_high": 0.2, "dual_clip": None, "beta": 0.0, "entropy_coef": 0.0}


def row_problem(setting, vocab, dtype, rows_=9):
    leaves, args = problem(setting, rows=rows_, hidden_rows=rows_, vocab=vocab, dtype=torch.float32)
    terms = RowTerms(*(args[f].float() if f in args else None for f in RowTerms._fields))
    how = PolicyLossConfig(*(args.get(f, DEFAULTS[f]) for f in PolicyLossConfig._fields))
    logits = (leaves[0].detach() @ leaves[1].detach().T).to(dtype)
    head = (args.get("temperature", 1.0), args.get("softcap"))
    return logits, leaves[2].detach() if head[1] else None, args["target"], terms, how, head


def expected(logits, bias, target, terms, how, temperature, softcap):
    """The reference's row formulas in fp64 on the same logits: logprobs, parts summed, dL/dz."""
    live = terms.live()
    wide = RowTerms(*(None if t is None else t[live].double() for t in terms))
    identity = torch.eye(logits.shape[1], dtype=torch.float64)
    l, tanh_z = rows.row_logits(logits[live].double(), identity, bias, temperature, softcap)
    probs, logprob, entropy, (_, log_sum) = rows.row_statistics(l, target[live])
    sums, grad, grad_entropy = row_losses(logprob, entropy, wide, how)
    dz = rows.logits_gradient(
        probs, l, tanh_z, target[live], log_sum, entropy, grad, grad_entropy, temperature
    )
    logprobs, gradient = torch.zeros(len(target)).double(), torch.zeros(logits.shape).double()
    logprobs[live], gradient[live] = logprob, dz
    return logprobs, sums, gradient


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("vocab", [53, 2056])
def test_device_functions_match_the_reference(setting, dtype, vocab):
    logits, bias, target, terms, how, (temperature, softcap) = row_problem(setting, vocab, dtype)
    want = expected(logits, bias, target, terms, how, temperature, softcap)
    logprobs, parts = torch.full((9,), float("nan")), torch.full((5, 9), float("nan"))
    rows_cuda.rows_loss(
        logits, bias, target, terms, how, logprobs, parts, temperature, softcap, write_grad=True
    )
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    for got, exact in zip((logprobs, parts.sum(1), logits), want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=rounding, atol=2e-5)


@built
def test_gradient_is_left_alone_where_it_is_not_wanted():
    logits, bias, target, terms, how, _ = row_problem("sft", 53, torch.float32)
    before = logits.clone()
    rows_cuda.rows_loss(
        logits, bias, target, terms, how, torch.empty(9), torch.empty(5, 9), 1.0, None, write_grad=False
    )
    assert torch.equal(logits, before)


@built
def test_logits_of_minus_ten_thousand():
    logits, _, target, terms, how, _ = row_problem("entropy", 2056, torch.float32)
    logits -= 1e4
    want = expected(logits, None, target, terms, how, 1.0, None)
    logprobs = torch.empty(9)
    rows_cuda.rows_loss(
        logits, None, target, terms, how, logprobs, torch.empty(5, 9), 1.0, None, write_grad=True
    )
    torch.testing.assert_close(logprobs.double(), want[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logits.double(), want[2], rtol=1e-4, atol=1e-6)


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="the loss has other kernels, not interpreted here")
def test_the_whole_loss_through_the_library(monkeypatch):
    """The driver with the library's row kernel equals the reference, chunks and row_index included."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    monkeypatch.setattr(driver, "rows_loss", lambda impl: rows_cuda.rows_loss)
    leaves, args = problem("all", dtype=torch.float32)
    pair = []
    for impl in ("triton", "torch"):
        out = linear_pact_loss(leaves[0], leaves[1], bias=leaves[2], impl=impl, **args)
        pair.append([*out, *torch.autograd.grad(out.loss, leaves)])
    for got, want in zip(*pair, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_missing_library_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(rows_cuda, "library_path", lambda: None)
    rows_cuda.library.cache_clear()
    with pytest.raises(RuntimeError, match="PACT_FAST_CUDA=1"):
        rows_cuda.library()


def test_cuda_on_cpu_tensors_is_refused():
    leaves, args = problem("sft", dtype=torch.float32)
    with pytest.raises(ValueError, match='impl="cuda" needs CUDA tensors'):
        linear_pact_loss(leaves[0], leaves[1], impl="cuda", **args)
