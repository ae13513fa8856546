"""The packed trie holds every sequence as a path, every shared prefix once, and nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pact_fast.kernels.tree_attention import native
from pact_fast.tree.packing import TreePack, pack_linear, pack_tree, plan_packs
from tests.helpers.trees import pact_sequences, random_sequences

TRIES = st.integers(0, 10_000).map(
    lambda seed: random_sequences(seed, count=1 + seed % 9, alphabet=2 + seed % 4)
)


def prefixes(sequences):
    return {tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)}


@settings(max_examples=60, deadline=None)
@given(TRIES)
def test_pack_is_the_trie_of_the_sequences(sequences):
    pack = pack_tree(sequences, impl="numpy")
    pack.check()
    assert pack.num_tokens == len(prefixes(sequences))
    for sequence, index in zip(sequences, pack.token_index, strict=True):
        assert pack.input_ids[index].tolist() == sequence
        assert pack.position_ids[index].tolist() == list(range(len(sequence)))
    # Token i is below token j exactly if the path of j is a prefix of the path of i.
    paths = {}
    for index in pack.token_index:
        for n, i in enumerate(index.tolist()):
            paths[i] = index[: n + 1].tolist()
    for i, path in paths.items():
        for j in range(pack.num_tokens):
            assert (j <= i < pack.subtree_end[j]) == (j in path)


def assert_same(a, b):
    for name in ("input_ids", "position_ids", "subtree_end"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert getattr(a, name).dtype == getattr(b, name).dtype
    assert len(a.token_index) == len(b.token_index)
    assert all(torch.equal(x, y) for x, y in zip(a.token_index, b.token_index, strict=True))


needs_native = pytest.mark.skipif(native.library() is None, reason="csrc/tree_pack.cpp was not built")


@needs_native
@settings(max_examples=300, deadline=None)
@given(TRIES | st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=12))
def test_native_pack_is_identical_to_the_reference(sequences):
    assert_same(pack_tree(sequences, impl="native"), pack_tree(sequences, impl="numpy"))


@needs_native
def test_native_pack_is_identical_on_long_runs_that_branch_late():
    """Runs longer than the block that is compared at once, and branches inside what was one run."""
    stem = torch.arange(2000)
    sequences = [torch.cat((stem[:n], torch.tensor([5, 6, n]))) for n in (255, 256, 257, 1999, 700, 700, 3)]
    assert_same(pack_tree([*sequences, stem], impl="native"), pack_tree([*sequences, stem], impl="numpy"))


def test_native_is_an_error_where_it_was_not_built(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(ValueError, match="libtree_pack"):
        pack_tree([[1]], impl="native")
    assert pack_tree([[1]]).num_tokens == 1


def test_first_sequence_comes_first_and_children_in_order_of_use():
    pack = pack_tree([[1, 9, 9], [1, 5], [1, 9, 2], [0]])
    assert pack.input_ids.tolist() == [1, 9, 9, 2, 5, 0]
    assert pack.subtree_end.tolist() == [5, 4, 3, 4, 5, 6]
    assert pack.parent.tolist() == [-1, 0, 1, 1, 0, -1]
    assert (pack.num_tokens, pack.num_sequence_tokens) == (6, 9)


def test_empty_single_duplicate_and_prefix_sequences():
    pack = pack_tree([[], [7], [7], [7, 8], []])
    pack.check()
    assert pack.input_ids.tolist() == [7, 8]
    assert [index.tolist() for index in pack.token_index] == [[], [0], [0], [0, 1], []]
    nothing = pack_tree([])
    nothing.check()
    assert nothing.num_tokens == 0
    assert nothing.token_index == ()


def test_tensors_lists_and_arrays_give_the_same_pack():
    sequences = pact_sequences(0)
    a = pack_tree(sequences)
    b = pack_tree([torch.tensor(s, dtype=torch.int32) for s in sequences])
    assert all(
        torch.equal(getattr(a, n), getattr(b, n)) for n in ("input_ids", "position_ids", "subtree_end")
    )


def test_linear_pack_shares_nothing():
    sequences = [[1, 2, 3], [1, 2], [], [1]]
    pack = pack_linear(sequences)
    pack.check()
    assert pack.input_ids.tolist() == [1, 2, 3, 1, 2, 1]
    assert pack.subtree_end.tolist() == [3, 3, 3, 5, 5, 6]
    assert pack_linear([]).num_tokens == 0


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([[1], [[2]]], r"sequences\[1\] must be a flat list"),
        ([1, 2], r"sequences\[0\] is 1, not a list or tensor of token ids"),
        ([[1, [2]]], r"sequences\[0\] must be a flat list"),
        ([[1.5]], r"sequences\[0\] must be a flat list"),
        ([[1], [3, -100]], r"sequences\[1\]\[1\] = -100"),
    ],
)
def test_bad_sequences_are_refused(sequences, message):
    with pytest.raises(ValueError, match=message):
        pack_tree(sequences)


def test_unknown_impl_is_refused():
    with pytest.raises(ValueError, match="'cuda'"):
        pack_tree([[1]], impl="cuda")


def broken(**fields):
    pack = pack_tree([[1, 2, 3], [1, 2, 4], [1, 5]])  # parents -1 0 1 1 0
    values = {n: getattr(pack, n).clone() for n in ("input_ids", "position_ids", "subtree_end")}
    for name, (i, value) in fields.items():
        values[name][i] = value
    return TreePack(**values, token_index=pack.token_index)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"subtree_end": (2, 2)}, r"subtree_end\[2\] = 2 .* before it begins"),
        ({"subtree_end": (0, 6)}, r"subtree_end\[0\] = 6 .* past the pack"),
        ({"subtree_end": (2, 5)}, "crosses"),
        ({"subtree_end": (2, 4)}, r"position_ids\[3\] = 2, but token 3 has depth 3"),
        ({"subtree_end": (1, 3)}, r"position_ids\[3\] = 2, but token 3 has depth 1"),
        ({"position_ids": (4, 2)}, r"position_ids\[4\] = 2, but token 4 has depth 1"),
    ],
)
def test_check_refuses_what_is_not_a_tree(fields, message):
    with pytest.raises(ValueError, match=message):
        broken(**fields).check()


def test_check_refuses_a_sequence_that_is_no_path():
    pack = pack_tree([[1, 2, 3], [1, 5]])
    wrong = TreePack(pack.input_ids, pack.position_ids, pack.subtree_end, (torch.tensor([0, 2]),))
    with pytest.raises(ValueError, match=r"token_index\[0\] is not a path"):
        wrong.check()


@settings(max_examples=100, deadline=None)
@given(TRIES, st.integers(1, 40), st.booleans())
def test_plan_covers_every_sequence_once_within_the_budget(sequences, budget, share):
    plan = plan_packs(sequences, budget, groups=[i % 3 for i in range(len(sequences))], share=share)
    assert sorted(s for members in plan for s in members) == list(range(len(sequences)))
    for members in plan:
        pack = (pack_tree if share else pack_linear)([sequences[s] for s in members])
        assert pack.num_tokens <= budget or sum(bool(sequences[s]) for s in members) == 1
    assert plan == plan_packs(sequences, budget, groups=[i % 3 for i in range(len(sequences))], share=share)


def test_groups_stay_together_while_they_fit_and_share_their_common_prefix():
    a, b = pact_sequences(1), pact_sequences(2)
    tokens = [pack_tree(group).num_tokens for group in (a, b)]
    groups = ["a"] * len(a) + ["b"] * len(b)
    assert plan_packs(a + b, max(tokens), groups=groups) in (
        [[*range(len(a))], [*range(len(a), len(a) + len(b))]],
        [[*range(len(a), len(a) + len(b))], [*range(len(a))]],
    )
    assert len(plan_packs(a + b, sum(tokens), groups=groups)) == 1
    system = [9] * 50  # a system prompt that both groups share is counted once
    plan = plan_packs([system + s for s in a + b], 50 + sum(tokens), groups=groups)
    assert len(plan) == 1


def test_a_group_over_the_budget_is_cut_along_its_tree():
    sequences = pact_sequences(4, group=4)  # half of them behind x, half behind c(x, h)
    plan = plan_packs(sequences, 110)
    packed = sum(pack_tree([sequences[s] for s in members]).num_tokens for members in plan)
    one_by_one = sum(map(len, sequences))
    assert len(plan) > 1
    assert packed < 0.75 * one_by_one


def test_plan_refuses_bad_arguments():
    with pytest.raises(ValueError, match="token_budget"):
        plan_packs([[1]], 0)
    with pytest.raises(ValueError, match="groups has 1 keys for 2"):
        plan_packs([[1], [2]], 10, groups=["a"])
