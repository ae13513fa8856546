"""The comparison with one-by-one log-probs notices each classic mistake of tree packing."""

import pytest
import torch

from pact_fast import Policy, pack_tree, sequence_logprobs
from pact_fast.kernels.tree_attention import reference
from pact_fast.tree.packing import TreePack
from tests.helpers.trees import one_by_one, pact_sequences, tiny_model

SEQUENCES = pact_sequences(2)


def worst_error(model):
    got = sequence_logprobs(Policy(model), SEQUENCES)
    return max((a - b).abs().max().item() for a, b in zip(got, one_by_one(model, SEQUENCES), strict=True))


def mutate_masks(monkeypatch, change):
    """Apply `change(mask)` to every block mask of the reference."""
    original = reference.block_plan

    def mutated(*args, **kwargs):
        plan = original(*args, **kwargs)
        for part in plan.own:
            if part.mask is not None:
                change(part.mask)
        return plan

    monkeypatch.setattr(reference, "block_plan", mutated)


def leak_between_siblings(monkeypatch):
    def change(mask):  # own tokens of the block: plain causal, as if its branches were one sequence
        rows = mask.shape[0]
        mask[:, -rows:] = torch.ones(rows, rows, dtype=torch.bool).tril()

    mutate_masks(monkeypatch, change)


def lost_ancestor(monkeypatch):
    def change(mask):
        mask[1:, 0] = False

    mutate_masks(monkeypatch, change)


def position_off_by_one(monkeypatch):
    forward = Policy._forward

    def shifted(self, input_ids, position_ids, call):
        position = position_ids.clone()
        position[-10:] += 1  # of the last rollout only: RoPE is blind to a shift of everything
        return forward(self, input_ids, position, call)

    monkeypatch.setattr(Policy, "_forward", shifted)


def first_token_predicted_from_the_packed_neighbour(monkeypatch):
    neighbour = property(lambda pack: torch.arange(pack.num_tokens) - 1)
    monkeypatch.setattr(TreePack, "parent", neighbour)


MUTATIONS = [
    leak_between_siblings,
    lost_ancestor,
    position_off_by_one,
    first_token_predicted_from_the_packed_neighbour,
]


@torch.no_grad()
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__)
def test_mutation_is_noticed(family, mutation, monkeypatch):
    model = tiny_model(family)
    assert worst_error(model) < 1e-5
    mutation(monkeypatch)
    assert worst_error(model) > 1e-3


def test_an_unsupervised_first_token_after_a_branch_changes_the_gradient(family):
    """The loss over all tokens but the first of each branch is not the loss: the sum of log-probs notices."""
    model = tiny_model(family)
    pack = pack_tree(SEQUENCES)
    branch_heads = (pack.parent != torch.arange(pack.num_tokens) - 1).nonzero()[:, 0]
    assert len(branch_heads) == len(SEQUENCES) - 1
    want = sum(x.sum() for x in one_by_one(model, SEQUENCES))
    got = sequence_logprobs(model, SEQUENCES)
    torch.testing.assert_close(sum(x.sum() for x in got), want)
    kept = [
        scores[~torch.isin(index[1:], branch_heads)]
        for scores, index in zip(got, pack.token_index, strict=True)
    ]
    assert abs(sum(x.sum() for x in kept) - want) > 0.1
