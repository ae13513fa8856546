"""The torch forms of the decode ops against Hugging Face layers and against dense attention in fp64."""

import numpy as np
import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from pact_fast.kernels.decode import ops, reference
from pact_fast.kernels.decode.tasks import (
    RowPath,
    Segment,
    TaskCapacity,
    TaskCapacityError,
    decode_tasks,
    extend_tasks,
)
from tests.helpers.decode_cases import Cache, dense_forest, dense_rows, random_forest, trie_batch

TRIE = (
    [5, 9, 1, 0, 17],
    [([0, 1], 3, 8), ([0, 1], 1, 8), ([0, 2], 6, 8), ([4], 4, 8), ([], 2, 8), ([0, 3], 5, 8)],
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_round_as_hugging_face_rounds(dtype):
    torch.manual_seed(0)
    x, residual = torch.randn(5, 24, dtype=dtype), torch.randn(5, 24, dtype=dtype)
    weight = torch.randn(24, dtype=dtype)
    for cls, plus_one in ((qwen3.Qwen3RMSNorm, False), (Gemma2RMSNorm, True)):
        norm = cls(24, 1e-6).to(dtype)
        norm.weight.data.copy_(weight)
        normed, total = ops.add_rms_norm(x, residual, weight, 1e-6, plus_one=plus_one)
        assert torch.equal(total, residual + x)
        want = norm(total)
        if dtype == torch.bfloat16:
            assert torch.equal(normed, want)
        torch.testing.assert_close(normed, want, rtol=1e-6, atol=1e-6)
        assert torch.equal(ops.add_rms_norm(total, None, weight, 1e-6, plus_one=plus_one)[0], normed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_and_cache_write_equal_hugging_face(dtype):
    torch.manual_seed(0)
    n, heads, dim = 4, (4, 2), 8
    qkv = torch.randn(n, 8 * dim, dtype=dtype)
    norms = [qwen3.Qwen3RMSNorm(dim, 1e-6).to(dtype) for _ in range(2)]
    for norm in norms:
        norm.weight.data.normal_()
    angle = torch.rand(50, dim // 2).repeat(1, 2) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    positions, slots = torch.tensor([3, 49, 0, 7]), torch.tensor([5, -1, 0, 11])
    k_cache, v_cache = (torch.full((12, 2, dim), float("nan"), dtype=dtype) for _ in range(2))
    q = ops.qk_norm_rope_write(
        qkv, norms[0].weight.data, norms[1].weight.data, cos, sin, positions, slots, k_cache, v_cache,
        eps=1e-6, heads=heads,
    )  # fmt: skip
    split = qkv.view(n, 8, dim)
    want_q, want_k = (
        norms[0](split[:, :4]).transpose(0, 1)[None],
        norms[1](split[:, 4:6]).transpose(0, 1)[None],
    )
    want_q, want_k = qwen3.apply_rotary_pos_emb(want_q, want_k, cos[positions][None], sin[positions][None])
    torch.testing.assert_close(q, want_q[0].transpose(0, 1), rtol=1e-6, atol=1e-6)
    live = slots >= 0
    torch.testing.assert_close(k_cache[slots[live]], want_k[0].transpose(0, 1)[live], rtol=1e-6, atol=1e-6)
    assert torch.equal(v_cache[slots[live]], split[live, 6:])
    written = torch.zeros(12, dtype=torch.bool).index_fill_(0, slots[live], True)
    assert k_cache[~written].isnan().all()
    assert v_cache[~written].isnan().all()


@pytest.mark.parametrize(
    "options", [{}, {"window": 4}, {"window": 1}, {"softcap": 2.0}, {"window": 7, "softcap": 3.0}]
)
@pytest.mark.parametrize("page_size", [1, 4])
def test_shared_prefix_attention_equals_dense_attention(options, page_size):
    cache = Cache(120, page_size, 2, 8, torch.float64, seed=1)
    segments, rows, lengths = trie_batch(cache, *TRIE)
    q = torch.randn(8, 6, 8, dtype=torch.float64)
    for split, tile in ((16, 1), (512, 8)):
        tasks = decode_tasks(
            segments, rows, page_size=page_size, split_keys=split, tile_rows=tile,
            capacity=TaskCapacity(8, 64, 64, 256),
        )  # fmt: skip
        got = ops.shared_prefix_attention(
            q, cache.k, cache.v, tasks, torch.nn.functional.pad(lengths, (0, 2)), scale=0.5, **options
        )
        want = dense_rows(q, cache, segments, rows, lengths, 0.5, **options)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        assert (got[6:] == 0).all()


def test_own_segments_grow_without_a_new_list():
    cache = Cache(60, 4, 2, 8, torch.float64, seed=2)
    segments, rows, lengths = trie_batch(cache, *TRIE)
    tasks = decode_tasks(segments, rows, page_size=4)
    for _ in range(3):
        q = torch.randn(len(rows), 4, 8, dtype=torch.float64)
        got = ops.shared_prefix_attention(q, cache.k, cache.v, tasks, lengths, scale=0.3)
        torch.testing.assert_close(
            got, dense_rows(q, cache, segments, rows, lengths, 0.3), rtol=1e-9, atol=1e-9
        )
        grown = [
            row.own_pages[n // 4] * 4 + n % 4 for row, n in zip(rows, lengths.tolist(), strict=True) if n < 8
        ]
        cache.write(np.array(grown))
        lengths = (lengths + 1).clamp(max=8)


def test_random_tries_and_forests_equal_dense_attention():
    for seed in range(15):
        random = np.random.default_rng(seed)
        cache = Cache(300, 4, 2, 8, torch.float64, seed)
        parents = [-1, *(int(random.integers(-1, i)) for i in range(1, 6))]
        paths = []
        for i, parent in enumerate(parents):
            paths.append([*(paths[parent] if parent >= 0 else []), i])
        specs = [
            ([*paths[random.integers(6)]] if random.random() < 0.9 else [], int(random.integers(1, 9)), 12)
            for _ in range(9)
        ]
        segments, rows, lengths = trie_batch(cache, random.integers(0, 40, 6).tolist(), specs)
        window = int(random.integers(1, 60)) if seed % 3 == 0 else None
        q = torch.randn(9, 4, 8, dtype=torch.float64)
        tasks = decode_tasks(segments, rows, page_size=4, split_keys=16, tile_rows=int(random.integers(1, 5)))
        got = ops.shared_prefix_attention(q, cache.k, cache.v, tasks, lengths, scale=0.4, window=window)
        torch.testing.assert_close(
            got, dense_rows(q, cache, segments, rows, lengths, 0.4, window), rtol=1e-9, atol=1e-9
        )

        sizes = random.integers(1, 25, 5).tolist()
        end = random_forest(random, sizes)
        above = [
            [segments[s] for s in paths[random.integers(6)]] if random.random() < 0.8 else [] for _ in sizes
        ]
        pages = cache.take(len(end))
        slots = torch.from_numpy(np.concatenate([np.arange(p * 4, p * 4 + 4) for p in pages])[: len(end)])
        work = extend_tasks(end, above, page_size=4)
        q = torch.randn(len(end), 4, 8, dtype=torch.float64)
        for softcap in (None, 5.0):
            got = ops.extend_attention(
                q, cache.k, cache.v, slots, work, scale=0.4, window=window, softcap=softcap
            )
            want = dense_forest(q, cache, slots, end, work.positions, above, work.roots, 0.4, window, softcap)
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_positions_of_new_tokens_count_from_the_sequence():
    work = extend_tasks([3, 2, 3, 6, 6, 6], [[Segment([0], 2)], []], page_size=4)
    assert work.positions.tolist() == [2, 3, 3, 0, 1, 2]


def test_the_cuts_of_a_row_do_not_depend_on_its_neighbours():
    segments = [Segment(list(range(300)), 1100)]
    alone = decode_tasks(segments, [RowPath([0], [400])], page_size=4)
    many = decode_tasks(segments, [RowPath([0], [400 + i]) for i in range(40)], page_size=4)

    def cuts(tasks, row):
        parts = tasks.row_partials[tasks.row_ptr[row] : tasks.row_ptr[row + 1]].tolist()
        records = tasks.tasks[: int(tasks.count[0])].tolist()
        return [(r[3], r[4], r[5]) for p in parts for r in records if r[0] <= p < r[0] + r[1]]

    assert cuts(alone, 0) == cuts(many, 0) == cuts(many, 39)


def test_refilled_lists_replace_the_old_work():
    cache = Cache(60, 4, 2, 8, torch.float64, seed=3)
    segments, rows, lengths = trie_batch(cache, *TRIE)
    capacity = TaskCapacity(8, 32, 64, 64)
    live = decode_tasks(segments, rows, page_size=4, capacity=capacity)
    q = torch.randn(8, 4, 8, dtype=torch.float64)
    lengths = torch.nn.functional.pad(lengths, (0, 2))
    ops.shared_prefix_attention(q, cache.k, cache.v, live, lengths, scale=0.3)
    fewer = decode_tasks(segments, rows[:2], page_size=4, capacity=capacity)
    address = live.buffer.data_ptr()
    live.copy_(fewer)
    got = ops.shared_prefix_attention(q, cache.k, cache.v, live, lengths, scale=0.3)
    assert live.buffer.data_ptr() == address
    torch.testing.assert_close(
        got, dense_rows(q, cache, segments, rows[:2], lengths, 0.3), rtol=1e-9, atol=1e-9
    )
    with pytest.raises(ValueError, match="cannot refill"):
        live.copy_(decode_tasks(segments, rows, page_size=4))


def test_bad_lists_are_refused_by_name():
    segments, rows = [Segment([0, 1], 8), Segment([2], 3)], [RowPath([0], [3])]
    with pytest.raises(TaskCapacityError) as error:
        decode_tasks(segments, rows, page_size=4, capacity=TaskCapacity(1, 1, 9, 9))
    assert error.value.needed == TaskCapacity(1, 2, 2, 3)
    with pytest.raises(ValueError, match="segment 0: 9 tokens do not fit 2 pages of 4"):
        decode_tasks([Segment([0, 1], 9)], rows, page_size=4)
    with pytest.raises(ValueError, match="segment 1 starts at 8 for one row and at 0 for row 1"):
        decode_tasks(segments, [RowPath([0, 1], [3]), RowPath([1], [4])], page_size=4)
    with pytest.raises(ValueError, match="row 0 has no page"):
        decode_tasks(segments, [RowPath([0], [])], page_size=4)
    with pytest.raises(ValueError, match="1 paths were given for 2 trees"):
        extend_tasks([2, 2, 3], [[]], page_size=4)
    with pytest.raises(ValueError, match=r"subtree_end\[2\]"):
        extend_tasks([2, 2, 9], [[], []], page_size=4)


def sampling_args(n, vocab, seed=0, temperature=1.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, vocab, generator=generator) * 2
    seeds = torch.randint(-(2**62), 2**62, (n,), generator=generator)
    position = torch.randint(0, 5000, (n,), generator=generator)
    return logits, torch.full((n,), temperature), seeds, position


def test_bits_equal_the_formula_in_plain_integers():
    def mix(x):
        x = (x ^ (x >> 30)) * reference.MIX1 % 2**64
        x = (x ^ (x >> 27)) * reference.MIX2 % 2**64
        return x ^ (x >> 31)

    for seed, position in ((0, 0), (-1, 7), (2**63 - 1, 2**40), (-(2**63), 123456)):
        key = mix((mix(seed % 2**64) + position * reference.PHI) % 2**64)
        bits = reference.uniform_bits(torch.tensor([seed]), torch.tensor([position]), 1000)[0]
        for j in (0, 1, 2, 999):
            x = (j * reference.C0 + key) % 2**32
            x = (x ^ (x >> 16)) * reference.C1 % 2**32
            x ^= x >> 15
            x = (x ^ (key >> 32)) * reference.C2 % 2**32
            assert int(bits[j]) % 2**32 == x ^ (x >> 15)


def test_exponentials_are_exact_where_they_are_small():
    bits = torch.cat([torch.arange(5000), torch.arange(0, 2**31, 9973), torch.tensor([2**31 - 1])]).int()
    got = reference.exponential(bits).double()
    u = (bits.double() + 0.5) / 2**31
    want = -torch.log1p(-u)
    small = u < 0.5
    torch.testing.assert_close(got[small], want[small], rtol=1e-6, atol=0)
    most = ~small & (u < 0.9999)
    torch.testing.assert_close(got[most], want[most], rtol=1e-4, atol=0)
    assert got.isfinite().all()
    assert (got[u >= 0.9999] > 9).all()  # rounded, and never a winner: its rivals would all have to be larger


def test_draws_follow_the_softmax_over_seeds_and_over_positions():
    """Chi-square of 40,000 draws of 12 tokens; 11 degrees of freedom: 40 is beyond one in 10,000."""
    logits = torch.linspace(-2, 2, 12).expand(40_000, -1)
    count = torch.arange(40_000)
    for seed, position in ((count, count * 0 + 5), (count * 0 + 17, count), (count, count)):
        token, _, _ = ops.sample(logits, torch.full((40_000,), 0.7), None, None, None, seed, position)
        expected = (logits[0] / 0.7).softmax(0) * 40_000
        chi = ((torch.bincount(token, minlength=12) - expected) ** 2 / expected).sum()
        assert chi < 40, chi
        pairs = torch.bincount(token[:-1] * 12 + token[1:], minlength=144)
        expected = (expected[:, None] * expected / 40_000).flatten()
        chi = ((pairs - expected) ** 2 / expected)[expected > 5].sum()
        assert chi < 230, chi  # neighbours are independent: about 140


def test_a_draw_depends_on_its_row_alone():
    logits, temperature, seed, position = sampling_args(33, 1000)
    token, logprob, _ = ops.sample(logits, temperature, None, None, None, seed, position)
    order = torch.randperm(33)
    shuffled = ops.sample(logits[order], temperature, None, None, None, seed[order], position[order])
    assert torch.equal(shuffled[0], token[order])
    one = ops.sample(logits[4:5], temperature[:1], None, None, None, seed[4:5], position[4:5])
    assert one[0] == token[4]
    torch.testing.assert_close(logprob, logits.log_softmax(-1).gather(1, token[:, None])[:, 0])


def test_greedy_rows_take_the_first_of_equals_beside_sampled_ones():
    logits, temperature, seed, position = sampling_args(4, 50)
    logits[1] = 0
    logits[1, [7, 30]] = 3.0
    temperature[:2] = 0
    temperature[2] = 0.5
    token, logprob, finite = ops.sample(logits, temperature, None, None, None, seed, position)
    assert token[0] == logits[0].argmax()
    assert token[1] == 7
    want = (
        (logits / torch.tensor([1.0, 1.0, 0.5, 1.0])[:, None]).log_softmax(-1).gather(1, token[:, None])[:, 0]
    )
    torch.testing.assert_close(logprob, want)
    assert finite.all()


def test_rows_that_are_not_finite_give_no_token():
    logits, temperature, seed, position = sampling_args(5, 40)
    logits[0, 3], logits[1, 0], logits[2], logits[3, 5] = (
        float("nan"),
        float("inf"),
        -float("inf"),
        -float("inf"),
    )
    for t in (0.0, 1.0):
        token, logprob, finite = ops.sample(logits, temperature * t, None, None, None, seed, position)
        assert finite.tolist() == [False, False, False, True, True]
        assert (token[:3] == -1).all()
        assert logprob[:3].isnan().all()
        assert (token[3:] >= 0).all()
        assert logprob[3:].isfinite().all()


def test_filters_keep_what_hugging_face_keeps():
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits, _, seed, position = sampling_args(64, 100, seed=3)
    for temperature, top_k, top_p, min_p in (
        (0.7, 20, 1.0, 0.0),
        (1.3, 0, 0.8, 0.0),
        (1.0, 0, 1.0, 0.2),
        (0.9, 15, 0.7, 0.05),
    ):
        floor = reference.sampling_floor(
            logits,
            torch.full((64,), temperature),
            torch.full((64,), top_k),
            torch.full((64,), top_p),
            torch.full((64,), min_p),
        )
        warpers = [TemperatureLogitsWarper(temperature)]
        warpers += [TopKLogitsWarper(top_k)] if top_k else []
        warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        warpers += [MinPLogitsWarper(min_p)] if min_p else []
        want = logits
        for warper in warpers:
            want = warper(None, want)
        kept = logits >= floor[:, None]
        assert (kept == want.isfinite()).all()
        args = (
            torch.full((64,), temperature),
            torch.full((64,), top_k),
            torch.full((64,), top_p),
            torch.full((64,), min_p),
        )
        for step in range(20):
            token, logprob, _ = ops.sample(logits, *args, seed, position + step)
            assert kept.gather(1, token[:, None]).all()
        torch.testing.assert_close(
            logprob, (logits / temperature).log_softmax(-1).gather(1, token[:, None])[:, 0]
        )
