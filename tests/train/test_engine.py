"""The in-process engine draws from the model's own distribution, over turns, ragged rows and rows that
leave."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pact_fast.rollout import InProcessEngine, RolloutError
from tests.helpers.generation import generate, logprobs_of

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}


@pytest.fixture(params=["qwen3", "llama"])
def model(request):
    torch.manual_seed(0)
    kind = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[request.param]
    # Default initialisation is nearly uniform; larger weights make positions and context matter.
    return kind[1](kind[0](**SHAPE, initializer_range=0.4)).eval()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_are_the_models_own_over_several_turns(model, temperature):
    torch.manual_seed(1)
    engine = InProcessEngine(model)
    prompts = [torch.randint(7, 61, (n,)).tolist() for n in (9, 3, 3, 34, 1, 6)]
    prompts[2] = prompts[1]
    rows, contexts = list(range(6)), {i: list(p) for i, p in enumerate(prompts)}
    for turn in range(3):
        out = generate(
            engine, [contexts[i] for i in rows], [4 + 5 * (i % 3) for i in rows], sessions=rows, seed=turn,
            temperature=temperature,
        )  # fmt: skip
        for i, generation in zip(rows, out, strict=True):
            want = logprobs_of(model, contexts[i], generation.token_ids, temperature or 1.0)
            assert generation.logprobs == pytest.approx(want, abs=1e-4)
            contexts[i] += generation.token_ids + torch.randint(7, 61, (1 + (3 * i + turn) % 5,)).tolist()
        rows = rows[::2] if turn == 0 else rows[::-1]
    engine.reset()
    assert engine.scheduler.table.held == 0


def test_sessions_reuse_the_cache_and_change_nothing(model):
    prompts = [[9, 8, 7], [10, 11, 12, 13]]
    first = InProcessEngine(model)
    start = generate(first, prompts, [6, 3], sessions=["a", "b"], temperature=0.0, stops=())
    longer = [p + g.token_ids + [20, 21] for p, g in zip(prompts, start, strict=True)]
    before = first.scheduler.prefilled
    resumed = generate(first, longer, [5, 5], sessions=["a", "b"], temperature=0.0, stops=())
    assert first.scheduler.prefilled - before == 3 + 3, "the last sampled token of each row and two new ones"
    fresh = generate(InProcessEngine(model), longer, [5, 5], temperature=0.0, stops=())
    assert [r.token_ids for r in resumed] == [f.token_ids for f in fresh]
    for r, f in zip(resumed, fresh, strict=True):
        assert r.logprobs == pytest.approx(f.logprobs, abs=1e-5)


def test_a_prompt_is_prefilled_once_for_its_group_and_a_common_beginning_once_for_all(model):
    engine = InProcessEngine(model)
    system = [7 + i % 50 for i in range(64)]
    prompts = [system + [7 + i] * 9 for i in range(4) for _ in range(8)]
    out = generate(engine, prompts, [6] * 32, stops=())
    assert engine.scheduler.prefilled == 64 + 4 * 9
    for prompt, row in zip(prompts, out, strict=True):
        assert row.logprobs == pytest.approx(logprobs_of(model, prompt, row.token_ids), abs=1e-4)
    again = generate(engine, prompts[::8], [3] * 4, stops=())
    assert engine.scheduler.prefilled == 64 + 4 * 9 + 4 * 9, "whole pages are found, tails computed"
    assert [r.token_ids for r in again] != [out[i].token_ids[:3] for i in range(0, 32, 8)]


def test_a_rewritten_prompt_is_not_served_from_the_cache(model):
    engine = InProcessEngine(model)
    generate(engine, [[9, 8, 7]], [4], sessions=["a"])
    out = generate(engine, [[9, 30, 7, 31]], [4], sessions=["a"])
    assert out[0].logprobs == pytest.approx(logprobs_of(model, [9, 30, 7, 31], out[0].token_ids), abs=1e-4)


def test_stop_token_ends_a_row_and_is_kept(model):
    out = generate(InProcessEngine(model), [[9, 8]] * 64, [40] * 64, stops=range(7, 30))
    assert {g.finish_reason for g in out} == {"stop"}
    for g in out:
        assert g.token_ids[-1] in range(7, 30)
        assert not any(t in range(7, 30) for t in g.token_ids[:-1])


def test_length_limit_is_per_row(model):
    out = generate(InProcessEngine(model), [[9], [9], [9]], [1, 4, 9], stops=())
    assert [len(g.token_ids) for g in out] == [1, 4, 9]
    assert {g.finish_reason for g in out} == {"length"}


def test_the_seed_makes_the_draw_repeatable(model):
    def draw(seed):
        return [g.token_ids for g in generate(InProcessEngine(model), [[9, 8]] * 8, [12] * 8, seed=seed)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_row_draws_the_same_whoever_stands_beside_it_and_whatever_is_cached(model):
    prompts = [[9, 8], [10, 11, 12], [20] * 40, [9, 8]]
    engine = InProcessEngine(model.double())
    together = generate(engine, prompts, [40] * 4, seed=[5, 6, 7, 5])
    for i, seed in ((2, 7), (0, 5)):
        for one in (engine, InProcessEngine(model)):
            (alone,) = generate(one, [prompts[i]], [40], seed=[seed])
            assert alone.token_ids == together[i].token_ids
    assert together[0].token_ids == together[3].token_ids
    small = InProcessEngine(model, max_rows=2)
    assert [g.token_ids for g in generate(small, prompts, [40] * 4, seed=[5, 6, 7, 5])] == [
        g.token_ids for g in together
    ]


def test_draws_follow_the_models_distribution(model):
    rows = 4000
    engine = InProcessEngine(model, max_rows=rows)
    drawn = generate(engine, [[9, 8, 7]] * rows, [1] * rows, seed=range(rows), temperature=1.3, stops=())
    counts = torch.bincount(torch.tensor([g.token_ids[0] for g in drawn]), minlength=61)
    with torch.no_grad():
        expected = (model(torch.tensor([[9, 8, 7]])).logits[0, -1].float() / 1.3).softmax(-1) * rows
    common = expected > 5
    chi2 = float(((counts - expected)[common] ** 2 / expected[common]).sum())
    assert chi2 < 2.0 * int(common.sum()), (chi2, int(common.sum()))
    assert int(counts[expected < 1e-3].sum()) == 0


def test_new_weights_are_used_and_no_key_of_the_old_ones(model):
    engine = InProcessEngine(model)
    prompt = [9 + i % 40 for i in range(50)]
    generate(engine, [prompt], [4], sessions=["a"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    engine.weights_changed()
    (row,) = generate(engine, [prompt], [6], sessions=["a"], stops=())
    assert row.logprobs == pytest.approx(logprobs_of(model, prompt, row.token_ids), abs=1e-4)


def test_the_trainers_model_is_neither_run_nor_changed(model):
    ran = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: ran.append(1))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.train()
    generate(InProcessEngine(model), [[9, 8, 7]], [4])
    assert not ran
    assert model.training
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_bad_rows_are_named_and_nothing_is_left_behind(model):
    engine = InProcessEngine(model)
    generate(engine, [[9, 8]], [2])
    for prompts, limits, stops, message in [
        ([[9], []], [1, 1], (), "prompt is empty"),
        ([[9]], [0], (), "max_tokens=0"),
        ([[9] * 512], [1], (), "512 tokens leaves no room in the model's context of 512"),
        ([[9, 61]], [1], (), "prompt holds 61"),
        ([[9]], [1], (5, 99), "stop_token_ids holds 99"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate(engine, prompts, limits, stops=stops)
    with pytest.raises(ValueError, match="temperature=-1"):
        generate(engine, [[9]], [1], temperature=-1.0)
    assert engine.scheduler.table.held == 0
    assert not engine.scheduler.busy
    (row,) = generate(engine, [[9] * 510], [40], stops=())
    assert (len(row.token_ids), row.finish_reason) == (2, "length"), "the context ends the row"
    engine.close()
    with pytest.raises(RolloutError, match="closed"):
        generate(engine, [[9]], [1])
    with pytest.raises(ValueError, match="kv_memory=0"):
        InProcessEngine(model, kv_memory=0.0)
