"""The Triton kernels of the decode ops, interpreted on CPU (compiled on a GPU), against their references.

Tolerance: at most twice the error of the reference in the same dtype against its own fp64 form, plus 1e-5 of
the values' size (fp32) or two roundings (fp16). bf16 is left to GPUs: the interpreter misreads it. Memory
that nobody wrote is NaN.
"""

import numpy as np
import pytest
import torch

from tests.helpers.decode_cases import Cache, dense_forest, dense_rows, random_forest, trie_batch

pytest.importorskip("triton")

from pact_fast.kernels.decode import ops, reference
from pact_fast.kernels.decode.extend import extend_lists
from pact_fast.kernels.decode.tasks import (
    RowPath,
    Segment,
    TaskCapacity,
    decode_tasks,
    extend_tasks,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16]
STEP = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty is filled with NaN, so reading what was never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_near(got, plain, exact):
    """`got` is as near to `exact` (fp64) as `plain`, the reference in the same dtype."""
    assert got.dtype == plain.dtype
    exact = exact.to(got.device)
    allowed = 2 * (plain.double() - exact).abs() + STEP[got.dtype] * (1 + exact.abs())
    error = (got.double() - exact).abs()
    assert bool((error <= allowed).all()), f"{(error - allowed).max().item():.2e} beyond the tolerance"


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 1), (3, 37), (5, 576), (0, 8)])
def test_norm_and_residual(dtype, plus_one, rows, hidden):
    x, residual = normal(rows, 2 * hidden, dtype=dtype)[:, :hidden], normal(rows, hidden, dtype=dtype, seed=1)
    weight = normal(hidden, dtype=dtype, seed=2)
    for other in (residual, None):
        got = ops.add_rms_norm(x, other, weight, 1e-6, plus_one=plus_one, impl="triton")
        plain = ops.add_rms_norm(x, other, weight, 1e-6, plus_one=plus_one, impl="torch")
        assert torch.equal(got[1], plain[1])
        wide = plain[1].double(), None, weight.double()
        assert_near(got[0], plain[0], ops.add_rms_norm(*wide, 1e-6, plus_one=plus_one, impl="torch")[0])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("heads", "dim", "rot", "norm", "plus_one"),
    [
        ((4, 2), 16, 16, "head", False),
        ((4, 2), 16, 16, None, False),
        ((3, 1), 20, 20, "head", True),
        ((9, 3), 16, 8, None, False),
        ((12, 2), 8, 4, "head", False),
        ((6, 3), 12, 12, "full", False),
        ((1, 1), 80, 80, None, False),
    ],
)
def test_rotation_and_cache_write(dtype, heads, dim, rot, norm, plus_one):
    num_q, num_kv = heads
    qkv = normal(5, (num_q + 2 * num_kv) * dim + 7, dtype=dtype)[:, :-7]
    norms = [None, None]
    if norm is not None:
        sizes = (dim, dim) if norm == "head" else (num_q * dim, num_kv * dim)
        norms = [normal(size, dtype=dtype, seed=i) for i, size in enumerate(sizes)]
    angle = torch.rand(31, rot // 2).repeat(1, 2) * 6
    positions, slots = torch.tensor([3, 0, 30, 7, 7]), torch.tensor([5, -1, 0, 11, 2])
    for table_dtype in {dtype, torch.float32}:
        cos, sin = (x.to(table_dtype).to(DEVICE) for x in (angle.cos(), angle.sin()))

        def run(impl, wide=None, cos=cos, sin=sin):
            floats = [x if x is None or wide is None else x.to(wide) for x in (qkv, *norms, cos, sin)]
            empty = torch.full((2, 12, num_kv, dim), float("nan"), dtype=floats[0].dtype, device=DEVICE)
            q = ops.qk_norm_rope_write(
                *floats, positions.to(DEVICE), slots.to(DEVICE), *empty, eps=1e-5, heads=heads,
                plus_one=plus_one, impl=impl,
            )  # fmt: skip
            return q, *empty

        got, plain, exact = run("triton"), run("torch"), run("torch", torch.float64)
        live = slots[slots >= 0].to(DEVICE)
        assert_near(got[0], plain[0], exact[0])
        assert_near(got[1][live], plain[1][live], exact[1][live])
        assert torch.equal(got[2][live], plain[2][live])
        unwritten = torch.ones(12, dtype=torch.bool, device=DEVICE).index_fill_(0, live, False)
        assert got[1][unwritten].isnan().all()
        assert got[2][unwritten].isnan().all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["silu_mul", "gelu_mul"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 37), (2, 1030), (0, 4)])
def test_gated_activations(dtype, name, rows, width):
    op = getattr(ops, name)
    gate_up = 4 * normal(rows, 2 * width, dtype=dtype)
    assert_near(op(gate_up, impl="triton"), op(gate_up, impl="torch"), op(gate_up.double(), impl="torch"))


def test_activations_of_huge_values_are_finite():
    gate_up = torch.tensor([[-1e4, 1e4, -200.0, 200.0, 1.0, 1.0, 1.0, 1.0]], device=DEVICE)
    for name in ("silu_mul", "gelu_mul"):
        got = getattr(ops, name)(gate_up, impl="triton")
        torch.testing.assert_close(got, getattr(ops, name)(gate_up, impl="torch"))


LENGTHS = [5, 9, 1, 0, 37]
ROWS = [([0, 1], 3, 8), ([0, 1], 1, 8), ([0, 2], 6, 40), ([4], 4, 8), ([], 21, 40), ([0, 3], 5, 8)]
OPTIONS = [{}, {"window": 4}, {"window": 1}, {"window": 30}, {"softcap": 2.0}, {"window": 7, "softcap": 3.0}]


def check_decode(
    dtype, heads, dim, page_size, options, batch=(LENGTHS, ROWS), seed=1, tile_rows=3, split_keys=16
):
    num_q, num_kv = heads
    cache = Cache(240, page_size, num_kv, dim, dtype, seed, DEVICE)
    segments, rows, lengths = trie_batch(cache, *batch)
    capacity = TaskCapacity(len(rows) + 2, 80, 80, 256)
    tasks = decode_tasks(
        segments, rows, page_size=page_size, split_keys=split_keys, tile_rows=tile_rows, capacity=capacity
    ).to(DEVICE)
    q = normal(len(rows) + 2, num_q, dim, dtype=dtype, seed=seed)
    lengths = torch.nn.functional.pad(lengths, (0, 2), value=3)
    got, plain = (
        ops.shared_prefix_attention(
            q, cache.k, cache.v, tasks, lengths, scale=dim**-0.5, impl=impl, **options
        )
        for impl in ("triton", "torch")
    )
    assert (got[len(rows) :] == 0).all()
    exact = dense_rows(q[: len(rows)], cache, segments, rows, lengths, dim**-0.5, **options)
    assert_near(got[: len(rows)], plain[: len(rows)], exact)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_shared_prefix_attention(dtype, options):
    check_decode(dtype, (4, 2), 16, 4, options)


@pytest.mark.parametrize(
    ("heads", "dim", "page_size"),
    [((2, 2), 64, 16), ((7, 1), 80, 32), ((6, 2), 96, 1), ((8, 1), 128, 16), ((2, 1), 256, 8)],
)
def test_every_head_dim_group_and_page_size(heads, dim, page_size):
    check_decode(torch.float32, heads, dim, page_size, {})


def test_random_tries():
    for seed in range(6):
        random = np.random.default_rng(seed)
        parents = [-1, *(int(random.integers(-1, i)) for i in range(1, 6))]
        paths = []
        for i, parent in enumerate(parents):
            paths.append([*(paths[parent] if parent >= 0 else []), i])
        specs = [(paths[random.integers(6)], int(random.integers(1, 30)), 32) for _ in range(9)]
        batch = random.integers(0, 40, 6).tolist(), specs
        options = OPTIONS[seed % len(OPTIONS)]
        check_decode(torch.float32, (4, 2), 16, 4, options, batch, seed, int(random.integers(1, 5)), 32)


def test_own_keys_appear_by_row_length_alone():
    """The list of a turn's first step serves its last: no task is made anew."""
    cache = Cache(60, 4, 2, 16, torch.float32, 2, DEVICE)
    segments, rows, lengths = trie_batch(cache, [9], [([0], 1, 40), ([0], 2, 40)])
    tasks = decode_tasks(segments, rows, page_size=4, split_keys=16).to(DEVICE)
    before = tasks.buffer.clone()
    for step in range(1, 39, 6):
        grown = [
            [row.own_pages[n // 4] * 4 + n % 4 for n in range(step + i + 1)] for i, row in enumerate(rows)
        ]
        for slots in grown:
            cache.write(np.array(slots))
        lengths = torch.tensor([step + 1, step + 2], device=DEVICE)
        q = normal(2, 4, 16, seed=step)
        got = ops.shared_prefix_attention(q, cache.k, cache.v, tasks, lengths, scale=0.3, impl="triton")
        exact = dense_rows(q, cache, segments, rows, lengths, 0.3)
        torch.testing.assert_close(got.double(), exact.to(DEVICE), rtol=1e-5, atol=1e-5)
    assert torch.equal(tasks.buffer, before)


def test_more_query_rows_than_a_tile_are_refused():
    tasks = decode_tasks([], [RowPath([], [0])], page_size=4, tile_rows=8)
    q, cache = torch.zeros(1, 16, 16), torch.zeros(4, 1, 16)
    with pytest.raises(ValueError, match="tile_rows=4"):
        ops.shared_prefix_attention(
            q, cache, cache, tasks, torch.ones(1, dtype=torch.int32), scale=1, impl="triton"
        )


def test_slots_past_int32_elements():
    """A cache of which one page is touched; its slots * heads * dim pass int32."""
    page_size, pages = 64, 16386
    shape = pages * page_size, 8, 256
    if DEVICE == "cpu":  # memory that the system only gives where it is touched
        k = torch.from_numpy(np.empty(shape, np.float16))
    else:
        k = torch.empty(shape, dtype=torch.float16, device=DEVICE)
    v = k  # one is enough
    slots = torch.arange((pages - 1) * page_size, (pages - 1) * page_size + 20, device=DEVICE)
    assert int(slots[0]) * 8 * 256 > 2**31
    k[slots] = normal(20, 8, 256, dtype=torch.float16)
    q = normal(1, 8, 256, dtype=torch.float16)
    tasks = decode_tasks([], [RowPath([], [pages - 1])], page_size=page_size).to(DEVICE)
    length = torch.tensor([20], dtype=torch.int32, device=DEVICE)
    got, plain = (
        ops.shared_prefix_attention(q, k, v, tasks, length, scale=0.06, impl=impl)
        for impl in ("triton", "torch")
    )
    torch.testing.assert_close(got, plain, rtol=3e-3, atol=3e-3)
    work = extend_tasks([20] * 20, [[]], page_size=page_size)
    q = normal(20, 8, 256, dtype=torch.float16)
    got, plain = (ops.extend_attention(q, k, v, slots, work, scale=0.06, impl=i) for i in ("triton", "torch"))
    torch.testing.assert_close(got, plain, rtol=3e-3, atol=3e-3)


def check_extend(dtype, heads, dim, page_size, options, sizes, seed=0):
    num_q, num_kv = heads
    random = np.random.default_rng(seed)
    cache = Cache(400, page_size, num_kv, dim, dtype, seed, DEVICE)
    shared = [Segment(cache.take(n), n) for n in (17, 5, 0, 40)]
    paths = [[], [shared[0]], [shared[0], shared[1]], [shared[3], shared[2]]]
    above = [paths[i % 4] for i in range(len(sizes))]
    end = random_forest(random, sizes)
    pages = np.array(cache.take(len(end)))
    slots = (pages[:, None] * page_size + np.arange(page_size)).ravel()[: len(end)]
    slots = torch.from_numpy(slots).to(DEVICE)
    work = extend_tasks(end, above, page_size=page_size)
    q = normal(len(end), num_q, dim, dtype=dtype, seed=seed)
    got, plain = (
        ops.extend_attention(q, cache.k, cache.v, slots, work, scale=dim**-0.5, impl=impl, **options)
        for impl in ("triton", "torch")
    )
    exact = dense_forest(q, cache, slots, end, work.positions, above, work.roots, dim**-0.5, **options)
    assert_near(got, plain, exact)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_extend_attention_of_random_forests(dtype, options):
    check_extend(dtype, (4, 2), 16, 4, options, [1, 23, 40, 7])


@pytest.mark.parametrize(
    ("heads", "dim", "page_size"),
    [((2, 2), 64, 16), ((7, 1), 80, 32), ((6, 2), 96, 1), ((8, 1), 128, 16), ((2, 1), 256, 8)],
)
def test_extend_with_every_head_dim_group_and_page_size(heads, dim, page_size):
    check_extend(torch.float32, heads, dim, page_size, {}, [20, 9, 33], seed=4)


def check_tree(end, group):
    cache = Cache(30, 4, 1, 16, torch.float32, 0, DEVICE)
    pages = np.array(cache.take(len(end)))
    slots = torch.from_numpy((pages[:, None] * 4 + np.arange(4)).ravel()[: len(end)]).to(DEVICE)
    work = extend_tasks(end, [[]] * (len({*end}) if end[0] < len(end) else 1), page_size=4)
    q = normal(len(end), group, 16)
    got, want = (
        ops.extend_attention(q, cache.k, cache.v, slots, work, scale=0.25, impl=i)
        for i in ("triton", "torch")
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    return work


@pytest.mark.parametrize("group", [2, 3])
def test_a_long_plain_run_has_whole_blocks(group):
    work = check_tree([70] * 70 + [100] * 30, group)
    tokens = 16 // group
    lists = extend_lists(work, tokens, 16, False, torch.device("cpu"))
    whole = sum(int(t[5] - t[4]) for t in lists.tiles)
    # A block is whole where it ends at the tile's first token or before.
    assert whole == sum((t + 1) // 16 for run in (70, 30) for t in range(0, run, tokens))
    assert int(lists.tiles[:, 1].sum()) == 100


def test_a_block_that_the_last_token_of_a_tile_does_not_see_is_masked():
    """Token 15's descendants end at 22; token 23, the last of the tile 16..23, branches off at the root."""
    check_tree([48] + [23] * 22 + [48] * 25, 2)


def test_half_precision_rounds_where_torch_rounds():
    """Equal in all but the few values where another order of a sum tips a rounding."""
    x, residual = (normal(40, 512, dtype=torch.float16, seed=i) for i in (9, 10))
    weight = normal(512, dtype=torch.float16)
    for plus_one in (False, True):
        args = x, residual, weight, 1e-6
        got, want = (ops.add_rms_norm(*args, plus_one=plus_one, impl=i)[0] for i in ("triton", "torch"))
        assert (got == want).float().mean() > 0.995
    got, want = (ops.silu_mul(x, impl=i) for i in ("triton", "torch"))
    assert (got == want).float().mean() > 0.995
    cos, sin = (normal(9, 32, dtype=torch.float16, seed=i) for i in (1, 2))
    places = torch.arange(9, device=DEVICE)
    caches = torch.zeros(2, 2, 9, 4, 32, dtype=torch.float16, device=DEVICE)
    for i, impl in enumerate(("triton", "torch")):
        ops.qk_norm_rope_write(
            x[:9], weight[:32], weight[32:64], cos, sin, places, places, *caches[i], eps=1e-6, heads=(8, 4),
            impl=impl,
        )  # fmt: skip
    assert (caches[0] == caches[1]).float().mean() > 0.995


def sampling_rows(n, vocab, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(n, vocab, generator=generator) * 3).to(dtype)
    temperature = torch.tensor([0.0, 1.0, 0.7, 1.6])[torch.arange(n) % 4]
    seeds = torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator)
    position = torch.randint(0, 2**40, (n,), generator=generator)
    return [x.to(DEVICE) for x in (logits, temperature, seeds, position)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (9, 37), (40, 512), (6, 5000), (3, 33_000), (0, 5)])
def test_samples_equal_the_reference(dtype, rows, vocab):
    logits, temperature, seed, position = sampling_rows(rows, vocab, dtype)
    args = logits, temperature, None, None, None, seed, position
    got, want = ops.sample(*args, impl="triton"), ops.sample(*args, impl="torch")
    assert torch.equal(got[0], want[0])  # the same bits; two candidates within rounding would be bad luck
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(got[2], want[2])


def test_draws_have_the_same_bits_in_triton_and_torch():
    """Logits of one value leave the choice to the noise: equal draws of 60 rows mean equal bits."""
    rows, vocab = 60, 700
    _, _, seed, position = sampling_rows(rows, 1)
    logits, temperature = torch.zeros(rows, vocab, device=DEVICE), torch.ones(rows, device=DEVICE)
    got, want = (
        ops.sample(logits, temperature, None, None, None, seed, position, impl=i)[0]
        for i in ("triton", "torch")
    )
    assert torch.equal(got, want)
    assert len(set(got.tolist())) > 45


def test_ties_go_to_the_lowest_index_across_chunks():
    logits, temperature, seed, position = sampling_rows(4, 40_000)
    logits[:, [39_999, 16_384, 16_383, 14_335]] = 50.0  # the last two of one lane
    token, _, _ = ops.sample(logits, temperature * 0, None, None, None, seed, position, impl="triton")
    assert token.tolist() == [14_335] * 4


@pytest.mark.parametrize("vocab", [40, 20_000])
def test_rows_that_are_not_finite_are_flagged(vocab):
    logits, temperature, seed, position = sampling_rows(6, vocab)
    last = vocab - 1
    logits[0, last], logits[1, 0], logits[2], logits[3, 5] = (
        float("nan"),
        float("inf"),
        -float("inf"),
        -float("inf"),
    )
    for t in (0.0, 1.0):
        args = logits, temperature * 0 + t, None, None, None, seed, position
        got, want = ops.sample(*args, impl="triton"), ops.sample(*args, impl="torch")
        assert got[2].tolist() == [False, False, False, True, True, True]
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


def test_filters_reach_the_kernel():
    logits, temperature, seed, position = sampling_rows(24, 5000, seed=2)
    filters = torch.full((24,), 7), torch.full((24,), 0.9), torch.full((24,), 0.01)
    args = logits, temperature, *(x.to(DEVICE) for x in filters), seed, position
    got, want = ops.sample(*args, impl="triton"), ops.sample(*args, impl="torch")
    assert torch.equal(got[0], want[0])
    floor = reference.sampling_floor(logits, temperature, *args[2:5])
    assert (logits.gather(1, got[0][:, None])[:, 0] >= floor).all()
