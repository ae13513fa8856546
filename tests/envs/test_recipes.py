"""Every recipe in configs/ can be read, and its environment takes its settings."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from pact_fast.config import load_config
from pact_fast.envs.base import make_env

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
RECIPES = [
    path for path in CONFIGS if "presets" not in yaml.safe_load(path.read_text())
]  # not the comparison's plans


def test_there_are_recipes():
    names = {path.stem for path in RECIPES}
    assert {"toolbox", "ftrl-qwen3-1.7b", "ftrl-qwen3-4b", "smollm2-toolbox", "smollm2-bfcl"} <= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_its_environment_takes_its_settings(path):
    config = load_config(path)
    if config.env.name == "bfcl":
        pytest.importorskip("bfcl_eval")
    env = make_env(config.env.name, config.env.settings)
    assert set(config.env.settings) <= {f.name for f in fields(env.settings)}
    env.close()


@pytest.mark.parametrize("name", ["ftrl-qwen3-1.7b", "ftrl-qwen3-4b"])
def test_the_recipes_of_the_paper_have_its_settings(name):
    """Table 5 of arXiv 2606.16215; what is not said in the file are the defaults of `pact`."""
    c = load_config(Path(__file__).parents[2] / "configs" / f"{name}.yaml")
    o, t, r = c.objective, c.train, c.rollout
    assert (t.prompts_per_step, t.prompts_per_step // t.num_mini_batches, t.max_steps) == (256, 32, 24)
    assert (t.learning_rate, t.lr_scheduler_type, r.num_generations, r.max_turns) == (1e-6, "constant", 8, 10)
    assert (o.beta, o.anchor_probability, o.sft_weight, o.epsilon) == (0.001, 0.4, 0.1, 0.2)
    assert (o.tool_call_start, o.tool_call_end, r.max_completion_length) == (0.8, 0.2, 23_000)
    assert (o.dual_clip, o.entropy_coef, o.advantages) == (None, 0.0, "turn")
    assert c.env.settings["reward"] == "call_matching"
