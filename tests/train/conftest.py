"""A real trainer on the bundled environment and base model, kept small."""

import pytest

from pact_fast.config import load_config
from pact_fast.train.trainer import Trainer

SMALL = {
    "train.max_steps": 4,
    "train.prompts_per_step": 3,
    "rollout.num_generations": 4,
    "rollout.max_completion_length": 160,
    "rollout.max_turn_length": 48,
    "rollout.max_turns": 4,
    "eval.every": 0,
    "eval.validation_tasks": 4,
    "eval.test_tasks": 4,
    "eval.gauge_every": 1,
    "run.seed": 3,  # whose first rollouts differ in reward
    "run.threads": 1,
    "run.device": "cpu",  # on a GPU machine, too: results are compared to the last bits
}


@pytest.fixture
def make_trainer(tmp_path):
    made = []

    def make(preset="pact", **overrides):
        values = {
            **SMALL,
            "run.dir": str(tmp_path),
            **{k.replace("__", "."): v for k, v in overrides.items()},
        }
        words = [w for k, v in values.items() for w in (f"--{k}", str(v))]
        made.append(Trainer(load_config(None, ["--preset", preset, *words])))
        return made[-1]

    yield make
    for trainer in made:
        trainer.env.close()
