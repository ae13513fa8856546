"""Tree attention against the dense-mask definition in fp64: outputs and gradients of each implementation."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pact_fast.kernels.tree_attention import native, reference
from pact_fast.kernels.tree_attention.layout import key_tile_order, tile_list, tree_depth
from pact_fast.ops import tree_attention, tree_plan
from pact_fast.tree.packing import pack_tree
from tests.helpers.attention_oracle import DEVICE, SMALL, assert_near, inputs, oracle
from tests.helpers.trees import pact_sequences, random_sequences


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([None, 1, 3, 9]),
    st.sampled_from([1, 4, 16, 1000]),
    st.sampled_from([(4, 2), (2, 2), (4, 1)]),
    st.sampled_from([("cpu",), ()]),
)
def test_torch_equals_the_definition(seed, window, block, heads, fused_devices):
    pack = pack_tree(random_sequences(seed, count=1 + seed % 8))
    q, k, v = inputs(pack.num_tokens, *heads, dtype=torch.float64, seed=seed)
    plan = reference.block_plan(pack.subtree_end, window=window, block=block)
    with mock.patch.object(reference, "FUSED_DEVICES", fused_devices):
        out, lse = reference.tree_attention(q, k, v, pack.subtree_end, plan=plan)
        d_out, d_lse = torch.randn_like(out), torch.randn_like(lse)
        got = [out, lse, *torch.autograd.grad([out, lse], [q, k, v], [d_out, d_lse])]
    want = oracle(q, k, v, pack.subtree_end, d_out, d_lse, window)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)


def test_dense_mask_says_who_is_an_ancestor():
    pack = pack_tree([[1, 2, 3], [1, 2, 4], [1, 5], [6]])  # parents -1 0 1 1 0 -1
    mask = reference.tree_mask(pack.subtree_end)
    assert [row.nonzero()[:, 0].tolist() for row in mask] == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 4], [5]]
    assert reference.tree_mask(pack.subtree_end, window=2)[3].nonzero()[:, 0].tolist() == [1, 3]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 5])
def test_flex_equals_the_definition(window):
    pack = pack_tree(
        pact_sequences(3, prompt=90, trace=60, rollout=40, group=2)
    )  # T = 418: four tiles of 128
    end = pack.subtree_end.to(DEVICE)
    q, k, v = inputs(end.numel(), device=DEVICE)
    d_out = torch.randn_like(q)
    want = oracle(q, k, v, end, d_out, window=window)
    with torch.set_grad_enabled(DEVICE == "cuda"):  # torch has no gradient of it on a CPU
        q, k, v = (x.detach().requires_grad_(DEVICE == "cuda") for x in (q, k, v))
        out, lse = tree_attention(q, k, v, end, window=window, return_lse=True, impl="flex")
        got = [out, lse, *(torch.autograd.grad(out, [q, k, v], d_out) if DEVICE == "cuda" else ())]
    for a, b in zip(got, want, strict=DEVICE == "cuda"):
        assert_near(a, b, torch.float32)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([2, 4, 16]),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([None, 3]),
)
def test_tile_lists_hold_every_visible_pair_and_full_tiles_hold_nothing_else(seed, block_m, block_n, window):
    end = pack_tree(random_sequences(seed, count=1 + seed % 8)).subtree_end
    mask = reference.tree_mask(end, window).numpy()
    depth = tree_depth(end.numpy())
    tiles = tile_list(end.numpy(), depth, block_m, block_n, window, native=False)
    if native.library() is not None:
        same = tile_list(end.numpy(), depth, block_m, block_n, window)
        assert all(
            np.array_equal(a, b) for a, b in zip(vars(tiles).values(), vars(same).values(), strict=True)
        )
    covered = np.zeros_like(mask)
    for i in range(tiles.order.size):
        rows = slice(i * block_m, (i + 1) * block_m)
        for at in range(tiles.ptr[i], tiles.ptr[i + 1]):
            cols = slice(tiles.cols[at] * block_n, (tiles.cols[at] + 1) * block_n)
            assert not covered[rows, cols].any()
            covered[rows, cols] = True
            if at < tiles.split[i]:
                assert mask[rows, cols].all()
                assert mask[rows, cols].shape[1] == block_n
    assert not (mask & ~covered).any()
    assert sorted(tiles.order) == list(range(tiles.order.size))
    assert (np.diff(np.diff(tiles.ptr)[tiles.order]) <= 0).all()
    assert sorted(key_tile_order(end.numpy(), block_n)) == list(range(-(-end.numel() // block_n)))


def test_autocast_casts_as_sdpa_does():
    end = pack_tree(SMALL).subtree_end
    q, k, v = inputs(end.numel())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = tree_attention(q, k, v.bfloat16(), end)
    assert out.dtype == torch.bfloat16


def call(**changes):
    q, k, v = inputs(3)
    arguments = {"q": q, "k": k, "v": v, "subtree_end": torch.tensor([3, 2, 3], dtype=torch.int32)} | changes
    return tree_attention(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"subtree_end": torch.tensor([2, 3, 3], dtype=torch.int32)}, ValueError, "crosses"),
        ({"subtree_end": torch.tensor([3, 1, 3], dtype=torch.int32)}, ValueError, r"subtree_end\[1\] = 1"),
        ({"subtree_end": torch.tensor([3, 2, 4], dtype=torch.int32)}, ValueError, "past the pack"),
        ({"subtree_end": torch.tensor([3, 2, 3])}, ValueError, "int32"),
        ({"k": torch.zeros(3, 3, 16), "v": torch.zeros(3, 3, 16)}, ValueError, "dividing those of q"),
        ({"v": torch.zeros(3, 2, 8)}, ValueError, "v is"),
        ({"k": torch.zeros(3, 2, 16).half()}, TypeError, "k is torch.float16"),
        ({"q": torch.zeros(3, 16)}, ValueError, "q must be"),
        ({"scale": -1.0}, ValueError, "scale"),
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"impl": "cuda"}, ValueError, "impl must be one of"),
        ({"impl": "flash"}, ValueError, "impl must be one of"),
    ],
)
def test_bad_arguments_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


def test_a_plan_of_another_tree_or_impl_is_refused():
    plan = tree_plan(torch.tensor([2, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match="plan is of 2 tokens"):
        call(plan=plan)
    plan = tree_plan(torch.tensor([3, 2, 3], dtype=torch.int32))
    with pytest.raises(ValueError, match="plan was made for 'torch'"):
        call(plan=plan, impl="triton")
