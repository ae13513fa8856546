"""Many requests of every kind at once: none is lost, doubled or wrong, and every page comes back."""

import os
import random

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pact_fast.rollout import InProcessEngine, RolloutError
from pact_fast.rollout.in_process.cache import PAGE, OutOfPages, PageTable
from pact_fast.rollout.in_process.engine import CPU_BYTES
from pact_fast.rollout.in_process.runner import KVPool
from pact_fast.rollout.in_process.scheduler import Request
from pact_fast.tree.scoring import sequence_logprobs
from tests.helpers.generation import generate, logprobs_of
from tests.train.test_engine import SHAPE

REQUESTS = int(os.environ.get("PACT_FAST_MIXED_REQUESTS", "1000"))


def tiny(dtype=torch.float32):
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, initializer_range=0.4)).to(dtype).eval()


def engine_of(model, pages, **options):
    """An engine with memory for so many pages."""
    engine = InProcessEngine(model, **options)
    engine.kv_memory = (pages + 0.5) * KVPool.page_bytes(engine.weights) / CPU_BYTES
    return engine


@pytest.mark.timeout(900)
def test_mixed_requests_come_back_once_each_with_the_trainers_logprobs_and_no_page_is_left():
    """Lengths, stops, temperatures, shared and own prompts, sessions over turns, cancellations, more rows
    than memory, weights that change under way. PACT_FAST_MIXED_REQUESTS=10000 is the long form."""
    rng = random.Random(0)
    model, pages = tiny(), 160
    engine = engine_of(model, pages, max_rows=48)
    engine.prepare()
    scheduler = engine.scheduler
    system = [7 + i % 50 for i in range(40)]
    shared = [system + [rng.randrange(7, 61) for _ in range(rng.randrange(1, 30))] for _ in range(12)]
    ended, weights, submitted, turns = [], {}, 0, 0
    waves = max(4, REQUESTS // 250)

    def request(prompt, session=None):
        return Request(
            prompt,
            rng.choice([1, 2, 5, 12, 30]),
            rng.choice([0.0, 0.7, 1.0, 1.0]),
            rng.randrange(2**40),
            frozenset(rng.sample(range(61), rng.choice([0, 1, 5]))),
            salt=rng.choice(["", "", "a"]),
            session=session,
            on_end=ended.append,
        )

    def new_weights(version):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 0.02 * (version % 2 * 2 - 1))
        weights[str(version)] = {k: v.clone() for k, v in model.state_dict().items()}
        engine.weights_changed()
        engine.prepare()
        scheduler.version = str(version)

    sent = []
    for wave in range(waves):
        new_weights(wave)  # rows of the wave before are still under way
        while submitted < REQUESTS * (wave + 1) // waves:
            rows = []
            for _ in range(rng.randrange(1, 30)):
                old = [r for r in ended[-50:] if r.session and r.finish_reason == "stop" and r.salt == ""]
                if old and rng.random() < 0.3:  # a further turn of what ended
                    before = old[-1]
                    before.salt, turns = "used", turns + 1
                    rows.append(request([*before.tokens, 11, 12, 13], before.session))
                elif rng.random() < 0.6:
                    rows += [request(list(rng.choice(shared))) for _ in range(rng.choice([1, 4]))]
                else:
                    own = [rng.randrange(7, 61) for _ in range(rng.choice([1, 15, 16, 17, 60]))]
                    rows.append(request(own, f"s{submitted}-{len(rows)}"))
            scheduler.submit(rows)
            sent += rows
            submitted += len(rows)
            for row in rng.sample(sent[-60:], min(2, len(sent))):
                row.cancelled |= rng.random() < 0.5
            for _ in range(rng.randrange(1, 12)):
                scheduler.step()
    while scheduler.busy:
        scheduler.step()
    assert len(ended) == len(sent) == len(set(map(id, ended)))
    assert {id(row) for row in ended} == {id(row) for row in sent}
    reasons = {reason: sum(row.finish_reason == reason for row in sent) for reason in
               ("stop", "length", "abort", "error")}  # fmt: skip
    assert reasons["error"] == 0
    assert min(reasons["stop"], reasons["length"], reasons["abort"], turns) > 0
    assert scheduler.preempted > 0, "more rows than memory"
    engine.reset()
    assert (scheduler.table.held, scheduler.pool.data.shape[2]) == (0, (pages) * PAGE)
    for row in sent:
        assert len(row.logprobs) == len(row.token_ids)
        if row.finish_reason == "stop":
            assert row.token_ids[-1] in row.stops
            assert not row.stops & set(row.token_ids[:-1])
        if row.finish_reason == "length":
            assert len(row.token_ids) == row.max_tokens
            assert not row.stops & set(row.token_ids)
    worst = checked = 0
    for version, state in weights.items():  # rows of one version alone have one model to be compared with
        model.load_state_dict(state)
        for temperature in (0.0, 0.7, 1.0):
            rows = [r for r in sent if r.versions == (version, version) and r.temperature == temperature]
            if not rows:
                continue
            with torch.no_grad():
                scores = sequence_logprobs(
                    model, [r.tokens for r in rows], temperature=temperature or 1.0, token_budget=8192
                )
            for row, score in zip(rows, scores, strict=True):
                want = score[len(row.prompt) - 1 :]
                worst = max(worst, float((want - torch.tensor(row.logprobs)).abs().max()))
                checked += 1
    print(
        f"{len(sent)} requests {reasons}, {turns} turns, {scheduler.preempted} preempted, {checked} scored, "
        f"worst gap {worst:.1e}"
    )
    assert checked > 0.6 * len(sent)
    assert worst < 1e-4


def test_rows_that_do_not_fit_run_fewer_at_a_time_draw_the_same_and_it_is_said_once(caplog):
    model = tiny(torch.float64)
    prompts = [[7 + i] * (10 + 5 * i) for i in range(12)]
    free = generate(InProcessEngine(model), prompts, [40] * 12, stops=())
    for paged in (False, True):
        caplog.clear()
        short = engine_of(model, 20, paged=paged)
        tight = generate(short, prompts, [40] * 12, stops=())
        assert [r.token_ids for r in tight] == [r.token_ids for r in free]
        assert short.scheduler.preempted > 0
        assert short.scheduler.table.held == 0
        assert short.scheduler.pool.data.shape[2] <= 20 * PAGE
        said = [r.message for r in caplog.records if "rollout.kv_memory" in r.message]
        assert len(said) == 1, said
    with pytest.raises(RolloutError, match=r"one sequence of 3\d\d tokens.*raise rollout.kv_memory"):
        generate(engine_of(model, 20), [[9] * 290], [40], stops=())
    with pytest.raises(RolloutError, match="leaves no room for one page"):
        generate(engine_of(model, 0), [[9]], [1])


def test_logits_that_are_not_finite_end_their_row_with_an_error_and_no_other():
    model = tiny()
    with torch.no_grad():
        model.get_input_embeddings().weight[60] = torch.nan  # tied to nothing: rows that read it are lost
        model.get_output_embeddings().weight[:] = torch.randn(61, 32)
    engine = InProcessEngine(model)
    rows = [Request(p, 12, 1.0, i, frozenset()) for i, p in enumerate([[9, 8] * 20, [60] * 40, [9, 8] * 20])]
    engine.prepare()
    engine.run(rows)
    lost = [row for row in rows if row.finish_reason == "error"]
    assert rows[1] in lost
    for row in rows:
        if row in lost:
            assert "logits are not finite" in row.error
            assert not any(lp != lp for lp in row.logprobs)
        else:
            assert row.logprobs == pytest.approx(logprobs_of(model, row.prompt, row.token_ids), abs=1e-4)
    with pytest.raises(RolloutError, match=r"row 1 of 2: the model's logits are not finite"):
        generate(engine, [[9], [60]], [1, 2])
    assert engine.scheduler.table.held == 0
    assert bool(engine.scheduler.pool.data.isfinite().all()), "pages of lost rows are wiped"


def test_an_interrupted_batch_leaves_nothing_behind(monkeypatch):
    model = tiny()
    engine = InProcessEngine(model)
    engine.prepare()
    real, calls = engine.scheduler.step, []

    def step():
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        real()

    monkeypatch.setattr(engine.scheduler, "step", step)
    with pytest.raises(KeyboardInterrupt):
        generate(engine, [[9, 8]] * 6, [30] * 6, sessions=range(6), stops=())
    assert engine.scheduler.table.held == 0
    assert not engine.scheduler.busy
    assert len(generate(engine, [[9, 8]] * 6, [30] * 6, stops=())) == 6


def test_the_page_table_counts_shares_and_forgets():
    table = PageTable(8)
    tokens = list(range(40))
    first = table.find("", tokens, 39)
    assert (first.pages, table.available) == ([], 7)
    table.extend(first, 40)
    first.count = 40
    table.index(first, tokens)
    assert (first.indexed, table.held) == (2, 3)
    second = table.find("", [*tokens[:33], 99], 33)
    assert second.pages == first.pages[:2]
    assert table.find("b", tokens, 39).pages == []
    table.release(first)
    assert table.held == 2
    with pytest.raises(OutOfPages):
        table.extend(second, 8 * PAGE)
    table.extend(second, 7 * PAGE)
    assert (table.available, second.count) == (0, 32)
    table.release(second)
    assert (table.held, table.available) == (0, 7)
    kept = table.find("", tokens, 39)
    assert kept.count == 32, "pages that nobody holds are still found"
    table.forget()
    assert table.find("", tokens, 39).count == 0
    table.release(kept)
    other = table.find("", tokens, 0)
    table.extend(other, 7 * PAGE)
    assert sorted(other.pages) == list(range(1, 8)), "every page once"


@pytest.mark.parametrize("paged", [False, True])
def test_a_token_that_is_not_finite_far_before_the_end_loses_its_row(paged, monkeypatch):
    """The prompt is cut into passes; the last token's own hidden state is finite."""
    from pact_fast.rollout.in_process import scheduler

    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 32)
    model = tiny()
    with torch.no_grad():
        model.get_input_embeddings().weight[60] = torch.nan
        model.get_output_embeddings().weight[:] = torch.randn(61, 32)
        model.get_output_embeddings().weight[60] = 0
    engine = InProcessEngine(model, paged=paged)
    system = [7 + i % 40 for i in range(16)]
    prompts = [[60] + [9] * 80, [9] * 50 + [60, 9], [9] * 70, system + [60] + [8] * 20, [*system, 8, 9]]
    rows = [Request(p, 1, 1.0, i, frozenset()) for i, p in enumerate(prompts)]
    engine.prepare()
    engine.run(rows)
    assert [row.finish_reason for row in rows][:4] == ["error", "error", "length", "error"]
    assert engine.scheduler.table.held == 0
    (again,) = generate(engine, [prompts[4]], [4], stops=())
    assert again.logprobs == pytest.approx(logprobs_of(model, prompts[4], again.token_ids), abs=1e-4)
