"""The engine over the Triton kernels of `kernels.decode`: compiled on a GPU, else a few steps interpreted."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pact_fast.kernels.decode import ops
from pact_fast.rollout import InProcessEngine
from tests.helpers.generation import generate, logprobs_of

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
SYSTEM = [7 + i % 40 for i in range(36)]
PROMPTS = [[*SYSTEM, 60], [*SYSTEM, 60], [*SYSTEM, 61, 62], [9] * 5]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE)).eval()


def test_the_kernels_give_the_references_tokens_and_the_models_logprobs(model, monkeypatch):
    want = generate(InProcessEngine(model, paged=True), PROMPTS, [3, 2, 3, 3], seed=3, stops=())
    if not GPU:
        monkeypatch.setattr(ops, "_triton", lambda impl, x: True)
    engine = InProcessEngine(model, paged=True, device=DEVICE)
    engine.prepare()
    if not GPU:
        engine.scheduler.runner.lean = False  # norms and activations through the kernels, too
    sessions = range(4)
    out = generate(engine, PROMPTS, [3, 2, 3, 3], seed=3, stops=(), sessions=sessions)
    assert [g.token_ids for g in out] == [g.token_ids for g in want]
    longer = [[*p, *g.token_ids, 11, 12] for p, g in zip(PROMPTS, out, strict=True)]
    for prompt, row in [
        *zip(PROMPTS, out, strict=True),
        *zip(longer, generate(engine, longer, [2] * 4, stops=(), sessions=sessions), strict=True),
    ]:
        assert row.logprobs == pytest.approx(logprobs_of(model, prompt, row.token_ids), abs=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device; run by `make gpu`")
def test_graphs_change_no_token(model):
    prompts = [[*SYSTEM, 60 + i // 4] for i in range(16)]
    tokens = []
    for graphs in (True, False):
        engine = InProcessEngine(model.to(DEVICE), cuda_graphs=graphs)
        first = generate(engine, prompts, [40 + i for i in range(16)], seed=1, stops=(5,), sessions=range(16))
        longer = [[*p, *g.token_ids, 11] for p, g in zip(prompts, first, strict=True)]
        second = generate(engine, longer, [30] * 16, seed=2, stops=(5,), sessions=range(16))
        tokens.append([g.token_ids for g in [*first, *second]])
        assert bool(engine.scheduler.slates.graphs) == graphs
    assert tokens[0] == tokens[1]
