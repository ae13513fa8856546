import pytest
import torch

from pact_fast import linear_cross_entropy, linear_pact_loss
from pact_fast.kernels.lm_head import reference as chunking
from tests.helpers import head_oracle
from tests.helpers.head_oracle import SETTINGS, R, T, V, problem, run


@pytest.mark.parametrize("setting", SETTINGS)
def test_loss_its_parts_and_gradients_match_autograd_in_fp64(setting):
    leaves, args = problem(setting)
    out, grads = run(linear_pact_loss, leaves, args)
    want, want_grads = run(head_oracle.pact_loss, leaves, args)
    for got, expected in zip(
        (out.loss, out.policy_loss, out.sft_loss, out.kl, out.entropy), want, strict=True
    ):
        torch.testing.assert_close(got.detach(), expected.detach(), rtol=1e-10, atol=1e-10)
    for got, expected in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_rows_are_hidden_rows_without_a_row_index():
    leaves, args = problem("all", rows=T)
    args["row_index"] = torch.arange(T)
    _, want = run(linear_pact_loss, leaves, args)
    del args["row_index"]
    _, got = run(linear_pact_loss, leaves, args)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_chunks_do_not_change_the_result(monkeypatch):
    leaves, args = problem("all")
    whole, whole_grads = run(linear_pact_loss, leaves, args)
    monkeypatch.setattr(chunking, "MIN_ROWS", 7)
    monkeypatch.setattr(chunking, "CPU_CHUNK_BYTES", 1)
    out, grads = run(linear_pact_loss, leaves, args)
    for got, want in zip((*out, *grads), (*whole, *whole_grads), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


def test_clip_fraction_counts_rows_whose_clipped_branch_is_active():
    hidden, weight = torch.zeros(6, 2), torch.zeros(4, 2)  # every log-prob is log(1/4)
    lp = torch.full((6,), 0.25).log()
    log_ratio = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.0, 0.5])
    out = linear_pact_loss(
        hidden,
        weight,
        torch.zeros(6, dtype=torch.long),
        policy_weight=torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0]),
        advantages=torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 1.0]),
        old_logprobs=lp - log_ratio,
    )
    assert out.clip_fraction == pytest.approx(2 / 5)  # up on a positive, down on a negative advantage


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), ()])
def test_each_gradient_is_made_alone(wanted):
    leaves, args = problem("all")
    _, want = run(linear_pact_loss, leaves, args)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in wanted)
    out = linear_pact_loss(leaves[0], leaves[1], bias=leaves[2], **args)
    assert out.loss.requires_grad == bool(wanted)
    if wanted:
        out.loss.backward()
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in wanted)
        if i in wanted:
            assert torch.equal(leaf.grad, want[i])


def test_the_incoming_gradient_scales_the_outgoing_one():
    leaves, args = problem("all")
    _, once = run(linear_pact_loss, leaves, args)
    (linear_pact_loss(leaves[0], leaves[1], bias=leaves[2], **args).loss * 3).backward()
    for leaf, g in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * g)


def test_a_second_backward_says_why_it_fails():
    leaves, args = problem("sft")
    loss = linear_pact_loss(leaves[0], leaves[1], **args).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="use linear_logprob"):
        loss.backward()


@pytest.mark.parametrize("rows", [0, 1, 17])
def test_a_fully_masked_batch_is_exactly_zero(rows):
    leaves, args = problem("all", rows=rows, dead=1.1)
    out, grads = run(linear_pact_loss, leaves, args)
    for value in (*out, *grads):
        assert not value.any()


def test_a_dead_row_with_nan_hidden_adds_nothing():
    leaves, args = problem("sft", rows=T, dead=0.0)
    args |= {"row_index": torch.arange(T)}
    args["sft_weight"][3] = 0.0
    _, want = run(linear_pact_loss, leaves, args)
    leaves[0].data[3] = float("nan")
    out, got = run(linear_pact_loss, leaves, args)
    assert torch.isfinite(out.loss)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_an_infinite_ratio_with_zero_advantage_is_no_nan():
    leaves, args = problem("clipped", dead=0.0)
    args["old_logprobs"] -= 1e4
    args["advantages"] *= 0
    out, grads = run(linear_pact_loss, leaves, args)
    assert out.loss == 0
    assert not any(g.any() for g in grads)


def test_first_update_has_ratio_one():
    """old = the policy's own log-probs gives the same loss and gradients as no old log-probs at all."""
    leaves, args = problem("on_policy", dead=0.0)
    first, grads = run(linear_pact_loss, leaves, args)
    again, same = run(linear_pact_loss, leaves, args | {"old_logprobs": first.logprobs})
    assert again.clip_fraction == 0
    for a, b in zip((*first, *grads), (*again, *same), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("masked", [True, False])
def test_cross_entropy_matches_autograd(reduction, masked):
    leaves, args = problem("sft", rows=T)
    x, w, b = leaves
    weights = args["sft_weight"] if masked else None
    target = args["target"] if masked else args["target"].clamp(min=0)
    got = linear_cross_entropy(
        x, w, target, token_weight=weights, reduction=reduction, bias=b, temperature=0.9
    )
    u = torch.ones(T, dtype=torch.float64) if weights is None else weights
    lp, _ = head_oracle.logprob_and_entropy(x, w, target.clamp(min=0), bias=b, temperature=0.9)
    want = {"sum": (u * -lp).sum(), "mean": (u * -lp).sum() / u.sum(), "none": u * -lp}[reduction]
    torch.testing.assert_close(got.detach(), want.detach())
    grads = [torch.autograd.grad(v.sum(), leaves) for v in (got, want)]
    for g, e in zip(*grads, strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 7])
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_cross_entropy_equals_torch(reduction, ignore_index, memory):
    leaves, args = problem("sft", rows=T, dead=0.0)
    x, w, b = leaves
    target = args["target"]
    target[::3] = ignore_index
    logits = torch.nn.functional.linear(x, w, b)
    options = {"reduction": reduction, "ignore_index": ignore_index}
    want = torch.nn.functional.cross_entropy(logits, target, **options)
    got = linear_cross_entropy(x, w, target, bias=b, memory=memory, **options)
    torch.testing.assert_close(got, want)
    for a, e in zip(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(a, e)


def test_cross_entropy_means_over_what_is_not_ignored_as_torch_does_by_default():
    leaves, args = problem("sft", rows=T, dead=0.0)
    x, w, b = leaves
    target = args["target"]
    target[:9] = -100
    want = torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, w, b), target)
    torch.testing.assert_close(linear_cross_entropy(x, w, target, bias=b), want)


def test_cross_entropy_with_token_weights_is_torchs_with_class_weights():
    leaves, args = problem("sft", rows=T, dead=0.0)
    x, w, b = leaves
    classes = torch.rand(V, dtype=torch.float64)
    target = args["target"]
    logits = torch.nn.functional.linear(x, w, b)
    token_weight = classes[target]
    target[::4] = -100
    for reduction in ("mean", "sum", "none"):
        want = torch.nn.functional.cross_entropy(logits, target, weight=classes, reduction=reduction)
        got = linear_cross_entropy(x, w, target, bias=b, token_weight=token_weight, reduction=reduction)
        torch.testing.assert_close(got, want)


def test_cross_entropy_of_ignored_rows_alone_is_zero():
    (x, w, _), _ = problem("sft", rows=T)
    loss = linear_cross_entropy(x, w, torch.full((T,), -100))
    loss.backward()
    assert loss == 0
    assert not x.grad.any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_names_targets_outside_of_the_vocabulary(reduction):
    (x, w, _), args = problem("sft", rows=T, dead=0.0)
    target = args["target"]
    target[:2] = -100
    for wrong in (V, -1, -101):
        target[5] = wrong
        with pytest.raises(ValueError, match=rf"target must be in .0, {V}.* got {wrong}"):
            linear_cross_entropy(x, w, target, reduction=reduction)


def test_cross_entropy_refuses_label_smoothing_by_name():
    (x, w, _), args = problem("sft", rows=T, dead=0.0)
    with pytest.raises(ValueError, match=r"label_smoothing=0.1 is not supported"):
        linear_cross_entropy(x, w, args["target"], label_smoothing=0.1)


BAD = {
    "policy_weight and sft_weight are both None": {
        "policy_weight": None,
        "advantages": None,
        "sft_weight": None,
    },
    "policy_weight and advantages belong together": {"advantages": None},
    "policy_weight must be finite and >= 0, got -1": {"policy_weight": torch.full((R,), -1.0)},
    "sft_weight must be finite and >= 0, got nan": {"sft_weight": torch.full((R,), float("nan"))},
    "target must be in .0, 53. on a row with a weight": {"target": torch.full((R,), 53)},
    "row_index must be in .0, 40., got 40": {"row_index": torch.full((R,), 40)},
    "advantages must be .57.": {"advantages": torch.zeros(R - 1)},
    "old_logprobs requires a gradient": {"old_logprobs": torch.zeros(R, requires_grad=True)},
    "beta=0.1 needs ref_logprobs": {"ref_logprobs": None},
    "dual_clip must be > 1": {"dual_clip": 0.5},
    "epsilon_low must be finite and >= 0": {"epsilon_low": -0.1},
    "sft_weight is on meta": {"sft_weight": torch.zeros(R, device="meta")},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    leaves, args = problem("all", dead=0.0)
    with pytest.raises(ValueError, match=message):
        linear_pact_loss(leaves[0], leaves[1], bias=leaves[2], **args | BAD[message])


def test_options_without_a_policy_term_are_refused():
    leaves, args = problem("sft")
    for extra in ({"beta": 0.1}, {"entropy_coef": 0.1}, {"old_logprobs": args["sft_weight"]}):
        with pytest.raises(ValueError, match="has no effect without policy_weight"):
            linear_pact_loss(leaves[0], leaves[1], **args, **extra)
    with pytest.raises(ValueError, match="reduction must be"):
        linear_cross_entropy(
            leaves[0], leaves[1], args["target"], reduction="avg", row_index=args["row_index"]
        )
    with pytest.raises(ValueError, match="token_weight must have the shape"):
        linear_cross_entropy(leaves[0], leaves[1], args["target"], token_weight=torch.ones(3))
