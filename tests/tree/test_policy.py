"""A tree pass equals running every sequence alone through the same Hugging Face model."""

import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3NextConfig

from pact_fast.kernels.tree_attention import kept
from pact_fast.tree import fused_layers
from pact_fast.tree.families import check_model
from pact_fast.tree.fused_layers import Kernels
from pact_fast.tree.packing import TreePack, pack_linear, pack_tree
from pact_fast.tree.policy import ATTENTION, Policy
from tests.helpers.trees import (
    assert_gradients_equal,
    one_by_one,
    pact_sequences,
    random_sequences,
    tiny_model,
    weighted_sum,
)


def through_tree(policy, sequences, pack=pack_tree):
    packed = pack(sequences)
    head = policy.head
    logprobs = (policy.hidden(packed) @ head.weight.T).float().log_softmax(-1)
    return [
        logprobs[index[:-1]].gather(1, packed.input_ids[index[1:], None])[:, 0]
        for index in packed.token_index
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_logprobs_and_every_gradient_equal_one_by_one(family, tied, checkpointing):
    model = tiny_model(family, tied=tied)
    policy = Policy(model, gradient_checkpointing=checkpointing)
    for seed in range(3):
        sequences = [s for s in random_sequences(seed) if len(s) > 1] + pact_sequences(seed)
        want = one_by_one(model, sequences)
        got = through_tree(policy, sequences)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
        assert_gradients_equal(model, weighted_sum(got), weighted_sum(want))


@pytest.mark.parametrize("window", [4, 11])
def test_sliding_window_counts_depth_not_packed_distance(window):
    model = tiny_model("qwen2", use_sliding_window=True, sliding_window=window, max_window_layers=1)
    assert "sliding_attention" in model.config.layer_types
    sequences = pact_sequences(3)
    for a, b in zip(through_tree(Policy(model), sequences), one_by_one(model, sequences), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_linear_pack_equals_one_by_one(family):
    model = tiny_model(family)
    sequences = [s for s in random_sequences(5) if len(s) > 1]
    with torch.no_grad():
        for a, b in zip(
            through_tree(Policy(model), sequences, pack_linear), one_by_one(model, sequences), strict=True
        ):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_checkpointing_asked_for_on_the_model_is_honoured_and_restored(family):
    model = tiny_model(family)
    model.activation_checkpointing_enable()
    sequences = pact_sequences(1)
    calls = []
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    weighted_sum(through_tree(Policy(model), sequences)).backward()
    handle.remove()
    assert len(calls) == 2  # forward, and once more in the backward
    assert model.config._attn_implementation == "sdpa"


def test_model_generates_as_before_between_tree_passes(family):
    model = tiny_model(family).eval()
    policy = Policy(model, gradient_checkpointing=True)
    prompt = torch.tensor([[3, 4, 5, 6]])
    before = model.generate(prompt, max_new_tokens=8, do_sample=False)
    loss = policy.hidden(pack_tree(pact_sequences(2))).sum()
    between = model.generate(prompt, max_new_tokens=8, do_sample=False)
    loss.backward()
    assert torch.equal(before, between)
    assert model.config._attn_implementation == "sdpa"
    assert not model.training


def test_attention_is_restored_after_a_failure():
    model = tiny_model("qwen3")

    def fail(*_):
        raise KeyError("in the last layer")

    model.model.layers[-1].register_forward_hook(fail)
    with pytest.raises(KeyError, match="in the last layer"):
        Policy(model).hidden(pack_tree([[1, 2, 3], [1, 2, 4]]))
    assert model.config._attn_implementation == "sdpa"


def test_our_attention_refuses_to_run_without_a_pack():
    model = tiny_model("llama")
    model.config._attn_implementation = ATTENTION
    with pytest.raises(RuntimeError, match="TreePack"):
        model(torch.tensor([[1, 2, 3]]))


def test_positions_that_are_not_depths_are_refused():
    pack = pack_tree([[1, 2, 3], [1, 2, 4]])
    flat = TreePack(pack.input_ids, torch.arange(4), pack.subtree_end, pack.token_index)
    with pytest.raises(ValueError, match=r"position_ids\[3\] = 3, but token 3 has depth 2"):
        Policy(tiny_model("qwen3")).hidden(flat)


def test_a_layer_that_runs_another_attention_is_an_error(monkeypatch):
    model = tiny_model("qwen3")
    attention = model.model.layers[1].self_attn
    original = attention.forward

    def elsewhere(*args, **kwargs):
        attention.config._attn_implementation = "sdpa"
        try:
            return original(*args, **kwargs)
        finally:
            attention.config._attn_implementation = ATTENTION

    monkeypatch.setattr(attention, "forward", elsewhere)
    with pytest.raises(RuntimeError, match="1 of 2 layers ran the tree attention"):
        Policy(model).hidden(pack_tree([[1, 2, 3], [1, 2, 4]]))


def test_attention_dropout_in_training_is_refused():
    model = tiny_model("qwen3", attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"attention_dropout = 0\.1"):
        Policy(model.train()).hidden(pack_tree([[1, 2]]))
    Policy(model.eval()).hidden(pack_tree([[1, 2]]))


def rope(q, k, cos, sin, *_, **__):
    cos, sin = cos[:, None], sin[:, None]

    def turned(x):
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat((-high, low), -1) * sin

    return turned(q), turned(k)


def rms_norm(x, weight, eps):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


PLAIN = Kernels(rms_norm, rope, lambda gate, up: torch.nn.functional.silu(gate) * up)


def assert_fused_equals_plain(name, device):
    """Hidden states, every gradient, with a checkpoint; and the model is as before."""
    model = tiny_model(name, tied=True).to(device)
    modeling = sys.modules[type(model).__module__]
    functions = dict(vars(modeling))
    pack = pack_tree(pact_sequences(1, prompt=8, trace=4, rollout=4, group=1))
    weights, results = None, []
    for kernels, way in (("none", "none"), ("liger", "none"), ("liger", "keep_attention")):
        hidden = Policy(model, kernels=kernels, gradient_checkpointing=way).hidden(pack)
        weights = torch.linspace(-1, 1, hidden.numel(), device=device).view_as(hidden)
        parameters = list(model.model.parameters())
        results.append((hidden, *torch.autograd.grad((hidden * weights).sum(), parameters)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert (a - b).norm() <= 1e-4 * a.norm() + 1e-6
    assert dict(vars(modeling)) == functions
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama", "mistral"])
def test_fused_layers_are_those_of_the_plain_model_and_are_taken_out_again(name, monkeypatch):
    """With the three kernels in plain PyTorch; Triton's interpreter cannot run Liger's."""
    calls = []
    counted = Kernels(*(lambda *a, f=f, **k: calls.append(1) or f(*a, **k) for f in PLAIN))
    monkeypatch.setattr(fused_layers, "liger_kernels", lambda: counted)
    assert_fused_equals_plain(name, "cpu")
    norms = {"qwen3": 4}.get(name, 2)
    per_forward = 2 * (norms + 2) + 1  # two layers of norms, RoPE and SwiGLU, and the final norm
    assert len(calls) >= 2 * per_forward


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama", "mistral"])
def test_ligers_kernels_change_nothing_but_speed(name):
    pytest.importorskip("liger_kernel")
    assert_fused_equals_plain(name, "cuda")


def test_kernels_are_chosen_by_device_package_family_and_compile(monkeypatch):
    model = tiny_model("qwen3")
    assert Policy(model, kernels="auto").kernels is None  # on a CPU
    monkeypatch.setattr(fused_layers, "liger_kernels", lambda: PLAIN)
    with pytest.raises(ValueError, match="choose one of them"):
        Policy(model, kernels="liger", compile="eager")
    with pytest.raises(ValueError, match="auto, liger, none"):
        Policy(model, kernels="triton")


def test_a_forward_that_fails_leaves_the_model_as_it_was(monkeypatch):
    def broken(*_):
        raise ArithmeticError("inside")

    monkeypatch.setattr(fused_layers, "liger_kernels", lambda: PLAIN._replace(silu_mul=broken))
    model = tiny_model("qwen3")
    with pytest.raises(ArithmeticError):
        Policy(model, kernels="liger").hidden(pack_tree([[1, 2]]))
    assert not any("forward" in vars(m) for m in model.modules())
    assert model.model(input_ids=torch.tensor([[1, 2]])).last_hidden_state.isfinite().all()


def test_other_families_and_layers_are_refused():
    with pytest.raises(ValueError, match="gpt2"):
        Policy(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=8)))
    recurrent = torch.nn.Linear(1, 1)
    recurrent.config = Qwen3NextConfig()
    with pytest.raises(ValueError, match="linear_attention"):
        check_model(recurrent)
    with pytest.raises(ValueError, match="dynamic"):
        Policy(
            tiny_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
        )


@pytest.mark.parametrize(("attention", "windowed"), [("torch", False), ("torch", True), ("triton", True)])
def test_kept_attention_has_the_gradients_of_no_checkpoint_and_runs_once(monkeypatch, attention, windowed):
    if attention == "triton":
        pytest.importorskip("pact_fast.kernels.tree_attention.triton")
    layers = {"layer_types": ["sliding_attention", "full_attention"]} if windowed else {}
    window = {"sliding_window": 9, "use_sliding_window": True} if windowed else {}
    overrides = {"head_dim": 16} if attention == "triton" else {}
    model = tiny_model("qwen3", tied=True, **layers, **window, **overrides)
    pack = pack_tree(pact_sequences(3, prompt=14, trace=5, rollout=5, group=2))
    runs = []
    forward = kept._forward
    monkeypatch.setattr(kept, "_forward", lambda *a: runs.append(1) or forward(*a))

    def loss_of(way):
        hidden = Policy(model, attention=attention, gradient_checkpointing=way).hidden(pack)
        return (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum()

    plain, checkpointed = loss_of("none"), loss_of("keep_attention")
    assert plain.item() == pytest.approx(checkpointed.item(), rel=1e-6)
    assert_gradients_equal(model, checkpointed, plain)
    assert len(runs) == model.config.num_hidden_layers  # the recomputation has taken what was kept


def test_what_is_kept_is_freed_by_the_backward(monkeypatch):
    model, seen = tiny_model("qwen3"), []
    attend = kept.tree_attention
    monkeypatch.setattr(kept, "tree_attention", lambda *a, **k: seen.append(a[4]) or attend(*a, **k))
    loss = Policy(model, gradient_checkpointing="keep_attention").hidden(pack_tree(pact_sequences(3))).sum()
    assert sorted(seen[0]) == list(range(model.config.num_hidden_layers))
    loss.backward()
    assert seen[0] == {}


def test_checkpointing_is_one_of_three_ways_and_flex_cannot_keep_its_attention():
    model = tiny_model("qwen3")
    with pytest.raises(ValueError, match="choose from none, full, keep_attention"):
        Policy(model, gradient_checkpointing="some")
    policy = Policy(model, attention="flex", gradient_checkpointing="keep_attention")
    with pytest.raises(ValueError, match="keep_attention"):
        policy.hidden(pack_tree([[1, 2], [1, 3]]))
