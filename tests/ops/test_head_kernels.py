"""The Triton kernels of the LM head, interpreted on CPU (compiled on a GPU), against the oracle in fp64.

Tolerance: at most twice the error of the same formulas in plain torch of the same dtype, plus 1e-4. bf16 is
left to the GPU tests: the interpreter misreads it.
"""

import pytest
import torch

from pact_fast import linear_cross_entropy, linear_logprob, linear_pact_loss
from pact_fast.kernels.lm_head import gemm
from pact_fast.kernels.lm_head import logprob as logprob_driver
from tests.helpers import head_oracle
from tests.helpers.head_oracle import SETTINGS, H, problem, run

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty is filled with NaN, so reading what was never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def to_device(leaves, args):
    leaves = [None if t is None else t.detach().to(DEVICE).requires_grad_(t.requires_grad) for t in leaves]
    return leaves, {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in args.items()}


def exactly(leaves, dtype=torch.float64):
    return [None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad) for t in leaves]


def narrowed(args):
    """fp64 arguments as the ops take them, in fp32."""
    return {k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in args.items()}


def assert_close_to_oracle(names, got, want, plain):
    for name, value, exact, same in zip(names, got, want, plain, strict=True):
        ours, torchs = ((v.detach().double() - exact).abs().flatten() for v in (value, same))
        if exact.numel():
            error, allowed = ours.max().item(), 2 * torchs.max().item() + 1e-4
            assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"  # fails for NaN


def check_loss(leaves, args):
    leaves, args = to_device(leaves, args)
    out, grads = run(lambda *a, **k: linear_pact_loss(*a, **k, impl="triton"), leaves, args)
    want, want_grads = run(head_oracle.pact_loss, exactly(leaves), args)
    plain, plain_grads = run(head_oracle.pact_loss, leaves, narrowed(args))
    names = (*out._fields[:5], "d_hidden", "d_weight", "d_bias")
    assert_close_to_oracle(names, (*out[:5], *grads), (*want, *want_grads), (*plain, *plain_grads))


@pytest.mark.parametrize("setting", SETTINGS)
def test_loss_and_gradients_of_every_setting(setting):
    check_loss(*problem(setting, rows=17, hidden_rows=11, dtype=torch.float32))


@pytest.mark.parametrize("setting", ["sft", "all"])
def test_loss_and_gradients_in_half_precision(setting):
    leaves, args = problem(setting, rows=17, hidden_rows=11, dtype=torch.float16)
    leaves[2].data.zero_()  # torch rounds product + bias once, we the product alone: different roundings
    check_loss(leaves, args)


@pytest.mark.parametrize("rows", [0, 1, 30])
def test_any_number_of_rows_in_several_chunks(rows, monkeypatch):
    monkeypatch.setattr(gemm, "CPU_BYTES", 1)  # chunks of 8 rows
    monkeypatch.setattr(gemm, "ALIGN_ROWS", 8)
    check_loss(*problem("sft", rows=rows, hidden_rows=max(rows, 1), vocab=37, dtype=torch.float32, dead=0.5))


@pytest.mark.parametrize(("vocab", "rows"), [(1, 3), (2053, 9), (4096, 3), (151_937, 2)])
def test_any_vocabulary(vocab, rows):
    """One token, an odd tail, a whole number of tiles, one past Qwen's padded size."""
    leaves, args = problem(
        "on_policy", rows=rows, hidden_rows=rows, vocab=vocab, dtype=torch.float32, dead=0.0
    )
    args["advantages"] = args["advantages"] * 10
    check_loss(leaves, args)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), ()])
def test_each_gradient_of_the_loss_alone(wanted):
    leaves, args = to_device(*problem("all", rows=17, hidden_rows=11, dtype=torch.float32))
    _, whole = run(lambda *a, **k: linear_pact_loss(*a, **k, impl="triton"), leaves, args)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in wanted)
    loss = linear_pact_loss(leaves[0], leaves[1], bias=leaves[2], impl="triton", **args).loss
    if wanted:
        (loss * 2).backward()
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in wanted)
        if i in wanted:
            torch.testing.assert_close(leaf.grad, 2 * whole[i])


@pytest.mark.parametrize("named", [True, False])
def test_a_fully_masked_batch_is_exactly_zero(named):
    leaves, args = problem("all", rows=17, hidden_rows=17, dtype=torch.float32, dead=1.1)
    args["row_index"] = torch.arange(17) if named else None
    leaves[0].data.fill_(float("nan"))
    leaves, args = to_device(leaves, args)
    out, grads = run(lambda *a, **k: linear_pact_loss(*a, **k, impl="triton"), leaves, args)
    for value in (*out, *grads):
        assert not value.any()


@pytest.mark.parametrize("named", [True, False])
def test_a_dead_row_with_nan_hidden_adds_nothing(named):
    leaves, args = problem("sft", rows=17, hidden_rows=17, dtype=torch.float32, dead=0.0)
    args["row_index"] = torch.arange(17) if named else None
    args["sft_weight"][3] = 0.0
    leaves, args = to_device(leaves, args)
    function = lambda *a, **k: linear_pact_loss(*a, **k, impl="triton")  # noqa: E731
    _, want = run(function, leaves, args)
    leaves[0].data[3] = float("nan")
    _, got = run(function, leaves, args)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_an_infinite_ratio_with_zero_advantage_is_no_nan():
    leaves, args = to_device(*problem("clipped", rows=5, hidden_rows=5, dtype=torch.float32, dead=0.0))
    args["old_logprobs"] -= 1e4
    args["advantages"] *= 0
    out, grads = run(lambda *a, **k: linear_pact_loss(*a, **k, impl="triton"), leaves, args)
    assert out.loss == 0
    assert not any(g.any() for g in grads)


def test_logits_of_minus_ten_thousand():
    leaves, args = problem("entropy", rows=5, hidden_rows=5, dtype=torch.float32, dead=0.0)
    leaves[2].data.sub_(1e4)
    check_loss(leaves, args)
    check_logprob(leaves, args["target"], {}, rows=args["row_index"])


def test_cross_entropy_of_the_kernels():
    leaves, args = to_device(*problem("sft", rows=17, hidden_rows=17, dtype=torch.float32))
    x, w, b = leaves
    for reduction in ("sum", "mean", "none"):
        pair = []
        for impl in ("triton", "torch"):
            value = linear_cross_entropy(
                x, w, args["target"], token_weight=args["sft_weight"], reduction=reduction, bias=b, impl=impl
            )
            pair.append([value, *torch.autograd.grad(value.sum(), leaves)])
        for got, want in zip(*pair, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def check_logprob(leaves, target, head, rows=None, impl="triton"):
    leaves, _ = to_device(leaves, {})
    target = target.to(DEVICE)
    x, w, b = leaves
    weights = torch.linspace(-1, 1, 2 * target.shape[0], device=DEVICE).view(2, -1)
    weights[:, ::3] = 0.0  # rows without any incoming gradient

    def pick(x):
        return x if rows is None else x[rows.to(DEVICE)]

    def evaluate(function, x, w, b):
        outputs = function(x, w, b)
        total = sum((o * k).sum() for o, k in zip(outputs, weights, strict=True))
        return [*(o.detach() for o in outputs), *torch.autograd.grad(total, (x, w, b))]

    def op(x, w, b):
        return linear_logprob(pick(x), w, target, bias=b, return_entropy=True, impl=impl, **head)

    got = evaluate(op, x, w, b)

    def oracle(x, w, b):
        return head_oracle.logprob_and_entropy(pick(x), w, target, bias=b, **head)

    want = evaluate(oracle, *exactly(leaves))
    same = evaluate(oracle, *leaves)
    names = ("logprobs", "entropy", "d_hidden", "d_weight", "d_bias")
    assert_close_to_oracle(names, got, want, same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head", [{}, {"softcap": 4.0, "temperature": 0.7}], ids=["plain", "softcap"])
def test_logprob_entropy_and_gradients(dtype, head):
    leaves, args = problem("sft", rows=17, hidden_rows=17, dtype=dtype, dead=0.0)
    check_logprob(leaves, args["target"], head)


@pytest.mark.parametrize(("vocab", "rows"), [(1, 3), (2053, 9), (151_937, 2)])
def test_logprob_of_any_vocabulary(vocab, rows):
    leaves, args = problem("sft", rows=rows, hidden_rows=rows, vocab=vocab, dtype=torch.float32, dead=0.0)
    check_logprob(leaves, args["target"], {})


@pytest.mark.parametrize("rows", [1, 30])
def test_logprob_in_several_chunks_and_vocabulary_blocks(rows, monkeypatch):
    monkeypatch.setattr(gemm, "ALIGN_ROWS", 8)
    monkeypatch.setattr(logprob_driver, "FORWARD_BYTES", 1)
    monkeypatch.setattr(logprob_driver, "BACKWARD_BYTES", 1)
    monkeypatch.setattr(logprob_driver, "MIN_BLOCK", 128)
    leaves, args = problem("sft", rows=rows, hidden_rows=rows, vocab=211, dtype=torch.float32, dead=0.0)
    check_logprob(leaves, args["target"], {})


def test_no_rows_give_empty_outputs_and_zero_gradients():
    leaves, _ = to_device(*problem("sft", rows=0, hidden_rows=1, dtype=torch.float32))
    x, w, b = leaves
    out = linear_logprob(x[:0], w, torch.zeros(0, dtype=torch.long, device=DEVICE), bias=b, impl="triton")
    out.sum().backward()
    assert out.shape == (0,)
    assert not any(t.grad.any() for t in leaves)


def test_strided_inputs():
    leaves, args = problem("all", rows=17, hidden_rows=17, dtype=torch.float32)
    wide = torch.randn(17, 2 * H, dtype=torch.float32)
    wide[:, ::2] = leaves[0].detach()
    leaves, args = to_device(leaves, args)
    strided = [wide.to(DEVICE)[:, ::2], leaves[1].detach().T.contiguous().T, leaves[2].detach()]
    spread = {k: v.repeat_interleave(2)[::2] if torch.is_tensor(v) else v for k, v in args.items()}
    function = lambda *a, **k: linear_pact_loss(*a, **k, impl="triton")  # noqa: E731
    _, want = run(function, leaves, args)
    _, got = run(function, [t.requires_grad_() for t in strided], spread)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_head_dim_beyond_one_tile_of_the_row_sum():
    """Rows that share a hidden row are summed over every column tile, and unused hidden rows get 0."""
    from pact_fast.kernels.lm_head import rows as row_kernels

    index = torch.tensor([5, 0, 5, 5, 2], device=DEVICE)
    rows = torch.randn(5, row_kernels.BLOCK_H + 7, device=DEVICE)
    out = torch.full((7, rows.shape[1]), float("nan"), device=DEVICE)
    row_kernels.sum_rows(rows, index, out)
    torch.testing.assert_close(out, torch.zeros_like(out).index_add(0, index, rows))


def test_scaling_in_place():
    from pact_fast.kernels.lm_head import rows as row_kernels

    x = torch.randn(3, 2001, device=DEVICE)
    for factor in (1.0, 0.5, 0.0):
        got = row_kernels.scale_(x.clone(), torch.tensor(factor, device=DEVICE))
        assert torch.equal(got, x * factor)


def test_cpu_tensors_without_the_interpreter_are_refused(monkeypatch):
    leaves, args = problem("sft", rows=3, dtype=torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match='impl="triton" needs CUDA tensors'):
        linear_pact_loss(leaves[0], leaves[1], impl="triton", **args)
    with pytest.raises(TypeError, match='impl="triton" takes bf16, fp16 or fp32'):
        linear_pact_loss(leaves[0].double(), leaves[1].double(), impl="triton", **args)
