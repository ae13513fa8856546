"""Tree attention against the dense-mask definition in fp64: outputs and gradients of each implementation."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pact_fast.kernels import tree_native
from pact_fast.kernels.reference import tree_attention as reference
from pact_fast.kernels.tree_layout import key_tile_order, tile_list, tree_depth
from pact_fast.kernels.tree_tiles import Tile, TilePlan, Tiles
from pact_fast.ops import tree_attention, tree_plan
from pact_fast.packing import pack_tree
from tests.tree.conftest import pact_sequences, random_sequences

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = pact_sequences(1, prompt=40, trace=10, rollout=9, group=2) + random_sequences(3)


def inputs(tokens, heads=4, kv_heads=2, head_dim=16, dtype=torch.float32, device="cpu", seed=0):
    torch.manual_seed(seed)
    shapes = [(tokens, heads, head_dim), (tokens, kv_heads, head_dim), (tokens, kv_heads, head_dim)]
    return [torch.randn(s, dtype=torch.float64).to(device, dtype).requires_grad_() for s in shapes]


def oracle(q, k, v, end, d_out, d_lse=None, window=None):
    """out, lse and the gradients of q, k, v by the definition in fp64."""
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, lse = reference.tree_attention_dense(*exact, end, window=window)
    outputs, upstream = ([out], [d_out]) if d_lse is None else ([out, lse], [d_out, d_lse])
    return out, lse, *torch.autograd.grad(outputs, exact, [g.double() for g in upstream])


def assert_near(got, want, dtype):
    """Within the rounding of `dtype`: both sides are O(1)."""
    bound = {torch.float64: 1e-11, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    error = (got.double() - want).norm() / want.norm().clamp(min=1e-30)
    assert error <= bound, f"relative error {error:.2e}"


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([None, 1, 3, 9]),
    st.sampled_from([1, 4, 16, 1000]),
    st.sampled_from([(4, 2), (2, 2), (4, 1)]),
)
def test_torch_equals_the_definition(seed, window, block, heads):
    pack = pack_tree(random_sequences(seed, count=1 + seed % 8))
    q, k, v = inputs(pack.num_tokens, *heads, dtype=torch.float64, seed=seed)
    plan = reference.block_plan(pack.subtree_end, window=window, block=block)
    out, lse = reference.tree_attention(q, k, v, pack.subtree_end, plan=plan, return_lse=True)
    d_out, d_lse = torch.randn_like(out), torch.randn_like(lse)
    want = oracle(q, k, v, pack.subtree_end, d_out, d_lse, window)
    got = [out, lse, *torch.autograd.grad([out, lse], [q, k, v], [d_out, d_lse])]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)


def test_dense_mask_says_who_is_an_ancestor():
    pack = pack_tree([[1, 2, 3], [1, 2, 4], [1, 5], [6]])  # parents -1 0 1 1 0 -1
    mask = reference.tree_mask(pack.subtree_end)
    assert [row.nonzero()[:, 0].tolist() for row in mask] == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 4], [5]]
    assert reference.tree_mask(pack.subtree_end, window=2)[3].nonzero()[:, 0].tolist() == [1, 3]


# T = 158 with 16-row tiles: full, partial and skipped tiles and a ragged last one. 80 is padded to 128.
TRITON_CASES = [
    pytest.param(torch.float32, 16, (4, 2), None, None, id="fp32"),
    pytest.param(torch.float16, 16, (4, 1), 5, None, id="fp16-window"),
    pytest.param(torch.float32, 80, (2, 1), None, None, id="head_dim-80"),
    pytest.param(
        torch.float32,
        16,
        (2, 2),
        7,
        Tiles(Tile(32, 16, 1, 1), Tile(16, 32, 1, 1), Tile(16, 32, 1, 1)),
        id="unequal-tiles-window",
    ),
    pytest.param(
        torch.float32,
        16,
        (2, 1),
        None,
        Tiles(Tile(16, 32, 1, 1), Tile(32, 16, 1, 1), Tile(32, 16, 1, 1)),
        id="unequal-tiles",
    ),
]


@pytest.mark.parametrize(("dtype", "head_dim", "heads", "window", "tiles"), TRITON_CASES)
def test_triton_equals_the_definition(dtype, head_dim, heads, window, tiles):
    kernel = pytest.importorskip("pact_fast.kernels.tree_attention")
    end = pack_tree(SMALL).subtree_end.to(DEVICE)
    q, k, v = inputs(end.numel(), *heads, head_dim, dtype, DEVICE)
    plan = TilePlan(end, tree_depth(end.cpu().numpy()), window)
    out, lse = kernel.tree_attention(q, k, v, plan, tiles=tiles)
    d_out, d_lse = torch.randn_like(out), torch.randn_like(lse)
    want = oracle(q, k, v, end, d_out, d_lse, window)
    got = [out, lse, *torch.autograd.grad([out, lse], [q, k, v], [d_out, d_lse])]
    for a, b in zip(got, want, strict=True):
        assert_near(a, b, dtype)


def test_triton_takes_strided_inputs_partial_gradients_and_repeats_bitwise():
    pytest.importorskip("pact_fast.kernels.tree_attention")
    end = pack_tree(random_sequences(2, count=8)).subtree_end.to(DEVICE)
    q, k, v = (x.detach() for x in inputs(end.numel(), device=DEVICE))
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]  # heads outermost in memory
    strided[1].requires_grad_()
    d_out = torch.randn_like(q).transpose(0, 1).contiguous().transpose(0, 1)
    runs = []
    for _ in range(2):
        out = tree_attention(*strided, end, impl="triton")
        runs.append([out, torch.autograd.grad(out, strided[1], d_out)[0]])
    want = oracle(q, k, v, end, d_out)
    assert_near(runs[0][0], want[0], torch.float32)
    assert_near(runs[0][1], want[3], torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_rows_do_not_read_what_they_cannot_see():
    """Poison every token outside one sequence with NaN: that sequence's outputs do not change."""
    pack = pack_tree(pact_sequences(6, prompt=24, trace=6, rollout=7, group=2))
    for impl in ("torch", "triton"):
        q, k, v = (x.detach().to(DEVICE) for x in inputs(pack.num_tokens))
        end = pack.subtree_end.to(DEVICE)
        clean = tree_attention(q, k, v, end, impl=impl)
        index = pack.token_index[-1].to(DEVICE)
        outside = torch.ones(pack.num_tokens, dtype=torch.bool, device=DEVICE)
        outside[index] = False
        # A large finite value: 0 * NaN is NaN in any implementation that masks scores.
        for x in (k, v):
            x[outside] = 1e6
        torch.testing.assert_close(
            tree_attention(q, k, v, end, impl=impl)[index], clean[index], atol=1e-5, rtol=0
        )


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
    if tree_native.library() is not None:
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


def test_an_empty_pack_gives_an_empty_result():
    q, k, v = inputs(0)
    end = torch.empty(0, dtype=torch.int32)
    for impl in ("torch", "triton"):
        out, lse = tree_attention(q, k, v, end, return_lse=True, impl=impl)
        assert out.shape == q.shape
        assert lse.shape == (0, 4)
        out.sum().backward()


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
    ],
)
def test_bad_arguments_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


def test_triton_refuses_what_it_cannot_do():
    pytest.importorskip("pact_fast.kernels.tree_attention")
    end = torch.tensor([2, 2], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="head_dim = 24"):
        tree_attention(*inputs(2, head_dim=24, device=DEVICE), end, impl="triton")
    with pytest.raises(TypeError, match="float64"):
        tree_attention(*inputs(2, dtype=torch.float64, device=DEVICE), end, impl="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="about CPU tensors")
def test_triton_on_cpu_tensors_is_an_error_without_the_interpreter(monkeypatch):
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        call(impl="triton")


def test_a_plan_of_another_tree_or_impl_is_refused():
    plan = tree_plan(torch.tensor([2, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match="plan is of 2 tokens"):
        call(plan=plan)
    plan = tree_plan(torch.tensor([3, 2, 3], dtype=torch.int32))
    with pytest.raises(ValueError, match="plan was made for 'torch'"):
        call(plan=plan, impl="triton")
