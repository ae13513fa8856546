"""Small real training runs for tests of faults and scale: their options, and what must come out the same."""

import functools
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from pact_fast.config import load_config
from pact_fast.envs.toolbox.base_model import base_model_path
from pact_fast.metrics import read_metrics

SMALL = {
    "train.max_steps": 6,
    "train.prompts_per_step": 2,
    "train.learning_rate": 1e-3,  # a few steps have to move the weights
    "train.num_mini_batches": 2,
    "train.lr_scheduler_type": "cosine",
    "rollout.num_generations": 3,
    "rollout.max_completion_length": 64,
    "rollout.max_turn_length": 24,
    "rollout.max_turns": 2,
    # An untrained model never solves a task: all advantages are 0. The entropy term lets rollouts matter.
    "objective.entropy_coef": 0.05,
    "eval.every": 3,
    "eval.validation_tasks": 2,
    "eval.score_test": False,
    "eval.score_base": False,
    "eval.gauge_every": 2,
    "checkpoint.every": 2,
    "run.threads": 1,
    "run.device": "cpu",  # on a GPU machine, too: two ranks do not share a GPU
}


@functools.cache
def tiny_model():
    """A folder with two untrained layers behind the bundled tokenizer: a run of it takes a second."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = Path(tempfile.mkdtemp(prefix="pact-tiny-"))
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape = AutoConfig.from_pretrained(base_model_path(), **small, num_key_value_heads=1, head_dim=16)
    shape.layer_types = shape.layer_types[:2]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape).float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_model_path()).save_pretrained(folder)
    return folder


@functools.cache
def tiny_experts():
    """As `tiny_model`, of Qwen3-MoE layers whose routers have their auxiliary loss."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

    folder = Path(tempfile.mkdtemp(prefix="pact-experts-"))
    base = AutoConfig.from_pretrained(tiny_model())
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += ("num_key_value_heads", "head_dim", "tie_word_embeddings", "eos_token_id", "pad_token_id")
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    routers = {"output_router_logits": True, "router_aux_loss_coef": 0.1}
    torch.manual_seed(0)
    shape = Qwen3MoeConfig(**{name: getattr(base, name) for name in same}, **experts, **routers)
    AutoModelForCausalLM.from_config(shape).float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_model_path()).save_pretrained(folder)
    return folder


def words(run_dir, **changes):
    values = SMALL | {
        "model.path": str(tiny_model()),
        "run.dir": str(run_dir.parent),
        "run.name": run_dir.name,
    }
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def config(run_dir, preset="pact", **changes):
    return load_config(None, ["--preset", preset, *words(run_dir, **changes)])


def weights(run_dir):
    return load_file(run_dir / "model" / "model.safetensors")


def adapters(run_dir):
    return load_file(run_dir / "model" / "adapter_model.safetensors")


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def curve(run_dir):
    """Rows of metrics.jsonl without what clock and machine decide."""
    clock = ("time", "tokens_per_second", "rollout_tokens_per_second", "mfu")
    return [
        {k: v for k, v in row.items() if k not in clock and not k.startswith(("time/", "memory/"))}
        for row in read_metrics(run_dir)
    ]
