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
