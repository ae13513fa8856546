"""Other projects' losses as oracles: the same inputs give the same loss and gradients, setting by setting.

Both come with the `bench` extra. Their per-sequence masks and advantages become our per-token
weights: that is the whole translation.
"""

import types
from collections import defaultdict

import pytest
import torch

from pact_fast import linear_logprob, linear_pact_loss, linear_token_loss
from tests.ops.test_docs import namespace

B, L, H, V = 4, 6, 8, 31
SETTINGS = {
    "dapo": {"loss_type": "dapo"},
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo", "temperature": 0.7},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "kl": {"loss_type": "dapo", "beta": 0.2},
    "two_sided": {"loss_type": "dapo", "delta": 1.5, "epsilon_high": 0.3},
    "on_policy": {"loss_type": "dapo", "old": False},
}
FULL = {"beta": 0.0, "delta": None, "epsilon_low": 0.2, "epsilon_high": 0.2, "temperature": 1.0, "old": True}


@pytest.fixture(params=SETTINGS)
def case(request):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    hidden, weight = draw(B, L, H).requires_grad_(), draw(V, H).requires_grad_()
    ids = torch.randint(0, V, (B, L), generator=g)
    mask = (torch.arange(L)[None] < torch.tensor([[6], [3], [1], [5]])).float()
    how = FULL | SETTINGS[request.param]
    near = linear_logprob(
        hidden.detach().flatten(0, 1), weight.detach(), ids.flatten(), temperature=how["temperature"]
    )
    old, ref = (near.view(B, L) + 0.6 * draw(B, L) for _ in range(2))
    return types.SimpleNamespace(
        hidden=hidden,
        weight=weight,
        ids=ids,
        mask=mask,
        advantages=draw(B),
        ref=ref,
        old=old if how["old"] else None,
        **{k: v for k, v in how.items() if k != "old"},
    )


def token_weights(case):
    """Each loss type's normalisation as one weight per token."""
    lengths = case.mask.sum(1, keepdim=True)
    scale = {
        "dapo": 1 / case.mask.sum(),
        "bnpo": 1 / case.mask.sum(),
        "grpo": 1 / (B * lengths),
        "dr_grpo": torch.tensor(1 / (B * L)),
    }[case.loss_type]
    return case.mask * scale


def ours(case):
    flat = lambda t: None if t is None else t.flatten()  # noqa: E731
    out = linear_pact_loss(
        case.hidden.flatten(0, 1),
        case.weight,
        flat(case.ids),
        policy_weight=flat(token_weights(case)),
        advantages=flat(case.advantages[:, None].expand(B, L)),
        old_logprobs=flat(case.old),
        ref_logprobs=flat(case.ref) if case.beta else None,
        beta=case.beta,
        dual_clip=case.delta,
        epsilon_low=case.epsilon_low,
        epsilon_high=case.epsilon_high,
        temperature=case.temperature,
    )
    return out.loss, *torch.autograd.grad(out.loss, (case.hidden, case.weight))


def assert_same(case, loss):
    grads = torch.autograd.grad(loss, (case.hidden, case.weight))
    for got, want in zip(ours(case), (loss, *grads), strict=True):
        torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-4, atol=1e-6)


def test_liger_chunked_grpo_loss(case):
    grpo = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")
    function = grpo.LigerFusedLinearGRPOLoss(
        beta=case.beta,
        compiled=False,
        use_ref_model=bool(case.beta),
        epsilon_low=case.epsilon_low,
        epsilon_high=case.epsilon_high,
        loss_type=case.loss_type,
        max_completion_length=L,
        temperature=case.temperature,
        delta=case.delta,
    )
    loss, _ = function(
        case.hidden,
        case.weight,
        case.ids,
        case.mask,
        case.advantages,
        ref_per_token_logps=case.ref if case.beta else None,
        old_per_token_logps=case.old,
    )
    assert_same(case, loss)


def trl_loss(case, **settings):
    """GRPOTrainer's loss of a case; settings replace what it reads of its configuration."""
    pytest.importorskip("datasets")
    trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def logps_and_entropies(*args, **kwargs):
        logits = case.hidden @ case.weight.T / case.temperature
        return selective_log_softmax(logits, case.ids), entropy_from_logits(logits), None

    same = lambda tensor, *args, **kwargs: tensor  # noqa: E731
    read = types.SimpleNamespace(  # what GRPOTrainer._compute_loss reads of a trainer on one process
        _get_per_token_logps_and_entropies=logps_and_entropies,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=case.beta,
        loss_type=case.loss_type,
        epsilon_low=case.epsilon_low,
        epsilon_high=case.epsilon_high,
        max_completion_length=L,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        model=types.SimpleNamespace(training=True),
        args=types.SimpleNamespace(delta=case.delta, use_bias_correction_kl=False, steps_per_generation=1),
        accelerator=types.SimpleNamespace(num_processes=1, gather=same, reduce=same),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    holder = types.SimpleNamespace(**vars(read) | settings)
    inputs = {
        "prompt_ids": case.ids[:, :0],
        "prompt_mask": case.mask[:, :0],
        "completion_ids": case.ids,
        "completion_mask": case.mask,
        "advantages": case.advantages,
        "num_items_in_batch": case.mask.sum(),
        "old_per_token_logps": case.old,
        "ref_per_token_logps": case.ref,
    }
    return trainer.GRPOTrainer._compute_loss(holder, None, inputs)


def test_trl_grpo_loss(case):
    assert_same(case, trl_loss(case))


def documented(case, name, *args, memory="fast", **options):
    """Loss and gradients of the loss function `name` of docs/ops.md."""
    live = case.mask.flatten().nonzero()[:, 0]
    per_row = lambda t: t.expand(B, L).flatten()[live]  # noqa: E731
    make = namespace(f"def {name}")[name]
    loss_fn = make(per_row(case.old), per_row(case.advantages[:, None]), *args, **options)
    x = case.hidden.flatten(0, 1)
    target = case.ids.flatten()[live]
    head = {"row_index": live, "temperature": case.temperature, "memory": memory}
    loss = linear_token_loss(x, case.weight, target, loss_fn, **head).loss
    return loss, *torch.autograd.grad(loss, (case.hidden, case.weight))


def of_trl(case, **settings):
    loss = trl_loss(case, **settings)
    return loss, *torch.autograd.grad(loss, (case.hidden, case.weight))


@pytest.mark.parametrize("case", ["dapo"], indirect=True)
def test_the_documented_cispo_is_trls(case):
    weights = torch.full((int(case.mask.sum()),), 1 / float(case.mask.sum()))
    got = documented(case, "cispo", weights, epsilon_high=1.3)
    for a, b in zip(got, of_trl(case, loss_type="cispo", epsilon_high=1.3), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["dapo"], indirect=True)
@pytest.mark.parametrize("epsilon", [0.2, 0.01])
def test_the_documented_gspo_is_trls(case, epsilon):
    sequence = torch.arange(B)[:, None].expand(B, L).flatten()[case.mask.flatten() > 0]
    got = documented(case, "gspo", sequence, epsilon=epsilon, memory="low")
    bounds = {"epsilon_low": epsilon, "epsilon_high": epsilon}
    want = of_trl(case, loss_type="grpo", importance_sampling_level="sequence", **bounds)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-4, atol=1e-6)
