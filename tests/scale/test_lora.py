"""LoRA runs: adapters alone train and are saved, resume is bit for bit, export merges them."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pact_fast.commands.export import export
from pact_fast.train.checkpoint import Checkpointer
from pact_fast.train.trainer import Trainer
from tests.helpers.runs import adapters, config, curve, same_weights

pytest.importorskip("peft", reason="the lora extra is not installed")

CHANGES = {
    "lora__rank": 4,
    "train__max_steps": 3,
    "train__learning_rate": 0.01,
    "eval__every": 0,
    "eval__validation_tasks": 1,
    "checkpoint__every": 2,
}


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """(trainer, run folder) of a finished run, and its base weights before training."""
    run_dir = tmp_path_factory.mktemp("lora") / "run"
    trainer = Trainer(config(run_dir, **CHANGES))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    trainer.env.close()
    return trainer, run_dir, before


def test_adapters_train_and_everything_else_stays(lora):
    trainer, run_dir, before = lora
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {name for name in before if "lora_" in name}
    assert not any("lm_head" in name or "embed" in name for name in changed)
    assert set(curve(run_dir)[0]) >= {"loss", "policy_loss", "sft_loss"}


def test_only_adapters_are_saved(lora):
    _, run_dir, _ = lora
    (shard,) = Checkpointer(run_dir / "checkpoints").latest().glob("*.safetensors")
    assert all("lora_" in name for name in load_file(shard))
    assert all("lora_" in name for name in adapters(run_dir))


def test_a_lora_run_resumes_bit_for_bit(lora, tmp_path):
    _, run_dir, _ = lora
    resumed_dir = tmp_path / "run"
    (resumed_dir).mkdir()
    (run_dir / "checkpoints").rename(resumed_dir / "checkpoints")
    try:
        trainer = Trainer(config(resumed_dir, **CHANGES, checkpoint__resume=True))
        trainer.train()
        trainer.env.close()
    finally:
        (resumed_dir / "checkpoints").rename(run_dir / "checkpoints")
    assert same_weights(adapters(run_dir), adapters(resumed_dir))


def test_export_merges_the_adapters_into_a_plain_model(lora, tmp_path):
    trainer, run_dir, _ = lora
    trainer.checkpoint(3, None, wait=True)
    model = AutoModelForCausalLM.from_pretrained(export(run_dir, tmp_path / "out")).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = trainer.model.eval()(ids).logits
        base = trainer.model.get_base_model()
        with trainer.model.disable_adapter():
            without = base(ids).logits
        got = model(ids).logits
    assert torch.allclose(got, expected, atol=1e-5)
    assert float((got - without).abs().max()) > 1e-3
