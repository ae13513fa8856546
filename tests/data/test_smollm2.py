"""A real small model: SmolLM2-135M-Instruct. It takes minutes and 3 GB, so it runs where a folder is named:

python scripts/smollm2.py .cache/smollm2
PACT_FAST_SMOLLM2=.cache/smollm2 pytest tests/data/test_smollm2.py
"""

import os

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from pact_fast.config import load_config
from pact_fast.data.chat import ChatFormat
from pact_fast.envs.base import make_env
from pact_fast.rollout.hf import HFEngine
from pact_fast.rollout.loop import RolloutLimits, collect_rollouts
from pact_fast.trainer import Trainer
from tests.data.conftest import SAMPLE_PROMPT, SAMPLE_TOOLS, SAMPLE_TRACE
from tests.envs.env_helpers import shared_file

CONTEXT = 8192


@pytest.fixture(scope="module")
def folder():
    if "PACT_FAST_SMOLLM2" not in os.environ:
        pytest.skip("heavy: set PACT_FAST_SMOLLM2 to a folder made by scripts/smollm2.py")
    return os.environ["PACT_FAST_SMOLLM2"]


@pytest.fixture(scope="module")
def chat(folder):
    return ChatFormat.for_tokenizer(AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def test_format_is_the_bundled_hermes_with_tags_as_text(chat):
    assert (chat.name, chat.own_template) == ("hermes", False)
    tokens = chat.prompt(SAMPLE_PROMPT, SAMPLE_TOOLS) + chat.trace(SAMPLE_TRACE)
    text = chat.tokenizer.apply_chat_template(
        SAMPLE_PROMPT + SAMPLE_TRACE, tools=SAMPLE_TOOLS, chat_template=chat.template, tokenize=False
    )
    assert chat.decode(tokens.ids) + "\n" == text
    assert chat.tokenizer(text, add_special_tokens=False)["input_ids"][:-1] == tokens.ids


@pytest.mark.parametrize("name", ["ftrl", "bfcl", "toolbox"])
def test_rolls_out_within_its_context(chat, model, name):
    settings: dict = {"difficulty": 2}
    if name == "ftrl":
        settings = {"test_path": str(shared_file("data/ftrl_dev.parquet"))}
    elif name == "bfcl":
        pytest.importorskip("bfcl_eval")
        settings = {"categories": ["base"], "short_descriptions": True}
    env = make_env(name, settings)
    records = [r for r in env.records("test") if len(chat.prompt(r.prompt, r.tools)) < CONTEXT - 256][:2]
    assert len(records) == 2
    limits = RolloutLimits(max_turns=2, max_completion_length=192, max_turn_length=48)
    rollouts = collect_rollouts(HFEngine(model), env, chat, records, num_generations=1, limits=limits)
    env.close()
    for rollout in rollouts:
        assert rollout.outcome is not None
        assert 0 < rollout.num_sampled <= 96
        assert len(rollout.prompt) + len(rollout.token_ids) <= CONTEXT


def test_one_pact_step_changes_the_weights_and_starts_on_policy(folder, tmp_path):
    words = {
        "model.path": folder,
        "run.dir": str(tmp_path),
        "model.gradient_checkpointing": "true",
        "train.max_steps": "1",
        "train.prompts_per_step": "1",
        "train.learning_rate": "1e-5",
        "rollout.num_generations": "2",
        "rollout.max_turns": "2",
        "rollout.max_prompt_length": "4096",
        "rollout.max_completion_length": "128",
        "rollout.max_turn_length": "48",
        "eval.every": "0",
        "eval.score_base": "false",
        "eval.score_test": "false",
        "run.threads": "1",
    }
    options = [word for key, value in words.items() for word in (f"--{key}", value)]
    trainer = Trainer(load_config(None, ["--preset", "pact", *options]))
    before = trainer.model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    trainer.train()
    trainer.env.close()
    assert not before.equal(trainer.model.model.layers[0].self_attn.q_proj.weight)
