"""The Triton kernels of tree attention, interpreted on CPU (compiled on a GPU), against the definition."""

from unittest import mock

import pytest
import torch

from pact_fast.kernels.tree_attention.layout import tree_depth
from pact_fast.kernels.tree_attention.tiles import Tile, TilePlan, Tiles
from pact_fast.ops import tree_attention, tree_plan
from pact_fast.tree.packing import pack_tree
from tests.helpers.attention_oracle import DEVICE, SMALL, assert_near, inputs, oracle
from tests.helpers.trees import pact_sequences, random_sequences

EMPTY = torch.empty


def poisoned(*args, **kwargs):
    """torch.empty whose memory holds NaN."""
    x = EMPTY(*args, **kwargs)
    return x.fill_(torch.nan) if x.is_floating_point() else x


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
    kernel = pytest.importorskip("pact_fast.kernels.tree_attention.triton")
    end = pack_tree(SMALL).subtree_end.to(DEVICE)
    q, k, v = inputs(end.numel(), *heads, head_dim, dtype, DEVICE)
    plan = TilePlan(end, tree_depth(end.cpu().numpy()), window)
    out, lse = kernel.tree_attention(q, k, v, plan, tiles=tiles)
    d_out, d_lse = torch.randn_like(out), torch.randn_like(lse)
    want = oracle(q, k, v, end, d_out, d_lse, window)
    got = [out, lse, *torch.autograd.grad([out, lse], [q, k, v], [d_out, d_lse])]
    for a, b in zip(got, want, strict=True):
        assert_near(a, b, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize(
    ("head_dim", "heads"), [(64, (9, 3)), (128, (16, 8)), (128, (4, 1)), (80, (4, 2)), (256, (4, 2))]
)
def test_the_tiles_of_real_head_dims_in_bf16(head_dim, heads, window):
    """T = 1,820: full, partial and ragged tiles of the largest sizes that `choose_tiles` names."""
    end = pack_tree(pact_sequences(3, prompt=400, trace=200, rollout=170, group=3)).subtree_end.to(DEVICE)
    q, k, v = inputs(end.numel(), *heads, head_dim, torch.bfloat16, DEVICE)
    out, lse = tree_attention(q, k, v, end, window=window, return_lse=True, impl="triton")
    d_out, d_lse = torch.randn_like(out), torch.randn_like(lse)
    want = oracle(q, k, v, end, d_out, d_lse, window)
    got = [out, lse, *torch.autograd.grad([out, lse], [q, k, v], [d_out, d_lse])]
    for a, b in zip(got, want, strict=True):
        assert_near(a, b, torch.bfloat16)


def test_triton_takes_strided_inputs_partial_gradients_and_repeats_bitwise():
    pytest.importorskip("pact_fast.kernels.tree_attention.triton")
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


@torch.no_grad()
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_queries_behind_a_cached_prefix_equal_those_of_the_whole_tree(impl):
    pack = pack_tree(pact_sequences(6, prompt=24, trace=6, rollout=7, group=2))
    q, k, v = (x.detach().to(DEVICE) for x in inputs(pack.num_tokens))
    end = pack.subtree_end.to(DEVICE)
    whole = tree_attention(q, k, v, end, impl=impl)
    for first in (19, 37):
        plan = tree_plan(end, first_query=first, impl=impl)
        behind = tree_attention(q[first:], k, v, end, plan=plan)
        torch.testing.assert_close(behind, whole[first:], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="first_query = 99"):
        tree_plan(end, first_query=99, impl=impl)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("first", [19, 32, 50])
@pytest.mark.parametrize("tiles", [None, Tiles(Tile(16, 16, 1, 1), Tile(32, 16, 1, 1), Tile(64, 16, 1, 1))])
def test_gradients_of_queries_behind_a_prefix_equal_the_definitions(impl, window, first, tiles, monkeypatch):
    """Tiles of the backward that begin before any of the forward hold rows that nobody has written."""
    if impl == "triton" and tiles is not None:
        from pact_fast.kernels.tree_attention import triton as kernels

        monkeypatch.setattr(kernels, "choose_tiles", lambda *_: tiles)
    elif tiles is not None:
        pytest.skip("torch has no tiles")
    end = pack_tree(pact_sequences(6, prompt=24, trace=6, rollout=7, group=2)).subtree_end.to(DEVICE)
    q, k, v = inputs(end.numel(), device=DEVICE)
    plan = tree_plan(end, first_query=first, window=window, impl=impl)
    with mock.patch.object(torch, "empty", poisoned):
        out, lse = tree_attention(q[first:], k, v, end, plan=plan, window=window, return_lse=True)
        d_out, d_lse = torch.randn_like(q), torch.randn(q.shape[:2], device=DEVICE)
        d_out[:first], d_lse[:first] = 0, 0
        got = torch.autograd.grad([out, lse], [q, k, v], [d_out[first:], d_lse[first:]])
    want = oracle(q, k, v, end, d_out, d_lse, window)
    for a, b in zip([out, lse, *got], [want[0][first:], want[1][first:], *want[2:]], strict=True):
        assert_near(a, b, torch.float32)


def test_rows_do_not_read_what_they_cannot_see():
    """Poison every token outside one sequence: that sequence's outputs do not change."""
    pack = pack_tree(pact_sequences(6, prompt=24, trace=6, rollout=7, group=2))
    for impl in ("torch", "triton"):
        q, k, v = (x.detach().to(DEVICE) for x in inputs(pack.num_tokens))
        end = pack.subtree_end.to(DEVICE)
        clean = tree_attention(q, k, v, end, impl=impl)
        index = pack.token_index[-1].to(DEVICE)
        outside = torch.ones(pack.num_tokens, dtype=torch.bool, device=DEVICE)
        outside[index] = False
        # A large finite value, not NaN: 0 * NaN is NaN in any implementation that masks scores.
        for x in (k, v):
            x[outside] = 1e6
        torch.testing.assert_close(
            tree_attention(q, k, v, end, impl=impl)[index], clean[index], atol=1e-5, rtol=0
        )


def test_an_empty_pack_gives_an_empty_result():
    q, k, v = inputs(0, device=DEVICE)
    end = torch.empty(0, dtype=torch.int32, device=DEVICE)
    for impl in ("torch", "triton"):
        out, lse = tree_attention(q, k, v, end, return_lse=True, impl=impl)
        assert out.shape == q.shape
        assert lse.shape == (0, 4)
        out.sum().backward()


def test_triton_refuses_what_it_cannot_do():
    pytest.importorskip("pact_fast.kernels.tree_attention.triton")
    end = torch.tensor([2, 2], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="head_dim = 24"):
        tree_attention(*inputs(2, head_dim=24, device=DEVICE), end, impl="triton")
    with pytest.raises(TypeError, match="float64"):
        tree_attention(*inputs(2, dtype=torch.float64, device=DEVICE), end, impl="triton")


def test_triton_on_cpu_tensors_is_an_error_without_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        tree_attention(*inputs(3), torch.tensor([3, 2, 3], dtype=torch.int32), impl="triton")
