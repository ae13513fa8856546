"""Switches that change speed or memory alone: compiled layers, optimizer states; and the gauges of both."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from pact_fast.config import ConfigError
from pact_fast.train.optimizer import AdamWBF16
from pact_fast.train.step_metrics import Phases, peak_flops
from pact_fast.train.trainer import Trainer
from pact_fast.tree.packing import pack_tree
from pact_fast.tree.policy import Policy
from tests.helpers.runs import config, curve, same_weights, tiny_model, weights

BRIEF = {"train__max_steps": 2, "eval__every": 0, "checkpoint__every": 1, "eval__validation_tasks": 1}


def run(run_dir, **changes):
    trainer = Trainer(config(run_dir, **BRIEF | changes))
    trainer.train()
    trainer.env.close()
    return trainer


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_compute_the_same_and_leave_the_model_as_it_was(checkpointing):
    model = AutoModelForCausalLM.from_pretrained(tiny_model()).float().train()
    pack = pack_tree([[5, 6, 7, 8], [5, 6, 9], [11, 12]])
    found = []
    for backend in (None, "aot_eager"):
        model.zero_grad()
        policy = Policy(model, gradient_checkpointing=checkpointing, compile=backend)
        hidden = policy.hidden(pack)
        assert all("forward" not in vars(layer) for layer in model.model.layers)
        hidden.square().sum().backward()
        assert all("forward" not in vars(layer) for layer in model.model.layers)
        found.append((hidden.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found[0][1], found[1][1], strict=True))
    with torch.no_grad():  # sampling goes through the model's own forward and attention
        assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_the_layers_that_are_compiled_are_those_that_run():
    model = AutoModelForCausalLM.from_pretrained(tiny_model()).float()
    policy, calls = Policy(model, compile="eager"), []
    policy._compiled = [(layer, counted(forward, calls)) for layer, forward in policy._compiled]
    policy.hidden(pack_tree([[5, 6, 7]]))
    assert len(calls) == model.config.num_hidden_layers


def counted(forward, calls):
    def call(*arguments, **options):
        calls.append(1)
        return forward(*arguments, **options)

    return call


def test_bf16_states_take_half_the_bytes_and_the_first_step_is_adamws():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(64, 8)) for _ in range(2))
    gradient, how = torch.randn(64, 8), {"lr": 0.1, "weight_decay": 0.1}
    a, b = AdamWBF16([ours], **how), torch.optim.AdamW([theirs], **how)
    for parameter, optimizer in ((ours, a), (theirs, b)):
        parameter.grad = gradient.clone()
        optimizer.step()
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert {v.dtype for k, v in a.state[ours].items() if k != "step"} == {torch.bfloat16}


def test_the_second_moment_follows_although_a_step_is_below_bf16s_resolution():
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(512))
    optimizer = AdamWBF16([parameter], lr=0.0)
    for _ in range(1000):
        parameter.grad = torch.ones(512)
        optimizer.step()
    second = optimizer.state[parameter]["exp_avg_sq"].float()
    assert float(second.mean()) == pytest.approx(1 - 0.999**1000, rel=0.02)


def test_bf16_states_minimise_as_adamw_does():
    ends = []
    for kind in (AdamWBF16, torch.optim.AdamW):
        torch.manual_seed(0)
        target, parameter = torch.randn(256), torch.nn.Parameter(torch.zeros(256))
        optimizer = kind([parameter], lr=0.02, weight_decay=0.0)
        for _ in range(150):
            optimizer.zero_grad()
            (parameter - target).square().sum().backward()
            optimizer.step()
        ends.append(float((parameter - target).square().mean().detach()))
    assert ends[0] < 0.02
    assert ends[0] == pytest.approx(ends[1], abs=0.01)


def resumes_bit_for_bit(tmp_path, **changes):
    whole = run(tmp_path / "whole", **changes)
    newest = tmp_path / "cut" / "checkpoints"
    newest.mkdir(parents=True)
    (tmp_path / "whole" / "checkpoints" / "step-000001").rename(newest / "step-000001")
    run(tmp_path / "cut", checkpoint__resume=True, **changes)
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    return whole


def test_a_run_with_bf16_states_resumes_bit_for_bit(tmp_path):
    trainer = resumes_bit_for_bit(tmp_path, train__optim="adamw_bf16")
    assert isinstance(trainer.optimizer, AdamWBF16)


def test_a_run_with_8_bit_states_resumes_bit_for_bit(tmp_path):
    pytest.importorskip("torchao", reason="the torchao extra is not installed")
    from torchao.optim.subclass_8bit import OptimState8bit

    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step: a minute on a CPU
        trainer = resumes_bit_for_bit(tmp_path, train__optim="adamw_8bit")
    states = [v for state in trainer.optimizer.state.values() for v in state.values()]
    assert any(isinstance(value, OptimState8bit) for value in states)


def test_time_and_memory_of_every_phase_and_utilisation_are_logged(tmp_path):
    trainer = run(tmp_path / "run", run__peak_tflops=0.05)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    row = next(row for row in rows if "loss" in row)
    for phase in ("rollout", "score", "update"):
        assert row[f"time/{phase}"] > 0
        assert 0 < row[f"memory/{phase}"] <= row["memory/peak"]
    assert row["time/step"] >= row["time/rollout"] + row["time/score"] + row["time/update"]
    assert row["mfu"] > 0
    assert row["entropy"] > 0
    assert trainer.peak == 0.05e12
    run(tmp_path / "unknown", train__max_steps=1)
    assert "mfu" not in curve(tmp_path / "unknown")[0]


def test_an_unknown_device_has_no_peak_and_phases_add_up():
    assert peak_flops(torch.device("cpu"), None) is None
    assert peak_flops(torch.device("cpu"), 2.0, 4) == 8e12
    phases = Phases(torch.device("cpu"))
    with phases("rollout"):
        pass
    assert set(phases.finish()) == {"time/rollout", "memory/rollout", "memory/peak", "time/step"}


def test_trackers_and_fsdp_options_that_cannot_be_had_are_refused(tmp_path):
    with pytest.raises(ValueError, match="report_to='mlflow'"):
        run(tmp_path / "run", run__report_to='["mlflow"]')
    with pytest.raises(ConfigError, match="torchrun, on one GPU too"):
        run(tmp_path / "run", distributed__compute_dtype="bfloat16")


def test_wandb_gets_the_rows_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(tmp_path / "run", run__report_to='["wandb"]', train__max_steps=1)
    assert list(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))
