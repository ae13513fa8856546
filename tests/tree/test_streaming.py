"""A tree run as trunk and parts has the loss and the gradient of the whole tree."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pact_fast import Policy, pack_tree
from pact_fast.config import ObjectiveConfig
from pact_fast.kernels.tree_attention.reference import tree_mask
from pact_fast.train.batch import pack_losses
from pact_fast.train.forwards import plan_forwards
from pact_fast.train.samples import Sample
from pact_fast.tree.streaming import empty_split, split_tree
from tests.helpers.trees import pact_sequences, random_sequences, tiny_model


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([8, 20, 60, 1000]))
def test_parts_see_what_the_whole_tree_sees(seed, budget):
    pack = pack_tree(random_sequences(seed, count=2 + seed % 8))
    split = split_tree(pack, budget)
    users = torch.bincount(torch.cat(pack.token_index), minlength=pack.num_tokens)
    if split is None:
        assert not (users >= 2).any() or (users >= 2).sum() >= budget
        return
    split.trunk.check_positions()
    whole = tree_mask(pack.subtree_end)
    trunk = (users >= 2).nonzero()[:, 0]
    assert torch.equal(tree_mask(split.trunk.subtree_end), whole[trunk][:, trunk])
    seen = [trunk]
    for part in split.parts:
        tokens = torch.full((part.num_tokens,), -1)
        for local, index in zip(part.pack.token_index, pack.token_index, strict=True):
            tokens[local[local >= 0]] = index[local >= 0]
        keys = torch.cat((trunk[part.path], tokens))
        mask = tree_mask(part.pack.subtree_end)[part.path.numel() :]
        assert torch.equal(mask, whole[tokens][:, keys])
        assert whole[tokens].sum() == mask.sum()  # nothing that a token sees is missing
        assert torch.equal(part.pack.input_ids, pack.input_ids[tokens])
        assert torch.equal(part.pack.position_ids, pack.position_ids[tokens])
        seen.append(tokens)
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(pack.num_tokens))


def samples_of(sequences, seed=0):
    """The first is a trace, the others rollouts; each has a loss on all but its first 12 tokens."""
    torch.manual_seed(seed)
    out = []
    for i, ids in enumerate(sequences):
        size = len(ids)
        live = (torch.arange(size) >= 12).float()
        rollout = i > 0
        out.append(
            Sample(
                "one",
                torch.tensor(ids),
                live * rollout / 50,
                torch.randn(size),
                live * (not rollout) / 30,
                engine_logprobs=torch.zeros(size) if rollout else None,
            )
        )
    return out


def run(policy, samples, **options):
    """Loss, gradient by name, and forwards of the packs' tokens."""
    policy.model.zero_grad()
    loss, tokens = 0.0, []
    for pack in pack_losses(policy, samples, ObjectiveConfig(), temperature=0.7, **options):
        pack.loss.backward()
        loss += float(pack.loss.detach())
        tokens.append(pack.num_tokens)
    return loss, {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}, tokens


def assert_same(got, want):
    assert abs(got[0] - want[0]) < 1e-5
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        error = (got[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 1e-5, f"{name}: {error:.1e}"


def adapted(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model


@pytest.mark.parametrize("checkpointing", ["none", "full", "keep_attention"])
@pytest.mark.parametrize("wrap", [lambda m: m, adapted], ids=["full", "lora"])
def test_streamed_gradients_equal_the_whole_trees(family, checkpointing, wrap):
    policy = Policy(wrap(tiny_model(family)), gradient_checkpointing=checkpointing)
    samples = samples_of(pact_sequences(4))
    whole = run(policy, samples, token_budget=10_000)
    assert len(whole[2]) == 1
    streamed = run(policy, samples, token_budget=90, prefix="stream")
    assert len(streamed[2]) > 3
    assert sum(streamed[2]) == whole[2][0]  # every token once
    assert_same(streamed, whole)


@pytest.mark.parametrize("seed", range(6))
def test_any_tree_with_windows_streams_to_the_whole_trees_gradient(seed):
    window = {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 9,
        "use_sliding_window": True,
    }
    policy = Policy(tiny_model("qwen3", **window))
    samples = samples_of(random_sequences(seed, count=9, alphabet=3, longest=30))
    samples = [s for s in samples if len(s.ids) > 1]
    whole = run(policy, samples, token_budget=10_000)
    assert_same(run(policy, samples, token_budget=40, prefix="stream"), whole)
    assert_same(run(policy, samples, token_budget=40, prefix="recompute"), whole)


def test_auto_streams_where_it_saves_work_and_not_where_nothing_is_shared():
    family = Policy(tiny_model("qwen3")).family
    shared = samples_of(pact_sequences(4))
    packs, streamed = plan_forwards(family, shared, 90)
    assert packs == []
    assert len(streamed) == 1
    apart = samples_of([[i] * 40 for i in range(5)])
    packs, streamed = plan_forwards(family, apart, 90)
    assert streamed == []
    assert sorted(i for p in packs for i in p) == list(range(5))
    packs, streamed = plan_forwards(family, shared, 10_000)
    assert streamed == []
    assert len(packs) == 1


def test_a_part_that_forgets_the_trunks_gradient_is_noticed(monkeypatch):
    """Without what the parts send into the trunk's keys and values the gradient is another."""
    from pact_fast.tree import streaming

    policy = Policy(tiny_model("qwen3"))
    samples = samples_of(pact_sequences(4))
    whole = run(policy, samples, token_budget=10_000)
    monkeypatch.setattr(streaming.Prefix, "send_back", lambda self, loss: loss)
    with pytest.raises(AssertionError, match="embed_tokens"):
        assert_same(run(policy, samples, token_budget=90, prefix="stream"), whole)


def test_an_empty_split_runs_and_changes_nothing():
    policy = Policy(tiny_model("qwen3"))
    split = empty_split(2)
    prefix = policy.prefix(split.trunk)
    for part in split.parts:
        (policy.hidden_behind(part, prefix).sum() * 0).backward()
    prefix.send_back(prefix.hidden.sum() * 0).backward()
    assert all(p.grad is None or not p.grad.any() for p in policy.model.parameters())
