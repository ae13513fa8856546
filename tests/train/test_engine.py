"""The in-process engine draws from the model's own distribution, over turns, ragged rows and rows that
leave."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pact_fast.rollout.in_process.decode import decodes
from pact_fast.rollout.in_process.hf import HFEngine, _Batch
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


@pytest.mark.parametrize(("temperature", "lean"), [(1.0, True), (0.7, True), (1.0, False)])
def test_logprobs_are_the_models_own_over_several_turns(model, temperature, lean):
    torch.manual_seed(1)
    engine = HFEngine(model)
    assert engine.lean  # both families in fp32
    engine.lean = lean
    prompts = [torch.randint(7, 61, (n,)).tolist() for n in (9, 3, 3, 14, 1, 6)]
    prompts[2] = prompts[1]
    rows, contexts = list(range(6)), {i: list(p) for i, p in enumerate(prompts)}
    for turn in range(3):
        out = generate(
            engine, [contexts[i] for i in rows], [4 + 5 * (i % 3) for i in rows], sessions=rows, seed=turn,
            temperature=temperature,
        )  # fmt: skip
        for i, generation in zip(rows, out, strict=True):
            want = logprobs_of(model, contexts[i], generation.token_ids, temperature)
            assert generation.logprobs == pytest.approx(want, abs=1e-4)
            contexts[i] += generation.token_ids + torch.randint(7, 61, (1 + (3 * i + turn) % 5,)).tolist()
        rows = rows[::2] if turn == 0 else rows[::-1]


def test_sessions_reuse_the_cache_and_change_nothing(model, monkeypatch):
    prompts = [[9, 8, 7], [10, 11, 12, 13]]
    first = HFEngine(model)
    start = generate(first, prompts, [6, 3], sessions=["a", "b"], temperature=0.0, stops=())
    longer = [p + g.token_ids + [20, 21] for p, g in zip(prompts, start, strict=True)]
    fed = []
    feed = _Batch.feed

    def counting(batch, model, chunks, lean=False):
        fed.append(sum(len(c) for c in chunks))
        return feed(batch, model, chunks, lean)

    monkeypatch.setattr(_Batch, "feed", counting)
    resumed = generate(first, longer, [5, 5], sessions=["a", "b"], temperature=0.0, stops=())
    assert fed[0] <= 3 + 3  # the last sampled token of each row and its two new ones
    fresh = generate(HFEngine(model), longer, [5, 5], temperature=0.0, stops=())
    assert [r.token_ids for r in resumed] == [f.token_ids for f in fresh]
    for r, f in zip(resumed, fresh, strict=True):
        assert r.logprobs == pytest.approx(f.logprobs, abs=1e-5)


def test_what_the_lean_step_does_not_know_runs_through_the_model(model):
    assert decodes(model)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert not decodes(model)
    handle.remove()
    assert decodes(model)
    model.model.layers[0].mlp.up_proj = torch.nn.Sequential(model.model.layers[0].mlp.up_proj)
    assert not decodes(model)
    assert not decodes(model.bfloat16())


def test_a_rewritten_prompt_is_not_served_from_the_cache(model):
    engine = HFEngine(model)
    generate(engine, [[9, 8, 7]], [4], sessions=["a"])
    out = generate(engine, [[9, 30, 7, 31]], [4], sessions=["a"])
    assert out[0].logprobs == pytest.approx(logprobs_of(model, [9, 30, 7, 31], out[0].token_ids), abs=1e-4)


def test_stop_token_ends_a_row_and_is_kept(model):
    out = generate(HFEngine(model), [[9, 8]] * 64, [40] * 64, stops=range(7, 30))
    assert {g.finish_reason for g in out} == {"stop"}
    for g in out:
        assert g.token_ids[-1] in range(7, 30)
        assert not any(t in range(7, 30) for t in g.token_ids[:-1])


def test_length_limit_is_per_row(model):
    out = generate(HFEngine(model), [[9], [9], [9]], [1, 4, 9], stops=())
    assert [len(g.token_ids) for g in out] == [1, 4, 9]
    assert {g.finish_reason for g in out} == {"length"}


def test_the_seed_makes_the_draw_repeatable(model):
    def draw(seed):
        return [g.token_ids for g in generate(HFEngine(model), [[9, 8]] * 8, [12] * 8, seed=seed)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_samples_follow_the_distribution(model):
    out = generate(HFEngine(model), [[9, 8, 7]] * 4000, [1] * 4000, stops=())
    counts = torch.bincount(torch.tensor([g.token_ids[0] for g in out]), minlength=61) / 4000
    with torch.no_grad():
        want = model(torch.tensor([[9, 8, 7]])).logits[0, -1].softmax(-1)
    assert float((counts - want).abs().max()) < 4 * (0.25 / 4000) ** 0.5


def test_a_sliding_window_model_is_refused():
    with pytest.raises(ValueError, match="sliding_attention"):
        HFEngine(MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=8)))


@pytest.mark.parametrize(
    "config",
    [
        GraniteConfig(**SHAPE, initializer_range=0.4, logits_scaling=3.0),
        Gemma3TextConfig(
            **SHAPE, initializer_range=0.4, final_logit_softcapping=2.0, layer_types=["full_attention"] * 2
        ),
    ],
    ids=["granite", "gemma3_text"],
)
def test_the_heads_scale_and_softcap_are_in_the_logprobs(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    (out,) = generate(HFEngine(model), [[9, 8, 7]], [12], temperature=0.8, stops=())
    assert out.logprobs == pytest.approx(logprobs_of(model, [9, 8, 7], out.token_ids, 0.8), abs=1e-4)


def test_a_row_with_its_own_seed_draws_the_same_whoever_stands_beside_it(model):
    prompts = [[9, 8], [10, 11, 12], [20], [9, 8]]
    together = generate(HFEngine(model), prompts, [40] * 4, seed=[5, 6, 7, 5])
    for i, seed in ((2, 7), (0, 5)):
        (alone,) = generate(HFEngine(model), [prompts[i]], [40], seed=[seed])
        assert alone.token_ids == together[i].token_ids
    assert together[0].token_ids == together[3].token_ids


def test_draws_follow_the_models_distribution(model):
    rows = 4000
    drawn = generate(HFEngine(model), [[9, 8, 7]] * rows, [1] * rows, seed=range(rows), temperature=1.3)
    counts = torch.bincount(torch.tensor([g.token_ids[0] for g in drawn]), minlength=61)
    with torch.no_grad():
        expected = (model(torch.tensor([[9, 8, 7]])).logits[0, -1].float() / 1.3).softmax(-1) * rows
    common = expected > 5
    chi2 = float(((counts - expected)[common] ** 2 / expected[common]).sum())
    assert chi2 < 2.0 * int(common.sum()), (chi2, int(common.sum()))
    assert int(counts[expected < 1e-3].sum()) == 0
