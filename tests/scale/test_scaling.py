"""The accounting of docs/scaling.md against real models and a measured small case."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pact_fast.train.memory import (
    GIB,
    QWEN3,
    choose_checkpointing,
    device_capacity,
    memory,
    state_bytes,
    traffic,
)
from pact_fast.tree.families import family_of, layer_parameters
from pact_fast.tree.packing import pack_tree
from pact_fast.tree.policy import Policy

DOCS = Path(__file__).parent.parent.parent / "docs" / "scaling.md"


def model_of(family, device):
    config = Qwen3Config(
        hidden_size=family.hidden,
        num_hidden_layers=len(family.layers),
        intermediate_size=family.layers[0].intermediate,
        num_attention_heads=family.heads,
        num_key_value_heads=family.kv_heads,
        head_dim=family.head_dim,
        vocab_size=family.vocabulary,
        tie_word_embeddings=family.tied,
    )
    assert family_of(config) == family
    with torch.device(device):
        return Qwen3ForCausalLM(config)


@pytest.mark.parametrize("size", QWEN3)
def test_parameter_counts_are_those_of_the_real_architecture(size):
    model = model_of(QWEN3[size], "meta")
    assert QWEN3[size].parameters == sum(p.numel() for p in model.parameters())
    layer = model.model.layers[0]
    assert layer_parameters(QWEN3[size], QWEN3[size].layers[0]) == sum(p.numel() for p in layer.parameters())


SMALL = family_of(
    Qwen3Config(
        hidden_size=64,
        num_hidden_layers=3,
        intermediate_size=160,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=400,
        tie_word_embeddings=True,
    )
)


def test_states_are_what_training_really_holds():
    model = model_of(SMALL, "cpu")
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(20)[None]).logits.sum().backward()
    optimizer.step()
    held = sum(p.nbytes + p.grad.nbytes for p in model.parameters())
    held += sum(v.nbytes for state in optimizer.state.values() for v in state.values() if v.ndim)
    assert held == state_bytes(SMALL, 1)


def saved_bytes(model, tokens, checkpointing):
    """Bytes that the forward of the decoder keeps for the backward, weights not counted."""
    policy = Policy(model, gradient_checkpointing=checkpointing)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, or its address would be reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hidden = policy.hidden(pack_tree([list(range(tokens))]))
    assert hidden.requires_grad
    return sum(size for size, _ in kept.values())


def test_activations_of_a_checkpointed_and_of_a_kept_layer_match_the_formula():
    """Of a model of three layers less those of one: what does not grow with the layers falls out."""
    tokens, parts = 256, memory(SMALL, 1, 256)
    models = [model_of(replace(SMALL, layers=SMALL.layers[:n]), "cpu").train() for n in (1, 3)]
    for checkpointing, formula, tolerance in (
        (True, parts["checkpoints"] / len(SMALL.layers), 1e-6),
        (False, parts["one layer"], 0.04),
    ):
        one, three = (saved_bytes(model, tokens, checkpointing) for model in models)
        layer = (three - one) / 2
        expected = 2 * formula  # measured in fp32, twice bf16
        print(f"{checkpointing=}: {layer / tokens:.0f} bytes per token, {expected / tokens:.0f} expected")
        assert expected == pytest.approx(layer, rel=tolerance)


SHARDED = """
import sys, torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from pact_fast.distributed import Sharded, World
from tests.scale.test_scaling import SMALL, model_of

dist.init_process_group("fake", rank=0, world_size=int(sys.argv[1]), store=FakeStore())
model = model_of(SMALL, "cpu")
sharded = Sharded(model, World(0, int(sys.argv[1])), param_dtype=torch.bfloat16)
optimizer = torch.optim.AdamW(model.parameters())
sharded.run(lambda: model(torch.arange(20)[None]).logits.float().sum()).backward()
optimizer.step()
held = [x for p in model.parameters() for x in (p, p.grad, *optimizer.state[p].values()) if x.ndim]
print(sum(x.to_local().nbytes for x in held))
"""


def test_ranks_hold_their_share_of_the_states():
    """One of eight ranks under FSDP2, whose collectives carry nothing: what it holds is real."""
    places = os.environ | {"PYTHONPATH": str(DOCS.parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, "8"], capture_output=True, text=True, check=False, env=places
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == state_bytes(SMALL, 8)


def test_one_gpu_talks_to_none_and_none_is_an_error():
    assert sum(traffic(SMALL, 1, 4).values()) == 0
    with pytest.raises(ValueError, match="gpus=0"):
        memory(SMALL, 0, 1)


def test_the_small_model_fits_one_h100_at_32k_tokens():
    assert memory(QWEN3["1.7B"], 1, 32768)["total"] < 76 * GIB


def test_the_tables_of_the_document_are_the_formulas():
    text = DOCS.read_text()
    rows = re.findall(r"^\| (1\.7B|4B|8B|32B) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|", text, flags=re.MULTILINE)
    assert len(rows) >= 8
    for size, gpus, total, gathered in rows:
        assert float(total) == pytest.approx(memory(QWEN3[size], int(gpus), 32768)["total"] / GIB, abs=0.06)
        received = sum(traffic(QWEN3[size], int(gpus), 1).values()) / GIB
        assert float(gathered) == pytest.approx(received, abs=0.06)


def test_auto_checkpointing_takes_the_first_that_fits():
    family, tokens = QWEN3["1.7B"], 31_000
    totals = [memory(family, 1, tokens, way)["total"] for way in ("none", "keep_attention", "full")]
    assert totals == sorted(totals, reverse=True)
    kept = memory(family, 1, tokens, "keep_attention")["attention"]
    assert kept == tokens * 28 * 16 * (2 * 128 + 4)  # bf16 out and fp32 lse: 3.4 GiB
    none, keep, _ = totals
    for capacity, way in ((none, "none"), (none - 1, "keep_attention"), (keep - 1, "full"), (1, "full")):
        assert choose_checkpointing(family, 1, tokens, capacity) == way
    assert choose_checkpointing(family, 1, tokens, 0.9 * 80 * GIB) == "keep_attention"
    assert device_capacity(torch.device("cpu")) > 1e8
