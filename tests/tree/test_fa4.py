"""flash-attn-4 on token trees, without a GPU: its block lists interpreted, its kernels cross-compiled."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pact_fast.kernels.tree_attention import fa4
from pact_fast.kernels.tree_attention.layout import tree_depth
from pact_fast.ops import tree_attention, tree_plan
from pact_fast.tree.packing import pack_tree
from tests.helpers import fa4_interpreter
from tests.helpers.attention_oracle import assert_near, inputs, oracle
from tests.helpers.trees import pact_sequences, random_sequences

SMALL_BLOCKS = (((16, 8), (8, 16)), ((8, 16), (16, 16)), ((16, 16), (16, 8)))


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    """The two calls of flash-attn-4 interpreted; the plan and the autograd function are the real ones."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setattr(fa4, "forward", fa4_interpreter.forward)
            patch.setattr(fa4, "backward", fa4_interpreter.backward)
        yield


def attend(end, q, k, v, window=None, first_query=0, blocks=SMALL_BLOCKS[0], change=None):
    plan = fa4.Fa4Plan(end, tree_depth(end.numpy()), window, first_query, blocks=blocks)
    if change is not None:
        change(plan)
    out, lse = fa4._Fa4.apply(q, k, v, plan, q.shape[2] ** -0.5)
    return out, lse.T


on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted without a GPU")


@on_cpu
@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([None, 1, 5]),
    st.sampled_from([0, 0.3, 0.8]),
    st.sampled_from(SMALL_BLOCKS),
)
def test_block_lists_give_the_definition_and_its_gradients(seed, window, behind, blocks):
    end = pack_tree(random_sequences(seed, count=1 + seed % 8)).subtree_end
    first = int(behind * end.numel())
    q, k, v = inputs(end.numel(), dtype=torch.float64, seed=seed)
    out, lse = attend(end, q[first:], k, v, window, first, blocks)
    d_out, d_lse = torch.randn_like(q), torch.randn(q.shape[:2], dtype=q.dtype)
    d_out[:first], d_lse[:first] = 0, 0
    grads = torch.autograd.grad([out, lse], [q, k, v], [d_out[first:], d_lse[first:]])
    want = oracle(q, k, v, end, d_out, d_lse, window)
    for a, b in zip([out, lse, *grads], [want[0][first:], want[1][first:], *want[2:]], strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-9)


def drop_partial(lists):
    row = int(lists.partial[0].argmax())
    lists.partial[0][0, 0, row] -= 1


def drop_full(lists):
    lists.full[0][0, 0, int(lists.full[0].argmax())] -= 1


def call_a_partial_block_full(lists):
    row = int(lists.partial[0].argmax())
    count = int(lists.partial[0][0, 0, row])
    moved = lists.partial[1][0, 0, row, count - 1].clone()
    lists.partial[0][0, 0, row] -= 1
    counts, numbers = lists.full
    if int(counts[0, 0, row]) == numbers.shape[3]:
        numbers = torch.nn.functional.pad(numbers, (0, 1))
    numbers[0, 0, row, int(counts[0, 0, row])] = moved
    counts[0, 0, row] += 1
    lists.full = counts, numbers


def visit_a_block_twice(lists):
    row = int(lists.full[0].argmax())
    lists.full[1][0, 0, row, 0] = lists.full[1][0, 0, row, int(lists.full[0][0, 0, row]) - 1]


@on_cpu
@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize(
    "mutation",
    [drop_partial, drop_full, call_a_partial_block_full, visit_a_block_twice],
    ids=lambda m: m.__name__,
)
def test_a_mutated_block_list_is_noticed(which, mutation):
    end = pack_tree(pact_sequences(1, prompt=70, trace=30, rollout=25, group=3)).subtree_end
    q, k, v = inputs(end.numel())
    d_out = torch.randn_like(q)
    want = oracle(q, k, v, end, d_out)

    def error(change):
        out, _ = attend(end, q, k, v, blocks=((16, 16), (16, 16)), change=change)
        got = [out, *torch.autograd.grad(out, [q, k, v], d_out)]
        pairs = zip(got, [want[0], *want[2:]], strict=True)
        return max(((a.detach() - b).norm() / b.norm()).item() for a, b in pairs)

    assert error(None) < 2e-6
    assert error(lambda plan: mutation(getattr(plan, which))) > 1e-3


def test_the_write_order_of_dq_counts_the_key_blocks_of_each_query_block():
    end = pack_tree(pact_sequences(1, prompt=70, trace=30, rollout=25, group=3)).subtree_end
    plan = fa4.Fa4Plan(end, tree_depth(end.numpy()), None, blocks=((16, 16), (16, 16)))
    places = {}
    for kind, order in zip((plan.backward.partial, plan.backward.full), plan.write_order, strict=True):
        assert order.shape == kind[1].shape
        for key in range(kind[0].shape[2]):
            for at in range(int(kind[0][0, 0, key])):
                places.setdefault(int(kind[1][0, 0, key, at]), {})[key] = int(order[0, 0, key, at])
    assert len(places) == -(-end.numel() // 16)
    for by_key in places.values():  # 0, 1, 2, ... in the order of the key blocks
        assert [by_key[key] for key in sorted(by_key)] == list(range(len(by_key)))


def test_lists_are_no_wider_than_the_longest_row():
    end = pack_tree(pact_sequences(1, prompt=700, trace=300, rollout=250, group=4)).subtree_end
    plan = fa4.Fa4Plan(end, tree_depth(end.numpy()), None)
    for lists in (plan.forward, plan.backward):
        for counts, numbers in (lists.partial, lists.full):
            assert numbers.shape[3] == max(int(counts.max()), 1)
    assert all(x.shape[0] >= end.numel() + 128 for x in plan.aux)  # a tile past the end is read


def test_what_it_cannot_do_is_said_with_the_way_out(monkeypatch):
    monkeypatch.setattr(fa4, "installed", lambda: True)
    assert fa4.refusal(128, torch.bfloat16, (9, 0)) is None
    assert fa4.refusal(256, torch.bfloat16, (9, 0)) is None
    assert "sm_80" in fa4.refusal(128, torch.bfloat16, (8, 0))
    assert "head_dim" in fa4.refusal(32, torch.bfloat16, (9, 0))
    assert "head_dim" in fa4.refusal(256, torch.bfloat16, (10, 0))
    assert "float32" in fa4.refusal(128, torch.float32, (9, 0))
    monkeypatch.setattr(fa4, "installed", lambda: False)
    assert "pact-fast[fa4]" in fa4.refusal(128, torch.bfloat16, (9, 0))
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        tree_plan(torch.tensor([1], dtype=torch.int32), impl="fa4")


COMPILE = """
    import os, sys
    os.environ |= {"FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a"}
    os.environ["FLASH_ATTENTION_NUM_SMS"] = "132"
    import numpy as np, torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from pact_fast.kernels.tree_attention import fa4
    D, window, first = int(sys.argv[1]), int(sys.argv[2]) or None, int(sys.argv[3])
    end = np.full(1000, 1000)
    end[300:600] = 600
    depth = np.arange(1000) - np.where(np.arange(1000) >= 600, 300, 0)
    plan = fa4.Fa4Plan(torch.from_numpy(end), depth, window, first, blocks=fa4.block_sizes(D))
    with FakeTensorMode() as mode, torch.no_grad():
        fake = lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda")
        plan.aux = [fake(x) for x in plan.aux]
        for lists in (plan.forward, plan.backward):
            lists.partial, lists.full = (tuple(map(fake, x)) for x in (lists.partial, lists.full))
        shapes = (1000 - first, 4, D), (1000, 2, D)
        q, k = (torch.empty(x, dtype=torch.bfloat16, device="cuda") for x in shapes)
        out, lse = fa4.forward(q, k, k.clone(), plan, 0.1)
        assert out.shape == q.shape and lse.shape == (4, 1000 - first), (out.shape, lse.shape)
        grads = fa4.backward(out.clone(), lse.clone(), q, k, k.clone(), out, lse, plan, 0.1)
        assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]
    print("compiled")
"""


@pytest.mark.parametrize(
    ("head_dim", "window", "first"),
    [(128, 0, 0), (64, 0, 0), (256, 0, 130), (128, 100, 130)],
)
def test_the_kernels_compile_for_hopper_with_our_masks_and_lists(head_dim, window, first):
    """Without a GPU. PACT_FAST_FA4_PYTHON: an interpreter that has the packages, where this one has not."""
    python = os.environ.get("PACT_FAST_FA4_PYTHON", sys.executable)
    if python == sys.executable and not fa4.installed():
        pytest.skip("flash-attn-4 is not installed (pip install 'pact-fast[fa4]')")
    words = [python, "-c", textwrap.dedent(COMPILE), *map(str, (head_dim, window, first))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280)
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("first", [0, 517])
@pytest.mark.parametrize(("head_dim", "heads"), [(128, (16, 8)), (64, (9, 3)), (96, (4, 2)), (256, (4, 2))])
def test_on_a_gpu_it_equals_the_definition(head_dim, heads, first, window):
    why = fa4.refusal(head_dim, torch.bfloat16, torch.cuda.get_device_capability())
    if why:
        pytest.skip(why)
    end = pack_tree(pact_sequences(3, prompt=400, trace=200, rollout=170, group=3)).subtree_end.cuda()
    q, k, v = inputs(end.numel(), *heads, head_dim, torch.bfloat16, "cuda")
    plan = tree_plan(end, window=window, first_query=first, impl="fa4", head_dim=head_dim)
    out, lse = tree_attention(q[first:], k, v, end, window=window, plan=plan, return_lse=True)
    d_out, d_lse = torch.randn_like(q), torch.randn(q.shape[:2], device="cuda")
    d_out[:first], d_lse[:first] = 0, 0
    got = [out, lse, *torch.autograd.grad([out, lse], [q, k, v], [d_out[first:], d_lse[first:]])]
    want = oracle(q, k, v, end, d_out, d_lse, window)
    for a, b in zip(got, [want[0][first:], want[1][first:], *want[2:]], strict=True):
        assert_near(a, b, torch.bfloat16)


@pytest.mark.gpu
def test_on_a_gpu_deterministic_gradients_repeat_bitwise():
    if why := fa4.refusal(128, torch.bfloat16, torch.cuda.get_device_capability()):
        pytest.skip(why)
    end = pack_tree(pact_sequences(3, prompt=400, trace=200, rollout=170, group=3)).subtree_end.cuda()
    q, k, v = inputs(end.numel(), 16, 8, 128, torch.bfloat16, "cuda")
    out = tree_attention(q, k, v, end, impl="fa4")
    d_out = torch.randn_like(out)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [torch.autograd.grad(out, [q, k, v], d_out, retain_graph=True) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
