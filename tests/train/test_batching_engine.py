"""transformers' continuous batching as an engine: exact log-probs, repeatable batches, no seed a row."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pact_fast.config import ConfigError, RolloutConfig
from pact_fast.distributed import Sharded, World
from pact_fast.envs.toolbox.base_model import base_model_path
from pact_fast.rollout import RolloutError, build_engine
from pact_fast.rollout.in_process.batching import BatchingEngine
from tests.helpers.generation import generate, logprobs_of


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(base_model_path(), dtype=torch.float32).eval()


def test_logprobs_are_the_models_own_and_limits_hold_row_by_row(model):
    torch.manual_seed(1)
    prompts = [torch.randint(5, 700, (n,)).tolist() for n in (70, 3, 3, 140, 1, 33)]
    limits = [4 + 5 * (i % 3) for i in range(6)]
    state = torch.get_rng_state()
    engine = BatchingEngine(model)
    for temperature in (1.0, 0.7, 0.0):
        out = generate(engine, prompts, limits, temperature=temperature, stops=(1, 2))
        for prompt, limit, generation in zip(prompts, limits, out, strict=True):
            want = logprobs_of(model, prompt, generation.token_ids, temperature or 1.0)
            assert generation.logprobs == pytest.approx(want, abs=1e-4)
            ended = generation.token_ids[-1] in (1, 2)
            assert (generation.finish_reason == "stop") == ended
            assert ended or len(generation.token_ids) == limit
    assert torch.equal(torch.get_rng_state(), state), "a checkpoint holds this state: it must not move"
    assert model.config._attn_implementation == "sdpa"


def test_the_same_seed_repeats_a_batch_and_another_does_not(model):
    prompts = [[5 + i, 6, 7, 8] for i in range(20)]

    def draws(seed):
        return [g.token_ids for g in generate(BatchingEngine(model), prompts, [8] * 20, seed=seed, stops=())]

    assert draws(3) == draws(3) != draws(4)


def test_a_seed_a_row_is_refused_with_a_way_out(model, tmp_path):
    with pytest.raises(RolloutError, match=r"hf-batching.*choose the engine hf or http"):
        generate(BatchingEngine(model), [[5, 6]], [2], seed=[1])
    config = RolloutConfig(engine="hf-batching", per_sequence_seed=True)
    with pytest.raises(ConfigError, match="seed of its own"):
        build_engine(config, model, Sharded(model, World()), tmp_path)


def test_servers_without_the_engine_that_uses_them_are_refused(tmp_path):
    shape = Qwen3Config(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    model = Qwen3ForCausalLM(shape)
    with pytest.raises(ConfigError, match=r"rollout.servers.*needs rollout.engine=http"):
        build_engine(RolloutConfig(servers=["http://a:1"]), model, Sharded(model, World()), tmp_path)
