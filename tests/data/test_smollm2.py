"""A real small model: SmolLM2-135M-Instruct. It takes minutes and 4 GB, so it runs where a folder is named:

python scripts/smollm2.py --check
PACT_FAST_SMOLLM2=.cache/smollm2-135m pytest -s tests/data/test_smollm2.py
"""

import json
import math
import os
import resource
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from pact_fast.cli import main
from pact_fast.config import load_config
from pact_fast.data.chat import ChatFormat
from pact_fast.envs.base import make_env
from pact_fast.rollout import InProcessEngine
from pact_fast.rollout.loop import RolloutLimits, collect_rollouts
from pact_fast.train.trainer import Trainer
from tests.helpers.conversations import SAMPLE_PROMPT, SAMPLE_TOOLS, SAMPLE_TRACE
from tests.helpers.environments import own_ftrl_file, shared_file

CONTEXT = 8192
CONFIGS = Path(__file__).parents[2] / "configs"


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


@pytest.fixture(scope="module")
def ftrl_file(tmp_path_factory):
    """The published tasks where they are at hand, else ours in their layout."""
    try:
        return shared_file("data/ftrl_dev.parquet")
    except pytest.skip.Exception:
        return own_ftrl_file(tmp_path_factory.mktemp("ftrl"))


def test_format_is_the_bundled_hermes_with_tags_as_text(chat):
    assert (chat.name, chat.own_template) == ("hermes", False)
    tokens = chat.prompt(SAMPLE_PROMPT, SAMPLE_TOOLS) + chat.trace(SAMPLE_TRACE)
    text = chat.tokenizer.apply_chat_template(
        SAMPLE_PROMPT + SAMPLE_TRACE, tools=SAMPLE_TOOLS, chat_template=chat.template, tokenize=False
    )
    assert chat.decode(tokens.ids) + "\n" == text
    assert chat.tokenizer(text, add_special_tokens=False)["input_ids"][:-1] == tokens.ids


def test_a_prompt_past_the_context_counts_as_length_limit(chat, model):
    pytest.importorskip("bfcl_eval")
    env = make_env("bfcl", {"categories": ["base"]})
    record = env.records("test")[0]
    limits = RolloutLimits(context_length=len(chat.prompt(record.prompt, record.tools)))
    (rollout,) = collect_rollouts(
        InProcessEngine(model), env, chat, [record], num_generations=1, limits=limits
    )
    env.close()
    assert (rollout.num_sampled, rollout.outcome.failure) == (0, "length_limit")


@pytest.mark.parametrize("name", ["ftrl", "bfcl"])
def test_eval_rolls_out_a_few_tasks_within_the_context(folder, ftrl_file, tmp_path, name):
    words = ["--setting", f"test_path={ftrl_file}"]
    if name == "bfcl":
        pytest.importorskip("bfcl_eval")
        words = ["--setting", "short_descriptions=true", "--setting", "max_response_length=1000"]
    limits = ["--max-turns", "2", "--max-completion-length", "512", "--max-turn-length", "48"]
    out = tmp_path / name
    assert main(["eval", folder, "--env", name, "--tasks", "2", "--out", str(out), *words, *limits]) == 0
    summary = json.loads((out / "summary.json").read_text())["all"]
    assert summary["tasks"] == 2
    assert set(summary["scores"]) >= ({"solve_f1"} if name == "ftrl" else {"accuracy"})
    assert sum(summary["failures"].values()) == 2 - 2 * summary["solved"][0]
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    for row in rows:
        assert 0 < row["sampled_tokens"] <= 96
        assert row["prompt_tokens"] + row["completion_tokens"] <= CONTEXT
    print(*rows, sep="\n")


def test_one_pact_step_of_the_recipe_starts_on_policy_and_changes_the_weights(folder, tmp_path):
    words = {
        "model.path": folder,
        "run.dir": str(tmp_path),
        "train.max_steps": "1",
        "train.prompts_per_step": "1",
        "rollout.num_generations": "2",
        "rollout.max_turns": "2",
        "rollout.max_completion_length": "128",
        "rollout.max_turn_length": "32",
        "objective.skip_zero_advantage": "false",
        "eval.every": "0",
        "eval.validation_tasks": "1",
        "eval.score_base": "false",
        "eval.score_test": "false",
        "checkpoint.every": "0",
        "run.threads": "1",
    }
    options = [word for key, value in words.items() for word in (f"--{key}", value)]
    trainer = Trainer(load_config(CONFIGS / "smollm2-toolbox.yaml", options))
    before = trainer.model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    start = time.perf_counter()
    trainer.train()
    trainer.env.close()
    assert not before.equal(trainer.model.model.layers[0].self_attn.q_proj.weight)
    rows = [json.loads(line) for line in (trainer.run_dir / "metrics.jsonl").read_text().splitlines()]
    row = next(row for row in rows if "loss" in row)
    assert math.isfinite(row["loss"])
    assert row["grad_norm"] > 0
    assert row["sft_loss"] > 0
    assert abs(row["pact/ppo_kl"]) < 1e-6
    assert row["clip_ratio"] == 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    names = (
        "loss",
        "policy_loss",
        "sft_loss",
        "grad_norm",
        "num_tokens",
        "pact/ppo_kl",
        "pact/logprob_mismatch",
    )
    told = ", ".join(f"{name} {row[name]:.4g}" for name in names if name in row)
    print(f"\none PACT step: {told}, {time.perf_counter() - start:.0f} s, peak memory {peak:.1f} GiB")
