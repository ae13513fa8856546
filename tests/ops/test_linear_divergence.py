"""linear_divergence: every kind, whole and in buckets, against the formulas of its docstring in fp64."""

import pytest
import torch
from torch.library import opcheck

from pact_fast import linear_divergence
from pact_fast.kernels.lm_head import gemm, reference
from pact_fast.kernels.lm_head.divergence import linear_divergence_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ("reverse_kl", "forward_kl", "jsd")
T, R, H, V = 23, 31, 8, 53


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty is filled with NaN, so reading what was never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


def buckets(p, index):
    chosen = p.gather(1, index)
    rest = p.scatter(1, index, 0.0).sum(-1, keepdim=True)  # not 1 - sum, which loses a small tail
    return torch.cat((chosen, rest), 1)


def oracle(
    hidden,
    weight,
    student,
    teacher,
    *,
    kind,
    beta=0.5,
    top_k=None,
    row_weight=None,
    clip=None,
    temperature=1.0,
    teacher_temperature=1.0,
    softcap=None,
    teacher_hidden=None,
    teacher_weight=None,
    product=lambda x, w: x @ w.T,
):
    """loss [] and D [R] by plain softmax and autograd."""

    def probs(x, w, heat):
        z = product(x, w)
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return (z / heat).softmax(-1)

    p = probs(hidden[student], weight, temperature)
    theirs = hidden if teacher_hidden is None else teacher_hidden
    q = probs(theirs[teacher], weight if teacher_weight is None else teacher_weight, teacher_temperature)
    q = q.detach()
    if top_k is not None and top_k < weight.shape[0]:
        index = q.topk(top_k).indices
        p, q = buckets(p, index), buckets(q, index)
    m = beta * q + (1 - beta) * p
    d = {"reverse_kl": kl(p, q), "forward_kl": kl(q, p), "jsd": beta * kl(q, m) + (1 - beta) * kl(p, m)}[kind]
    w = torch.ones_like(d) if row_weight is None else row_weight
    on = w != 0
    counted = d if clip is None else d.clamp(max=clip)
    return torch.where(on, w * counted, 0.0).sum(), torch.where(on, d, 0.0).detach()


def problem(*, rows=R, hidden_rows=T, vocab=V, dtype=torch.float64, dead=0.3, seed=0):
    """hidden, weight, pairs of rows and row weights; dead rows have hidden states of NaN of their own."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    hidden, weight = draw(hidden_rows, H).to(dtype), draw(vocab, H).to(dtype)
    student, teacher = torch.randint(0, hidden_rows, (2, rows), generator=g)
    row_weight = draw(rows).abs() / 10
    row_weight[torch.rand(rows, generator=g) < dead] = 0.0
    leaves = [t.to(DEVICE).requires_grad_() for t in (hidden, weight)]
    return leaves, [t.to(DEVICE) for t in (student, teacher)], row_weight.to(DEVICE)


def run(function, leaves, pairs, **options):
    loss, rows = function(*leaves, *pairs, **options)
    return [loss.detach(), rows, *torch.autograd.grad(loss, leaves)]


def ours(impl):
    return lambda *args, **options: linear_divergence(*args, **options, return_rows=True, impl=impl)


SETTINGS = {
    "plain": {},
    "temperatures": {"temperature": 0.7, "teacher_temperature": 1.6},
    "softcap": {"softcap": 2.0, "temperature": 1.3},
    "clip": {"clip": 0.4},
    "top_1": {"top_k": 1},
    "top_5": {"top_k": 5, "temperature": 0.8},
    "top_softcap": {"top_k": 7, "softcap": 2.0, "clip": 0.5},
    "top_all": {"top_k": 100},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_value_and_gradients_match_autograd_in_fp64(kind, setting):
    leaves, pairs, row_weight = problem()
    options = SETTINGS[setting] | {"kind": kind, "row_weight": row_weight, "beta": 0.3}
    for got, want in zip(
        run(ours("torch"), leaves, pairs, **options), run(oracle, leaves, pairs, **options), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_no_setting_of_the_tests_is_without_effect():
    leaves, pairs, row_weight = problem()
    losses = [
        oracle(*leaves, *pairs, kind=kind, row_weight=row_weight, beta=0.3, **options)[0].item()
        for kind in KINDS
        for name, options in SETTINGS.items()
        if name != "top_all"
    ]
    assert len({round(x, 9) for x in losses}) == len(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_another_models_hidden_states_and_head(kind):
    (x, w), (student, _), row_weight = problem()
    g = torch.Generator().manual_seed(5)
    theirs, head = torch.randn(9, 6, generator=g).double(), torch.randn(V, 6, generator=g).double()
    theirs, head = theirs.to(DEVICE).requires_grad_(), head.to(DEVICE)
    teacher = torch.randint(0, 9, (R,), generator=g).to(DEVICE)
    options = {"kind": kind, "teacher_hidden": theirs, "teacher_weight": head, "row_weight": row_weight}
    got = run(ours("torch"), (x, w), (student, teacher), **options)
    want = run(oracle, (x, w), (student, teacher), **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    linear_divergence(x, w, student, teacher, **options).backward()
    assert theirs.grad is None


def check(impl, dtype=torch.float32, **given):
    """At most twice the error of the same formulas in plain torch of the same dtype, plus 1e-4."""
    shape = {k: given.pop(k) for k in ("rows", "hidden_rows", "vocab", "dead") if k in given}
    leaves, pairs, row_weight = problem(dtype=dtype, **shape)
    given.setdefault("row_weight", row_weight)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    single = {k: v.float() if torch.is_tensor(v) else v for k, v in given.items()}

    got, want, same = (
        run(ours(impl), leaves, pairs, **single),
        run(oracle, exact, pairs, **given),
        run(oracle, leaves, pairs, **single, product=lambda x, w: (x @ w.T).float()),
    )
    for name, a, b, c in zip(("loss", "rows", "d_hidden", "d_weight"), got, want, same, strict=True):
        if b.numel():
            error, allowed = ((v.double() - b).abs().max().item() for v in (a, c))
            assert error <= 2 * allowed + 1e-4, f"{name}: error {error:.2e}, plain torch {allowed:.2e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_kernels_match_the_oracle(kind, setting):
    pytest.importorskip("triton")
    check("triton", rows=9, hidden_rows=9, kind=kind, beta=0.3, **SETTINGS[setting])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [None, 4])
def test_the_kernels_in_half_precision(kind, top_k):
    pytest.importorskip("triton")
    check("triton", torch.float16, rows=9, hidden_rows=9, kind=kind, top_k=top_k)


@pytest.mark.parametrize(
    ("kind", "vocab", "rows"),
    [*((kind, 2053, 3) for kind in KINDS), *(("jsd", v, 2) for v in (1, 2, 4096, 40_003))],
)
def test_any_vocabulary(kind, vocab, rows):
    """One token, an odd tail, a whole number of tiles, the tile of large vocabularies with a tail."""
    pytest.importorskip("triton")
    for top_k in (None, 3):
        check("triton", rows=rows, hidden_rows=5, vocab=vocab, kind=kind, top_k=top_k, dead=0.0)


@pytest.mark.parametrize("rows", [0, 1, 20])
def test_any_number_of_rows_in_several_chunks(rows, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(gemm, "CPU_BYTES", 1)
    monkeypatch.setattr(gemm, "ALIGN_ROWS", 8)
    monkeypatch.setattr(reference, "CPU_CHUNK_BYTES", 1)
    monkeypatch.setattr(reference, "MIN_ROWS", 7)
    for impl in ("triton", "torch"):
        check(impl, rows=rows, vocab=37, kind="reverse_kl")


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [None, 1, 6])
def test_a_row_paired_with_itself_is_exactly_zero(impl, kind, top_k):
    if impl == "triton":
        pytest.importorskip("triton")
    leaves, (student, _), _ = problem(rows=7, dtype=torch.float32, dead=0.0)
    options = {"kind": kind, "top_k": top_k, "temperature": 0.7, "teacher_temperature": 0.7}
    for value in run(ours(impl), leaves, (student, student), **options):
        assert not value.any()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [None, 4])
def test_rows_of_weight_zero_may_hold_nan(impl, kind, top_k):
    if impl == "triton":
        pytest.importorskip("triton")
    leaves, _, _ = problem(hidden_rows=9, dtype=torch.float32)
    student, teacher = (torch.arange(9, device=DEVICE), torch.arange(9, device=DEVICE).flip(0))
    row_weight = torch.ones(9, device=DEVICE)
    row_weight[[3, 9 - 1 - 3]] = 0.0  # both sides of the rows that row 3 takes part in
    options = {"kind": kind, "top_k": top_k, "row_weight": row_weight}
    want = run(ours(impl), leaves, (student, teacher), **options)
    leaves[0].data[3] = float("nan")
    for got, exact in zip(run(ours(impl), leaves, (student, teacher), **options), want, strict=True):
        assert torch.equal(got, exact)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [None, 2])
def test_logits_of_minus_ten_thousand(impl, kind, top_k):
    """Logits that lie around -1e4, and single ones 1e4 apart, which fp32 softmax turns into zeros."""
    if impl == "triton":
        pytest.importorskip("triton")
    x = torch.tensor([[1.0, 0.5], [1.0, -0.5], [1.0, 1e4]], device=DEVICE)
    w = torch.tensor([[-1e4, 1.0], [-1e4, 0.0], [-1e4, -1.0], [-1e4, 0.25]], device=DEVICE)
    student, teacher = torch.tensor([[0, 1, 2, 0], [1, 0, 0, 2]], device=DEVICE)
    leaves = [x.requires_grad_(), w.requires_grad_()]
    got = run(ours(impl), leaves, (student, teacher), kind=kind, top_k=top_k)
    assert all(torch.isfinite(v).all() for v in got)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    near = [(torch.tensor([0, 1], device=DEVICE), torch.tensor([1, 0], device=DEVICE))]
    for pairs in near:  # the oracle's own logarithms of 0 are infinite on the others
        value = run(ours(impl), leaves, pairs, kind=kind, top_k=top_k)
        want = run(oracle, exact, pairs, kind=kind, top_k=top_k)
        torch.testing.assert_close(value[1].double(), want[1], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(value[2][:, 1].double(), want[2][:, 1], rtol=2e-3, atol=2e-3)
    if kind == "reverse_kl" and top_k is None:  # p is one token, whose log q is 2.5e3 to 1e4 lower
        far = got[1][2]
        z = (exact[0] @ exact[1].T).detach()
        assert float(far) == pytest.approx(float(-z[0].log_softmax(-1)[0]), rel=1e-3)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_each_gradient_is_made_alone(impl):
    if impl == "triton":
        pytest.importorskip("triton")
    leaves, pairs, row_weight = problem(rows=7, dtype=torch.float32)
    _, _, *whole = run(ours(impl), leaves, pairs, row_weight=row_weight.float())
    for wanted in ((0,), (1,), ()):
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i in wanted).grad = None
        loss = linear_divergence(*leaves, *pairs, row_weight=row_weight.float(), impl=impl)
        assert loss.requires_grad == bool(wanted)
        if wanted:
            (2 * loss).backward()
        for i, leaf in enumerate(leaves):
            assert (leaf.grad is not None) == (i in wanted)
            if i in wanted:
                torch.testing.assert_close(leaf.grad, 2 * whole[i])


def test_a_second_backward_says_why_it_fails():
    leaves, pairs, _ = problem()
    loss = linear_divergence(*leaves, *pairs)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_divergence makes its gradient in the forward"):
        loss.backward()


@pytest.mark.parametrize("top_k", [None, 3])
def test_opcheck(top_k):
    leaves, pairs, row_weight = problem(dtype=torch.float32)
    scalars = ("jsd", 0.4, top_k, 0.5, 1.2, 0.8, None)
    opcheck(
        linear_divergence_op, (*leaves, *pairs, None, None, row_weight.float(), *scalars, True, True, "torch")
    )


def test_one_node_of_a_full_graph():
    leaves, pairs, row_weight = problem(dtype=torch.float32)
    calls = []

    def backend(graph, inputs):
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def function(x, w):
        return linear_divergence(x * 1.5, w, *pairs, row_weight=row_weight.float()) * 2

    torch._dynamo.reset()
    got = torch.compile(function, fullgraph=True, backend=backend)(*leaves)
    assert [c for c in calls if "linear_divergence" in c] == ["pact_fast.linear_divergence.default"]
    want = function(*leaves)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_trl_chunked_divergence(kind):
    module = pytest.importorskip("trl.kernels.chunked_divergence")
    (x, w), (student, teacher), _ = problem(dtype=torch.float32)
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.3}[kind]
    theirs, _ = module.ChunkedDivergenceFunction.apply(
        x[student], w, None, x[teacher].detach(), w.detach(), None, beta, 0.8
    )
    options = {"temperature": 0.8, "teacher_temperature": 0.8}
    loss = linear_divergence(
        x, w, student, teacher, kind=kind, beta=beta if kind == "jsd" else 0.5, **options
    )
    torch.testing.assert_close(loss, theirs.sum(), rtol=1e-4, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(loss, (x, w)), torch.autograd.grad(theirs.sum(), (x, w)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_trl_gkd_loss(kind):
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    leaves, (student, teacher), _ = problem()
    x, w = leaves
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.3}[kind]
    theirs = gkd.GKDTrainer.generalized_jsd_loss(
        (x[student] @ w.T)[None], (x[teacher] @ w.T).detach()[None], beta=beta, reduction="sum"
    )
    loss = linear_divergence(x, w, student, teacher, kind=kind, beta=beta if kind == "jsd" else 0.5)
    torch.testing.assert_close(loss, theirs)
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_trl_sdpo_buckets(kind):
    """SDPO's own tail bucket and divergence, over the teacher's top k; its trainer takes the student's."""
    sdpo = pytest.importorskip("trl.experimental.sdpo.loss_utils")
    leaves, (student, teacher), row_weight = problem()
    x, w = leaves
    alpha = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.3}[kind]
    log_p, log_q = ((x[i] @ w.T).log_softmax(-1) for i in (student, teacher))
    log_q = log_q.detach()
    index = log_q.topk(4).indices
    theirs = sdpo.compute_divergence(
        sdpo.add_tail_bucket(log_p.gather(1, index)), sdpo.add_tail_bucket(log_q.gather(1, index)), alpha
    )
    beta = {"beta": alpha} if kind == "jsd" else {}
    loss = linear_divergence(x, w, student, teacher, kind=kind, top_k=4, row_weight=row_weight, **beta)
    torch.testing.assert_close(loss, (theirs * row_weight).sum())


BAD = {
    "kind must be one of": {"kind": "kl"},
    "beta must lie between 0 and 1 for jsd, got 1": {"kind": "jsd", "beta": 1.0},
    "top_k must be an integer >= 1": {"top_k": 0},
    "clip must be finite and >= 0": {"clip": -1.0},
    "student must be in .0, 23., got 23": {"student": torch.full((R,), T)},
    "teacher must be in .0, 23., got -1": {"teacher": torch.full((R,), -1)},
    "teacher must be .31.": {"teacher": torch.zeros(R - 1, dtype=torch.long)},
    "row_weight must be finite and >= 0, got nan": {"row_weight": torch.full((R,), float("nan"))},
    "row_weight requires a gradient": {"row_weight": torch.ones(R, requires_grad=True)},
    "temperature must be finite and > 0": {"temperature": 0.0},
    "teacher_temperature must be finite and > 0": {"teacher_temperature": -1.0},
    "softcap must be finite": {"softcap": 0.0},
    "teacher_weight must be .V, H2. = .53, 6.": {"teacher_hidden": torch.zeros(T, 6)},
    "impl must be": {"impl": "cuda"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    (x, w), (student, teacher), _ = problem()
    x, w, student, teacher = (t.cpu() for t in (x, w, student, teacher))
    with pytest.raises(ValueError, match=message):
        linear_divergence(x, w, **{"student": student, "teacher": teacher} | BAD[message])
